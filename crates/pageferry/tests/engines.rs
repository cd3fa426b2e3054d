//! Copy engines that fail, dawdle, panic, lie, forget, or complete out of order: the content is
//! right whatever they do, every page is accounted for, and the report says who had to help.

mod support;
mod trial;

use pageferry::{Engine, Folios, MigrateError, Order, Outcome, Region, Report};
use pageferry_copy::model::{Behaviour, ModelEngine};
use pageferry_copy::{
    Capabilities, Completion, CopyBatch, CopyEngine, CopyOp, EngineId, SubmitError, Ticket,
};
use pageferry_sys::page_size;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use support::{Racers, build, check, fill, first_node, promised, thinned};
use trial::{Watchdog, accounted_whole, small};

/// Bytes of a batch of base pages.
const BATCH: usize = 256 << 10;

fn region(engine: &Engine, folios: Folios) -> Arc<Region> {
    region_of(engine, folios, 4 << 20)
}

fn region_of(engine: &Engine, folios: Folios, bytes: usize) -> Arc<Region> {
    let region = promised(engine.map(bytes).folios(folios)).build().expect("memory for the test");
    fill(&region, 0..region.len());
    Arc::new(region)
}

fn attempt(
    engine: &Engine,
    region: &Region,
    order: Order,
    copier: &Arc<dyn CopyEngine>,
) -> Result<Report, MigrateError> {
    engine
        .migrate(region.to(first_node(engine)))
        .even_if_there()
        .order(order)
        .batch_bytes(BATCH)
        .engine(Arc::clone(copier))
        .run()
}

/// Moves twice by each order and folio size; `falls_back`: the report must name fallbacks.
fn serves(what: &str, falls_back: bool, make: impl Fn() -> Arc<dyn CopyEngine>) {
    let _watchdog = Watchdog::seconds(60, what);
    let Some(engine) = build(small()) else { return };
    for (folios, order) in thinned([
        (Folios::Base, Order::Frozen),
        (Folios::Huge, Order::Frozen),
        (Folios::Huge, Order::Live),
        (Folios::Base, Order::Live),
    ]) {
        let (copier, what) = (make(), format!("{what}, {folios:?}, {order:?}"));
        let region = region(&engine, folios);
        let racers = Racers::start(&region, 1, 1);
        let mut fallbacks = 0;
        for _ in 0..2 {
            let report = attempt(&engine, &region, order, &copier).expect("a move");
            accounted_whole(&report, &region);
            let all = [(Outcome::Moved, region.len() as u64)];
            assert_eq!(report.by_outcome(), all, "{what}: {report:?}");
            assert_eq!(report.engine, copier.name());
            fallbacks += report.fallbacks;
        }
        racers.finish();
        assert_eq!(fallbacks > 0, falls_back, "{what}: {fallbacks} fallbacks");
    }
}

fn models(behaviour: Behaviour, falls_back: bool) {
    serves(&format!("a polled engine, {behaviour:?}"), falls_back, || {
        Arc::new(ModelEngine::polled(behaviour))
    });
    serves(&format!("a threaded engine, {behaviour:?}"), falls_back, || {
        Arc::new(ModelEngine::threaded(behaviour).expect("a thread"))
    });
}

#[test]
fn a_faithful_engine_copies_without_help() {
    models(Behaviour::Faithful, false);
}

#[test]
fn an_engine_that_completes_backwards_or_slowly_is_waited_for() {
    models(Behaviour::Backwards, false);
    models(Behaviour::Slow(Duration::from_millis(2)), false);
}

#[test]
fn an_engine_that_refuses_every_batch_is_replaced_by_the_cpu() {
    models(Behaviour::Refuses, true);
}

#[test]
fn operations_that_a_device_fails_are_copied_by_the_cpu() {
    models(Behaviour::Fails { every: 1, code: 7 }, true);
    models(Behaviour::Fails { every: 3, code: 7 }, true);
    models(Behaviour::Faults { every: 2 }, true);
}

#[test]
fn an_engine_that_lies_about_a_length_is_not_believed() {
    models(Behaviour::Short { every: 1, by: 4096 }, true);
    models(Behaviour::Short { every: 2, by: 1 }, true);
    models(Behaviour::Long, true);
}

#[test]
fn an_engine_that_completes_twice_or_forgets_does_no_harm() {
    models(Behaviour::Twice, false);
    models(Behaviour::Forgets { every: 1 }, true);
    models(Behaviour::Forgets { every: 2 }, true);
}

#[test]
fn an_engine_that_panics_on_its_own_thread_is_replaced_by_the_cpu() {
    models(Behaviour::Panics { after: 0 }, true);
    models(Behaviour::Panics { after: 2 }, true);
}

/// Where [`Odd`] panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Panics {
    Never,
    /// In `submit`, before it takes the batch.
    Refusing,
    /// In `submit`, with the batch in its hands.
    Taking,
    /// In `poll`, and drops what it holds.
    Polling,
    /// In `help`, and drops what it holds.
    Helping,
}

/// An engine that takes batches and copies nothing unless told; panics on the caller's thread.
struct Odd {
    id: EngineId,
    panics: Panics,
    held: Mutex<Vec<Ticket>>,
    /// Panics in `capabilities` from now on.
    mute: AtomicBool,
    submitted: AtomicUsize,
}

impl std::fmt::Debug for Odd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Odd({:?})", self.panics)
    }
}

impl Odd {
    fn new(panics: Panics) -> Arc<Self> {
        Arc::new(Self {
            id: EngineId::new(),
            panics,
            held: Mutex::default(),
            mute: AtomicBool::new(false),
            submitted: AtomicUsize::new(0),
        })
    }

    fn take(&self) -> Vec<Ticket> {
        std::mem::take(&mut *self.held.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[expect(clippy::panic, reason = "this is what these engines are for")]
fn as_told() -> ! {
    panic!("the engine panics as it was told to")
}

impl CopyEngine for Odd {
    fn name(&self) -> &str {
        "odd"
    }
    fn capabilities(&self) -> Capabilities {
        if self.mute.load(Ordering::Relaxed) {
            as_told();
        }
        Capabilities {
            max_op_len: 1 << 30,
            alignment: 1,
            queue_depth: 16,
            max_parallel: 1,
            is_cpu: false,
            uses_caller_cpu: false,
            completion: Completion::Polled { interval: Duration::from_micros(50) },
        }
    }
    unsafe fn submit(&self, batch: &Arc<CopyBatch>) -> Result<(), SubmitError> {
        if self.panics == Panics::Refusing {
            as_told();
        }
        let ticket = batch.begin(&self.id)?;
        if self.panics == Panics::Taking {
            as_told();
        }
        self.held.lock().unwrap_or_else(PoisonError::into_inner).push(ticket);
        self.submitted.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn poll(&self) {
        if self.panics == Panics::Polling {
            let _dropped = self.take();
            as_told();
        }
    }
    fn help(&self, _: &CopyBatch) -> bool {
        if self.panics == Panics::Helping {
            let _dropped = self.take();
            as_told();
        }
        false
    }
    fn cancel(&self, _: &CopyBatch) {}
}

#[test]
fn an_engine_that_panics_on_the_movers_thread_is_replaced_by_the_cpu() {
    for panics in [Panics::Refusing, Panics::Taking, Panics::Polling, Panics::Helping] {
        serves(&format!("an engine with panic {panics:?}"), true, || Odd::new(panics));
    }
}

#[test]
fn an_engine_that_never_completes_is_given_up_and_the_pages_stay() {
    let _watchdog = Watchdog::seconds(60, "an engine that never completes");
    let Some(engine) = build(small()) else { return };
    // One batch: each that hangs takes the whole time until it is given up.
    let region = region_of(&engine, Folios::Base, BATCH);
    let racers = Racers::start(&region, 1, 1);
    let odd = Odd::new(Panics::Never);
    let copier: Arc<dyn CopyEngine> = odd.clone();
    let report = attempt(&engine, &region, Order::Frozen, &copier).expect("a move");
    accounted_whole(&report, &region);
    assert_eq!(odd.submitted.load(Ordering::Relaxed), 1);
    assert_eq!(report.by_outcome(), [(Outcome::CopyFailed, BATCH as u64)], "{report:?}");
    // Years later the device writes after all: into memory that serves nothing any more.
    write_late(&odd.take());
    let report = attempt(&engine, &region, Order::Frozen, &cpu(&engine)).expect("a move");
    assert_eq!(report.by_outcome(), [(Outcome::Moved, region.len() as u64)], "{report:?}");
    racers.finish();
}

/// Works only when polled, on one of many polls.
#[derive(Debug)]
struct Lazy {
    model: ModelEngine,
    polls: AtomicUsize,
}

impl CopyEngine for Lazy {
    fn name(&self) -> &str {
        "lazy"
    }
    fn capabilities(&self) -> Capabilities {
        self.model.capabilities()
    }
    unsafe fn submit(&self, batch: &Arc<CopyBatch>) -> Result<(), SubmitError> {
        // SAFETY: the same promise.
        unsafe { self.model.submit(batch) }
    }
    fn poll(&self) {
        if self.polls.fetch_add(1, Ordering::Relaxed) % 3000 == 2999 {
            self.model.poll();
        }
    }
    fn cancel(&self, batch: &CopyBatch) {
        self.model.cancel(batch);
    }
}

/// More polls than there would be naps of 5 ms until an engine is given up.
#[test]
fn an_engine_is_polled_as_often_as_it_asks_for() {
    let _watchdog = Watchdog::seconds(60, "a polled engine");
    let Some(engine) = build(small()) else { return };
    let region = region_of(&engine, Folios::Base, BATCH);
    let model = ModelEngine::polled(Behaviour::Faithful);
    let lazy: Arc<dyn CopyEngine> = Arc::new(Lazy { model, polls: AtomicUsize::new(0) });
    let report = attempt(&engine, &region, Order::Frozen, &lazy).expect("a move");
    assert_eq!(report.by_outcome(), [(Outcome::Moved, BATCH as u64)], "{report:?}");
    check(&region, 0..region.len());
}

fn cpu(engine: &Engine) -> Arc<dyn CopyEngine> {
    engine.cpu().clone()
}

/// Rubbish for every operation of the batches that an engine still holds.
fn write_late(tickets: &[Ticket]) {
    for batch in tickets.iter().map(Ticket::batch) {
        for CopyOp { dst, len, .. } in (0..batch.len()).filter_map(|i| batch.op(i)) {
            // SAFETY: `submit`'s promise: until the batch is done its destinations are the
            // engine's, and the tickets say that it is not.
            unsafe { std::ptr::with_exposed_provenance_mut::<u8>(dst).write_bytes(0xEE, len) };
        }
    }
}

#[test]
fn what_a_device_still_writes_after_a_panic_of_the_move_hits_nobody() {
    let _watchdog = Watchdog::seconds(60, "a panic with batches in the air");
    let Some(engine) = build(small()) else { return };
    let odd = Odd::new(Panics::Never);
    let copier: Arc<dyn CopyEngine> = odd.clone();
    let region = region_of(&engine, Folios::Base, BATCH);
    let racers = Racers::start(&region, 1, 1);
    let mover = std::thread::spawn({
        let (engine, region) = (engine.clone(), Arc::clone(&region));
        move || attempt(&engine, &region, Order::Live, &copier)
    });
    while odd.submitted.load(Ordering::Relaxed) == 0 {
        std::thread::yield_now();
    }
    odd.mute.store(true, Ordering::Relaxed);
    // Either the panic of `capabilities` ended the move, or it was caught and the CPU went on.
    match mover.join().expect("panics do not leave the library") {
        Ok(report) => accounted_whole(&report, &region),
        Err(why) => assert!(matches!(why, MigrateError::Panicked(_)), "{why}"),
    }
    write_late(&odd.take());
    for _ in 0..3 {
        let report = attempt(&engine, &region, Order::Frozen, &cpu(&engine)).expect("a move");
        assert_eq!(report.by_outcome(), [(Outcome::Moved, region.len() as u64)], "{report:?}");
    }
    racers.finish();
}

#[test]
fn one_engine_may_serve_two_moves_at_once() {
    let _watchdog = Watchdog::seconds(60, "two moves with one engine");
    let Some(engine) = build(small()) else { return };
    let model = ModelEngine::threaded(Behaviour::Fails { every: 5, code: 1 }).expect("a thread");
    let copier: Arc<dyn CopyEngine> = Arc::new(model);
    let regions = [region(&engine, Folios::Base), region(&engine, Folios::Base)];
    std::thread::scope(|scope| {
        for region in &regions {
            let (engine, copier) = (&engine, &copier);
            scope.spawn(move || {
                for order in [Order::Frozen, Order::Live] {
                    let report = attempt(engine, region, order, copier).expect("a move");
                    assert_eq!(report.by_outcome(), [(Outcome::Moved, region.len() as u64)]);
                }
            });
        }
    });
    for region in &regions {
        check(region, 0..region.len());
    }
    assert!(regions[0].len() > page_size());
}
