//! What the engine does not do while somebody waits at a hole: ask the kernel for memory, which may
//! have to find it first.

mod support;
mod trial;

use pageferry::{Division, Engine, Folios, Frames, Order, Region};
use pageferry_sys::mm::Advice;
use pageferry_sys::uffd::{Progress, Uffd};
use pageferry_sys::{Errno, Linux, Sys};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::{check, fill, first_node};
use trial::Watchdog;

/// The kernel, and how much of a region is out of it when frames are populated.
#[derive(Debug, Default)]
struct Holes {
    start: AtomicUsize,
    end: AtomicUsize,
    /// Bytes taken out and not put in yet.
    out: AtomicUsize,
    populated: AtomicUsize,
    within: AtomicUsize,
    /// At most at once.
    most: AtomicUsize,
}

impl Holes {
    fn watch(&self, region: &Region) {
        self.start.store(region.addr(), Ordering::Relaxed);
        self.end.store(region.addr() + region.len(), Ordering::Relaxed);
    }

    fn is_inward(&self, addr: usize) -> bool {
        (self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed)).contains(&addr)
    }
}

impl Sys for Holes {
    unsafe fn move_range(&self, fd: &Uffd, dst: usize, src: usize, len: usize) -> Progress {
        // SAFETY: the same promise.
        let progress = unsafe { Linux.move_range(fd, dst, src, len) };
        if self.is_inward(dst) {
            self.out.fetch_sub(progress.done, Ordering::Relaxed);
        } else if self.is_inward(src) {
            let before = self.out.fetch_add(progress.done, Ordering::Relaxed);
            self.most.fetch_max(before + progress.done, Ordering::Relaxed);
        }
        progress
    }
    unsafe fn advise(&self, start: usize, len: usize, advice: Advice) -> Result<(), Errno> {
        if advice == Advice::PopulateWrite && !self.is_inward(start) {
            self.populated.fetch_add(len, Ordering::Relaxed);
            self.within.fetch_max(self.out.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        // SAFETY: the same promise.
        unsafe { Linux.advise(start, len, advice) }
    }
}

#[test]
fn no_frame_is_allocated_by_a_thread_with_holes_open() {
    let _watchdog = Watchdog::seconds(120, "moves to fresh frames");
    for folios in [Folios::Base, Folios::Huge] {
        let holes = Arc::new(Holes::default());
        let builder = Engine::builder().sys(holes.clone());
        let Some(engine) = support::build(builder) else { return };
        let region = engine.map(32 << 20).folios(folios).build().expect("memory");
        fill(&region, 0..region.len());
        holes.watch(&region);
        let to = region.to(first_node(&engine));
        let moved = engine
            .migrate(to)
            .even_if_there()
            .frames(Frames::Fresh)
            .order(Order::Frozen)
            // One thread alone has all the holes: so all are its own.
            .division(Division::Conducted)
            .run()
            .expect("a move");
        assert_eq!(moved.bytes_moved, 32 << 20, "{moved:?}");
        assert!(holes.populated.load(Ordering::Relaxed) >= 32 << 20, "{holes:?}");
        assert!(holes.most.load(Ordering::Relaxed) > 0, "{holes:?}");
        assert_eq!(holes.out.load(Ordering::Relaxed), 0, "{holes:?}");
        assert_eq!(holes.within.load(Ordering::Relaxed), 0, "populated with a hole: {holes:?}");
        check(&region, 0..region.len());
    }
}
