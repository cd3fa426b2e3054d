//! A process beside the test: it stops and continues the test at random, and watches that everybody
//! goes on. It is not stopped itself, and counts the time in naps that it took while the test was
//! running; if a thread stands still for too long, it tells where each thread waits, and ends the test.

#![allow(unreachable_pub, reason = "a test binary exports nothing")]

use crate::support::{is_guest, next};
use std::fs;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Threads that can be watched.
const BEATS: usize = 1000;
/// A thread that has ended.
const ENDED: u64 = u64::MAX;
const NAP: Duration = Duration::from_millis(10);
/// A second of naps.
const SECOND: u64 = 100;
/// A thread stands still that does nothing for so many seconds.
const STILL: u64 = 120;

/// What both processes see.
#[repr(C)]
struct Board {
    done: AtomicU64,
    stops: AtomicU64,
    /// Of each thread, what it has done so far.
    beats: [AtomicU64; BEATS],
}

/// The other process; ended when this goes.
pub struct Outside {
    board: &'static Board,
    child: libc::pid_t,
}

/// One watched thread's. It has ended when this goes.
pub struct Beat(&'static AtomicU64);

impl Beat {
    pub fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        self.0.store(ENDED, Ordering::Relaxed);
    }
}

impl Outside {
    /// Called before there is an engine: the process is a child of fork, and has none.
    pub fn start(seed: u64) -> Self {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, of zeros, which are a valid board; it is never unmapped.
        let board = unsafe {
            let at = libc::mmap(std::ptr::null_mut(), size_of::<Board>(), rw, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
            &*at.cast::<Board>()
        };
        // SAFETY: no preconditions.
        let test = unsafe { libc::getpid() };
        // SAFETY: the child never returns, and uses nothing that another thread may have locked but
        // the C library's allocator, which fork leaves in order.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            disturb_and_watch(board, test, seed);
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(0) };
        }
        assert!(child > 0, "fork: {}", std::io::Error::last_os_error());
        Self { board, child }
    }

    /// The beat of thread number `n`.
    pub fn beat(&self, n: usize) -> Beat {
        self.board.beats[n].store(1, Ordering::Relaxed);
        Beat(&self.board.beats[n])
    }

    /// How often the test was stopped so far.
    pub fn stops(&self) -> u64 {
        self.board.stops.load(Ordering::Relaxed)
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.board.done.store(1, Ordering::Relaxed);
        // SAFETY: our child; nobody else waits for it.
        unsafe { libc::waitpid(self.child, std::ptr::null_mut(), 0) };
    }
}

fn disturb_and_watch(board: &Board, test: libc::pid_t, seed: u64) {
    let mut seed = seed | 1;
    let mut seen = vec![(0, 0); BEATS];
    let pause = if is_guest() { 100 } else { 25 };
    let mut stop_at = next(&mut seed) % pause;
    for nap in 0.. {
        std::thread::sleep(NAP);
        // SAFETY: no preconditions.
        if board.done.load(Ordering::Relaxed) != 0 || unsafe { libc::getppid() } != test {
            return;
        }
        if nap >= stop_at {
            stop_at = nap + 1 + next(&mut seed) % pause;
            // Mostly for a moment, sometimes for longer than a time slice of everybody's.
            let longest = if next(&mut seed).is_multiple_of(8) { 80_000 } else { 5_000 };
            // SAFETY: our parent.
            unsafe { libc::kill(test, libc::SIGSTOP) };
            std::thread::sleep(Duration::from_micros(next(&mut seed) % longest));
            // SAFETY: as above.
            unsafe { libc::kill(test, libc::SIGCONT) };
            board.stops.fetch_add(1, Ordering::Relaxed);
        }
        if nap % SECOND != 0 {
            continue;
        }
        for (n, (beat, (last, since))) in board.beats.iter().zip(&mut seen).enumerate() {
            let beat = beat.load(Ordering::Relaxed);
            if beat != *last || beat == ENDED {
                (*last, *since) = (beat, nap);
            } else if beat != 0 && nap - *since > STILL * SECOND {
                dump(test, &format!("thread number {n} stands still since its beat {beat}"));
                // SAFETY: our parent.
                unsafe { libc::kill(test, libc::SIGABRT) };
                return;
            }
        }
    }
}

/// Where each thread of a process waits, as far as this user may know.
fn dump(process: libc::pid_t, why: &str) {
    // Not through the test harness, which would keep it to itself.
    let mut out = std::io::stderr();
    let _ = writeln!(out, "hung: {why}");
    for task in fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let status = read("status");
        let is_told = |line: &&str| {
            ["State", "SigPnd", "ShdPnd", "SigBlk", "voluntary"].iter().any(|n| line.starts_with(n))
        };
        let status: Vec<_> = status.lines().filter(is_told).collect();
        let _ = writeln!(
            out,
            "--- {} {}: wchan {}, syscall {}\n{}\n{}",
            task.file_name().to_string_lossy(),
            read("comm").trim(),
            read("wchan"),
            read("syscall").trim(),
            status.join(", ").replace('\t', " "),
            read("stack").trim_end()
        );
    }
}
