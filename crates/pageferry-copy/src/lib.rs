//! Copy engines for page migration: what moves the bytes of a batch of folios.
//!
//! A [`CopyBatch`] is a reusable list of copies with a result for each. A [`CopyEngine`] takes
//! batches; [`CpuEngine`] is the one that copies with CPUs, by a [`Kernel`] chosen by
//! [`calibrate`], on the threads of a [`WorkerPool`]. A DMA engine fits the same interface.
//!
//! The memory that is copied may be read and written by other threads meanwhile, may carry a
//! hardware error, and may vanish. So it is addressed by plain numbers, touched only by
//! assembly (see [`cpu::kernel`]), and a memory fault is the result of one operation.
//!
//! ```
//! use std::sync::Arc;
//! use pageferry_copy::{CopyBatch, CopyEngine, CopyOp, CpuEngine, Kernel, OpResult, WorkerPool};
//!
//! let engine = CpuEngine::new(Kernel::MEMCPY, Arc::new(WorkerPool::new()?));
//! let (from, mut to) = (vec![7_u8; 8192], vec![0_u8; 8192]);
//! let batch = CopyBatch::with_capacity(2);
//! batch.fill([0, 4096].map(|at| CopyOp {
//!     dst: to.as_mut_ptr().expose_provenance() + at,
//!     src: from.as_ptr().expose_provenance() + at,
//!     len: 4096,
//! }))?;
//! // SAFETY: nothing else uses the two vectors until the batch is done.
//! unsafe { engine.submit(&batch)? };
//! engine.wait(&batch);
//! assert!(batch.results().all(|result| result == OpResult::Done));
//! assert_eq!(from, to);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod batch;
pub mod cpu;
pub mod engine;
pub mod model;
pub mod share;
mod slot;
mod spin;
mod sync;
mod ticket;

pub use batch::{CopyBatch, CopyOp, FillError, OpResult};
pub use cpu::{
    CpuEngine,
    calibrate::{
        CacheFolder, CalibrateError, CalibrateOptions, Calibration, KernelRate, Source, calibrate,
    },
    kernel::{CopyFault, Kernel, KernelFamily, UnknownKernel, differs, recovers_from_faults},
    pool::{PoolError, WorkerPool},
};
pub use engine::{Capabilities, Completion, CopyEngine, CopyError, SubmitError};
pub use ticket::{EngineId, Ticket, Visit};
