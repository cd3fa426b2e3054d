//! The worker pool: who takes part, who waits for whom, and how it ends.
#![cfg(not(loom))]

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use pageferry_copy::{PoolError, WorkerPool};
use pageferry_sys::affinity::{CpuSet, current_cpu};

fn pool(copiers: usize) -> WorkerPool {
    WorkerPool::with_copiers(copiers, &[]).expect("threads can be started")
}

#[test]
fn the_caller_is_number_0_and_each_helper_has_a_number_of_its_own() {
    let pool = pool(4);
    // All four must be inside at once for the barrier to open.
    let (barrier, seen) = (Barrier::new(4), Mutex::new(Vec::new()));
    let caller = std::thread::current().id();
    pool.run(3, &|number| {
        barrier.wait();
        assert_eq!(number == 0, std::thread::current().id() == caller);
        seen.lock().expect("nobody panics").push(number);
    });
    let mut seen = seen.into_inner().expect("nobody panics");
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2, 3]);
}

#[test]
fn at_most_so_many_helpers_join_as_were_asked_for() {
    let pool = pool(4);
    for helpers in 0..=3 {
        for _ in 0..50 {
            let entered = AtomicUsize::new(0);
            pool.run(helpers, &|number| {
                assert!(number <= helpers);
                entered.fetch_add(1, Ordering::Relaxed);
            });
            assert!((1..=helpers + 1).contains(&entered.into_inner()));
        }
    }
}

#[test]
fn a_caller_does_not_wait_for_a_helper_that_has_not_begun() {
    let pool = pool(2);
    let (inside, release) = (Barrier::new(3), Barrier::new(2));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pool.run(1, &|number| {
                inside.wait();
                if number == 1 {
                    release.wait();
                }
            });
        });
        // From here on the only helper is held by the other thread's run.
        inside.wait();
        let calls = AtomicUsize::new(0);
        pool.run(1, &|_| {
            calls.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(calls.into_inner(), 1);
        release.wait();
    });
}

#[test]
fn runs_can_be_nested_and_concurrent() {
    let pool = pool(3);
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let work = AtomicUsize::new(0);
                    pool.run(2, &|_| {
                        pool.run(2, &|_| {
                            while work.fetch_add(1, Ordering::Relaxed) < 20 {
                                total.fetch_add(1, Ordering::Relaxed);
                            }
                        });
                    });
                }
            });
        }
    });
    assert_eq!(total.into_inner(), 4 * 200 * 20);
}

#[test]
fn a_panic_anywhere_reaches_the_caller_after_all_have_left_and_the_pool_lives_on() {
    let pool = pool(2);
    for culprit in 0..2 {
        let (barrier, inside) = (Barrier::new(2), AtomicUsize::new(0));
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(1, &|number| {
                inside.fetch_add(1, Ordering::SeqCst);
                barrier.wait();
                inside.fetch_sub(1, Ordering::SeqCst);
                if number == culprit {
                    std::panic::resume_unwind(Box::new(culprit));
                }
            });
        }));
        let panic = result.expect_err("one of the two panicked");
        assert_eq!(panic.downcast_ref(), Some(&culprit));
        assert_eq!(inside.into_inner(), 0);
    }
}

#[test]
fn a_pool_of_one_runs_on_the_caller() {
    let pool = pool(1);
    assert_eq!(pool.helpers(), 0);
    let calls = AtomicUsize::new(0);
    pool.run(8, &|number| {
        assert_eq!(number, 0);
        calls.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(calls.into_inner(), 1);
}

#[test]
fn pinning_to_a_cpu_that_does_not_exist_names_it() {
    let error = WorkerPool::with_copiers(2, &[1 << 20]).expect_err("no machine has it");
    assert!(matches!(error, PoolError::Pin { cpu: 1_048_576, .. }));
    assert!(error.to_string().contains("CPU 1048576"), "{error}");
}

#[test]
fn in_the_child_of_a_fork_the_pool_works_alone_and_drops_without_hanging() {
    // SAFETY: the child only runs the pool, which is made for this, and leaves by _exit.
    works_alone(|| unsafe { libc::fork() }.into());
}

#[test]
fn in_a_child_of_the_raw_system_call_the_pool_works_alone_and_drops_without_hanging() {
    // SAFETY: as of fork, but that the C library does not know: the child allocates nothing new.
    works_alone(|| unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) });
}

fn works_alone(fork: impl FnOnce() -> libc::c_long) {
    let pool = Arc::new(pool(3));
    let ran = AtomicUsize::new(0);
    pool.run(2, &|_| {
        ran.fetch_add(1, Ordering::Relaxed);
    });
    let child = libc::pid_t::try_from(fork()).expect("a process number");
    if child == 0 {
        // SAFETY: a child that hangs is killed.
        unsafe { libc::alarm(10) };
        let before = ran.load(Ordering::Relaxed);
        pool.run(2, &|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        let alone = ran.load(Ordering::Relaxed) == before + 1;
        drop(pool);
        // SAFETY: ends the child without running what belongs to the parent.
        unsafe { libc::_exit(i32::from(!alone)) };
    }
    assert!(child > 0, "{}", std::io::Error::last_os_error());
    let mut status = -1;
    // SAFETY: our own child, and a place for its status.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0);
}

/// On kernels that wake a thread near its waker, a helper that once slept on its caller's CPU
/// would wait there for ever.
#[test]
fn a_helper_wakes_where_its_caller_does_not_run_and_may_roam_again_later() {
    let all = CpuSet::of_thread(0).expect("the calling thread is there");
    let mut cpus = all.iter();
    let (Some(one), Some(other)) = (cpus.next(), cpus.next()) else {
        eprintln!("skipped: one CPU");
        return;
    };
    // The pool's threads are started first: they may run everywhere.
    let pool = pool(2);
    let (tries, mut elsewhere) = (20, 0);
    for i in 0..tries {
        // Where the helper slept the last time, if there are only two.
        let ours = if i % 2 == 0 { one } else { other };
        CpuSet::from_iter([ours]).apply(0).expect("it is allowed");
        std::thread::sleep(Duration::from_millis(2));
        let woke_on = AtomicUsize::new(usize::MAX);
        pool.run(1, &|number| {
            if number == 1 {
                let cpu = current_cpu().expect("a CPU");
                woke_on.store(cpu as usize, Ordering::Release);
            }
            // The caller does not sleep: on its CPU the helper would wait for its turn.
            while woke_on.load(Ordering::Acquire) == usize::MAX {
                std::hint::spin_loop();
            }
        });
        elsewhere += usize::from(woke_on.into_inner() != ours as usize);
    }
    // Other programs may make the scheduler think otherwise now and then.
    assert!(elsewhere > tries / 2, "{elsewhere} of {tries} times on another CPU");

    std::thread::sleep(Duration::from_millis(300));
    let set = Mutex::new(None);
    let entered = Barrier::new(2);
    pool.run(1, &|number| {
        entered.wait();
        if number == 1 {
            *set.lock().expect("nobody panics") = CpuSet::of_thread(0).ok();
        }
    });
    // It was given back while the helper slept; this call narrowed it anew, by the caller's CPU.
    let set = set.into_inner().expect("nobody panics").expect("it is there");
    let last = CpuSet::from_iter([if tries % 2 == 0 { other } else { one }]);
    assert_eq!(set, all.without(&last));
}
