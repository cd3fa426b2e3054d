// SPDX-License-Identifier: GPL-2.0

//! The folios of a batch, side by side: what both copiers work through.
//!
//! What always holds: an item's folios are of the same size, locked and held by the migration until
//! `offload_copy` returns; `start` ascends, and an item ends where the next begins.

use core::sync::atomic::{AtomicBool, Ordering};
use kernel::alloc::flags::GFP_NOWAIT;
use kernel::bindings;
use kernel::prelude::*;

/// A folio to copy, as `struct pf_item`.
#[repr(C)]
pub(crate) struct Item {
    /// Where to.
    pub(crate) dst: *mut bindings::folio,
    /// Where from.
    pub(crate) src: *mut bindings::folio,
    /// Where its bytes begin, counted through the batch.
    pub(crate) start: usize,
    /// A part of it was not copied.
    pub(crate) failed: AtomicBool,
    /// Both folios are held for a device that is late.
    #[allow(dead_code, reason = "one of the modules has no device")]
    pub(crate) kept: AtomicBool,
}

// Structures of the kernel are passed by pointer alone.
#[allow(improper_ctypes, reason = "bindgen has empty structures within them")]
extern "C" {
    fn pf_items(
        dsts: *mut bindings::list_head,
        srcs: *mut bindings::list_head,
        out: *mut Item,
        most: usize,
        bytes: *mut usize,
    ) -> usize;
    fn pf_mark(dst: *mut bindings::folio);
}

/// A batch's folios.
pub(crate) struct Items {
    list: KVec<Item>,
    /// How many bytes they are.
    pub(crate) bytes: usize,
}

impl Items {
    /// The folios of two lists, of which there are `folios`.
    ///
    /// # Safety
    /// The lists are those that page migration gave to `offload_copy`, which has not returned.
    pub(crate) unsafe fn take(
        dsts: *mut bindings::list_head,
        srcs: *mut bindings::list_head,
        folios: usize,
    ) -> Result<Self> {
        let mut list = KVec::<Item>::with_capacity(folios, GFP_NOWAIT)?;
        let mut bytes = 0;
        // SAFETY: the vector has room for so many items, of which the call fills as many as it
        // says; it reads the lists as promised.
        unsafe {
            let count = pf_items(dsts, srcs, list.as_mut_ptr(), folios, &mut bytes);
            list.set_len(count);
        }
        Ok(Self { list, bytes })
    }

    /// All of them.
    pub(crate) fn all(&self) -> &[Item] {
        &self.list
    }

    /// Calls `visit` with each item that has a part in bytes `at .. end` (within the batch), and
    /// which bytes of it.
    pub(crate) fn each(&self, mut at: usize, end: usize, mut visit: impl FnMut(&Item, usize, usize)) {
        let after = self.list.partition_point(|item| item.start <= at);
        for index in after.saturating_sub(1)..self.list.len() {
            if at >= end {
                break;
            }
            let item = &self.list[index];
            let next = self.list.get(index + 1).map_or(self.bytes, |next| next.start);
            let stop = end.min(next);
            visit(item, at - item.start, stop - at);
            at = stop;
        }
    }

    /// Bytes `at .. end` were not copied.
    #[allow(dead_code, reason = "one of the modules has no other way to say so")]
    pub(crate) fn fail(&self, at: usize, end: usize) {
        self.each(at, end, |item, _, _| item.failed.store(true, Ordering::Relaxed));
    }

    /// Marks the destinations that have all of their content; how many have not.
    ///
    /// # Safety
    /// `offload_copy` has not returned, and nobody copies to them any more.
    pub(crate) unsafe fn mark(&self) -> usize {
        let mut failed = 0;
        for item in &self.list {
            if item.failed.load(Ordering::Relaxed) {
                failed += 1;
            } else {
                // SAFETY: as promised.
                unsafe { pf_mark(item.dst) };
            }
        }
        failed
    }
}
