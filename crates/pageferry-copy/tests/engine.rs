//! Engines as their users see them: the CPU engine and the models that misbehave.
#![cfg(not(loom))]

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use common::Pages;
use pageferry_copy::{
    Completion, CopyBatch, CopyEngine, CopyError, CopyOp, CpuEngine, Kernel, OpResult, SubmitError,
    WorkerPool, differs,
    model::{Behaviour, ModelEngine},
    recovers_from_faults,
};
use proptest::prelude::*;

const PAGE: usize = 4096;

fn pool(copiers: usize) -> Arc<WorkerPool> {
    Arc::new(WorkerPool::with_copiers(copiers, &[]).expect("threads can be started"))
}

/// Two mappings and a batch that copies one to the other, page by page.
struct Scene {
    dst: Pages,
    src: Pages,
    batch: Arc<CopyBatch>,
}

impl Scene {
    fn new(pages: usize) -> Self {
        let scene = Self {
            dst: Pages::new(pages * PAGE),
            src: Pages::new(pages * PAGE),
            batch: CopyBatch::with_capacity(pages),
        };
        scene.src.fill(0x42);
        scene.fill();
        scene
    }

    fn fill(&self) {
        // Backwards, so that neighbours in the batch are not neighbours in memory.
        let ops = (0..self.batch.capacity()).rev().map(|page| CopyOp {
            dst: self.dst.addr + page * PAGE,
            src: self.src.addr + page * PAGE,
            len: PAGE,
        });
        self.batch.fill(ops).expect("the batch is idle");
    }

    fn run(&self, engine: &dyn CopyEngine) {
        // SAFETY: both mappings are the scene's own, and outlive the wait.
        unsafe { engine.submit(&self.batch) }.expect("the engine takes it");
        engine.wait(&self.batch);
        assert!(self.batch.is_done());
    }

    fn copied(&self) -> bool {
        // SAFETY: both mappings are plain memory.
        let difference = unsafe { differs(self.dst.addr, self.src.addr, self.src.len) };
        difference == Ok(None)
    }
}

#[test]
fn every_kernel_with_any_number_of_copiers_copies_a_batch_again_and_again() {
    for copiers in [1, 2, 4] {
        let pool = pool(copiers);
        for kernel in Kernel::available() {
            let engine = CpuEngine::new(kernel, Arc::clone(&pool));
            let scene = Scene::new(128);
            for round in 0..3 {
                scene.src.fill(round);
                scene.run(&engine);
                assert!(scene.copied(), "{kernel}, {copiers} copiers");
                assert!(scene.batch.results().all(|result| result == OpResult::Done));
                scene.fill();
            }
        }
    }
}

#[test]
fn a_batch_is_copied_by_the_workers_alone_while_the_submitter_does_other_things() {
    let engine = CpuEngine::new(Kernel::MEMCPY, pool(2));
    let scene = Scene::new(256);
    // SAFETY: both mappings outlive the batch's copy.
    unsafe { engine.submit(&scene.batch) }.expect("the queue is empty");
    scene.batch.wait();
    assert!(scene.copied());
}

#[test]
fn small_and_empty_batches_are_done_by_whoever_waits() {
    let engine = CpuEngine::new(Kernel::MEMCPY, pool(1));
    let scene = Scene::new(1);
    scene.run(&engine);
    assert!(scene.copied());
    scene.batch.fill([]).expect("the batch is idle");
    scene.run(&engine);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn operations_of_any_size_with_any_chunk_are_copied_exactly(
        lens in prop::collection::vec((1_usize..40_000, 0_usize..3), 1..40),
        chunk in prop::sample::select(vec![1_usize, 4096, 12_288, 131_072]),
    ) {
        let engine = CpuEngine::with_limits(Kernel::MEMCPY, pool(2), 1, chunk);
        let total: usize = lens.iter().map(|(len, gap)| len + gap).sum();
        let (dst, src) = (Pages::new(total), Pages::new(total));
        src.fill(7);
        let mut at = 0;
        let ops: Vec<CopyOp> = lens.iter().map(|&(len, gap)| {
            let op = CopyOp { dst: dst.addr + at, src: src.addr + at, len };
            at += len + gap;
            op
        }).collect();
        let batch = CopyBatch::with_capacity(ops.len());
        batch.fill(ops.iter().copied()).expect("they fit");
        // SAFETY: both mappings are ours and outlive the wait.
        unsafe { engine.submit(&batch) }.expect("the queue is empty");
        engine.wait(&batch);
        prop_assert!(batch.results().all(|result| result == OpResult::Done));
        let mut copied = vec![false; total];
        for op in &ops {
            let start = op.dst - dst.addr;
            copied[start..start + op.len].fill(true);
        }
        for (at, copied) in copied.iter().enumerate() {
            prop_assert_eq!(dst.byte(at), if *copied { src.byte(at) } else { 0 });
        }
    }
}

#[test]
fn only_the_operation_that_faults_fails() {
    if !recovers_from_faults() {
        eprintln!("skipped: copies are not protected from faults on this machine");
        return;
    }
    for kernel in Kernel::available() {
        let engine = CpuEngine::new(kernel, pool(2));
        let (dst, src) = (Pages::new(64 * PAGE), Pages::new(64 * PAGE));
        src.fill(3);
        src.protect(20 * PAGE, PAGE, libc::PROT_NONE);
        let batch = CopyBatch::with_capacity(64);
        // Forwards: copied in runs of many pages.
        let ops = (0..64).map(|page| CopyOp {
            dst: dst.addr + page * PAGE,
            src: src.addr + page * PAGE,
            len: PAGE,
        });
        batch.fill(ops).expect("they fit");
        // SAFETY: both mappings are ours and outlive the wait.
        unsafe { engine.submit(&batch) }.expect("the queue is empty");
        engine.wait(&batch);
        for (page, result) in batch.results().enumerate() {
            let failed = matches!(
                result,
                OpResult::Failed(CopyError::MemoryFault { addr, signal: libc::SIGSEGV })
                    if addr / PAGE == src.addr / PAGE + 20
            );
            assert_eq!(failed, page == 20, "{kernel}: page {page}: {result:?}");
            assert!(failed || result == OpResult::Done);
        }
    }
}

#[test]
fn one_large_operation_fails_once_although_it_is_copied_in_chunks() {
    if !recovers_from_faults() {
        eprintln!("skipped: copies are not protected from faults on this machine");
        return;
    }
    let engine = CpuEngine::new(Kernel::MEMCPY, pool(2));
    let (dst, src) = (Pages::new(2 << 20), Pages::new(2 << 20));
    src.protect(1 << 20, 512 << 10, libc::PROT_NONE);
    let batch = CopyBatch::with_capacity(1);
    let op = CopyOp { dst: dst.addr, src: src.addr, len: 2 << 20 };
    batch.fill([op]).expect("it fits");
    // SAFETY: both mappings are ours and outlive the wait.
    unsafe { engine.submit(&batch) }.expect("the queue is empty");
    engine.wait(&batch);
    let result = batch.result(0);
    assert!(matches!(result, Some(OpResult::Failed(CopyError::MemoryFault { .. }))), "{result:?}");
    assert_eq!(batch.violations(), 0);
}

#[test]
fn cancelling_leaves_every_operation_done_or_cancelled_and_nothing_half_copied() {
    let engine = CpuEngine::with_limits(Kernel::MEMCPY, pool(2), 1, 4096);
    let scene = Scene::new(512);
    for round in 0..20_u8 {
        scene.src.fill(round);
        scene.dst.fill(!round);
        // SAFETY: both mappings outlive the batch's copy.
        unsafe { engine.submit(&scene.batch) }.expect("the queue is empty");
        for _ in 0..round {
            engine.help(&scene.batch);
        }
        engine.cancel(&scene.batch);
        assert!(scene.batch.is_done());
        for (index, result) in scene.batch.results().enumerate() {
            let page = (511 - index) * PAGE;
            let done = match result {
                OpResult::Done => true,
                OpResult::Cancelled => false,
                other => panic!("{other:?}"),
            };
            let like = if done { round } else { !round };
            assert!((page..page + PAGE).all(|at| scene.dst.byte(at) == common::pattern(at, like)));
        }
        scene.fill();
    }
}

#[test]
fn a_full_queue_refuses_the_batch_and_leaves_it_filled() {
    let engine = CpuEngine::new(Kernel::MEMCPY, pool(1));
    let depth = engine.capabilities().queue_depth;
    let scenes: Vec<Scene> = (0..=depth).map(|_| Scene::new(1)).collect();
    for scene in &scenes[..depth] {
        // SAFETY: the mappings outlive the copies.
        unsafe { engine.submit(&scene.batch) }.expect("there is room");
    }
    let last = &scenes[depth];
    // SAFETY: as above.
    let refused = unsafe { engine.submit(&last.batch) };
    assert_eq!(refused, Err(SubmitError::QueueFull { depth }));
    for scene in &scenes[..depth] {
        engine.wait(&scene.batch);
    }
    last.run(&engine);
    assert!(last.copied());
}

#[test]
fn dropping_the_engine_ends_every_batch() {
    let scene = Scene::new(1);
    let engine = CpuEngine::new(Kernel::MEMCPY, pool(1));
    // SAFETY: the mappings outlive the copy.
    unsafe { engine.submit(&scene.batch) }.expect("the queue is empty");
    drop(engine);
    assert_eq!(scene.batch.result(0), Some(OpResult::Failed(CopyError::Abandoned)));
}

#[test]
fn memory_that_another_thread_writes_meanwhile_is_copied_all_the_same() {
    let engine = CpuEngine::new(Kernel::MEMCPY, pool(2));
    let scene = Scene::new(64);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let word = std::ptr::with_exposed_provenance::<AtomicBool>(scene.src.addr + 5000);
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: within the mapping, which lives on.
                unsafe { &*word }.fetch_xor(true, Ordering::Relaxed);
            }
        });
        for _ in 0..20 {
            scene.run(&engine);
            scene.fill();
        }
        stop.store(true, Ordering::Relaxed);
    });
    scene.run(&engine);
    assert!(scene.copied());
}

fn models(behaviour: Behaviour) -> [ModelEngine; 2] {
    let threaded = ModelEngine::threaded(behaviour).expect("a thread can be started");
    [threaded, ModelEngine::polled(behaviour)]
}

fn outcomes(behaviour: Behaviour, pages: usize) -> Vec<Vec<OpResult>> {
    (models(behaviour).iter())
        .map(|engine| {
            let scene = Scene::new(pages);
            scene.run(engine);
            scene.batch.results().collect()
        })
        .collect()
}

#[test]
fn a_faithful_or_slow_or_backward_model_copies_all() {
    let slow = Behaviour::Slow(Duration::from_millis(1));
    for behaviour in [Behaviour::Faithful, Behaviour::Backwards, slow] {
        for engine in models(behaviour) {
            let scene = Scene::new(8);
            scene.run(&engine);
            assert!(scene.copied() && scene.batch.violations() == 0, "{behaviour:?}");
        }
    }
}

#[test]
fn a_polled_engine_does_nothing_until_it_is_polled_and_may_finish_backwards() {
    let engine = ModelEngine::polled(Behaviour::Backwards);
    assert!(matches!(engine.capabilities().completion, Completion::Polled { .. }));
    let scene = Scene::new(3);
    // SAFETY: the mappings outlive the copy.
    unsafe { engine.submit(&scene.batch) }.expect("the queue is empty");
    assert_eq!(scene.batch.remaining(), 3);
    engine.poll();
    let (pending, done) = (OpResult::Pending, OpResult::Done);
    assert!(scene.batch.results().eq([pending, pending, done]));
    engine.cancel(&scene.batch);
    assert!(scene.batch.results().eq([OpResult::Cancelled, OpResult::Cancelled, done]));
}

#[test]
fn a_model_that_fails_faults_or_lies_fails_those_operations_only() {
    let cases = [
        Behaviour::Fails { every: 3, code: 19 },
        Behaviour::Faults { every: 3 },
        Behaviour::Short { every: 3, by: 1 },
        Behaviour::Forgets { every: 3 },
    ];
    for behaviour in cases {
        for results in outcomes(behaviour, 9) {
            for (index, result) in results.into_iter().enumerate() {
                let wrong = (index + 1).is_multiple_of(3);
                assert_eq!(matches!(result, OpResult::Failed(_)), wrong, "{behaviour:?}");
                assert!(wrong || result == OpResult::Done, "{behaviour:?}");
            }
        }
    }
}

#[test]
fn a_model_that_claims_too_much_fails_and_one_that_completes_twice_is_noticed() {
    for results in outcomes(Behaviour::Long, 2) {
        let long = |result| matches!(result, OpResult::Failed(CopyError::LongCopy { .. }));
        assert!(results.into_iter().all(long));
    }
    for engine in models(Behaviour::Twice) {
        let scene = Scene::new(4);
        scene.run(&engine);
        assert!(scene.copied());
        assert_eq!(scene.batch.violations(), 4);
    }
}

#[test]
fn a_model_that_panics_loses_no_completion_and_takes_no_more() {
    for engine in models(Behaviour::Panics { after: 2 }) {
        let scene = Scene::new(4);
        scene.run(&engine);
        let lost = OpResult::Failed(CopyError::Abandoned);
        let done = OpResult::Done;
        assert!(scene.batch.results().eq([done, done, lost, lost]));
        scene.fill();
        // SAFETY: the mappings live on.
        let refused = unsafe { engine.submit(&scene.batch) };
        assert!(matches!(refused, Err(SubmitError::OutOfService { .. })));
    }
}
