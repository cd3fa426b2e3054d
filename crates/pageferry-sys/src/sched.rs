//! The calling thread: its CPU time, its turn.

use crate::Errno;
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
pub fn runnable() -> usize {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let field = text.split_whitespace().nth(3).and_then(|f| f.split('/').next());
    field.and_then(|n| n.parse().ok()).unwrap_or(0)
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
