//! What goes wrong with made-up processes: they end, change, refuse; calls fail at any moment.

#[path = "support/made_up.rs"]
mod made_up;

use made_up::{BASE, PID, PLENTY, bytes, kernel_with, node, of, pages, to_destination, to_node};
use pageferry::process::{Destination, Note, ProcessError, ProcessMove, Selection, TargetError};
use pageferry::{HUGE, Outcome, Shortage};
use pageferry_sys::process::Backing;
use pageferry_sys::process::fake::{
    Event, FakeKernel, FakePage, FakeProcess, FakeVma, Hindrance, ProcessOp,
};
use pageferry_sys::{Errno, page_size};
use proptest::prelude::*;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[test]
fn a_process_that_ends_half_way_is_a_note_and_its_pages_are_told() {
    let vmas = vec![FakeVma::anonymous(BASE, page_size(), 50_000, 0)];
    let kernel = kernel_with(2, vmas);
    kernel.before_move(3, Event::Exit(PID));
    let report = to_node(&kernel, 1).run().expect("valid");
    assert!(report.notes.list.contains(&Note::Exited { pid: PID }), "{report:?}");
    let moved = bytes(&report, Outcome::Moved);
    assert!(moved > 0);
    assert_eq!(moved + bytes(&report, Outcome::Exited), report.bytes_looked_at());
    assert!(report.is_complete());
}

#[test]
fn a_process_that_executes_another_program_is_moved_as_that() {
    let kernel = kernel_with(2, vec![FakeVma::anonymous(BASE, page_size(), 50_000, 0)]);
    let fresh = FakeVma::anonymous(BASE * 2, page_size(), 700, 0);
    kernel.before_move(2, Event::Exec(PID, vec![fresh]));
    let report = to_node(&kernel, 1).run().expect("valid");
    assert!(report.notes.list.contains(&Note::Executed { pid: PID }), "{report:?}");
    assert!(kernel.nodes_of(PID)[0].iter().all(|n| *n == Some(1)));
    assert!(bytes(&report, Outcome::Unmapped) > 0);
}

#[test]
fn memory_that_is_unmapped_meanwhile_is_a_note() {
    let vmas = (0..3).map(|i| FakeVma::anonymous(BASE + i * (1 << 30), page_size(), 9000, 0));
    let kernel = kernel_with(2, vmas.collect());
    kernel.before_move(2, Event::Unmap(PID, BASE..BASE + (1 << 30)));
    let report = to_node(&kernel, 1).run().expect("valid");
    let gone = bytes(&report, Outcome::Unmapped);
    assert!(gone > 0 && report.is_complete());
    assert!(report.notes.list.contains(&Note::Changing { pid: PID, bytes: gone }), "{report:?}");
}

#[test]
fn who_joins_a_cgroup_meanwhile_is_moved_too() {
    let kernel = kernel_with(2, vec![FakeVma::anonymous(BASE, page_size(), 5000, 0)]);
    let group = Path::new("/jobs");
    kernel.join(group, PID);
    let late = FakeProcess::new(7, vec![FakeVma::anonymous(BASE, page_size(), 100, 0)]);
    kernel.before_move(1, Event::Join(group.into(), late));
    let jobs = Selection::new().cgroup(group);
    let report = of(&kernel, jobs, Destination::node(node(1))).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Moved), pages(5100));
    assert_eq!(report.processes, 2);
    assert!(report.notes.list.contains(&Note::Joined { pid: 7 }), "{report:?}");
}

#[test]
fn a_cancelled_move_stops_after_the_call_under_way() {
    let kernel = kernel_with(2, vec![FakeVma::anonymous(BASE, page_size(), 100_000, 0)]);
    let flag = Arc::new(AtomicBool::new(false));
    kernel.page_takes(Duration::from_micros(100));
    let raise = Arc::clone(&flag);
    let watched = kernel.clone();
    let thread = std::thread::spawn(move || {
        while watched.calls(ProcessOp::MovePages) < 3 {
            std::thread::yield_now();
        }
        raise.store(true, Ordering::Relaxed);
    });
    // Slow enough that it cannot be done before.
    let report = to_node(&kernel, 1).rate(1 << 20).cancelled_by(flag).run().expect("valid");
    thread.join().expect("it saw three calls");
    assert!(report.cancelled && !report.is_complete());
    let (moved, left) = (bytes(&report, Outcome::Moved), bytes(&report, Outcome::Cancelled));
    assert!(moved > 0 && left > 0);
    assert_eq!(moved + left, report.bytes_looked_at());
    let over = kernel.nodes_of(PID)[0].iter().filter(|n| **n == Some(1)).count();
    assert_eq!(pages(over), moved);
}

#[test]
fn what_was_named_itself_and_cannot_be_looked_at_is_an_error_with_a_remedy() {
    let kernel = kernel_with(2, vec![FakeVma::anonymous(BASE, page_size(), 10, 0)]);
    let mut zombie = FakeProcess::new(5, Vec::new());
    zombie.status.state = 'Z';
    kernel.add(zombie);
    let mut thread = FakeProcess::new(6, Vec::new());
    thread.status.kernel_thread = true;
    kernel.add(thread);
    let error = |movement: ProcessMove| movement.run().expect_err("must be refused");
    let refused_of = |selection| error(of(&kernel, selection, Destination::node(node(1))));
    let named = Selection::new();
    assert!(matches!(
        refused_of(named.clone().pid(4)),
        ProcessError::Target(TargetError::NoProcess(4))
    ));
    assert!(matches!(
        refused_of(named.clone().pid(5)),
        ProcessError::Target(TargetError::Zombie(5))
    ));
    let refused = refused_of(named.clone().pid(6));
    assert!(matches!(refused, ProcessError::Target(TargetError::KernelThread(6))));
    assert!(matches!(error(to_node(&kernel, 7)), ProcessError::Node(_)));
    let refused = refused_of(named.clone().cgroup("/none"));
    assert!(matches!(refused, ProcessError::Target(TargetError::NoGroup(_))));
    assert!(matches!(refused_of(named), ProcessError::Target(TargetError::Empty)));
    kernel.fail(ProcessOp::Maps, Errno(libc::EACCES), 0, 1);
    let refused = error(to_node(&kernel, 1));
    assert!(matches!(refused, ProcessError::Target(TargetError::Denied { pid: PID, .. })));
    assert!(refused.to_string().contains("CAP_SYS_PTRACE"), "{refused}");
    for bad in [
        to_node(&kernel, 1).call_latency(Duration::ZERO),
        to_node(&kernel, 1).retries(11),
        to_node(&kernel, 1).rate(1),
        to_node(&kernel, 1).workers(0),
    ] {
        assert!(matches!(error(bad), ProcessError::Option(_)));
    }
    assert_eq!(kernel.calls(ProcessOp::MovePages), 0);
}

#[test]
fn a_cpuset_that_forbids_the_destination_is_an_error_or_an_outcome() {
    let kernel = kernel_with(2, Vec::new());
    let mut process = FakeProcess::new(PID, vec![FakeVma::anonymous(BASE, page_size(), 10, 0)]);
    process.status.nodes_allowed = "0".into();
    kernel.add(process);
    let refused = to_node(&kernel, 1).run().expect_err("must be refused");
    assert!(matches!(refused, ProcessError::Forbidden { pid: PID, .. }));
    assert!(refused.to_string().contains("cpuset"), "{refused}");
    // Found in a cgroup, it is not an error but an outcome.
    kernel.join(Path::new("/jobs"), PID);
    let jobs = Selection::new().cgroup("/jobs");
    let report = of(&kernel, jobs, Destination::node(node(1))).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::NoFrame(Shortage::Forbidden)), pages(10));
}

#[test]
fn whatever_call_fails_whenever_the_outcomes_add_up_and_it_ends() {
    let ops = [
        ProcessOp::Open,
        ProcessOp::Status,
        ProcessOp::Maps,
        ProcessOp::NextMap,
        ProcessOp::Scan,
        ProcessOp::Nodes,
        ProcessOp::MovePages,
        ProcessOp::NodeFree,
        ProcessOp::NodeWatermark,
    ];
    let errnos = [
        libc::EPERM,
        libc::ESRCH,
        libc::EINTR,
        libc::EIO,
        libc::EAGAIN,
        libc::ENOMEM,
        libc::EACCES,
        libc::EFAULT,
        libc::EBUSY,
        libc::ENODEV,
        libc::EINVAL,
        libc::ENOSYS,
    ];
    for op in ops {
        for errno in errnos {
            for after in [0, 1, 2, 4] {
                let vmas = vec![
                    FakeVma::anonymous(BASE, page_size(), 300, 0),
                    FakeVma::anonymous(BASE * 2, HUGE, 3, 0),
                ];
                let kernel = kernel_with(2, vmas);
                let movement = to_node(&kernel, 1);
                kernel.fail(op, Errno(errno), after, 2);
                let Ok(report) = movement.run() else {
                    assert_eq!(kernel.calls(ProcessOp::MovePages), 0, "{op:?} {errno} {after}");
                    continue;
                };
                let over = kernel.nodes_of(PID);
                let moved = pages(over[0].iter().filter(|n| **n == Some(1)).count())
                    + (over[1].iter().filter(|n| **n == Some(1)).count() * HUGE) as u64;
                let why = format!("{op:?} {errno} {after}: {report:?}");
                assert_eq!(bytes(&report, Outcome::Moved), moved, "{why}");
                let all = pages(300) + 3 * HUGE as u64;
                // Less is looked at only if the process could not be read on.
                let unread = |n: &Note| matches!(n, Note::Unreadable { .. } | Note::Exited { .. });
                let whole = report.bytes_looked_at() == all;
                assert!(whole || report.notes.list.iter().any(unread), "{why}");
            }
        }
    }
}

#[test]
fn a_cancelled_move_says_how_much_it_had_not_come_to() {
    let all = pages(100_000);
    let kernel = kernel_with(2, Vec::new());
    let mut process =
        FakeProcess::new(PID, vec![FakeVma::anonymous(BASE, page_size(), 100_000, 0)]);
    process.status.anonymous = all;
    kernel.add(process);
    // Cancelled before it begins, it has looked at nothing.
    let raised = Arc::new(AtomicBool::new(true));
    let report = to_node(&kernel, 1).cancelled_by(raised).run().expect("valid");
    assert_eq!((report.bytes_looked_at(), report.not_looked_at), (0, all), "{report:?}");
    // And in the middle, in the first of several pieces.
    let flag = Arc::new(AtomicBool::new(false));
    let (raise, watched) = (Arc::clone(&flag), kernel.clone());
    kernel.page_takes(Duration::from_micros(100));
    let thread = std::thread::spawn(move || {
        while watched.calls(ProcessOp::MovePages) < 3 {
            std::thread::yield_now();
        }
        raise.store(true, Ordering::Relaxed);
    });
    let report = to_node(&kernel, 1).rate(1 << 20).cancelled_by(flag).run().expect("valid");
    thread.join().expect("it saw three calls");
    assert!(report.cancelled && report.not_looked_at > 0, "{report:?}");
    assert_eq!(report.bytes_looked_at() + report.not_looked_at, all);
    // One that comes to the end leaves nothing out, whatever the kernel counts.
    let mut process = FakeProcess::new(PID, vec![FakeVma::anonymous(BASE, page_size(), 10, 0)]);
    process.status.anonymous = all;
    kernel.add(process);
    assert_eq!(to_node(&kernel, 1).run().expect("valid").not_looked_at, 0);
}

#[test]
fn who_may_not_have_memory_there_itself_is_refused_with_the_reason() {
    let kernel = kernel_with(3, vec![FakeVma::anonymous(BASE, page_size(), 10, 0)]);
    kernel.own_cpuset("0,2");
    for dry in [false, true] {
        let refused = to_node(&kernel, 1).dry_run(dry).run().expect_err("must be refused");
        assert!(matches!(refused, ProcessError::OwnCpuset { .. }), "{refused}");
        let text = refused.to_string();
        assert!(
            ["node 1", "own cpuset allows 0,2", "cpuset.mems"].iter().all(|p| text.contains(p))
        );
    }
    assert_eq!(kernel.calls(ProcessOp::MovePages) + kernel.calls(ProcessOp::Nodes), 0);
    assert!(to_node(&kernel, 2).run().expect("allowed").is_complete());
}

#[test]
fn a_found_process_whose_cpuset_forbids_the_node_is_told_without_a_call() {
    for (dry, to) in [(false, vec![1]), (true, vec![1]), (false, vec![1, 2]), (true, vec![1, 2])] {
        let kernel = kernel_with(3, Vec::new());
        let mut process = FakeProcess::new(PID, vec![FakeVma::anonymous(BASE, page_size(), 10, 0)]);
        process.status.nodes_allowed = "0,2".into();
        kernel.add(process);
        kernel.join(Path::new("/jobs"), PID);
        let fill = Destination::fill(to.iter().map(|n| node(*n)));
        let movement = of(&kernel, Selection::new().cgroup("/jobs"), fill).dry_run(dry);
        let report = movement.run().expect("valid");
        let is = if to.len() > 1 {
            // The next one will do.
            if dry { Outcome::WouldMove } else { Outcome::Moved }
        } else {
            let note = Note::Forbidden { pid: PID, node: node(1) };
            assert!(report.notes.list.contains(&note), "{report:?}");
            assert_eq!(kernel.calls(ProcessOp::MovePages), 0);
            Outcome::NoFrame(Shortage::Forbidden)
        };
        assert_eq!(bytes(&report, is), pages(10), "{report:?}");
    }
}

#[test]
fn a_dry_run_counts_on_no_more_room_than_there_is() {
    let vma = FakeVma::anonymous(BASE, page_size(), 2000, 0);
    let mut huge = FakeVma::anonymous(BASE * 2, HUGE, 10, 0);
    (huge.vma.device, huge.vma.inode) = ((0, 9), 1);
    let kernel = FakeKernel::new(&[PLENTY, pages(1500), pages(100)]);
    kernel.device((0, 9), Backing::Hugetlb(HUGE));
    kernel.add(FakeProcess::new(PID, vec![vma, huge]));
    // Of the hugetlb pages four find one that is set aside; there is no room for the others.
    kernel.pool(1, HUGE, 4 * HUGE as u64);
    kernel.watermark(1, pages(500));
    let report = to_node(&kernel, 1).dry_run(true).run().expect("valid");
    let of_pool = 4 * HUGE as u64;
    assert_eq!(bytes(&report, Outcome::WouldMove), pages(1000) + of_pool, "{report:?}");
    let stay = pages(1000) + 10 * HUGE as u64 - of_pool;
    assert_eq!(bytes(&report, Outcome::NoFrame(Shortage::Reserve)), stay);
    assert!(report.notes.list.contains(&Note::NodeFull { node: node(1) }));
    // Two nodes, one after the other, have room for more.
    let both = to_destination(&kernel, Destination::fill([node(1), node(2)])).dry_run(true);
    let report = both.run().expect("valid");
    assert_eq!(bytes(&report, Outcome::WouldMove), pages(1100) + of_pool, "{report:?}");
    assert_eq!(kernel.calls(ProcessOp::MovePages), 0);
}

#[test]
fn a_latency_target_that_cannot_be_met_is_told_once() {
    let kernel = kernel_with(2, vec![FakeVma::anonymous(BASE, page_size(), 20_000, 0)]);
    kernel.page_takes(Duration::from_micros(100));
    let report = to_node(&kernel, 1).call_latency(Duration::from_millis(10)).run().expect("valid");
    let slow = report.notes.list.iter().filter(|n| matches!(n, Note::SlowCalls { .. }));
    let slow: Vec<String> = slow.map(Note::to_string).collect();
    assert!(slow.len() == 1 && slow[0].contains("not cut below 500 pages"), "{report:?}");
}

fn any_page() -> impl Strategy<Value = FakePage> {
    let hindrance = prop_oneof![
        12 => Just(None),
        1 => (1u32..6).prop_map(|n| Some(Hindrance::Unqueued(libc::EBUSY, n))),
        1 => (1u32..6).prop_map(|n| Some(Hindrance::Fails(n))),
        1 => (1u32..6).prop_map(|n| Some(Hindrance::Migrates(n))),
        1 => Just(Some(Hindrance::Unqueued(libc::EIO, u32::MAX))),
        1 => Just(Some(Hindrance::Zero)),
        1 => Just(Some(Hindrance::Shared)),
    ];
    let on = prop_oneof![1 => Just(None), 5 => (0u32..3).prop_map(Some)];
    (on, hindrance).prop_map(|(node, hindrance)| FakePage { node, hindrance })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_process_on_any_machine_is_accounted_for_to_the_byte(
        maps in proptest::collection::vec(
            (any::<bool>(), proptest::collection::vec(any_page(), 1..120)), 1..6),
        free in proptest::collection::vec(0u64..300, 3),
        way in 0usize..3,
        rights in any::<bool>(),
        workers in 1usize..4,
    ) {
        let vmas: Vec<_> = maps.into_iter().enumerate().map(|(i, (huge, some))| {
            let size = if huge { HUGE } else { page_size() };
            let mut vma = FakeVma::anonymous(BASE * (i + 1), size, some.len(), 0);
            vma.pages = some;
            vma
        }).collect();
        let sum = |vmas: &[FakeVma], nodes: &[Vec<Option<u32>>], is: &dyn Fn(&FakePage, Option<u32>) -> bool| {
            vmas.iter().zip(nodes).map(|(v, now)| {
                let count = v.pages.iter().zip(now).filter(|(p, n)| is(p, **n)).count();
                (count * v.page_bytes) as u64
            }).sum::<u64>()
        };
        let free: Vec<u64> = free.iter().map(|mib| mib << 20).collect();
        let kernel = FakeKernel::new(&free);
        kernel.add(FakeProcess::new(PID, vmas.clone()));
        if !rights {
            kernel.without_rights();
        }
        let to = match way {
            0 => Destination::node(node(1)),
            1 => Destination::fill([node(2), node(1)]),
            _ => Destination::interleave([node(0), node(1), node(2)]),
        };
        let report = to_destination(&kernel, to).workers(workers).run().expect("valid");
        let nodes = kernel.nodes_of(PID);
        let zero = |p: &FakePage| p.hindrance == Some(Hindrance::Zero);
        let present = sum(&vmas, &nodes, &|p, _| p.node.is_some() && !zero(p));
        let moved = sum(&vmas, &nodes, &|p, now| p.node != now);
        prop_assert_eq!(report.bytes_looked_at(), present);
        prop_assert_eq!(report.bytes_moved(), moved);
    }
}
