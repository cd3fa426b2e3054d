//! The address space of one pool: extents, and who may use which.

use crate::sync::Mutex;
use crate::units::{FolioSize, HUGE, overlap};
use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

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
    /// The region whose old pages these are; `None`: no program has ever had them.
    pub(crate) owner: Option<u64>,
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
    /// Whether a region `but`, if that is told, can make no use of it.
    fn is_of_another(&self, but: Option<u64>) -> bool {
        but.is_none() || self.owner.is_some() && self.owner != but
    }
}

pub(crate) fn pages_per_extent() -> usize {
    HUGE / pageferry_sys::page_size()
}

#[derive(Debug)]
pub(super) struct Arena {
    pub(super) node: u32,
    pub(super) size: FolioSize,
    /// Extents at most.
    most: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Address space, in the order in which it came.
    spans: Vec<Range<usize>>,
    empty: Vec<Empty>,
    /// Populated extents, the longest rested first.
    rested: VecDeque<Extent>,
}

impl State {
    fn fit(&self, grace: Duration, owners: &[u64]) -> Option<usize> {
        let now = Instant::now();
        self.rested.iter().rposition(|extent| {
            now.saturating_duration_since(extent.rested) >= grace
                && extent.owner.is_none_or(|owner| owners.contains(&owner))
        })
    }
}

/// Extents of address space that an arena grows by: so that little is populated if the program
/// locks all its memory (`mlockall(2)`).
const STEP: usize = 16;

/// An extent that holds nothing.
#[derive(Clone, Copy, Debug)]
struct Empty {
    addr: usize,
    registered: bool,
}

impl Arena {
    /// An arena of up to `most` extents, without any to begin with.
    pub(super) fn new(node: u32, size: FolioSize, most: usize) -> Self {
        let state = State {
            spans: Vec::with_capacity(most.div_ceil(STEP)),
            empty: Vec::with_capacity(most),
            rested: VecDeque::with_capacity(most),
        };
        Self { node, size, most, state: Mutex::new(state) }
    }

    /// How many extents it may grow by now.
    pub(super) fn growth(&self) -> usize {
        let state = self.state.lock();
        let have: usize = state.spans.iter().map(|span| span.len() / HUGE).sum();
        STEP.min(self.most.saturating_sub(have))
    }

    /// Adds address space.
    pub(super) fn grow(&self, span: Range<usize>) {
        let mut state = self.state.lock();
        let addrs = span.clone().step_by(HUGE).rev();
        state.empty.extend(addrs.map(|addr| Empty { addr, registered: false }));
        state.spans.push(span);
    }

    /// All its address space.
    pub(super) fn spans(&self) -> Vec<Range<usize>> {
        self.state.lock().spans.clone()
    }

    /// Whether any of a range is its address space.
    pub(super) fn has(&self, range: &Range<usize>) -> bool {
        self.state.lock().spans.iter().any(|span| overlap(span, range))
    }

    /// Takes all extents that hold nothing.
    pub(super) fn take_all_empty(&self) -> Vec<Extent> {
        let room = Vec::with_capacity(self.most);
        let empty = std::mem::replace(&mut self.state.lock().empty, room);
        empty.into_iter().map(|empty| self.extent(empty)).collect()
    }

    pub(super) fn is_of(&self, node: u32, size: FolioSize) -> bool {
        self.node == node && self.size == size
    }

    /// Takes an empty extent, one that is (not) registered if there is one.
    pub(super) fn take_empty(&self, registered: bool) -> Option<Extent> {
        let empty = {
            let mut state = self.state.lock();
            let fits = state.empty.iter().rposition(|e| e.registered == registered);
            match fits {
                Some(at) => state.empty.swap_remove(at),
                None => state.empty.pop()?,
            }
        };
        Some(self.extent(empty))
    }

    /// Gives an extent back that holds nothing.
    pub(super) fn put_empty(&self, extent: Extent) {
        let empty = Empty { addr: extent.addr, registered: extent.registered };
        self.state.lock().empty.push(empty);
    }

    /// Takes an extent that has rested for as long as this and belongs to nobody or to one of
    /// `owners`: of those the one that rested shortest, which the caches know best.
    pub(super) fn take_rested(&self, grace: Duration, owners: &[u64]) -> Option<Extent> {
        let mut state = self.state.lock();
        let at = state.fit(grace, owners)?;
        state.rested.remove(at)
    }

    /// Since when the extent has rested that rested longest; of another region than `but`, if told.
    pub(super) fn oldest(&self, but: Option<u64>) -> Option<Instant> {
        let state = self.state.lock();
        state.rested.iter().find(|extent| extent.is_of_another(but)).map(|extent| extent.rested)
    }

    /// Takes the extent that [`Self::oldest`] told of.
    pub(super) fn take_oldest(&self, but: Option<u64>) -> Option<Extent> {
        let mut state = self.state.lock();
        let at = state.rested.iter().position(|extent| extent.is_of_another(but))?;
        state.rested.remove(at)
    }

    /// Whether [`Self::take_rested`] would give one now.
    pub(super) fn has_rested(&self, grace: Duration, owners: &[u64]) -> bool {
        self.state.lock().fit(grace, owners).is_some()
    }

    /// Frames rest from now on.
    pub(super) fn put_frames(&self, mut extent: Extent) {
        extent.rested = Instant::now();
        self.state.lock().rested.push_back(extent);
    }

    /// Pages at rest.
    pub(super) fn rested_pages(&self) -> usize {
        self.state.lock().rested.iter().map(|e| e.populated).sum()
    }

    fn extent(&self, empty: Empty) -> Extent {
        Extent {
            addr: empty.addr,
            node: self.node,
            size: self.size,
            lo: 0,
            hi: 0,
            populated: 0,
            mixed: false,
            split: false,
            owner: None,
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn old_pages_are_given_to_their_own_region_alone_and_fresh_ones_to_all() {
        let arena = Arena::new(0, FolioSize::Base, 4);
        arena.grow(HUGE..5 * HUGE);
        let rest = |owner| {
            let mut extent = arena.take_empty(false).expect("four");
            (extent.hi, extent.populated, extent.owner) = (1, 1, owner);
            arena.put_frames(extent);
        };
        rest(Some(1));
        rest(Some(2));
        let take = |owners: &[u64]| arena.take_rested(Duration::ZERO, owners).map(|e| e.owner);
        assert_eq!(take(&[]), None);
        assert_eq!(take(&[3]), None);
        assert!(!arena.has_rested(Duration::ZERO, &[3]) && arena.has_rested(Duration::ZERO, &[1]));
        assert_eq!(take(&[1]), Some(Some(1)));
        assert_eq!(take(&[1]), None);
        rest(None);
        assert_eq!(take(&[]), Some(None));
        assert_eq!(arena.take_oldest(None).map(|e| e.owner), Some(Some(2)));
    }

    #[test]
    fn of_others_is_what_a_region_can_make_no_use_of() {
        let arena = Arena::new(0, FolioSize::Base, 4);
        arena.grow(HUGE..5 * HUGE);
        for owner in [None, Some(1), Some(2), Some(3)] {
            let mut extent = arena.take_empty(false).expect("four");
            (extent.hi, extent.populated, extent.owner) = (1, 1, owner);
            arena.put_frames(extent);
        }
        let since = |owner| {
            let state = arena.state.lock();
            state.rested.iter().find(|e| e.owner == owner).map(|e| e.rested)
        };
        assert_eq!(arena.oldest(None), since(None));
        assert_eq!(arena.oldest(Some(1)), since(Some(2)));
        let take = |but| arena.take_oldest(but).map(|extent| extent.owner);
        assert_eq!(take(Some(1)), Some(Some(2)));
        assert_eq!(take(Some(1)), Some(Some(3)));
        assert_eq!(take(Some(1)), None);
        assert_eq!(take(None), Some(None));
    }

    #[test]
    fn what_rested_shortest_but_long_enough_is_taken_first() {
        let arena = Arena::new(0, FolioSize::Base, 4);
        arena.grow(HUGE..5 * HUGE);
        for _ in 0..3 {
            let mut extent = arena.take_empty(false).expect("four");
            (extent.hi, extent.populated) = (1, 1);
            arena.put_frames(extent);
        }
        let last = arena.state.lock().rested.back().map(|e| e.addr);
        assert_eq!(arena.take_rested(Duration::ZERO, &[]).map(|e| e.addr), last);
        assert!(arena.take_rested(Duration::from_secs(1000), &[]).is_none());
    }
}
