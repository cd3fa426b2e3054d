//! No page is in the air while the process forks.
//!
//! A fork between detach and attach would give the child a hole where the parent has data. So
//! everyone who opens a hole holds the [`ForkGate`] shared while it is open, and a fork takes it
//! exclusively. The forking thread waits for the holes under way, no longer.
//!
//! The child inherits the gate closed and no thread that could open it: an engine does nothing in
//! a child (see [`crate::Engine`]).

use parking_lot::lock_api::{RawRwLock as _, RawRwLockRecursive as _};
use std::sync::atomic::{AtomicUsize, Ordering};

/// See the [module](self).
pub(crate) struct ForkGate {
    lock: parking_lot::RawRwLock,
    /// Forks that wait for the gate, or hold it.
    wanted: AtomicUsize,
}

impl std::fmt::Debug for ForkGate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ForkGate")
    }
}

impl ForkGate {
    pub(crate) fn new() -> Self {
        Self { lock: parking_lot::RawRwLock::INIT, wanted: AtomicUsize::new(0) }
    }

    /// Holds off forks until dropped.
    pub(crate) fn hold(&self) -> Held<'_> {
        self.lock.lock_shared();
        Held(self)
    }

    /// Whether a fork waits: whoever keeps the gate busy by several holes lets them all close.
    pub(crate) fn wanted(&self) -> bool {
        // Relaxed: a hint; the lock does the work.
        self.wanted.load(Ordering::Relaxed) > 0
    }

    /// Like [`ForkGate::hold`] for a thread that holds it already: a fork that waits must not
    /// come between, or both would wait for each other.
    pub(crate) fn hold_again(&self) -> Held<'_> {
        self.lock.lock_shared_recursive();
        Held(self)
    }
}

/// A fork waits while this lives.
#[derive(Debug)]
pub(crate) struct Held<'a>(&'a ForkGate);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // SAFETY: this value exists because the lock was taken shared, and is dropped once.
        unsafe { self.0.lock.unlock_shared() };
    }
}

impl ForkGate {
    /// Waits until no hole is open, and keeps new ones from opening.
    pub(crate) fn close(&self) {
        self.wanted.fetch_add(1, Ordering::Relaxed);
        self.lock.lock_exclusive();
    }
    /// Lets holes open again. Called by the thread that closed the gate.
    pub(crate) fn open(&self) {
        // SAFETY: `close` took the lock on this thread.
        unsafe { self.lock.unlock_exclusive() };
        self.wanted.fetch_sub(1, Ordering::Relaxed);
    }
}
