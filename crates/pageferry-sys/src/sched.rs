//! The calling thread: its CPU time, its CPUs, its turn.

/// CPU time of the calling thread, in nanoseconds (`CLOCK_THREAD_CPUTIME_ID`).
pub fn thread_cpu_ns() -> u64 {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: clock_gettime writes the timespec it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut ts) };
    u64::try_from(ts.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(ts.tv_nsec).unwrap_or(0)
}

/// Lets other runnable threads of this CPU go first.
pub fn yield_now() {
    std::thread::yield_now();
}

/// The CPUs that the calling thread may run on, in ascending order.
pub fn allowed_cpus() -> Vec<u32> {
    // SAFETY: an all-zero cpu_set_t is a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most the size given.
    let ret = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) };
    if ret != 0 {
        // More CPUs than cpu_set_t can name: trust the standard library's count.
        let n = std::thread::available_parallelism().map_or(1, usize::from);
        return (0..u32::try_from(n).unwrap_or(1)).collect();
    }
    let limit = u32::try_from(libc::CPU_SETSIZE).unwrap_or(1024);
    // SAFETY: every index is below CPU_SETSIZE.
    (0..limit).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu as usize, &set) }).collect()
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
pub fn slice() -> Option<std::time::Duration> {
    let size = u32::try_from(size_of::<SchedAttr>()).ok()?;
    // SAFETY: all of the structure's fields may be zero.
    let mut attr: SchedAttr = unsafe { std::mem::zeroed() };
    // SAFETY: sched_getattr writes at most `size` bytes to the structure; pid 0 is this thread.
    let ret = unsafe {
        libc::syscall(libc::SYS_sched_getattr, 0, std::ptr::from_mut(&mut attr), size, 0)
    };
    // SCHED_OTHER is 0; its slice is told in the field of the deadline class (6.12).
    (ret == 0 && attr.policy == 0 && attr.runtime > 0)
        .then(|| std::time::Duration::from_nanos(attr.runtime))
}
