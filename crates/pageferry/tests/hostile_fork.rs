//! Forks in the middle of moves: children see the memory of one moment, and the parent's pages
//! move again when the children have gone.

mod support;

use allocator_api2::alloc::Allocator;
use pageferry::copy::model::{Behaviour, ModelEngine};
use pageferry::copy::{Capabilities, CopyBatch, CopyEngine, Kernel, SubmitError};
use pageferry::{Busy, Engine, Folios, MigrateError, Order, Outcome, Region, RegionAlloc};
use pageferry_sys::inject::{Fault, Faulty};
use pageferry_sys::{Errno, SysOp, page_size};
use std::alloc::Layout;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use support::siege::{Mover, StopOnDrop, Watchdog, account, alone};
use support::{Racers, build, check, engine, fill, nodes, thinned, value, word};

/// A forked child that runs `what` and exits with what it returns; a child that hangs is killed
/// by SIGALRM.
fn fork(what: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: the child runs `what` on its only thread and ends by _exit.
    let pid = unsafe { libc::fork() };
    if pid != 0 {
        assert!(pid > 0, "fork: {}", std::io::Error::last_os_error());
        return pid;
    }
    // SAFETY: plain system calls of a child that nobody else shares.
    unsafe { libc::alarm(20) };
    let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(what)).unwrap_or(101);
    // SAFETY: ends the child without running what belongs to the parent.
    unsafe { libc::_exit(code) }
}

/// The exit status of a child; a signal that killed it is negative.
fn wait(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    loop {
        // SAFETY: waits for a child of this test; the kernel writes the status.
        let got = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        if got == pid {
            break;
        }
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EINTR));
    }
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -libc::WTERMSIG(status) }
}

fn region(engine: &Engine, bytes: usize, folios: Folios) -> Arc<Region> {
    let region = engine.map(bytes).folios(folios).build().expect("memory for the test");
    fill(&region, 0..bytes);
    Arc::new(region)
}

/// Words that one thread writes, one after the other, round after round.
const SWEPT: usize = 4096;

/// Whether what a child sees is what the parent's memory held at one moment: the words that
/// nobody writes are untouched, and the sweep stands at one place.
fn is_snapshot(region: &Region) -> i32 {
    let step = region.len() / 8 / SWEPT;
    let first = word(region, 0).load(Ordering::Relaxed);
    let mut round = (first ^ value(0, 0)) & 0xFFFF_FFFF;
    let mut fell = false;
    for i in 0..region.len() / 8 {
        let found = word(region, i).load(Ordering::Relaxed);
        if i % step != 0 {
            if found != value(i, 0) {
                return 1;
            }
        } else if found != value(i, round) {
            // Once, the round falls by one: the writer had come to here.
            if fell || round == 0 || found != value(i, round - 1) {
                return 2;
            }
            fell = true;
            round -= 1;
        }
    }
    0
}

#[test]
fn a_child_forked_in_the_middle_of_a_move_sees_the_memory_of_one_moment() {
    let _alone = alone();
    let Some(engine) = engine() else { return };
    let _watchdog = Watchdog::new("forks");
    for (folios, order) in [
        (Folios::Base, Order::Frozen),
        (Folios::Base, Order::Live),
        (Folios::Huge, Order::Frozen),
        (Folios::Huge, Order::Live),
    ] {
        let region = region(&engine, 8 << 20, folios);
        let stop = AtomicBool::new(false);
        let rounds = AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let step = region.len() / 8 / SWEPT;
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    for i in (0..region.len() / 8).step_by(step) {
                        let before = word(&region, i).swap(value(i, round), Ordering::Relaxed);
                        assert_eq!(before, value(i, round - 1), "word {i}");
                    }
                    rounds.store(round, Ordering::Relaxed);
                }
            });
            let _stop = StopOnDrop(&stop);
            let mover = Mover::start(&engine, &region, order);
            for turn in thinned(0..25) {
                let child = fork(|| is_snapshot(&region));
                std::thread::sleep(Duration::from_micros(turn * 137));
                assert_eq!(wait(child), 0, "{folios:?} {order:?}: fork {turn}");
            }
            mover.wait(3);
            let moved = mover.finish();
            assert!(moved.bytes(Outcome::Moved) > 0, "{moved:?}");
        });
        let round = rounds.load(Ordering::Relaxed);
        let step = region.len() / 8 / SWEPT;
        for i in 0..region.len() / 8 {
            let wanted = value(i, if i % step == 0 { round } else { 0 });
            assert_eq!(word(&region, i).load(Ordering::Relaxed), wanted, "word {i} at the end");
        }
    }
}

#[test]
fn shared_pages_are_busy_while_the_child_lives_and_move_when_it_has_gone() {
    let _alone = alone();
    let Some(engine) = engine() else { return };
    let _watchdog = Watchdog::new("sharing");
    let (_, to) = nodes(&engine);
    for order in [Order::Frozen, Order::Live] {
        for folios in [Folios::Base, Folios::Huge] {
            let bytes = 8 << 20;
            let region = region(&engine, bytes, folios);
            let mut ends = [0; 2];
            // SAFETY: pipe writes two descriptors.
            assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
            let [read, write] = ends;
            let child = fork(|| {
                let mut byte = 0u8;
                // SAFETY: closes the child's copy and waits for the parent's byte or its end.
                unsafe {
                    libc::close(write);
                    libc::read(read, (&raw mut byte).cast(), 1);
                }
                is_snapshot(&region)
            });
            let go = || engine.migrate(region.to(to)).even_if_there().order(order).run();
            let report = go().expect("a move");
            account(&region, &report);
            let shared = [(Outcome::Busy(Busy::Shared), bytes as u64)];
            assert_eq!(report.by_outcome(), shared, "{folios:?} {order:?}");
            check(&region, 0..bytes);
            // A page that is written is the parent's own.
            let mine = 0..page_size();
            if folios == Folios::Base {
                word(&region, 0).store(value(0, 0), Ordering::Relaxed);
                let report = go().expect("a move");
                let moved = report.pages.iter().find(|(_, o)| *o == Outcome::Moved);
                let moved = moved.map(|(r, _)| r.start - region.addr()..r.end - region.addr());
                assert_eq!(moved, Some(mine));
            }
            // SAFETY: both descriptors are this test's.
            unsafe {
                libc::close(write);
                libc::close(read);
            }
            assert_eq!(wait(child), 0, "the child saw other memory");
            let report = go().expect("a move");
            assert_eq!(
                report.by_outcome(),
                [(Outcome::Moved, bytes as u64)],
                "{folios:?} {order:?}: after the child has gone"
            );
            check(&region, 0..bytes);
        }
    }
}

#[test]
fn a_child_may_fork_and_spawn_in_turn() {
    let _alone = alone();
    let Some(engine) = engine() else { return };
    let region = region(&engine, 4 << 20, Folios::Base);
    let mover = Mover::start(&engine, &region, Order::Frozen);
    mover.wait(1);
    for _ in 0..5 {
        let child = fork(|| {
            let grandchild = fork(|| is_snapshot(&region));
            wait(grandchild)
        });
        assert_eq!(wait(child), 0, "-14: the grandchild's fork hung");
    }
    mover.finish();
    check(&region, 0..region.len());
}

#[test]
fn in_a_child_the_engine_refuses_and_may_be_dropped() {
    let _alone = alone();
    let Some(engine) = engine() else { return };
    let region = engine.map(4 << 20).build().expect("memory");
    fill(&region, 0..4 << 20);
    let (_, to) = nodes(&engine);
    let report = engine.migrate(region.to(to)).even_if_there().run().expect("a move");
    assert!(report.is_complete());
    let mut mine = Some((engine, region));
    let child = fork(|| {
        let Some((engine, region)) = mine.take() else { return 3 };
        let moved = engine.migrate(region.to(to)).even_if_there().run();
        if !matches!(moved, Err(MigrateError::AfterFork)) {
            return 4;
        }
        let handle = engine.migrate(region.to(to)).start();
        if !matches!(handle, Err(MigrateError::AfterFork)) {
            return 5;
        }
        for i in 0..region.len() / 8 {
            if word(&region, i).load(Ordering::Relaxed) != value(i, 0) {
                return 6;
            }
        }
        drop(region);
        drop(engine);
        // An engine of the child's own.
        let Ok(engine) = Engine::new() else { return 7 };
        let Ok(region) = engine.map(4 << 20).build() else { return 8 };
        fill(&region, 0..4 << 20);
        let report = engine.migrate(region.to(to)).even_if_there().run();
        check(&region, 0..4 << 20);
        i32::from(!report.is_ok_and(|r| r.is_complete()))
    });
    assert_eq!(wait(child), 0);
    // The parent's is as good as before.
    let (engine, region) = mine.take().expect("only the child took it");
    let report = engine.migrate(region.to(to)).even_if_there().run().expect("a move");
    assert!(report.is_complete(), "{report:?}");
    check(&region, 0..4 << 20);
}

#[test]
fn children_of_a_program_with_many_movers_build_engines_of_their_own() {
    let _alone = alone();
    let Some(engine) = engine() else { return };
    let _watchdog = Watchdog::new("engines of children");
    let regions: Vec<_> = (0..3).map(|_| region(&engine, 2 << 20, Folios::Base)).collect();
    let movers: Vec<_> =
        regions.iter().map(|region| Mover::start(&engine, region, Order::Frozen)).collect();
    movers.iter().for_each(|mover| mover.wait(1));
    let (_, to) = nodes(&engine);
    for turn in thinned(0..200) {
        let child = fork(|| {
            let Ok(engine) = Engine::builder().kernel(Kernel::MEMCPY).build() else { return 1 };
            let Ok(region) = engine.map(4 << 20).build() else { return 2 };
            fill(&region, 0..4 << 20);
            let moved = engine.migrate(region.to(to)).even_if_there().start();
            let report = moved.and_then(pageferry::Handle::wait);
            check(&region, 0..4 << 20);
            drop(region);
            drop(engine);
            i32::from(!report.is_ok_and(|r| r.is_complete()))
        });
        assert_eq!(wait(child), 0, "child {turn}; -14: it hung");
    }
    for mover in movers {
        assert!(mover.finish().bytes(Outcome::Moved) > 0);
    }
}

/// What a process that did not build the engine must get, by each way to it.
fn refused(engine: &Engine, region: &Region) -> i32 {
    let (_, to) = nodes(engine);
    let moved = engine.migrate(region.to(to)).even_if_there().run();
    i32::from(!matches!(moved, Err(MigrateError::AfterFork)))
}

#[test]
fn a_child_with_the_number_of_its_parent_is_told_from_it() {
    let _alone = alone();
    let outer = fork(|| {
        // SAFETY: concerns the children of this process only, which has one thread.
        if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
            return 77;
        }
        wait(fork(|| {
            // Process 1 of a namespace.
            let Some(engine) = engine() else { return 77 };
            let region = region(&engine, 2 << 20, Folios::Base);
            // SAFETY: as above. (The engine's threads have no children.)
            if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
                return 77;
            }
            let parent = std::process::id();
            wait(fork(|| {
                if std::process::id() != parent {
                    return 3;
                }
                let mut code = refused(&engine, &region);
                drop((region, engine));
                let Ok(engine) = Engine::new() else { return 4 };
                let (_, to) = nodes(&engine);
                let Ok(region) = engine.map(2 << 20).build() else { return 5 };
                fill(&region, 0..2 << 20);
                let own = engine.migrate(region.to(to)).even_if_there().run();
                if !own.is_ok_and(|r| r.is_complete()) {
                    code = 6;
                }
                code
            }))
        }))
    });
    match wait(outer) {
        77 => eprintln!("skipped: no pid namespaces, or no engine in one"),
        code => assert_eq!(code, 0, "-14: it hung"),
    }
}

#[test]
fn a_child_of_the_raw_system_call_is_refused_and_may_drop_what_it_has() {
    let _alone = alone();
    let Some(engine) = engine() else { return };
    let mut mine = Some((region(&engine, 2 << 20, Folios::Base), engine));
    // SAFETY: a copy of this process with one thread, as of fork; the C library does not know.
    let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    if child == 0 {
        // SAFETY: plain system calls of a child that nobody else shares.
        unsafe { libc::alarm(20) };
        let Some((region, engine)) = mine.take() else { unreachable!() };
        let code = refused(&engine, &region);
        drop((region, engine));
        // SAFETY: ends the child without running what belongs to the parent.
        unsafe { libc::_exit(code) };
    }
    let child = libc::pid_t::try_from(child).expect("a process number");
    assert!(child > 0, "clone: {}", std::io::Error::last_os_error());
    assert_eq!(wait(child), 0, "1: not refused; -14: it hung");
}

/// A block is given out and taken back.
fn allocate(heap: &RegionAlloc) -> bool {
    let layout = Layout::new::<[u64; 8]>();
    let Ok(block) = heap.allocate(layout) else { return false };
    // SAFETY: it was given out just now, for this layout.
    unsafe { heap.deallocate(block.cast(), layout) };
    true
}

#[test]
fn children_allocate_from_the_region_whatever_the_parents_threads_do() {
    let _alone = alone();
    let Some(engine) = engine() else { return };
    let heap = RegionAlloc::new(region(&engine, 4 << 20, Folios::Base));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    assert!(allocate(&heap));
                }
            });
        }
        let _stop = StopOnDrop(&stop);
        for turn in thinned(0..300) {
            let child = fork(|| {
                // A child has threads, too, and children.
                let stop = AtomicBool::new(turn % 16 != 0);
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        while !stop.load(Ordering::Relaxed) {
                            assert!(allocate(&heap));
                        }
                    });
                    let _stop = StopOnDrop(&stop);
                    let forks = if turn % 16 == 0 { 20 } else { 0 };
                    for _ in 0..forks {
                        let status = wait(fork(|| i32::from(!allocate(&heap))));
                        if status != 0 {
                            return 2;
                        }
                    }
                    i32::from(!allocate(&heap))
                })
            });
            assert_eq!(wait(child), 0, "child {turn}; -14: it hung; 2: a child of it did");
        }
    });
    assert!(allocate(&heap));
}

#[test]
fn programs_are_started_during_moves() {
    let _alone = alone();
    let Some(engine) = engine() else { return };
    let _watchdog = Watchdog::new("programs");
    for order in [Order::Frozen, Order::Live] {
        let region = region(&engine, 16 << 20, Folios::Base);
        let racers = Racers::start(&region, 1, 1);
        let mover = Mover::start(&engine, &region, order);
        for turn in 0..16 {
            let mut command = Command::new("true");
            if turn % 2 == 1 {
                // SAFETY: does nothing; it makes the standard library fork rather than spawn.
                unsafe { command.pre_exec(|| Ok(())) };
            }
            assert!(command.status().expect("true can be run").success());
        }
        mover.wait(1);
        assert!(mover.finish().bytes(Outcome::Moved) > 0);
        racers.finish();
    }
}

/// A slow copy engine that has the test fork when it gets its second batch.
#[derive(Debug)]
struct SecondForks {
    model: ModelEngine,
    batches: AtomicU64,
    fork: AtomicBool,
}

impl CopyEngine for SecondForks {
    fn name(&self) -> &str {
        "forks"
    }
    fn capabilities(&self) -> Capabilities {
        self.model.capabilities()
    }
    unsafe fn submit(&self, batch: &Arc<CopyBatch>) -> Result<(), SubmitError> {
        if self.batches.fetch_add(1, Ordering::Relaxed) == 1 {
            self.fork.store(true, Ordering::Relaxed);
            // Until the fork waits, with some luck.
            std::thread::sleep(Duration::from_millis(20));
        }
        // SAFETY: the same promise.
        unsafe { self.model.submit(batch) }
    }
    fn cancel(&self, batch: &CopyBatch) {
        self.model.cancel(batch);
    }
}

/// A conductor has batches of both orders in the air: one live, whose hole has yet to open when it
/// lands, and one frozen, whose hole is open.
#[test]
fn a_fork_waits_for_a_conductor_that_must_open_a_hole_before_it_can_close_another() {
    let _alone = alone();
    let faulty = Arc::new(Faulty::new());
    let Some(engine) = build(Engine::builder().sys(faulty.clone())) else { return };
    let _watchdog = Watchdog::new("a fork beside both orders");
    let region = region(&engine, 64 * page_size(), Folios::Base);
    let model = ModelEngine::threaded(Behaviour::Slow(Duration::from_millis(60)));
    let model = model.expect("a thread");
    let forks = SecondForks { model, batches: AtomicU64::new(0), fork: AtomicBool::new(false) };
    let forks = Arc::new(forks);
    // The second batch cannot be protected, and so goes on in frozen order.
    let (op, errno) = (SysOp::Protect, Errno(libc::EINVAL));
    faulty.fail(Fault { op, after: 1, times: 1, errno, partial: 0 });
    let (_, to) = nodes(&engine);
    let report = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !forks.fork.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(wait(fork(|| 0)), 0);
        });
        let moving = engine.migrate(region.to(to)).even_if_there().order(Order::Live);
        let report = moving.batch_bytes(16 * page_size()).engine(forks.clone()).run();
        forks.fork.store(true, Ordering::Relaxed);
        report.expect("a move")
    });
    assert!(report.batches_live > 0 && report.batches_frozen == 1, "{report}");
    check(&region, 0..region.len());
}
