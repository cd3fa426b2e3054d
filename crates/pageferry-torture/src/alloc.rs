//! The library's own allocator: a mover must not need what it moves, and it moves malloc's memory.
//!
//! What always holds: a block lies in the arena, which is mapped before anything is adopted and is
//! in [`crate::own`]. A forked child starts with an empty arena, because a thread that it does not
//! have may have been about to change the old one; blocks of the old one stay as they are.

use std::alloc::{GlobalAlloc, Layout};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Address space of an arena. Only what is used has pages.
const ARENA: usize = 1 << 30;
/// Blocks are powers of two, from 16 bytes on.
const CLASSES: usize = 31;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Arena {
    locked: AtomicBool,
    start: AtomicUsize,
    used: AtomicUsize,
    /// The first free block of each class; its first word is the address of the next.
    free: [AtomicUsize; CLASSES],
}

impl Arena {
    pub(crate) const fn new() -> Self {
        Self {
            locked: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            used: AtomicUsize::new(0),
            free: [const { AtomicUsize::new(0) }; CLASSES],
        }
    }

    fn class(layout: Layout) -> usize {
        let size = layout.size().max(layout.align()).max(16);
        size.checked_next_power_of_two().map_or(CLASSES, |size| size.trailing_zeros() as usize)
    }

    fn lock(&self) {
        while self.locked.swap(true, Ordering::Acquire) {
            // SAFETY: no preconditions.
            unsafe { libc::sched_yield() };
        }
    }

    fn unlock(&self) {
        self.locked.store(false, Ordering::Release);
    }

    /// Gives up the arena; the next block comes from a new one. Only for a process with one thread.
    pub(crate) fn abandon(&self) {
        self.start.store(0, Ordering::Relaxed);
        self.free.iter().for_each(|list| list.store(0, Ordering::Relaxed));
        self.unlock();
    }

    /// Maps the arena if that has not been done. Under the lock.
    fn open(&self) -> usize {
        let start = self.start.load(Ordering::Relaxed);
        if start != 0 {
            return start;
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let raw = unsafe { libc::mmap(ptr::null_mut(), ARENA, rights, flags, -1, 0) };
        if raw == libc::MAP_FAILED {
            return 0;
        }
        crate::own::add(raw.addr()..raw.addr() + ARENA);
        self.used.store(0, Ordering::Relaxed);
        self.start.store(raw.expose_provenance(), Ordering::Relaxed);
        raw.addr()
    }

    fn take(&self, class: usize) -> usize {
        let start = self.open();
        let first = self.free[class].load(Ordering::Relaxed);
        if start == 0 || first != 0 {
            if first != 0 {
                // SAFETY: a free block of this arena, whose first word is the list's.
                let next = unsafe { ptr::with_exposed_provenance::<usize>(first).read() };
                self.free[class].store(next, Ordering::Relaxed);
            }
            return first;
        }
        let size = 1 << class;
        // Pages are enough for alignment: nothing here asks for more.
        let at = self.used.load(Ordering::Relaxed).next_multiple_of(size.min(4096));
        if at + size > ARENA {
            return 0;
        }
        self.used.store(at + size, Ordering::Relaxed);
        start + at
    }
}

// SAFETY: blocks are disjoint, as large as asked for, aligned up to a page (more is refused), and
// given out again only after they were freed.
unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let class = Self::class(layout);
        if class >= CLASSES || layout.align() > 4096 {
            return ptr::null_mut();
        }
        self.lock();
        let at = self.take(class);
        self.unlock();
        ptr::with_exposed_provenance_mut(at)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let class = Self::class(layout);
        self.lock();
        let start = self.start.load(Ordering::Relaxed);
        if (start..start + ARENA).contains(&block.addr()) && start != 0 {
            let next = self.free[class].load(Ordering::Relaxed);
            // SAFETY: the block is the caller's to give up, of 16 bytes or more.
            unsafe { block.cast::<usize>().write(next) };
            self.free[class].store(block.expose_provenance(), Ordering::Relaxed);
        }
        self.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_disjoint_aligned_and_given_out_again() {
        let arena = Arena::new();
        let layouts = [(1, 1), (24, 8), (4096, 4096), (70_000, 64)]
            .map(|(size, align)| Layout::from_size_align(size, align).expect("valid"));
        // SAFETY: blocks are used within their layouts, and freed once.
        unsafe {
            let blocks = layouts.map(|layout| arena.alloc(layout));
            for ((&block, layout), i) in blocks.iter().zip(layouts).zip(0u8..) {
                assert!(!block.is_null() && block.addr().is_multiple_of(layout.align()));
                block.write_bytes(i, layout.size());
            }
            for ((&block, layout), i) in blocks.iter().zip(layouts).zip(0u8..) {
                assert_eq!(block.add(layout.size() - 1).read(), i);
                arena.dealloc(block, layout);
                assert_eq!(arena.alloc(layout), block);
            }
            arena.abandon();
            let other = arena.alloc(layouts[1]);
            assert!(!other.is_null() && other != blocks[1]);
            arena.dealloc(blocks[1], layouts[1]);
            assert_ne!(arena.alloc(layouts[1]), blocks[1], "of the old arena");
        }
    }
}
