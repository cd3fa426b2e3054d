//! A signal handler may touch managed memory wherever it interrupts its thread, in the allocator, too,
//! with the allocator's locks held. So a thread that others wait for at a page (it has a hole open, or
//! answers faults, or has what these need) must not wait for the allocator.
//!
//! Here it has one lock for the whole process, as in some C libraries, and some threads touch
//! managed memory whenever they hold it.

mod support;
mod trial;

use pageferry::{Division, Engine, Folios, Frames, Order, References, Region};
use pageferry_copy::CopyEngine;
use pageferry_copy::model::{Behaviour, ModelEngine};
use pageferry_sys::page_size;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use support::siege::{advise, far_address, map_at, ptr};
use support::{StopOnDrop, check, fill, first_node, next, patient, promised, thinned};
use trial::{Watchdog, small};

/// The system's, behind one lock.
struct OneLock;

static TAKEN: AtomicBool = AtomicBool::new(false);
/// What is touched: the first address, and the pages from there on.
static FIRST: AtomicUsize = AtomicUsize::new(0);
static PAGES: AtomicUsize = AtomicUsize::new(0);
static TOUCHES: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread touches pages while it has the lock; the number that chooses the next.
    static TOUCHING: Cell<Option<u64>> = const { Cell::new(None) };
}

fn locked<T>(then: impl FnOnce() -> T) -> T {
    while TAKEN.swap(true, Ordering::Acquire) {
        std::thread::sleep(Duration::from_micros(10));
    }
    if let Some(mut seed) = TOUCHING.get() {
        let page =
            usize::try_from(next(&mut seed)).unwrap_or(0) % PAGES.load(Ordering::Relaxed).max(1);
        TOUCHING.set(Some(seed));
        let at = FIRST.load(Ordering::Relaxed) + page * page_size();
        // SAFETY: the test's memory, as long as any thread touches it; this changes nothing.
        let word = unsafe { std::sync::atomic::AtomicU64::from_ptr(ptr(at).cast()) };
        match page % 2 {
            // (Adding zero is compiled to a read.)
            0 => word.store(word.load(Ordering::Relaxed), Ordering::Relaxed),
            _ => _ = word.load(Ordering::Relaxed),
        }
        TOUCHES.fetch_add(1, Ordering::Relaxed);
    }
    let done = then();
    TAKEN.store(false, Ordering::Release);
    done
}

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for OneLock {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the same promise.
        locked(|| unsafe { System.alloc(layout) })
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the same promise.
        locked(|| unsafe { System.dealloc(ptr, layout) });
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the same promise.
        locked(|| unsafe { System.realloc(ptr, layout, size) })
    }
}

#[global_allocator]
static ONE_LOCK: OneLock = OneLock;

/// Moves in every way, a few times.
fn move_in_every_way(engine: &Engine, region: &Region, devices: &[Arc<dyn CopyEngine>], seed: u64) {
    let mut seed = seed;
    let orders = [Order::Frozen, Order::Live];
    let ways = [Frames::Recycled, Frames::Fresh, Frames::KernelCopy];
    let divisions = [Some(Division::Conducted), Some(Division::Shared), None];
    let ways = orders.into_iter().flat_map(|order| {
        let each = ways.into_iter().flat_map(move |frames| divisions.map(|d| (order, frames, d)));
        each.collect::<Vec<_>>()
    });
    for (order, frames, division) in thinned(ways.cycle().take(300)) {
        let pages = region.len() / page_size();
        let mut some = || usize::try_from(next(&mut seed) % pages as u64).expect("small");
        let (one, other, pick) = (some(), some(), some());
        let range = one.min(other) * page_size()..(one.max(other) + 1) * page_size();
        let moving = engine
            .migrate(region.to(first_node(engine)).range(range))
            .even_if_there()
            .order(order)
            .frames(frames)
            .stall_budget(Duration::from_millis(if pick % 2 == 0 { 1 } else { 5 }))
            .batch_bytes(page_size() << (2 + pick % 8));
        match division {
            Some(division) => moving.division(division),
            None => moving.engine(Arc::clone(&devices[pick % devices.len()])),
        }
        .run()
        .expect("a move");
    }
}

/// Gives up and maps anew pages of its own, so that there are events and quarantines.
fn change(range: &Range<usize>, stop: &AtomicBool) {
    let mut seed = 77;
    while !stop.load(Ordering::Relaxed) {
        let first = usize::try_from(next(&mut seed)).unwrap_or(0) % (range.len() / page_size());
        let at = range.start + first * page_size();
        let some = at..range.end.min(at + 8 * page_size());
        if seed % 4 == 0 {
            map_at(some.start, some.len());
        } else {
            assert!(advise(some.clone(), libc::MADV_DONTNEED));
        }
        for at in some.step_by(page_size()) {
            // SAFETY: this thread's own memory.
            unsafe { ptr(at).cast::<u64>().write_volatile(1) };
        }
        std::thread::sleep(Duration::from_micros(300));
    }
}

#[test]
fn whoever_holds_the_allocators_lock_may_wait_for_any_page() {
    let builder = small().threads(3);
    let Some(engine) = support::build(builder) else { return };
    let _watchdog =
        Watchdog::seconds(patient(100), "who waits for a page with the allocator's lock");
    let devices = [Behaviour::Faithful, Behaviour::Forgets { every: 9 }];
    let devices =
        devices.map(|how| Arc::new(ModelEngine::threaded(how).expect("a thread")) as Arc<_>);
    // All of it in one piece, so that one number chooses a page.
    let len = 24 << 20;
    let start = far_address();
    map_at(start, len);
    advise(start + (8 << 20)..start + (16 << 20), libc::MADV_HUGEPAGE);
    let adopt = |at: usize, len: usize, references| {
        // SAFETY: mapped above, private and anonymous, and the test's; what of it is mapped anew it
        // expects gone.
        let region = unsafe { engine.adopt(ptr(start + at).cast(), len, references) };
        region.expect("aligned")
    };
    let regions = [
        adopt(0, 8 << 20, References::Never),
        adopt(8 << 20, 8 << 20, References::Possible),
        adopt(16 << 20, 8 << 20, References::Possible),
    ];
    let own = promised(engine.map(4 << 20).folios(Folios::Base)).build().expect("memory");
    // The last part of the last region is given up again and again.
    let kept = [8 << 20, 8 << 20, 6 << 20, 4 << 20];
    let all = || regions.iter().chain([&own]);
    all().zip(kept).for_each(|(region, bytes)| fill(region, 0..bytes));
    let changing = start + (22 << 20)..start + len;
    FIRST.store(start, Ordering::Relaxed);
    PAGES.store((22 << 20) / page_size(), Ordering::Relaxed);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for n in 0..3 {
            let stop = &stop;
            scope.spawn(move || {
                TOUCHING.set(Some(n + 1));
                while !stop.load(Ordering::Relaxed) {
                    drop(std::hint::black_box(Box::new(n)));
                    // The lock is not fair.
                    std::thread::sleep(Duration::from_micros(100));
                }
                TOUCHING.set(None);
            });
        }
        scope.spawn(|| change(&changing, &stop));
        let _stop = StopOnDrop(&stop);
        std::thread::scope(|scope| {
            for (region, n) in all().zip(1..) {
                let (engine, devices) = (&engine, &devices);
                scope.spawn(move || move_in_every_way(engine, region, devices, n));
            }
        });
    });
    all().zip(kept).for_each(|(region, bytes)| check(region, 0..bytes));
    assert!(TOUCHES.load(Ordering::Relaxed) > 0);
}
