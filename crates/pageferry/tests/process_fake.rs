//! Moves of made-up processes on made-up machines: what one node cannot show.

#[path = "support/made_up.rs"]
mod made_up;

use made_up::{
    BASE, PID, PLENTY, bytes, kernel_with, machine, node, of, pages, to_destination, to_node,
};
use pageferry::process::{
    Destination, Filter, Kind, Note, Priority, ProcessMove, Reserve, Selection, Where,
};
use pageferry::topology::NodeList;
use pageferry::{Busy, HUGE, Outcome, Shortage};
use pageferry_sys::process::fake::{Event, FakeKernel, FakeProcess, FakeVma, Hindrance, ProcessOp};
use pageferry_sys::process::{Backing, ProcessKernel};
use pageferry_sys::{Errno, page_size};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[test]
fn every_page_goes_over_and_every_byte_is_told() {
    let base = FakeVma::anonymous(BASE, page_size(), 10_000, 0);
    let huge = FakeVma::anonymous(BASE + (1 << 30), HUGE, 300, 0);
    let mut there = FakeVma::anonymous(BASE + (4 << 30), page_size(), 50, 1);
    there.pages[7].node = None;
    let kernel = kernel_with(2, vec![base, huge, there]);
    let report = to_node(&kernel, 1).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Moved), pages(10_000) + 300 * HUGE as u64);
    assert_eq!(bytes(&report, Outcome::AlreadyThere), pages(49));
    assert_eq!(report.bytes_looked_at(), pages(10_049) + 300 * HUGE as u64);
    assert!(report.is_complete(), "{report:?}");
    let nodes = kernel.nodes_of(PID);
    assert!(nodes.iter().flatten().flatten().all(|n| *n == 1));
    // Huge pages are asked for by one address.
    let asked: usize = kernel.moves().iter().map(|(n, _)| n).sum();
    assert_eq!(asked, 10_300);
}

#[test]
fn without_page_table_scans_the_entries_are_read() {
    let mut vma = FakeVma::anonymous(BASE, page_size(), 40_000, 0);
    (0..40_000).step_by(3).for_each(|i| vma.pages[i].node = None);
    vma.pages[1].hindrance = Some(Hindrance::Zero);
    let kernel = kernel_with(2, vec![vma]);
    kernel.without_scan();
    let report = to_node(&kernel, 1).run().expect("valid");
    let present = 40_000 - 40_000usize.div_ceil(3);
    assert_eq!(bytes(&report, Outcome::Moved), pages(present - 1));
    assert_eq!(bytes(&report, Outcome::Unmapped), pages(1));
    assert_eq!(kernel.calls(ProcessOp::Scan), 1, "once refused, never again");
}

#[test]
fn pages_that_are_busy_for_a_while_move_in_the_end_and_the_others_are_told() {
    let mut vma = FakeVma::anonymous(BASE, page_size(), 1000, 0);
    vma.pages[10].hindrance = Some(Hindrance::Unqueued(libc::EBUSY, 2));
    vma.pages[20].hindrance = Some(Hindrance::Fails(3));
    vma.pages[30].hindrance = Some(Hindrance::Unqueued(libc::EBUSY, u32::MAX));
    vma.pages[40].hindrance = Some(Hindrance::Unqueued(libc::EAGAIN, u32::MAX));
    vma.pages[50].hindrance = Some(Hindrance::Fails(u32::MAX));
    vma.pages[60].hindrance = Some(Hindrance::Unqueued(libc::EIO, u32::MAX));
    vma.pages[70].hindrance = Some(Hindrance::Zero);
    let kernel = kernel_with(2, vec![vma]);
    let report = to_node(&kernel, 1).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Busy(Busy::Contended)), pages(2));
    assert_eq!(bytes(&report, Outcome::Busy(Busy::Again)), pages(1));
    assert_eq!(bytes(&report, Outcome::Busy(Busy::Other(libc::EIO))), pages(1));
    assert_eq!(bytes(&report, Outcome::Moved), pages(995));
    assert_eq!(report.bytes_looked_at(), pages(999));
    // Each of the two that never move was tried four times; nothing else was in vain for long.
    assert!(report.retried_bytes >= pages(2 + 3 + 9), "{report:?}");
    assert!(kernel.calls(ProcessOp::MovePages) < 60);
    assert!(!report.is_complete());
    let examples: Vec<_> = report.examples.iter().map(|e| e.range.start).collect();
    assert!(examples.contains(&(BASE + 30 * page_size())));
}

#[test]
fn pages_that_others_map_stay_without_the_right_to_move_them() {
    let mut vma = FakeVma::anonymous(BASE, page_size(), 100, 0);
    (0..50).for_each(|i| vma.pages[i].hindrance = Some(Hindrance::Shared));
    let kernel = kernel_with(2, vec![vma]);
    kernel.without_rights();
    let report = to_node(&kernel, 1).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Busy(Busy::Shared)), pages(50));
    assert_eq!(bytes(&report, Outcome::Moved), pages(50));
    assert!(report.notes.list.contains(&Note::SharedLeft { bytes: pages(50) }), "{report:?}");
}

#[test]
fn a_move_stops_at_the_reserve_and_says_so() {
    let vma = FakeVma::anonymous(BASE, page_size(), 2000, 0);
    let kernel = FakeKernel::new(&[PLENTY, pages(1500)]);
    kernel.add(FakeProcess::new(PID, vec![vma]));
    kernel.watermark(1, pages(500));
    let report = to_node(&kernel, 1).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Moved), pages(1000));
    assert_eq!(bytes(&report, Outcome::NoFrame(Shortage::Reserve)), pages(1000));
    assert_eq!(kernel.node_free(1), Ok(pages(500)));
    assert!(report.notes.list.contains(&Note::NodeFull { node: node(1) }));
    let kernel = FakeKernel::new(&[PLENTY, pages(1500)]);
    kernel.add(FakeProcess::new(PID, vec![FakeVma::anonymous(BASE, page_size(), 2000, 0)]));
    let report = to_node(&kernel, 1).reserve(Reserve::Bytes(pages(100))).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Moved), pages(1400));
}

#[test]
fn a_kernel_out_of_memory_is_tried_again_and_then_told() {
    let vma = FakeVma::anonymous(BASE, page_size(), 2000, 0);
    let kernel = FakeKernel::new(&[PLENTY, pages(1500)]);
    kernel.add(FakeProcess::new(PID, vec![vma]));
    // Free memory cannot be read, so the kernel has to say it.
    kernel.fail(ProcessOp::NodeFree, Errno(libc::EIO), 0, u64::MAX);
    let to = Destination::node(node(1));
    let movement = ProcessMove::new(Selection::new().pid(PID), to)
        .kernel(Arc::new(kernel.clone()))
        .machine(machine(2))
        .workers(1);
    let report = movement.run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Moved), pages(1500));
    assert_eq!(bytes(&report, Outcome::NoFrame(Shortage::Node)), pages(500), "{report:?}");
}

#[test]
fn what_does_not_fit_on_the_first_node_goes_to_the_next() {
    let vma = FakeVma::anonymous(BASE, page_size(), 2000, 0);
    let kernel = FakeKernel::new(&[PLENTY, pages(600), PLENTY]);
    kernel.add(FakeProcess::new(PID, vec![vma]));
    let to = Destination::fill([node(1), node(2)]);
    let report = to_destination(&kernel, to).run().expect("valid");
    assert!(report.is_complete(), "{report:?}");
    let nodes = kernel.nodes_of(PID);
    let on = |n| nodes[0].iter().filter(|p| **p == Some(n)).count();
    assert_eq!((on(0), on(1), on(2)), (0, 600, 1400));
}

#[test]
fn pages_are_spread_by_weight_and_a_second_run_moves_none() {
    let vma = FakeVma::anonymous(BASE, page_size(), 4000, 0);
    let huge = FakeVma::anonymous(BASE + (1 << 30), HUGE, 40, 1);
    let kernel = kernel_with(3, vec![vma, huge]);
    let to = Destination::weighted([(node(0), 1), (node(1), 2), (node(2), 1)]);
    let report = to_destination(&kernel, to.clone()).run().expect("valid");
    assert!(report.is_complete());
    let nodes = kernel.nodes_of(PID);
    let on = |v: usize, n| nodes[v].iter().filter(|p| **p == Some(n)).count();
    assert_eq!((on(0, 0), on(0, 1), on(0, 2)), (1000, 2000, 1000));
    assert_eq!((on(1, 0), on(1, 1), on(1, 2)), (10, 20, 10));
    let again = to_destination(&kernel, to).run().expect("valid");
    assert_eq!(again.bytes_moved(), 0);
    assert_eq!(again.bytes_looked_at(), report.bytes_looked_at());
}

#[test]
fn only_pages_of_the_source_nodes_are_taken() {
    let vmas = (0..3).map(|n| {
        FakeVma::anonymous(BASE + n * (1 << 30), page_size(), 100, u32::try_from(n).expect("few"))
    });
    let kernel = kernel_with(4, vmas.collect());
    let from: NodeList = [node(1)].into_iter().collect();
    let report = to_node(&kernel, 3).from(from).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Moved), pages(100));
    assert_eq!(bytes(&report, Outcome::NotAsked), pages(200));
    let list = |nodes: [u32; 2]| -> NodeList { nodes.into_iter().map(node).collect() };
    let paired = Destination::paired(&list([0, 3]), &list([2, 1]));
    to_destination(&kernel, paired).run().expect("valid");
    // The lists are sets: 0 goes to 1, and 3 to 2.
    let firsts: Vec<_> = kernel.nodes_of(PID).iter().map(|v| v[0]).collect();
    assert_eq!(firsts, [Some(1), Some(2), Some(2)]);
}

#[test]
fn calls_stay_within_the_latency_target() {
    let vma = FakeVma::anonymous(BASE, page_size(), 200_000, 0);
    let huge = FakeVma::anonymous(BASE + (4 << 30), HUGE, 500, 0);
    let kernel = kernel_with(2, vec![vma, huge]);
    kernel.page_takes(Duration::from_micros(5));
    let target = Duration::from_millis(2);
    let report = to_node(&kernel, 1).call_latency(target).run().expect("valid");
    assert!(report.is_complete());
    let moves = kernel.moves();
    assert!(moves.iter().all(|(_, took)| *took <= target), "{moves:?}");
    // And they are no smaller than they need be: about 0.7 of the target.
    let full = moves.iter().filter(|(_, took)| *took > target / 2).count();
    assert!(full * 10 > moves.len() * 9, "{full} of {}", moves.len());
    assert_eq!(report.calls.count(), moves.len() as u64);
    assert!(report.calls.longest <= target);
    assert!(report.notes.list.is_empty(), "{report:?}");
}

#[test]
fn folios_that_are_mapped_page_by_page_cost_hardly_more_calls_than_plain_pages() {
    let page = page_size();
    let gib = (1 << 30) / page;
    let of_size = |folio: usize| {
        let vma = FakeVma::anonymous(BASE, page, gib, 0).in_folios(folio);
        let kernel = kernel_with(2, vec![vma]);
        kernel.page_takes(Duration::from_micros(1));
        let report = to_node(&kernel, 1).run().expect("valid");
        assert_eq!(bytes(&report, Outcome::Moved), 1 << 30, "{report:?}");
        assert_eq!(report.retried_bytes, 0);
        let [moves, queries] = [ProcessOp::MovePages, ProcessOp::Nodes].map(|op| kernel.calls(op));
        let batches = kernel.batches();
        eprintln!("{} KiB: {moves} moves, {queries} queries, {batches} batches", folio >> 10);
        (moves, queries, batches)
    };
    // In the order of their addresses each folio is a batch of its own.
    let folios = FakeVma::anonymous(BASE, page, gib, 0).in_folios(16 * page);
    let kernel = kernel_with(2, vec![folios]);
    let all: Vec<usize> = (0..gib).map(|i| BASE + i * page).collect();
    let view = kernel.open(PID).expect("it is there");
    view.move_pages(&all, &vec![1; gib], &mut vec![0; gib], true).expect("it moves");
    assert_eq!(kernel.batches(), gib / 16);
    let (moves, queries, batches) = of_size(page);
    assert_eq!(moves, batches);
    for folio in [4 * page, 16 * page, HUGE] {
        let (more, asked, queues) = of_size(folio);
        assert!(more <= moves + moves / 5, "{more} calls instead of {moves}");
        // What says EBUSY is asked for once after each call.
        assert!(asked <= queries + more, "{asked} queries instead of {queries}");
        // The first call, which does not know yet, moves folio by folio.
        assert!(queues <= 4 * moves + 64, "{queues} batches instead of {batches}");
    }
}

#[test]
fn folios_of_which_some_cannot_move_are_told_to_the_page() {
    let page = page_size();
    let mut vma = FakeVma::anonymous(BASE, page, 8192, 0).in_folios(16 * page);
    // A folio fails when its first page that was queued does.
    for folio in (0..512).step_by(50) {
        (0..16)
            .for_each(|i| vma.pages[folio * 16 + i].hindrance = Some(Hindrance::Fails(u32::MAX)));
    }
    for folio in (7..512).step_by(100) {
        (0..16).for_each(|i| vma.pages[folio * 16 + i].hindrance = Some(Hindrance::Fails(2)));
    }
    // Of one only the end is asked for.
    let kernel = kernel_with(2, vec![vma]);
    let some = Selection::new().pid(PID);
    let some = some.filter(Filter::new().range(BASE + 10 * page..BASE + 8192 * page));
    let report = of(&kernel, some, Destination::node(node(1))).run().expect("valid");
    let stayed = pages(11 * 16 - 10);
    assert_eq!(bytes(&report, Outcome::Busy(Busy::Contended)), stayed, "{report:?}");
    assert_eq!(bytes(&report, Outcome::Moved), pages(8182) - stayed);
}

#[test]
fn the_rate_is_kept() {
    let kernel = kernel_with(2, vec![FakeVma::anonymous(BASE, page_size(), 100_000, 0)]);
    let before = kernel.now();
    let rate = 100 << 20;
    to_node(&kernel, 1).rate(rate).run().expect("valid");
    let took = (kernel.now() - before).as_secs_f64();
    let least = pages(100_000) as f64 / rate as f64;
    assert!(took > least * 0.8 && took < least * 1.2, "{took} s instead of {least} s");
}

#[test]
fn children_are_moved_only_if_asked_for() {
    for asked in [false, true] {
        let kernel = kernel_with(2, vec![FakeVma::anonymous(BASE, page_size(), 10, 0)]);
        for (pid, parent) in [(101, PID), (102, 101), (103, 1)] {
            let vmas = vec![FakeVma::anonymous(BASE, page_size(), 10, 0)];
            let mut child = FakeProcess::new(pid, vmas);
            child.status.parent = parent;
            kernel.add(child);
        }
        let family = Selection::new().pid(PID).children(asked);
        let report = of(&kernel, family, Destination::node(node(1))).run().expect("valid");
        assert_eq!(bytes(&report, Outcome::Moved), pages(if asked { 30 } else { 10 }));
        assert_eq!(kernel.nodes_of(103)[0][0], Some(0));
    }
}

#[test]
fn memory_that_processes_share_is_moved_once_and_counted_once() {
    let kernel = FakeKernel::new(&[PLENTY, PLENTY]);
    kernel.device((0, 1), Backing::SharedMemory);
    let group = Path::new("/jobs");
    for pid in 1..=3 {
        let mut vma = FakeVma::anonymous(BASE * pid as usize, page_size(), 1000, 0);
        (vma.vma.device, vma.vma.inode, vma.vma.shared) = ((0, 1), 42, true);
        // Each sees a part: pages 0 to 999, 500 to 1499, 1000 to 1999.
        vma.vma.offset = pages(500) * (u64::from(pid) - 1);
        kernel.add(FakeProcess::new(pid, vec![vma]));
        kernel.join(group, pid);
    }
    let jobs = Selection::new().cgroup(group);
    let found = Where::new(jobs.clone()).kernel(Arc::new(kernel.clone())).look().expect("valid");
    assert_eq!(found.bytes(), pages(2000));
    assert!(found.holdings.iter().all(|h| h.kind == Kind::SharedMemory && h.node == node(0)));
    let report = of(&kernel, jobs, Destination::node(node(1))).run().expect("valid");
    assert_eq!(report.bytes_looked_at(), pages(2000));
    assert_eq!(bytes(&report, Outcome::Moved), pages(2000));
}

#[test]
fn hugetlb_pages_are_asked_for_by_their_size() {
    let kernel = FakeKernel::new(&[PLENTY, PLENTY]);
    kernel.device((0, 9), Backing::Hugetlb(1 << 30));
    let mut vma = FakeVma::anonymous(BASE, 1 << 30, 5, 0);
    (vma.vma.device, vma.vma.inode) = ((0, 9), 1);
    kernel.add(FakeProcess::new(PID, vec![vma]));
    let report = to_node(&kernel, 1).run().expect("valid");
    let line = report.lines.first().expect("one");
    assert_eq!((line.kind, line.page_bytes, line.pages), (Kind::Hugetlb, 1 << 30, 5));
    let asked: usize = kernel.moves().iter().map(|(n, _)| n).sum();
    assert_eq!(asked, 5);
}

#[test]
fn filters_choose_mappings_by_kind_name_and_address() {
    let mut heap = FakeVma::anonymous(BASE, page_size(), 10, 0);
    heap.vma.name = "[heap]".into();
    let mut file = FakeVma::anonymous(BASE * 2, page_size(), 20, 0);
    (file.vma.name, file.vma.inode) = ("/usr/lib/libx.so.1".into(), 3);
    let plain = FakeVma::anonymous(BASE * 3, HUGE, 4, 0);
    let kernel = kernel_with(2, vec![heap, file, plain]);
    let dry = |filter: Filter| {
        let part = Selection::new().pid(PID).filter(filter);
        let movement = of(&kernel, part, Destination::node(node(1)));
        let report = movement.dry_run(true).run().expect("valid");
        bytes(&report, Outcome::WouldMove)
    };
    assert_eq!(dry(Filter::new().kinds([Kind::Heap])), pages(10));
    assert_eq!(dry(Filter::new().kinds([Kind::Heap, Kind::File])), pages(30));
    assert_eq!(dry(Filter::new().name("libx")), pages(20));
    assert_eq!(dry(Filter::new().name("*.so.?")), pages(20));
    assert_eq!(dry(Filter::new().range(BASE..BASE + 3 * page_size())), pages(3));
    // Pages that are touched are taken whole, huge ones too.
    assert_eq!(dry(Filter::new().range(BASE + 10..BASE + page_size() + 1)), pages(2));
    assert_eq!(dry(Filter::new().range(BASE + 10..BASE + 10)), 0);
    assert_eq!(dry(Filter::new().range(0..usize::MAX)), pages(30) + 4 * HUGE as u64);
    let middle = BASE * 3 + HUGE + page_size();
    assert_eq!(dry(Filter::new().range(middle..middle + page_size())), HUGE as u64);
    assert_eq!(kernel.calls(ProcessOp::MovePages), 0, "a dry run moves nothing");
}

#[test]
fn who_watches_is_told_how_far_it_is_and_at_last_that_it_is_done() {
    let kernel = kernel_with(2, vec![FakeVma::anonymous(BASE, page_size(), 40_000, 0)]);
    let mut process = FakeProcess::new(PID, vec![FakeVma::anonymous(BASE, page_size(), 40_000, 0)]);
    // Twice what there is: an estimate.
    process.status.anonymous = pages(80_000);
    kernel.add(process);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&seen);
    let report = to_node(&kernel, 1)
        .workers(3)
        .priority(Priority::Idle)
        .on_progress(Duration::ZERO, move |progress| {
            told.lock().expect("nobody panics").push(*progress);
        })
        .run()
        .expect("valid");
    assert!(report.is_complete(), "{report:?}");
    let seen = seen.lock().expect("nobody panics");
    assert!(seen.windows(2).all(|w| w[0].bytes_moved <= w[1].bytes_moved));
    assert!(seen.iter().all(|p| p.bytes_looked_at <= p.bytes_total));
    let last = seen.last().expect("told at the end");
    assert!(last.finished && last.eta() == Some(Duration::ZERO));
    assert_eq!((last.bytes_moved, last.bytes_total), (pages(40_000), pages(40_000)));
}

#[test]
fn kernel_threads_and_zombies_of_a_cgroup_are_counted_not_listed() {
    let kernel = FakeKernel::new(&[PLENTY, PLENTY]);
    let group = Path::new("/jobs");
    for pid in 1..=200 {
        let mut nobody = FakeProcess::new(pid, Vec::new());
        nobody.status.kernel_thread = pid % 2 == 0;
        nobody.status.state = if pid % 2 == 0 { 'S' } else { 'Z' };
        kernel.add(nobody);
        kernel.join(group, pid);
    }
    let jobs = Selection::new().cgroup(group);
    let found = Where::new(jobs).kernel(Arc::new(kernel)).look().expect("valid");
    let (processes, left_out) = (100, 0);
    assert_eq!(found.notes.left_out, left_out);
    let expected = [Note::Zombies { processes }, Note::KernelThreads { processes }];
    assert_eq!(found.notes.list, expected, "{:?}", found.notes);
}

#[test]
fn of_many_processes_that_join_and_end_a_few_are_named_and_all_counted() {
    let kernel = kernel_with(2, vec![FakeVma::anonymous(BASE, page_size(), 5000, 0)]);
    let group = Path::new("/jobs");
    kernel.join(group, PID);
    for pid in 200..300 {
        let memory = FakeVma::anonymous(BASE, page_size(), 100, 0);
        let born = FakeProcess::new(pid, vec![memory]);
        kernel.before_move(1, Event::Join(group.into(), born));
        // Some end under the move of their pages, others before their turn.
        kernel.before_move(20 + u64::from(pid - 200) / 4, Event::Exit(pid));
    }
    let jobs = Selection::new().cgroup(group);
    let report = of(&kernel, jobs, Destination::node(node(1))).workers(2).run().expect("valid");
    let count = |is: fn(&Note) -> u64| report.notes.list.iter().map(is).sum::<u64>();
    let joined = count(|n| match n {
        Note::Joined { .. } => 1,
        Note::MoreJoined { processes } => *processes,
        _ => 0,
    });
    let ended = count(|n| match n {
        Note::Exited { .. } => 1,
        Note::MoreExited { processes } => *processes,
        _ => 0,
    });
    assert_eq!(joined, 100, "{report:?}");
    let gone = (200..300).filter(|pid| kernel.nodes_of(*pid).is_empty()).count() as u64;
    assert!(ended > 0 && ended <= gone, "{ended} of {gone}: {report:?}");
    assert!(report.notes.list.len() < 24 && report.notes.left_out == 0, "{report:?}");
}
