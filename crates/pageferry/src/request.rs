//! Asking for a move, and following it.

use crate::engine::{Claim, Engine};
use crate::error::{MigrateError, RegionError, panic_text};
use crate::flight::MAX_PAGES;
use crate::job::{Control, Frames, Job, max_batch_bytes};
use crate::plan::Leg;
use crate::policy::{DEFAULT_STALL_BUDGET, Wish};
use crate::region::{References, Region, look};
use crate::report::{Division, Order, Report};
use crate::sync::{Condvar, Mutex};
use crate::units::{normalize, overlap};
use pageferry_copy::cpu::CHUNK;
use pageferry_copy::{CopyEngine, CpuEngine, Kernel};
use pageferry_sys::page_size;
use pageferry_sys::thread::Deaf;
use pageferry_sys::uffd::Rights;
use pageferry_topology::NodeId;
use std::future::Future;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::{Duration, Instant};

/// Which bytes of a region are to go to which node.
#[derive(Clone, Debug)]
#[must_use]
pub struct Part {
    engine: usize,
    home: Range<usize>,
    references: References,
    owner: u64,
    own_policy: bool,
    adopted: bool,
    gone: Arc<AtomicBool>,
    ranges: Vec<Range<usize>>,
    to: NodeId,
}

impl Part {
    pub(crate) fn new(region: &Region, to: NodeId) -> Self {
        Self {
            engine: Arc::as_ptr(&region.engine.inner).addr(),
            home: region.addresses(),
            references: region.references,
            owner: region.id,
            own_policy: region.own_policy,
            adopted: region.is_adopted(),
            gone: Arc::clone(&region.gone),
            ranges: Vec::new(),
            to,
        }
    }

    /// Adds a range: bytes from the region's start, whole pages. Without any, the whole region is
    /// meant. Ranges may overlap; each page is moved once.
    pub fn range(mut self, bytes: Range<usize>) -> Self {
        self.ranges.push(bytes);
        self
    }

    /// Whether its region has memory in the range.
    pub(crate) fn overlaps(&self, range: &Range<usize>) -> bool {
        overlap(&self.home, range)
    }

    /// The same, to go elsewhere.
    pub(crate) fn toward(&self, to: NodeId) -> Self {
        Self { to, ..self.clone() }
    }

    /// Whether it is of the region with this mark.
    pub(crate) fn is_of(&self, gone: &Arc<AtomicBool>) -> bool {
        Arc::ptr_eq(&self.gone, gone)
    }

    /// Bytes of its region.
    pub(crate) fn bytes(&self) -> u64 {
        self.home.len() as u64
    }

    /// Of its region, what is on one of these nodes now; `None`: nothing is.
    pub(crate) fn on(mut self, engine: &Engine, from: &[u32]) -> Result<Option<Self>, RegionError> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        look(engine, self.home.clone(), |page, node, folio| {
            if from.contains(&node.get()) {
                let start = page - self.home.start;
                match ranges.last_mut().filter(|last| last.end == start) {
                    Some(last) => last.end += folio.bytes(),
                    None => ranges.push(start..start + folio.bytes()),
                }
            }
        })?;
        self.ranges = ranges;
        Ok((!self.ranges.is_empty()).then_some(self))
    }

    fn check(&self) -> Result<Leg, MigrateError> {
        let len = self.home.len();
        let whole = 0..len;
        let given = match &self.ranges[..] {
            [] => std::slice::from_ref(&whole),
            ranges => ranges,
        };
        let page = page_size();
        for range in given {
            if range.is_empty() {
                return Err(MigrateError::Empty(range.clone()));
            }
            if range.end > len {
                return Err(MigrateError::Foreign { given: range.clone(), len });
            }
            if !range.start.is_multiple_of(page) || !range.end.is_multiple_of(page) {
                return Err(MigrateError::Unaligned { given: range.clone(), page });
            }
        }
        let start = self.home.start;
        let ranges = given.iter().map(|r| start + r.start..start + r.end).collect();
        Ok(Leg { owner: self.owner, ranges: normalize(ranges), to: self.to.get() })
    }
}

/// What to do when another move has part of the range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overlap {
    /// Wait for it.
    #[default]
    Wait,
    /// Fail with [`MigrateError::Overlapping`].
    Refuse,
}

/// A move that has not begun. Options left out are chosen by what was measured.
#[derive(Debug)]
#[must_use = "a move begins with `run` or `start`"]
pub struct Move {
    engine: Engine,
    parts: Vec<Part>,
    order: Option<Order>,
    division: Option<Division>,
    budget: Duration,
    batch: usize,
    threads: Option<usize>,
    copier: Option<Arc<dyn CopyEngine>>,
    kernel: Option<Kernel>,
    frames: Frames,
    even_if_there: bool,
    overlap: Overlap,
}

impl Move {
    pub(crate) fn new(engine: Engine, parts: Vec<Part>) -> Self {
        Self {
            engine,
            parts,
            order: None,
            division: None,
            budget: DEFAULT_STALL_BUDGET,
            batch: max_batch_bytes(),
            threads: None,
            copier: None,
            kernel: None,
            frames: Frames::default(),
            even_if_there: false,
            overlap: Overlap::default(),
        }
    }

    /// Whether accesses may wait for the copy. Default: frozen where a batch fits the stall
    /// budget, else live.
    pub fn order(mut self, order: Order) -> Self {
        self.order = Some(order);
        self
    }

    /// Who does the page-table work. Default: what measures best.
    pub fn division(mut self, division: Division) -> Self {
        self.division = Some(division);
        self
    }

    /// How long an access may wait for a page in the air, at the 99th percentile: 10 us to 10 s.
    /// Default: [`DEFAULT_STALL_BUDGET`].
    pub fn stall_budget(mut self, budget: Duration) -> Self {
        self.budget = budget;
        self
    }

    /// Bytes of one batch at most: whole pages, up to 2 MiB (which is the default). A huge folio
    /// is one batch whatever this says.
    pub fn batch_bytes(mut self, bytes: usize) -> Self {
        self.batch = bytes;
        self
    }

    /// Threads that take part, the caller counted: up to those of the engine.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Copies with another engine (a DMA engine, say); the division is then conducted.
    pub fn engine(mut self, engine: Arc<dyn CopyEngine>) -> Self {
        self.copier = Some(engine);
        self
    }

    /// Copies with another CPU kernel than the engine's.
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = Some(kernel);
        self
    }

    /// Where frames come from.
    pub fn frames(mut self, frames: Frames) -> Self {
        self.frames = frames;
        self
    }

    /// Moves pages that are on the destination already, too: each gets another frame there.
    pub fn even_if_there(mut self) -> Self {
        self.even_if_there = true;
        self
    }

    /// What to do when another move has part of the range.
    pub fn if_overlapping(mut self, overlap: Overlap) -> Self {
        self.overlap = overlap;
        self
    }

    /// Moves on the calling thread, which works too, and returns when all is done. Signal handlers
    /// run there between batches only, so that they may touch the region, or fork.
    ///
    /// # Errors
    /// [`MigrateError`]: nothing was touched (but for [`MigrateError::Panicked`]).
    pub fn run(self) -> Result<Report, MigrateError> {
        let prepared = self.prepare()?;
        let claimed = prepared.claim()?;
        prepared.run(claimed)
    }

    /// Moves on a thread of its own.
    ///
    /// # Errors
    /// [`MigrateError`], as far as it can be known before the move's turn has come. With
    /// [`Overlap::Refuse`], a range that another move has is known at once.
    pub fn start(self) -> Result<Handle, MigrateError> {
        let prepared = self.prepare()?;
        // Now, so that a call made after this one finds the range taken.
        let claimed = prepared.try_claim()?;
        let shared = Arc::new(Shared {
            control: Arc::clone(&prepared.job.control),
            state: Mutex::new(State { result: None, waker: None, done: false }),
            finished: Condvar::new(),
        });
        let theirs = Arc::clone(&shared);
        pageferry_sys::thread::spawn("pf-move", move || {
            let result = match claimed {
                Some(claimed) => prepared.run(claimed),
                None => prepared.claim().and_then(|claimed| prepared.run(claimed)),
            };
            let waker = {
                let mut state = theirs.state.lock();
                state.result = Some(result);
                state.done = true;
                state.waker.take()
            };
            theirs.finished.notify_all();
            if let Some(waker) = waker {
                waker.wake();
            }
        })
        .map_err(MigrateError::Thread)?;
        Ok(Handle { shared })
    }

    /// Checks everything that can be checked without touching a page.
    fn prepare(self) -> Result<Prepared, MigrateError> {
        let inner = &self.engine.inner;
        if !inner.is_at_home() {
            return Err(MigrateError::AfterFork);
        }
        let bad = |option, value: String, reason| MigrateError::Option { option, value, reason };
        if self.batch == 0
            || self.batch > max_batch_bytes()
            || !self.batch.is_multiple_of(page_size())
        {
            let reason = "a batch is whole pages, up to 2 MiB";
            return Err(bad("batch_bytes", self.batch.to_string(), reason));
        }
        let allowed = Duration::from_micros(10)..=Duration::from_secs(10);
        if !allowed.contains(&self.budget) {
            return Err(bad("stall_budget", format!("{:?}", self.budget), "10 us to 10 s"));
        }
        let threads = self.threads.unwrap_or(inner.threads);
        if threads == 0 || threads > inner.threads {
            let value = format!("{threads} (the engine has {})", inner.threads);
            let reason = "1 up to the threads that the engine was built with";
            return Err(bad("threads", value, reason));
        }
        let mut legs = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            if part.engine != Arc::as_ptr(inner).addr() {
                return Err(MigrateError::OtherEngine);
            }
            inner.machine.memory_node(part.to)?;
            if inner.is_used_by_movers(&part.home) {
                return Err(MigrateError::OwnMemory(part.home.clone()));
            }
            legs.push(part.check()?);
        }
        if let [one, other] = &legs[..]
            && let Some(both) = first_in_both(&one.ranges, &other.ranges)
        {
            return Err(MigrateError::SameOnBothSides(both));
        }
        let homes: Vec<_> = self.parts.iter().map(|p| p.home.clone()).collect();
        let total = legs.iter().flat_map(|l| &l.ranges).map(|r| r.len() as u64).sum();
        let control =
            Arc::new(Control { cancel: AtomicBool::new(false), done: AtomicU64::new(0), total });
        let kernel = self.kernel.unwrap_or(inner.cpu.kernel());
        let cpu = if kernel == inner.cpu.kernel() && threads == inner.threads {
            Arc::clone(&inner.cpu)
        } else {
            let workers = Arc::clone(inner.cpu.pool());
            Arc::new(CpuEngine::with_limits(kernel, workers, threads - 1, CHUNK))
        };
        let job = Job {
            ctx: Arc::clone(&inner.ctx),
            cpu,
            engine: self.copier,
            wish: Wish {
                order: self.order,
                division: self.division,
                budget: self.budget,
                batch: (self.batch / page_size()).min(MAX_PAGES),
                threads,
                compare: self.parts.iter().any(|p| p.references == References::Possible)
                    && inner.rights == Rights::Full,
            },
            frames: self.frames,
            recycled: (self.frames == Frames::Recycled
                && self.parts.iter().all(|p| p.references == References::Never))
            .then(|| self.parts.iter().map(|p| p.owner).collect()),
            even_if_there: self.even_if_there,
            one_node: self.engine.only_node().is_some(),
            own_policy: self.parts.iter().any(|p| p.own_policy),
            legs,
            wholes: self.parts.iter().filter(|p| p.adopted).map(|p| p.home.clone()).collect(),
            control,
        };
        let blocks = Job::blocks(&job.legs, &homes);
        let gone = self.parts.into_iter().map(|p| p.gone).collect();
        Ok(Prepared { engine: self.engine, job, blocks, overlap: self.overlap, gone })
    }
}

/// The first address that is in both lists, each in ascending order and disjoint.
fn first_in_both(one: &[Range<usize>], other: &[Range<usize>]) -> Option<usize> {
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    while let (Some(a), Some(b)) = (one.peek(), other.peek()) {
        if overlap(a, b) {
            return Some(a.start.max(b.start));
        }
        if a.end <= b.end {
            one.next()
        } else {
            other.next()
        };
    }
    None
}

/// A move that has been checked.
struct Prepared {
    engine: Engine,
    job: Job,
    blocks: Vec<Range<usize>>,
    overlap: Overlap,
    /// Of the regions: whether they were dropped.
    gone: Vec<Arc<AtomicBool>>,
}

/// The claim on a range, given up when dropped.
struct Claimed {
    engine: Engine,
    control: Arc<Control>,
}

impl Drop for Claimed {
    fn drop(&mut self) {
        let inner = &self.engine.inner;
        inner.claims.lock().retain(|c| !Arc::ptr_eq(&c.control, &self.control));
        *inner.last_move.lock() = Instant::now();
        inner.released.notify_all();
        inner.rouse();
    }
}

impl Prepared {
    /// Claims the range, when it is free.
    fn claim(&self) -> Result<Claimed, MigrateError> {
        let inner = &self.engine.inner;
        let mut claims = inner.claims.lock();
        loop {
            match self.claim_now(&mut claims)? {
                Some(claimed) => return Ok(claimed),
                None => claims = inner.released.wait(claims),
            }
        }
    }

    /// Claims the range if it is free.
    fn try_claim(&self) -> Result<Option<Claimed>, MigrateError> {
        self.claim_now(&mut self.engine.inner.claims.lock())
    }

    fn claim_now(&self, claims: &mut Vec<Claim>) -> Result<Option<Claimed>, MigrateError> {
        // Relaxed: read and written under the lock.
        if self.gone.iter().any(|gone| gone.load(Ordering::Relaxed)) {
            return Err(MigrateError::RegionGone);
        }
        let taken = claims
            .iter()
            .flat_map(|c| &c.ranges)
            .find_map(|theirs| self.blocks.iter().find(|ours| overlap(theirs, ours)).cloned());
        match (taken, self.overlap) {
            (Some(range), Overlap::Refuse) => Err(MigrateError::Overlapping(range)),
            (Some(_), Overlap::Wait) => Ok(None),
            (None, _) => {
                let control = Arc::clone(&self.job.control);
                let ranges = self.blocks.clone();
                claims.push(Claim { ranges, control: Arc::clone(&control) });
                Ok(Some(Claimed { engine: self.engine.clone(), control }))
            }
        }
    }

    fn run(&self, _claimed: Claimed) -> Result<Report, MigrateError> {
        let inner = &self.engine.inner;
        // Relaxed: a counter for display.
        inner.moves.fetch_add(1, Ordering::Relaxed);
        inner.rouse();
        // A handler of the program could wait for a page of this or another move, and so for this
        // thread. They run between holes (`ForkGate::hold`).
        let _deaf = Deaf::new();
        let moved = catch_unwind(AssertUnwindSafe(|| self.job.run(&self.blocks)));
        let report = match moved {
            Ok(Ok(report)) => report,
            Ok(Err(source)) => {
                let range = self.blocks.first().cloned().unwrap_or_default();
                return Err(MigrateError::Register { range, source });
            }
            Err(panic) => {
                return Err(MigrateError::Panicked(panic_text(&*panic)));
            }
        };
        inner.bytes_moved.fetch_add(report.bytes_moved, Ordering::Relaxed);
        Ok(report)
    }
}

#[derive(Debug)]
struct State {
    result: Option<Result<Report, MigrateError>>,
    waker: Option<Waker>,
    done: bool,
}

#[derive(Debug)]
struct Shared {
    control: Arc<Control>,
    state: Mutex<State>,
    finished: Condvar,
}

/// How far a move is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes looked after so far: moved, or found to have another outcome.
    pub bytes_done: u64,
    /// Bytes asked for.
    pub bytes_total: u64,
}

/// A move under way. It is a future of its report, which it gives once: polled again after that, it
/// panics. Dropped, the move goes on.
#[derive(Debug)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl Handle {
    /// How far it is.
    pub fn progress(&self) -> Progress {
        let control = &self.shared.control;
        // Relaxed: a number for display.
        let done = control.done.load(Ordering::Relaxed).min(control.total);
        Progress {
            bytes_done: if self.is_finished() { control.total } else { done },
            bytes_total: control.total,
        }
    }

    /// Asks it to stop after the batches under way. What was not moved then is reported as
    /// [`Cancelled`](crate::Outcome::Cancelled); all pages are intact.
    pub fn cancel(&self) {
        self.shared.control.cancel.store(true, Ordering::Relaxed);
    }

    /// Whether the report is there.
    pub fn is_finished(&self) -> bool {
        self.shared.state.lock().done
    }

    /// Waits for the report.
    ///
    /// # Errors
    /// As [`Move::run`].
    ///
    /// # Panics
    /// If it was awaited as a future to its end before.
    pub fn wait(self) -> Result<Report, MigrateError> {
        let mut state = self.shared.state.lock();
        while !state.done {
            state = self.shared.finished.wait(state);
        }
        state.result.take().expect("a handle gives its report once")
    }
}

impl Future for Handle {
    type Output = Result<Report, MigrateError>;

    fn poll(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let mut state = self.shared.state.lock();
        if let Some(result) = state.result.take() {
            return Poll::Ready(result);
        }
        assert!(!state.done, "a handle gives its report once");
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges() -> impl Strategy<Value = Vec<Range<usize>>> {
        let range = (0usize..200, 1usize..20).prop_map(|(start, len)| start..start + len);
        proptest::collection::vec(range, 0..20).prop_map(normalize)
    }

    proptest! {
        #[test]
        fn the_first_address_in_both_lists_is_found(one in ranges(), other in ranges()) {
            let within = |list: &[Range<usize>], at| list.iter().any(|r| r.contains(&at));
            let slow = (0..300).find(|&at| within(&one, at) && within(&other, at));
            prop_assert_eq!(first_in_both(&one, &other), slow);
        }
    }
}
