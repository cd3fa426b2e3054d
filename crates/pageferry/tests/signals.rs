//! Signals of the program and the threads of the engine.

mod support;

use pageferry::{Division, Engine, Folios, Order};
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Wake, Waker};
use std::thread::Thread;
use std::time::Duration;
use support::siege::{StopOnDrop, Watchdog, alone};
use support::{build, check, engine, fill, first_node, thinned};

/// Those of signal(7) that a thread causes itself, and those that nobody can block.
const OPEN: [i32; 8] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGKILL,
    libc::SIGSTOP,
];

/// Checks the signal mask of a `/proc/<pid>/status`.
fn assert_blocked(who: &str, status: &str) {
    let line = status.lines().find_map(|l| l.strip_prefix("SigBlk:")).expect("the mask");
    let mask = u64::from_str_radix(line.trim(), 16).expect("hexadecimal");
    for signal in (1..32).chain(libc::SIGRTMIN()..=libc::SIGRTMAX()) {
        let blocked = mask & 1 << (signal - 1) != 0;
        assert_eq!(blocked, !OPEN.contains(&signal), "signal {signal} in {who}");
    }
}

/// Keeps the status of the thread that wakes it.
struct Witness {
    status: OnceLock<String>,
    sleeper: Thread,
}

impl Wake for Witness {
    fn wake(self: Arc<Self>) {
        let status = std::fs::read_to_string("/proc/thread-self/status").expect("own status");
        let _ = self.status.set(status);
        self.sleeper.unpark();
    }
}

#[test]
fn threads_of_an_engine_take_no_signals_and_the_caller_keeps_its_mask() {
    let own = || std::fs::read_to_string("/proc/thread-self/status").expect("own status");
    let mask = |s: &str| s.lines().find(|l| l.starts_with("SigBlk:")).map(str::to_owned);
    let before = mask(&own());
    let Some(engine) = build(Engine::builder().threads(2)) else { return };
    let region = engine.map(4 << 20).build().expect("memory for the test");
    fill(&region, 0..region.len());
    // Who asks after the move has ended is not woken: asked again.
    let witness = (0..100).find_map(|_| {
        let sleeper = std::thread::current();
        let witness = Arc::new(Witness { status: OnceLock::new(), sleeper });
        let waker = Waker::from(Arc::clone(&witness));
        let handle = engine.migrate(region.to(first_node(&engine))).even_if_there().start();
        let mut handle = pin!(handle.expect("a move"));
        while handle.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            std::thread::park();
        }
        witness.status.get().cloned()
    });
    assert_blocked("pf-move", &witness.expect("a move that was waited for"));
    // A thread takes its name itself, after it was born.
    let mut seen = 0;
    for _ in 0..5000 {
        let tasks: Vec<_> = std::fs::read_dir("/proc/self/task").expect("threads").collect();
        seen = 0;
        for task in tasks.into_iter().flatten() {
            let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
            if name.starts_with("pf-") && !status.is_empty() {
                assert_blocked(name.trim(), &status);
                seen += 1;
            }
        }
        if seen >= 2 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!(seen >= 2, "pf-faults and pf-pools, and copiers that have begun: {seen}");
    assert_eq!(mask(&own()), before, "the mask of who built the engine");
}

static ADDR: AtomicUsize = AtomicUsize::new(0);
static LEN: AtomicUsize = AtomicUsize::new(0);
static HEARD: AtomicUsize = AtomicUsize::new(0);

extern "C" fn read_region(_: i32) {
    for at in (0..LEN.load(Ordering::Relaxed)).step_by(4096) {
        let word = std::ptr::with_exposed_provenance::<u64>(ADDR.load(Ordering::Relaxed) + at);
        // SAFETY: the test's region, there until the timer has been stopped.
        unsafe { word.read_volatile() };
    }
    HEARD.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn fork(_: i32) {
    // SAFETY: the child ends at once; the parent waits for it.
    unsafe {
        match libc::fork() {
            0 => libc::_exit(0),
            child => libc::waitpid(child, std::ptr::null_mut(), 0),
        }
    };
    HEARD.fetch_add(1, Ordering::Relaxed);
}

/// SIGALRM for the process every so many microseconds; 0: never again.
fn every(us: i64) {
    let time = libc::timeval { tv_sec: 0, tv_usec: us };
    let timer = libc::itimerval { it_interval: time, it_value: time };
    // SAFETY: reads the timer.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) };
}

#[test]
fn handlers_that_read_the_region_or_fork_run_while_it_moves_on_the_thread_that_runs_the_move() {
    let _alone = alone();
    let Some(engine) = engine() else { return };
    let _watchdog = Watchdog::new("signal handlers");
    let region = engine.map(8 << 20).folios(Folios::Base).build().expect("memory for the test");
    fill(&region, 0..region.len());
    ADDR.store(region.addr(), Ordering::Relaxed);
    LEN.store(region.len(), Ordering::Relaxed);
    for (handler, us) in [(read_region as extern "C" fn(i32), 3000), (fork, 7000)] {
        // SAFETY: a handler of the right kind; zero is a valid action otherwise.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut());
        }
        let until = HEARD.load(Ordering::Relaxed) + 40;
        every(us);
        while HEARD.load(Ordering::Relaxed) < until {
            let part = region.to(first_node(&engine));
            engine.migrate(part).even_if_there().run().expect("a move");
        }
        every(0);
    }
    check(&region, 0..region.len());
}

/// A write to each huge page that changes nothing.
extern "C" fn write_region(_: i32) {
    for at in (0..LEN.load(Ordering::Relaxed)).step_by(pageferry::HUGE) {
        let word = std::ptr::with_exposed_provenance_mut(ADDR.load(Ordering::Relaxed) + at);
        // SAFETY: the test's region, there until nobody sends signals any more.
        let word = unsafe { AtomicU64::from_ptr(word) };
        // (Adding zero is compiled to a read.)
        word.store(word.load(Ordering::Relaxed), Ordering::Relaxed);
    }
    HEARD.fetch_add(1, Ordering::Relaxed);
}

/// Sends a signal whose handler writes the region to the thread that calls this, again and again, as
/// long as `body` runs.
fn signalled(name: &str, body: impl FnOnce()) {
    // SAFETY: a handler of the right kind; zero is a valid action otherwise.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = write_region as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
    }
    // SAFETY: no preconditions.
    let (process, thread) = unsafe { (libc::getpid(), libc::gettid()) };
    let stop = AtomicBool::new(false);
    let before = HEARD.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: a thread of this process, which waits for this one.
                unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGUSR1) };
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let _stop = StopOnDrop(&stop);
        body();
    });
    assert!(HEARD.load(Ordering::Relaxed) > before, "{name}: no handler ran");
}

/// A writer of a huge folio under a live copy waits until that is in place: it must not be the thread
/// that puts it there, nor one that this thread waits for because it forks.
#[test]
fn handlers_write_huge_folios_that_are_copied_live_by_the_thread_they_interrupt_or_during_a_fork() {
    let _alone = alone();
    let Some(engine) = engine() else { return };
    let _watchdog = Watchdog::new("signal handlers that write");
    let region = engine.map(16 << 20).folios(Folios::Huge).build().expect("memory for the test");
    fill(&region, 0..region.len());
    ADDR.store(region.addr(), Ordering::Relaxed);
    LEN.store(region.len(), Ordering::Relaxed);
    let go = |division| {
        let part = region.to(first_node(&engine));
        let moving = engine.migrate(part).even_if_there().order(Order::Live).division(division);
        moving.run().expect("a move")
    };
    for division in [Division::Shared, Division::Conducted] {
        signalled("a mover", || {
            for _ in thinned(0..60) {
                go(division);
            }
        });
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    go(division);
                }
            });
            let _stop = StopOnDrop(&stop);
            signalled("a thread that forks", || {
                for _ in thinned(0..150) {
                    // SAFETY: the child ends at once; the parent waits for it.
                    let child = unsafe { libc::fork() };
                    if child == 0 {
                        // SAFETY: ends the child without running what belongs to the parent.
                        unsafe { libc::_exit(0) };
                    }
                    // SAFETY: our child, whose status is not asked for.
                    while unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) } != child {}
                }
            });
        });
    }
    check(&region, 0..region.len());
}
