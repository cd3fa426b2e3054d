//! No page is in the air while the process forks.
//!
//! A fork between detach and attach would give the child a hole where the parent has data. So
//! everyone who opens a hole holds the [`ForkGate`] while it is open, and a fork closes it. The
//! forking thread waits for the holes under way, no longer: once it waits, no new hole opens but
//! for a thread that has one open already. A huge folio under copy counts as a hole, because its
//! writers wait: one of them may be a signal handler that interrupts the fork.
//!
//! The child inherits the gate closed and no thread that could open it: an engine does nothing in
//! a child (see [`crate::Engine`]).

use crate::sync::{AtomicUsize, Condvar, Mutex, Ordering};
use std::marker::PhantomData;

/// A fork waits for the gate, or has it; the bits below count the holds.
const CLOSING: usize = 1 << (usize::BITS - 1);

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct ForkGate {
    /// [`CLOSING`], and the number of holds.
    state: AtomicUsize,
    /// Held for a moment to sleep, to wake, and to change [`CLOSING`].
    changes: Mutex<()>,
    changed: Condvar,
}

impl ForkGate {
    pub(crate) fn new() -> Self {
        Self { state: AtomicUsize::new(0), changes: Mutex::new(()), changed: Condvar::new() }
    }

    /// Holds off forks until dropped; waits for one that waits or is under way.
    pub(crate) fn hold(&self) -> Held<'_> {
        self.enter(|state| state & CLOSING != 0)
    }

    /// Like [`ForkGate::hold`] for a thread that may hold it already: a fork that waits must not
    /// come between, or both would wait for each other. One that is under way is waited for; this
    /// thread holds nothing then.
    pub(crate) fn hold_again(&self) -> Held<'_> {
        self.enter(|state| state == CLOSING)
    }

    fn enter(&self, is_shut: impl Fn(usize) -> bool) -> Held<'_> {
        let mut state = self.state.load(Ordering::Relaxed);
        loop {
            if is_shut(state) {
                let mut changes = self.changes.lock();
                while is_shut(self.state.load(Ordering::Relaxed)) {
                    changes = self.changed.wait(changes);
                }
                state = self.state.load(Ordering::Relaxed);
                continue;
            }
            // Acquire: what a fork's handlers did before `open` has happened.
            let (done, failed) = (Ordering::Acquire, Ordering::Relaxed);
            match self.state.compare_exchange_weak(state, state + 1, done, failed) {
                Ok(_) => return Held { gate: self, thread: PhantomData },
                Err(now) => state = now,
            }
        }
    }

    /// Whether a fork waits, or a signal for this thread: whoever keeps the gate busy by several
    /// holes lets them all close.
    pub(crate) fn wanted(&self) -> bool {
        // Relaxed: a hint; `close` does the work.
        self.state.load(Ordering::Relaxed) & CLOSING != 0 || pageferry_sys::thread::is_called()
    }

    /// Waits until no hole is open, and keeps new ones from opening.
    pub(crate) fn close(&self) {
        let mut changes = self.changes.lock();
        // One fork at a time.
        while self.state.load(Ordering::Relaxed) & CLOSING != 0 {
            changes = self.changed.wait(changes);
        }
        self.state.fetch_or(CLOSING, Ordering::Relaxed);
        // Acquire: what was done under the holds has happened.
        while self.state.load(Ordering::Acquire) != CLOSING {
            changes = self.changed.wait(changes);
        }
    }

    /// Lets holes open again. Called by the thread that closed the gate.
    pub(crate) fn open(&self) {
        let _changes = self.changes.lock();
        self.state.fetch_and(!CLOSING, Ordering::Release);
        self.changed.notify_all();
    }
}

/// A fork waits while this lives, on the thread that took it.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    gate: &'a ForkGate,
    thread: PhantomData<*const ()>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Release: see `close`.
        if self.gate.state.fetch_sub(1, Ordering::Release) == CLOSING + 1 {
            // The fork looks at the count under this lock before it sleeps.
            let _changes = self.gate.changes.lock();
            self.gate.changed.notify_all();
        }
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use crate::sync::AtomicBool;
    use loom::sync::Arc;
    use loom::thread;

    struct World {
        gate: ForkGate,
        hole: AtomicBool,
    }

    impl World {
        fn fork(&self) {
            self.gate.close();
            assert!(!self.hole.load(Ordering::Relaxed), "forked with a hole open");
            self.gate.open();
        }
    }

    #[test]
    fn a_fork_meets_no_hole_and_nobody_waits_for_ever() {
        loom::model(|| {
            let world = Arc::new(World { gate: ForkGate::new(), hole: AtomicBool::new(false) });
            let theirs = Arc::clone(&world);
            let mover = thread::spawn(move || {
                for _ in 0..2 {
                    let first = theirs.gate.hold();
                    theirs.hole.store(true, Ordering::Relaxed);
                    let second = theirs.gate.hold_again();
                    drop(first);
                    theirs.hole.store(false, Ordering::Relaxed);
                    drop(second);
                }
            });
            world.fork();
            mover.join().expect("the mover");
        });
    }

    #[test]
    fn holding_again_with_nothing_held_waits_for_the_fork_that_is_under_way() {
        loom::model(|| {
            let world = Arc::new(World { gate: ForkGate::new(), hole: AtomicBool::new(false) });
            let theirs = Arc::clone(&world);
            let mover = thread::spawn(move || {
                let held = theirs.gate.hold_again();
                theirs.hole.store(true, Ordering::Relaxed);
                theirs.hole.store(false, Ordering::Relaxed);
                drop(held);
            });
            world.fork();
            mover.join().expect("the mover");
        });
    }

    #[test]
    fn two_forks_take_turns() {
        loom::model(|| {
            let world = Arc::new(World { gate: ForkGate::new(), hole: AtomicBool::new(false) });
            let theirs = Arc::clone(&world);
            let other = thread::spawn(move || theirs.fork());
            let held = world.gate.hold();
            world.hole.store(true, Ordering::Relaxed);
            world.hole.store(false, Ordering::Relaxed);
            drop(held);
            world.fork();
            other.join().expect("the other");
        });
    }
}
