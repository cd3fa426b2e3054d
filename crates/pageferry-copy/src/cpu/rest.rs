//! Threads at rest, and on which CPU they wake up.
//!
//! The scheduler wakes a thread on the CPU where it slept, or near who wakes it; it looks for an
//! idle CPU only among those that share a last-level cache. Where each CPU has a cache of its own
//! (many virtual machines say so), a helper that slept on its caller's CPU wakes there, begins
//! when the caller waits for it, and both take turns on one CPU while the next one idles, until a
//! load balancer notices: moves ran at 7 GB/s instead of 13 for milliseconds (two CPUs of Zen 4,
//! Linux 6.18).
//!
//! So who wakes a helper sees to it that the helper may not run where it runs itself, nor where
//! helpers that are awake do. A set of CPUs that was narrowed for this stays so while the pool is
//! in use, since changing it costs microseconds, and is given back once the helper has been
//! asleep for [`IDLE`]; unless somebody else (taskset, a cpuset) changed it meanwhile: then
//! theirs stands.

use pageferry_sys::affinity::{CpuSet, current_cpu, thread_id};
use std::time::Duration;

/// After so much sleep a thread may run where it pleases again.
pub(super) const IDLE: Duration = Duration::from_millis(100);

/// What is known of the threads of a pool, by their index.
#[derive(Debug, Default)]
pub(super) struct Rest {
    threads: Vec<Thread>,
    /// Threads asleep, the last to fall asleep last.
    asleep: Vec<usize>,
}

#[derive(Debug)]
struct Thread {
    tid: i32,
    /// Where it was last seen.
    cpu: Option<u32>,
    /// Kept off some CPUs: its own set, and the one that it has now.
    narrowed: Option<(CpuSet, CpuSet)>,
}

impl Rest {
    /// For `count` threads at most.
    pub(super) fn with_capacity(count: usize) -> Self {
        Self { threads: Vec::with_capacity(count), asleep: Vec::with_capacity(count) }
    }

    /// The calling thread is one of the pool's; returns its index.
    pub(super) fn enrol(&mut self) -> usize {
        self.threads.push(Thread { tid: thread_id(), cpu: current_cpu(), narrowed: None });
        self.threads.len() - 1
    }

    /// The calling thread goes to sleep.
    pub(super) fn sleep(&mut self, index: usize) {
        self.threads[index].cpu = current_cpu();
        self.asleep.push(index);
    }

    /// Whether a thread is to sleep on.
    pub(super) fn is_asleep(&self, index: usize) -> bool {
        self.asleep.contains(&index)
    }

    /// The calling thread is awake, called or not.
    pub(super) fn wake(&mut self, index: usize) {
        self.asleep.retain(|&other| other != index);
        self.threads[index].cpu = current_cpu();
    }

    /// The calling thread gets its own set of CPUs back.
    pub(super) fn widen(&mut self, index: usize) {
        if let Some((own, now)) = self.threads[index].narrowed.take()
            && CpuSet::of_thread(0) == Ok(now)
        {
            // If the wider set is refused by now, the thread still runs on the narrower one.
            let _ = own.apply(0);
        }
    }

    /// Chooses a thread to wake and takes it off the list of those asleep.
    pub(super) fn call(&mut self) -> Option<usize> {
        let index = self.asleep.pop()?;
        let awake = (0..self.threads.len()).filter(|i| *i != index && !self.asleep.contains(i));
        let taken: CpuSet =
            awake.filter_map(|i| self.threads[i].cpu).chain(current_cpu()).collect();
        self.threads[index].keep_off(&taken);
        Some(index)
    }
}

impl Thread {
    /// Keeps a sleeping thread off CPUs, if it may run on others.
    fn keep_off(&mut self, taken: &CpuSet) {
        let Ok(now) = CpuSet::of_thread(self.tid) else { return };
        // Its own set is what it had when it was first narrowed, or what somebody set since.
        let own = self.narrowed.filter(|(_, set)| *set == now).map_or(now, |(own, _)| own);
        let narrow = own.without(taken);
        if !narrow.is_empty() && narrow != now && narrow.apply(self.tid).is_ok() {
            self.narrowed = Some((own, narrow));
        }
    }
}
