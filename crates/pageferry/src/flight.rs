//! The flight table: which pages are in the air, and what happened to them meanwhile.
//!
//! A *flight* is the part of one 2 MiB block that one transaction has under way. The thread that
//! moves it (the conductor) and the fault handler meet here and nowhere else.
//!
//! # The protocol
//! The handler holds the gate exclusively from *before* it reads messages until it has acted on
//! them. The conductor holds it shared while it opens a flight, widens its hole, reads what was
//! marked, or attaches. Hence:
//!
//! 1. *No write is lost.* A write to a protected page waits until the handler has marked the page
//!    dirty and lifted the protection, in that order, under the gate. The conductor reads the
//!    marks after detach, so a write that landed before detach was marked before it. (A write to a
//!    huge folio waits until the folio is in its new place.)
//! 2. *A stale message does no harm.* A message about a flight that has ended finds either no
//!    flight (then nothing is protected: a flight protects its pages only once it is open) or the
//!    flight that holds the page now (the page is marked dirty *there* before its protection is
//!    lifted).
//! 3. *A hole is told from a first touch.* The hole is widened before detach begins, under the
//!    gate; so a missing page outside every hole has really never been there, and the handler
//!    may fill it, because nobody can begin to detach it before the handler lets go of the gate.
//! 4. *What the program unmaps is not touched.* From an unmap until its event is read the kernel
//!    refuses every `UFFDIO_MOVE`; from then on the mark does: detach and attach look at it under
//!    the gate, and no flight opens over the range.
//! 5. *What the program gives up stays given up.* `madvise(MADV_DONTNEED)` waits until its event
//!    is read; the handler marks the pages gone before it lets go of the gate; attach checks the
//!    marks and moves pages in under the gate; a page that is marked before the hole is widened
//!    over it is not detached at all, since what is there by then may be new. So an attach comes either before the event is read
//!    (and the pages are dropped after it) or after the mark (and skips them). Pages of the range
//!    that were *not* in the air could be detached between the event and the drop: a [`Quarantine`]
//!    keeps them, marked gone from the start, out of new flights until the drop is seen to be done.
//!
//! Loom checks 1 to 5 (`flight_model`, under `--cfg loom`).

use crate::sync::{
    AtomicBool, AtomicU32, AtomicU64, AtomicUsize, ExclusiveGuard, Gate, Mutex, Ordering,
};
use crate::units::overlap;
use pageferry_sys::uffd::Event;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Pages in one flight at most: a 2 MiB block of 4 KiB pages. Fewer for the model checker, which
/// looks at every word.
pub(crate) const MAX_PAGES: usize = if cfg!(loom) { 64 } else { 512 };
const WORDS: usize = MAX_PAGES / 64;

/// How long a range stays off limits after a `madvise` event whose effect cannot be seen (a page
/// that was dropped and touched again at once looks as if it had never been dropped). The thread
/// in `madvise` has been woken by then; it needs one turn on a CPU.
const QUARANTINE: Duration = Duration::from_secs(1);

/// One flight. Fields are atomics so that the table can be shared; the gate orders them.
#[derive(Debug, Default)]
#[cfg_attr(not(loom), repr(align(128)))] // its own cache lines: conductors do not share them
struct Flight {
    start: AtomicUsize,
    end: AtomicUsize,
    hole_start: AtomicUsize,
    hole_end: AtomicUsize,
    /// Somebody waits for a page of this flight and must be woken when it closes.
    waiters: AtomicU32,
    dirty: [AtomicU64; WORDS],
    gone: [AtomicU64; WORDS],
    any_gone: AtomicBool,
    /// The flight carries one huge folio, whose writers wait.
    huge: AtomicBool,
    /// Detours there had been when it opened: only later ones took its pages along.
    seq: AtomicUsize,
}

/// Relaxed everywhere in this module: the gate's lock orders every access between handler and
/// conductor, and no one else touches a flight.
const R: Ordering = Ordering::Relaxed;

impl Flight {
    fn range(&self) -> Range<usize> {
        self.start.load(R)..self.end.load(R)
    }
    fn hole(&self) -> Range<usize> {
        self.hole_start.load(R)..self.hole_end.load(R)
    }
}

/// A range that was given up by `madvise` but may not have been dropped yet.
#[derive(Debug)]
struct Quarantine {
    range: Range<usize>,
    /// A page that was there when the event was read: once it is missing, the drop is under way
    /// beyond it. The last such page is watched.
    witness: usize,
    since: Instant,
}

/// Where a page went by `mremap` while it was in the air.
#[derive(Clone, Debug)]
struct Detour {
    seq: usize,
    from: Range<usize>,
    to: usize,
}

impl Detour {
    fn target(&self) -> Range<usize> {
        self.to..self.to + self.from.len()
    }
}

#[derive(Debug, Default)]
struct Rare {
    quarantines: Vec<Quarantine>,
    /// In the order in which they happened.
    detours: Vec<Detour>,
    unmapped: Vec<Range<usize>>,
}

impl Rare {
    /// Where a page is now that was at `addr` when there had been `seq` detours.
    fn home_of(&self, seq: usize, addr: usize) -> usize {
        let later = self.detours.iter().filter(|d| d.seq > seq);
        later.fold(addr, |at, d| if d.from.contains(&at) { d.to + (at - d.from.start) } else { at })
    }

    /// Where a page was then that is at `addr` now; `None` if what was there has left since.
    fn origin_of(&self, seq: usize, addr: usize) -> Option<usize> {
        let later = self.detours.iter().rev().filter(|d| d.seq > seq);
        later.clone().try_fold(addr, |at, d| {
            if d.target().contains(&at) {
                Some(d.from.start + (at - d.to))
            } else {
                (!d.from.contains(&at)).then_some(at)
            }
        })
    }

    fn is_empty(&self) -> bool {
        self.quarantines.is_empty() && self.detours.is_empty() && self.unmapped.is_empty()
    }
}

/// What the handler must do about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The page is in a hole, or part of a huge folio under copy: its waiter is woken by attach.
    Wait,
    /// Lift the protection; the page was marked dirty if it is in the air.
    Unprotect,
    /// The page was never there: give it its first content.
    FirstTouch,
}

/// Why a flight cannot open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The range, or part of its huge folio, is being given up by the program.
    Quarantined,
    /// Part of the range was unmapped or moved away since the move began; whatever is mapped there
    /// now is not ours.
    Unmapped,
    /// All places are taken.
    Full,
}

/// An open flight; closed by [`Flights::close`].
#[derive(Debug)]
pub(crate) struct FlightId(usize);

/// All flights of an engine.
#[derive(Debug)]
pub(crate) struct Flights {
    gate: Gate,
    slots: Box<[Flight]>,
    page: usize,
    rare: Mutex<Rare>,
    /// Detours there ever were.
    detours: AtomicUsize,
    /// Set while `rare` holds anything, so that the common path does not lock it.
    any_rare: AtomicBool,
}

/// Set bits as runs of pages.
pub(crate) type Bits = [u64; WORDS];

pub(crate) fn bit(bits: &Bits, index: usize) -> bool {
    bits[index / 64] >> (index % 64) & 1 != 0
}

impl Flights {
    pub(crate) fn new(slots: usize, page: usize) -> Self {
        let slots = (0..slots).map(|_| Flight::default()).collect();
        Self {
            gate: Gate::default(),
            slots,
            page,
            rare: Mutex::default(),
            detours: AtomicUsize::new(0),
            any_rare: AtomicBool::new(false),
        }
    }

    /// Opens a flight over `range` (at most [`MAX_PAGES`] pages) without a hole. Pages that are
    /// being given up are marked as such; a huge folio with any does not fly.
    ///
    /// `is_missing` tells whether nothing is mapped at a page; it is asked only about a range
    /// that was given up a moment ago.
    pub(crate) fn open(
        &self,
        range: Range<usize>,
        huge: bool,
        is_missing: impl Fn(usize) -> bool,
    ) -> Result<FlightId, Refused> {
        debug_assert!(range.len() <= MAX_PAGES * self.page);
        let _shared = self.gate.shared();
        let gone = if self.any_rare.load(R) { self.given_up(&range, is_missing)? } else { None };
        if let Some(gone) = &gone
            && (huge || (0..range.len() / self.page).all(|page| bit(gone, page)))
        {
            return Err(Refused::Quarantined);
        }
        for (index, flight) in self.slots.iter().enumerate() {
            // `start` claims the slot: several conductors hold the gate at once. Acquire pairs
            // with the release in `close`.
            let claim =
                flight.start.compare_exchange(0, range.start, Ordering::Acquire, Ordering::Relaxed);
            if claim.is_ok() {
                flight.hole_start.store(range.start, R);
                flight.hole_end.store(range.start, R);
                flight.waiters.store(0, R);
                flight.any_gone.store(gone.is_some(), R);
                flight.huge.store(huge, R);
                flight.seq.store(self.detours.load(R), R);
                flight.dirty.iter().for_each(|word| word.store(0, R));
                for (word, bits) in flight.gone.iter().zip(gone.unwrap_or([0; WORDS])) {
                    word.store(bits, R);
                }
                flight.end.store(range.end, R);
                return Ok(FlightId(index));
            }
        }
        Err(Refused::Full)
    }

    /// From now on `hole` (part of the flight) may be detached, but for the pages returned: the
    /// program has given them up already, and what is there by now may be new. Called before
    /// detach begins.
    pub(crate) fn widen(&self, id: &FlightId, hole: Range<usize>) -> Option<Bits> {
        let _shared = self.gate.shared();
        let flight = &self.slots[id.0];
        flight.hole_start.store(hole.start, R);
        flight.hole_end.store(hole.end, R);
        flight.any_gone.load(R).then(|| std::array::from_fn(|i| flight.gone[i].load(R)))
    }

    /// Pages of the flight that were written since they were protected. Exact for pages that
    /// have been detached.
    pub(crate) fn dirty(&self, id: &FlightId) -> Bits {
        let _shared = self.gate.shared();
        std::array::from_fn(|i| self.slots[id.0].dirty[i].load(R))
    }

    /// Runs `detach` or `attach` under the gate with the pages that the program has given up
    /// meanwhile (`None` when there are none): they must be neither taken nor given back.
    pub(crate) fn with_gone<T>(&self, id: &FlightId, step: impl FnOnce(Option<&Bits>) -> T) -> T {
        let _shared = self.gate.shared();
        let flight = &self.slots[id.0];
        if !flight.any_gone.load(R) {
            return step(None);
        }
        let gone = std::array::from_fn(|i| flight.gone[i].load(R));
        step(Some(&gone))
    }

    /// Where the flight's page from `addr` belongs now: elsewhere after `mremap`.
    pub(crate) fn home_of(&self, id: &FlightId, addr: usize) -> usize {
        if !self.any_rare.load(R) {
            return addr;
        }
        self.rare.lock().home_of(self.slots[id.0].seq.load(R), addr)
    }

    /// Whether pages of the flight may belong elsewhere ([`Flights::home_of`]).
    pub(crate) fn has_detours(&self, id: &FlightId) -> bool {
        let seq = self.slots[id.0].seq.load(R);
        self.any_rare.load(R) && self.rare.lock().detours.iter().any(|d| d.seq > seq)
    }

    /// Ends the flight; true if somebody must be woken in its range.
    pub(crate) fn close(&self, id: FlightId) -> bool {
        let _shared = self.gate.shared();
        let flight = &self.slots[id.0];
        let waiters = flight.waiters.load(R) > 0;
        flight.end.store(0, R);
        flight.hole_start.store(0, R);
        flight.hole_end.store(0, R);
        // Release: whoever claims the slot next sees it empty.
        flight.start.store(0, Ordering::Release);
        waiters
    }

    /// Nothing is mapped at `range`, or nothing of ours: no flight opens over it.
    #[cfg(not(loom))]
    pub(crate) fn note_unmapped(&self, range: Range<usize>) {
        let _shared = self.gate.shared();
        self.rare.lock().unmapped.push(range);
        self.any_rare.store(true, R);
    }

    /// Forgets what was unmapped and moved away within a range, and tells where to. Called when
    /// the move over the range ends.
    pub(crate) fn forget(&self, within: &Range<usize>) -> Vec<Range<usize>> {
        if !self.any_rare.load(R) {
            return Vec::new();
        }
        let mut rare = self.rare.lock();
        let mut taken = Vec::new();
        rare.detours.retain(|d| {
            let ours = overlap(&d.from, within) || overlap(&d.target(), within);
            if ours {
                taken.push(d.target());
            }
            !ours
        });
        rare.unmapped.retain(|r| !overlap(r, within));
        self.any_rare.store(!rare.is_empty(), R);
        taken
    }

    /// The pages of a range that are being given up (`None`: no page is).
    fn given_up(
        &self,
        range: &Range<usize>,
        is_missing: impl Fn(usize) -> bool,
    ) -> Result<Option<Bits>, Refused> {
        let mut rare = self.rare.lock();
        rare.quarantines.retain(|q| q.since.elapsed() < QUARANTINE && !is_missing(q.witness));
        self.any_rare.store(!rare.is_empty(), R);
        let left = rare.detours.iter().map(|d| &d.from).chain(&rare.unmapped);
        if left.clone().any(|r| overlap(r, range)) {
            return Err(Refused::Unmapped);
        }
        let mut gone = None;
        for quarantine in rare.quarantines.iter().filter(|q| overlap(&q.range, range)) {
            let gone = gone.get_or_insert([0; WORDS]);
            let pages = range.clone().step_by(self.page).enumerate();
            for (page, _) in pages.filter(|(_, addr)| quarantine.range.contains(addr)) {
                gone[page / 64] |= 1 << (page % 64);
            }
        }
        Ok(gone)
    }

    /// Takes the gate for the handler. Messages are read and acted on while this is held.
    pub(crate) fn handler(&self) -> Handling<'_> {
        Handling { _gate: self.gate.exclusive(), flights: self }
    }
}

/// The handler's side, with the gate held.
pub(crate) struct Handling<'a> {
    _gate: ExclusiveGuard<'a>,
    flights: &'a Flights,
}

impl Handling<'_> {
    /// Marks what the event says. For a fault, the verdict must be carried out before the gate
    /// is let go. `last_present` tells the last mapped page of a range.
    pub(crate) fn on(
        &self,
        event: Event,
        last_present: impl Fn(Range<usize>) -> Option<usize>,
    ) -> Option<(usize, Verdict)> {
        match event {
            Event::Fault { addr, protected, .. } => {
                let page = addr & !(self.flights.page - 1);
                Some((page, self.fault(page, protected)))
            }
            Event::Remove { start, end } => {
                self.mark_gone(&(start..end));
                if let Some(witness) = last_present(start..end) {
                    let since = Instant::now();
                    let mut rare = self.flights.rare.lock();
                    rare.quarantines.push(Quarantine { range: start..end, witness, since });
                    self.flights.any_rare.store(true, R);
                }
                None
            }
            Event::Unmap { start, end } => {
                self.mark_gone(&(start..end));
                self.flights.rare.lock().unmapped.push(start..end);
                self.flights.any_rare.store(true, R);
                None
            }
            Event::Remap { from, to, len } => {
                let mut rare = self.flights.rare.lock();
                let seq = self.flights.detours.fetch_add(1, R) + 1;
                rare.detours.push(Detour { seq, from: from..from + len, to });
                self.flights.any_rare.store(true, R);
                None
            }
        }
    }

    fn fault(&self, page: usize, protected: bool) -> Verdict {
        let mut home = page;
        let flight = self.flights.slots.iter().find(|flight| {
            home = self.origin_of(flight, page).unwrap_or(0);
            flight.range().contains(&home)
        });
        match flight {
            // Letting the writer go would mean to copy all of the folio again, in the hole, where
            // readers wait too. So it waits for the copy under way, and readers do not.
            Some(flight) if protected && flight.huge.load(R) => {
                flight.waiters.fetch_add(1, R);
                Verdict::Wait
            }
            Some(flight) if protected => {
                self.mark_dirty(flight, home);
                Verdict::Unprotect
            }
            Some(flight) if flight.hole().contains(&home) => {
                flight.waiters.fetch_add(1, R);
                Verdict::Wait
            }
            // It was not there to be protected, so its first content counts as a write.
            Some(flight) => {
                self.mark_dirty(flight, home);
                Verdict::FirstTouch
            }
            // Whoever opens a flight protects its pages afterwards, so this undoes nothing.
            None if protected => Verdict::Unprotect,
            None => Verdict::FirstTouch,
        }
    }

    fn mark_dirty(&self, flight: &Flight, home: usize) {
        let index = (home - flight.start.load(R)) / self.flights.page;
        flight.dirty[index / 64].fetch_or(1 << (index % 64), R);
    }

    /// The address that the page at `addr` had when the flight opened.
    fn origin_of(&self, flight: &Flight, addr: usize) -> Option<usize> {
        if !self.flights.any_rare.load(R) {
            return Some(addr);
        }
        self.flights.rare.lock().origin_of(flight.seq.load(R), addr)
    }

    fn mark_gone(&self, range: &Range<usize>) {
        let rare = self.flights.rare.lock();
        for flight in &self.flights.slots {
            let seq = flight.seq.load(R);
            let moved = rare.detours.iter().any(|d| d.seq > seq);
            if !moved && !overlap(&flight.range(), range) {
                continue;
            }
            for (index, addr) in flight.range().step_by(self.flights.page).enumerate() {
                let home = if moved { rare.home_of(seq, addr) } else { addr };
                if range.contains(&home) {
                    flight.gone[index / 64].fetch_or(1 << (index % 64), R);
                    flight.any_gone.store(true, R);
                }
            }
        }
    }
}

impl Flights {
    /// Bytes of the table.
    #[cfg(not(loom))]
    pub(crate) fn bookkeeping_bytes(&self) -> usize {
        self.slots.len() * size_of::<Flight>() + size_of::<Self>()
    }
}
