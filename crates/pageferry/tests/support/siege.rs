//! A region under siege: it moves continuously while a test does to its mapping what programs do.
//!
//! The memory is mapped far from where the kernel places mappings by itself, so that what a test
//! unmaps is not taken by somebody else's allocation.

use super::{Racers, next, nodes, value, word};
use pageferry::{Engine, HUGE, Order, Outcome, References, Region, Report};
use pageferry_sys::page_size;
use std::collections::BTreeMap;
use std::ops::Range;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Ends the process with a message if it lives for a minute (in a guest, four).
pub struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    pub fn new(what: &str) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let (theirs, what) = (Arc::clone(&done), what.to_owned());
        std::thread::spawn(move || {
            let until = Instant::now() + Duration::from_secs(super::patient(60));
            while !theirs.load(Ordering::Relaxed) {
                if Instant::now() > until {
                    eprintln!("watchdog: {what} hangs");
                    std::process::abort();
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self(done)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Held by tests that fork, and by those that mind: a child shares the memory of every test that
/// runs in the process.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Raises a flag when it goes, also by a panic: so threads of a scope end when a test fails.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Fresh address space of the test's own: 1 GiB apart, away from the kernel's mmap area.
pub fn far_address() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0x1000_0000_0000);
    NEXT.fetch_add(1 << 30, Ordering::Relaxed)
}

/// What the last call failed with.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

pub fn ptr(addr: usize) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(addr)
}

/// Maps private anonymous memory at exactly `addr`, over what is there.
pub fn map_at(addr: usize, len: usize) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: tests map only at addresses of their own (`far_address`).
    let got = unsafe { libc::mmap(ptr(addr), len, rw, flags, -1, 0) };
    assert_eq!(got.expose_provenance(), addr, "mmap: errno {}", errno());
}

/// `madvise` on memory of the test's own; true if it was taken.
pub fn advise(range: Range<usize>, advice: i32) -> bool {
    // SAFETY: the range is the test's own, and the test knows what becomes of its content.
    unsafe { libc::madvise(ptr(range.start), range.len(), advice) == 0 }
}

pub fn protect(range: Range<usize>, prot: i32) {
    // SAFETY: the range is the test's own.
    let done = unsafe { libc::mprotect(ptr(range.start), range.len(), prot) };
    assert_eq!(done, 0, "mprotect: errno {}", errno());
}

/// Whether the kernel can read the byte at `addr` for this process, without touching it here.
pub fn readable(addr: usize) -> bool {
    let mut byte = 0u8;
    let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: ptr(addr), iov_len: 1 };
    // SAFETY: the kernel writes one byte to `byte`, or nothing.
    unsafe {
        libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) == 1
    }
}

/// Every page of the region is in the report exactly once.
pub fn account(region: &Region, report: &Report) {
    let mut at = region.addr();
    for (range, outcome) in &report.pages {
        assert_eq!(range.start, at, "a gap or an overlap before {range:x?} {outcome}");
        at = range.end;
    }
    assert_eq!(at, region.addr() + region.len(), "the report ends early");
}

/// What a [`Mover`] did.
#[derive(Debug, Default)]
pub struct Moved {
    pub moves: u64,
    pub repairs: u64,
    pub fallbacks: u64,
    pub outcomes: BTreeMap<Outcome, u64>,
}

impl Moved {
    pub fn bytes(&self, outcome: Outcome) -> u64 {
        self.outcomes.get(&outcome).copied().unwrap_or(0)
    }
}

/// Moves a region from node to node (or frame to frame) until told to stop.
pub struct Mover {
    stop: Arc<AtomicBool>,
    moves: Arc<AtomicU64>,
    /// Bytes that have moved.
    bytes: Arc<AtomicU64>,
    thread: Option<JoinHandle<Moved>>,
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Mover {
    pub fn start(engine: &Engine, region: &Arc<Region>, order: Order) -> Self {
        let (stop, moves) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let bytes = Arc::new(AtomicU64::new(0));
        let (their_stop, their_moves) = (Arc::clone(&stop), Arc::clone(&moves));
        let their_bytes = Arc::clone(&bytes);
        let (engine, region) = (engine.clone(), Arc::clone(region));
        let thread = std::thread::spawn(move || {
            let (home, away) = nodes(&engine);
            let mut moved = Moved::default();
            while !their_stop.load(Ordering::Relaxed) {
                for to in [away, home] {
                    let report = engine
                        .migrate(region.to(to))
                        .even_if_there()
                        .order(order)
                        .run()
                        .expect("a move over memory that can be registered");
                    account(&region, &report);
                    moved.moves += 1;
                    moved.repairs += report.repairs;
                    moved.fallbacks += report.fallbacks;
                    for (outcome, bytes) in report.by_outcome() {
                        *moved.outcomes.entry(outcome).or_default() += bytes;
                    }
                    their_bytes.fetch_add(report.bytes(|o| o == Outcome::Moved), Ordering::Relaxed);
                    their_moves.fetch_add(1, Ordering::Relaxed);
                }
            }
            moved
        });
        Self { stop, moves, bytes, thread: Some(thread) }
    }

    /// Whether any page has moved.
    fn has_moved(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) > 0
    }

    /// Waits until so many more moves have ended.
    pub fn wait(&self, more: u64) {
        let until = self.moves.load(Ordering::Relaxed) + more;
        let ended = || self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        while self.moves.load(Ordering::Relaxed) < until && !ended() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn finish(mut self) -> Moved {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("taken here only");
        thread.join().expect("the moves went well")
    }
}

/// What the pages of the victim hold: all words of one round, or zeros.
pub struct Model {
    pub region: Arc<Region>,
    /// Bytes from the region's start.
    pub victim: Range<usize>,
    rounds: Vec<Option<u64>>,
    seed: u64,
}

impl Model {
    /// Of these bytes of a region, which hold round 0 ([`super::fill`]).
    pub fn new(region: Arc<Region>, victim: Range<usize>) -> Self {
        let rounds = vec![Some(0); victim.len() / page_size()];
        Self { region, victim, rounds, seed: 0x2545_F491_4F6C_DD1D }
    }
    pub fn words(&self, page: usize) -> Range<usize> {
        let first = (self.victim.start + page * page_size()) / 8;
        first..first + page_size() / 8
    }
    pub fn pages(&self) -> usize {
        self.rounds.len()
    }
    /// The address of a page of the victim.
    pub fn addr(&self, page: usize) -> usize {
        self.region.addr() + self.victim.start + page * page_size()
    }
    pub fn range(&self, pages: &Range<usize>) -> Range<usize> {
        self.addr(pages.start)..self.addr(pages.end)
    }
    pub fn random(&mut self, below: usize) -> usize {
        usize::try_from(next(&mut self.seed) % below as u64).expect("below a usize")
    }
    /// A run of 1 to `most` pages of the victim.
    pub fn some_pages(&mut self, most: usize) -> Range<usize> {
        let first = self.random(self.pages());
        let count = 1 + self.random(most);
        first..(first + count).min(self.pages())
    }
    /// The program writes every word of the pages anew.
    pub fn write(&mut self, pages: Range<usize>) {
        for page in pages {
            let round = self.rounds[page].map_or(1, |r| r + 1);
            for i in self.words(page) {
                word(&self.region, i).store(value(i, round), Ordering::Relaxed);
            }
            self.rounds[page] = Some(round);
        }
    }
    /// The program gave the pages up: they read as zeros from now on.
    pub fn zeroed(&mut self, pages: Range<usize>) {
        self.rounds[pages].fill(None);
    }
    pub fn expect(&self, page: usize, i: usize) -> u64 {
        self.rounds[page].map_or(0, |round| value(i, round))
    }
    pub fn check(&self, pages: Range<usize>, when: &str) {
        for page in pages {
            for i in self.words(page) {
                let found = word(&self.region, i).load(Ordering::Relaxed);
                assert_eq!(
                    found,
                    self.expect(page, i),
                    "{when}: word {i} of page {page} at {:#x}, round {:?}",
                    self.addr(page),
                    self.rounds[page]
                );
            }
        }
    }
}

/// Tells what was going on when a test fails.
struct Told<'a>(&'a str);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("this was {}", self.0);
        }
    }
}

/// 16 MiB (in a guest 8) adopted, moving all the time, racers on all but the victim in the middle,
/// which `act` may do anything to, again and again for half a second.
pub fn siege(
    engine: &Engine,
    huge: bool,
    order: Order,
    mut act: impl FnMut(&mut Model, &Mover),
) -> Moved {
    let what = format!("{order:?}, huge: {huge}");
    let _watchdog = Watchdog::new(&what);
    let _told = Told(&what);
    let (before, len) =
        if super::is_guest() { (HUGE / 2, 4 * HUGE) } else { (5 * HUGE / 2, 8 * HUGE) };
    let start = far_address();
    map_at(start, len);
    advise(start..start + len, if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE });
    // SAFETY: mapped above, private and anonymous; parts that the test replaces it expects gone.
    let region = unsafe { engine.adopt(ptr(start).cast(), len, References::Possible) };
    let region = Arc::new(region.expect("aligned"));
    super::fill(&region, 0..len);
    // Two whole huge pages, and neither end at the boundary of one.
    let victim = before..before + 2 * HUGE + 3 * HUGE / 4;
    let around = [0..victim.start, victim.end..len];
    let racers = Racers::start_on(&region, &around, 1, 1);
    let mover = Mover::start(engine, &region, order);
    let mut model = Model::new(Arc::clone(&region), victim);
    let began = Instant::now();
    let enough = Duration::from_millis(500);
    // Disturbed often, on a machine that is slow: the first page that moves may come late.
    let too_long = 20 * enough;
    while began.elapsed() < enough || !mover.has_moved() && began.elapsed() < too_long {
        act(&mut model, &mover);
    }
    let moved = mover.finish();
    racers.finish();
    assert!(moved.bytes(Outcome::Moved) > 0, "{what}: nothing moved: {moved:?}");
    drop(region);
    drop(model.region);
    // SAFETY: nobody uses the memory any more.
    unsafe { libc::munmap(ptr(start), len) };
    moved
}

/// Both folio sizes, both orders.
pub const ALL: [(bool, Order); 4] =
    [(false, Order::Frozen), (false, Order::Live), (true, Order::Frozen), (true, Order::Live)];

const ROLE: &str = "PAGEFERRY_TEST_ROLE";

/// Whether this process was started by [`again`] to play a part of a test.
pub fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// This test binary, to run one test again in a process of its own in another role.
pub fn again(test: &str, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("procfs"));
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(ROLE, role);
    command
}
