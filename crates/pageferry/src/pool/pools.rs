//! The pools of an engine: who gets frames, and where they come from and go to.

use super::allowance::Allowance;
use super::arena::{Arena, Extent, pages_per_extent};
use super::budget::Budget;
use crate::flight::MAX_PAGES;
use crate::report::Shortage;
use crate::sync::Mutex;
use crate::units::{FolioSize, HUGE};
use pageferry_sys::mm::Advice;
use pageferry_sys::pagemap::{Categories, Pagemap, Run};
use pageferry_sys::uffd::{Modes, Uffd};
use pageferry_sys::{Errno, Sys, fork};
use serde::Serialize;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Tries of a call that may fail for a passing reason.
const TRIES: u32 = 8;
/// Extents in flight at most, beyond those of the budget.
const IN_FLIGHT: usize = 128;

/// The state of one pool, for [`crate::Stats`].
#[derive(Clone, Debug, Serialize)]
pub struct PoolStats {
    /// Node of the frames.
    pub node: u32,
    /// Their size.
    pub folio: FolioSize,
    /// Bytes of frames at rest.
    pub populated_bytes: usize,
}

#[derive(Debug)]
pub(crate) struct PoolConfig {
    pub(crate) budget: usize,
    pub(crate) grace: Duration,
    /// Nodes with memory; with only one, frames cannot be misplaced.
    pub(crate) nodes: Vec<u32>,
}

/// All pools of an engine.
#[derive(Debug)]
pub(crate) struct Pools {
    sys: Arc<dyn Sys>,
    uffd: Arc<Uffd>,
    pagemap: Pagemap,
    config: PoolConfig,
    arenas: Mutex<Vec<Arc<Arena>>>,
    budget: Budget,
    home: u64,
    /// A device may still write to a frame: the arenas are never unmapped.
    lost: AtomicBool,
    /// Empty extents may hold pages.
    populated: AtomicBool,
    allowance: Allowance,
    /// The pool that last had no frame at rest when one was wanted; the refill thread fills it.
    pub(crate) demand: Mutex<Option<(u32, FolioSize)>>,
}

/// Where frames come from, and what becomes of old pages.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'a> {
    /// Old pages of these regions, which nobody else holds a reference to, and fresh memory; old
    /// pages become frames.
    Recycled(&'a [u64]),
    /// Fresh memory alone; old pages are freed.
    Fresh,
}

impl<'a> Source<'a> {
    fn owners(self) -> &'a [u64] {
        match self {
            Self::Recycled(owners) => owners,
            Self::Fresh => &[],
        }
    }
    fn recycles(self) -> bool {
        matches!(self, Self::Recycled(_))
    }
}

impl Pools {
    pub(crate) fn new(
        sys: Arc<dyn Sys>,
        uffd: Arc<Uffd>,
        config: PoolConfig,
    ) -> Result<Self, Errno> {
        let nodes = config.nodes.len();
        Ok(Self {
            sys,
            uffd,
            pagemap: Pagemap::open()?,
            budget: Budget::new(config.budget),
            config,
            arenas: Mutex::new(Vec::with_capacity(2 * nodes)),
            home: fork::generation(),
            lost: AtomicBool::new(false),
            populated: AtomicBool::new(false),
            allowance: Allowance::new(),
            demand: Mutex::new(None),
        })
    }

    pub(crate) fn budget(&self) -> usize {
        self.budget.limit()
    }

    pub(crate) fn extra_bytes(&self) -> usize {
        self.budget.held()
    }

    /// Bytes of bookkeeping, without the frames.
    pub(crate) fn metadata_bytes(&self) -> usize {
        let arenas = self.arenas.lock();
        arenas.iter().map(|arena| arena.metadata_bytes()).sum()
    }

    pub(crate) fn stats(&self) -> Vec<PoolStats> {
        self.each()
            .map(|a| PoolStats {
                node: a.node,
                folio: a.size,
                populated_bytes: a.rested_pages() * pageferry_sys::page_size(),
            })
            .collect()
    }

    /// One arena after the other; the lock is free in between, so that whoever allocates meanwhile
    /// keeps nobody with a hole open waiting.
    fn each(&self) -> impl Iterator<Item = Arc<Arena>> {
        (0..).map_while(|i| self.arenas.lock().get(i).cloned())
    }

    fn find(&self, node: u32, size: FolioSize) -> Option<Arc<Arena>> {
        self.arenas.lock().iter().find(|a| a.is_of(node, size)).cloned()
    }

    fn arena(&self, node: u32, size: FolioSize) -> Result<Arc<Arena>, Shortage> {
        if let Some(arena) = self.find(node, size) {
            return Ok(arena);
        }
        let most = self.config.budget / HUGE * 2 + IN_FLIGHT;
        let arena = Arc::new(Arena::new(node, size, most));
        self.grow(&arena)?;
        let mut arenas = self.arenas.lock();
        let other = arenas.iter().find(|a| a.is_of(node, size)).cloned();
        let Some(other) = other else {
            arenas.push(Arc::clone(&arena));
            return Ok(arena);
        };
        // Somebody else was faster.
        drop(arenas);
        for span in arena.spans() {
            // SAFETY: mapped above and known to nobody else.
            let _ = unsafe { self.sys.unmap(span.start, span.len()) };
        }
        Ok(other)
    }

    /// Whether there are pools to reserve from without the allocator.
    pub(crate) fn are_there(&self, nodes: [u32; 2], size: FolioSize) -> bool {
        nodes.iter().all(|node| self.find(*node, size).is_some())
    }

    /// Maps more address space for an arena; false if it has all that it may have.
    fn grow(&self, arena: &Arena) -> Result<bool, Shortage> {
        let len = arena.growth() * HUGE;
        if len == 0 {
            return Ok(false);
        }
        let start = self.sys.map(len, HUGE).map_err(|_| Shortage::Memory)?;
        if self.prepare(start, len, arena.node, arena.size).is_err() {
            // SAFETY: mapped above and known to nobody else.
            let _ = unsafe { self.sys.unmap(start, len) };
            return Err(Shortage::Memory);
        }
        arena.grow(start..start + len);
        Ok(true)
    }

    /// Whether any of a range is pool address space.
    pub(crate) fn own(&self, range: &Range<usize>) -> bool {
        let arenas = self.arenas.lock();
        arenas.iter().any(|arena| arena.has(range))
    }

    /// Something was found where nothing should be: the program has locked all its memory, which
    /// populates it ([`Pools::renew`]).
    pub(crate) fn note_populated(&self) {
        self.populated.store(true, Ordering::Relaxed);
    }

    /// After [`Pools::note_populated`]: maps all empty address space anew, so that what was
    /// populated there is freed, and none of it is locked.
    pub(crate) fn renew(&self) {
        if !self.populated.swap(false, Ordering::Relaxed) {
            return;
        }
        for extent in self.each().flat_map(|arena| arena.take_all_empty()) {
            self.free(Extent { split: true, ..extent });
        }
    }

    /// Advice and policy of new pool address space.
    fn prepare(&self, start: usize, len: usize, node: u32, size: FolioSize) -> Result<(), Errno> {
        let folios = match size {
            FolioSize::Base => Advice::NoHugePage,
            FolioSize::Huge => Advice::HugePage,
        };
        // SAFETY: the range belongs to this pool and holds nothing; none of the advice drops it.
        unsafe {
            self.sys.advise(start, len, folios).or_else(|e| match e {
                Errno(libc::EINVAL) => Ok(()), // a kernel without huge pages, which needs none
                e => Err(e),
            })?;
            self.sys.advise(start, len, Advice::DontFork)?;
            let _ = self.sys.advise(start, len, Advice::DontDump);
        }
        // Without names the kernel's way, asked from outside, takes frames to other nodes.
        let _ = pageferry_sys::mm::name(start, len, c"pageferry pool");
        if self.config.nodes.len() > 1 {
            self.sys.prefer_node(start, len, node)?;
        }
        Ok(())
    }

    /// An extent to take pages of `node` out to.
    pub(crate) fn take_empty(&self, node: u32, size: FolioSize) -> Result<Extent, Shortage> {
        let arena = self.arena(node, size)?;
        let mut extent = self.take_slot(&arena, true)?;
        let mut tries = 0;
        while !extent.registered {
            match self.sys.register(&self.uffd, extent.addr, HUGE, Modes::WP) {
                Ok(()) => extent.registered = true,
                Err(_) if tries < TRIES => {
                    crate::berth::back_off(tries);
                    tries += 1;
                }
                Err(_) => {
                    self.shelve(extent);
                    return Err(Shortage::Memory);
                }
            }
        }
        Ok(extent)
    }

    fn take_slot(&self, arena: &Arena, registered: bool) -> Result<Extent, Shortage> {
        loop {
            if let Some(extent) = arena.take_empty(registered) {
                return Ok(extent);
            }
            if !self.grow(arena)? {
                break;
            }
        }
        // All address space holds frames: empty the one that rested longest.
        let mut extent = arena.take_oldest(None).ok_or(Shortage::Budget)?;
        self.empty(&mut extent).map_err(|_| Shortage::Memory)?;
        Ok(extent)
    }

    /// An extent with at least one frame on `node`; fresh ones are made for up to `want` pages.
    /// `None`: only by waiting, for the kernel to find memory or for a frame's grace period.
    pub(crate) fn take_frames(
        &self,
        node: u32,
        size: FolioSize,
        want: usize,
        source: Source<'_>,
        may_wait: bool,
    ) -> Result<Option<Extent>, Shortage> {
        let (arena, owners) = (self.arena(node, size)?, source.owners());
        if let Some(extent) = arena.take_rested(self.config.grace, owners) {
            return Ok(Some(extent));
        }
        if source.recycles() {
            *self.demand.lock() = Some((node, size));
        }
        if !may_wait {
            return Ok(None);
        }
        let shortage = match self.fresh(node, size, want) {
            Ok(extent) => return Ok(Some(extent)),
            Err(shortage) => shortage,
        };
        // Rather wait out the grace period of a frame at rest than fail.
        let extent = arena.take_rested(Duration::ZERO, owners).ok_or(shortage)?;
        std::thread::sleep(self.config.grace.saturating_sub(extent.rested.elapsed()));
        Ok(Some(extent))
    }

    fn fresh(&self, node: u32, size: FolioSize, want: usize) -> Result<Extent, Shortage> {
        let pages = match size {
            FolioSize::Base => want.clamp(1, pages_per_extent()),
            FolioSize::Huge => pages_per_extent(),
        };
        let bytes = pages * pageferry_sys::page_size();
        self.claim(bytes)?;
        let result = self.populate(node, size, pages);
        let kept = result.as_ref().map_or(0, |e| e.populated * pageferry_sys::page_size());
        self.budget.give_back(bytes - kept);
        result
    }

    /// Claims part of the budget; frees frames at rest in any pool if that helps.
    fn claim(&self, bytes: usize) -> Result<(), Shortage> {
        // A cgroup that is full would be served by its OOM killer, not by an error.
        if !self.allowed(bytes as u64, true) {
            return Err(Shortage::Memory);
        }
        let claimed = self.budget.claim(bytes, || self.free_one_rested(None));
        claimed.then_some(()).ok_or(Shortage::Budget)
    }

    /// Whether a frame of this kind is at rest and may be used.
    pub(crate) fn has_rested(&self, node: u32, size: FolioSize, source: Source<'_>) -> bool {
        let ready = |arena: Arc<Arena>| arena.has_rested(self.config.grace, source.owners());
        self.arena(node, size).is_ok_and(ready)
    }

    pub(crate) fn has_one_node(&self) -> bool {
        self.config.nodes.len() < 2
    }

    /// [`Allowance::take`].
    pub(crate) fn allowed(&self, bytes: u64, may_wait: bool) -> bool {
        self.allowance.take(bytes, may_wait)
    }

    /// Pages came in without a frame going out.
    pub(crate) fn gained(&self, pages: usize) {
        self.budget.add(pages * pageferry_sys::page_size());
    }

    /// A frame was lost to a device: see [`Extent::lost`].
    pub(crate) fn note_lost(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// Frees the frames that rested longest in any pool; of those only that the region `but` can
    /// make no use of, if one is told.
    fn free_one_rested(&self, but: Option<u64>) -> bool {
        loop {
            let since = self.each().filter_map(|arena| Some((arena.oldest(but)?, arena)));
            let Some((_, arena)) = since.min_by_key(|(since, _)| *since) else { return false };
            // Else somebody took it meanwhile.
            if let Some(extent) = arena.take_oldest(but) {
                self.free(extent);
                return true;
            }
        }
    }

    /// Whether frames of a region may be kept within the budget; those that rested longest of the
    /// regions that do not move make room for them. Else these would have to be freed, and the region
    /// would have to do without for as long as others have what they do not use.
    fn has_room_for(&self, owner: Option<u64>) -> bool {
        while self.extra_bytes() > self.budget.limit() {
            if owner.is_none() || !self.free_one_rested(owner) {
                return false;
            }
        }
        true
    }

    fn populate(&self, node: u32, size: FolioSize, pages: usize) -> Result<Extent, Shortage> {
        let arena = self.arena(node, size)?;
        let mut extent = self.take_slot(&arena, false)?;
        let len = pages * pageferry_sys::page_size();
        // SAFETY: the extent is ours and empty; populating gives it zero pages.
        let populated = unsafe { self.sys.advise(extent.addr, len, Advice::PopulateWrite) };
        extent.hi = pages;
        extent.populated = pages;
        let good = match populated {
            Err(_) => Err(Shortage::Memory),
            Ok(()) if size == FolioSize::Huge && !self.is_huge(extent.addr) => {
                extent.split = true;
                Err(Shortage::Huge)
            }
            Ok(()) => self.on_node(&extent),
        };
        match good {
            Ok(n) if n == pages => Ok(extent),
            Ok(n) if n > 0 && size == FolioSize::Base && !extent.registered => {
                let (start, rest) = (extent.page(n), len - n * pageferry_sys::page_size());
                // SAFETY: frames of ours that hold nothing yet.
                if unsafe { self.sys.advise(start, rest, Advice::DontNeed) }.is_err() {
                    self.drop_fresh(extent);
                    return Err(Shortage::Node);
                }
                extent.hi = n;
                extent.populated = n;
                Ok(extent)
            }
            Ok(_) => {
                self.drop_fresh(extent);
                Err(Shortage::Node)
            }
            Err(shortage) => {
                self.drop_fresh(extent);
                Err(shortage)
            }
        }
    }

    /// Frees an extent whose budget the caller still holds.
    fn drop_fresh(&self, mut extent: Extent) {
        if self.empty_uncounted(&mut extent).is_ok() {
            self.shelve(extent);
        }
    }

    /// How many of the extent's first pages are on its node.
    fn on_node(&self, extent: &Extent) -> Result<usize, Shortage> {
        if self.config.nodes.len() < 2 {
            return Ok(extent.hi);
        }
        let step = if extent.size == FolioSize::Huge { pages_per_extent() } else { 1 };
        // On the stack: this is done for every fresh frame.
        let (mut pages, mut status) = ([0; MAX_PAGES], [-1; MAX_PAGES]);
        let count = extent.hi.div_ceil(step);
        for (address, page) in pages.iter_mut().zip((0..extent.hi).step_by(step)) {
            *address = extent.page(page);
        }
        let asked = self.sys.page_nodes(&pages[..count], &mut status[..count]);
        asked.map_err(|_| Shortage::Node)?;
        let node = i32::try_from(extent.node).unwrap_or(i32::MAX);
        Ok(status[..count].iter().take_while(|&&s| s == node).count() * step)
    }

    /// Whether one huge page stands at `addr`.
    pub(crate) fn is_huge(&self, addr: usize) -> bool {
        let mut runs = [Run::EMPTY; 1];
        let want = Categories::HUGE;
        let found = self.sys.scan(&self.pagemap, addr, addr + HUGE, want, want, &mut runs);
        matches!(found, Ok((1, _))) && runs[0].end - runs[0].start == HUGE as u64
    }

    /// Gives an extent back. Its frames are kept for the next transaction if they are nobody's or
    /// are recycled, and the budget allows; else they are freed.
    pub(crate) fn put(&self, extent: Extent, source: Source<'_>) {
        if extent.lost {
            return;
        }
        let keep = extent.owner.is_none() || source.recycles();
        let frames = extent.frames();
        let whole = extent.size == FolioSize::Base || frames == pages_per_extent();
        if frames == 0 && extent.populated == 0 && !extent.split {
            self.shelve(extent);
        } else if keep && !extent.mixed && !extent.split && whole && self.has_room_for(extent.owner)
        {
            if let Ok(arena) = self.arena(extent.node, extent.size) {
                arena.put_frames(extent);
            }
        } else {
            // At once: the next page that is zeroed is then one that the caches still know, which
            // takes a third of the time (huge pages, Zen 4).
            self.free(extent);
        }
    }

    fn free(&self, mut extent: Extent) {
        if self.empty(&mut extent).is_ok() {
            self.shelve(extent);
        }
        // Else its address space and its share of the budget stay occupied: it still holds
        // memory.
    }

    fn shelve(&self, extent: Extent) {
        if let Ok(arena) = self.arena(extent.node, extent.size) {
            arena.put_empty(extent);
        }
    }

    fn empty(&self, extent: &mut Extent) -> Result<(), Errno> {
        let bytes = extent.populated * pageferry_sys::page_size();
        self.empty_uncounted(extent)?;
        self.budget.give_back(bytes);
        Ok(())
    }

    fn empty_uncounted(&self, extent: &mut Extent) -> Result<(), Errno> {
        let mut tries = 0;
        loop {
            let unregistered = match extent.registered {
                true => self.sys.unregister(&self.uffd, extent.addr, HUGE),
                false => Ok(()),
            };
            extent.registered &= unregistered.is_err();
            // SAFETY: the extent is owned, and nothing in it is wanted any more.
            let result = unregistered.and_then(|()| unsafe {
                if extent.split {
                    self.sys
                        .map_over(extent.addr, HUGE)
                        .and_then(|()| self.prepare(extent.addr, HUGE, extent.node, extent.size))
                } else {
                    self.sys.advise(extent.addr, HUGE, Advice::DontNeed)
                }
            });
            match result {
                Ok(()) => break,
                Err(e) if tries == TRIES => return Err(e),
                Err(_) => {
                    crate::berth::back_off(tries);
                    tries += 1;
                }
            }
        }
        extent.lo = 0;
        extent.hi = 0;
        extent.populated = 0;
        extent.mixed = false;
        extent.split = false;
        extent.owner = None;
        Ok(())
    }

    /// Frees all frames at rest; returns bytes.
    pub(crate) fn release_all(&self) -> usize {
        let before = self.extra_bytes();
        for arena in self.each() {
            while let Some(extent) = arena.take_oldest(None) {
                self.free(extent);
            }
        }
        before.saturating_sub(self.extra_bytes())
    }

    /// Brings the frames at rest of those pools that were used fresh lately up to `high` bytes,
    /// where they are below `low`.
    pub(crate) fn refill(&self, demand: (u32, FolioSize), low: usize, high: usize) {
        let Ok(arena) = self.arena(demand.0, demand.1) else { return };
        let page = pageferry_sys::page_size();
        let mut have = arena.rested_pages() * page;
        if have >= low {
            return;
        }
        while have < high {
            let Ok(extent) = self.fresh(demand.0, demand.1, pages_per_extent()) else { return };
            have += extent.populated * page;
            self.put(extent, Source::Fresh);
        }
    }
}

impl Drop for Pools {
    fn drop(&mut self) {
        // A forked child does not have the pools; what is mapped there is its own.
        if *self.lost.get_mut() || self.home != fork::generation() {
            return;
        }
        for arena in self.arenas.get_mut().drain(..) {
            // Nobody reads events any more, and unmapping what is registered would wait for that.
            for span in arena.spans() {
                if self.sys.unregister(&self.uffd, span.start, span.len()).is_ok() {
                    // SAFETY: the engine is going: no transaction holds an extent, and no device.
                    let _ = unsafe { self.sys.unmap(span.start, span.len()) };
                }
            }
        }
    }
}
