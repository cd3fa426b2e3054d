//! The protocol of a batch under every interleaving with few preemptions:
//! `RUSTFLAGS="--cfg loom" cargo test -p pageferry-copy --release loom`.
#![cfg(loom)]

use std::sync::Arc;

use loom::thread;
use pageferry_copy::{
    CopyBatch, CopyEngine, CopyError, CopyOp, CpuEngine, EngineId, Kernel, OpResult, WorkerPool,
};

const DONE: OpResult = OpResult::Done;
const LOST: OpResult = OpResult::Failed(CopyError::Abandoned);

/// Every interleaving with at most three preemptions: without a bound the
/// models take minutes (`LOOM_MAX_PREEMPTIONS` sets another).
fn model(check: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(3);
    builder.check(check);
}

/// A batch of operations that nobody will carry out.
fn filled(count: usize) -> Arc<CopyBatch> {
    let batch = CopyBatch::with_capacity(count);
    let op = |at: usize| CopyOp { dst: 0x1000 + at * 8, src: 0x2000 + at * 8, len: 8 };
    batch.fill((0..count).map(op)).expect("they fit");
    batch
}

#[test]
fn loom_a_sleeper_wakes_when_two_threads_complete_and_then_the_batch_can_be_refilled() {
    model(|| {
        let (batch, engine) = (filled(2), EngineId::new());
        let ticket = batch.begin(&engine).expect("it is filled");
        let other = ticket.clone();
        let first = thread::spawn(move || ticket.complete(0, Ok(8)));
        let second = thread::spawn(move || other.visit().complete(1, Ok(8)));
        batch.wait();
        assert!(batch.is_done());
        assert!(batch.results().eq([DONE, DONE]));
        let op = CopyOp { dst: 1, src: 9, len: 1 };
        batch.fill([op]).expect("a batch that is done is idle");
        assert_eq!(batch.result(0), Some(OpResult::Pending));
        first.join().expect("no panic");
        second.join().expect("no panic");
    });
}

#[test]
fn loom_what_the_last_user_leaves_behind_is_abandoned_exactly_once() {
    model(|| {
        let (batch, engine) = (filled(2), Arc::new(EngineId::new()));
        let ticket = batch.begin(&engine).expect("it is filled");
        let shared = Arc::clone(&batch);
        let visitor = thread::spawn(move || {
            let visit = shared.visit(&engine);
            if let Some(visit) = &visit {
                visit.complete(0, Ok(8));
            }
            visit.is_some()
        });
        drop(ticket);
        batch.wait();
        assert!(batch.is_done());
        let visited = visitor.join().expect("no panic");
        assert!(batch.results().eq([if visited { DONE } else { LOST }, LOST]));
        assert_eq!(batch.violations(), 0);
    });
}

#[test]
fn loom_one_operation_completed_by_two_threads_has_one_result() {
    model(|| {
        let (batch, engine) = (filled(1), EngineId::new());
        let ticket = batch.begin(&engine).expect("it is filled");
        let other = ticket.clone();
        let liar = thread::spawn(move || other.complete(0, Err(CopyError::Device { code: 5 })));
        ticket.complete(0, Ok(8));
        drop(ticket);
        batch.wait();
        let failed = OpResult::Failed(CopyError::Device { code: 5 });
        let result = batch.result(0).expect("there is one");
        assert!(result == DONE || result == failed, "{result:?}");
        liar.join().expect("no panic");
        assert_eq!(batch.violations(), 1);
    });
}

#[test]
fn loom_the_parts_of_one_operation_add_up_with_the_error_of_one() {
    model(|| {
        let (batch, engine) = (filled(1), EngineId::new());
        let ticket = batch.begin(&engine).expect("it is filled");
        let other = ticket.clone();
        let error = CopyError::Device { code: 5 };
        let failing = thread::spawn(move || other.complete_part(0, 3, Err(error)));
        ticket.complete_part(0, 5, Ok(()));
        drop(ticket);
        batch.wait();
        assert_eq!(batch.result(0), Some(OpResult::Failed(error)));
        failing.join().expect("no panic");
    });
}

/// Claim, complete, cancel and wait of the CPU engine itself, with real bytes.
fn engine_with(others: impl Fn(&CpuEngine, &CopyBatch) + Send + Sync + Copy + 'static) {
    const PAGE: usize = 4096;
    let pool = Arc::new(WorkerPool::with_copiers(1, &[]).expect("no thread is needed"));
    model(move || {
        let engine = CpuEngine::with_limits(Kernel::MEMCPY, Arc::clone(&pool), 0, PAGE);
        let engine = Arc::new(engine);
        let (src, mut dst) = (vec![7_u8; 2 * PAGE], vec![0_u8; 2 * PAGE]);
        let (to, from) = (dst.as_mut_ptr().expose_provenance(), src.as_ptr().expose_provenance());
        let batch = CopyBatch::with_capacity(2);
        let op = |at: usize| CopyOp { dst: to + at * PAGE, src: from + at * PAGE, len: PAGE };
        batch.fill([op(0), op(1)]).expect("they fit");
        // SAFETY: the vectors are looked at only after the batch is done.
        unsafe { engine.submit(&batch) }.expect("the queue is empty");
        let other = {
            let (engine, batch) = (Arc::clone(&engine), Arc::clone(&batch));
            thread::spawn(move || others(&engine, &batch))
        };
        while engine.help(&batch) {}
        batch.wait();
        assert!(batch.is_done());
        for (index, result) in batch.results().enumerate() {
            let want = match result {
                OpResult::Done => 7,
                OpResult::Cancelled => 0,
                other => panic!("{other:?}"),
            };
            assert!(dst[index * PAGE..][..PAGE].iter().all(|&byte| byte == want));
        }
        assert_eq!(batch.violations(), 0);
        other.join().expect("no panic");
    });
}

#[test]
fn loom_two_helpers_copy_every_byte_once() {
    engine_with(|engine, batch| while engine.help(batch) {});
}

#[test]
fn loom_cancel_against_a_helper_leaves_each_operation_whole_or_untouched() {
    engine_with(|engine, batch| engine.cancel(batch));
}
