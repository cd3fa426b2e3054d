//! One operation of a batch with its outcome, all in atomics.
//!
//! Atomics rather than cells: a batch is shared between its owner, an engine's threads and
//! whoever looks at results, and no misuse of it may become a data race. A relaxed load or
//! store costs what a plain one does; what orders them is the batch's state word (see
//! [`crate::batch`]) and, for the outcome, the `Release`/`Acquire` pair on `state`.

use crate::{
    batch::{CopyOp, OpResult},
    engine::CopyError,
    sync::{AtomicU32, AtomicUsize, Ordering},
};

const PENDING: u32 = 0;
const DONE: u32 = 1;
const CANCELLED: u32 = 2;
const FAILED: u32 = 3;

/// No error has been noted.
const ERR_NONE: u32 = 0;
/// Some thread is writing `code` and `value`.
const ERR_WRITING: u32 = 1;
const ERR_FAULT: u32 = 2;
const ERR_SHORT: u32 = 3;
const ERR_LONG: u32 = 4;
const ERR_DEVICE: u32 = 5;
const ERR_ABANDONED: u32 = 6;

/// An operation, its place in the batch's bytes, and its outcome. A cache line of its own, so
/// that two workers that finish neighbouring operations do not fight for one line.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Slot {
    dst: AtomicUsize,
    src: AtomicUsize,
    len: AtomicUsize,
    /// Bytes of the batch before this operation.
    start: AtomicUsize,
    /// Bytes not yet reported by [`Slot::part`].
    left: AtomicUsize,
    /// What `code` and `kind` cannot hold of the noted error.
    value: AtomicUsize,
    state: AtomicU32,
    /// Which error is noted: one of the `ERR_` values.
    kind: AtomicU32,
    code: AtomicU32,
}

impl Slot {
    pub(crate) fn new() -> Self {
        Self {
            dst: AtomicUsize::new(0),
            src: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            left: AtomicUsize::new(0),
            value: AtomicUsize::new(0),
            state: AtomicU32::new(PENDING),
            kind: AtomicU32::new(ERR_NONE),
            code: AtomicU32::new(0),
        }
    }

    /// Takes a new operation. Relaxed: published by the state word when the batch is submitted.
    pub(crate) fn set(&self, op: CopyOp, start: usize) {
        self.dst.store(op.dst, Ordering::Relaxed);
        self.src.store(op.src, Ordering::Relaxed);
        self.len.store(op.len, Ordering::Relaxed);
        self.start.store(start, Ordering::Relaxed);
        self.left.store(op.len, Ordering::Relaxed);
        self.kind.store(ERR_NONE, Ordering::Relaxed);
        self.state.store(PENDING, Ordering::Relaxed);
    }

    pub(crate) fn op(&self) -> CopyOp {
        CopyOp {
            dst: self.dst.load(Ordering::Relaxed),
            src: self.src.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn start(&self) -> usize {
        self.start.load(Ordering::Relaxed)
    }

    /// Gives the outcome; false if there is one already.
    pub(crate) fn finish(&self, outcome: OpResult) -> bool {
        let state = match outcome {
            OpResult::Pending => return false,
            OpResult::Done => DONE,
            OpResult::Cancelled => CANCELLED,
            OpResult::Failed(error) => {
                self.note(error);
                FAILED
            }
        };
        // Release: whoever reads the state sees the error's details.
        self.state.compare_exchange(PENDING, state, Ordering::Release, Ordering::Relaxed).is_ok()
    }

    /// Reports `bytes` more of this operation. Gives the outcome of the whole once its last
    /// byte is reported; the first error noted is the outcome's.
    pub(crate) fn part(&self, bytes: usize, result: Result<(), CopyError>) -> Option<OpResult> {
        if let Err(error) = result {
            self.note(error);
        }
        // AcqRel: the last part sees what every earlier part noted.
        let before = self.left.fetch_sub(bytes, Ordering::AcqRel);
        if bytes > before {
            let asked = self.len.load(Ordering::Relaxed);
            return Some(OpResult::Failed(CopyError::LongCopy {
                asked,
                copied: asked.saturating_add(bytes - before),
            }));
        }
        (before == bytes).then(|| self.noted().map_or(OpResult::Done, OpResult::Failed))
    }

    pub(crate) fn result(&self) -> OpResult {
        match self.state.load(Ordering::Acquire) {
            DONE => OpResult::Done,
            CANCELLED => OpResult::Cancelled,
            FAILED => OpResult::Failed(self.noted().unwrap_or(CopyError::Abandoned)),
            _ => OpResult::Pending,
        }
    }

    /// Remembers the first error; later ones are dropped.
    fn note(&self, error: CopyError) {
        if self
            .kind
            .compare_exchange(ERR_NONE, ERR_WRITING, Ordering::AcqRel, Ordering::Relaxed)
            .is_err()
        {
            return;
        }
        let (kind, code, value) = match error {
            CopyError::MemoryFault { addr, signal } => (ERR_FAULT, signal, addr),
            CopyError::ShortCopy { copied, .. } => (ERR_SHORT, 0, copied),
            CopyError::LongCopy { copied, .. } => (ERR_LONG, 0, copied),
            CopyError::Device { code } => (ERR_DEVICE, code, 0),
            CopyError::Abandoned => (ERR_ABANDONED, 0, 0),
        };
        self.code.store(code.cast_unsigned(), Ordering::Relaxed);
        self.value.store(value, Ordering::Relaxed);
        self.kind.store(kind, Ordering::Release);
    }

    fn noted(&self) -> Option<CopyError> {
        let kind = self.kind.load(Ordering::Acquire);
        let code = self.code.load(Ordering::Relaxed).cast_signed();
        let value = self.value.load(Ordering::Relaxed);
        let asked = self.len.load(Ordering::Relaxed);
        match kind {
            ERR_FAULT => Some(CopyError::MemoryFault { addr: value, signal: code }),
            ERR_SHORT => Some(CopyError::ShortCopy { asked, copied: value }),
            ERR_LONG => Some(CopyError::LongCopy { asked, copied: value }),
            ERR_DEVICE => Some(CopyError::Device { code }),
            ERR_ABANDONED => Some(CopyError::Abandoned),
            _ => None,
        }
    }
}
