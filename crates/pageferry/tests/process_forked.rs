//! Anonymous memory that processes have in common since a fork: counted once, or said. On made-up
//! machines, and with real children.

#[path = "support/child.rs"]
mod child;
#[path = "support/made_up.rs"]
mod made_up;
#[path = "support/rights.rs"]
mod rights;

use child::Child;
use made_up::{BASE, PID, PLENTY, bytes, node, of, pages};
use pageferry::process::{Destination, Filter, Note, ProcessMove, Selection, Where};
use pageferry::topology::Machine;
use pageferry::{Busy, HUGE, Outcome, Shortage};
use pageferry_sys::page_size;
use pageferry_sys::process::fake::{FakeKernel, FakeProcess, FakeVma, Hindrance};
use pageferry_sys::process::{LinuxProcesses, ProcessKernel};
use rights::{sees_frames, without_sys_admin};
use std::sync::Arc;

const CHILDREN: u32 = 60;
const COMMON: usize = 8192;
const OWN: usize = 10;

/// A process and its children, which share 32 MiB since they were forked and have ten pages of their
/// own each; node 1 has room for little more than that.
fn family(page_bytes: usize) -> (FakeKernel, Selection) {
    let room = pages(COMMON + OWN * (CHILDREN as usize + 1) + 100);
    let kernel = FakeKernel::new(&[PLENTY, room]);
    for pid in PID..=PID + CHILDREN {
        let count = COMMON * page_size() / page_bytes;
        let mut common = FakeVma::anonymous(BASE, page_bytes, count, 0);
        common.pages.iter_mut().for_each(|p| p.hindrance = Some(Hindrance::Forked(PID)));
        let own = FakeVma::anonymous(BASE * 2, page_size(), OWN, 0);
        let mut process = FakeProcess::new(pid, vec![common, own]);
        process.status.parent = if pid == PID { 1 } else { PID };
        kernel.add(process);
    }
    (kernel, Selection::new().pid(PID).children(true))
}

/// Bytes of the family, each page once, and of the mappings that all of them have in common.
fn sums() -> (u64, u64) {
    let all = u64::from(CHILDREN) + 1;
    (pages(COMMON) + all * pages(OWN), all * pages(COMMON))
}

#[test]
fn what_forked_children_share_is_counted_once() {
    for page_bytes in [page_size(), HUGE] {
        let (kernel, family) = family(page_bytes);
        let found = Where::new(family).kernel(Arc::new(kernel)).look().expect("valid");
        assert_eq!(found.processes, u64::from(CHILDREN) + 1);
        assert_eq!((found.bytes(), found.shared_anonymous), (sums().0, pages(COMMON)));
        let bytes = sums().1 - pages(COMMON);
        assert_eq!(found.notes.list, [Note::CommonOnce { bytes }]);
    }
}

#[test]
fn who_may_not_see_frames_is_told_what_is_counted_for_each() {
    for no_scan in [false, true] {
        let (kernel, family) = family(page_size());
        if no_scan {
            kernel.without_scan();
        } else {
            kernel.hide_frames();
        }
        let look = Where::new(family.clone()).kernel(Arc::new(kernel.clone()));
        let found = look.look().expect("valid");
        let bytes = sums().1;
        assert_eq!(found.bytes(), bytes + sums().0 - pages(COMMON));
        assert_eq!(found.shared_anonymous, bytes);
        assert_eq!(found.notes.list, [Note::CommonUntold { bytes }], "no scan: {no_scan}");
        let report = of(&kernel, family, Destination::node(node(1))).dry_run(true).run();
        let report = report.expect("valid");
        assert!(report.notes.list.contains(&Note::CommonUntold { bytes }), "{report:?}");
    }
}

#[test]
fn of_one_process_it_is_told_and_there_is_nothing_to_say() {
    let (kernel, _) = family(page_size());
    for hidden in [false, true] {
        if hidden {
            kernel.hide_frames();
        }
        let one = Selection::new().pid(PID);
        let found = Where::new(one).kernel(Arc::new(kernel.clone())).look().expect("valid");
        assert_eq!((found.bytes(), found.shared_anonymous), (pages(COMMON + OWN), pages(COMMON)));
        assert_eq!(found.notes.list, []);
    }
}

#[test]
fn a_dry_run_takes_room_for_it_once() {
    for page_bytes in [page_size(), HUGE] {
        let (kernel, family) = family(page_bytes);
        let to = Destination::node(node(1));
        let report = of(&kernel, family, to).dry_run(true).run().expect("valid");
        assert_eq!(bytes(&report, Outcome::NoFrame(Shortage::Reserve)), 0, "{report:?}");
        assert_eq!(bytes(&report, Outcome::WouldMove), sums().0, "{report:?}");
        assert_eq!(report.bytes_looked_at(), sums().0);
        let bytes = sums().1 - pages(COMMON);
        assert!(report.notes.list.contains(&Note::CommonOnce { bytes }), "{report:?}");
    }
}

#[test]
fn a_move_takes_it_over_once_and_says_that_it_is_counted_for_each() {
    let to = || Destination::node(node(1));
    let (kernel, selection) = family(page_size());
    let report = of(&kernel, selection, to()).run().expect("valid");
    let (all, common) = sums();
    assert!(report.is_complete(), "{report:?}");
    assert_eq!(bytes(&report, Outcome::Moved), all, "{report:?}");
    assert_eq!(bytes(&report, Outcome::AlreadyThere), common - pages(COMMON));
    assert_eq!(report.bytes_looked_at(), all + common - pages(COMMON));
    assert!(report.notes.list.contains(&Note::CommonMoved { bytes: common }), "{report:?}");
    assert_eq!(kernel.node_free(1), Ok(pages(100)), "taken once");
    // Without the right to move what others map too it stays, and each page is told.
    let (kernel, selection) = family(page_size());
    kernel.without_rights();
    let report = of(&kernel, selection, to()).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Busy(Busy::Shared)), common, "{report:?}");
    assert_eq!(report.bytes_looked_at(), all + common - pages(COMMON));
}

#[test]
fn real_children_that_were_forked_are_looked_at_with_their_memory_once() {
    const FORKS: u64 = 8;
    const LEN: usize = 32 << 20;
    for huge in [false, true] {
        let memory = child::anonymous(LEN, huge);
        let range = memory.0..memory.0 + memory.1;
        // The first of them has written to 2 MiB of it since.
        let written = (memory.0, HUGE);
        let children: Vec<Child> = (0..FORKS)
            .map(|index| {
                Child::with(|| {
                    if index == 0 {
                        child::touch(written);
                    }
                    memory
                })
            })
            .collect();
        let of_all = || {
            let family = Selection::new().filter(Filter::new().range(range.clone()));
            children.iter().fold(family, |family, child| family.pid(child.pid))
        };
        let swapped: u64 = children
            .iter()
            .map(|child| LinuxProcesses::default().open(child.pid).expect("ours"))
            .map(|view| view.status().expect("ours").swapped)
            .sum();
        if swapped > 0 {
            return eprintln!("skipped: this machine has swapped parts of it out");
        }
        let (len, own) = (LEN as u64, HUGE as u64);
        let look = || Where::new(of_all()).look().expect("our children");
        let machine = Machine::read().expect("this machine");
        let to = machine.memory_nodes().last().expect("a machine has memory").id;
        let mv = || ProcessMove::new(of_all(), Destination::node(to)).workers(1);
        let each = FORKS * len;
        if sees_frames() {
            let found = look();
            assert_eq!(found.bytes(), len + own, "huge: {huge}: {found:?}");
            // What the first child has replaced it maps alone.
            assert_eq!(found.shared_anonymous, len, "{found:?}");
            let bytes = each - len - own;
            assert_eq!(found.notes.list, [Note::CommonOnce { bytes }]);
            let dry = mv().dry_run(true).run().expect("our children");
            assert_eq!(dry.bytes_looked_at(), len + own, "{dry:?}");
        } else {
            eprintln!("skipped in part: frames are not told here (CAP_SYS_ADMIN)");
        }
        let hidden = if sees_frames() { without_sys_admin(look) } else { look() };
        assert_eq!((hidden.bytes(), hidden.shared_anonymous), (each, each - own), "{hidden:?}");
        assert_eq!(hidden.notes.list, [Note::CommonUntold { bytes: each - own }]);
        if LinuxProcesses::default().may_move_shared() {
            let report = mv().run().expect("our children");
            assert!(report.is_complete(), "{report:?}");
            assert_eq!(report.bytes_looked_at(), each, "{report:?}");
            assert!(bytes(&report, Outcome::Moved) <= len + own, "{report:?}");
            assert!(report.notes.list.contains(&Note::CommonMoved { bytes: each - own }));
        } else {
            eprintln!("skipped in part: moving what several processes map needs CAP_SYS_NICE");
        }
        drop(children);
        child::unmap(memory);
    }
}
