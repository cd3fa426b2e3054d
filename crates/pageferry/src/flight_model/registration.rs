//! What is registered, and what of it is ours: [`crate::registered`] against a program that unmaps
//! memory and maps something else there, at any moment.
//!
//! The model has two pages. The second one is moved; a neighbour's move has the first and ends
//! meanwhile. The kernel tells of an unmap only if the page was registered then; it refuses to
//! answer, and to take pages, from the unmap until the thread that did it has run again.

use super::kernel::{PAGE, range};
use crate::flight::{Flights, bit};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use pageferry_sys::uffd::Event;

/// A step of the protocol that is left out, or out of its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    /// What was asked to be registered counts as registered.
    BelievesRegister,
    /// What had been told is looked up after the question, not before it.
    LooksLate,
    /// The end of the neighbour's move forgets all of an event that concerned it.
    ForgetsWhole,
}

#[derive(Debug, Default)]
struct State {
    mapped: bool,
    registered: bool,
    changing: usize,
    queue: Vec<(usize, usize)>,
    stop: bool,
}

#[derive(Debug)]
struct Kernel {
    state: Mutex<State>,
    changed: Condvar,
}

/// `EAGAIN`.
struct Again;

impl Kernel {
    fn register(&self) {
        let mut state = self.state.lock().expect("no panic");
        state.registered = state.mapped;
    }

    fn is_registered(&self) -> Result<bool, Again> {
        let state = self.state.lock().expect("no panic");
        if state.changing > 0 { Err(Again) } else { Ok(state.registered) }
    }

    /// `UFFDIO_MOVE` out of the page.
    fn take(&self) -> Result<(), Again> {
        let state = self.state.lock().expect("no panic");
        if state.changing > 0 {
            return Err(Again);
        }
        assert!(!state.mapped || state.registered, "taken, where nobody waits for it");
        Ok(())
    }

    /// `munmap` of both pages, and something else mapped there.
    fn map_anew(&self) {
        let mut state = self.state.lock().expect("no panic");
        state.mapped = false;
        if std::mem::take(&mut state.registered) {
            state.changing += 1;
            drop(state);
            state = self.state.lock().expect("no panic");
            let both = range(0..2);
            state.queue.push((both.start, both.end));
            self.changed.notify_all();
            while !state.queue.is_empty() {
                state = self.changed.wait(state).expect("no panic");
            }
            state.changing -= 1;
            self.changed.notify_all();
        }
        drop(state);
        self.state.lock().expect("no panic").mapped = true;
    }

    fn settle(&self) {
        let mut state = self.state.lock().expect("no panic");
        while state.changing > 0 {
            state = self.changed.wait(state).expect("no panic");
        }
    }

    fn handle(&self, flights: &Flights) {
        loop {
            let mut state = self.state.lock().expect("no panic");
            while state.queue.is_empty() && !state.stop {
                state = self.changed.wait(state).expect("no panic");
            }
            if state.queue.is_empty() {
                return;
            }
            drop(state);
            let handling = flights.handler();
            let read = std::mem::take(&mut self.state.lock().expect("no panic").queue);
            self.changed.notify_all();
            for (start, end) in read {
                handling.on(Event::Unmap { start, end }, |_, _| {});
            }
        }
    }
}

fn transact(kernel: &Kernel, flights: &Flights, flaw: Flaw) {
    let page = range(1..2);
    flights.watch(page.clone());
    kernel.register();
    loop {
        let mut until = flights.events();
        let told = match kernel.is_registered() {
            Ok(_) if flaw == Flaw::BelievesRegister => Ok(true),
            told => told,
        };
        if flaw == Flaw::LooksLate {
            until = flights.events();
        }
        match told {
            Ok(true) => break flights.note_registered(&page, until),
            Ok(false) => break flights.note_unmapped(&page),
            Err(Again) => kernel.settle(),
        }
    }
    let Ok(opened) = flights.open(page.clone(), false, |_| false) else { return };
    flights.widen(&opened.id, page);
    loop {
        let taken = flights.with_gone(&opened.id, |gone| match gone {
            Some(gone) if bit(gone, 0) => Ok(()),
            _ => kernel.take(),
        });
        match taken {
            Ok(()) => break,
            Err(Again) => kernel.settle(),
        }
    }
    flights.close(opened.id);
}

fn explore(flaw: Flaw, neighbour: bool) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(2);
    builder.max_branches = 20_000;
    builder.check(move || {
        let state = State { mapped: true, ..State::default() };
        let kernel = Arc::new(Kernel { state: Mutex::new(state), changed: Condvar::new() });
        let flights = Arc::new(Flights::new(1, PAGE));
        let spawn = |body: fn(&Kernel, &Flights, Flaw)| {
            let (kernel, flights) = (Arc::clone(&kernel), Arc::clone(&flights));
            thread::spawn(move || body(&kernel, &flights, flaw))
        };
        if neighbour {
            flights.watch(range(0..1));
        }
        let handler = spawn(|kernel, flights, _| kernel.handle(flights));
        let program = spawn(|kernel, _, _| kernel.map_anew());
        let ending = neighbour.then(|| {
            spawn(|_, flights, flaw| {
                if flaw == Flaw::ForgetsWhole {
                    flights.note_registered(&range(0..2), usize::MAX);
                }
                flights.unwatch(&range(0..1));
            })
        });
        transact(&kernel, &flights, flaw);
        program.join().expect("no panic");
        if let Some(ending) = ending {
            ending.join().expect("no panic");
        }
        kernel.state.lock().expect("no panic").stop = true;
        kernel.changed.notify_all();
        handler.join().expect("no panic");
    });
}

#[test]
fn what_is_mapped_anew_is_not_taken() {
    explore(Flaw::None, false);
}

#[test]
fn what_is_mapped_anew_is_not_taken_while_a_neighbour_ends() {
    explore(Flaw::None, true);
}

#[test]
#[should_panic(expected = "taken, where nobody waits for it")]
fn what_was_not_seen_to_be_registered_is_taken() {
    explore(Flaw::BelievesRegister, false);
}

#[test]
#[should_panic(expected = "taken, where nobody waits for it")]
fn an_event_after_the_question_is_forgotten_if_it_is_looked_up_late() {
    explore(Flaw::LooksLate, false);
}

#[test]
#[should_panic(expected = "taken, where nobody waits for it")]
fn what_a_neighbour_forgets_of_others_is_taken() {
    explore(Flaw::ForgetsWhole, true);
}
