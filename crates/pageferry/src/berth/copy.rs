//! Copying, and copying again what the first copy cannot vouch for.
//!
//! A live copy races with the program: pages written meanwhile are dirty and are copied again
//! from the originals once these are out and immutable. What a copy engine fails to copy takes the
//! same way, and what cannot be read at all keeps its original.

use super::{Berth, runs, set};
use crate::flight::{Bits, MAX_PAGES, bit};
use crate::report::Order;
use crate::tally::Tally;
use pageferry_copy::{CopyError, CopyOp, Kernel, OpResult};
use pageferry_sys::page_size;
use std::ops::Range;
use std::sync::Arc;

/// Batches of up to so many bytes are copied through the cache, whatever the kernel: whoever moves
/// a few pages is likely to use them soon, and past the cache a page takes twice as long.
const CACHED: usize = 32 << 10;

impl Berth<'_> {
    /// The copies of this batch, of at most `longest` bytes each: from the region while the pages
    /// are still there (live), else from the slots (frozen). False: they do not fit the batch.
    pub(crate) fn fill_batch(&mut self, longest: usize) -> bool {
        let batch = Arc::clone(self.batch());
        let longest = (longest / page_size()).clamp(1, MAX_PAGES);
        let live = self.order == Order::Live;
        let wanted = |page: usize| live || bit(&self.out, page) && !bit(&self.failed, page);
        let mut page = 0;
        let ops = std::iter::from_fn(|| {
            while page < self.pages && !wanted(page) {
                page += 1;
            }
            let from = page;
            while page < self.pages && page - from < longest && wanted(page) {
                page += 1;
            }
            let src = if live { self.addr(from) } else { self.slot(from) };
            let len = (page - from) * page_size();
            (len > 0).then(|| CopyOp { dst: self.frame(from), src, len })
        });
        batch.fill(ops).is_ok()
    }

    /// The CPU kernel for this batch.
    fn kernel(&self) -> Kernel {
        if self.bytes() <= CACHED { Kernel::MEMCPY } else { self.kernel }
    }

    /// Copies here and now.
    pub(crate) fn copy_inline(&mut self) {
        match self.order {
            Order::Live => {
                let (dst, src, len) = (self.frame(0), self.addr(0), self.bytes());
                // SAFETY: the frames are ours; the region may be written or unmapped meanwhile,
                // which the kernel tolerates and reports.
                if unsafe { self.kernel().copy(dst, src, len) }.is_err() {
                    set(&mut self.redo, 0..self.pages);
                }
            }
            Order::Frozen => {
                let (out, failed) = (self.out, self.failed);
                let mut redo = self.redo;
                runs(
                    0..self.pages,
                    |i| bit(&out, i) && !bit(&failed, i),
                    |r| {
                        let len = r.len() * page_size();
                        // SAFETY: frames and slots are ours.
                        let copied = unsafe {
                            self.kernel().copy(self.frame(r.start), self.slot(r.start), len)
                        };
                        if copied.is_err() {
                            set(&mut redo, r);
                        }
                    },
                );
                self.redo = redo;
            }
        }
    }

    /// Takes over the results of the batch; what failed is copied again from the slots. False: the
    /// engine broke its contract.
    pub(crate) fn collect_batch(&mut self, tally: &mut Tally) -> bool {
        let Some(batch) = self.batch.clone() else { return true };
        let mut honest = batch.violations() == 0;
        for i in 0..batch.len() {
            match batch.result(i) {
                Some(OpResult::Done) => continue,
                Some(OpResult::Failed(CopyError::LongCopy { .. })) => honest = false,
                _ => {}
            }
            let Some(op) = batch.op(i) else { continue };
            let first = (op.dst - self.frame(0)) / page_size();
            set(&mut self.redo, first..first + op.len / page_size());
            tally.fallbacks += 1;
        }
        honest
    }

    /// The engine was given the batch and never gave it back: its frames are lost to us, and
    /// every page goes back where it was.
    pub(crate) fn abandon(&mut self) {
        self.abandoned = true;
        set(&mut self.failed, 0..self.pages);
        // The engine may hold on to the batch for ever: it is not used again.
        std::mem::forget(self.batch.take());
        if let Some(frames) = &mut self.frames {
            frames.lost = true;
        }
        self.ctx.pools.note_lost();
    }

    /// Step 5: copies again what was written since it was protected, and what the engine failed
    /// to copy, from the originals in the slots. With `compare`, originals and copies of the piece
    /// are compared, because a device may have written through a pin taken before the protection.
    pub(crate) fn repair(&mut self, piece: Range<usize>, compare: bool, tally: &mut Tally) {
        let mut todo = self.redo;
        if self.order == Order::Live {
            let flight = self.flight.as_ref().expect("opened before repair");
            let dirty = self.ctx.flights.dirty(flight);
            for (t, d) in todo.iter_mut().zip(dirty) {
                *t |= d;
            }
        }
        let mut out = self.out;
        // What goes back as it is needs no copy.
        out.iter_mut().zip(self.failed).for_each(|(out, failed)| *out &= !failed);
        if self.abandoned || self.kernel_copy {
            return;
        }
        if compare {
            let clean = |i: usize| bit(&out, i) && !bit(&todo, i);
            let mut differing = [0; 8];
            runs(piece.clone(), clean, |run| self.differing(run, &mut differing));
            for (t, d) in todo.iter_mut().zip(differing) {
                *t |= d;
            }
        }
        let mut failed = self.failed;
        let mut repaired = 0;
        runs(
            piece,
            |i| bit(&out, i) && bit(&todo, i),
            |run| {
                repaired += run.len() as u64;
                let len = run.len() * page_size();
                // SAFETY: frames and slots are ours, and nobody writes to them.
                if unsafe { self.kernel().copy(self.frame(run.start), self.slot(run.start), len) }
                    .is_ok()
                {
                    return;
                }
                for page in run {
                    // SAFETY: as above.
                    let copied = unsafe {
                        self.kernel().copy(self.frame(page), self.slot(page), page_size())
                    };
                    if copied.is_err() {
                        set(&mut failed, page..page + 1);
                    }
                }
            },
        );
        tally.repairs += repaired;
        self.failed = failed;
    }

    fn differing(&self, run: Range<usize>, into: &mut Bits) {
        let mut page = run.start;
        while page < run.end {
            let len = (run.end - page) * page_size();
            // SAFETY: both ranges are ours for reading.
            match unsafe { pageferry_copy::differs(self.slot(page), self.frame(page), len) } {
                Ok(None) => return,
                Ok(Some(offset)) => page += offset / page_size(),
                // Some page cannot be read: copying them one by one finds out which.
                Err(_) => return set(into, page..run.end),
            }
            set(into, page..page + 1);
            page += 1;
        }
    }
}
