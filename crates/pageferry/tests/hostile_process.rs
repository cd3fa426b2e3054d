//! Around a move: stops and storms of signals, an ordinary user, a spent budget, a full memory
//! cgroup. Each runs in a process of its own, which must live, move, and lose nothing.

mod support;

use pageferry::{Engine, Folios, Frames, Order, Outcome, Region};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::siege::{Mover, StopOnDrop, Watchdog, account, again, alone, role};
use support::{Racers, build, engine, fill, nodes, sized, spaced};

fn region(engine: &Engine, bytes: usize, folios: Folios) -> Arc<Region> {
    let region = engine.map(bytes).folios(folios).build().expect("memory for the test");
    fill(&region, 0..bytes);
    Arc::new(region)
}

/// What the process started by `again` does: moves with racers for half a second, then scans.
fn move_under_stress(user_mode_only: bool) {
    let Some(engine) = build(Engine::builder().user_mode_only(user_mode_only)) else { return };
    for order in [Order::Frozen, Order::Live] {
        let region = region(&engine, sized(16 << 20), Folios::Base);
        let racers = Racers::start(&region, 1, 1);
        let mover = Mover::start(&engine, &region, order);
        std::thread::sleep(Duration::from_millis(250));
        mover.wait(2);
        let moved = mover.finish();
        racers.finish();
        assert_eq!(moved.outcomes.len(), 1, "all moved: {moved:?}");
        assert!(moved.bytes(Outcome::Moved) > 0, "all moved: {moved:?}");
    }
}

fn succeeded(output: &std::process::Output) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {text}", output.status);
    for line in text.lines().filter(|l| l.starts_with("skipped")) {
        eprintln!("{line}");
    }
}

#[test]
fn a_process_that_is_stopped_and_continued_loses_nothing() {
    let _alone = alone();
    let test = "a_process_that_is_stopped_and_continued_loses_nothing";
    if role().is_some() {
        return move_under_stress(false);
    }
    let _watchdog = Watchdog::new(test);
    let mut child = again(test, "moves");
    child.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    let mut child = child.spawn().expect("this binary runs again");
    let pid = libc::pid_t::try_from(child.id()).expect("a process id");
    while child.try_wait().expect("our child").is_none() {
        for (signal, millis) in [(libc::SIGSTOP, 7), (libc::SIGCONT, 11)] {
            // SAFETY: our own child, which has not been waited for.
            unsafe { libc::kill(pid, signal) };
            std::thread::sleep(Duration::from_millis(millis));
        }
    }
    succeeded(&child.wait_with_output().expect("our child"));
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_signal(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn a_storm_of_signals_disturbs_no_move() {
    let _alone = alone();
    let test = "a_storm_of_signals_disturbs_no_move";
    if role().is_none() {
        let _watchdog = Watchdog::new(test);
        return succeeded(&again(test, "storm").output().expect("this binary runs again"));
    }
    for signal in [libc::SIGUSR1, libc::SIGALRM] {
        // SAFETY: zero is a valid sigaction without SA_RESTART; the handler only counts.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = count_signal as *const () as usize;
            assert_eq!(libc::sigaction(signal, &raw const action, std::ptr::null_mut()), 0);
        }
    }
    let between = spaced(Duration::from_micros(500));
    let every = libc::timeval { tv_sec: 0, tv_usec: between.subsec_micros().into() };
    let timer = libc::itimerval { it_interval: every, it_value: every };
    // SAFETY: reads the timer that it is given.
    let set = unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    assert_eq!(set, 0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Every thread of the process in turn, the engine's own too.
            while !stop.load(Ordering::Relaxed) {
                let threads = std::fs::read_dir("/proc/self/task").expect("procfs");
                for thread in threads.flatten() {
                    let Some(tid) = thread.file_name().to_str().and_then(|t| t.parse().ok()) else {
                        continue;
                    };
                    let tid: libc::pid_t = tid;
                    // SAFETY: sends a handled signal to a thread of this process, if it lives.
                    unsafe {
                        libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGUSR1);
                    }
                }
                std::thread::sleep(spaced(Duration::from_micros(200)));
            }
        });
        let _stop = StopOnDrop(&stop);
        move_under_stress(false);
    });
    assert!(SIGNALS.load(Ordering::Relaxed) > 500, "there was no storm");
}

#[test]
fn an_ordinary_user_moves_with_a_user_mode_only_engine() {
    let _alone = alone();
    let test = "an_ordinary_user_moves_with_a_user_mode_only_engine";
    if role().is_some() {
        return move_under_stress(true);
    }
    let _watchdog = Watchdog::new(test);
    // SAFETY: asks for the user's number.
    let root = unsafe { libc::geteuid() } == 0;
    let mut command = again(test, "user");
    // The binary may lie where another user cannot come.
    let copy = std::env::temp_dir().join(format!("pageferry-user-{}", std::process::id()));
    if root {
        std::fs::copy(std::env::current_exe().expect("procfs"), &copy).expect("room for a copy");
        let mut other = Command::new(&copy);
        other
            .args(command.get_args())
            .envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
        command = other;
        command.uid(65534).gid(65534).env("XDG_CACHE_HOME", "/nonexistent").current_dir("/");
    }
    let output = command.output();
    let _ = std::fs::remove_file(&copy);
    succeeded(&output.expect("this binary runs again"));
}

#[test]
fn a_spent_budget_is_reported_and_nothing_is_lost() {
    let _alone = alone();
    let builder = Engine::builder().frame_budget(4 << 20);
    let Some(engine) = build(builder) else { return };
    let _watchdog = Watchdog::new("budget");
    let region = region(&engine, sized(64 << 20), Folios::Mixed);
    let (_, to) = nodes(&engine);
    let racers = Racers::start(&region, 1, 1);
    let until = Instant::now() + Duration::from_millis(500);
    while Instant::now() < until {
        for frames in [Frames::Fresh, Frames::Recycled] {
            let moving = engine.migrate(region.to(to)).even_if_there().frames(frames);
            let report = moving.run().expect("a move");
            account(&region, &report);
            for (outcome, _) in report.by_outcome() {
                let fits = matches!(outcome, Outcome::Moved | Outcome::NoFrame(_));
                assert!(fits, "{outcome}");
            }
        }
    }
    assert!(engine.stats().frame_bytes <= 4 << 20, "{:?}", engine.stats());
    racers.finish();
}

/// A memory cgroup of the test's own, below the one that it is in.
struct Group {
    dir: std::path::PathBuf,
    limit: &'static str,
    used: &'static str,
}

impl Group {
    fn new() -> std::io::Result<Self> {
        let own = std::fs::read_to_string("/proc/self/cgroup")?;
        let name = format!("pageferry-test-{}", std::process::id());
        let v1 = own.lines().find_map(|l| l.split_once(":memory:")).map(|(_, path)| path);
        let (root, path, limit, used) = match v1 {
            Some(path) => {
                ("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
            }
            None => (
                "/sys/fs/cgroup",
                own.lines().find_map(|l| l.strip_prefix("0::")).unwrap_or("/"),
                "memory.max",
                "memory.current",
            ),
        };
        let dir = std::path::Path::new(root).join(path.trim_start_matches('/')).join(name);
        std::fs::create_dir(&dir)?;
        let group = Self { dir, limit, used };
        std::fs::metadata(group.dir.join(limit))?;
        Ok(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The child may still be leaving.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_full_memory_cgroup_is_reported_and_kills_nobody() {
    let _alone = alone();
    let test = "a_full_memory_cgroup_is_reported_and_kills_nobody";
    if role().is_none() {
        let _watchdog = Watchdog::new(test);
        let group = match Group::new() {
            Ok(group) => group,
            Err(e) => return eprintln!("skipped: no memory cgroup can be made here: {e}"),
        };
        let mut command = again(test, "full");
        let (procs, zero) = (group.dir.join("cgroup.procs"), "0");
        command.env("PAGEFERRY_TEST_LIMIT", group.dir.join(group.limit));
        command.env("PAGEFERRY_TEST_USED", group.dir.join(group.used));
        // SAFETY: the child writes to a file before it becomes another program.
        unsafe { command.pre_exec(move || std::fs::write(&procs, zero)) };
        return match command.output() {
            Ok(output) => succeeded(&output),
            Err(e) => eprintln!("skipped: this process may not join a cgroup of its own: {e}"),
        };
    }
    let Some(engine) = engine() else { return };
    let path = |name| std::env::var(name).expect("set by the parent");
    let bytes = sized(32 << 20);
    let region = region(&engine, bytes, Folios::Base);
    let racers = Racers::start(&region, 1, 1);
    let (_, to) = nodes(&engine);
    let go = |frames| {
        let moving = engine.migrate(region.to(to)).even_if_there().frames(frames);
        moving.run().expect("a move")
    };
    // What the program itself needs to live: the report's pages, stacks.
    assert!(go(Frames::Recycled).is_complete());
    std::thread::sleep(Duration::from_millis(1500));
    let used: u64 = std::fs::read_to_string(path("PAGEFERRY_TEST_USED"))
        .ok()
        .and_then(|t| t.trim().parse().ok())
        .expect("a number");
    let limit = used + (1 << 20);
    std::fs::write(path("PAGEFERRY_TEST_LIMIT"), limit.to_string()).expect("a limit");
    for turn in 0..6 {
        for frames in [Frames::Recycled, Frames::Fresh, Frames::KernelCopy] {
            let report = go(frames);
            account(&region, &report);
            for (outcome, _) in report.by_outcome() {
                let fits = matches!(outcome, Outcome::Moved | Outcome::NoFrame(_));
                assert!(fits, "turn {turn} {frames:?}: {outcome}");
            }
        }
    }
    racers.finish();
}
