//! The kernel path against live control groups (version 2) of a guest: processes that come and go,
//! that change their group, groups that vanish, and nodes that they may not use.

#[path = "support/child.rs"]
mod child;
#[path = "support/kinds.rs"]
mod kinds;

use kinds::{Board, Group, Ward, adds_up, bytes, fill, nap, two_nodes, until, wrong};
use pageferry::process::{
    Destination, Filter, Kind, Note, ProcessError, ProcessHandle, ProcessMove, ProcessReport,
    Selection, Where,
};
use pageferry::topology::NodeId;
use pageferry::{Outcome, Shortage};
use std::path::Path;
use std::sync::atomic::Ordering;

const MIB: usize = 1 << 20;

/// The anonymous memory of a group: that of the tests' children.
fn of(group: &Group) -> Selection {
    Selection::new().cgroup(&group.path).filter(Filter::new().kinds([Kind::Anonymous]))
}

fn move_to(node: NodeId, selection: Selection) -> ProcessMove {
    ProcessMove::new(selection, Destination::node(node))
}

/// Begins a move that takes a second or two, and waits until it has moved something.
fn begin(movement: ProcessMove) -> ProcessHandle {
    let handle = movement.rate(8 << 20).start().expect("our group");
    until("the first pages have moved", || handle.progress().bytes_moved > 0);
    handle
}

/// Joins a group with a child of so many bytes that are on `node`.
fn member(group: &Group, node: NodeId, len: usize) -> Ward {
    let ward = Ward::filled(|| child::anonymous(len, false));
    ward.goes_to(node, len);
    group.join(ward.child.pid);
    ward
}

/// Processes that a fork bomb makes, and how many of them live at a time.
const BOMB: u64 = 200;
const ALIVE: u64 = 12;

/// Forks until there have been [`BOMB`] processes; every fourth forks once itself. Each touches
/// some pages, lives for a moment, and ends.
fn explode(board: &Board) {
    let live = || {
        let made = board.counts[0].fetch_add(1, Ordering::Relaxed);
        child::anonymous(128 << 10, false);
        nap(30_000 + i64::try_from(made % 7).unwrap_or(0) * 20_000);
        made
    };
    let mut alive = 0;
    while board.counts[0].load(Ordering::Relaxed) < BOMB {
        // SAFETY: system calls and memory of its own; the children never return.
        unsafe {
            match libc::fork() {
                0 => {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    if live() % 4 == 0 && libc::fork() == 0 {
                        live();
                    }
                    libc::_exit(0);
                }
                pid => child::must(pid > 0),
            }
            alive += 1;
            let options = if alive < ALIVE { libc::WNOHANG } else { 0 };
            while alive > 0 && libc::waitpid(-1, std::ptr::null_mut(), options) > 0 {
                alive -= 1;
                if options == 0 {
                    break;
                }
            }
        }
    }
}

#[test]
fn a_fork_bomb_in_a_cgroup_is_followed_and_the_move_ends() {
    let Some((from, to)) = two_nodes() else { return };
    let Some(group) = Group::new("bomb") else { return };
    group.set("pids.max", "64");
    let bomb = Ward::new(
        |_| fill(child::anonymous(4 * MIB, false)),
        |board, memory, order| {
            if order == kinds::CHECK {
                return wrong(memory);
            }
            explode(board);
            0
        },
    );
    bomb.goes_to(from, 4 * MIB);
    group.join(bomb.child.pid);
    bomb.tell(1);
    let made = || bomb.board.counts[0].load(Ordering::Relaxed);
    until("the bomb has gone off", || made() > 10);
    let handle = begin(move_to(to, of(&group)));
    let report = handle.wait().expect("no panic");
    let meanwhile = made();
    adds_up(&report);
    assert!(!report.cancelled && report.processes > 1, "{report:?}");
    assert!(bytes(&report, Outcome::Moved) >= 4 << 20, "{report:?}");
    let joined = report.notes.list.iter().filter(|n| matches!(n, Note::Joined { .. })).count();
    assert!(joined > 0, "{report:?}");
    assert!(!report.notes.list.contains(&Note::StillJoining), "{report:?}");
    eprintln!("{} of {meanwhile} processes were met, {joined} joined", report.processes);
    bomb.is_intact();
    bomb.is_on(to);
    assert!(made() >= BOMB);
    // It is quiet now: whatever is left is moved.
    let report = move_to(from, of(&group)).run().expect("our group");
    assert!(report.is_complete(), "{report:?}");
    let found = Where::new(of(&group)).look().expect("our group");
    assert_eq!(found.by_node().into_keys().collect::<Vec<_>>(), [from], "{found:?}");
    bomb.is_intact();
}

#[test]
fn a_process_whose_cpuset_forbids_the_node_is_refused_before_a_page_is_touched() {
    let Some((from, to)) = two_nodes() else { return };
    let Some(group) = Group::new("cpuset") else { return };
    let len = 4 * MIB;
    let ward = member(&group, from, len);
    group.set("cpuset.mems", &from.to_string());
    let error = ward.to(to).run().expect_err("the node is forbidden");
    let ProcessError::Forbidden { pid, node, .. } = &error else { panic!("{error}") };
    assert_eq!((*pid, *node), (ward.child.pid, to));
    assert!(error.to_string().contains("change cpuset.mems"), "{error}");
    ward.is_on(from);
    // By its group, which nobody named a process of.
    match move_to(to, of(&group)).run() {
        Err(error) => assert!(matches!(error, ProcessError::Forbidden { .. }), "{error}"),
        Ok(report) => {
            let stayed = bytes(&report, Outcome::NoFrame(Shortage::Forbidden));
            assert_eq!(stayed + bytes(&report, Outcome::AlreadyThere), adds_up(&report));
            assert!(stayed >= len as u64, "{report:?}");
            told_of_cpuset(&report, &ward, to);
        }
    }
    ward.is_on(from);
    ward.is_intact();
    // Allowed again, it goes.
    group.set("cpuset.mems", &format!("{from},{to}"));
    ward.goes_to(to, len);
    ward.is_on(to);
    ward.is_intact();
}

fn told_of_cpuset(report: &ProcessReport, ward: &Ward, node: NodeId) {
    let note = Note::Forbidden { pid: ward.child.pid, node };
    assert!(report.notes.list.contains(&note), "{report:?}");
    assert!(note.to_string().contains("change cpuset.mems"), "{note}");
}

#[test]
fn a_cpuset_that_is_narrowed_half_way_ends_the_move_with_the_reason() {
    let Some((from, to)) = two_nodes() else { return };
    let Some(group) = Group::new("narrowed") else { return };
    let len = 16 * MIB;
    let ward = member(&group, from, len);
    group.set("cpuset.mems", &format!("{from},{to}"));
    let handle = begin(ward.to(to));
    group.set("cpuset.mems", &from.to_string());
    let report = handle.wait().expect("no panic");
    assert_eq!(adds_up(&report), len as u64, "{report:?}");
    let moved = bytes(&report, Outcome::Moved);
    let forbidden = bytes(&report, Outcome::NoFrame(Shortage::Forbidden));
    assert!(moved > 0 && forbidden > 0 && moved + forbidden == len as u64, "{report:?}");
    told_of_cpuset(&report, &ward, to);
    ward.is_intact();
    // Those that had moved, the kernel has brought back, but for the last call's.
    let there = ward.nodes(pageferry_sys::page_size());
    assert!(there.iter().all(|&n| n == kinds::number(from) || n == kinds::number(to)));
    group.set("cpuset.mems", &format!("{from},{to}"));
    ward.goes_to(to, len);
    ward.is_on(to);
    ward.is_intact();
}

#[test]
fn processes_of_nested_groups_are_counted_once_though_one_goes_from_group_to_group() {
    let Some((from, to)) = two_nodes() else { return };
    let Some(parent) = Group::new("parent") else { return };
    let (left, right) = (parent.below("left"), parent.below("right"));
    let nested = left.below("nested");
    let wards = [
        member(&parent, from, 4 * MIB),
        member(&nested, from, 4 * MIB),
        member(&left, from, 4 * MIB),
    ];
    let wanderer = wards[2].child.pid;
    let present = Where::new(of(&parent)).look().expect("our group");
    assert_eq!(present.processes, 3);
    let handle = begin(move_to(to, of(&parent)));
    let mut turns = 0;
    while !handle.is_finished() {
        for group in [&right, &nested, &parent, &left] {
            group.join(wanderer);
        }
        turns += 1;
        nap(500);
    }
    assert!(turns > 0);
    let report = handle.wait().expect("no panic");
    assert_eq!(report.processes, 3, "{report:?}");
    assert_eq!(adds_up(&report), present.bytes(), "{report:?}");
    assert!(report.is_complete(), "{report:?}");
    for ward in &wards {
        ward.is_on(to);
        ward.is_intact();
    }
    drop((nested, right, left));
}

#[test]
fn a_group_that_is_removed_half_way_is_noted_and_its_processes_are_moved_to_the_end() {
    let Some((from, to)) = two_nodes() else { return };
    let Some(parent) = Group::new("removed") else { return };
    let group = parent.below("group");
    let ward = member(&group, from, 16 * MIB);
    let handle = begin(move_to(to, of(&group)));
    // The process leaves it, and it is gone.
    parent.join(ward.child.pid);
    let path = group.path.display().to_string();
    drop(group);
    assert!(!Path::new(&path).exists(), "the group could not be removed");
    let report = handle.wait().expect("no panic");
    adds_up(&report);
    assert!(report.is_complete(), "{report:?}");
    assert!(bytes(&report, Outcome::Moved) >= 16 << 20, "{report:?}");
    assert!(report.notes.list.contains(&Note::GroupLost { path }), "{report:?}");
    ward.is_on(to);
    ward.is_intact();
}
