//! Children that take orders, control groups, settings of the machine, and what the kernel tells
//! of pages: for the tests of the kernel path against processes of every kind.
//!
//! What always holds: settings of the machine and control groups are touched in guests only, and
//! put back; what a child does is system calls and plain memory accesses (see `child`).

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use crate::child::{Child, Memory, RW, map};
use pageferry::process::{Destination, Filter, ProcessMove, ProcessReport, Selection};
use pageferry::topology::{Machine, NodeId};
use pageferry::{HUGE, Outcome};
use pageferry_sys::page_size;
use pageferry_sys::pagemap::Entry;
use pageferry_sys::process::{LinuxProcesses, ProcessKernel, UNTOLD};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::ptr::{null, with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Longer than anything that a test waits for takes, emulated or not.
const PATIENCE: Duration = Duration::from_secs(60);

/// The first and the last node with memory; says why a machine with one node skips the test.
pub fn two_nodes() -> Option<(NodeId, NodeId)> {
    let machine = Machine::read().expect("this machine");
    let nodes: Vec<_> = machine.memory_nodes().map(|n| n.id).collect();
    let [first, .., last] = nodes[..] else {
        eprintln!("skipped: this machine has one node (`cargo xtask guest test` boots others)");
        return None;
    };
    Some((first, last))
}

/// Whether this is a guest, in which a test is alone.
pub fn is_guest() -> bool {
    std::env::var_os("PAGEFERRY_GUEST").is_some()
}

/// Whether this is a guest, whose settings a test may change; says so where it is none.
pub fn in_guest() -> bool {
    let guest = is_guest();
    if !guest {
        eprintln!("skipped: this changes the machine, so it runs in guests only");
    }
    guest
}

/// Waits for something that another process does.
pub fn until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What a word is to hold.
fn word(at: usize, round: u64) -> u64 {
    (at as u64 ^ round.wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_mul(0xD6E8_FEB8_6659_FD93)
}

/// Writes every word.
pub fn fill(memory: Memory) -> Memory {
    for at in (memory.0..memory.0 + memory.1).step_by(8) {
        // SAFETY: the caller's mapping, writable.
        unsafe { with_exposed_provenance_mut::<u64>(at).write_volatile(word(at, 0)) };
    }
    memory
}

/// How many words are not what `fill` wrote.
pub fn wrong(memory: Memory) -> u64 {
    // SAFETY: the caller's mapping, readable.
    let read = |at: usize| unsafe { with_exposed_provenance::<u64>(at).read_volatile() };
    let words = (memory.0..memory.0 + memory.1).step_by(8);
    words.filter(|&at| read(at) != word(at, 0)).count() as u64
}

/// Private memory of the hugetlb pool, not touched yet.
pub fn hugetlb(len: usize) -> Memory {
    (map(len, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB, -1), len)
}

/// Memory that a child shares with the test: orders, answers, and what it is up to.
#[derive(Debug)]
#[repr(C)]
pub struct Board {
    asked: AtomicU32,
    answered: AtomicU32,
    order: AtomicU32,
    answer: AtomicU64,
    /// What the threads of a child count.
    pub counts: [AtomicU64; 8],
    /// Its memory, if there are several parts of it: address and length.
    pub parts: [[AtomicUsize; 2]; 16],
}

impl Board {
    /// A board that children forked from now on share.
    pub fn new() -> &'static Self {
        let at = map(page_size(), RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
        const { assert!(size_of::<Self>() <= 4096) };
        // SAFETY: fresh zeroed memory, which is never unmapped; all fields are atomics.
        unsafe { &*with_exposed_provenance(at) }
    }

    /// The parts of its memory that are there.
    pub fn parts(&self) -> impl Iterator<Item = Range<usize>> {
        let parts = self.parts.iter().map(|p| p.each_ref().map(|n| n.load(Ordering::Acquire)));
        parts.filter(|[_, len]| *len > 0).map(|[start, len]| start..start + len)
    }
}

/// The order that every [`Ward`] obeys in some way: count the words that are wrong.
pub const CHECK: u32 = 0;

/// A child that does what it is told, and sleeps meanwhile.
#[derive(Debug)]
pub struct Ward {
    pub child: Child,
    pub board: &'static Board,
}

impl Ward {
    /// A child that has called `setup`, and calls `act` with its memory for each order.
    pub fn new(
        setup: impl FnOnce(&Board) -> Memory,
        act: impl Fn(&Board, Memory, u32) -> u64,
    ) -> Self {
        let board = Board::new();
        let child = Child::with_work(
            || setup(board),
            |memory| {
                let asked = board.asked.load(Ordering::Acquire);
                if asked == board.answered.load(Ordering::Relaxed) {
                    nap(200);
                    return;
                }
                let answer = act(board, memory, board.order.load(Ordering::Relaxed));
                board.answer.store(answer, Ordering::Relaxed);
                board.answered.store(asked, Ordering::Release);
            },
        );
        Self { child, board }
    }

    /// A child whose memory `fill` has filled.
    pub fn filled(setup: impl FnOnce() -> Memory) -> Self {
        Self::new(|_| fill(setup()), |_, memory, _| wrong(memory))
    }

    /// Gives an order, and does not wait.
    pub fn tell(&self, order: u32) {
        self.board.order.store(order, Ordering::Relaxed);
        self.board.asked.fetch_add(1, Ordering::Release);
    }

    /// Gives an order, and waits for the answer.
    pub fn ask(&self, order: u32) -> u64 {
        self.tell(order);
        let asked = self.board.asked.load(Ordering::Relaxed);
        until("a child answers", || self.board.answered.load(Ordering::Acquire) == asked);
        self.board.answer.load(Ordering::Relaxed)
    }

    /// The child finds every word as it has written it.
    pub fn is_intact(&self) {
        assert_eq!(self.ask(CHECK), 0, "words that are wrong");
    }

    /// A move of its memory.
    pub fn to(&self, node: NodeId) -> ProcessMove {
        let filter = Filter::new().range(self.child.range());
        let selection = Selection::new().pid(self.child.pid).filter(filter);
        ProcessMove::new(selection, Destination::node(node))
    }

    /// Moves its memory, of which so much is there, and asserts that all of it arrives.
    pub fn goes_to(&self, node: NodeId, present: usize) -> ProcessReport {
        let report = self.to(node).run().expect("our own child");
        assert_eq!(adds_up(&report), present as u64, "{report:?}");
        assert!(report.is_complete(), "{report:?}");
        report
    }

    /// The nodes of its pages of this size.
    pub fn nodes(&self, page_bytes: usize) -> Vec<i32> {
        nodes(self.child.pid, &self.child.range().step_by(page_bytes).collect::<Vec<_>>())
    }

    /// Every page of its memory is on this node.
    pub fn is_on(&self, node: NodeId) {
        let told = self.nodes(page_size());
        let elsewhere = told.iter().filter(|&&n| n != number(node)).count();
        assert_eq!(elsewhere, 0, "pages of {} that are not on node {node}", told.len());
    }

    /// Entries of its pagemap.
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = vec![Entry(0); self.child.range().len() / page_size()];
        let view = LinuxProcesses::default().open(self.child.pid).expect("our child");
        view.entries(self.child.range().start, &mut entries).expect("our child's pagemap");
        entries
    }
}

/// Sleeps for some microseconds.
pub fn nap(micros: i64) {
    let time = libc::timespec { tv_sec: 0, tv_nsec: micros * 1000 };
    // SAFETY: the kernel reads one timespec.
    unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) };
}

/// A node as `move_pages(2)` gives it.
pub fn number(node: NodeId) -> i32 {
    i32::try_from(node.get()).expect("a small number")
}

/// The nodes of pages, or negative errnos, as the kernel itself tells.
pub fn nodes(pid: u32, pages: &[usize]) -> Vec<i32> {
    let mut status = vec![UNTOLD; pages.len()];
    // SAFETY: a query: the kernel reads the addresses and writes as many statuses.
    let done = unsafe {
        let (count, none) = (pages.len(), null::<i32>());
        let status = status.as_mut_ptr();
        libc::syscall(libc::SYS_move_pages, pid, count, pages.as_ptr(), none, status, 0)
    };
    assert_eq!(done, 0, "move_pages: {}", std::io::Error::last_os_error());
    status
}

/// What the report looked at; each of its sums says the same.
pub fn adds_up(report: &ProcessReport) -> u64 {
    let sum: u64 = report.by_outcome().iter().map(|(_, bytes)| bytes).sum();
    assert_eq!(sum, report.bytes_looked_at(), "{report:?}");
    assert!(report.lines.iter().all(|l| l.pages * l.page_bytes == l.bytes), "{report:?}");
    sum
}

/// Bytes with an outcome.
pub fn bytes(report: &ProcessReport, outcome: Outcome) -> u64 {
    report.bytes(|o| o == outcome)
}

/// A file of the kernel's with another value while this lives.
#[derive(Debug)]
pub struct Setting {
    path: PathBuf,
    before: String,
}

impl Setting {
    /// `None`, and why is said: this is no guest, or there is no such file.
    pub fn new(path: impl Into<PathBuf>, value: &str) -> Option<Self> {
        if !in_guest() {
            return None;
        }
        let path = path.into();
        let Ok(text) = std::fs::read_to_string(&path) else {
            eprintln!("skipped: {} is missing", path.display());
            return None;
        };
        // Of several words the one in brackets.
        let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
        let before = chosen.map_or(text.trim(), |(word, _)| word).to_owned();
        let setting = Self { path, before };
        match std::fs::write(&setting.path, value) {
            Ok(()) => Some(setting),
            Err(e) => {
                eprintln!("skipped: {}: {e}", setting.path.display());
                None
            }
        }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.path, &self.before);
    }
}

/// A file about the hugetlb pages of 2 MiB on a node.
pub fn pool(node: NodeId, file: &str) -> PathBuf {
    let kib = HUGE >> 10;
    format!("/sys/devices/system/node/node{node}/hugepages/hugepages-{kib}kB/{file}").into()
}

/// A number that is all that a file holds.
pub fn read_number(path: impl AsRef<Path>) -> u64 {
    std::fs::read_to_string(path).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
}

/// A control group (version 2) of a guest; what is in it is killed when it is dropped.
#[derive(Debug)]
pub struct Group {
    pub path: PathBuf,
}

impl Group {
    /// `None`, and why is said: this is no guest, or has no cgroup v2.
    pub fn new(name: &str) -> Option<Self> {
        if !in_guest() {
            return None;
        }
        let path = Path::new("/sys/fs/cgroup").join(format!("{name}-{}", std::process::id()));
        match std::fs::create_dir(&path) {
            Ok(()) => Some(Self { path }),
            Err(e) => {
                eprintln!("skipped: no cgroup: {e}");
                None
            }
        }
    }

    /// A group below this one, dropped before it.
    pub fn below(&self, name: &str) -> Self {
        let path = self.path.join(name);
        std::fs::create_dir(&path).expect("a group below one of ours");
        Self { path }
    }

    /// Puts a process into it.
    pub fn join(&self, pid: u32) {
        std::fs::write(self.path.join("cgroup.procs"), pid.to_string()).expect("our child");
    }

    /// Puts a process back into the group above all.
    pub fn leave(pid: u32) {
        std::fs::write("/sys/fs/cgroup/cgroup.procs", pid.to_string()).expect("our process");
    }

    /// Writes to one of its files.
    pub fn set(&self, file: &str, value: &str) {
        std::fs::write(self.path.join(file), value).expect("a controller's file");
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::write(self.path.join("cgroup.kill"), "1");
        // The kernel takes a moment to let go of processes that have ended.
        for _ in 0..1000 {
            match std::fs::remove_dir(&self.path) {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => nap(2000),
                _ => return,
            }
        }
    }
}
