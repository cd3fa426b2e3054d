//! Moves of real processes by this machine's kernel. Where there are two nodes pages go from node
//! to node, and each page's node is asked for; with one node they are found to be there already.

#[path = "support/child.rs"]
mod child;

use child::Child;
use pageferry::process::{
    Cost, Destination, Filter, Kind, Note, ProcessError, ProcessMove, ProcessReport, Selection,
    TargetError, Where,
};
use pageferry::topology::{Machine, NodeId, NodeList};
use pageferry::{HUGE, Outcome};
use pageferry_sys::page_size;
use pageferry_sys::process::LinuxProcesses;
use pageferry_sys::usage::resident_bytes;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

fn bytes(report: &ProcessReport, outcome: Outcome) -> u64 {
    report.bytes(|o| o == outcome)
}

/// Two nodes with memory, or one twice.
fn nodes() -> (NodeId, NodeId) {
    let machine = Machine::read().expect("this machine");
    let mut nodes = machine.memory_nodes().map(|n| n.id);
    let first = nodes.next().expect("a machine has memory");
    let second = nodes.next();
    if second.is_none() {
        eprintln!("skipped in part: one node, so pages can only be found to be there already");
    }
    (first, second.unwrap_or(first))
}

/// What the filter says of the child's memory.
fn of(child: &Child, filter: &Filter) -> Selection {
    Selection::new().pid(child.pid).filter(filter.clone())
}

/// All memory of a process.
fn all_of(pid: u32) -> Selection {
    Selection::new().pid(pid)
}

fn to_node(node: NodeId, selection: Selection) -> ProcessMove {
    ProcessMove::new(selection, Destination::node(node))
}

/// Moves what the filter says to one node and then to the other. Asserts that everything arrives.
fn there_and_back(child: &Child, filter: &Filter, expected: u64) {
    let (first, second) = nodes();
    for to in [first, second, first] {
        let report = to_node(to, of(child, filter)).run().expect("our own child");
        assert_eq!(report.bytes_looked_at(), expected, "{report:?}");
        assert!(report.is_complete(), "{report:?}");
        let found = Where::new(of(child, filter)).look().expect("our child");
        assert_eq!(found.by_node().into_iter().collect::<Vec<_>>(), [(to, expected)]);
    }
}

#[test]
fn anonymous_memory_goes_to_the_node_and_every_page_is_told() {
    let child = Child::with(|| child::anonymous(64 << 20, false));
    there_and_back(&child, &Filter::new().range(child.range()), 64 << 20);
    // Addresses need not be those of pages.
    let range = child.range().start + 100..child.range().start + page_size() + 1;
    there_and_back(&child, &Filter::new().range(range), 2 * page_size() as u64);
}

#[test]
fn huge_pages_are_moved_whole() {
    let child = Child::with(|| child::anonymous(64 << 20, true));
    let filter = Filter::new().range(child.range());
    let found = Where::new(of(&child, &filter)).look().expect("our child");
    let huge = |found: &pageferry::process::ProcessResidency| -> u64 {
        found.holdings.iter().filter(|h| h.page_bytes == HUGE as u64).map(|h| h.bytes).sum()
    };
    let before = huge(&found);
    if before == 0 {
        eprintln!("skipped: this kernel gave no huge page");
        return;
    }
    there_and_back(&child, &filter, 64 << 20);
    let found = Where::new(of(&child, &filter)).look().expect("our child");
    assert_eq!(huge(&found), before, "huge pages stay huge");
}

#[test]
fn huge_pages_that_are_mapped_page_by_page_go_to_the_node_and_every_page_is_told() {
    let child = Child::with(|| {
        let (start, len) = child::anonymous(16 << 20, true);
        // One page with other rights splits the mapping of its huge page, not the page.
        for at in (start..start + len).step_by(HUGE) {
            child::protect(at + 7 * page_size(), page_size());
        }
        (start, len)
    });
    there_and_back(&child, &Filter::new().range(child.range()), 16 << 20);
    // In parts that begin and end in the middle of one.
    let part = child.range().start + 5 * page_size()..child.range().end - 9 * page_size();
    let expected = part.len() as u64;
    there_and_back(&child, &Filter::new().range(part), expected);
}

#[test]
fn memory_of_each_kind_is_told_apart_and_moved() {
    let child = Child::with(|| {
        let shared = child::shared(3 << 20, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
        child::memfd(2 << 20);
        child::grow_heap(1 << 20);
        shared
    });
    let found = Where::new(all_of(child.pid)).top(1000).look().expect("our child");
    let of =
        |kind: Kind| found.holdings.iter().filter(|h| h.kind == kind).map(|h| h.bytes).sum::<u64>();
    assert!(of(Kind::SharedMemory) >= 5 << 20, "{found:?}");
    assert!(of(Kind::Heap) >= 1 << 20 && of(Kind::Stack) > 0 && of(Kind::File) > 0, "{found:?}");
    assert!(found.top.windows(2).all(|w| w[0].bytes >= w[1].bytes));
    let (_, to) = nodes();
    let kinds = [Kind::Heap, Kind::SharedMemory];
    let chosen = all_of(child.pid).filter(Filter::new().kinds(kinds));
    let report = to_node(to, chosen).run().expect("our child");
    assert!(report.bytes_looked_at() >= 6 << 20);
    assert!(report.lines.iter().all(|l| kinds.contains(&l.kind)), "{report:?}");
}

#[test]
fn memory_that_three_processes_map_is_moved_once_and_counted_once() {
    let memory = child::shared(8 << 20, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
    // Forked, each has the mapping; each touches all of it.
    let children: Vec<_> = (0..3).map(|_| Child::with(|| child::touch(memory))).collect();
    let filter = Filter::new().range(memory.0..memory.0 + memory.1);
    let pids = children.iter().map(|child| child.pid);
    let all = pids.fold(Selection::new().filter(filter), Selection::pid);
    let (first, second) = nodes();
    for to in [first, second] {
        let report = to_node(to, all.clone()).run().expect("our children");
        assert_eq!(report.bytes_looked_at(), 8 << 20, "{report:?}");
        assert!(report.is_complete(), "{report:?}");
        let found = Where::new(all.clone()).look().expect("our children");
        assert_eq!(found.by_node().get(&to), Some(&(8 << 20)));
    }
    drop(children);
    child::unmap(memory);
}

#[test]
fn locked_memory_moves_too() {
    let child = Child::with(|| child::locked(child::anonymous(4 << 20, false)));
    there_and_back(&child, &Filter::new().range(child.range()), 4 << 20);
}

#[test]
fn a_process_under_a_debugger_is_moved_like_any_other() {
    let child = Child::with(|| child::anonymous(4 << 20, false));
    let Some(_stopped) = child.trace() else {
        eprintln!("skipped: ptrace is not allowed here");
        return;
    };
    there_and_back(&child, &Filter::new().range(child.range()), 4 << 20);
}

#[test]
fn interleaved_pages_lie_on_the_nodes_in_turn() {
    let child = Child::with(|| child::anonymous(4 << 20, false));
    let (first, second) = nodes();
    let all: NodeList = [first, second].into_iter().collect();
    let memory = of(&child, &Filter::new().range(child.range()));
    let turns = Destination::interleave(all.iter());
    let report = ProcessMove::new(memory.clone(), turns).run().expect("our child");
    assert!(report.is_complete(), "{report:?}");
    let found = Where::new(memory).look();
    let share = (4 << 20) / all.len() as u64;
    assert!(found.expect("our child").by_node().values().all(|bytes| *bytes == share));
}

#[test]
fn a_process_that_is_killed_meanwhile_is_no_error() {
    let (first, second) = nodes();
    let mut ended = 0;
    for round in 0..20u64 {
        let child = Child::with(|| child::anonymous(16 << 20, false));
        let pid = child.pid;
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(round * 200));
            drop(child);
        });
        let to = if round % 2 == 0 { first } else { second };
        match to_node(to, all_of(pid)).run() {
            Ok(report) => {
                let sum: u64 = report.by_outcome().iter().map(|(_, bytes)| bytes).sum();
                assert_eq!(sum, report.bytes_looked_at());
                assert!(report.is_complete(), "{report:?}");
                ended += u32::from(report.notes.list.contains(&Note::Exited { pid }));
            }
            Err(ProcessError::Target(TargetError::NoProcess(_) | TargetError::Zombie(_))) => {}
            Err(other) => panic!("{other}"),
        }
        killer.join().expect("it only sleeps and kills");
    }
    eprintln!("{ended} of 20 ended in the middle");
}

#[test]
fn a_process_that_maps_and_unmaps_all_the_time_is_no_error() {
    let child = Child::with_loop(child::map_and_unmap);
    let (first, second) = nodes();
    for to in [first, second, first, second] {
        let report = to_node(to, all_of(child.pid)).run().expect("ours");
        let sum: u64 = report.by_outcome().iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(sum, report.bytes_looked_at());
        assert!(!report.cancelled);
    }
}

#[test]
fn children_are_found_at_any_depth() {
    const DEPTH: usize = 20;
    let child = Child::with(|| child::chain(DEPTH, 1 << 20));
    let (_, to) = nodes();
    let move_all = |children: bool| {
        to_node(to, all_of(child.pid).children(children)).run().expect("our child")
    };
    assert_eq!(move_all(false).processes, 1);
    let report = move_all(true);
    assert_eq!(report.processes, DEPTH as u64 + 1, "{report:?}");
    assert!(report.is_complete(), "{report:?}");
}

#[test]
fn a_cgroup_names_its_processes_and_those_of_groups_below() {
    let Some(group) = child::Group::new() else {
        eprintln!("skipped: no cgroup can be made here");
        return;
    };
    let children = [
        Child::with(|| child::anonymous(2 << 20, false)),
        Child::with(|| child::anonymous(2 << 20, false)),
    ];
    if !(group.join("", children[0].pid) && group.join("below", children[1].pid)) {
        eprintln!("skipped: no process can be put into a cgroup here");
        return;
    }
    let (_, to) = nodes();
    let members = Selection::new().cgroup(&group.path);
    let report = to_node(to, members.clone()).run().expect("our group");
    assert_eq!(report.processes, 2, "{report:?}");
    assert!(report.bytes_looked_at() >= 4 << 20);
    let found = Where::new(members.clone()).look().expect("our group");
    assert_eq!(found.processes, 2);
    drop(children);
    let empty = Where::new(members).look().expect("our group");
    assert_eq!((empty.processes, empty.bytes()), (0, 0));
}

#[test]
fn a_process_whose_first_thread_has_ended_is_moved_by_another_one() {
    let child = Child::with_last_thread(|| child::anonymous(2 << 20, false));
    there_and_back(&child, &Filter::new().range(child.range()), 2 << 20);
}

#[test]
fn zombies_kernel_threads_and_vanished_processes_are_named_as_such() {
    let (_, to) = nodes();
    let refusal = |pid: u32| match to_node(to, all_of(pid)).run() {
        Err(ProcessError::Target(error)) => error,
        other => panic!("process {pid}: {other:?}"),
    };
    let mut zombie = Command::new("true").spawn().expect("true is everywhere");
    let pid = zombie.id();
    while !matches!(Where::new(all_of(pid)).look(), Err(TargetError::Zombie(p)) if p == pid) {
        std::thread::yield_now();
    }
    assert!(matches!(refusal(pid), TargetError::Zombie(p) if p == pid));
    zombie.wait().expect("ours");
    assert!(matches!(refusal(pid), TargetError::NoProcess(p) if p == pid));
    let stat = std::fs::read_to_string("/proc/2/comm").unwrap_or_default();
    if stat.trim() == "kthreadd" {
        assert!(matches!(refusal(2), TargetError::KernelThread(2)));
    } else {
        eprintln!("skipped in part: this pid namespace has no kernel thread");
    }
}

#[test]
fn the_number_of_a_thread_names_its_process_and_ones_own_process_is_allowed() {
    let (_, to) = nodes();
    let (tell, told) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        tell.send(pageferry_sys::affinity::thread_id()).expect("the test waits");
        let _ = ended.recv();
    });
    let tid = u32::try_from(told.recv().expect("a thread")).expect("positive");
    let report = to_node(to, all_of(tid)).dry_run(true).run().expect("our thread");
    let pid = std::process::id();
    assert!(report.notes.list.contains(&Note::Thread { tid, pid }), "{report:?}");
    assert!(report.notes.list.contains(&Note::Own { pid }), "{report:?}");
    drop(end);
    thread.join().expect("it only waits");
}

#[test]
fn another_users_process_is_refused_with_the_remedy() {
    const ROLE: &str = "PAGEFERRY_TEST_FOREIGN_PID";
    let (_, to) = nodes();
    if let Ok(pid) = std::env::var(ROLE) {
        let pid = pid.parse().expect("a pid");
        let error = to_node(to, all_of(pid)).run().expect_err("not ours");
        assert!(matches!(&error, ProcessError::Target(TargetError::Denied { .. })), "{error}");
        assert!(error.to_string().contains("CAP_SYS_PTRACE"), "{error}");
        let error = Where::new(all_of(pid)).look().expect_err("not ours");
        assert!(matches!(error, TargetError::Denied { .. }), "{error}");
        return;
    }
    // SAFETY: no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: only root can be another user");
        return;
    }
    // SAFETY: as above.
    let own = unsafe { libc::getpid() };
    let me = std::env::current_exe().expect("this test");
    let mut other = Command::new(me);
    other.args(["--exact", "another_users_process_is_refused_with_the_remedy", "--nocapture"]);
    other.env(ROLE, own.to_string()).uid(65534).gid(65534);
    match other.output() {
        Ok(out) => assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr)),
        Err(e) => eprintln!("skipped: this test cannot be run as another user ({e})"),
    }
}

#[test]
fn a_cancelled_move_says_what_it_left() {
    let child = Child::with(|| child::anonymous(64 << 20, false));
    let (first, second) = nodes();
    if first == second {
        eprintln!("skipped: with one node nothing is left to cancel");
        return;
    }
    let memory = of(&child, &Filter::new().range(child.range()));
    to_node(first, memory.clone()).run().expect("our child");
    let handle = to_node(second, memory).rate(8 << 20).start().expect("our child");
    while handle.progress().bytes_moved == 0 {
        std::thread::yield_now();
    }
    handle.cancel();
    let report = handle.wait().expect("no panic");
    assert!(report.cancelled && bytes(&report, Outcome::Moved) > 0, "{report:?}");
    assert!(bytes(&report, Outcome::Moved) < 64 << 20);
}

#[test]
fn what_a_move_would_cost_is_measured_between_two_nodes() {
    let child = Child::with(|| child::anonymous(8 << 20, false));
    let (first, second) = nodes();
    let memory = of(&child, &Filter::new().range(child.range()));
    to_node(first, memory.clone()).run().expect("our child");
    let plan = to_node(second, memory).dry_run(true).run().expect("our child");
    let Ok(cost) = Cost::measure(first, second) else {
        assert_eq!(first, second, "two nodes with memory");
        assert_eq!(bytes(&plan, Outcome::AlreadyThere), 8 << 20);
        return;
    };
    assert_eq!(bytes(&plan, Outcome::WouldMove), 8 << 20);
    assert!(cost.of(&plan) > cost.base_page * 1000, "{cost:?}");
}

#[test]
fn a_process_with_60000_mappings_in_64_gib_is_looked_at_in_little_memory() {
    const MAPPINGS: usize = 60_000;
    let child = Child::with(|| child::sparse(MAPPINGS, 64 << 30));
    let kernels = [
        ("this kernel", LinuxProcesses::default()),
        ("one without PAGEMAP_SCAN", LinuxProcesses::default().without_scan()),
    ];
    for (which, kernel) in kernels {
        let look = Where::new(of(&child, &Filter::new().range(child.range())));
        let before = resident_bytes();
        let found = look.kernel(Arc::new(kernel)).look().expect("our child");
        let after = resident_bytes();
        eprintln!(
            "{which}: {} mappings, {} MiB present: looked at in {:?}",
            found.mappings,
            found.bytes() >> 20,
            found.elapsed
        );
        if found.mappings < MAPPINGS as u64 {
            eprintln!("skipped in part: vm.max_map_count allows fewer");
        }
        let present = found.mappings.div_ceil(2) * page_size() as u64;
        assert!(found.bytes().abs_diff(present) <= 2 * page_size() as u64, "{found:?}");
        if let (Some(before), Some(after)) = (before, after) {
            assert!(after.saturating_sub(before) < 64 << 20, "from {before} to {after} bytes");
        }
    }
}
