//! How much memory the pools may hold.

use crate::sync::{AtomicUsize, Ordering};

/// Bytes that the engine holds beyond what the program would use, and how many it may.
///
/// Claims never exceed the limit. [`Budget::add`] may: where the kernel copies, old pages come in
/// without a frame going out, for as long as a batch is in the air.
#[derive(Debug)]
pub(super) struct Budget {
    // Relaxed throughout: a number; what it counts is handed over by other means.
    held: AtomicUsize,
    limit: usize,
}

impl Budget {
    pub(super) fn new(limit: usize) -> Self {
        Self { held: AtomicUsize::new(0), limit }
    }

    /// Bytes.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes.
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Claims bytes; as long as there is no room, `free` is to make some. False: it could not.
    pub(super) fn claim(&self, bytes: usize, mut free: impl FnMut() -> bool) -> bool {
        loop {
            let claimed = self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                (held + bytes <= self.limit).then_some(held + bytes)
            });
            if claimed.is_ok() {
                return true;
            }
            if !free() {
                return false;
            }
        }
    }

    /// Bytes have come without a claim.
    pub(super) fn add(&self, bytes: usize) {
        self.held.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes have been freed.
    pub(super) fn give_back(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }
}
