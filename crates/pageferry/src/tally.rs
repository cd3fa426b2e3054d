//! What one participant of a move counts while it works: outcomes, times, holes.

use crate::flight::MAX_PAGES;
use crate::plan::Segment;
use crate::policy::MAX_WINDOW;
use crate::report::{Holes, Outcome, Phases};
use pageferry_sys::sched::thread_cpu_ns;
use std::ops::Range;
use std::time::{Duration, Instant};

/// A phase of the transaction, as the report splits time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Plan,
    Reserve,
    Protect,
    Detach,
    Copy,
    Repair,
    Attach,
    Release,
}

fn slot(phases: &mut Phases, phase: Phase) -> &mut Duration {
    match phase {
        Phase::Plan => &mut phases.plan,
        Phase::Reserve => &mut phases.reserve,
        Phase::Protect => &mut phases.protect,
        Phase::Detach => &mut phases.detach,
        Phase::Copy => &mut phases.copy,
        Phase::Repair => &mut phases.repair,
        Phase::Attach => &mut phases.attach,
        Phase::Release => &mut phases.release,
    }
}

/// One participant's account. Joined into the report when the participant leaves.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) pages: Vec<(Range<usize>, Outcome)>,
    pub(crate) wall: Phases,
    pub(crate) cpu: Phases,
    pub(crate) holes: Holes,
    pub(crate) bytes_moved: u64,
    pub(crate) repairs: u64,
    pub(crate) fallbacks: u64,
    pub(crate) frozen: u64,
    pub(crate) live: u64,
    pub(crate) first_folio: Option<Instant>,
    /// What stayed for a reason that may pass.
    pub(crate) again: Vec<Segment>,
    /// Pages of the move, where that was told.
    most: usize,
    mark: Instant,
    cpu_mark: u64,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            pages: Vec::with_capacity(256),
            wall: Phases::default(),
            cpu: Phases::default(),
            holes: Holes::default(),
            bytes_moved: 0,
            repairs: 0,
            fallbacks: 0,
            frozen: 0,
            live: 0,
            first_folio: None,
            again: Vec::new(),
            most: usize::MAX,
            mark: Instant::now(),
            cpu_mark: thread_cpu_ns(),
        }
    }

    /// Room for what a conductor's batches in the air may add, and one more look of the planner, for
    /// a move of so many pages.
    pub(crate) fn make_room(&mut self, pages: usize) {
        if !self.has_room(MAX_WINDOW) {
            self.pages.reserve((2 * (MAX_WINDOW + 3) * MAX_PAGES).min(pages + 1));
            self.again.reserve(((MAX_WINDOW + 1) * MAX_PAGES).min(pages + 1));
        }
        self.most = pages;
    }

    /// Whether another batch and another look of the planner, beside `batches` in the air, add
    /// their outcomes without the allocator.
    pub(crate) fn has_room(&self, batches: usize) -> bool {
        // There are never more runs than pages.
        let fits = |len: usize, room: usize, more: usize| room - len >= more || room > self.most;
        // A batch: a run for each page; those to be tried again are no neighbours. A look: what is
        // there and what is not, in turns.
        fits(self.pages.len(), self.pages.capacity(), (batches + 3) * MAX_PAGES)
            && fits(self.again.len(), self.again.capacity(), (batches + 1) * MAX_PAGES / 2)
    }

    /// Charges the time since the last lap to `phase`; returns the wall time of the lap.
    pub(crate) fn lap(&mut self, phase: Phase) -> Duration {
        let (now, cpu) = (Instant::now(), thread_cpu_ns());
        let wall = now - self.mark;
        *slot(&mut self.wall, phase) += wall;
        *slot(&mut self.cpu, phase) += Duration::from_nanos(cpu.saturating_sub(self.cpu_mark));
        self.mark = now;
        self.cpu_mark = cpu;
        wall
    }

    /// Adds an outcome; joins it to the one before where that fits.
    pub(crate) fn outcome(&mut self, range: Range<usize>, outcome: Outcome) {
        if range.is_empty() {
            return;
        }
        if outcome == Outcome::Moved {
            self.bytes_moved += range.len() as u64;
        }
        match self.pages.last_mut() {
            Some((last, o)) if *o == outcome && last.end == range.start => last.end = range.end,
            _ => self.pages.push((range, outcome)),
        }
    }
}
