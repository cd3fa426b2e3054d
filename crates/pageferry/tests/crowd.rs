//! Many movers, many threads that fault, many ranges given up, all at once: everybody goes on.

mod support;
mod trial;

use pageferry::copy::Kernel;
use pageferry::{Division, Engine, Folios, Order};
use pageferry_sys::page_size;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use support::siege::advise;
use support::{StopOnDrop, build, check, fill, first_node, is_guest, patient, promised, word};
use trial::Watchdog;

/// More conducted moves than there are places for flights, each with several holes open at once.
#[test]
fn more_movers_than_places_for_flights_all_go_on() {
    let _watchdog = Watchdog::seconds(patient(120), "movers wait for each other");
    let builder = Engine::builder().kernel(Kernel::MEMCPY).frame_budget(256 << 20);
    let Some(engine) = build(builder) else { return };
    let movers = if is_guest() { 40 } else { 300 };
    let node = first_node(&engine);
    std::thread::scope(|scope| {
        for _ in 0..movers {
            scope.spawn(|| {
                let region = promised(engine.map(2 << 20).folios(Folios::Base)).build();
                let region = region.expect("memory");
                fill(&region, 0..region.len());
                for _ in 0..3 {
                    // Small batches: several in the air.
                    let report = engine
                        .migrate(region.to(node))
                        .even_if_there()
                        .order(Order::Frozen)
                        .division(Division::Conducted)
                        .batch_bytes(64 << 10)
                        .stall_budget(Duration::from_millis(20))
                        .run();
                    report.expect("a move");
                }
                check(&region, 0..region.len());
            });
        }
    });
}

/// The kernel hands out all faults before any event: the caller of `madvise` must not wait until
/// nobody faults any more.
#[test]
fn an_event_is_read_however_many_threads_fault() {
    let _watchdog = Watchdog::seconds(patient(120), "an event waits behind faults");
    let Some(engine) = build(Engine::builder().kernel(Kernel::MEMCPY)) else { return };
    let there = 8 << 20;
    let region = Arc::new(engine.map(1 << 30).folios(Folios::Base).build().expect("memory"));
    fill(&region, 0..there);
    let (stop, next) = (AtomicBool::new(false), AtomicUsize::new(there / page_size()));
    let node = first_node(&engine);
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                engine.migrate(region.to(node)).even_if_there().run().expect("a move");
            }
        });
        for _ in 0..100 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // Every block is touched once from its end backwards, so that each touch
                    // is a fault of its own.
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let pages = (2 << 20) / page_size();
                    let page = n / pages * pages + (pages - 1 - n % pages);
                    if page >= region.len() / page_size() {
                        return;
                    }
                    let found = word(&region, page * page_size() / 8).load(Ordering::Relaxed);
                    assert_eq!(found, 0, "page {page} was never written");
                }
            });
        }
        for _ in 0..40 {
            let last = region.addr() + there - page_size();
            assert!(advise(last..last + page_size(), libc::MADV_DONTNEED));
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    check(&region, 0..there - page_size());
}

/// A program that gives up and touches pages all the time does not stop moves: most of the memory
/// moves, and what was given up is never seen again.
#[test]
fn pages_that_are_given_up_and_touched_all_the_time_do_not_keep_the_others_from_moving() {
    let _watchdog = Watchdog::seconds(patient(120), "quarantines stop everything");
    let Some(engine) = build(Engine::builder().kernel(Kernel::MEMCPY)) else { return };
    let len = support::sized(64 << 20);
    let region = Arc::new(engine.map(len).folios(Folios::Base).build().expect("memory"));
    fill(&region, 0..len);
    let node = first_node(&engine);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        // Every eighth page is the flood's.
        scope.spawn(|| {
            let pages = len / page_size();
            let mut n = 0usize;
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                let page = (n.wrapping_mul(7919) % pages) & !7;
                let at = region.addr() + page * page_size();
                assert!(advise(at..at + page_size(), libc::MADV_DONTNEED));
                let first = word(&region, page * page_size() / 8);
                assert_eq!(first.load(Ordering::Relaxed), 0, "old content came back");
                first.store(n as u64, Ordering::Relaxed);
            }
        });
        for order in [Order::Frozen, Order::Live] {
            for _ in 0..10 {
                let moved = engine.migrate(region.to(node)).even_if_there().order(order).run();
                let report = moved.expect("a move");
                assert!(report.bytes_moved > len as u64 / 2, "{report:?}");
            }
        }
    });
    for page in (0..len / page_size()).filter(|page| page % 8 != 0) {
        check(&region, page * page_size()..(page + 1) * page_size());
    }
}
