//! Which CPUs a thread may run on, and which one it is on.

use crate::Errno;
use std::ffi::c_ulong;
use std::os::unix::thread::JoinHandleExt as _;
use std::sync::OnceLock;
use std::thread::JoinHandle;

/// CPUs that a set has room for, as in `cpu_set_t` (glibc's `CPU_SETSIZE`).
const ROOM: u32 = 1024;
const BITS: u32 = c_ulong::BITS;

/// A set of CPUs. It has room for the first 1024; on a machine with more the kernel refuses to
/// tell a thread's set, and what needs one does without.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuSet([c_ulong; (ROOM / BITS) as usize]);

impl CpuSet {
    /// The CPUs that a thread may run on; thread 0 is the calling one.
    ///
    /// # Errors
    /// `ESRCH`: no such thread; `EINVAL`: there are more CPUs than the set has room for.
    pub fn of_thread(tid: i32) -> Result<Self, Errno> {
        let mut set = Self::default();
        // SAFETY: the kernel writes at most the size given, of a mask made of unsigned longs.
        let ret = unsafe {
            libc::sched_getaffinity(tid, size_of_val(&set), std::ptr::from_mut(&mut set).cast())
        };
        Errno::result(ret.into()).map(|_| set)
    }

    /// The CPUs that the process's main thread may run on.
    ///
    /// # Errors
    /// As [`CpuSet::of_thread`].
    pub fn of_main_thread() -> Result<Self, Errno> {
        i32::try_from(std::process::id()).map_or(Err(Errno(libc::ESRCH)), Self::of_thread)
    }

    /// From now on the thread runs on these CPUs only; thread 0 is the calling one.
    ///
    /// # Errors
    /// `ESRCH`: no such thread; `EINVAL`: none of them is there and allowed; `EPERM`: not ours.
    pub fn apply(&self, tid: i32) -> Result<(), Errno> {
        // SAFETY: the kernel reads the mask, of the size given, made of unsigned longs.
        let ret = unsafe {
            libc::sched_setaffinity(tid, size_of_val(self), std::ptr::from_ref(self).cast())
        };
        Errno::result(ret.into()).map(drop)
    }

    /// From now on this thread runs on these CPUs only.
    ///
    /// # Errors
    /// `ESRCH`: it has ended; `EINVAL`: none of them is there and allowed.
    pub fn apply_to<T>(&self, thread: &JoinHandle<T>) -> Result<(), Errno> {
        let size = size_of_val(self);
        let set = std::ptr::from_ref(self).cast();
        // SAFETY: a join handle's thread is not joined or detached while the handle is there, so
        // its number is valid; the mask, of the size given, is made of unsigned longs.
        match unsafe { libc::pthread_setaffinity_np(thread.as_pthread_t(), size, set) } {
            0 => Ok(()),
            errno => Err(Errno(errno)),
        }
    }

    /// Whether a CPU is in the set.
    pub fn contains(&self, cpu: u32) -> bool {
        cpu < ROOM && self.0[(cpu / BITS) as usize] & (1 << (cpu % BITS)) != 0
    }

    /// Adds a CPU; one that there is no room for is left out.
    pub fn insert(&mut self, cpu: u32) {
        if cpu < ROOM {
            self.0[(cpu / BITS) as usize] |= 1 << (cpu % BITS);
        }
    }

    /// Its CPUs that are not in `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        let mut rest = *self;
        rest.0.iter_mut().zip(other.0).for_each(|(ours, theirs)| *ours &= !theirs);
        rest
    }

    /// Whether there is no CPU in it.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Its CPUs in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        (0..ROOM).filter(|&cpu| self.contains(cpu))
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<I: IntoIterator<Item = u32>>(cpus: I) -> Self {
        let mut set = Self::default();
        cpus.into_iter().for_each(|cpu| set.insert(cpu));
        set
    }
}

impl std::fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// The CPUs that the calling thread may run on, in ascending order.
pub fn allowed_cpus() -> Vec<u32> {
    match CpuSet::of_thread(0) {
        Ok(set) => set.iter().collect(),
        Err(_) => {
            // More CPUs than a set has room for: trust the standard library's count.
            let n = std::thread::available_parallelism().map_or(1, usize::from);
            (0..u32::try_from(n).unwrap_or(1)).collect()
        }
    }
}

/// How many CPUs threads of [`thread::spawn`](crate::thread::spawn) may use at once: those of the
/// process's main thread, and no more than the CPU quota of its control groups. As of the first
/// call, whichever thread makes it.
pub fn usable_cpus() -> usize {
    static CPUS: OnceLock<usize> = OnceLock::new();
    *CPUS.get_or_init(|| {
        let count = || {
            if let Ok(cpus) = CpuSet::of_main_thread() {
                // Refused, it counts with the mask that it has.
                let _ = cpus.apply(0);
            }
            // Of the calling thread's mask and the quota.
            std::thread::available_parallelism().map_or(1, usize::from)
        };
        let counted = crate::thread::spawn("pf-cpus", count).map(JoinHandle::join);
        counted.ok().and_then(Result::ok).unwrap_or_else(|| allowed_cpus().len().max(1))
    })
}

/// The CPU that the calling thread is on now; it may be on another one when this returns.
pub fn current_cpu() -> Option<u32> {
    // SAFETY: no preconditions.
    u32::try_from(unsafe { libc::sched_getcpu() }).ok()
}

/// The kernel's number of the calling thread.
pub fn thread_id() -> i32 {
    // SAFETY: no preconditions.
    unsafe { libc::gettid() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_was_put_in_and_nothing_that_it_has_no_room_for() {
        let set: CpuSet = [3, 0, 1023, 5000, u32::MAX].into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 3, 1023]);
        assert!(!set.contains(1) && !set.contains(5000));
        let rest = set.without(&[0, 7].into_iter().collect());
        assert_eq!(rest.iter().collect::<Vec<_>>(), [3, 1023]);
        assert!(rest.without(&set).is_empty());
    }

    #[test]
    fn a_pinned_thread_runs_on_its_cpu_only_and_others_are_not_touched() {
        let before = allowed_cpus();
        let Some(&first) = before.first() else {
            eprintln!("skipped: the kernel does not tell the allowed CPUs");
            return;
        };
        let only = CpuSet::from_iter([first]);
        let seen = std::thread::spawn(move || {
            only.apply(0).expect("an allowed CPU");
            (allowed_cpus(), current_cpu())
        });
        assert_eq!(seen.join().expect("thread"), (vec![first], Some(first)));
        let (go, wait) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || wait.recv().map(|()| allowed_cpus()));
        assert_eq!(CpuSet::default().apply_to(&other), Err(Errno(libc::EINVAL)));
        assert_eq!(only.apply_to(&other), Ok(()));
        go.send(()).expect("it waits");
        assert_eq!(other.join().expect("thread"), Ok(vec![first]));
        assert_eq!(allowed_cpus(), before);
        assert_eq!(CpuSet::default().apply(0), Err(Errno(libc::EINVAL)));
        assert_eq!(CpuSet::of_thread(i32::MAX), Err(Errno(libc::ESRCH)));
    }
}
