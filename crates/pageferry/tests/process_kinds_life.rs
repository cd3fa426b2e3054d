//! The kernel path against what processes do while their pages go from node to node: threads that
//! write everywhere, stops, ends, new programs, reused numbers.

#[path = "support/child.rs"]
mod child;
#[path = "support/kinds.rs"]
mod kinds;

use child::{Child, Memory, RW, map, must};
use kinds::{Board, Ward, adds_up, bytes, fill, nodes, number, two_nodes, until, wrong};
use pageferry::process::{
    Destination, Filter, Kind, Note, ProcessHandle, ProcessMove, ProcessReport, Selection,
};
use pageferry::{HUGE, Outcome};
use pageferry_sys::page_size;
use std::os::fd::AsRawFd;
use std::ptr::{null, null_mut, with_exposed_provenance_mut};
use std::sync::atomic::Ordering;

const MIB: usize = 1 << 20;

/// Threads that write. The guests have two CPUs, one of which is for the move.
const THREADS: usize = 2;
/// The distance of words that a thread writes, and that of the threads' words.
const STEP: usize = 512;
const APART: usize = 64;

/// What a thread is given.
#[repr(C)]
struct Writer {
    board: *const Board,
    index: usize,
}

/// A thread's life: in each pass it finds in every word of its own what it wrote in the last.
extern "C" fn write_and_verify(writer: *mut libc::c_void) -> libc::c_int {
    // SAFETY: it lies on the thread's own stack, which nobody else touches.
    let Writer { board, index } = unsafe { writer.cast::<Writer>().read() };
    // SAFETY: the board is never unmapped.
    let board = unsafe { &*board };
    for pass in 0u64.. {
        let mut wrong = 0;
        for at in board.parts().flat_map(|part| part.step_by(STEP)) {
            let at = at + index * APART;
            let word: *mut u64 = with_exposed_provenance_mut(at);
            let value = |pass: u64| (at as u64).rotate_left(17) ^ pass;
            // SAFETY: a word of the child's that only this thread writes.
            unsafe {
                wrong += u64::from(pass > 0 && word.read_volatile() != value(pass - 1));
                word.write_volatile(value(pass));
            }
        }
        board.counts[2 * index].fetch_add(1, Ordering::Relaxed);
        board.counts[2 * index + 1].fetch_add(wrong, Ordering::Relaxed);
    }
    0
}

/// Starts the threads, which never end.
fn start_writers(board: &Board) {
    const STACK: usize = 64 << 10;
    for index in 0..THREADS {
        let stack = map(STACK, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        let top = stack + STACK - 64;
        let writer: *mut Writer = with_exposed_provenance_mut(top);
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD;
        // SAFETY: what it is given lies above where its stack begins, on a mapping of its own; it
        // only reads and writes memory.
        unsafe {
            writer.write(Writer { board, index });
            must(libc::clone(write_and_verify, writer.cast(), flags, writer.cast()) > 0);
        }
    }
}

/// Memory of every kind, all touched, named on the board.
fn every_kind(board: &Board, file: i32, hugetlb: bool) -> Memory {
    let parts = [
        child::anonymous(2 * MIB, false),
        child::anonymous(2 * HUGE, true),
        child::grow_heap(MIB),
        child::shared(MIB, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1),
        child::memfd(MIB),
        child::shared(MIB, libc::MAP_PRIVATE, file),
        child::shared(MIB, libc::MAP_SHARED, file),
        child::locked(child::anonymous(MIB, false)),
        if hugetlb { child::touch(kinds::hugetlb(HUGE)) } else { (0, 0) },
    ];
    for (slot, part) in board.parts.iter().zip(parts) {
        slot[0].store(part.0, Ordering::Relaxed);
        slot[1].store(part.1, Ordering::Release);
    }
    parts[0]
}

#[test]
fn threads_that_write_everywhere_find_what_they_wrote_while_all_of_it_moves_to_and_fro() {
    let Some((from, to)) = two_nodes() else { return };
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let file = tempfile::tempfile_in(folder).expect("a scratch file");
    file.set_len(MIB as u64).expect("room for a MiB");
    let spare = [from, to].map(|n| kinds::read_number(kinds::pool(n, "free_hugepages")));
    let ward = Ward::new(
        |board| {
            let memory = every_kind(board, file.as_raw_fd(), spare.iter().all(|&n| n > 0));
            start_writers(board);
            memory
        },
        |_, _, _| 0,
    );
    let count = |index: usize| ward.board.counts[index].load(Ordering::Relaxed);
    let pid = ward.child.pid;
    let go = |to| {
        let selection = Selection::new().pid(pid);
        ProcessMove::new(selection, Destination::node(to)).run().expect("our child")
    };
    go(from);
    for to in [to, from, to, from, to] {
        let before = [count(0), count(2)];
        let report = go(to);
        adds_up(&report);
        assert!(bytes(&report, Outcome::Moved) >= 12 << 20, "{report:?}");
        for part in ward.board.parts() {
            let pages: Vec<_> = part.clone().step_by(page_size()).collect();
            let told = nodes(pid, &pages);
            let away = told.iter().filter(|&&n| n != number(to)).count();
            assert_eq!(away, 0, "pages of {part:x?} that are not on node {to}: {report:?}");
        }
        until("every thread has passed", || count(0) > before[0] + 1 && count(2) > before[1] + 1);
    }
    assert_eq!([count(1), count(3)], [0, 0], "words that were wrong");
}

/// How a process is stopped.
type Stop = fn(i32) -> bool;

/// `ptrace(2)` of a child of ours that takes no memory.
fn ptrace(request: libc::c_uint, pid: i32) -> bool {
    let none = null_mut::<u8>();
    // SAFETY: nothing of this program is read or written.
    unsafe { libc::ptrace(request, pid, none, none) == 0 }
}

fn signal(pid: i32, signal: i32) -> bool {
    // SAFETY: no preconditions; a child of ours.
    unsafe { libc::kill(pid, signal) == 0 }
}

fn wait_for_stop(pid: i32) -> bool {
    let mut status = 0;
    // SAFETY: a child of ours; the kernel writes a status.
    let got = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL | libc::WUNTRACED) };
    got == pid && libc::WIFSTOPPED(status)
}

#[test]
fn a_stopped_process_is_moved_and_goes_on_as_if_nothing_had_been() {
    let Some((from, to)) = two_nodes() else { return };
    let ways: [(&str, Stop); 3] = [
        ("seized and interrupted", |pid| {
            ptrace(libc::PTRACE_SEIZE, pid) && ptrace(libc::PTRACE_INTERRUPT, pid)
        }),
        ("attached to, as by a debugger", |pid| ptrace(libc::PTRACE_ATTACH, pid)),
        ("stopped by a signal", |pid| signal(pid, libc::SIGSTOP)),
    ];
    for (how, stop) in ways {
        let ward = Ward::filled(|| child::anonymous(4 * MIB, false));
        ward.goes_to(from, 4 * MIB);
        let pid = i32::try_from(ward.child.pid).expect("positive");
        if !stop(pid) {
            eprintln!("skipped in part: a process cannot be {how} here");
            continue;
        }
        assert!(wait_for_stop(pid), "{how}");
        for to in [to, from, to] {
            ward.goes_to(to, 4 * MIB);
            ward.is_on(to);
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("our child");
            assert!(stat.contains(") t ") || stat.contains(") T "), "{how}: {stat}");
        }
        // One of them lets it go on.
        assert!(ptrace(libc::PTRACE_DETACH, pid) || signal(pid, libc::SIGCONT));
        ward.is_intact();
    }
}

/// Begins a move that takes about two seconds, and waits until it has moved something.
fn begin(movement: ProcessMove) -> ProcessHandle {
    let handle = movement.rate(8 << 20).start().expect("our child");
    until("the first pages have moved", || handle.progress().bytes_moved > 0);
    handle
}

/// Something moved, and something did not any more.
fn broke_off(report: &ProcessReport) {
    adds_up(report);
    let moved = bytes(report, Outcome::Moved);
    assert!(moved > 0 && moved < report.bytes_looked_at() && !report.cancelled, "{report:?}");
    assert!(report.is_complete(), "what is not there any more needs no move: {report:?}");
}

#[test]
fn a_process_that_ends_half_way_leaves_a_report_of_both_halves() {
    let Some((from, to)) = two_nodes() else { return };
    let ward = Ward::new(
        |_| fill(child::anonymous(16 * MIB, false)),
        // SAFETY: ends the child at once.
        |_, _, _| unsafe { libc::_exit(0) },
    );
    ward.goes_to(from, 16 * MIB);
    let handle = begin(ward.to(to));
    ward.tell(1);
    let report = handle.wait().expect("no panic");
    broke_off(&report);
    assert_eq!(adds_up(&report), 16 << 20, "{report:?}");
    let rest = bytes(&report, Outcome::Exited) + bytes(&report, Outcome::Unmapped);
    assert_eq!(rest + bytes(&report, Outcome::Gone) + bytes(&report, Outcome::Moved), 16 << 20);
    assert!(bytes(&report, Outcome::Exited) > 0, "{report:?}");
    assert!(report.notes.list.contains(&Note::Exited { pid: ward.child.pid }), "{report:?}");
}

const ROLE: &str = "PAGEFERRY_TEST_NEW_IMAGE";

#[test]
fn a_process_that_executes_another_program_half_way_is_looked_at_again() {
    let Some((from, to)) = two_nodes() else { return };
    if std::env::var_os(ROLE).is_some() {
        // The new program: 4 MiB, until it is killed.
        let memory = child::anonymous(4 * MIB, false);
        std::hint::black_box(memory);
        loop {
            kinds::nap(10_000);
        }
    }
    let text = |s: &str| std::ffi::CString::new(s).expect("no zero in it");
    let me = std::env::current_exe().expect("procfs");
    let me = text(me.to_str().expect("a plain path"));
    let name = "a_process_that_executes_another_program_half_way_is_looked_at_again";
    let args = [text("test"), text("--exact"), text(name)];
    let args = [args[0].as_ptr(), args[1].as_ptr(), args[2].as_ptr(), null()];
    let (role, guest) = (text(&format!("{ROLE}=1")), text("PAGEFERRY_GUEST=1"));
    let environment = [role.as_ptr(), guest.as_ptr(), null()];
    let ward = Ward::new(
        |_| fill(child::anonymous(16 * MIB, false)),
        |_, _, _| {
            // SAFETY: C strings and lists of them that end with null, all alive until it returns.
            unsafe { libc::execve(me.as_ptr(), args.as_ptr(), environment.as_ptr()) };
            1
        },
    );
    ward.goes_to(from, 16 * MIB);
    let pid = ward.child.pid;
    let filter = Filter::new().kinds([Kind::Anonymous, Kind::Heap, Kind::Stack]);
    let selection = Selection::new().pid(pid).filter(filter);
    let handle = begin(ProcessMove::new(selection, Destination::node(to)));
    ward.tell(1);
    let report = handle.wait().expect("no panic");
    broke_off(&report);
    assert!(report.notes.list.contains(&Note::Executed { pid }), "{report:?}");
    assert!(!report.notes.list.contains(&Note::Exited { pid }), "{report:?}");
    assert_eq!(report.processes, 1, "{report:?}");
    // What the new program has from its beginning: its arguments, on top of its stack.
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("our child");
    let stack = maps.lines().find(|l| l.ends_with("[stack]")).expect("every program has one");
    let end = stack.split(['-', ' ']).nth(1).and_then(|e| usize::from_str_radix(e, 16).ok());
    let top = end.expect("an address") - page_size();
    assert_eq!(nodes(pid, &[top]), [number(to)], "{report:?}");
}

#[test]
fn a_zombie_among_children_is_noted_and_the_others_are_moved() {
    let Some((from, to)) = two_nodes() else { return };
    let ward = Ward::new(
        |board| {
            // SAFETY: the child's child ends at once; nobody waits for it.
            let pid = unsafe {
                let pid = libc::fork();
                if pid == 0 {
                    libc::_exit(0);
                }
                pid
            };
            board.counts[0].store(u64::from(pid.unsigned_abs()), Ordering::Relaxed);
            fill(child::anonymous(4 * MIB, false))
        },
        |_, memory, _| wrong(memory),
    );
    ward.goes_to(from, 4 * MIB);
    let zombie = u32::try_from(ward.board.counts[0].load(Ordering::Relaxed)).expect("a pid");
    let stat = format!("/proc/{zombie}/stat");
    until("it has ended", || std::fs::read_to_string(&stat).is_ok_and(|s| s.contains(") Z ")));
    let filter = Filter::new().range(ward.child.range());
    let family = Selection::new().pid(ward.child.pid).children(true).filter(filter);
    let report = ProcessMove::new(family, Destination::node(to)).run().expect("our child");
    assert_eq!((adds_up(&report), report.processes), (4 << 20, 1), "{report:?}");
    assert!(report.notes.list.contains(&Note::Zombies { processes: 1 }), "{report:?}");
    ward.is_on(to);
    ward.is_intact();
}

#[test]
fn what_has_the_number_of_a_process_that_ended_is_left_alone() {
    let Some((from, to)) = two_nodes() else { return };
    let len = 16 * MIB;
    // The same addresses in both.
    let memory = child::anonymous(len, false);
    // SAFETY: the test's own mapping, whose content it does not need.
    unsafe {
        let at = with_exposed_provenance_mut::<libc::c_void>(memory.0);
        assert_eq!(libc::madvise(at, len, libc::MADV_DONTNEED), 0);
    }
    let old = Ward::filled(|| memory);
    old.goes_to(from, len);
    let pid = old.child.pid;
    let handle = begin(old.to(to));
    // It ends and is waited for: its number is free.
    drop(old);
    let board = Board::new();
    let Some(new) = Child::with_pid(pid, || {
        fill(memory);
        board.counts[0].store(wrong(memory), Ordering::Relaxed);
        memory
    }) else {
        drop(handle.wait());
        return eprintln!("skipped: no pid can be chosen here");
    };
    assert_eq!(new.pid, pid);
    let pages: Vec<_> = new.range().step_by(page_size()).collect();
    let before = nodes(pid, &pages);
    let report = handle.wait().expect("no panic");
    broke_off(&report);
    assert_eq!(adds_up(&report), len as u64, "{report:?}");
    let accounted = bytes(&report, Outcome::Moved) + bytes(&report, Outcome::Exited);
    assert_eq!(accounted, len as u64, "{report:?}");
    assert!(report.notes.list.contains(&Note::Exited { pid }), "{report:?}");
    assert!(!report.notes.list.contains(&Note::Executed { pid }), "{report:?}");
    assert_eq!(nodes(pid, &pages), before, "the new process's pages are where they were");
    assert_eq!(board.counts[0].load(Ordering::Relaxed), 0);
    // Named now, it is moved like any other.
    let filter = Filter::new().range(new.range());
    let selection = Selection::new().pid(pid).filter(filter);
    for node in [from, to] {
        let movement = ProcessMove::new(selection.clone(), Destination::node(node));
        let report = movement.run().expect("our child");
        assert_eq!(adds_up(&report), len as u64, "{report:?}");
        assert!(nodes(pid, &pages).iter().all(|&n| n == number(node)), "{report:?}");
    }
    drop(new);
    child::unmap(memory);
}

#[test]
fn pages_that_somebody_else_moves_at_the_same_time_are_not_called_gone() {
    let Some((from, to)) = two_nodes() else { return };
    let ward = Ward::filled(|| child::anonymous(16 * MIB, false));
    ward.goes_to(from, 16 * MIB);
    for _ in 0..3 {
        // Migration entries of the one are what the other finds.
        let moves = [ward.to(to), ward.to(from)];
        let handles = moves.map(|one| one.start().expect("our own child"));
        for handle in handles {
            let report = handle.wait().expect("no panic");
            assert_eq!(bytes(&report, Outcome::Gone), 0, "{report:?}");
            assert!(adds_up(&report) <= 16 * MIB as u64, "{report:?}");
        }
    }
    ward.is_intact();
    ward.goes_to(to, 16 * MIB);
    ward.is_on(to);
}
