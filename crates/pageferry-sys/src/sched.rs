//! The calling thread: its CPU time, its turn.

use crate::Errno;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd as _, FromRawFd as _, IntoRawFd as _, RawFd};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

/// CPU time of the calling thread, in nanoseconds (`CLOCK_THREAD_CPUTIME_ID`).
pub fn thread_cpu_ns() -> u64 {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: clock_gettime writes the timespec it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut ts) };
    u64::try_from(ts.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(ts.tv_nsec).unwrap_or(0)
}

/// A point in a thread's life, to find out later whether it lost its CPU since.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    at: Instant,
    cpu_ns: u64,
    voluntary: libc::c_long,
    involuntary: libc::c_long,
}

impl Moment {
    /// Now, for the calling thread.
    pub fn now() -> Self {
        // SAFETY: an all-zero rusage is a valid one, and the kernel writes the one it is given;
        // with RUSAGE_THREAD it cannot fail.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(libc::RUSAGE_THREAD, &mut usage);
            usage
        };
        Self {
            at: Instant::now(),
            cpu_ns: thread_cpu_ns(),
            voluntary: usage.ru_nvcsw,
            involuntary: usage.ru_nivcsw,
        }
    }

    /// How long the calling thread has been off its CPU since, if others took it away and it did
    /// not wait for anything itself; else zero.
    pub fn preempted_for(&self) -> Duration {
        let now = Self::now();
        if now.involuntary == self.involuntary || now.voluntary != self.voluntary {
            return Duration::ZERO;
        }
        let cpu = Duration::from_nanos(now.cpu_ns.saturating_sub(self.cpu_ns));
        (now.at - self.at).saturating_sub(cpu)
    }
}

/// From now on the calling thread, when it wakes up, takes the CPU of no thread that is running
/// (`SCHED_BATCH`, sched(7)).
///
/// # Errors
/// What `sched_setscheduler(2)` says.
pub fn wake_quietly() -> Result<(), Errno> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: reads the parameter; pid 0 is the calling thread.
    let ret = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &param) };
    Errno::result(ret.into()).map(drop)
}

/// Lets other runnable threads of this CPU go first.
pub fn yield_now() {
    std::thread::yield_now();
}

/// Threads of the whole machine that run or want to run now (`/proc/loadavg`), the caller
/// included; 0 where that cannot be read.
///
/// The first call opens the file, and it stays open: a program may count on getting the lowest
/// free descriptor (open(2)), which no later call takes, even for a moment.
pub fn runnable() -> usize {
    let mut text = [0; 128];
    let read = load().map_or(0, |load| load.read_at(&mut text, 0).unwrap_or(0));
    let text = std::str::from_utf8(&text[..read]).unwrap_or_default();
    let field = text.split_whitespace().nth(3).and_then(|f| f.split('/').next());
    field.and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// `/proc/loadavg`, never closed; `None` where it cannot be opened. Nobody waits for anybody here:
/// a fork may come at any time.
fn load() -> Option<ManuallyDrop<File>> {
    static LOAD: AtomicI32 = AtomicI32::new(-1);
    let mut fd = LOAD.load(Ordering::Acquire);
    if fd < 0 {
        let opened = high(&File::open("/proc/loadavg").ok()?)?;
        match LOAD.compare_exchange(-1, opened.as_raw_fd(), Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => fd = opened.into_raw_fd(),
            Err(other) => fd = other,
        }
    }
    // SAFETY: open for good, and not closed by this handle.
    Some(ManuallyDrop::new(unsafe { File::from_raw_fd(fd) }))
}

/// The same open file by a number out of the program's way: at most 64 below its limit, or below
/// 1024, where the descriptors of select(2) end (`FD_SETSIZE`).
pub(crate) fn high(file: &File) -> Option<File> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit writes the structure that it is given.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    let least = RawFd::try_from(limit.rlim_cur.min(1024).saturating_sub(64)).unwrap_or(0);
    // SAFETY: makes a new descriptor of one that is open.
    let new = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least) };
    // SAFETY: the descriptor is new, and nobody else has it.
    (new >= 0).then(|| unsafe { File::from_raw_fd(new) })
}

/// `struct sched_attr`, include/uapi/linux/sched/types.h (`SCHED_ATTR_SIZE_VER1`).
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    util_min: u32,
    util_max: u32,
}
const _: () = assert!(size_of::<SchedAttr>() == 56);

/// The calling thread's time slice: how long it runs before an equal may take its CPU. `None`
/// where the kernel does not tell (before 6.12, or another scheduling class).
pub fn slice() -> Option<Duration> {
    let size = u32::try_from(size_of::<SchedAttr>()).ok()?;
    // SAFETY: all of the structure's fields may be zero.
    let mut attr: SchedAttr = unsafe { std::mem::zeroed() };
    // SAFETY: sched_getattr writes at most `size` bytes to the structure; pid 0 is this thread.
    let ret = unsafe {
        libc::syscall(libc::SYS_sched_getattr, 0, std::ptr::from_mut(&mut attr), size, 0)
    };
    // SCHED_OTHER is 0; its slice is told in the field of the deadline class (6.12).
    (ret == 0 && attr.policy == 0 && attr.runtime > 0).then(|| Duration::from_nanos(attr.runtime))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_at_the_load_takes_no_descriptor() {
        assert!(runnable() > 0, "/proc/loadavg cannot be read");
        // SAFETY: the child has one thread, makes system calls and ends by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: from here on the child, and only it, is refused every new descriptor.
            let refused = unsafe {
                libc::alarm(10);
                libc::setrlimit(libc::RLIMIT_NOFILE, &none) == 0 && libc::dup(0) == -1
            };
            let code = if refused { i32::from(runnable() == 0) } else { 2 };
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(code) };
        }
        assert!(child > 0, "fork: {}", std::io::Error::last_os_error());
        let mut status = 0;
        // SAFETY: waits for the child made above; the kernel writes the status.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0, "256: it needed one; 512: the limit was not heeded");
    }

    #[test]
    fn what_stays_open_is_out_of_the_programs_way() {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: getrlimit writes the structure that it is given.
        assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) }, 0);
        let least = limit.rlim_cur.min(1024).saturating_sub(64);
        let load = load().expect("/proc/loadavg");
        assert!(u64::try_from(load.as_raw_fd()).expect("a descriptor") >= least);
    }
}
