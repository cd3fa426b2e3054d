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
//!    huge folio waits until the folio is in its new place.) A page that `mremap` takes elsewhere
//!    counts as written: it may not have been there to be protected.
//! 2. *A stale message does no harm.* A message about a flight that has ended finds either no
//!    flight (then nothing is protected: a flight protects its pages only once it is open) or the
//!    flight that holds the page now (the page is marked dirty *there* before its protection is
//!    lifted).
//! 3. *A hole is told from a first touch.* The hole is widened before detach begins, under the
//!    gate; so a missing page outside every hole has really never been there, and the handler
//!    may fill it, because nobody can begin to detach it before the handler lets go of the gate.
//! 4. *What the program unmaps is not touched.* From an unmap until its event is read the kernel
//!    refuses every `UFFDIO_MOVE` (and on until the thread that unmapped has run again); once it
//!    was read, the mark does: detach and attach look at it under the gate, and no flight takes
//!    those pages.
//! 5. *What the program gives up stays given up.* `madvise(MADV_DONTNEED)` waits until its event
//!    is read; the handler marks the pages gone before it lets go of the gate; attach checks the
//!    marks and moves pages in under the gate; a page that is marked before the hole is widened
//!    over it is not detached at all, since what is there by then may be new. So an attach comes either before the event is read
//!    (and the pages are dropped after it) or after the mark (and skips them). Pages of the range
//!    that were *not* in the air could be detached between the event and the drop: a *quarantine*
//!    (`notes`) keeps them, marked gone from the start, out of new flights until the drop is seen to be done.
//!
//! Loom checks 1 to 5 (`flight_model`, under `--cfg loom`).

mod notes;

use crate::sync::{
    AtomicBool, AtomicU32, AtomicU64, AtomicUsize, ExclusiveGuard, Gate, Mutex, Ordering,
};
use crate::units::{HUGE, overlap};
use notes::Notes;
use pageferry_sys::uffd::Event;
use std::ops::Range;

/// Pages in one flight at most: a 2 MiB block of 4 KiB pages. Fewer for the model checker, which
/// looks at every word.
pub(crate) const MAX_PAGES: usize = if cfg!(loom) { 64 } else { 512 };
const WORDS: usize = MAX_PAGES / 64;

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
    /// Events there had been when it opened: only later detours took its pages along.
    since: AtomicUsize,
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

/// What the handler must do about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The page is in a hole, or part of a huge folio under copy: its waiter is woken by attach.
    Wait,
    /// Lift the protection; the page was marked dirty if it is in the air.
    Unprotect,
    /// The page was never there: give it its first content, and those after it that are not there
    /// either. Up to this address no flight has a page, so that one call can fill them all.
    FirstTouch(usize),
}

/// Why a flight cannot open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The range, or part of its huge folio, is being given up by the program.
    Quarantined,
    /// The range was unmapped or moved away since the move began; whatever is mapped there now is
    /// not ours.
    Unmapped,
    /// A part of a huge folio was: the rest is base pages by now.
    Torn,
    /// All places are taken.
    Full,
}

/// An open flight; closed by [`Flights::close`].
#[derive(Debug)]
pub(crate) struct FlightId(usize);

/// What [`Flights::open`] gives.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) id: FlightId,
    /// Pages of the range that were unmapped or moved away since the move began.
    pub(crate) left: Option<Bits>,
}

/// All flights of an engine.
#[derive(Debug)]
pub(crate) struct Flights {
    gate: Gate,
    slots: Box<[Flight]>,
    page: usize,
    /// One past the highest slot that was ever used.
    high: AtomicUsize,
    notes: Mutex<Notes>,
    /// Events that unmapped or moved something, so far.
    events: AtomicUsize,
    /// Looks of the housekeeper, so far ([`Flights::look`]).
    looks: AtomicU32,
    /// Set while `notes` holds anything, so that the common path does not lock it.
    any_notes: AtomicBool,
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
            high: AtomicUsize::new(0),
            notes: Mutex::new(Notes::with_room()),
            events: AtomicUsize::new(0),
            looks: AtomicU32::new(0),
            any_notes: AtomicBool::new(false),
        }
    }

    /// The slots that were ever used.
    fn used(&self) -> &[Flight] {
        &self.slots[..self.high.load(R)]
    }

    /// Opens a flight over `range` (at most [`MAX_PAGES`] pages) without a hole. Pages that are
    /// being given up or have left are marked as such; a huge folio with any does not fly.
    ///
    /// `is_missing` tells whether nothing is mapped at a page; it is asked only about a range
    /// that was given up a moment ago.
    pub(crate) fn open(
        &self,
        range: Range<usize>,
        huge: bool,
        is_missing: impl Fn(usize) -> bool,
    ) -> Result<Opened, Refused> {
        debug_assert!(range.len() <= MAX_PAGES * self.page);
        let _shared = self.gate.shared();
        let (mut gone, mut left) = (None, None);
        if self.any_notes.load(R) {
            let mut notes = self.notes.lock();
            left = notes.gone(&range, self.page);
            gone = notes.given_up(&range, self.page, self.looks.load(R), is_missing);
            self.any_notes.store(!notes.is_empty(), R);
        }
        let all = |bits: &Bits| (0..range.len() / self.page).all(|page| bit(bits, page));
        if let Some(bits) = &left {
            if all(bits) {
                return Err(Refused::Unmapped);
            }
            if huge {
                return Err(Refused::Torn);
            }
            let gone = gone.get_or_insert([0; WORDS]);
            gone.iter_mut().zip(bits).for_each(|(gone, left)| *gone |= left);
        }
        if gone.as_ref().is_some_and(|gone| huge || all(gone)) {
            return Err(Refused::Quarantined);
        }
        for (index, flight) in self.slots.iter().enumerate() {
            // `start` claims the slot: several conductors hold the gate at once. Acquire pairs
            // with the release in `close`.
            let claim =
                flight.start.compare_exchange(0, range.start, Ordering::Acquire, Ordering::Relaxed);
            if claim.is_ok() {
                self.high.fetch_max(index + 1, R);
                flight.hole_start.store(range.start, R);
                flight.hole_end.store(range.start, R);
                flight.waiters.store(0, R);
                flight.any_gone.store(gone.is_some(), R);
                flight.huge.store(huge, R);
                flight.since.store(self.events.load(R), R);
                flight.dirty.iter().for_each(|word| word.store(0, R));
                for (word, bits) in flight.gone.iter().zip(gone.unwrap_or([0; WORDS])) {
                    word.store(bits, R);
                }
                flight.end.store(range.end, R);
                return Ok(Opened { id: FlightId(index), left });
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
        if !self.any_notes.load(R) {
            return addr;
        }
        self.notes.lock().home_of(self.slots[id.0].since.load(R), addr)
    }

    /// The same where nothing was found: two calls of `mremap` may have been told in the wrong
    /// order.
    pub(crate) fn home_in_any_order(&self, id: &FlightId, addr: usize) -> usize {
        if !self.any_notes.load(R) {
            return addr;
        }
        self.notes.lock().home_in_any_order(self.slots[id.0].since.load(R), addr)
    }

    /// Whether pages of the flight may belong elsewhere ([`Flights::home_of`]).
    pub(crate) fn has_detours(&self, id: &FlightId) -> bool {
        let since = self.slots[id.0].since.load(R);
        self.any_notes.load(R) && self.notes.lock().has_detours(since)
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

    /// Makes room for more notes. The allocator is not waited for while the gate or the notes are
    /// held: whoever holds its lock may wait for the handler. (Not modelled: it changes no note.)
    #[cfg(not(loom))]
    fn make_room(&self) {
        let wanted = self.notes.lock().wanted();
        if let Some(room) = wanted {
            let mut larger = Notes::with(room);
            self.notes.lock().take_room(&mut larger);
        }
    }
    #[cfg(loom)]
    fn make_room(&self) {}

    /// A move has `range` registered from now on: what the program does to it is noted.
    pub(crate) fn watch(&self, range: Range<usize>) {
        self.make_room();
        let _shared = self.gate.shared();
        self.notes.lock().watch(range);
    }

    /// The number of the last event that was acted on. All that were read before this is called
    /// have been.
    pub(crate) fn events(&self) -> usize {
        let _shared = self.gate.shared();
        self.events.load(R)
    }

    /// `range` was seen to be registered when event number `until` had been acted on: what that
    /// event and those before it told is no longer so.
    pub(crate) fn note_registered(&self, range: &Range<usize>, until: usize) {
        let _shared = self.gate.shared();
        let mut notes = self.notes.lock();
        notes.return_(range, until);
        self.any_notes.store(!notes.is_empty(), R);
    }

    /// Nothing is mapped at `range`, or nothing of ours: no flight opens over it.
    pub(crate) fn note_unmapped(&self, range: &Range<usize>) {
        self.make_room();
        let _shared = self.gate.shared();
        let event = self.events.fetch_add(1, R) + 1;
        self.notes.lock().leave(range, event);
        self.any_notes.store(true, R);
    }

    /// A move over a range that it had registered ends. Returns what no other move has registered;
    /// of that, everything is forgotten.
    pub(crate) fn unwatch(&self, range: &Range<usize>) -> Vec<Range<usize>> {
        self.make_room();
        let mut parts = self.room_for_parts();
        let _shared = self.gate.shared();
        let mut notes = self.notes.lock();
        notes.unwatch(range, &mut parts);
        for part in &parts {
            notes.return_(part, usize::MAX);
        }
        self.any_notes.store(!notes.is_empty(), R);
        parts
    }

    /// The parts of a range that no move has registered, and where no page in the air is at home,
    /// by all events that were read before this is called.
    pub(crate) fn unwatched(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let mut parts = self.room_for_parts();
        let _shared = self.gate.shared();
        self.notes.lock().unwatched(range, &mut parts);
        parts
    }

    /// For the parts of a range, also if there are some more notes by then.
    fn room_for_parts(&self) -> Vec<Range<usize>> {
        let most = if cfg!(loom) { 0 } else { self.notes.lock().most_parts() };
        Vec::with_capacity(most + 64)
    }

    /// Where `mremap` took what was registered, as far as no open flight has a page there: to be
    /// unregistered.
    pub(crate) fn take_strays(&self) -> Vec<Range<usize>> {
        let count = self.notes.lock().strays();
        let mut strays = Vec::with_capacity(count);
        let _shared = self.gate.shared();
        let open = self.used().iter().filter(|flight| flight.start.load(R) != 0);
        let until = open.map(|flight| flight.since.load(R)).min().unwrap_or(usize::MAX);
        let mut notes = self.notes.lock();
        notes.end_detours(until, &mut strays);
        self.any_notes.store(!notes.is_empty(), R);
        strays
    }

    /// The housekeeper looks: see [`notes::LOOKS`]. True as long as there is something to look
    /// after.
    pub(crate) fn look(&self) -> bool {
        let looks = self.looks.fetch_add(1, R) + 1;
        self.make_room();
        let _shared = self.gate.shared();
        let mut notes = self.notes.lock();
        let held = notes.expire(looks);
        self.any_notes.store(!notes.is_empty(), R);
        held || notes.has_strays()
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
    /// is let go, or asked for again ([`Handling::judge`]). `last_present` calls its second
    /// argument with each part of a range, within one block, in which a page is mapped, and with
    /// the last such page.
    pub(crate) fn on(
        &self,
        event: Event,
        last_present: impl Fn(Range<usize>, &mut dyn FnMut(Range<usize>, usize)),
    ) -> Option<(usize, Verdict)> {
        match event {
            Event::Fault { addr, protected, .. } => {
                let page = addr & !(self.flights.page - 1);
                return Some((page, self.judge(page, protected)));
            }
            Event::Remove { start, end } => {
                self.mark_gone(&(start..end));
                let looks = self.flights.looks.load(R);
                let page = self.flights.page;
                last_present(start..end, &mut |part, witness| {
                    self.flights.notes.lock().quarantine(&part, witness, page, looks);
                });
            }
            Event::Unmap { start, end } => {
                self.mark_gone(&(start..end));
                let event = self.flights.events.fetch_add(1, R) + 1;
                self.flights.notes.lock().leave(&(start..end), event);
            }
            Event::Remap { from, to, len } => {
                // What is elsewhere is not protected with the others, and not copied.
                self.mark(&(from..from + len), |flight| &flight.dirty);
                let event = self.flights.events.fetch_add(1, R) + 1;
                self.flights.notes.lock().detour(from..from + len, to, event);
            }
        }
        self.flights.any_notes.store(!self.flights.notes.lock().is_empty(), R);
        None
    }

    /// What must be done about a fault now.
    pub(crate) fn judge(&self, page: usize, protected: bool) -> Verdict {
        let mut home = page;
        let flight = self.flights.used().iter().find(|flight| {
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
                Verdict::FirstTouch(page + self.flights.page)
            }
            // Whoever opens a flight protects its pages afterwards, so this undoes nothing.
            None if protected => Verdict::Unprotect,
            None => Verdict::FirstTouch(self.clear_until(page)),
        }
    }

    /// Up to where, from a page that no flight has, no flight has any.
    fn clear_until(&self, page: usize) -> usize {
        // Pages that are at home elsewhere are not looked for.
        if self.flights.any_notes.load(R) && self.flights.notes.lock().has_detours(0) {
            return page + self.flights.page;
        }
        let block = (page & !(HUGE - 1)) + HUGE;
        let next = self.flights.used().iter().map(Flight::range);
        next.filter(|r| !r.is_empty() && r.start > page).fold(block, |end, r| end.min(r.start))
    }

    fn mark_dirty(&self, flight: &Flight, home: usize) {
        let index = (home - flight.start.load(R)) / self.flights.page;
        flight.dirty[index / 64].fetch_or(1 << (index % 64), R);
    }

    /// The address that the page at `addr` had when the flight opened.
    fn origin_of(&self, flight: &Flight, addr: usize) -> Option<usize> {
        if !self.flights.any_notes.load(R) {
            return Some(addr);
        }
        self.flights.notes.lock().origin_of(flight.since.load(R), addr)
    }

    fn mark_gone(&self, range: &Range<usize>) {
        self.mark(range, |flight| {
            flight.any_gone.store(true, R);
            &flight.gone
        });
    }

    /// Marks the pages in the air that are at home in a range; `marks` is asked of each flight that
    /// has any.
    fn mark(&self, range: &Range<usize>, marks: impl Fn(&Flight) -> &[AtomicU64; WORDS]) {
        let notes = self.flights.notes.lock();
        for flight in self.flights.used() {
            let since = flight.since.load(R);
            let moved = notes.has_detours(since);
            if !moved && !overlap(&flight.range(), range) {
                continue;
            }
            for (index, addr) in flight.range().step_by(self.flights.page).enumerate() {
                let home = if moved { notes.home_of(since, addr) } else { addr };
                if range.contains(&home) {
                    marks(flight)[index / 64].fetch_or(1 << (index % 64), R);
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
