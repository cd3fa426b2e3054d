//! The right to touch a batch's memory and to give results: [`Ticket`] for as long as an engine
//! holds a batch, [`Visit`] for one thread's short stay.
//!
//! Both count as users of the batch. When the last one goes, operations that still have no
//! result fail with [`CopyError::Abandoned`](crate::CopyError::Abandoned).

use std::{
    cell::Cell,
    marker::PhantomData,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    batch::{CopyBatch, OpResult},
    engine::CopyError,
};

/// Says which engine a batch was submitted to, so that no other engine copies it. Cannot be
/// made twice with the same value.
#[derive(Debug, PartialEq, Eq)]
pub struct EngineId(u64);

impl EngineId {
    /// A new identity; an engine makes one when it is made.
    #[expect(clippy::new_without_default, reason = "a default should not be unique")]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn get(&self) -> u64 {
        self.0
    }
}

/// An engine's hold on a submitted batch. Can be sent, shared and cloned; every clone counts.
#[derive(Debug)]
pub struct Ticket {
    batch: Arc<CopyBatch>,
    owner: u64,
}

impl Ticket {
    /// For a user that has been counted already.
    pub(crate) fn counted(batch: Arc<CopyBatch>, owner: u64) -> Self {
        Self { batch, owner }
    }

    /// The batch.
    pub fn batch(&self) -> &Arc<CopyBatch> {
        &self.batch
    }

    /// Reports that operation `index` is over: `Ok` with the bytes that were copied. A number
    /// other than the operation's length makes it fail. A result for an operation that has one
    /// already, or that does not exist, changes nothing but [`CopyBatch::violations`].
    pub fn complete(&self, index: usize, result: Result<usize, CopyError>) {
        if finish(&self.batch, index, result) {
            self.batch.subtract(1);
        }
    }

    /// Reports that `bytes` more of operation `index` are over. The operation is over once its
    /// parts add up to its length, in whatever order they are reported; the first error is its
    /// result. Parts and [`Ticket::complete`] must not be mixed for one operation.
    pub fn complete_part(&self, index: usize, bytes: usize, result: Result<(), CopyError>) {
        if finish_part(&self.batch, index, bytes, result) {
            self.batch.subtract(1);
        }
    }

    /// Reports that operation `index` was cancelled before it began.
    pub fn cancel(&self, index: usize) {
        if finish_as(&self.batch, index, OpResult::Cancelled) {
            self.batch.subtract(1);
        }
    }

    /// A stay of the current thread, which reports its completions together at its end.
    pub fn visit(&self) -> Visit<'_> {
        let entered = self.batch.enter(self.owner);
        debug_assert!(entered, "a batch with a ticket has a user");
        Visit::counted(&self.batch)
    }
}

impl Clone for Ticket {
    fn clone(&self) -> Self {
        let entered = self.batch.enter(self.owner);
        debug_assert!(entered, "a batch with a ticket has a user");
        Self { batch: Arc::clone(&self.batch), owner: self.owner }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.batch.leave(0);
    }
}

/// One thread's stay in a submitted batch. Completions are counted here and reported to the
/// batch together when it ends: one contended atomic operation per stay, not per folio.
#[derive(Debug)]
pub struct Visit<'a> {
    batch: &'a CopyBatch,
    finished: Cell<u32>,
    _not_send: PhantomData<*const ()>,
}

impl<'a> Visit<'a> {
    /// For a user that has been counted already.
    pub(crate) fn counted(batch: &'a CopyBatch) -> Self {
        Self { batch, finished: Cell::new(0), _not_send: PhantomData }
    }

    /// The batch.
    pub fn batch(&self) -> &'a CopyBatch {
        self.batch
    }

    /// Like [`Ticket::complete`].
    pub fn complete(&self, index: usize, result: Result<usize, CopyError>) {
        self.count(finish(self.batch, index, result));
    }

    /// Like [`Ticket::complete_part`].
    pub fn complete_part(&self, index: usize, bytes: usize, result: Result<(), CopyError>) {
        self.count(finish_part(self.batch, index, bytes, result));
    }

    /// Like [`Ticket::cancel`].
    pub fn cancel(&self, index: usize) {
        self.count(finish_as(self.batch, index, OpResult::Cancelled));
    }

    fn count(&self, finished: bool) {
        self.finished.set(self.finished.get() + u32::from(finished));
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        self.batch.leave(self.finished.get());
    }
}

fn finish(batch: &CopyBatch, index: usize, result: Result<usize, CopyError>) -> bool {
    let asked = batch.op(index).map_or(0, |op| op.len);
    let outcome = match result {
        Ok(copied) if copied < asked => OpResult::Failed(CopyError::ShortCopy { asked, copied }),
        Ok(copied) if copied > asked => OpResult::Failed(CopyError::LongCopy { asked, copied }),
        Ok(_) => OpResult::Done,
        Err(error) => OpResult::Failed(error),
    };
    finish_as(batch, index, outcome)
}

fn finish_part(
    batch: &CopyBatch,
    index: usize,
    bytes: usize,
    result: Result<(), CopyError>,
) -> bool {
    match batch.slot(index).map(|slot| slot.part(bytes, result)) {
        Some(None) => false,
        Some(Some(outcome)) => finish_as(batch, index, outcome),
        None => {
            batch.violation(index);
            false
        }
    }
}

/// Gives the result; true if the operation had none before.
fn finish_as(batch: &CopyBatch, index: usize, outcome: OpResult) -> bool {
    let finished = batch.slot(index).is_some_and(|slot| slot.finish(outcome));
    if !finished {
        batch.violation(index);
    }
    finished
}
