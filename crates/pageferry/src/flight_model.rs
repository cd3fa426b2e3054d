//! The protocol of [`crate::flight`], checked by loom against a model of the kernel.
//!
//! The model has what matters of the kernel: a page that is mapped, protected or missing; threads
//! that look at it, then queue a message, then look once more before they sleep (so a message can
//! be read although nobody waits for it); events that hold off every change of the page table
//! until they are read; and `madvise`, which drops pages some time after its event was read. Each
//! call is atomic, as the page-table lock makes it. The mover and the handler make the calls that
//! `berth` and `handler` make, in the same order and under the same locks.
//!
//! Every property has a counterpart that must fail: the same model with one step of the protocol
//! out of its place ([`Flaw`]). So it is known that the model can see what it is there to see.

use crate::flight::{FlightId, Flights, Refused, Verdict, bit};
use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
use loom::thread;
use pageferry_sys::uffd::Event;
use std::collections::VecDeque;
use std::ops::Range;

const PAGE: usize = 4096;
/// Address of page 0; not 0, which means "no flight".
const BASE: usize = 1 << 20;
const PAGES: usize = 2;

fn address(page: usize) -> usize {
    BASE + page * PAGE
}
fn index(address: usize) -> usize {
    (address - BASE) / PAGE
}
fn range(pages: Range<usize>) -> Range<usize> {
    address(pages.start)..address(pages.end)
}

/// A step of the protocol that is out of its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    /// The handler lifts the protection and marks the page after it has let go of the gate.
    MarksOutsideGate,
    /// The handler marks under the gate, and lifts the protection after it has let go of it.
    LiftsOutsideGate,
    /// The mover reads the marks before it detaches.
    ReadsMarksEarly,
    /// The mover detaches before it widens the hole.
    WidensLate,
    /// The handler reads messages before it takes the gate.
    ReadsOutsideGate,
    /// Attach does not look for what was given up.
    IgnoresGone,
    /// Flights open in a range that is being given up.
    IgnoresQuarantine,
}

#[derive(Clone, Copy, Debug, Default)]
struct Page {
    word: Option<u64>,
    protected: bool,
}

#[derive(Debug, Default)]
struct State {
    pages: [Page; PAGES],
    /// Where detached pages are.
    slots: [Option<u64>; PAGES],
    /// Messages not yet read, with the number of their sender.
    queue: VecDeque<(usize, Event)>,
    /// Who sleeps at which page.
    asleep: Vec<(usize, usize)>,
    senders: usize,
    /// Events under way (`mmap_changing`).
    changing: usize,
    stop: bool,
}

impl State {
    /// What an access would have to wait for.
    fn fault(&self, page: usize, write: bool) -> Option<Event> {
        let Page { word, protected } = self.pages[page];
        let addr = address(page);
        match word {
            None => Some(Event::Fault { addr, write, protected: false }),
            Some(_) if write && protected => Some(Event::Fault { addr, write, protected }),
            Some(_) => None,
        }
    }
}

/// `EAGAIN`: an event waits to be read.
#[derive(Debug)]
struct Again;

#[derive(Debug, Default)]
struct Kernel {
    state: Mutex<State>,
    changed: Condvar,
}

impl Kernel {
    fn new(words: [Option<u64>; PAGES]) -> Self {
        let pages = words.map(|word| Page { word, protected: false });
        Self { state: Mutex::new(State { pages, ..State::default() }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics here")
    }
    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).expect("no thread panics here")
    }

    /// A load, or a store of `write`, by the program; returns what is there afterwards.
    fn access(&self, page: usize, write: Option<u64>) -> u64 {
        loop {
            let mut state = self.lock();
            let Some(event) = state.fault(page, write.is_some()) else {
                let word = write.or(state.pages[page].word);
                state.pages[page].word = word;
                return word.expect("mapped, or it would fault");
            };
            drop(state);
            let mut state = self.lock();
            state.senders += 1;
            let me = state.senders;
            state.queue.push_back((me, event));
            state.asleep.push((me, page));
            self.changed.notify_all();
            drop(state);
            // The message can be read here, before it turns out that nobody waits.
            let mut state = self.lock();
            if state.fault(page, write.is_some()).is_some() {
                while state.asleep.iter().any(|(who, _)| *who == me) {
                    state = self.wait(state);
                }
            }
            state.asleep.retain(|(who, _)| *who != me);
            state.queue.retain(|(who, _)| *who != me);
        }
    }

    /// `madvise(MADV_DONTNEED)`.
    fn discard(&self, page: usize) {
        let mut state = self.lock();
        state.changing += 1;
        state.senders += 1;
        let me = state.senders;
        let Range { start, end } = range(page..page + 1);
        state.queue.push_back((me, Event::Remove { start, end }));
        self.changed.notify_all();
        while state.queue.iter().any(|(who, _)| *who == me) {
            state = self.wait(state);
        }
        state.changing -= 1;
        self.changed.notify_all();
        drop(state);
        self.lock().pages[page] = Page::default();
    }

    /// Waits until no event is under way: what the engine's back-off does.
    fn settle(&self) {
        let mut state = self.lock();
        while state.changing > 0 {
            state = self.wait(state);
        }
    }

    fn read(&self) -> Vec<Event> {
        let mut state = self.lock();
        let read = state.queue.drain(..).map(|(_, event)| event).collect();
        self.changed.notify_all();
        read
    }

    fn wake_in(&self, state: &mut State, page: usize) {
        let State { asleep, queue, .. } = state;
        asleep.retain(|&(who, at)| {
            if at == page {
                // Whoever is woken takes its message back.
                queue.retain(|(sender, _)| *sender != who);
            }
            at != page
        });
        self.changed.notify_all();
    }

    fn wake(&self, page: usize) {
        self.wake_in(&mut self.lock(), page);
    }

    fn protect(&self, page: usize, on: bool) -> Result<(), Again> {
        let mut state = self.lock();
        if state.changing > 0 {
            return Err(Again);
        }
        if state.pages[page].word.is_some() {
            state.pages[page].protected = on;
        }
        if !on {
            self.wake_in(&mut state, page);
        }
        Ok(())
    }

    /// False also where something is there already (`EEXIST`).
    fn put(&self, page: usize, word: u64) -> Result<bool, Again> {
        let mut state = self.lock();
        if state.changing > 0 {
            return Err(Again);
        }
        if state.pages[page].word.is_some() {
            return Ok(false);
        }
        state.pages[page] = Page { word: Some(word), protected: false };
        self.wake_in(&mut state, page);
        Ok(true)
    }

    /// Moves the page to its slot; false if nothing is there (`ENOENT`).
    fn detach(&self, page: usize) -> Result<bool, Again> {
        let mut state = self.lock();
        if state.changing > 0 {
            return Err(Again);
        }
        let Some(word) = state.pages[page].word else { return Ok(false) };
        state.slots[page] = Some(word);
        state.pages[page] = Page::default();
        Ok(true)
    }

    fn look(&self, page: usize) -> Option<u64> {
        self.lock().pages[page].word
    }
    fn slot(&self, page: usize) -> u64 {
        self.lock().slots[page].expect("detached before")
    }
    fn is_missing(&self, address: usize) -> bool {
        self.look(index(address)).is_none()
    }
}

/// Makes a call until no event is in its way.
fn until_done<T>(kernel: &Kernel, call: impl Fn() -> Result<T, Again>) -> T {
    loop {
        match call() {
            Ok(done) => return done,
            Err(Again) => kernel.settle(),
        }
    }
}

/// What the handler's thread does ([`crate::handler`]).
fn handle(kernel: &Kernel, flights: &Flights, flaw: Flaw) {
    loop {
        let mut state = kernel.lock();
        while state.queue.is_empty() && !state.stop {
            state = kernel.wait(state);
        }
        if state.queue.is_empty() {
            return;
        }
        drop(state);
        let early = (flaw == Flaw::ReadsOutsideGate).then(|| kernel.read());
        let mut handling = Some(flights.handler());
        for event in early.unwrap_or_else(|| kernel.read()) {
            let gate = handling.take().unwrap_or_else(|| flights.handler());
            let last = |r: Range<usize>| r.step_by(PAGE).filter(|a| !kernel.is_missing(*a)).last();
            if let (Flaw::MarksOutsideGate, Event::Fault { addr, protected: true, .. }) =
                (flaw, event)
            {
                let lifted = kernel.protect(index(addr), false);
                drop(gate);
                if lifted.is_err() {
                    kernel.wake(index(addr));
                }
                flights.handler().on(event, last);
                continue;
            }
            let told = gate.on(event, last);
            if flaw != Flaw::LiftsOutsideGate {
                handling = Some(gate);
            } else {
                drop(gate);
            }
            let Some((addr, verdict)) = told else { continue };
            let page = index(addr);
            let resolved = match verdict {
                Verdict::Wait => continue,
                Verdict::Unprotect => kernel.protect(page, false).is_ok(),
                Verdict::FirstTouch => kernel.put(page, 0).is_ok_and(|done| done),
            };
            if !resolved {
                kernel.wake(page);
            }
        }
    }
}

/// One live transaction over `pages` ([`crate::berth`]).
fn transact(kernel: &Kernel, flights: &Flights, pages: Range<usize>, flaw: Flaw) {
    let missing = |address| flaw == Flaw::IgnoresQuarantine || kernel.is_missing(address);
    let flight = match flights.open(range(pages.clone()), false, missing) {
        Ok(flight) => flight,
        Err(Refused::Full) => unreachable!("there are as many places as movers"),
        Err(_) => return,
    };
    for page in pages.clone() {
        until_done(kernel, || kernel.protect(page, true));
    }
    let copies: Vec<_> = pages.clone().map(|page| kernel.look(page)).collect();
    let early = flights.dirty(&flight);
    if flaw != Flaw::WidensLate {
        flights.widen(&flight, range(pages.clone()));
    }
    let out: Vec<_> =
        pages.clone().map(|page| until_done(kernel, || kernel.detach(page))).collect();
    if flaw == Flaw::WidensLate {
        flights.widen(&flight, range(pages.clone()));
    }
    let dirty = if flaw == Flaw::ReadsMarksEarly { early } else { flights.dirty(&flight) };
    for (i, page) in pages.clone().enumerate() {
        if !out[i] {
            continue;
        }
        let word = match copies[i] {
            Some(copy) if !bit(&dirty, i) => copy,
            _ => kernel.slot(page),
        };
        until_done(kernel, || attach(kernel, flights, &flight, (i, page), word, flaw));
    }
    if flights.close(flight) {
        pages.for_each(|page| kernel.wake(page));
    }
}

fn attach(
    kernel: &Kernel,
    flights: &Flights,
    flight: &FlightId,
    (i, page): (usize, usize),
    word: u64,
    flaw: Flaw,
) -> Result<(), Again> {
    flights.with_gone(flight, |gone| {
        let given_up = gone.is_some_and(|gone| bit(gone, i)) && flaw != Flaw::IgnoresGone;
        if given_up { Ok(()) } else { kernel.put(page, word).map(drop) }
    })
}

/// Runs `program` beside the handler and a mover that moves `pages` `times` times; what the
/// program returns, and the words at the end, go to `check`.
fn model<T: Send + 'static>(
    words: [Option<u64>; PAGES],
    pages: Range<usize>,
    times: usize,
    flaw: Flaw,
    program: fn(&Kernel) -> T,
    check: fn(T, [Option<u64>; PAGES]),
) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(2);
    builder.max_branches = 20_000;
    builder.check(move || {
        let kernel = Arc::new(Kernel::new(words));
        let flights = Arc::new(Flights::new(1, PAGE));
        let handler = thread::spawn({
            let (kernel, flights) = (Arc::clone(&kernel), Arc::clone(&flights));
            move || handle(&kernel, &flights, flaw)
        });
        let program = thread::spawn({
            let kernel = Arc::clone(&kernel);
            move || program(&kernel)
        });
        for _ in 0..times {
            transact(&kernel, &flights, pages.clone(), flaw);
        }
        let result = program.join().expect("the program does not panic");
        kernel.lock().stop = true;
        kernel.changed.notify_all();
        handler.join().expect("the handler does not panic");
        check(result, std::array::from_fn(|page| kernel.look(page)));
    });
}

const OLD: u64 = 7;
const NEW: u64 = 8;

/// 1 and 2: a write during one or two transactions stays.
fn writes(times: usize, flaw: Flaw) {
    let write = |kernel: &Kernel| {
        kernel.access(0, Some(NEW));
        kernel.access(0, None)
    };
    model([Some(OLD), None], 0..1, times, flaw, write, |read, words| {
        assert_eq!(read, NEW, "lost write: read");
        assert_eq!(words[0], Some(NEW), "lost write: at the end");
    });
}

#[test]
fn no_write_is_lost() {
    writes(1, Flaw::None);
}

#[test]
fn no_write_is_lost_by_a_message_of_the_transaction_before() {
    writes(2, Flaw::None);
}

#[test]
#[should_panic(expected = "lost write")]
fn a_mark_made_outside_the_gate_loses_a_write() {
    writes(1, Flaw::MarksOutsideGate);
}

#[test]
#[should_panic(expected = "lost write")]
fn protection_lifted_outside_the_gate_loses_a_write_of_the_next_transaction() {
    writes(2, Flaw::LiftsOutsideGate);
}

#[test]
#[should_panic(expected = "lost write")]
fn marks_read_before_detach_lose_a_write() {
    writes(1, Flaw::ReadsMarksEarly);
}

/// 3: page 0 has data and moves, page 1 was never touched; both are read meanwhile.
fn touches(flaw: Flaw) {
    let read = |kernel: &Kernel| (kernel.access(0, None), kernel.access(1, None));
    model([Some(OLD), None], 0..2, 1, flaw, read, |(old, new), words| {
        assert_eq!((old, words[0]), (OLD, Some(OLD)), "a zero page over data");
        assert_eq!((new, words[1]), (0, Some(0)), "a first touch gives zero");
    });
}

#[test]
fn a_hole_is_waited_for_and_a_first_touch_is_filled() {
    touches(Flaw::None);
}

#[test]
#[should_panic(expected = "a zero page over data")]
fn a_hole_that_is_widened_late_is_taken_for_a_first_touch() {
    touches(Flaw::WidensLate);
}

/// 4: what `madvise` has dropped reads as zero from then on.
fn discards(times: usize, flaw: Flaw) {
    let discard = |kernel: &Kernel| {
        kernel.discard(0);
        kernel.access(0, None)
    };
    model([Some(OLD), None], 0..1, times, flaw, discard, |read, words| {
        assert_eq!((read, words[0]), (0, Some(0)), "old data came back");
    });
}

#[test]
fn what_the_program_gives_up_stays_given_up() {
    discards(1, Flaw::None);
}

#[test]
fn what_the_program_gives_up_stays_given_up_when_the_next_transaction_begins() {
    discards(2, Flaw::None);
}

#[test]
#[should_panic(expected = "old data came back")]
fn an_attach_that_does_not_look_for_what_was_given_up_brings_it_back() {
    discards(1, Flaw::IgnoresGone);
}

#[test]
#[should_panic(expected = "old data came back")]
fn messages_read_before_the_gate_is_taken_bring_back_what_was_given_up() {
    discards(1, Flaw::ReadsOutsideGate);
}

#[test]
#[should_panic(expected = "old data came back")]
fn a_flight_in_a_range_that_is_being_given_up_brings_it_back() {
    discards(1, Flaw::IgnoresQuarantine);
}

/// A write after `madvise` is as good as any other.
#[test]
fn what_is_written_after_a_discard_stays() {
    let rewrite = |kernel: &Kernel| {
        kernel.discard(0);
        kernel.access(0, Some(NEW));
        kernel.access(0, None)
    };
    model([Some(OLD), None], 0..1, 1, Flaw::None, rewrite, |read, words| {
        assert_eq!((read, words[0]), (NEW, Some(NEW)), "lost write");
    });
}
