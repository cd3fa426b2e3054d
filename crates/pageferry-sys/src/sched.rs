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
