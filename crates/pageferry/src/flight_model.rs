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
use kernel::{Again, Kernel, PAGE, PAGES, index, range};
use loom::sync::Arc;
use loom::thread;
use pageferry_sys::uffd::Event;
use std::ops::Range;

mod kernel;
mod registration;

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
    /// What was given up before the hole was widened is detached all the same.
    DetachesGivenUp,
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
            let last = |r: Range<usize>, each: &mut dyn FnMut(Range<usize>, usize)| {
                let there = r.clone().step_by(PAGE).filter(|a| !kernel.is_missing(*a)).last();
                there.into_iter().for_each(|witness| each(r.clone(), witness));
            };
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
                Verdict::FirstTouch(_) => kernel.put(page, 0).is_ok_and(|done| done),
            };
            if !resolved {
                kernel.wake(page);
            }
        }
    }
}

/// Where the mover copies for long, so that the others run (which costs the checker no preemption).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copying {
    Nowhere,
    /// As in live order.
    BeforeTheHole,
    /// As in frozen order, and in repair.
    InTheHole,
}

/// One live transaction over `pages` ([`crate::berth`]).
fn transact(kernel: &Kernel, flights: &Flights, pages: Range<usize>, copying: Copying, flaw: Flaw) {
    let missing = |address| flaw == Flaw::IgnoresQuarantine || kernel.is_missing(address);
    let flight = match flights.open(range(pages.clone()), false, missing) {
        Ok(opened) => opened.id,
        Err(Refused::Full) => unreachable!("there are as many places as movers"),
        Err(_) => return,
    };
    for page in pages.clone() {
        until_done(kernel, || kernel.protect(page, true));
    }
    let copies: Vec<_> = pages.clone().map(|page| kernel.look(page)).collect();
    if copying == Copying::BeforeTheHole {
        thread::yield_now();
    }
    let early = flights.dirty(&flight);
    let mut given_up = None;
    if flaw != Flaw::WidensLate {
        given_up = flights.widen(&flight, range(pages.clone()));
    }
    if flaw == Flaw::DetachesGivenUp {
        given_up = None;
    }
    let detach = |(i, page)| match given_up {
        Some(bits) if bit(&bits, i) => false,
        _ => until_done(kernel, || kernel.detach(page)),
    };
    let out: Vec<_> = pages.clone().enumerate().map(detach).collect();
    if flaw == Flaw::WidensLate {
        flights.widen(&flight, range(pages.clone()));
    }
    if copying == Copying::InTheHole {
        thread::yield_now();
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
    let everywhere = [Copying::BeforeTheHole, Copying::InTheHole, Copying::Nowhere];
    // Two transactions have many interleavings: the likeliest to go wrong.
    for copying in everywhere.into_iter().take(if times == 1 { 3 } else { 1 }) {
        explore(words, pages.clone(), times, copying, flaw, program, check);
    }
}

fn explore<T: Send + 'static>(
    words: [Option<u64>; PAGES],
    pages: Range<usize>,
    times: usize,
    copying: Copying,
    flaw: Flaw,
    program: fn(&Kernel) -> T,
    check: fn(T, [Option<u64>; PAGES]),
) {
    let mut builder = loom::model::Builder::new();
    // Enough for each flaw to be found; `LOOM_MAX_PREEMPTIONS` sets another.
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
            transact(&kernel, &flights, pages.clone(), copying, flaw);
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

/// A page that was not there when the flight was protected is not protected: its first touch
/// counts as a write.
#[test]
fn a_first_write_during_the_copy_stays() {
    let write = |kernel: &Kernel| {
        kernel.access(0, Some(OLD));
        kernel.access(0, Some(NEW));
        kernel.access(0, None)
    };
    model([None, None], 0..1, 1, Flaw::None, write, |read, words| {
        assert_eq!((read, words[0]), (NEW, Some(NEW)), "lost write");
    });
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

/// The next flight takes the page beside it along.
#[test]
fn a_page_beside_one_that_is_being_given_up_keeps_its_content() {
    let discard = |kernel: &Kernel| {
        kernel.discard(0);
        (kernel.access(0, None), kernel.access(1, None))
    };
    model([Some(OLD), Some(NEW)], 0..2, 2, Flaw::None, discard, |read, words| {
        assert_eq!((read.0, words[0]), (0, Some(0)), "old data came back");
        assert_eq!((read.1, words[1]), (NEW, Some(NEW)), "lost write");
    });
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
fn rewrites(flaw: Flaw) {
    let rewrite = |kernel: &Kernel| {
        kernel.discard(0);
        kernel.access(0, Some(NEW));
        kernel.access(0, None)
    };
    model([Some(OLD), None], 0..1, 1, flaw, rewrite, |read, words| {
        assert_eq!((read, words[0]), (NEW, Some(NEW)), "lost write");
    });
}

#[test]
fn what_is_written_after_a_discard_stays() {
    rewrites(Flaw::None);
}

#[test]
#[should_panic(expected = "lost write")]
fn new_content_of_a_page_given_up_before_the_hole_is_lost_if_it_is_detached() {
    rewrites(Flaw::DetachesGivenUp);
}
