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
