//! Moves and looks where a sandbox, or the kernel, refuses what they need: named before anything
//! is tried, and never told as something else.

#[path = "support/made_up.rs"]
mod made_up;

use made_up::{BASE, PID, kernel_with, node, pages, to_node};
use pageferry::process::{Note, ProcessError, Selection, TargetError, Where};
use pageferry_sys::process::fake::{FakeKernel, FakeVma, Hindrance, ProcessOp};
use pageferry_sys::{Errno, page_size};
use std::sync::Arc;

fn kernel() -> FakeKernel {
    kernel_with(2, vec![FakeVma::anonymous(BASE, page_size(), 100, 0)])
}

fn look(kernel: &FakeKernel) -> Where {
    Where::new(Selection::new().pid(PID)).kernel(Arc::new(kernel.clone()))
}

#[test]
fn a_call_that_a_sandbox_refuses_is_named_before_anything_is_tried() {
    for errno in [Errno(libc::EPERM), Errno(libc::ENOSYS), Errno(libc::EACCES)] {
        let kernel = kernel();
        kernel.refuse(errno);
        let found = look(&kernel).look();
        assert!(matches!(found, Err(TargetError::Refused(e)) if e == errno), "{found:?}");
        for dry_run in [false, true] {
            let moved = to_node(&kernel, 1).dry_run(dry_run).run();
            let is_named = matches!(
                &moved,
                Err(ProcessError::Target(TargetError::Refused(e))) if *e == errno
            );
            assert!(is_named, "{moved:?}");
        }
        let tried = [ProcessOp::Maps, ProcessOp::Nodes, ProcessOp::MovePages];
        assert_eq!(tried.map(|op| kernel.calls(op)), [0; 3]);
    }
}

#[test]
fn without_numa_all_memory_is_on_node_0_and_none_can_move() {
    let kernel = kernel();
    kernel.without_numa();
    let found = look(&kernel).look().expect("all on one node");
    assert_eq!((found.bytes(), found.unknown, found.gone), (pages(100), 0, 0));
    assert_eq!(found.by_node().into_iter().collect::<Vec<_>>(), [(node(0), pages(100))]);
    assert!(found.notes.list.contains(&Note::NoNuma), "{found:?}");
    let moved = to_node(&kernel, 1).run();
    assert!(matches!(moved, Err(ProcessError::NoNuma(Errno(libc::ENOSYS)))), "{moved:?}");
}

#[test]
fn numbers_of_another_pid_namespace_name_nobody() {
    let kernel = kernel();
    kernel.with_foreign_procfs();
    let found = look(&kernel).look();
    assert!(matches!(found, Err(TargetError::ForeignProcfs)), "{found:?}");
    let moved = to_node(&kernel, 1).run();
    let is_named = matches!(moved, Err(ProcessError::Target(TargetError::ForeignProcfs)));
    assert!(is_named && kernel.calls(ProcessOp::Open) == 0, "{moved:?}");
}

#[test]
fn what_was_given_back_is_told_from_what_cannot_be_told() {
    let mut vma = FakeVma::anonymous(BASE, page_size(), 100, 0);
    (0..10).for_each(|i| vma.pages[i].hindrance = Some(Hindrance::Vanishes));
    let kernel = kernel_with(2, vec![vma]);
    let found = look(&kernel).look().expect("valid");
    assert_eq!((found.bytes(), found.unknown, found.gone), (pages(90), 0, pages(10)));
    // A security module may refuse one process only.
    kernel.fail(ProcessOp::Nodes, Errno(libc::EPERM), 0, u64::MAX);
    let found = look(&kernel).look().expect("valid");
    assert_eq!((found.bytes(), found.unknown, found.gone), (pages(90), pages(90), 0));
    assert!(found.notes.list.contains(&Note::Unreadable { pid: PID, errno: libc::EPERM }));
}
