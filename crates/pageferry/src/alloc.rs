//! An allocator over a region, so that collections can live in managed memory.
//!
//! Blocks come in size classes, four to a power of two, and are carved from the region front to
//! back; a freed block goes to its class's list and is given out again for that class. The lists
//! lie outside the region (a `Vec` of offsets for each class), so the allocator itself never
//! touches managed memory: it works while the region moves, also in user-mode-only form.

use crate::region::Region;
use crate::sync::{Mutex, MutexGuard};
use allocator_api2::alloc::{AllocError, Allocator};
use pageferry_sys::fork::{self, Quiesce};
use std::alloc::Layout;
use std::cell::UnsafeCell;
use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

/// Smallest block, in bytes; also the alignment of every block.
const SMALLEST: usize = 16;

/// The class of a block of `bytes`, and the size of blocks of that class: the smallest of
/// 2^k * {4, 5, 6, 7} / 4 that holds it, at most a quarter more than asked.
fn class_of(bytes: usize) -> (usize, usize) {
    let bytes = bytes.max(SMALLEST);
    let octave = (bytes - 1).ilog2() as usize;
    // `bytes` lies in (2^octave, 2^(octave + 1)]; its quarter there, rounded up.
    let quarter = (1usize << octave) / 4;
    let steps = (bytes - (1 << octave)).div_ceil(quarter.max(1));
    let size = (1usize << octave) + steps * quarter;
    let base = SMALLEST.ilog2() as usize - 1;
    ((octave - base) * 4 + steps, size.next_multiple_of(SMALLEST))
}

/// What is given out of a region and what is free. It belongs to the region, so that all allocators
/// over one region share it.
#[derive(Debug, Default)]
pub(crate) struct Heap {
    /// Offset of the first byte never given out.
    top: usize,
    /// Offsets of freed blocks, by class; as long as the largest class that was freed.
    free: Vec<Vec<usize>>,
    used: usize,
}

/// A [`Heap`] and its lock, which a fork takes, so that the child finds it free and the heap whole.
pub(crate) struct HeapLock {
    heap: Mutex<Heap>,
    /// While the process forks: the lock. Touched only by who has it.
    forking: UnsafeCell<Option<MutexGuard<'static, Heap>>>,
}

// SAFETY: `forking` is touched only by the thread that has the lock, and the guard goes on the
// thread that took it: the forking one, or the child's copy of it.
unsafe impl Send for HeapLock {}
// SAFETY: as above.
unsafe impl Sync for HeapLock {}

impl HeapLock {
    pub(crate) fn new() -> Arc<Self> {
        let heap = Mutex::new(Heap::default());
        let this = Arc::new(Self { heap, forking: UnsafeCell::new(None) });
        let listener: Weak<dyn Quiesce> = Arc::downgrade(&this) as _;
        fork::register(listener);
        this
    }

    fn lock(&self) -> MutexGuard<'_, Heap> {
        self.heap.lock()
    }

    /// What [`Quiesce::before`] locked is free again.
    fn unlock(&self) {
        // SAFETY: called on the thread that took the lock in `before`.
        drop(unsafe { (*self.forking.get()).take() });
    }
}

impl fmt::Debug for HeapLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeapLock").finish_non_exhaustive()
    }
}

impl Quiesce for HeapLock {
    fn before(&self) {
        let guard = self.heap.lock();
        // SAFETY: only the lifetime changes: `unlock` drops the guard before whoever forks gives
        // up its handle on `self`. The slot is this thread's, which has the lock.
        unsafe {
            let guard =
                std::mem::transmute::<MutexGuard<'_, Heap>, MutexGuard<'static, Heap>>(guard);
            *self.forking.get() = Some(guard);
        }
    }
    fn after_in_parent(&self) {
        self.unlock();
    }
    fn after_in_child(self: Arc<Self>) -> bool {
        self.unlock();
        true
    }
}

/// Allocates from a region: blocks in size classes, carved front to back, reused within their
/// class. Its bookkeeping lies outside the region. All allocators over one region share one heap.
///
/// A child of `fork(3)` has a copy of region and heap, and can go on allocating from it.
#[derive(Clone, Debug)]
pub struct RegionAlloc {
    region: Arc<Region>,
}

impl RegionAlloc {
    /// An allocator over the whole region.
    pub fn new(region: Arc<Region>) -> Self {
        Self { region }
    }

    /// Bytes given out now, rounded up to their size classes.
    pub fn used_bytes(&self) -> usize {
        self.region.heap.lock().used
    }

    /// Bytes of the region that were ever given out: what lies beyond was never touched.
    pub fn high_water_bytes(&self) -> usize {
        self.region.heap.lock().top
    }

    /// The region behind it.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }
}

// SAFETY: blocks are disjoint (each offset is given out once until it is freed), stay valid while
// any clone lives (the region is kept by an Arc and never unmapped before), and may be freed
// through any allocator over the region, since they share its heap. Moving pages changes neither addresses nor
// content.
unsafe impl Allocator for RegionAlloc {
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        if layout.size() == 0 {
            let dangling = std::ptr::without_provenance_mut(layout.align());
            let start = NonNull::new(dangling).ok_or(AllocError)?;
            return Ok(NonNull::slice_from_raw_parts(start, 0));
        }
        // Over-aligned blocks have a class of their own size, a multiple of their alignment, so
        // that every block of an alignment above the smallest begins at a multiple of it.
        let aligned = layout.align() > SMALLEST;
        let asked = if aligned {
            layout.size().max(layout.align()).checked_next_power_of_two().ok_or(AllocError)?
        } else {
            layout.size()
        };
        if asked > self.region.len() {
            return Err(AllocError);
        }
        let (class, size) = class_of(asked);
        let mut heap = self.region.heap.lock();
        // A block freed by one alignment may serve another: only one that fits is taken.
        let reused = heap.free.get_mut(class).and_then(|list| {
            let at = list.iter().rposition(|o| o.is_multiple_of(layout.align()))?;
            Some(list.swap_remove(at))
        });
        let offset = match reused {
            Some(offset) => offset,
            None => {
                let offset = heap.top.next_multiple_of(layout.align().max(SMALLEST));
                let end = offset.checked_add(size).ok_or(AllocError)?;
                if end > self.region.len() {
                    return Err(AllocError);
                }
                heap.top = end;
                offset
            }
        };
        heap.used += size;
        // SAFETY: `offset + size` lies within the region.
        let start = unsafe { self.region.as_ptr().add(offset) };
        let start = NonNull::new(start).ok_or(AllocError)?;
        Ok(NonNull::slice_from_raw_parts(start, size))
    }

    unsafe fn deallocate(&self, ptr: NonNull<u8>, layout: Layout) {
        if layout.size() == 0 {
            return;
        }
        let aligned = layout.align() > SMALLEST;
        let asked = if aligned {
            layout.size().max(layout.align()).next_power_of_two()
        } else {
            layout.size()
        };
        let (class, size) = class_of(asked);
        let offset = ptr.as_ptr().addr() - self.region.addr();
        let mut heap = self.region.heap.lock();
        heap.used -= size;
        if heap.free.len() <= class {
            heap.free.resize_with(class + 1, Vec::new);
        }
        heap.free[class].push(offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_class_holds_what_it_is_for_and_wastes_at_most_a_quarter(bytes in 1usize..1 << 40) {
            let (class, size) = class_of(bytes);
            prop_assert!(size >= bytes);
            prop_assert!(size <= (bytes + bytes / 4).max(SMALLEST).next_multiple_of(SMALLEST));
            prop_assert!(class < 44 * 4);
            prop_assert_eq!(class_of(size).1, size);
        }
    }
}
