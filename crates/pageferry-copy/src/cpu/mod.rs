//! The engine that copies with CPUs: a kernel, a pool of workers, and a queue of batches.
//!
//! # How work is shared out
//! The bytes of a batch are one line, operation after operation, cut into chunks. A worker
//! claims the next chunk with one atomic addition, finds the operations in it, copies them, and
//! reports them together. So many small folios are spread, a few large ones are split, and
//! nothing is locked per folio. Neighbouring operations that are contiguous on both sides are
//! copied as one. It pays to order operations by source address: the hardware prefetcher then
//! runs on from page to page (15-17 GB/s against 8-10 in any other order, one Zen 4 thread).
//!
//! # What must always hold
//! - Every byte of a batch is claimed by exactly one thread: the cursor only grows.
//! - Results are given after a store fence, so whoever sees them sees the bytes.
//! - Batches are served in the order of their submission. The queue holds a ticket of each
//!   batch until its last chunk is claimed; each copying thread holds a visit.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, PoisonError, atomic::AtomicU64},
    time::Duration,
};

use pageferry_sys::sched::thread_cpu_ns;

use crate::{
    batch::CopyBatch,
    engine::{Capabilities, Completion, CopyEngine, SubmitError},
    share,
    slot::Slot,
    sync::{Mutex, MutexGuard, Ordering},
    ticket::{EngineId, Ticket, Visit},
};

mod cache;
pub mod calibrate;
#[cfg(target_arch = "x86_64")]
mod guard;
pub mod kernel;
pub mod pool;
#[cfg(target_arch = "x86_64")]
mod records;
mod rest;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use kernel::{Kernel, fence};
use pool::{Service, WorkerPool};

/// Batches that wait in the queue at most. A conductor keeps two or three in flight.
const QUEUE_DEPTH: usize = 64;
/// Bytes of the smallest page that any architecture has: what claims are multiples of.
const SMALLEST_PAGE: usize = 4096;
/// Largest chunk in bytes. Measured on two Zen 4 cores with 2 MiB batches, chunks of 64 to
/// 512 KiB are alike within the noise and 16 KiB costs a tenth to a quarter; with larger chunks
/// one copier waits longer for the other's last.
pub const CHUNK: usize = 128 << 10;
/// Batches smaller than this, in bytes, do not wake workers. Measured on two busy Zen 4 cores:
/// with a second copier 128 and 256 KiB took up to 1.8 times as long as alone, 512 KiB broke even.
const WORTH_WAKING: usize = 512 << 10;

/// Copies with CPUs. See the [module](self).
pub struct CpuEngine {
    pool: Arc<WorkerPool>,
    queue: Arc<Queue>,
    name: String,
    helpers: usize,
}

/// What the pool's threads serve.
struct Queue {
    id: EngineId,
    kernel: Kernel,
    /// Largest chunk in bytes.
    chunk: usize,
    /// Threads that copy at once.
    copiers: usize,
    waiting: Mutex<VecDeque<Ticket>>,
    /// CPU time of the pool's threads, in ns.
    worker_ns: AtomicU64,
}

impl CpuEngine {
    /// An engine that copies with `kernel`, on the threads that wait for it and on all threads
    /// of `pool`.
    pub fn new(kernel: Kernel, pool: Arc<WorkerPool>) -> Self {
        let helpers = pool.helpers();
        Self::with_limits(kernel, pool, helpers, CHUNK)
    }

    /// An engine that uses at most `helpers` threads of the pool, and claims at most `chunk`
    /// bytes at once (rounded up to 4 KiB; the default is 128 KiB).
    pub fn with_limits(
        kernel: Kernel,
        pool: Arc<WorkerPool>,
        helpers: usize,
        chunk: usize,
    ) -> Self {
        let helpers = helpers.min(pool.helpers());
        kernel::recovers_from_faults();
        Self {
            queue: Arc::new(Queue {
                id: EngineId::new(),
                kernel,
                chunk: chunk.clamp(4096, 1 << 30).next_multiple_of(4096),
                copiers: helpers + 1,
                waiting: Mutex::new(VecDeque::with_capacity(QUEUE_DEPTH)),
                worker_ns: AtomicU64::new(0),
            }),
            name: format!("cpu:{kernel}"),
            pool,
            helpers,
        }
    }

    /// The kernel it copies with.
    pub fn kernel(&self) -> Kernel {
        self.queue.kernel
    }

    /// CPU time that the pool's threads have spent on this engine's batches so far. What callers
    /// copied while they waited is not in it.
    pub fn worker_cpu_time(&self) -> Duration {
        // Relaxed: a figure for accounts.
        Duration::from_nanos(self.queue.worker_ns.load(Ordering::Relaxed))
    }

    /// The threads it copies with.
    pub fn pool(&self) -> &Arc<WorkerPool> {
        &self.pool
    }
}

impl fmt::Debug for CpuEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuEngine")
            .field("kernel", &self.queue.kernel)
            .field("helpers", &self.helpers)
            .field("chunk", &self.queue.chunk)
            .finish_non_exhaustive()
    }
}

impl CopyEngine for CpuEngine {
    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            max_op_len: usize::MAX / 2,
            alignment: 1,
            queue_depth: QUEUE_DEPTH,
            max_parallel: self.helpers + 1,
            is_cpu: true,
            uses_caller_cpu: true,
            completion: Completion::Notified,
        }
    }

    unsafe fn submit(&self, batch: &Arc<CopyBatch>) -> Result<(), SubmitError> {
        let mut waiting = self.queue.lock();
        if waiting.len() == QUEUE_DEPTH {
            return Err(SubmitError::QueueFull { depth: QUEUE_DEPTH });
        }
        let ticket = batch.begin(&self.queue.id)?;
        let bytes = batch.bytes();
        if bytes == 0 {
            return Ok(());
        }
        waiting.push_back(ticket);
        drop(waiting);
        if bytes >= WORTH_WAKING {
            let chunks = bytes.div_ceil(self.queue.chunk_for(bytes));
            let service: Arc<dyn Service> = Arc::clone(&self.queue) as _;
            self.pool.request(&service, self.helpers.min(chunks));
        }
        Ok(())
    }

    fn help(&self, batch: &CopyBatch) -> bool {
        let visit = batch.visit(&self.queue.id);
        visit.is_some_and(|visit| self.queue.chunk(&visit))
    }

    fn cancel(&self, batch: &CopyBatch) {
        let Some(visit) = batch.visit(&self.queue.id) else {
            return;
        };
        let bytes = batch.bytes();
        // What nobody has claimed is ours now.
        let at = batch.cursor.swap(bytes, Ordering::Relaxed);
        if at < bytes {
            self.queue.retire(batch);
            let slots = batch.live();
            let mut first = slots.partition_point(|slot| slot.start() < at);
            if slots.get(first).is_none_or(|slot| slot.start() > at) {
                // The operation before has begun: finish it.
                let end = slots.get(first).map_or(bytes, Slot::start);
                self.queue.copy(&visit, at, end);
            }
            while first < slots.len() {
                visit.cancel(first);
                first += 1;
            }
        }
        drop(visit);
        batch.wait();
    }
}

impl Drop for CpuEngine {
    fn drop(&mut self) {
        if self.pool.in_forked_child() {
            // Another thread of the parent may have held the lock: touch nothing.
            std::mem::forget(Arc::clone(&self.queue));
            return;
        }
        // Batches nobody has taken fail as abandoned; begun ones end with their last visitor.
        let left = std::mem::take(&mut *self.queue.lock());
        drop(left);
    }
}

impl Service for Queue {
    fn turn(&self) -> bool {
        let Some(batch) = self.lock().front().map(|ticket| Arc::clone(ticket.batch())) else {
            return false;
        };
        if let Some(visit) = batch.visit(&self.id) {
            let before = thread_cpu_ns();
            while self.chunk(&visit) {}
            let spent = thread_cpu_ns().saturating_sub(before);
            self.worker_ns.fetch_add(spent, Ordering::Relaxed);
        }
        true
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Ticket>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a batch off the queue: all of it is claimed.
    fn retire(&self, batch: &CopyBatch) {
        let mut waiting = self.lock();
        let at = (waiting.iter()).position(|ticket| std::ptr::eq(&**ticket.batch(), batch));
        let ticket = at.and_then(|at| waiting.remove(at));
        drop(waiting);
        drop(ticket);
    }

    /// Bytes that one claim takes of a batch of `bytes`.
    fn chunk_for(&self, bytes: usize) -> usize {
        share::chunk(bytes, self.copiers, self.chunk, SMALLEST_PAGE)
    }

    /// Claims and copies one chunk; false if all are claimed.
    fn chunk(&self, visit: &Visit<'_>) -> bool {
        let batch = visit.batch();
        let bytes = batch.bytes();
        let chunk = self.chunk_for(bytes);
        // Relaxed: the batch's content came with the visit; the cursor only shares it out.
        if batch.cursor.load(Ordering::Relaxed) >= bytes {
            return false;
        }
        let at = batch.cursor.fetch_add(chunk, Ordering::Relaxed);
        if at >= bytes {
            return false;
        }
        let end = bytes.min(at + chunk);
        if end == bytes {
            self.retire(batch);
        }
        self.copy(visit, at, end);
        true
    }

    /// Copies bytes `at .. end` of the batch and reports them.
    fn copy(&self, visit: &Visit<'_>, mut at: usize, end: usize) {
        let slots = visit.batch().live();
        let mut index = slots.partition_point(|slot| slot.start() <= at) - 1;
        let mut reported = (index, at);
        while at < end {
            let run = Run::at(slots, index, at, end);
            // SAFETY: the batch is submitted to this engine, so the promises of `submit` hold
            // for its operations, and this range of it is claimed by us alone.
            let copied =
                unsafe { (self.kernel).copy_unfenced(run.dst, run.src, run.len, run.next_src) };
            let end_of_run = at + run.len;
            if copied.is_err() {
                report(visit, reported, at);
                self.copy_each(visit, index, at, end_of_run);
                reported = (run.next_index, end_of_run);
            }
            (index, at) = (run.next_index, end_of_run);
        }
        report(visit, reported, end);
    }

    /// Copies a run in which something faulted once more, operation by operation, so that only
    /// those that fault fail.
    fn copy_each(&self, visit: &Visit<'_>, mut index: usize, mut at: usize, end: usize) {
        let slots = visit.batch().live();
        while at < end {
            let piece = Piece::at(&slots[index], at, end);
            // SAFETY: as in `copy`.
            let result = unsafe { self.kernel.copy(piece.dst, piece.src, piece.len) };
            match result {
                Err(error) => visit.complete_part(index, piece.len, Err(error.into())),
                Ok(()) => visit.complete_part(index, piece.len, Ok(())),
            }
            at += piece.len;
            index += 1;
        }
    }
}

/// Reports bytes `from.1 .. end` of a batch as copied; `from.0` is their first operation.
fn report(visit: &Visit<'_>, (mut index, mut at): (usize, usize), end: usize) {
    let slots = visit.batch().live();
    fence();
    while at < end {
        let piece = Piece::at(&slots[index], at, end);
        if piece.whole {
            visit.complete(index, Ok(piece.len));
        } else {
            visit.complete_part(index, piece.len, Ok(()));
        }
        at += piece.len;
        index += 1;
    }
}

/// The part of one operation that lies in a claimed range.
struct Piece {
    dst: usize,
    src: usize,
    len: usize,
    /// Whether it is all of the operation.
    whole: bool,
}

impl Piece {
    fn at(slot: &Slot, at: usize, end: usize) -> Self {
        let op = slot.op();
        let skip = at - slot.start();
        let len = (op.len - skip).min(end - at);
        Self { dst: op.dst + skip, src: op.src + skip, len, whole: len == op.len }
    }
}

/// Pieces that follow each other in memory, copied as one.
struct Run {
    dst: usize,
    src: usize,
    len: usize,
    /// The operation after the run.
    next_index: usize,
    /// Where the copy after this one will read.
    next_src: usize,
}

impl Run {
    fn at(slots: &[Slot], index: usize, at: usize, end: usize) -> Self {
        let first = Piece::at(&slots[index], at, end);
        let mut run = Self {
            dst: first.dst,
            src: first.src,
            len: first.len,
            next_index: index + 1,
            next_src: first.src,
        };
        while at + run.len < end {
            let next = Piece::at(&slots[run.next_index], at + run.len, end);
            if next.dst != run.dst + run.len || next.src != run.src + run.len {
                run.next_src = next.src;
                break;
            }
            run.len += next.len;
            run.next_index += 1;
        }
        run
    }
}
