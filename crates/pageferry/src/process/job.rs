//! A running move: the workers, how many of them, and who watches.

use super::age::Age;
use super::control::Control;
use super::mover::Mover;
use super::notes::{Note, Notes};
use super::pace::{Chunk, Growth, MAX_CHUNK, Rate};
use super::place::Placement;
use super::report::{ProcessReport, Tally};
use super::room::Room;
use super::work::Work;
use super::{Priority, ProcessProgress};
use crate::sync::Mutex;
use pageferry_sys::affinity::CpuSet;
use pageferry_sys::process::{self as sys, ProcessKernel};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Throughput is compared between windows of this length: several calls at the default latency.
const WINDOW: Duration = Duration::from_millis(150);
/// With a rate, a call has at most what flows in this time, so that the rate is smooth.
const SMOOTH: f64 = 0.1;

/// Called with the progress from time to time.
pub(super) struct Watcher {
    pub(super) every: Duration,
    pub(super) call: Box<dyn Fn(&ProcessProgress) + Send + Sync>,
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watcher").field("every", &self.every).finish_non_exhaustive()
    }
}

/// When the watcher was told last.
#[derive(Debug)]
pub(super) struct Telling(Instant);

impl Telling {
    pub(super) fn new() -> Self {
        Self(Instant::now())
    }

    /// Tells the watcher, if it is time to.
    pub(super) fn tell(&mut self, job: &Job) {
        if let Some(watcher) = &job.watcher
            && self.0.elapsed() >= watcher.every
        {
            (watcher.call)(&job.control.progress());
            self.0 = Instant::now();
        }
    }
}

#[derive(Debug)]
pub(super) struct Job {
    pub(super) kernel: Arc<dyn ProcessKernel>,
    pub(super) control: Arc<Control>,
    pub(super) placement: Placement,
    pub(super) room: Room,
    pub(super) work: Work,
    pub(super) latency: Duration,
    pub(super) retries: u32,
    pub(super) dry_run: bool,
    pub(super) age: Option<Age>,
    pub(super) moves_shared: AtomicBool,
    pub(super) rate: Option<(u64, Mutex<Rate>)>,
    pub(super) workers: usize,
    pub(super) priority: Priority,
    /// CPUs near the destination.
    pub(super) cpus: Option<CpuSet>,
    pub(super) watcher: Option<Watcher>,
    pub(super) notes: Notes,
}

impl Job {
    /// Pages of a call at most, other than for its latency.
    pub(super) fn most_at_once(&self, page_bytes: usize) -> usize {
        let Some((rate, _)) = &self.rate else { return MAX_CHUNK };
        let bytes = (*rate as f64 * SMOOTH).max(1.0);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "positive, and clamped"
        )]
        let pages = (bytes / page_bytes as f64).min(MAX_CHUNK as f64) as usize;
        pages.max(1)
    }

    /// Waits until so many bytes may be moved.
    pub(super) fn pace(&self, bytes: u64) {
        let Some((_, rate)) = &self.rate else { return };
        let began = self.kernel.now();
        let wait = rate.lock().take(bytes, began);
        let until = began + wait;
        while !self.control.is_cancelled() {
            let left = until.saturating_sub(self.kernel.now());
            if left.is_zero() {
                return;
            }
            self.kernel.sleep(left.min(Duration::from_millis(20)));
        }
    }

    /// Moves everything; returns when it is done or cancelled.
    pub(super) fn run(self) -> ProcessReport {
        let began = Instant::now();
        let of_age = self.let_age();
        let waited = if self.age.is_some() { began.elapsed() } else { Duration::ZERO };
        self.control.begin_to_move();
        let limit = AtomicUsize::new(1);
        let tallies = Mutex::new(Vec::new());
        let most = std::thread::scope(|scope| {
            let mut started = 0;
            let mut hire = |wanted: usize| {
                while started < wanted {
                    let id = started;
                    let (job, limit, tallies) = (&self, &limit, &tallies);
                    let worker = move || tallies.lock().push(job.worker(id, limit));
                    let name = format!("pageferry-{id}");
                    let builder = std::thread::Builder::new().name(name);
                    match builder.spawn_scoped(scope, worker) {
                        Ok(_) => started += 1,
                        Err(_) => break,
                    }
                }
                started
            };
            if hire(1) == 0 {
                // No thread can be had: then this one does it.
                let tally = self.worker(0, &limit);
                tallies.lock().push(tally);
            }
            self.watch(&limit, hire)
        });
        let mut report = ProcessReport {
            cancelled: self.control.is_cancelled(),
            dry_run: self.dry_run,
            workers: most,
            waited,
            ..ProcessReport::default()
        };
        let mut last = Mover::new(&self);
        let tallies = tallies.into_inner();
        let tally = {
            // Only a cancelled move has any left.
            let left = self.work.drain();
            left.iter().for_each(|piece| last.leave(piece));
            last.tally
        };
        report.notes.extend(self.notes);
        report.notes.extend(of_age);
        let mut walk = self.work.into_walk();
        let ahead = if report.cancelled { walk.ahead() } else { 0 };
        report.processes = walk.processes;
        walk.note_commons(tallies.iter().map(|tally| tally.common).sum());
        report.notes.extend(walk.notes);
        let slow_calls: u64 = tallies.iter().map(|tally| tally.slow_calls).sum();
        tallies.into_iter().chain([tally]).for_each(|tally| report.add(tally));
        report.not_looked_at = ahead.saturating_sub(report.bytes_looked_at());
        if slow_calls * 2 > report.calls.count() {
            report.notes.add(Note::SlowCalls {
                median_us: micros(report.calls.quantile(0.5)),
                target_us: micros(self.latency),
                least_pages: Chunk::new(self.latency, false).least(),
            });
        }
        report.tidy();
        report.elapsed = began.elapsed();
        self.control.finished.store(true, Ordering::Relaxed);
        if let Some(watcher) = &self.watcher {
            (watcher.call)(&self.control.progress());
        }
        report
    }

    /// Hires workers while they help, and tells the watcher; until the move is over. Returns the
    /// most that were at it.
    fn watch(&self, limit: &AtomicUsize, mut hire: impl FnMut(usize) -> usize) -> usize {
        let mut growth = Growth::new(self.workers);
        let (mut most, mut window, mut moved) = (1, Instant::now(), 0);
        let mut telling = Telling::new();
        self.control.workers.store(1, Ordering::Relaxed);
        while !self.work.is_done() {
            self.work.wait(Duration::from_millis(20));
            let spent = window.elapsed();
            if spent >= WINDOW {
                let total = self.control.moved.load(Ordering::Relaxed);
                let throughput = (total - moved) as f64 / spent.as_secs_f64();
                // Workers add nothing to what the rate allows.
                let limited =
                    self.rate.as_ref().is_some_and(|(rate, _)| throughput > *rate as f64 * 0.8);
                if !limited {
                    let wanted = growth.window(throughput);
                    let now = wanted.min(hire(wanted)).max(1);
                    most = most.max(now);
                    limit.store(now, Ordering::Relaxed);
                    self.control.workers.store(now as u64, Ordering::Relaxed);
                }
                (window, moved) = (Instant::now(), total);
            }
            telling.tell(self);
        }
        most
    }

    /// A worker's life: pieces while it is wanted.
    fn worker(&self, id: usize, limit: &AtomicUsize) -> Tally {
        // A wish: the cpuset may have changed.
        if let Some(cpus) = &self.cpus {
            let _ = cpus.apply(0);
        }
        let asked = match self.priority {
            Priority::Normal => Ok(()),
            Priority::Nice(nice) => sys::be_nice(nice.into()),
            Priority::Idle => sys::be_idle(),
        };
        let mut mover = Mover::new(self);
        if let Err(errno) = asked {
            mover.tally.notes.add(Note::PriorityRefused { errno: errno.0 });
        }
        loop {
            if id >= limit.load(Ordering::Relaxed) && id > 0 {
                if self.work.is_done() {
                    break;
                }
                self.work.wait(Duration::from_millis(20));
                continue;
            }
            let Some(taken) = self.work.next() else { break };
            mover.piece(&taken.piece);
        }
        mover.tally
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
