//! Signals of the program and the threads of the engine.

mod support;

use pageferry::Engine;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Wake, Waker};
use std::thread::Thread;
use support::{build, fill, first_node};

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
