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

use crate::context::Context;
use crate::flight::{Bits, FlightId, MAX_PAGES, Refused, bit};
use crate::plan::Segment;
use crate::pool::{Extent, Source, pages_per_extent};
use crate::quiesce::Held;
use crate::report::{Busy, Order, Outcome};
use crate::tally::Tally;
use crate::units::FolioSize;
use pageferry_copy::{CopyBatch, CopyOp, Kernel, OpResult};
use pageferry_sys::pagemap::{Categories, Run};
use pageferry_sys::uffd::Progress;
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

/// A place for one batch, reused for one after the other.
#[derive(Debug)]
pub(crate) struct Berth<'c> {
    ctx: &'c Context,
    kernel: Kernel,
    pub(crate) batch: Arc<CopyBatch>,
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
    outcome: Box<[Outcome; MAX_PAGES]>,
    hole_since: Option<Instant>,
    /// The copy engine may still write to the frames: they are given up.
    abandoned: bool,
    /// No frames: the kernel allocates and copies at attach (`UFFDIO_COPY`).
    kernel_copy: bool,
    /// This thread has other holes open.
    nested: bool,
}

impl<'c> Berth<'c> {
    pub(crate) fn new(ctx: &'c Context, kernel: Kernel) -> Self {
        Self {
            ctx,
            kernel,
            batch: CopyBatch::with_capacity(MAX_PAGES),
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
            outcome: Box::new([Outcome::Cancelled; MAX_PAGES]),
            hole_since: None,
            abandoned: false,
            kernel_copy: false,
            nested: false,
        }
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
    pub(crate) fn set_nested(&mut self, nested: bool) {
        self.nested = nested;
    }
    pub(crate) fn is_nested(&self) -> bool {
        self.nested
    }
    /// Goes on in frozen order, before anything was detached.
    pub(crate) fn freeze(&mut self) {
        self.order = Order::Frozen;
    }

    /// Step 1: frames on the destination and slots for the old pages. On success the segment is
    /// loaded, cut to what there was room for; the rest comes back.
    pub(crate) fn reserve(
        &mut self,
        mut segment: Segment,
        source: Source,
        kernel_copy: bool,
        tally: &mut Tally,
    ) -> Result<Option<Segment>, ()> {
        self.kernel_copy = kernel_copy;
        let want = segment.range.len() / page_size();
        let from = segment.from.unwrap_or(segment.to);
        if self
            .empties
            .as_ref()
            .is_some_and(|e| e.room() == 0 || e.node != from || e.size != segment.size || e.split)
        {
            self.retire_empties(source);
        }
        if self.frames.as_ref().is_some_and(|e| {
            e.frames() == 0 || e.lost || e.node != segment.to || e.size != segment.size
        }) {
            self.retire_frames(source);
        }
        if self.frames.is_none() && !kernel_copy {
            match self.ctx.pools.take_frames(segment.to, segment.size, want, source) {
                Ok(extent) => self.frames = Some(extent),
                Err(shortage) => {
                    tally.outcome(segment.range, Outcome::NoFrame(shortage));
                    return Err(());
                }
            }
        }
        if self.empties.is_none() {
            match self.ctx.pools.take_empty(from, segment.size) {
                Ok(extent) => self.empties = Some(extent),
                Err(shortage) => {
                    tally.outcome(segment.range, Outcome::NoFrame(shortage));
                    return Err(());
                }
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
        self.abandoned = false;
        self.outcome[..pages].fill(Outcome::Cancelled);
        Ok(rest)
    }

    /// Step 2: announces the flight. False: the range cannot be moved now; the segment is
    /// unloaded with outcome `Discarding`.
    pub(crate) fn open(&mut self, order: Order, tally: &mut Tally) -> bool {
        self.order = order;
        let range = self.seg().range.clone();
        let huge = self.seg().size == FolioSize::Huge;
        let mut tries = 0;
        loop {
            let missing = |page| self.is_missing(page);
            match self.ctx.flights.open(range.clone(), huge, missing) {
                Ok(flight) => {
                    self.flight = Some(flight);
                    return true;
                }
                Err(Refused::Full) => {
                    back_off(tries);
                    tries += 1;
                }
                Err(Refused::Quarantined) => {
                    self.outcome[..self.pages].fill(Outcome::Busy(Busy::Discarding));
                    self.close(tally);
                    return false;
                }
            }
        }
    }

    fn is_missing(&self, page: usize) -> bool {
        let want = Categories::PRESENT | Categories::SWAPPED;
        let mut runs = [Run::EMPTY; 1];
        let end = page + page_size();
        let found = self.ctx.sys.scan(&self.ctx.pagemap, page, end, want, want, &mut runs);
        matches!(found, Ok((0, _)))
    }

    /// Step 2, live: from when this returns, a write is noticed.
    pub(crate) fn protect(&mut self) -> Result<(), Errno> {
        let mut tries = 0;
        loop {
            let range = &self.seg().range;
            match self.ctx.sys.protect(&self.ctx.regions, range.start, range.len()) {
                Ok(()) => return Ok(()),
                Err(Errno(libc::EAGAIN | libc::EINTR | libc::ENOMEM)) if tries < DETACH_TRIES => {
                    back_off(tries);
                    tries += 1;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// The copies of this batch: from the region while it is still there (live), else from the
    /// slots (frozen).
    pub(crate) fn fill_batch(&self) -> bool {
        match self.order {
            Order::Live => {
                let op = CopyOp { dst: self.frame(0), src: self.addr(0), len: self.bytes() };
                self.batch.fill([op]).is_ok()
            }
            Order::Frozen => {
                let mut page = 0;
                let ops = std::iter::from_fn(|| {
                    while page < self.pages && !bit(&self.out, page) {
                        page += 1;
                    }
                    let from = page;
                    while page < self.pages && bit(&self.out, page) {
                        page += 1;
                    }
                    (from < page).then(|| CopyOp {
                        dst: self.frame(from),
                        src: self.slot(from),
                        len: (page - from) * page_size(),
                    })
                });
                self.batch.fill(ops).is_ok()
            }
        }
    }

    /// Copies here and now, with the engine's CPU kernel.
    pub(crate) fn copy_inline(&mut self) {
        match self.order {
            Order::Live => {
                let (dst, src, len) = (self.frame(0), self.addr(0), self.bytes());
                // SAFETY: the frames are ours; the region may be written or unmapped meanwhile,
                // which the kernel tolerates and reports.
                if unsafe { self.kernel.copy(dst, src, len) }.is_err() {
                    set(&mut self.redo, 0..self.pages);
                }
            }
            Order::Frozen => {
                let out = self.out;
                let mut redo = self.redo;
                runs(
                    0..self.pages,
                    |i| bit(&out, i),
                    |r| {
                        let len = r.len() * page_size();
                        // SAFETY: frames and slots are ours.
                        let copied = unsafe {
                            self.kernel.copy(self.frame(r.start), self.slot(r.start), len)
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

    /// Takes over the results of the batch; what failed is copied again from the slots.
    pub(crate) fn collect_batch(&mut self, tally: &mut Tally) {
        for i in 0..self.batch.len() {
            if self.batch.result(i) == Some(OpResult::Done) {
                continue;
            }
            let Some(op) = self.batch.op(i) else { continue };
            let first = (op.dst - self.frame(0)) / page_size();
            set(&mut self.redo, first..first + op.len / page_size());
            tally.fallbacks += 1;
        }
    }

    /// The engine was given the batch and never gave it back: its frames are lost to us, and
    /// every page goes back where it was.
    pub(crate) fn abandon(&mut self) {
        self.abandoned = true;
        set(&mut self.failed, 0..self.pages);
        // The engine may hold on to the batch for ever; the next one needs a new one.
        self.batch = CopyBatch::with_capacity(MAX_PAGES);
        if let Some(frames) = &mut self.frames {
            frames.lost = true;
        }
        self.ctx.pools.note_lost();
    }

    /// Opens a hole over `piece` (pages of the segment) and takes the pages out.
    pub(crate) fn detach(&mut self, piece: Range<usize>, nested: bool) {
        // A page out of its place and a fork must not meet.
        if self.fork_hold.is_none() {
            let forks = &self.ctx.forks;
            self.fork_hold = Some(if nested { forks.hold_again() } else { forks.hold() });
        }
        let flight = self.flight.as_ref().expect("opened before detach");
        self.ctx.flights.widen(flight, self.addr(piece.start)..self.addr(piece.end));
        self.hole_since = Some(Instant::now());
        let mut page = piece.start;
        let mut limit = piece.len();
        let mut tries = 0;
        while page < piece.end {
            let count = limit.min(piece.end - page);
            let (dst, src) = (self.slot(page), self.addr(page));
            // SAFETY: the slots are ours and empty; whoever uses the pages waits at the hole.
            let progress = unsafe {
                self.ctx.sys.move_range(&self.ctx.pools.uffd, dst, src, count * page_size())
            };
            let moved = progress.done / page_size();
            if moved > 0 {
                set(&mut self.out, page..page + moved);
                page += moved;
                tries = 0;
            }
            let Some(Errno(errno)) = progress.error else {
                limit = piece.len();
                continue;
            };
            let refused = match errno {
                // Part was done: asking for the rest tells the reason.
                libc::EAGAIN if moved > 0 => continue,
                libc::EAGAIN | libc::EINTR | libc::ENOMEM if tries < DETACH_TRIES => {
                    back_off(tries);
                    tries += 1;
                    continue;
                }
                libc::EAGAIN => Outcome::Busy(Busy::Contended),
                libc::ENOENT => Outcome::NotPresent,
                libc::EBUSY => self.why_busy(page),
                // Another mapping begins within the range: approach it by halves.
                libc::EINVAL if count > 1 => {
                    limit = count / 2;
                    continue;
                }
                libc::EINVAL => Outcome::Busy(Busy::Mapping),
                libc::EFAULT => Outcome::Busy(Busy::Guarded),
                errno => Outcome::Busy(Busy::Other(errno)),
            };
            // Without a reason of its own, a huge folio stays as a whole; a run of shared pages
            // is passed over at once.
            let skip = match (self.seg().size, refused) {
                (FolioSize::Huge, Outcome::Busy(_)) if page.is_multiple_of(pages_per_extent()) => {
                    self.pages
                }
                (_, Outcome::Busy(Busy::Shared)) => self.shared_run(page, piece.end),
                _ => 1,
            };
            self.outcome[page..page + skip].fill(refused);
            page += skip;
            tries = 0;
            limit = piece.len();
        }
        if self.seg().size == FolioSize::Huge && !is_empty(&self.out) {
            let slot = self.slot(0);
            if !self.ctx.pools.is_huge(slot) {
                // It was split on the way, or before: it moves as base pages.
                if let Some(empties) = &mut self.empties {
                    empties.split = true;
                }
            }
        }
    }

    fn why_busy(&self, page: usize) -> Outcome {
        let mut entry = [pageferry_sys::pagemap::Entry(0)];
        match self.ctx.pagemap.entries(self.addr(page), &mut entry) {
            Ok(()) if entry[0].present() && !entry[0].exclusive() => Outcome::Busy(Busy::Shared),
            _ => Outcome::Busy(Busy::Pinned),
        }
    }

    /// How many pages from `page` on are shared with someone.
    fn shared_run(&self, page: usize, end: usize) -> usize {
        let mut entries = [pageferry_sys::pagemap::Entry(0); MAX_PAGES];
        let entries = &mut entries[..end - page];
        if self.ctx.pagemap.entries(self.addr(page), entries).is_err() {
            return 1;
        }
        entries.iter().take_while(|e| e.present() && !e.exclusive()).count().max(1)
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
        let out = self.out;
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
                if unsafe { self.kernel.copy(self.frame(run.start), self.slot(run.start), len) }
                    .is_ok()
                {
                    return;
                }
                for page in run {
                    // SAFETY: as above.
                    let copied =
                        unsafe { self.kernel.copy(self.frame(page), self.slot(page), page_size()) };
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

    /// Step 6: puts the new pages in (the originals where copying failed). When this returns, no
    /// page of the piece is out.
    /// Returns how long the hole lasted.
    pub(crate) fn attach(&mut self, piece: Range<usize>, tally: &mut Tally) -> Duration {
        let mut page = piece.start;
        while page < piece.end {
            if !bit(&self.out, page) {
                page += 1;
                continue;
            }
            let keep = bit(&self.failed, page);
            let mut end = page + 1;
            while end < piece.end && bit(&self.out, end) && bit(&self.failed, end) == keep {
                end += 1;
            }
            self.place(page..end, keep, tally);
            page = end;
        }
        let hole = self.hole_since.take().map_or(Duration::ZERO, |since| since.elapsed());
        tally.holes.record(hole);
        self.fork_hold = None;
        if tally.first_folio.is_none() {
            tally.first_folio = Some(Instant::now());
        }
        hole
    }

    /// Moves frames (or the originals, if `keep`) into the holes of `run`.
    fn place(&mut self, run: Range<usize>, keep: bool, tally: &mut Tally) {
        let mut page = run.start;
        let mut tries = 0;
        while page < run.end {
            let detours = self.ctx.flights.has_detours();
            let (step, gone) = {
                let flight = self.flight.as_ref().expect("opened before attach");
                self.ctx.flights.attach(flight, |gone| {
                    let is_gone = |i: usize| gone.is_some_and(|g| bit(g, i));
                    let first = is_gone(page);
                    let mut end = page + 1;
                    // Pages that `mremap` took elsewhere are followed one by one.
                    while !detours && end < run.end && is_gone(end) == first {
                        end += 1;
                    }
                    if first {
                        return (Progress { done: (end - page) * page_size(), error: None }, true);
                    }
                    let dst = self.ctx.flights.home_of(self.addr(page));
                    let len = (end - page) * page_size();
                    if self.kernel_copy && !keep {
                        let (sys, src) = (&self.ctx.sys, self.slot(page));
                        // SAFETY: the destination is the hole that these pages left, the source
                        // their slots.
                        return (unsafe { sys.copy_in(&self.ctx.regions, dst, src, len) }, false);
                    }
                    let src = if keep { self.slot(page) } else { self.frame(page) };
                    // SAFETY: the destination is the hole that these pages left; the source is
                    // ours.
                    let moved =
                        unsafe { self.ctx.sys.move_range(&self.ctx.regions, dst, src, len) };
                    (moved, false)
                })
            };
            let done = step.done / page_size();
            if done > 0 {
                let outcome = match (gone, keep) {
                    (true, _) => Outcome::Gone,
                    (false, true) => Outcome::CopyFailed,
                    (false, false) => Outcome::Moved,
                };
                let stays = keep || gone || self.kernel_copy;
                self.settle(page..page + done, outcome, stays, keep && !gone);
                page += done;
                tries = 0;
            }
            match step.error {
                None => {}
                Some(Errno(libc::EAGAIN)) if done > 0 => {}
                Some(Errno(libc::EAGAIN | libc::EINTR | libc::ENOMEM)) => {
                    // The page must come back: there is no giving up here.
                    back_off(tries);
                    tries += 1;
                }
                Some(errno) => {
                    if self.place_otherwise(page, errno, keep) {
                        tally.fallbacks += 1;
                        page += 1;
                        tries = 0;
                    } else {
                        back_off(tries);
                        tries += 1;
                    }
                }
            }
        }
    }

    /// The kernel would not move the page in (its mapping was locked or protected meanwhile, or
    /// is gone). A copy by the kernel works where moving does not. False: try again.
    fn place_otherwise(&mut self, page: usize, why: Errno, keep: bool) -> bool {
        let home = self.ctx.flights.home_of(self.addr(page));
        if why == Errno(libc::EEXIST) {
            // Something stands there that the program put there after it gave this page up.
            self.settle(page..page + 1, Outcome::Gone, true, false);
            return true;
        }
        let original = keep || self.kernel_copy;
        let src = if original { self.slot(page) } else { self.frame(page) };
        // SAFETY: the destination is the hole that this page left; the source is ours.
        let copied = unsafe { self.ctx.sys.copy_in(&self.ctx.regions, home, src, page_size()) };
        match copied.error {
            None => {
                let outcome = if keep { Outcome::CopyFailed } else { Outcome::Moved };
                // The frame is still in the pool, and so is the original.
                self.settle(page..page + 1, outcome, true, false);
                true
            }
            // No mapping of ours there any more: the program has unmapped it.
            Some(Errno(libc::ENOENT | libc::EINVAL | libc::EEXIST | libc::ESRCH)) => {
                self.settle(page..page + 1, Outcome::Gone, true, false);
                true
            }
            // The source cannot be read: a memory error. What the program must feel is SIGBUS,
            // not a page of zeros.
            Some(Errno(libc::EFAULT | libc::EHWPOISON)) if keep => {
                let marked = self.ctx.sys.poison(&self.ctx.regions, home, page_size());
                let settled = marked.error.is_none();
                if settled {
                    self.settle(page..page + 1, Outcome::CopyFailed, true, false);
                }
                settled
            }
            Some(_) => {
                // Neither way for the frame: from now on try the original.
                if !keep && why != Errno(libc::EAGAIN) {
                    set(&mut self.failed, page..page + 1);
                }
                false
            }
        }
    }

    /// The pages are no longer out. `frame_stays`: the frame is still in the pool;
    /// `slot_left`: the original has left its slot.
    fn settle(&mut self, run: Range<usize>, outcome: Outcome, frame_stays: bool, slot_left: bool) {
        let n = run.len();
        if let Some(frames) = self.frames.as_mut().filter(|_| !self.kernel_copy) {
            if frame_stays {
                frames.mixed = true;
            } else {
                frames.populated -= n;
            }
        }
        if let Some(empties) = &mut self.empties {
            if slot_left {
                empties.mixed = true;
            } else {
                empties.populated += n;
            }
        }
        if frame_stays && !slot_left {
            // The old page is left over: its content went in by a copy of the kernel's, or the
            // program gave it up.
            self.ctx.pools.gained(n);
        }
        self.outcome[run.clone()].fill(outcome);
        clear(&mut self.out, run);
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
        if let Some(flight) = self.flight.take()
            && self.ctx.flights.close(flight)
        {
            let mut tries = 0;
            while tries < DETACH_TRIES {
                let woken = self.ctx.sys.wake(&self.ctx.regions, range.start, range.len());
                if woken.is_ok() {
                    break;
                }
                back_off(tries);
                tries += 1;
            }
        }
        self.advance(&range, segment.size);
        let mut page = 0;
        while page < self.pages {
            let outcome = self.outcome[page];
            let same = self.outcome[page..self.pages].iter().take_while(|o| **o == outcome);
            let end = page + same.count();
            let part = range.start + page * page_size()..range.start + end * page_size();
            page = end;
            let passing =
                matches!(outcome, Outcome::Busy(Busy::Pinned | Busy::Contended | Busy::Discarding));
            if passing && !segment.again {
                tally.again.push(Segment { range: part, ..segment.clone() });
            } else {
                tally.outcome(part, outcome);
            }
        }
        match self.order {
            Order::Live => tally.live += 1,
            Order::Frozen => tally.frozen += 1,
        }
        self.pages = 0;
    }

    fn keeps_protection(&self) -> bool {
        self.ctx.move_keeps_protection.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn unprotect(&self, range: &Range<usize>) {
        for tries in 0..DETACH_TRIES {
            match self.ctx.sys.unprotect(&self.ctx.regions, range.start, range.len()) {
                // Unmapped meanwhile: nothing to lift. What is left otherwise is lifted by the
                // handler at the next write, and by the end of the move.
                Ok(()) | Err(Errno(libc::ENOENT | libc::EINVAL)) => return,
                Err(_) => back_off(tries),
            }
        }
    }

    /// Marks the extents as used up to the last page that changed places.
    fn advance(&mut self, range: &Range<usize>, size: FolioSize) {
        let changed =
            |o: &Outcome| matches!(o, Outcome::Moved | Outcome::CopyFailed | Outcome::Gone);
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
        empties.mixed |= gaps;
        empties.split |= size == FolioSize::Huge && gaps;
        if self.order == Order::Live && used > 0 && self.keeps_protection() {
            let len = used * page_size();
            if self.ctx.sys.unprotect(&self.ctx.pools.uffd, first, len).is_err() {
                // Frames that cannot be written are freed, not used.
                self.empties.iter_mut().for_each(|e| e.mixed = true);
            }
        }
    }

    fn retire_empties(&mut self, source: Source) {
        if let Some(extent) = self.empties.take() {
            self.ctx.pools.put(extent, source == Source::Any);
        }
    }

    fn retire_frames(&mut self, source: Source) {
        if let Some(extent) = self.frames.take() {
            self.ctx.pools.put(extent, source == Source::Any);
        }
    }

    /// Gives the extents back.
    pub(crate) fn retire(&mut self, source: Source) {
        self.retire_empties(source);
        self.retire_frames(source);
    }
}

impl Drop for Berth<'_> {
    fn drop(&mut self) {
        // Reached with pages out only by a panic.
        let mut tally = Tally::new();
        self.close(&mut tally);
        self.retire(Source::FreshOnly);
    }
}
