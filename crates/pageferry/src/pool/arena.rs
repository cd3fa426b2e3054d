//! The address space of one pool: extents, and who may use which.

use crate::units::{FolioSize, HUGE};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::time::Instant;

/// 2 MiB of pool address space. Pages `lo..hi` are populated, unless `mixed`.
#[derive(Debug)]
pub(crate) struct Extent {
    pub(crate) addr: usize,
    pub(crate) node: u32,
    pub(crate) size: FolioSize,
    /// First page still populated (frames are used up from here).
    pub(crate) lo: usize,
    /// One past the last populated page (an empty extent is filled from here).
    pub(crate) hi: usize,
    /// Pages populated, gaps considered.
    pub(crate) populated: usize,
    /// There are gaps: it is emptied before it is used again.
    pub(crate) mixed: bool,
    /// Huge extents: it was split, or holds base pages, and must be mapped anew.
    pub(crate) split: bool,
    /// A device may still write to it: it is never used or freed again.
    pub(crate) lost: bool,
    /// With the userfaultfd, as it must be to take pages out to it. It is not while frames are
    /// freed: `madvise` in a registered range is an event that somebody must read first.
    pub(super) registered: bool,
    pub(super) rested: Instant,
}

impl Extent {
    pub(crate) fn page(&self, index: usize) -> usize {
        self.addr + index * pageferry_sys::page_size()
    }
    /// Pages not yet filled.
    pub(crate) fn room(&self) -> usize {
        pages_per_extent() - self.hi
    }
    /// Frames not yet used.
    pub(crate) fn frames(&self) -> usize {
        self.hi - self.lo
    }
}

pub(crate) fn pages_per_extent() -> usize {
    HUGE / pageferry_sys::page_size()
}

#[derive(Debug)]
pub(super) struct Arena {
    pub(super) node: u32,
    pub(super) size: FolioSize,
    pub(super) start: usize,
    pub(super) len: usize,
    pub(super) state: Mutex<ArenaState>,
}

#[derive(Debug)]
pub(super) struct ArenaState {
    pub(super) empty: Vec<Empty>,
    /// Populated extents, the longest rested first.
    pub(super) rested: VecDeque<Extent>,
}

/// An extent that holds nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Empty {
    pub(super) addr: usize,
    pub(super) registered: bool,
}

impl Arena {
    pub(super) fn new(node: u32, size: FolioSize, start: usize, extents: usize) -> Self {
        let addrs = (0..extents).rev().map(|i| start + i * HUGE);
        let empty = addrs.map(|addr| Empty { addr, registered: false }).collect();
        let state = Mutex::new(ArenaState { empty, rested: VecDeque::with_capacity(extents) });
        Self { node, size, start, len: extents * HUGE, state }
    }

    pub(super) fn is_of(&self, node: u32, size: FolioSize) -> bool {
        self.node == node && self.size == size
    }

    /// The extent of an empty place.
    pub(super) fn extent(&self, empty: Empty) -> Extent {
        Extent {
            addr: empty.addr,
            node: self.node,
            size: self.size,
            lo: 0,
            hi: 0,
            populated: 0,
            mixed: false,
            split: false,
            lost: false,
            registered: empty.registered,
            rested: Instant::now(),
        }
    }

    pub(super) fn metadata_bytes(&self) -> usize {
        let state = self.state.lock();
        state.empty.capacity() * size_of::<Empty>()
            + state.rested.capacity() * size_of::<Extent>()
            + size_of::<Self>()
    }
}

impl ArenaState {
    /// Takes an empty extent, one that is (not) registered if there is one.
    pub(super) fn take_empty(&mut self, registered: bool) -> Option<Empty> {
        let fits = self.empty.iter().rposition(|e| e.registered == registered);
        fits.map(|at| self.empty.swap_remove(at)).or_else(|| self.empty.pop())
    }
}
