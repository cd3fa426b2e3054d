//! One batch in the air: its pages, its frames, and the steps of the transaction over them.
//!
//! Page `i` of the segment, slot `i` of the empty extent and frame `i` of the frame extent belong
//! together throughout. A page is in one of three places: in the region, or (`out`) in its slot
//! with a hole in the region, or replaced by its frame.
//!
//! What always holds:
//! - A page whose bit in `out` is set is in its slot and nowhere else; only [`Berth::attach`] and
//!   [`Berth::restore`] clear the bit, and they do so only when the region has it (or its copy)
//!   again or the program has given it up.
//! - A berth dropped with pages out puts the originals back.
//! - Detach is the safe point to refuse: a page that the kernel will not move has not moved.

mod attach;
mod copy;
mod detach;

use crate::context::Context;
use crate::divide::{ENGINE_NAPS, NAP};
use crate::flight::{Bits, FlightId, MAX_PAGES, Opened, Refused, bit};
use crate::plan::Segment;
use crate::pool::{Extent, Source};
use crate::quiesce::Held;
use crate::report::{Busy, Order, Outcome, Shortage};
use crate::tally::Tally;
use crate::units::FolioSize;
use pageferry_copy::{CopyBatch, Kernel};
use pageferry_sys::pagemap::{Categories, Run};
use pageferry_sys::{Errno, page_size};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Tries of a call that says `EAGAIN` before a page that is still in its place is left there.
const DETACH_TRIES: u32 = 64;

fn set(bits: &mut Bits, range: Range<usize>) {
    for i in range {
        bits[i / 64] |= 1 << (i % 64);
    }
}
fn clear(bits: &mut Bits, range: Range<usize>) {
    for i in range {
        bits[i / 64] &= !(1 << (i % 64));
    }
}
fn is_empty(bits: &Bits) -> bool {
    bits.iter().all(|&w| w == 0)
}

/// Calls `f` for each run of pages within `within` for which `is` holds.
fn runs(within: Range<usize>, is: impl Fn(usize) -> bool, mut f: impl FnMut(Range<usize>)) {
    let mut i = within.start;
    while i < within.end {
        if is(i) {
            let from = i;
            while i < within.end && is(i) {
                i += 1;
            }
            f(from..i);
        } else {
            i += 1;
        }
    }
}

/// Between two tries: first give the CPU away, then sleep, longer and longer up to 1 ms.
pub(crate) fn back_off(tries: u32) {
    if tries < 8 {
        pageferry_sys::sched::yield_now();
    } else {
        std::thread::sleep(Duration::from_micros(1 << tries.min(18).saturating_sub(8)));
    }
}

/// When a thread should offer its CPU: losing it then costs nobody anything, losing it with a hole
/// open costs whoever waits there a time slice or more.
///
/// Near the end of the slice, and not before: a thread that yields gives up the rest of its slice
/// (since Linux 6.18 for good), so yielding often would cost it its share of a busy CPU.
#[derive(Debug)]
struct Turn {
    began: Instant,
    length: Duration,
}

impl Turn {
    fn new() -> Self {
        // 2.8 ms: the default slice with eight CPUs or more, where the kernel does not tell.
        let slice = pageferry_sys::sched::slice().unwrap_or(Duration::from_micros(2800));
        Self { began: Instant::now(), length: slice * 3 / 4 }
    }

    fn offer(&mut self) {
        if self.began.elapsed() > self.length {
            pageferry_sys::sched::yield_now();
            self.began = Instant::now();
        }
    }
}

/// What became of [`Berth::reserve`].
#[derive(Debug)]
pub(crate) enum Reserved {
    /// The segment is loaded, cut to what there was room for.
    Ready { rest: Option<Segment> },
    /// It has its outcome.
    Refused,
    /// No frame is at rest, and somebody may wait for another batch of this thread, and would wait for
    /// the kernel to find memory, too.
    Full(Segment),
}

/// What became of [`Berth::open`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Announced {
    /// The flight is open.
    Open,
    /// The segment has its outcome.
    Refused,
    /// There is no place for another flight while this thread has others open; the segment is
    /// loaded still ([`Berth::unload`]).
    Full,
}

/// A place for one batch, reused for one after the other.
#[derive(Debug)]
pub(crate) struct Berth<'c> {
    ctx: &'c Context,
    kernel: Kernel,
    /// What the copy engine gets; taken from the spare ones when it is first needed.
    batch: Option<Arc<CopyBatch>>,
    segment: Option<Segment>,
    pages: usize,
    order: Order,
    flight: Option<FlightId>,
    fork_hold: Option<Held<'c>>,
    frames: Option<Extent>,
    empties: Option<Extent>,
    /// In a slot.
    out: Bits,
    /// Must be copied (again) from its slot before it is attached.
    redo: Bits,
    /// Could not be copied: the original goes back.
    failed: Bits,
    /// Went to swap before it was taken out: it goes back as it is.
    swapped: Bits,
    outcome: Box<[Outcome; MAX_PAGES]>,
    hole_since: Option<Instant>,
    /// The copy engine may still write to the frames: they are given up.
    abandoned: bool,
    /// No frames: the kernel allocates and copies at attach (`UFFDIO_COPY`).
    kernel_copy: bool,
    /// Some page was placed by `UFFDIO_COPY`, on a node of the kernel's choice.
    placed_otherwise: bool,
    /// The kernel had no memory for its copies.
    starved: bool,
    /// This thread has other flights open.
    nested: bool,
    /// Somebody may wait for one of them.
    holding: bool,
    /// When to offer the CPU to others before the next hole, and how often.
    turn: Turn,
}

impl<'c> Berth<'c> {
    /// For a thread without a hole open: the allocator is needed.
    pub(crate) fn new(ctx: &'c Context, kernel: Kernel) -> Self {
        Kernel::prepare_thread();
        Self {
            ctx,
            kernel,
            batch: None,
            segment: None,
            pages: 0,
            order: Order::Frozen,
            flight: None,
            fork_hold: None,
            frames: None,
            empties: None,
            out: [0; 8],
            redo: [0; 8],
            failed: [0; 8],
            swapped: [0; 8],
            outcome: Box::new([Outcome::Cancelled; MAX_PAGES]),
            hole_since: None,
            abandoned: false,
            kernel_copy: false,
            placed_otherwise: false,
            starved: false,
            nested: false,
            holding: false,
            turn: Turn::new(),
        }
    }

    /// Needs no allocator from now on.
    pub(crate) fn make_ready(&mut self) {
        self.batch();
    }
    pub(crate) fn is_ready(&self) -> bool {
        self.batch.is_some()
    }
    /// The list of copies for the engine.
    pub(crate) fn batch(&mut self) -> &Arc<CopyBatch> {
        let spare = &self.ctx.spare_batches;
        self.batch.get_or_insert_with(|| {
            let spare = spare.lock().pop();
            spare.unwrap_or_else(|| CopyBatch::with_capacity(MAX_PAGES))
        })
    }
    /// Whether the engine has nothing of this berth (any more).
    pub(crate) fn is_copied(&self) -> bool {
        self.batch.as_ref().is_none_or(|b| !b.is_submitted())
    }
    fn seg(&self) -> &Segment {
        self.segment.as_ref().expect("a step of the transaction runs only with a segment loaded")
    }
    fn addr(&self, page: usize) -> usize {
        self.seg().range.start + page * page_size()
    }
    fn slot(&self, page: usize) -> usize {
        let extent = self.empties.as_ref().expect("reserved with the segment");
        extent.page(extent.hi + page)
    }
    fn frame(&self, page: usize) -> usize {
        let extent = self.frames.as_ref().expect("reserved with the segment");
        extent.page(extent.lo + page)
    }
    pub(crate) fn order(&self) -> Order {
        self.order
    }
    pub(crate) fn bytes(&self) -> usize {
        self.pages * page_size()
    }
    pub(crate) fn size(&self) -> FolioSize {
        self.seg().size
    }
    pub(crate) fn kernel_copies(&self) -> bool {
        self.kernel_copy
    }
    /// Whether frames of this kind are at hand.
    pub(crate) fn has_frames(&self, node: u32, size: FolioSize) -> bool {
        let fits = |e: &Extent| e.frames() > 0 && !e.lost && e.node == node && e.size == size;
        self.frames.as_ref().is_some_and(fits)
    }
    /// Tells which other batches this thread has in the air.
    pub(crate) fn set_others<'o>(&mut self, others: impl Iterator<Item = &'o Self>)
    where
        'c: 'o,
    {
        (self.nested, self.holding) = (false, false);
        for other in others {
            self.nested = true;
            self.holding |= other.keeps_waiting();
        }
    }
    /// Whether somebody may wait for this batch: at its hole, or to write to a huge folio under copy.
    fn keeps_waiting(&self) -> bool {
        self.order == Order::Frozen || self.size() == FolioSize::Huge
    }
    pub(crate) fn is_nested(&self) -> bool {
        self.nested
    }
    /// Goes on in frozen order, before anything was detached.
    pub(crate) fn freeze(&mut self) {
        self.order = Order::Frozen;
    }

    /// Step 1: frames on the destination and slots for the old pages. Once it is reserved, the
    /// segment is loaded. While other batches of this thread are in the air, it comes back if there
    /// is no room at once.
    pub(crate) fn reserve(
        &mut self,
        mut segment: Segment,
        source: Source<'_>,
        kernel_copy: bool,
        tally: &mut Tally,
    ) -> Reserved {
        let nested = self.nested;
        let refuse = |segment: Segment, shortage, tally: &mut Tally| {
            if nested {
                // Not for the allocator, nor for who waits for it: they may wait for our holes.
                return Reserved::Full(segment);
            }
            tally.outcome(segment.range, Outcome::NoFrame(shortage));
            Reserved::Refused
        };
        self.kernel_copy = kernel_copy;
        self.placed_otherwise = false;
        self.starved = false;
        let want = segment.range.len() / page_size();
        let from = segment.from.unwrap_or(segment.to);
        if nested && !self.ctx.pools.are_there([from, segment.to], segment.size) {
            return Reserved::Full(segment);
        }
        if self
            .empties
            .as_ref()
            .is_some_and(|e| e.room() == 0 || e.node != from || e.size != segment.size || e.split)
            || (self.empties.as_ref()).is_some_and(|e| e.owner.is_some_and(|o| o != segment.owner))
        {
            self.retire_empties(source);
        }
        if self.frames.as_ref().is_some_and(|e| {
            e.frames() == 0 || e.lost || e.node != segment.to || e.size != segment.size
        }) {
            self.retire_frames(source);
        }
        // The kernel allocates for its copies: a full cgroup would call the OOM killer.
        if kernel_copy && !self.ctx.pools.allowed(segment.range.len() as u64, !nested) {
            return refuse(segment, Shortage::Memory, tally);
        }
        if self.frames.is_none() && !kernel_copy {
            let may_wait = !self.holding;
            match self.ctx.pools.take_frames(segment.to, segment.size, want, source, may_wait) {
                Ok(Some(extent)) => self.frames = Some(extent),
                Ok(None) => return Reserved::Full(segment),
                Err(shortage) => return refuse(segment, shortage, tally),
            }
        }
        if self.empties.is_none() {
            match self.ctx.pools.take_empty(from, segment.size) {
                Ok(extent) => self.empties = Some(extent),
                Err(shortage) => return refuse(segment, shortage, tally),
            }
        }
        let frames = match &self.frames {
            Some(extent) if !kernel_copy => extent.frames(),
            _ => want,
        };
        let room = self.empties.as_ref().map_or(0, Extent::room);
        let pages = want.min(frames).min(room);
        let rest = (pages < want).then(|| segment.split_off(pages * page_size()));
        self.pages = pages;
        self.segment = Some(segment);
        self.out = [0; 8];
        self.redo = [0; 8];
        self.failed = [0; 8];
        self.swapped = [0; 8];
        self.abandoned = false;
        self.outcome[..pages].fill(Outcome::Cancelled);
        Reserved::Ready { rest }
    }

    /// Step 2: announces the flight. If none of the range can be moved now, the segment is
    /// unloaded and has its outcome.
    pub(crate) fn open(&mut self, order: Order, tally: &mut Tally) -> Announced {
        self.order = order;
        let range = self.seg().range.clone();
        let huge = self.seg().size == FolioSize::Huge;
        let mut tries = 0;
        loop {
            let missing = |page| self.is_missing(page);
            let why = match self.ctx.flights.open(range.clone(), huge, missing) {
                Ok(Opened { id, left }) => {
                    self.flight = Some(id);
                    for page in (0..self.pages).filter(|page| left.is_some_and(|l| bit(&l, *page)))
                    {
                        self.outcome[page] = Outcome::Gone;
                    }
                    return Announced::Open;
                }
                // All places may be taken by threads that wait for one more, as this one would.
                Err(Refused::Full) if self.nested => return Announced::Full,
                Err(Refused::Full) => {
                    back_off(tries);
                    tries += 1;
                    continue;
                }
                Err(why) => why,
            };
            let outcome = match why {
                Refused::Unmapped => Outcome::Gone,
                _ => Outcome::Busy(Busy::Discarding),
            };
            self.outcome[..self.pages].fill(outcome);
            if why == Refused::Torn
                && let Some(segment) = &mut self.segment
            {
                segment.size = FolioSize::Base;
            }
            self.pages_not_taken(tally);
            return Announced::Refused;
        }
    }

    /// From now on until the piece is attached no process is forked. A page out of its place and a
    /// fork must not meet.
    fn hold_forks(&mut self, nested: bool) {
        if self.fork_hold.is_none() {
            let forks = &self.ctx.forks;
            self.fork_hold = Some(if nested { forks.hold_again() } else { forks.hold() });
        }
    }

    /// Takes the segment back, before anything was done with it.
    pub(crate) fn unload(&mut self) -> Option<Segment> {
        self.pages = 0;
        self.segment.take()
    }

    /// Whether nothing is at a page, or no more than the zero page.
    fn is_missing(&self, page: usize) -> bool {
        let there = Categories::PRESENT | Categories::SWAPPED;
        let mut runs = [Run::EMPTY; 1];
        let (end, tell) = (page + page_size(), there | Categories::PFN_ZERO);
        match self.ctx.sys.scan(&self.ctx.pagemap, page, end, there, tell, &mut runs) {
            Ok((count, _)) => count == 0 || runs[0].categories().contains(Categories::PFN_ZERO),
            Err(_) => false,
        }
    }

    /// Whether a page has any of these properties; `None` without an answer.
    fn look(&self, page: usize, any: Categories) -> Option<bool> {
        let mut runs = [Run::EMPTY; 1];
        let end = page + page_size();
        let found = self.ctx.sys.scan(&self.ctx.pagemap, page, end, any, any, &mut runs);
        found.ok().map(|(count, _)| count > 0)
    }

    /// Puts every original back that is still out. Also the way out of a panic.
    fn restore(&mut self, tally: &mut Tally) {
        if is_empty(&self.out) {
            return;
        }
        set(&mut self.failed, 0..self.pages);
        self.attach(0..self.pages, tally);
    }

    /// Last step: ends the flight, wakes who waits for a page that did not come, and accounts.
    pub(crate) fn close(&mut self, tally: &mut Tally) {
        self.restore(tally);
        let Some(segment) = self.segment.take() else { return };
        let range = segment.range.clone();
        let stayed = self.outcome[..self.pages].iter().any(|o| *o != Outcome::Moved);
        if self.order == Order::Live && (stayed || self.keeps_protection()) {
            self.unprotect(&range);
        }
        if let Some(flight) = self.flight.take() {
            // Whoever waits for a page that `mremap` took elsewhere waits there. (On the stack:
            // other holes of this thread may be open.)
            let homes = self.ctx.flights.has_detours(&flight).then(|| {
                let mut homes = [range.start; MAX_PAGES];
                for (home, addr) in homes.iter_mut().zip(range.clone().step_by(page_size())) {
                    *home = self.ctx.flights.home_of(&flight, addr);
                }
                homes
            });
            if self.ctx.flights.close(flight) {
                self.wake(range.clone());
                for home in homes.into_iter().flatten().filter(|home| !range.contains(home)) {
                    self.wake(home..home + page_size());
                }
            }
        }
        self.advance(&segment);
        // Pages of an unknown node (they were in swap) are no frames of a known one.
        if segment.from.is_none() && !self.ctx.pools.has_one_node() {
            self.empties.iter_mut().for_each(|e| e.mixed = true);
        }
        match self.order {
            Order::Live => tally.live += 1,
            Order::Frozen => tally.frozen += 1,
        }
        self.account(&segment, tally);
    }

    fn wake(&self, range: Range<usize>) {
        for tries in 0..DETACH_TRIES {
            if self.ctx.sys.wake(&self.ctx.uffd, range.start, range.len()).is_ok() {
                return;
            }
            back_off(tries);
        }
    }

    /// The segment was refused as a whole: nothing of it was touched.
    fn pages_not_taken(&mut self, tally: &mut Tally) {
        if let Some(segment) = self.segment.take() {
            self.account(&segment, tally);
        }
    }

    fn account(&mut self, segment: &Segment, tally: &mut Tally) {
        let mut page = 0;
        while page < self.pages {
            let outcome = self.outcome[page];
            let same = self.outcome[page..self.pages].iter().take_while(|o| **o == outcome);
            let end = page + same.count();
            let at = |page: usize| segment.range.start + page * page_size();
            let range = at(page)..at(end);
            page = end;
            let passing =
                matches!(outcome, Outcome::Busy(Busy::Pinned | Busy::Contended | Busy::Discarding));
            if passing && !segment.again {
                tally.again.push(Segment { range, ..segment.clone() });
            } else {
                tally.outcome(range, outcome);
            }
        }
        self.pages = 0;
    }

    fn keeps_protection(&self) -> bool {
        self.ctx.move_keeps_protection.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn unprotect(&self, range: &Range<usize>) {
        for tries in 0..DETACH_TRIES {
            match self.ctx.sys.unprotect(&self.ctx.uffd, range.start, range.len()) {
                // Unmapped meanwhile: nothing to lift. What is left otherwise is lifted by the
                // handler at the next write, and by the end of the move.
                Ok(()) | Err(Errno(libc::ENOENT | libc::EINVAL)) => return,
                Err(_) => back_off(tries),
            }
        }
    }

    /// Marks the extents as used up to the last page that changed places.
    fn advance(&mut self, segment: &Segment) {
        let Segment { range, size, owner, .. } = segment;
        let (size, owner) = (*size, *owner);
        let changed = |o: &Outcome| {
            matches!(
                o,
                Outcome::Moved
                    | Outcome::CopyFailed
                    | Outcome::Gone
                    | Outcome::NoFrame(_)
                    | Outcome::Swapped
            )
        };
        let used = self.outcome[..self.pages].iter().rposition(changed).map_or(0, |last| last + 1);
        let gaps = self.outcome[..used].iter().any(|o| *o != Outcome::Moved);
        if let Some(frames) = self.frames.as_mut().filter(|_| !self.kernel_copy) {
            frames.lo += used;
            frames.mixed |= gaps;
            // The frame went in whole only if the region's entry was free of a page table.
            if size == FolioSize::Huge && used > 0 {
                frames.split |= gaps || !self.ctx.pools.is_huge(range.start);
            }
        }
        let Some(empties) = &mut self.empties else { return };
        let first = empties.page(empties.hi);
        empties.hi += used;
        if used > 0 {
            empties.owner = Some(owner);
        }
        empties.mixed |= gaps;
        empties.split |= size == FolioSize::Huge && gaps;
        if self.order == Order::Live && used > 0 && self.keeps_protection() {
            let len = used * page_size();
            if self.ctx.sys.unprotect(&self.ctx.uffd, first, len).is_err() {
                // Frames that cannot be written are freed, not used.
                self.empties.iter_mut().for_each(|e| e.mixed = true);
            }
        }
    }

    fn retire_empties(&mut self, source: Source<'_>) {
        if let Some(extent) = self.empties.take() {
            self.ctx.pools.put(extent, source);
        }
    }

    fn retire_frames(&mut self, source: Source<'_>) {
        if let Some(extent) = self.frames.take() {
            self.ctx.pools.put(extent, source);
        }
    }

    /// Gives the extents back.
    pub(crate) fn retire(&mut self, source: Source<'_>) {
        self.retire_empties(source);
        self.retire_frames(source);
    }
}

impl Drop for Berth<'_> {
    fn drop(&mut self) {
        // Reached with pages out, or with copies under way, only by a panic.
        let left = self.batch.as_ref().filter(|b| b.is_submitted());
        if left.is_some_and(|b| !(0..ENGINE_NAPS).any(|_| b.wait_timeout(NAP))) {
            self.abandon();
        }
        if self.segment.is_some() {
            self.close(&mut Tally::new());
        }
        self.retire(Source::Fresh);
        self.ctx.spare_batches.lock().extend(self.batch.take());
    }
}
