//! The locks of this crate, replaced by loom's where they are model-checked.
//!
//! They are the standard library's, which on Linux are futexes: all their state is in the lock
//! itself. A child of `fork` can so make and use locks of its own. (One with a table of waiting
//! threads for the whole process would list the parent's there.)
//!
//! They ignore poison. A move that panics is caught and reported
//! ([`Panicked`](crate::MigrateError::Panicked)), and each critical section leaves what it guards
//! whole wherever it can panic; the pages of other moves must still come home.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

#[cfg(loom)]
use loom::sync as locks;
#[cfg(not(loom))]
use std::sync as locks;

use std::sync::PoisonError;
#[cfg(not(loom))]
use std::sync::TryLockError;
#[cfg(not(loom))]
use std::time::Duration;

pub(crate) type MutexGuard<'a, T> = locks::MutexGuard<'a, T>;
pub(crate) type SharedGuard<'a> = locks::RwLockReadGuard<'a, ()>;
pub(crate) type ExclusiveGuard<'a> = locks::RwLockWriteGuard<'a, ()>;

/// [`std::sync::Mutex`] without poison.
#[derive(Debug)]
pub(crate) struct Mutex<T>(locks::Mutex<T>);

// Loom's has no default.
#[allow(clippy::derivable_impls, reason = "loom's mutex has no default")]
impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(locks::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(not(loom))]
impl<T> Mutex<T> {
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        match self.0.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn into_inner(self) -> T {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// [`std::sync::Condvar`] without poison.
#[derive(Debug)]
pub(crate) struct Condvar(locks::Condvar);

impl Condvar {
    pub(crate) fn new() -> Self {
        Self(locks::Condvar::new())
    }

    pub(crate) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.0.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

#[cfg(not(loom))]
impl Condvar {
    /// Waits for at most `time`.
    pub(crate) fn wait_for<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        time: Duration,
    ) -> MutexGuard<'a, T> {
        self.0.wait_timeout(guard, time).unwrap_or_else(PoisonError::into_inner).0
    }

    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }
}

/// The lock between the fault handler (exclusive) and those who move pages (shared).
#[derive(Debug)]
pub(crate) struct Gate(locks::RwLock<()>);

#[allow(clippy::derivable_impls, reason = "loom's lock has no default")]
impl Default for Gate {
    fn default() -> Self {
        Self(locks::RwLock::new(()))
    }
}

impl Gate {
    pub(crate) fn shared(&self) -> SharedGuard<'_> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
    pub(crate) fn exclusive(&self) -> ExclusiveGuard<'_> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}
