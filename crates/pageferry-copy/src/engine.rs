//! What a copy engine is: the interface that CPU workers, DMA channels and the software devices
//! of the tests share, and the errors they speak.
//!
//! # What must always hold
//! - An engine touches the memory of a batch only while it holds a [`Ticket`](crate::Ticket) or
//!   [`Visit`](crate::Visit) of it. The batch is done when every operation has a result and the
//!   last of these is gone; from then on its memory belongs to the submitter alone.
//! - Every operation gets exactly one result. An engine that panics, forgets an operation or
//!   reports a wrong length yields a failed operation, never a missing one.
//! - An engine's own threads block the program's signals (`pageferry_sys::thread::spawn`): a handler that
//!   touches a page whose copy is under way would wait for the thread that it interrupted. And while it
//!   has a batch it does not wait for the allocator, whose lock such a handler's thread may hold
//!   ([`Kernel::prepare_thread`](crate::cpu::kernel::Kernel::prepare_thread)).
//!
//! # How a DMA driver fits
//! `submit` takes a ticket, writes descriptors into a ring and keeps the ticket beside them;
//! `poll` reads the completion records that have arrived and calls
//! [`Ticket::complete`](crate::Ticket::complete) or, where one operation needed several
//! descriptors, [`Ticket::complete_part`](crate::Ticket::complete_part), in whatever order they
//! came; the ticket is dropped with the last descriptor. [`Completion::Polled`] makes
//! [`CopyEngine::wait`] call `poll` instead of sleeping for good. A descriptor that the device
//! could not finish (a page fault, say) fails with [`CopyError::Device`] or
//! [`CopyError::MemoryFault`], and the caller copies that operation on the CPU.

use std::{fmt::Debug, sync::Arc, time::Duration};

use crate::{batch::CopyBatch, spin::Spinner};

/// Why one operation failed. The destination's content is then undefined within the
/// operation's range; the source is never changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The memory could not be read or written: unmapped, without permission, beyond the end of
    /// a file (`SIGBUS`), or with a hardware memory error (`SIGBUS`).
    #[error("memory fault at {addr:#x} (signal {signal}) while copying")]
    MemoryFault {
        /// The faulting address as the kernel gave it (`si_addr`); 0 if it gave none.
        addr: usize,
        /// `SIGSEGV` or `SIGBUS`; 0 if a device reported the fault.
        signal: i32,
    },
    /// The engine reported fewer bytes than it was asked to copy.
    #[error("the engine copied {copied} of {asked} bytes")]
    ShortCopy {
        /// Bytes asked for.
        asked: usize,
        /// Bytes reported.
        copied: usize,
    },
    /// The engine reported more bytes than it was asked to copy: memory past the destination
    /// may have been overwritten, so the engine must not be used again.
    #[error("the engine claims to have copied {copied} bytes of {asked}; do not use it again")]
    LongCopy {
        /// Bytes asked for.
        asked: usize,
        /// Bytes reported.
        copied: usize,
    },
    /// A device reported a failure.
    #[error("the copy device failed with status {code:#x}; copy this range on the CPU")]
    Device {
        /// The device's own status code.
        code: i32,
    },
    /// The engine let go of the batch without a result for this operation (it panicked, or was
    /// shut down).
    #[error("the engine gave up the batch without copying this range; copy it again")]
    Abandoned,
}

/// Why a batch was not taken. Nothing was copied, and the batch is as it was before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// The batch has not been filled since it was last submitted, or is being copied.
    #[error("the batch is not ready: fill it after its last copy is done, then submit it once")]
    NotReady,
    /// As many batches as the engine can hold are waiting.
    #[error("the engine's queue of {depth} batches is full; wait for one of them")]
    QueueFull {
        /// Batches that the engine holds at most.
        depth: usize,
    },
    /// An operation is longer than the engine can copy at once.
    #[error("operation {index} has {len} bytes, the engine copies at most {max} at once; split it")]
    TooLong {
        /// Index of the operation.
        index: usize,
        /// Its length in bytes.
        len: usize,
        /// The engine's limit in bytes.
        max: usize,
    },
    /// An address or length is not aligned as the engine requires.
    #[error("operation {index} is not aligned to {align} bytes, as this engine requires")]
    Misaligned {
        /// Index of the operation.
        index: usize,
        /// Alignment required, in bytes.
        align: usize,
    },
    /// The engine is broken or shut down.
    #[error("the engine {name} is out of service: {reason}; use another engine")]
    OutOfService {
        /// The engine's name.
        name: String,
        /// What happened to it.
        reason: String,
    },
}

/// How an engine's results arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Completion {
    /// By themselves: a thread or an interrupt reports them, and wakes who waits.
    Notified,
    /// Only when somebody calls [`CopyEngine::poll`].
    Polled {
        /// How long to sleep between two polls once spinning has not helped.
        interval: Duration,
    },
}

/// What an engine can do. Sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Longest operation.
    pub max_op_len: usize,
    /// Alignment that addresses and lengths must have; 1 for any.
    pub alignment: usize,
    /// Batches that may be queued at once.
    pub queue_depth: usize,
    /// Copies that proceed at once, at most: threads or channels (the helping caller counted).
    pub max_parallel: usize,
    /// Whether CPUs move the bytes.
    pub is_cpu: bool,
    /// Whether a thread in [`CopyEngine::wait`] does part of the work itself.
    pub uses_caller_cpu: bool,
    /// How results arrive.
    pub completion: Completion,
}

/// Something that copies batches of memory. See the [module](self) for what must hold.
pub trait CopyEngine: Send + Sync + Debug {
    /// A short name for reports, such as `cpu:avx2-nt+prefetch`.
    fn name(&self) -> &str;

    /// What it can do. Does not change while the engine lives.
    fn capabilities(&self) -> Capabilities;

    /// Takes a filled batch and returns without waiting for it. Progress is certain only while
    /// somebody is in [`CopyEngine::wait`], or calls [`CopyEngine::help`] or
    /// [`CopyEngine::poll`] until the batch is done.
    ///
    /// # Errors
    /// [`SubmitError`]; the batch is then unchanged and still filled.
    ///
    /// # Safety
    /// From this call until the batch [is done](CopyBatch::is_done), for every operation:
    /// - `dst .. dst + len` belongs to the submitter, holds no Rust object that anything may
    ///   look at, and nobody else reads or writes it;
    /// - no destination overlaps another operation's destination or any source of the batch;
    /// - `src .. src + len` is not unmapped and then mapped to something secret or unrelated.
    ///   Other threads may write it meanwhile: what is copied is then some mixture of old and
    ///   new bytes.
    ///
    /// A range that is not mapped, not permitted or beyond its file's end is not a breach of
    /// this contract where [`crate::recovers_from_faults`]: it fails that operation.
    unsafe fn submit(&self, batch: &Arc<CopyBatch>) -> Result<(), SubmitError>;

    /// Collects results that have arrived, without waiting. Engines that notify have nothing
    /// to do here.
    fn poll(&self) {}

    /// Lends the calling thread: copies one piece of this batch here and now. False if there
    /// was nothing left to take, or the engine has no use for a CPU.
    fn help(&self, _batch: &CopyBatch) -> bool {
        false
    }

    /// Returns when the batch is done: helps while it can, spins briefly, then sleeps. Returns
    /// at once if the batch was not submitted.
    fn wait(&self, batch: &CopyBatch) {
        while self.help(batch) {}
        let mut spinner = Spinner::new();
        loop {
            self.poll();
            if !batch.is_submitted() {
                return;
            }
            if spinner.spin() {
                continue;
            }
            match self.capabilities().completion {
                Completion::Notified => return batch.wait(),
                Completion::Polled { interval } => {
                    batch.wait_timeout(interval);
                }
            }
        }
    }

    /// Stops a batch: operations not begun become [`Cancelled`](crate::OpResult::Cancelled),
    /// begun ones finish. Returns when the engine touches the batch's memory no more. Does
    /// nothing to a batch that is done or was submitted to another engine.
    fn cancel(&self, batch: &CopyBatch);
}
