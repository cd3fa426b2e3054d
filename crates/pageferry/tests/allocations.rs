//! The per-folio path allocates nothing: four times the folios, the same number of allocations.

mod support;
mod trial;

use pageferry::{Division, Engine, Folios, Order};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use support::{build, check, fill, first_node, promised, sized, thinned};
use trial::faults::crossed;

/// Counts what all threads allocate.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the same promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the same promise.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the same promise.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The least number of allocations of some runs: other threads of the process (the pools'
/// housekeeping, the test's own) may add to a single one.
fn allocations(
    engine: &Engine,
    bytes: usize,
    folios: Folios,
    order: Order,
    division: Division,
) -> u64 {
    let region = promised(engine.map(bytes).folios(folios)).build().expect("memory for the test");
    fill(&region, 0..bytes);
    let least = (0..6)
        .map(|_| {
            let moving = engine
                .migrate(region.to(first_node(engine)))
                .even_if_there()
                .order(order)
                .division(division);
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            let report = moving.run().expect("a move");
            let count = ALLOCATIONS.load(Ordering::Relaxed) - before;
            assert_eq!(report.bytes_moved, bytes as u64, "{report:?}");
            count
        })
        // The first runs fill the pools and the buffers.
        .skip(2)
        .min();
    check(&region, 0..bytes);
    least.unwrap_or_default()
}

#[test]
fn allocations_do_not_grow_with_the_number_of_folios() {
    let Some(engine) = build(trial::small()) else { return };
    // 12288 more base pages, or 24 more huge ones; an emulated machine would take minutes.
    let (small, large) = (sized(16 << 20), sized(64 << 20));
    let orders = [Order::Frozen, Order::Live];
    let divisions = [Division::Conducted, Division::Shared];
    let ways = crossed(&orders, divisions).collect::<Vec<_>>();
    for (folios, (order, division)) in thinned(crossed(&[Folios::Base, Folios::Huge], ways)) {
        let few = allocations(&engine, small, folios, order, division);
        let many = allocations(&engine, large, folios, order, division);
        // Room for a buffer that grows once, and for two more batches in the air.
        let allowed = 16;
        assert!(
            many <= few + allowed,
            "{folios:?} {order:?} {division:?}: {few} allocations for {small} bytes, {many} for \
             {large}"
        );
    }
}
