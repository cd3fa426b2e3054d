//! What is shared with who watches a move: the request to stop, and how far it is.

use crate::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// What a move is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// It marks the pages that it would move, to find out which of them are used. Bytes looked at
    /// are those of this stage.
    Marking,
    /// It waits until what it has marked has reached the minimum age.
    Waiting {
        /// For so long from now on.
        left: Duration,
        /// The minimum age.
        of: Duration,
    },
    /// It moves.
    #[default]
    Moving,
}

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
    /// Since it began to move; with a minimum age that is after marking and waiting.
    pub elapsed: Duration,
    /// What it is doing.
    pub stage: Stage,
    /// Workers at it now.
    pub workers: u64,
    /// Pages that wait to be tried again are still to be settled; nothing new is looked at.
    pub finished: bool,
}

impl ProcessProgress {
    /// Bytes moved per second, on average since it began to move.
    pub fn rate(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 { self.bytes_moved as f64 / seconds } else { 0.0 }
    }

    /// How long it will probably take from now on; `None` before it moves, and while nothing has
    /// been looked at.
    pub fn eta(&self) -> Option<Duration> {
        if self.finished {
            return Some(Duration::ZERO);
        }
        if self.bytes_looked_at == 0 || self.stage != Stage::Moving {
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
    /// When it began to move.
    moving: OnceLock<Instant>,
    pub(super) stage: Mutex<Stage>,
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
            moving: OnceLock::new(),
            stage: Mutex::default(),
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

    /// From now on it moves.
    pub(super) fn begin_to_move(&self) {
        self.moving.get_or_init(Instant::now);
        *self.stage.lock() = Stage::Moving;
    }

    pub(super) fn progress(&self) -> ProcessProgress {
        let bytes_looked_at = self.looked_at.load(Ordering::Relaxed);
        let finished = self.finished.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed).max(bytes_looked_at);
        ProcessProgress {
            bytes_looked_at,
            bytes_moved: self.moved.load(Ordering::Relaxed),
            bytes_total: if finished { bytes_looked_at } else { total },
            elapsed: self.moving.get().map_or(Duration::ZERO, Instant::elapsed),
            stage: *self.stage.lock(),
            workers: self.workers.load(Ordering::Relaxed),
            finished,
        }
    }
}
