//! Moves that are cancelled, overtaken, abandoned or crossed by other moves: all pages stay
//! intact, and each is accounted for.

mod support;
mod trial;

use pageferry::{
    Division, Engine, Folios, Handle, MigrateError, Order, Outcome, Overlap, Region, Report,
};
use pageferry_copy::model::{Behaviour, ModelEngine};
use pageferry_copy::{Capabilities, CopyBatch, CopyEngine, SubmitError};
use pageferry_sys::page_size;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};
use support::{Racers, build, check, fill, first_node, promised};
use trial::{Numbers, Watchdog, accounted, accounted_whole, small};

const ORDERS: [Order; 2] = [Order::Frozen, Order::Live];
const DIVISIONS: [Division; 2] = [Division::Conducted, Division::Shared];

fn region(engine: &Engine, bytes: usize, folios: Folios) -> Arc<Region> {
    let region = promised(engine.map(bytes).folios(folios)).build().expect("memory for the test");
    fill(&region, 0..bytes);
    Arc::new(region)
}

fn all(region: &Region) -> Vec<(Outcome, u64)> {
    vec![(Outcome::Moved, region.len() as u64)]
}

fn whole(engine: &Engine, region: &Region) -> Report {
    engine.migrate(region.to(first_node(engine))).even_if_there().run().expect("a move")
}

/// A faithful engine that lets a test in before each batch.
struct Gated {
    model: ModelEngine,
    batches: AtomicUsize,
    on_batch: Box<dyn Fn(usize) + Send + Sync>,
}

impl std::fmt::Debug for Gated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gated")
    }
}

impl Gated {
    fn new(on_batch: impl Fn(usize) + Send + Sync + 'static) -> Arc<Self> {
        let model = ModelEngine::threaded(Behaviour::Faithful).expect("a thread");
        Arc::new(Self { model, batches: AtomicUsize::new(0), on_batch: Box::new(on_batch) })
    }
}

impl CopyEngine for Gated {
    fn name(&self) -> &str {
        "gated"
    }
    fn capabilities(&self) -> Capabilities {
        self.model.capabilities()
    }
    unsafe fn submit(&self, batch: &Arc<CopyBatch>) -> Result<(), SubmitError> {
        (self.on_batch)(self.batches.fetch_add(1, Ordering::Relaxed));
        // SAFETY: the same promise.
        unsafe { self.model.submit(batch) }
    }
    fn cancel(&self, batch: &CopyBatch) {
        self.model.cancel(batch);
    }
}

/// A door that is opened once.
#[derive(Default)]
struct Door(Mutex<bool>, Condvar);

impl Door {
    fn open(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.1.notify_all();
    }
    fn pass(&self) {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = self.1.wait_while(open, |open| !*open);
        drop(passed.unwrap_or_else(PoisonError::into_inner));
    }
}

/// A move that has begun, and waits in its first batch until the door opens.
fn held(engine: &Engine, region: &Region) -> (Handle, Arc<Door>) {
    let (door, begun) = (Arc::new(Door::default()), Arc::new(Door::default()));
    let gated = Gated::new({
        let (door, begun) = (Arc::clone(&door), Arc::clone(&begun));
        move |_| {
            begun.open();
            door.pass();
        }
    });
    let handle = engine
        .migrate(region.to(first_node(engine)))
        .even_if_there()
        .engine(gated)
        .batch_bytes(64 << 10)
        .start()
        .expect("a move");
    begun.pass();
    (handle, door)
}

#[test]
fn a_move_cancelled_at_any_batch_stops_there_and_every_page_is_intact() {
    let _watchdog = Watchdog::seconds(60, "cancelling at a batch");
    let Some(engine) = build(small()) else { return };
    for folios in [Folios::Base, Folios::Huge] {
        for order in ORDERS {
            for k in 0..8 {
                let bytes = if folios == Folios::Huge { 16 << 20 } else { 1 << 20 };
                let region = region(&engine, bytes, folios);
                let racers = Racers::start(&region, 1, 1);
                let slot: Arc<Mutex<Option<Handle>>> = Arc::default();
                let (ready, told) = (Arc::new(Door::default()), Arc::new(Door::default()));
                let gated = Gated::new({
                    let (slot, ready, told) =
                        (Arc::clone(&slot), Arc::clone(&ready), Arc::clone(&told));
                    move |batch| {
                        ready.pass();
                        let handle = slot.lock().unwrap_or_else(PoisonError::into_inner);
                        if let (true, Some(handle)) = (batch == k, handle.as_ref()) {
                            handle.cancel();
                            told.open();
                        }
                    }
                });
                let handle = engine
                    .migrate(region.to(first_node(&engine)))
                    .even_if_there()
                    .order(order)
                    .engine(gated)
                    .batch_bytes(128 << 10)
                    .start()
                    .expect("a move");
                *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(handle);
                ready.open();
                told.pass();
                let handle = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
                let report = handle.expect("stored above").wait().expect("a report");
                accounted_whole(&report, &region);
                racers.finish();
                assert!(report.cancelled);
                let (moved, left) = (report.bytes_moved, report.bytes(|o| o == Outcome::Cancelled));
                assert_eq!(moved + left, bytes as u64, "{report:?}");
                // A batch under way when it is cancelled is finished.
                assert!(moved >= (k as u64 + 1) * 4096, "batch {k}: {report:?}");
                assert_eq!(whole(&engine, &region).by_outcome(), all(&region));
            }
        }
    }
}

#[test]
fn a_move_cancelled_while_it_waits_its_turn_touches_nothing() {
    let _watchdog = Watchdog::seconds(60, "cancelling before the start");
    let Some(engine) = build(small()) else { return };
    let region = region(&engine, 1 << 20, Folios::Base);
    let (first, door) = held(&engine, &region);
    let second = engine
        .migrate(region.to(first_node(&engine)))
        .even_if_there()
        .start()
        .expect("it waits its turn");
    second.cancel();
    door.open();
    assert_eq!(first.wait().expect("a report").by_outcome(), all(&region));
    let report = second.wait().expect("a report");
    accounted_whole(&report, &region);
    assert_eq!(report.by_outcome(), [(Outcome::Cancelled, 1 << 20)], "{report:?}");
    check(&region, 0..1 << 20);
}

#[test]
fn a_move_cancelled_at_a_random_time_loses_nothing_and_progress_only_grows() {
    let _watchdog = Watchdog::seconds(60, "cancelling at random");
    let Some(engine) = build(small()) else { return };
    let mut numbers = Numbers::new(7);
    let region = region(&engine, 16 << 20, Folios::Mixed);
    region.advise(4 << 20..8 << 20, Folios::Huge).expect("advice");
    for order in ORDERS {
        for division in DIVISIONS {
            for _ in 0..12 {
                let handle = engine
                    .migrate(region.to(first_node(&engine)))
                    .even_if_there()
                    .order(order)
                    .division(division)
                    .start()
                    .expect("a move");
                let until = Instant::now() + Duration::from_micros(numbers.next() % 6000);
                let mut last = 0;
                while Instant::now() < until && !handle.is_finished() {
                    let progress = handle.progress();
                    assert_eq!(progress.bytes_total, 16 << 20);
                    assert!(progress.bytes_done >= last && progress.bytes_done <= 16 << 20);
                    last = progress.bytes_done;
                }
                handle.cancel();
                let report = handle.wait().expect("a report");
                accounted_whole(&report, &region);
                let left = report.bytes(|o| o == Outcome::Cancelled);
                assert_eq!(left + report.bytes_moved, 16 << 20, "{report:?}");
            }
            check(&region, 0..16 << 20);
        }
    }
}

#[test]
fn a_handle_that_is_dropped_lets_the_move_go_on() {
    let _watchdog = Watchdog::seconds(60, "a dropped handle");
    let Some(engine) = build(small()) else { return };
    let region = region(&engine, 1 << 20, Folios::Base);
    let (handle, door) = held(&engine, &region);
    drop(handle);
    door.open();
    // The next move of the same pages waits for it.
    assert_eq!(whole(&engine, &region).by_outcome(), all(&region));
    assert_eq!(engine.stats().bytes_moved, 2 << 20);
    check(&region, 0..1 << 20);
}

#[test]
fn a_region_that_is_dropped_ends_its_moves_first() {
    let _watchdog = Watchdog::seconds(60, "a dropped region");
    let Some(engine) = build(small()) else { return };
    let region = promised(engine.map(1 << 20).folios(Folios::Base)).build().expect("memory");
    fill(&region, 0..1 << 20);
    let (handle, door) = held(&engine, &region);
    let dropper = std::thread::spawn(move || drop(region));
    door.open();
    let report = handle.wait().expect("a report");
    dropper.join().expect("no panic");
    let known = |o| matches!(o, Outcome::Moved | Outcome::Cancelled);
    assert_eq!(report.bytes(known), 1 << 20, "{report:?}");
}

#[test]
fn a_move_of_a_region_that_is_gone_is_an_error() {
    let _watchdog = Watchdog::seconds(60, "a region that is gone");
    let Some(engine) = build(small()) else { return };
    let region = promised(engine.map(4 << 20).folios(Folios::Base)).build().expect("memory");
    let (start, part) = (region.addr(), region.to(first_node(&engine)));
    drop(region);
    // The kernel likes to give the same addresses out again.
    let other = promised(engine.map(4 << 20).folios(Folios::Base)).build().expect("memory");
    fill(&other, 0..4 << 20);
    let result = engine.migrate(part).even_if_there().run();
    assert!(result.is_err(), "addresses {start:#x} now at {:#x}: {result:?}", other.addr());
    check(&other, 0..4 << 20);
}

#[test]
fn a_move_that_waits_its_turn_for_a_region_that_goes_away_does_nothing() {
    let _watchdog = Watchdog::seconds(60, "a region that goes away");
    let Some(engine) = build(small()) else { return };
    let region = promised(engine.map(1 << 20).folios(Folios::Base)).build().expect("memory");
    fill(&region, 0..1 << 20);
    let (first, door) = held(&engine, &region);
    let second = engine
        .migrate(region.to(first_node(&engine)))
        .even_if_there()
        .start()
        .expect("it waits its turn");
    let dropper = std::thread::spawn(move || drop(region));
    door.open();
    first.wait().expect("a report");
    dropper.join().expect("no panic");
    match second.wait() {
        // It had its turn before the region went, or learnt that there is none.
        Ok(report) => {
            let known = |o| matches!(o, Outcome::Moved | Outcome::Cancelled);
            assert_eq!(report.bytes(known), 1 << 20, "{report:?}");
        }
        Err(why) => eprintln!("the move that waited: {why}"),
    }
}

#[test]
fn an_engine_that_is_dropped_during_a_move_lives_until_its_end() {
    let _watchdog = Watchdog::seconds(60, "a dropped engine");
    let Some(engine) = build(small()) else { return };
    let region = region(&engine, 1 << 20, Folios::Base);
    let racers = Racers::start(&region, 1, 1);
    let (handle, door) = held(&engine, &region);
    drop(engine);
    door.open();
    assert_eq!(handle.wait().expect("a report").by_outcome(), all(&region));
    racers.finish();
}

#[test]
fn a_second_move_of_the_same_pages_waits_or_says_so() {
    let _watchdog = Watchdog::seconds(60, "overlapping moves");
    let Some(engine) = build(small()) else { return };
    let region = region(&engine, 4 << 20, Folios::Base);
    let to = first_node(&engine);
    let (first, door) = held(&engine, &region);
    let refused = engine
        .migrate(region.to(to).range(0..page_size()))
        .even_if_there()
        .if_overlapping(Overlap::Refuse)
        .run();
    match refused {
        Err(MigrateError::Overlapping(range)) => assert!(range.contains(&region.addr())),
        other => panic!("{other:?}"),
    }
    let second = engine.migrate(region.to(to)).even_if_there().start().expect("it waits");
    assert!(!second.is_finished());
    door.open();
    assert_eq!(first.wait().expect("a report").by_outcome(), all(&region));
    assert_eq!(second.wait().expect("a report").by_outcome(), all(&region));
    check(&region, 0..4 << 20);
}

#[test]
fn moves_of_disjoint_ranges_run_together_and_share_the_workers() {
    let _watchdog = Watchdog::seconds(60, "concurrent moves");
    let Some(engine) = build(small()) else { return };
    let region = region(&engine, 16 << 20, Folios::Base);
    let racers = Racers::start(&region, 1, 1);
    std::thread::scope(|scope| {
        for part in 0..4usize {
            let (engine, region) = (&engine, &region);
            scope.spawn(move || {
                let range = part * (4 << 20)..(part + 1) * (4 << 20);
                for round in 0..3 {
                    let report = engine
                        .migrate(region.to(first_node(engine)).range(range.clone()))
                        .even_if_there()
                        .order(ORDERS[(part + round) % 2])
                        .division(DIVISIONS[part / 2])
                        .if_overlapping(Overlap::Refuse)
                        .run()
                        .expect("nobody else has this part");
                    accounted(&report, region, std::slice::from_ref(&range));
                    assert_eq!(report.by_outcome(), [(Outcome::Moved, 4 << 20)], "{report:?}");
                }
            });
        }
    });
    racers.finish();
}

#[test]
fn an_exchange_moves_both_sides_and_refuses_an_overlap() {
    let _watchdog = Watchdog::seconds(60, "exchange");
    let Some(engine) = build(small()) else { return };
    let to = first_node(&engine);
    let (one, other) =
        (region(&engine, 4 << 20, Folios::Base), region(&engine, 4 << 20, Folios::Base));
    for (order, division) in ORDERS.into_iter().zip(DIVISIONS) {
        let report = engine
            .exchange(one.to(to), other.to(to))
            .even_if_there()
            .order(order)
            .division(division)
            .run()
            .expect("an exchange");
        assert_eq!(report.by_outcome(), [(Outcome::Moved, 8 << 20)], "{report:?}");
        let halves = engine
            .exchange(one.to(to).range(0..2 << 20), one.to(to).range(2 << 20..4 << 20))
            .even_if_there()
            .run()
            .expect("an exchange within one region");
        accounted_whole(&halves, &one);
        assert_eq!(halves.by_outcome(), all(&one));
    }
    let page = page_size();
    let crossed = engine
        .exchange(one.to(to).range(0..2 << 20), one.to(to).range((2 << 20) - page..4 << 20))
        .run();
    match crossed {
        Err(MigrateError::SameOnBothSides(at)) => {
            assert_eq!(at, one.addr() + (2 << 20) - page);
        }
        other => panic!("{other:?}"),
    }
    check(&one, 0..4 << 20);
    check(&other, 0..4 << 20);
}

/// Wakes a thread.
struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        std::thread::park();
    }
}

#[test]
fn a_handle_is_a_future_of_its_report() {
    let _watchdog = Watchdog::seconds(60, "a future");
    let Some(engine) = build(small()) else { return };
    let region = region(&engine, 1 << 20, Folios::Base);
    // Polled before the end: it must be woken.
    let (handle, door) = held(&engine, &region);
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        door.open();
    });
    let report = block_on(handle).expect("a report");
    assert_eq!(report.by_outcome(), all(&region));
    opener.join().expect("no panic");
    // Polled after the end: it is ready.
    let handle =
        engine.migrate(region.to(first_node(&engine))).even_if_there().start().expect("a move");
    while !handle.is_finished() {
        std::thread::yield_now();
    }
    let progress = handle.progress();
    assert_eq!(progress.bytes_done, progress.bytes_total);
    assert_eq!(block_on(handle).expect("a report").by_outcome(), all(&region));
}
