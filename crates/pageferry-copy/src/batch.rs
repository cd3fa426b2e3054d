//! A batch: a list of copies, a result for each, and the count that tells when all is over.
//!
//! # Life of a batch
//! *idle* - [`fill`](CopyBatch::fill) -> *filled* - an engine takes a [`Ticket`] -> *submitted*
//! -> *done*, which is idle again, with results to read. It is allocated once and refilled.
//!
//! # What must always hold
//! One atomic word holds two counts: operations without a result, and users (tickets and
//! visits, that is: whoever may touch the batch's memory). Both in one word, so that
//! - done means exactly "both are zero", seen and brought about by one atomic operation;
//! - nobody can join a batch whose last user has left, and an operation that the last user
//!   left behind gets the result [`CopyError::Abandoned`]: no completion is ever lost;
//! - a batch can be refilled only while nobody is inside, so that no late completion can hit
//!   the operations of the next filling.
//!
//! Everything is checked by the loom model in `tests/loom.rs`.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    engine::{CopyError, SubmitError},
    slot::Slot,
    sync::{AtomicU32, AtomicU64, AtomicUsize, Condvar, Mutex, Ordering, spin_loop, yield_now},
    ticket::{EngineId, Ticket, Visit},
};

/// One copy, by plain addresses: what lies there may be written by other threads while it is
/// copied, so it is never seen as a reference or slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyOp {
    /// Address of the first byte to write.
    pub dst: usize,
    /// Address of the first byte to read.
    pub src: usize,
    /// Bytes to copy; at least 1.
    pub len: usize,
}

/// What became of one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpResult {
    /// No result yet.
    Pending,
    /// Copied whole.
    Done,
    /// Not copied whole; the destination's content is undefined.
    Failed(CopyError),
    /// Cancelled before it began.
    Cancelled,
}

/// Why a batch could not be filled. A refused filling leaves the batch empty, except where it
/// is in use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FillError {
    /// It is being filled or copied.
    #[error("the batch is in use; wait until its copy is done")]
    InUse,
    /// More operations than it was made for.
    #[error("the batch holds at most {capacity} operations; split the list")]
    Full {
        /// Operations it can hold.
        capacity: usize,
    },
    /// An operation that cannot be meant.
    #[error("operation {index} ({op:x?}) {reason}")]
    BadOp {
        /// Its index.
        index: usize,
        /// The operation.
        op: CopyOp,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// Operations without a result, in the state word.
pub(crate) const PENDING_MASK: u64 = 0xffff_ffff;
/// One user, in the state word.
pub(crate) const USER: u64 = 1 << 32;
/// Both counts: the batch is submitted and not done while any bit of these is set.
const COUNTS: u64 = (1 << 61) - 1;
/// Somebody sleeps until the batch is done.
const WAITING: u64 = 1 << 61;
/// Filled and not submitted.
const FILLED: u64 = 1 << 62;
/// Being filled.
const FILLING: u64 = 1 << 63;

/// A reusable list of copies with their results. See the [module](self).
#[derive(Debug)]
pub struct CopyBatch {
    slots: Box<[Slot]>,
    len: AtomicUsize,
    bytes: AtomicUsize,
    /// The engine that holds it.
    owner: AtomicU64,
    state: AtomicU64,
    /// The next byte, in the batch's own order, that no worker of a CPU engine has claimed.
    pub(crate) cursor: AtomicUsize,
    violations: AtomicU32,
    /// How often sleepers were woken.
    wakes: Mutex<u64>,
    woken: Condvar,
}

impl CopyBatch {
    /// Makes an empty batch that can hold `max_ops` operations. All the memory that it will
    /// ever need (64 bytes for each) is allocated here.
    pub fn with_capacity(max_ops: usize) -> Arc<Self> {
        Arc::new(Self {
            slots: (0..max_ops.min(u32::MAX as usize)).map(|_| Slot::new()).collect(),
            len: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            owner: AtomicU64::new(0),
            state: AtomicU64::new(0),
            cursor: AtomicUsize::new(0),
            violations: AtomicU32::new(0),
            wakes: Mutex::new(0),
            woken: Condvar::new(),
        })
    }

    /// Replaces the operations and forgets the results. Allocates nothing. Where another
    /// thread is just leaving the batch after its last completion, this waits for it briefly.
    ///
    /// # Errors
    /// [`FillError`].
    pub fn fill(&self, ops: impl IntoIterator<Item = CopyOp>) -> Result<(), FillError> {
        self.lock_for_filling()?;
        let mut filling = Filling { batch: self, count: 0 };
        self.len.store(0, Ordering::Relaxed);
        let mut bytes = 0_usize;
        for (index, op) in ops.into_iter().enumerate() {
            let slot =
                self.slots.get(index).ok_or(FillError::Full { capacity: self.slots.len() })?;
            let bad = |reason| FillError::BadOp { index, op, reason };
            check(op).map_err(bad)?;
            slot.set(op, bytes);
            bytes = (bytes.checked_add(op.len))
                .filter(|&sum| sum <= usize::MAX / 2)
                .ok_or_else(|| bad("makes the batch longer than the address space"))?;
            filling.count = index + 1;
        }
        self.len.store(filling.count, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
        self.cursor.store(0, Ordering::Relaxed);
        self.violations.store(0, Ordering::Relaxed);
        // Release: whoever submits the batch sees its operations.
        self.state.store(FILLED | filling.count as u64, Ordering::Release);
        std::mem::forget(filling);
        Ok(())
    }

    fn lock_for_filling(&self) -> Result<(), FillError> {
        // Leaving takes nanoseconds, but whoever leaves may have lost its CPU just then.
        for turn in 0..100_000 {
            let state = self.state.load(Ordering::Relaxed);
            let idle = state == 0 || (state & FILLED != 0 && state & FILLING == 0);
            if idle
                && self
                    .state
                    .compare_exchange(state, FILLING, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                return Ok(());
            }
            if state & PENDING_MASK != 0 || state & FILLING != 0 {
                break;
            }
            if turn < 64 { spin_loop() } else { yield_now() }
        }
        Err(FillError::InUse)
    }

    /// Operations in the batch.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// Whether it has no operations.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Operations that it can hold.
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Bytes of all operations together.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Operation `index`; `None` beyond the last.
    pub fn op(&self, index: usize) -> Option<CopyOp> {
        self.slot(index).map(Slot::op)
    }

    /// What became of operation `index`; `None` beyond the last.
    pub fn result(&self, index: usize) -> Option<OpResult> {
        self.slot(index).map(Slot::result)
    }

    /// The results of all operations, in their order.
    pub fn results(&self) -> impl Iterator<Item = OpResult> + '_ {
        self.live().iter().map(Slot::result)
    }

    /// Operations that have no result yet. A CPU worker reports once per piece of work, so
    /// this may lag behind [`CopyBatch::result`].
    pub fn remaining(&self) -> usize {
        usize::try_from(self.state.load(Ordering::Acquire) & PENDING_MASK).unwrap_or(usize::MAX)
    }

    /// Whether every operation has a result and the engine touches the memory no more. False
    /// for a batch that is filled and waits to be submitted.
    pub fn is_done(&self) -> bool {
        // Acquire: whoever sees the end sees the results and the copied bytes.
        self.state.load(Ordering::Acquire) & (COUNTS | FILLED | FILLING) == 0
    }

    /// Whether an engine holds it: submitted and not done.
    pub fn is_submitted(&self) -> bool {
        let state = self.state.load(Ordering::Acquire);
        state & COUNTS != 0 && state & (FILLED | FILLING) == 0
    }

    /// Completions that an engine reported for an operation that had a result already, or that
    /// does not exist. Not 0 means that the engine's results cannot be trusted.
    pub fn violations(&self) -> u32 {
        self.violations.load(Ordering::Relaxed)
    }

    /// Sleeps until the batch is done; returns at once if it is not submitted. Most callers
    /// want [`CopyEngine::wait`](crate::CopyEngine::wait), which works meanwhile.
    pub fn wait(&self) {
        self.sleep(None);
    }

    /// Like [`CopyBatch::wait`], for at most `limit`. True if the batch is not submitted (any
    /// more).
    pub fn wait_timeout(&self, limit: Duration) -> bool {
        self.sleep(Instant::now().checked_add(limit))
    }

    fn sleep(&self, deadline: Option<Instant>) -> bool {
        let mut wakes = self.wakes.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = *wakes;
        // Only a submitted batch has somebody who will wake us.
        let waiting = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| {
            (state & COUNTS != 0 && state & (FILLED | FILLING) == 0).then_some(state | WAITING)
        });
        if waiting.is_err() {
            return true;
        }
        while *wakes == seen {
            wakes = match deadline {
                None => self.woken.wait(wakes).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    let (guard, _) = self
                        .woken
                        .wait_timeout(wakes, left)
                        .unwrap_or_else(PoisonError::into_inner);
                    guard
                }
            };
        }
        true
    }

    /// Takes the batch for an engine: it becomes submitted. The first step of every
    /// [`CopyEngine::submit`](crate::CopyEngine::submit).
    ///
    /// # Errors
    /// [`SubmitError::NotReady`] if it is not filled.
    pub fn begin(self: &Arc<Self>, owner: &EngineId) -> Result<Ticket, SubmitError> {
        let state = self.state.load(Ordering::Relaxed);
        let count = state & PENDING_MASK;
        if state != FILLED | count {
            return Err(SubmitError::NotReady);
        }
        // Acquire pairs with the store at the end of `fill`.
        self.state
            .compare_exchange(state, FILLING | count, Ordering::Acquire, Ordering::Relaxed)
            .map_err(|_| SubmitError::NotReady)?;
        self.owner.store(owner.get(), Ordering::Relaxed);
        self.state.store(USER | count, Ordering::Release);
        Ok(Ticket::counted(Arc::clone(self), owner.get()))
    }

    /// Joins a submitted batch for a short time, as a thread that helps. `None` if the batch is
    /// not (or no longer) in this engine's hands.
    pub fn visit(&self, owner: &EngineId) -> Option<Visit<'_>> {
        self.enter(owner.get()).then(|| Visit::counted(self))
    }

    /// Counts one more user, unless the last one has left already.
    pub(crate) fn enter(&self, owner: u64) -> bool {
        self.state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| {
                let inside = state & (COUNTS & !PENDING_MASK) != 0;
                (inside && state & (FILLED | FILLING) == 0).then_some(state + USER)
            })
            .is_ok()
            && (self.owner.load(Ordering::Relaxed) == owner || {
                self.leave(0);
                false
            })
    }

    /// Counts one user less and `finished` operations more; the last user gives a result to
    /// what was left behind.
    pub(crate) fn leave(&self, finished: u32) {
        let delta = USER | u64::from(finished);
        // AcqRel: our copies and results come before the end, and the last one sees all others'.
        let after = self.state.fetch_sub(delta, Ordering::AcqRel) - delta;
        if after & COUNTS == 0 {
            self.wake(after);
        } else if after & COUNTS <= PENDING_MASK {
            let abandoned = OpResult::Failed(CopyError::Abandoned);
            let lost = (self.live().iter()).filter(|slot| slot.finish(abandoned)).count();
            tracing::error!(lost, "a copy engine gave up a batch; its operations failed");
            // Nobody else is inside, so what is left of the count is ours to take.
            self.subtract(after & PENDING_MASK);
        }
    }

    /// Counts `finished` operations less to wait for.
    pub(crate) fn subtract(&self, finished: u64) {
        let after = self.state.fetch_sub(finished, Ordering::AcqRel) - finished;
        if after & COUNTS == 0 {
            self.wake(after);
        }
    }

    /// Wakes the sleepers of a batch that just became done.
    fn wake(&self, state: u64) {
        if state & WAITING == 0 {
            return;
        }
        // The lock orders this after the sleeper's own look at the state word.
        let mut wakes = self.wakes.lock().unwrap_or_else(PoisonError::into_inner);
        *wakes += 1;
        // From here on the batch may be refilled: WAITING kept the word from being 0.
        self.state.fetch_and(!WAITING, Ordering::Release);
        self.woken.notify_all();
    }

    pub(crate) fn slot(&self, index: usize) -> Option<&Slot> {
        self.live().get(index)
    }

    /// The slots that hold operations.
    pub(crate) fn live(&self) -> &[Slot] {
        self.slots.get(..self.len()).unwrap_or_default()
    }

    pub(crate) fn violation(&self, index: usize) {
        self.violations.fetch_add(1, Ordering::Relaxed);
        tracing::error!(
            index,
            "a copy engine completed an operation twice, or one it was not given"
        );
    }
}

/// A batch while it is filled; one that is dropped leaves the batch empty and idle.
struct Filling<'a> {
    batch: &'a CopyBatch,
    count: usize,
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        self.batch.bytes.store(0, Ordering::Relaxed);
        self.batch.state.store(0, Ordering::Release);
    }
}

fn check(op: CopyOp) -> Result<(), &'static str> {
    if op.len == 0 {
        return Err("is empty");
    }
    let (Some(dst_end), Some(src_end)) = (op.dst.checked_add(op.len), op.src.checked_add(op.len))
    else {
        return Err("reaches past the end of the address space");
    };
    if op.dst < src_end && op.src < dst_end {
        return Err("has a destination that overlaps its source");
    }
    Ok(())
}
