//! What is shared with who watches a move: the request to stop, and how far it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How far a move is.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ProcessProgress {
    /// Bytes looked at so far.
    pub bytes_looked_at: u64,
    /// Bytes moved so far.
    pub bytes_moved: u64,
    /// Bytes to look at: an estimate from what the kernel counts as resident, for the processes
    /// found so far. Never less than what was looked at.
    pub bytes_total: u64,
    /// Since the start.
    pub elapsed: Duration,
    /// Workers at it now.
    pub workers: u64,
    /// Pages that wait to be tried again are still to be settled; nothing new is looked at.
    pub finished: bool,
}

impl ProcessProgress {
    /// Bytes moved per second, on average since the start.
    pub fn rate(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 { self.bytes_moved as f64 / seconds } else { 0.0 }
    }

    /// How long it will probably take from now on; `None` while nothing has been looked at.
    pub fn eta(&self) -> Option<Duration> {
        if self.finished {
            return Some(Duration::ZERO);
        }
        if self.bytes_looked_at == 0 {
            return None;
        }
        let left = self.bytes_total.saturating_sub(self.bytes_looked_at) as f64;
        let seconds = left * self.elapsed.as_secs_f64() / self.bytes_looked_at as f64;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// Shared by a move and its watchers. All counters are for display, and the request publishes
/// nothing: relaxed order is enough everywhere.
#[derive(Debug)]
pub(super) struct Control {
    cancel: Arc<AtomicBool>,
    began: Instant,
    /// An estimate, which grows with the processes found.
    pub(super) total: AtomicU64,
    pub(super) looked_at: AtomicU64,
    pub(super) moved: AtomicU64,
    pub(super) workers: AtomicU64,
    pub(super) finished: AtomicBool,
}

impl Control {
    pub(super) fn new(cancel: Arc<AtomicBool>) -> Self {
        Self {
            cancel,
            began: Instant::now(),
            total: AtomicU64::new(0),
            looked_at: AtomicU64::new(0),
            moved: AtomicU64::new(0),
            workers: AtomicU64::new(0),
            finished: AtomicBool::new(false),
        }
    }

    pub(super) fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    pub(super) fn progress(&self) -> ProcessProgress {
        let bytes_looked_at = self.looked_at.load(Ordering::Relaxed);
        let finished = self.finished.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed).max(bytes_looked_at);
        ProcessProgress {
            bytes_looked_at,
            bytes_moved: self.moved.load(Ordering::Relaxed),
            bytes_total: if finished { bytes_looked_at } else { total },
            elapsed: self.began.elapsed(),
            workers: self.workers.load(Ordering::Relaxed),
            finished,
        }
    }
}
