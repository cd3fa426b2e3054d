//! The life of a batch, and what it makes of engines that lie.
#![cfg(not(loom))]

use std::sync::Arc;

use pageferry_copy::{CopyBatch, CopyError, CopyOp, EngineId, FillError, OpResult, SubmitError};

fn ops(count: usize) -> impl Iterator<Item = CopyOp> {
    (0..count).map(|at| CopyOp {
        dst: 0x10_0000 + at * 4096,
        src: 0x90_0000 + at * 4096,
        len: 4096,
    })
}

fn filled(count: usize) -> Arc<CopyBatch> {
    let batch = CopyBatch::with_capacity(count);
    batch.fill(ops(count)).expect("they fit");
    batch
}

#[test]
fn a_batch_goes_from_filled_to_submitted_to_done_and_around_again() {
    let (batch, engine) = (filled(2), EngineId::new());
    for _ in 0..3 {
        assert!(!batch.is_done() && !batch.is_submitted());
        let ticket = batch.begin(&engine).expect("it is filled");
        assert!(batch.is_submitted());
        assert_eq!(batch.fill(ops(1)), Err(FillError::InUse));
        assert_eq!(batch.begin(&engine).err(), Some(SubmitError::NotReady));
        ticket.complete(1, Ok(4096));
        assert_eq!(batch.result(1), Some(OpResult::Done));
        assert_eq!((batch.remaining(), batch.is_done()), (1, false));
        ticket.complete(0, Err(CopyError::Device { code: -5 }));
        drop(ticket);
        assert!(batch.is_done());
        assert_eq!(batch.result(0), Some(OpResult::Failed(CopyError::Device { code: -5 })));
        assert_eq!(batch.result(2), None);
        batch.fill(ops(2)).expect("it is idle");
        assert_eq!(batch.result(0), Some(OpResult::Pending));
    }
}

#[test]
fn a_batch_is_not_done_while_the_engine_still_holds_it() {
    let (batch, engine) = (filled(1), EngineId::new());
    let ticket = batch.begin(&engine).expect("it is filled");
    let other = ticket.clone();
    ticket.complete(0, Ok(4096));
    drop(ticket);
    assert!(!batch.is_done());
    drop(other);
    assert!(batch.is_done());
}

#[test]
fn wrong_lengths_fail_the_operation() {
    let (batch, engine) = (filled(2), EngineId::new());
    let ticket = batch.begin(&engine).expect("it is filled");
    ticket.complete(0, Ok(4095));
    ticket.complete(1, Ok(4097));
    let (asked, short, long) = (4096, 4095, 4097);
    let want = [
        OpResult::Failed(CopyError::ShortCopy { asked, copied: short }),
        OpResult::Failed(CopyError::LongCopy { asked, copied: long }),
    ];
    assert!(batch.results().eq(want));
}

#[test]
fn a_second_completion_changes_nothing_and_is_counted() {
    let (batch, engine) = (filled(2), EngineId::new());
    let ticket = batch.begin(&engine).expect("it is filled");
    ticket.complete(0, Ok(4096));
    ticket.complete(0, Err(CopyError::Abandoned));
    ticket.complete(7, Ok(4096));
    assert_eq!(batch.result(0), Some(OpResult::Done));
    assert_eq!((batch.remaining(), batch.violations()), (1, 2));
}

#[test]
fn parts_add_up_in_any_order_and_the_first_error_wins() {
    let (batch, engine) = (filled(3), EngineId::new());
    let ticket = batch.begin(&engine).expect("it is filled");
    let fault = CopyError::MemoryFault { addr: 77, signal: 7 };
    ticket.complete_part(0, 4000, Ok(()));
    ticket.complete_part(1, 96, Err(fault));
    ticket.complete_part(0, 96, Ok(()));
    assert_eq!(batch.result(1), Some(OpResult::Pending));
    ticket.complete_part(1, 4000, Err(CopyError::Abandoned));
    ticket.complete_part(2, 4000, Ok(()));
    ticket.complete_part(2, 4000, Ok(()));
    let long = CopyError::LongCopy { asked: 4096, copied: 8000 };
    let want = [OpResult::Done, OpResult::Failed(fault), OpResult::Failed(long)];
    assert!(batch.results().eq(want));
}

#[test]
fn what_an_engine_leaves_behind_fails_as_abandoned() {
    let (batch, engine) = (filled(3), EngineId::new());
    let ticket = batch.begin(&engine).expect("it is filled");
    ticket.complete(1, Ok(4096));
    drop(ticket);
    let lost = OpResult::Failed(CopyError::Abandoned);
    assert!(batch.is_done());
    assert!(batch.results().eq([lost, OpResult::Done, lost]));
}

#[test]
fn completions_of_a_visit_count_when_it_ends_even_by_a_panic() {
    let (batch, engine) = (filled(2), EngineId::new());
    let ticket = batch.begin(&engine).expect("it is filled");
    let shared = Arc::clone(&batch);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let visit = shared.visit(&engine).expect("it is submitted");
        visit.complete(0, Ok(4096));
        std::panic::resume_unwind(Box::new("as planned"));
    }));
    assert!(panicked.is_err());
    assert_eq!(batch.remaining(), 1);
    drop(ticket);
    assert!(batch.is_done());
}

#[test]
fn another_engine_cannot_visit_the_batch() {
    let (batch, engine) = (filled(1), EngineId::new());
    assert!(batch.visit(&engine).is_none(), "not submitted yet");
    let ticket = batch.begin(&engine).expect("it is filled");
    assert!(batch.visit(&EngineId::new()).is_none());
    assert!(batch.visit(&engine).is_some());
    drop(ticket);
    assert!(batch.visit(&engine).is_none(), "done");
}

#[test]
fn bad_operations_are_refused_by_index_and_leave_the_batch_empty_and_usable() {
    let batch = CopyBatch::with_capacity(2);
    let bad = [
        CopyOp { dst: 4096, src: 8192, len: 0 },
        CopyOp { dst: usize::MAX - 5, src: 8192, len: 7 },
        CopyOp { dst: 4096, src: usize::MAX - 5, len: 7 },
        CopyOp { dst: 4096, src: 4097, len: 2 },
        CopyOp { dst: 4097, src: 4096, len: 2 },
    ];
    for op in bad {
        let result = batch.fill(ops(1).chain([op]));
        assert!(matches!(result, Err(FillError::BadOp { index: 1, .. })), "{op:?}: {result:?}");
        assert!(batch.is_done() && batch.is_empty());
    }
    assert_eq!(batch.fill(ops(3)), Err(FillError::Full { capacity: 2 }));
    batch.fill(ops(2)).expect("two fit");
    assert_eq!((batch.len(), batch.bytes()), (2, 8192));
}

#[test]
fn waiting_for_a_batch_that_is_not_submitted_returns_at_once() {
    let batch = filled(1);
    batch.wait();
    assert!(batch.wait_timeout(std::time::Duration::from_secs(3600)));
}

#[test]
fn many_sleepers_wake_when_the_last_result_arrives() {
    let (batch, engine) = (filled(1), EngineId::new());
    let ticket = batch.begin(&engine).expect("it is filled");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                batch.wait();
                assert_eq!(batch.result(0), Some(OpResult::Done));
            });
        }
        scope.spawn(move || {
            ticket.complete(0, Ok(4096));
        });
    });
}
