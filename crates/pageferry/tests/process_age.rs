//! A minimum age: made-up processes that use some of their pages while the move waits.

#[path = "support/made_up.rs"]
mod made_up;

use made_up::{BASE, PID, bytes, kernel_with, node, of, pages, to_node};
use pageferry::process::{Destination, Filter, Note, ProcessError, ProcessMove, Selection, Stage};
use pageferry::topology::NodeList;
use pageferry::{HUGE, Outcome};
use pageferry_sys::process::fake::{Event, FakeKernel, FakeProcess, FakeVma, ProcessOp};
use pageferry_sys::process::{Backing, ProcessKernel};
use pageferry_sys::{Errno, page_size};
use proptest::prelude::*;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const AGE: Duration = Duration::from_secs(30);
const MEANWHILE: Duration = Duration::from_secs(10);

fn tracking(vmas: Vec<FakeVma>) -> FakeKernel {
    let kernel = kernel_with(2, vmas);
    kernel.with_idle_pages();
    kernel
}

/// Addresses of so many pages.
fn range(first: usize, count: usize) -> Range<usize> {
    BASE + first * page_size()..BASE + (first + count) * page_size()
}

fn old_ones(kernel: &FakeKernel) -> ProcessMove {
    to_node(kernel, 1).min_age(AGE)
}

#[test]
fn what_is_used_meanwhile_stays_and_everything_else_moves() {
    let mut vma = FakeVma::anonymous(BASE, page_size(), 20_000, 0);
    (500..600).for_each(|i| vma.pages[i].node = None);
    (600..700).for_each(|i| vma.pages[i].node = Some(1));
    let huge = FakeVma::anonymous(BASE * 2, HUGE, 20, 0);
    let kernel = tracking(vec![vma, huge, FakeVma::anonymous(BASE * 3, page_size(), 50, 0)]);
    kernel.at(MEANWHILE, Event::Touch(PID, range(100, 200)));
    // One page of the huge page is enough.
    let third = BASE * 2 + 2 * HUGE + 7 * page_size();
    kernel.at(MEANWHILE, Event::Touch(PID, third..third + page_size()));
    kernel.at(MEANWHILE, Event::Fault(PID, range(500, 40), 0));
    kernel.at(MEANWHILE, Event::Unmap(PID, BASE * 3..BASE * 3 + 50 * page_size()));
    let report = old_ones(&kernel).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Young), pages(200 + 40) + HUGE as u64, "{report:?}");
    assert_eq!(bytes(&report, Outcome::Moved), pages(19_600) + 19 * HUGE as u64);
    assert_eq!(bytes(&report, Outcome::AlreadyThere), pages(100));
    assert_eq!(report.bytes_looked_at(), pages(20_000 - 60) + 20 * HUGE as u64);
    assert!(report.is_complete(), "{report:?}");
    assert_eq!(kernel.now(), AGE);
    let nodes = kernel.nodes_of(PID);
    assert!(nodes[0][100..300].iter().all(|n| *n == Some(0)));
    assert_eq!((nodes[1][2], nodes[1][3]), (Some(0), Some(1)));
}

#[test]
fn a_folio_is_as_young_as_its_youngest_page_wherever_one_begins_to_look() {
    let page = page_size();
    let folios = FakeVma::anonymous(BASE, page, 256, 0).in_folios(16 * page);
    let kernel = tracking(vec![folios]);
    kernel.at(MEANWHILE, Event::Touch(PID, range(40, 1)));
    // From the middle of the first folio to that of the last.
    let some = Selection::new().pid(PID).filter(Filter::new().range(range(8, 240)));
    let to = Destination::node(node(1));
    let report = of(&kernel, some, to).min_age(AGE).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Young), pages(16));
    assert_eq!(bytes(&report, Outcome::Moved), pages(224));
    let nodes = kernel.nodes_of(PID);
    assert!((0..256).all(|i| nodes[0][i] == Some(u32::from(i / 16 != 2))), "{nodes:?}");
}

#[test]
fn pages_without_idle_information_count_as_young() {
    let kernel = tracking(Vec::new());
    kernel.device((0, 9), Backing::Hugetlb(HUGE));
    let mut hugetlb = FakeVma::anonymous(BASE, HUGE, 3, 0);
    (hugetlb.vma.device, hugetlb.vma.inode) = ((0, 9), 1);
    kernel
        .add(FakeProcess::new(PID, vec![hugetlb, FakeVma::anonymous(BASE * 2, page_size(), 9, 0)]));
    let report = old_ones(&kernel).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Young), 3 * HUGE as u64);
    assert_eq!(bytes(&report, Outcome::Moved), pages(9));
    let kernel = tracking(vec![FakeVma::anonymous(BASE, page_size(), 9, 0)]);
    kernel.hide_frames();
    let report = old_ones(&kernel).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Young), pages(9));
    assert_eq!(kernel.calls(ProcessOp::MovePages), 0);
}

#[test]
fn only_pages_that_would_move_are_marked() {
    let vmas = vec![
        FakeVma::anonymous(BASE, page_size(), 640, 0),
        FakeVma::anonymous(BASE * 2, page_size(), 640, 1),
        FakeVma::anonymous(BASE * 3, page_size(), 640, 2),
    ];
    let kernel = kernel_with(3, vmas);
    kernel.with_idle_pages();
    let from: NodeList = [node(0)].into_iter().collect();
    let report = old_ones(&kernel).from(from).dry_run(true).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::WouldMove), pages(640));
    let of_pid = |vma: usize| {
        let first = (u64::from(PID) << 36 | (BASE * vma / page_size()) as u64) / 64;
        let mut words = [0; 10];
        let tracked = kernel.idle_pages().expect("it tracks them");
        tracked.read(first, &mut words).expect("made up");
        words
    };
    assert_eq!(of_pid(1), [u64::MAX; 10]);
    assert_eq!((of_pid(2), of_pid(3)), ([0; 10], [0; 10]));
}

#[test]
fn a_dry_run_tells_what_would_move_and_moves_nothing() {
    let kernel = tracking(vec![FakeVma::anonymous(BASE, page_size(), 1000, 0)]);
    kernel.at(MEANWHILE, Event::Touch(PID, range(0, 300)));
    let report = old_ones(&kernel).dry_run(true).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::WouldMove), pages(700));
    assert_eq!(bytes(&report, Outcome::Young), pages(300));
    assert_eq!(kernel.calls(ProcessOp::MovePages), 0);
}

#[test]
fn without_idle_information_it_is_refused_before_a_page_is_touched() {
    let vmas = || vec![FakeVma::anonymous(BASE, page_size(), 10, 0)];
    let none = kernel_with(2, vmas());
    let odd = tracking(vmas());
    odd.fail(ProcessOp::IdlePages, Errno(libc::ENXIO), 0, 1);
    for kernel in [none, odd] {
        let error = old_ones(&kernel).run().expect_err("must be refused");
        assert!(matches!(error, ProcessError::NoIdlePages(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains("min_age") && text.contains("CONFIG_IDLE_PAGE_TRACKING=y"), "{text}");
        assert_eq!(kernel.calls(ProcessOp::MovePages) + kernel.calls(ProcessOp::MarkIdle), 0);
    }
    for errno in [libc::EPERM, libc::EACCES, libc::EROFS] {
        let kernel = tracking(vmas());
        kernel.fail(ProcessOp::IdlePages, Errno(errno), 0, 1);
        let error = old_ones(&kernel).run().expect_err("must be refused");
        assert!(matches!(error, ProcessError::IdlePagesDenied(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains("min_age") && text.contains("run as root"), "{text}");
        assert_eq!(kernel.calls(ProcessOp::MovePages) + kernel.calls(ProcessOp::MarkIdle), 0);
    }
    let kernel = tracking(vmas());
    for bad in [Duration::ZERO, Duration::from_secs(100_000)] {
        let error = to_node(&kernel, 1).min_age(bad).run().expect_err("must be refused");
        assert!(matches!(error, ProcessError::Option(_)), "{error}");
    }
}

#[test]
fn who_watches_is_told_that_it_waits_and_can_cancel_it() {
    let kernel = tracking(vec![FakeVma::anonymous(BASE, page_size(), 1000, 0)]);
    let flag = Arc::new(AtomicBool::new(false));
    let stages = Arc::new(Mutex::new(Vec::new()));
    let (raise, told) = (Arc::clone(&flag), Arc::clone(&stages));
    let report = old_ones(&kernel)
        .cancelled_by(flag)
        .on_progress(Duration::ZERO, move |progress| {
            told.lock().expect("nobody panics").push(progress.stage);
            if let Stage::Waiting { left, of } = progress.stage {
                assert!(left <= of && of == AGE && progress.eta().is_none());
                raise.store(left < AGE / 2, Ordering::Relaxed);
            }
        })
        .run()
        .expect("valid");
    let stages = stages.lock().expect("nobody panics");
    assert!(stages.contains(&Stage::Marking), "{stages:?}");
    assert!(stages.iter().any(|s| matches!(s, Stage::Waiting { .. })), "{stages:?}");
    assert!(report.cancelled && report.lines.is_empty(), "{report:?}");
    assert!(kernel.now() < AGE);
    assert_eq!(kernel.calls(ProcessOp::MovePages), 0);
}

#[test]
fn who_joins_while_it_waits_is_young_and_who_ends_is_gone() {
    let kernel = kernel_with(2, vec![FakeVma::anonymous(BASE, page_size(), 100, 0)]);
    kernel.with_idle_pages();
    let group = Path::new("/jobs");
    kernel.join(group, PID);
    kernel.add(FakeProcess::new(5, vec![FakeVma::anonymous(BASE, page_size(), 70, 0)]));
    kernel.join(group, 5);
    let late = FakeProcess::new(7, vec![FakeVma::anonymous(BASE, page_size(), 30, 0)]);
    kernel.at(MEANWHILE, Event::Join(group.into(), late));
    kernel.at(MEANWHILE, Event::Exit(5));
    let jobs = Selection::new().cgroup(group);
    let to = Destination::node(node(1));
    let report = of(&kernel, jobs, to).min_age(AGE).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Moved), pages(100), "{report:?}");
    assert_eq!(bytes(&report, Outcome::Young), pages(30));
    assert_eq!(report.bytes_looked_at(), pages(130));
}

#[test]
fn whatever_fails_no_page_moves_whose_age_is_not_known_and_all_are_told() {
    let ops = [
        ProcessOp::Entries,
        ProcessOp::FrameFlags,
        ProcessOp::ReadIdle,
        ProcessOp::MarkIdle,
        ProcessOp::Nodes,
        ProcessOp::Scan,
        ProcessOp::NextMap,
    ];
    for op in ops {
        for errno in [libc::EIO, libc::EPERM, libc::ENXIO, libc::ESRCH, libc::ENOMEM] {
            for after in [0, 1, 2, 4] {
                let vmas = vec![
                    FakeVma::anonymous(BASE, page_size(), 300, 0),
                    FakeVma::anonymous(BASE * 2, HUGE, 3, 0),
                ];
                let kernel = tracking(vmas);
                kernel.at(MEANWHILE, Event::Touch(PID, range(0, 100)));
                kernel.fail(op, Errno(errno), after, 2);
                let Ok(report) = old_ones(&kernel).run() else {
                    assert_eq!(kernel.calls(ProcessOp::MovePages), 0, "{op:?} {errno} {after}");
                    continue;
                };
                let why = format!("{op:?} {errno} {after}: {report:?}");
                let over = kernel.nodes_of(PID);
                assert!(over[0][..100].iter().all(|n| *n == Some(0)), "{why}");
                let moved = pages(over[0].iter().filter(|n| **n == Some(1)).count())
                    + (over[1].iter().filter(|n| **n == Some(1)).count() * HUGE) as u64;
                assert_eq!(bytes(&report, Outcome::Moved), moved, "{why}");
                let unread = |n: &Note| matches!(n, Note::Unreadable { .. } | Note::Exited { .. });
                let whole = report.bytes_looked_at() == pages(300) + 3 * HUGE as u64;
                assert!(whole || report.notes.list.iter().any(unread), "{why}");
                let unknown = |n: &Note| matches!(n, Note::AgeUnknown { pid: PID, .. });
                let missed = bytes(&report, Outcome::Young) > pages(100);
                let told = report.notes.list.iter().any(|n| unknown(n) || unread(n));
                // What the first walk did not reach is not marked; ENXIO is no news of a mark.
                let quiet = [ProcessOp::Nodes, ProcessOp::Scan, ProcessOp::NextMap].contains(&op)
                    || errno == libc::ENXIO
                    || errno == libc::ESRCH;
                assert!(!missed || told || quiet, "{why}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn exactly_the_folios_that_nobody_used_move(
        maps in proptest::collection::vec((0u32..3, 1usize..8, any::<u64>()), 1..5),
        touched in proptest::collection::vec((0usize..5, 0usize..256), 0..12),
        workers in 1usize..4,
    ) {
        let page = page_size();
        // Folios of a page, of sixteen, and huge pages.
        let shape = |kind: u32| [(page, page), (page, 16 * page), (HUGE, HUGE)][kind as usize];
        let kernel = tracking(Vec::new());
        let vmas: Vec<FakeVma> = maps.iter().enumerate().map(|(i, (kind, folios, missing))| {
            let (page_bytes, folio_bytes) = shape(*kind);
            let count = folios * folio_bytes / page_bytes;
            let mut vma = FakeVma::anonymous(BASE * (i + 1), page_bytes, count, 0);
            vma.folio_bytes = folio_bytes;
            for (at, page) in vma.pages.iter_mut().enumerate() {
                if missing >> (at % 64) & 1 == 1 {
                    page.node = None;
                }
            }
            vma
        }).collect();
        kernel.add(FakeProcess::new(PID, vmas.clone()));
        let mut young: Vec<Vec<usize>> = vec![Vec::new(); vmas.len()];
        for (map, at) in touched {
            let Some(vma) = vmas.get(map) else { continue };
            let len = vma.vma.end - vma.vma.start;
            let at = vma.vma.start + at * page % len;
            let index = (at - vma.vma.start) / vma.page_bytes;
            if vma.pages[index].node.is_some() {
                kernel.at(MEANWHILE, Event::Touch(PID, at..at + page));
                young[map].push((at - vma.vma.start) / vma.folio_bytes);
            }
        }
        let report = old_ones(&kernel).workers(workers).run().expect("valid");
        let now = kernel.nodes_of(PID);
        let mut stayed = 0;
        for (map, vma) in vmas.iter().enumerate() {
            for (index, page) in vma.pages.iter().enumerate().filter(|(_, p)| p.node.is_some()) {
                let folio = index * vma.page_bytes / vma.folio_bytes;
                let is_young = young[map].contains(&folio);
                prop_assert_eq!(now[map][index], Some(u32::from(!is_young)), "{:?}", page);
                stayed += if is_young { vma.page_bytes as u64 } else { 0 };
            }
        }
        prop_assert_eq!(bytes(&report, Outcome::Young), stayed);
        prop_assert!(report.is_complete());
        prop_assert!(kernel.now() >= AGE);
    }
}
