//! The primitives of the flight table, replaced by loom's when it is model-checked.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

#[cfg(not(loom))]
pub(crate) type SharedGuard<'a> = parking_lot::RwLockReadGuard<'a, ()>;
#[cfg(not(loom))]
pub(crate) type ExclusiveGuard<'a> = parking_lot::RwLockWriteGuard<'a, ()>;
#[cfg(loom)]
pub(crate) type SharedGuard<'a> = loom::sync::RwLockReadGuard<'a, ()>;
#[cfg(loom)]
pub(crate) type ExclusiveGuard<'a> = loom::sync::RwLockWriteGuard<'a, ()>;

#[cfg(not(loom))]
pub(crate) use parking_lot::Mutex;

/// Loom's, with the interface of the other.
#[cfg(loom)]
#[derive(Debug)]
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

#[cfg(loom)]
impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self(loom::sync::Mutex::new(T::default()))
    }
}

#[cfg(loom)]
impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
        self.0.lock().expect("no thread panics while it holds the lock")
    }
}

/// The lock between the fault handler (exclusive) and those who move pages (shared).
#[cfg(not(loom))]
#[derive(Debug, Default)]
pub(crate) struct Gate(parking_lot::RwLock<()>);

#[cfg(not(loom))]
impl Gate {
    pub(crate) fn shared(&self) -> SharedGuard<'_> {
        self.0.read()
    }
    pub(crate) fn exclusive(&self) -> ExclusiveGuard<'_> {
        self.0.write()
    }
}

#[cfg(loom)]
#[derive(Debug)]
pub(crate) struct Gate(loom::sync::RwLock<()>);

#[cfg(loom)]
impl Default for Gate {
    fn default() -> Self {
        Self(loom::sync::RwLock::new(()))
    }
}

#[cfg(loom)]
impl Gate {
    pub(crate) fn shared(&self) -> SharedGuard<'_> {
        self.0.read().expect("no thread panics while it holds the gate")
    }
    pub(crate) fn exclusive(&self) -> ExclusiveGuard<'_> {
        self.0.write().expect("no thread panics while it holds the gate")
    }
}
