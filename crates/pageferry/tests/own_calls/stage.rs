//! A mapping of which a part moves, and one call that the program makes on it meanwhile.
//!
//! A move is *held*: its copy engine takes the batch and waits. In frozen order the pages are in the
//! air then, in live order they are protected, for as long as the test likes. So whether a call
//! waits for them is seen, not timed: it has returned before they are let go, or it has not.

use crate::support::siege::{StopOnDrop, account, errno, far_address, map_at, ptr};
use crate::support::{first_node, value};
use pageferry::{Engine, Frames, HUGE, MigrateError, Order, References, Region};
use pageferry_copy::model::{Behaviour, ModelEngine};
use pageferry_copy::{Capabilities, CopyBatch, CopyEngine, SubmitError};
use pageferry_sys::mm::PreferringNode;
use pageferry_sys::page_size;
use pageferry_sys::pagemap::{Entry, Pagemap};
use pageferry_topology::Machine;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Pages that a call is made on.
pub(crate) const TARGET: usize = 8;
/// Content repeats after so many pages.
const PATTERN: usize = 16;

/// How much of the mapping is managed and moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// All of it.
    Whole,
    /// All of it is managed; the last pages of its first 2 MiB block move.
    Part,
    /// All of it is managed; its last pages move.
    Tail,
    /// Its first block is managed; the last pages of that move.
    Clipped,
}

/// Where the call's pages lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// All of them move.
    Inside,
    /// The first half moves; the block ends there, too.
    Border,
    /// They move, and are the mapping's last.
    End,
}

/// What a call is made on.
pub(crate) struct Spot {
    pub(crate) at: usize,
    pub(crate) len: usize,
    /// Pages of it that move.
    pub(crate) moving: i64,
    pub(crate) mapping: Range<usize>,
    /// Free address space of the test's own, twice `len`.
    pub(crate) away: usize,
}

/// A mapping full of words.
pub(crate) struct Stage {
    mapping: Range<usize>,
    managed: Range<usize>,
    moved: Range<usize>,
}

fn words(addr: usize) -> impl Iterator<Item = (&'static AtomicU64, u64)> {
    let page = addr / page_size() % PATTERN;
    (0..page_size() / 8).map(move |i| {
        // SAFETY: a word of a mapping of the test, which lives as long as the stage does; only
        // atomics are used on it.
        let word = unsafe { AtomicU64::from_ptr(ptr(addr + i * 8).cast()) };
        (word, value(page * page_size() / 8 + i, 0))
    })
}

/// Whether the page at `addr` holds what the stage was filled with. Allocates nothing.
pub(crate) fn is_intact(addr: usize) -> bool {
    words(addr).all(|(word, value)| word.load(Ordering::Relaxed) == value)
}

/// The content of a page without touching it here, as a number; a negative errno where the kernel
/// cannot read it.
pub(crate) fn look(addr: usize) -> i64 {
    let mut bytes = vec![0u8; page_size()];
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: ptr(addr), iov_len: bytes.len() };
    // SAFETY: the kernel writes one page to `bytes`, or less.
    let got = unsafe {
        libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0)
    };
    if got < 0 { -i64::from(errno()) } else { digest(&bytes) }
}

/// A number, not negative, that stands for these bytes.
pub(crate) fn digest(bytes: &[u8]) -> i64 {
    let mixed = bytes.iter().fold(0xCBF2_9CE4_8422_2325u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    (mixed >> 40).cast_signed()
}

/// The node of [`first_node`].
fn home_node() -> u32 {
    static NODE: OnceLock<u32> = OnceLock::new();
    *NODE.get_or_init(|| {
        let machine = Machine::read().expect("a machine that engines are built on");
        machine.memory_nodes().next().expect("a machine has memory").id.get()
    })
}

impl Stage {
    pub(crate) fn new(layout: Layout) -> Self {
        let (start, page) = (far_address(), page_size());
        let len = if layout == Layout::Whole { 64 * page } else { 2 * HUGE };
        let mapping = start..start + len;
        map_at(start, len);
        // SAFETY: mapped above; this advice drops nothing. Unknown where there are no huge pages.
        unsafe { libc::madvise(ptr(start), len, libc::MADV_NOHUGEPAGE) };
        {
            // On the node that all moves go to: what tells of nodes answers as ever then. Refused
            // where there are none to choose from.
            let _there = PreferringNode::new(home_node());
            for addr in mapping.clone().step_by(page) {
                words(addr).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
            }
        }
        let block = start..start + HUGE;
        let (managed, end) = match layout {
            Layout::Whole | Layout::Tail => (mapping.clone(), mapping.end),
            Layout::Part => (mapping.clone(), block.end),
            Layout::Clipped => (block.clone(), block.end),
        };
        Self { mapping, managed, moved: end - 64 * page..end }
    }

    pub(crate) fn spot(&self, at: At) -> Spot {
        let (page, end) = (page_size(), self.moved.end);
        let start = match at {
            At::Inside => end - 40 * page,
            At::Border => end - TARGET / 2 * page,
            At::End => end - TARGET * page,
        };
        self.spot_at(start, 0)
    }

    fn spot_at(&self, at: usize, turn: usize) -> Spot {
        let away = self.mapping.start + (1 << 29) + turn * HUGE;
        let len = TARGET * page_size();
        let moving = (self.moved.end.min(at + len) - at) / page_size();
        let moving = i64::try_from(moving).expect("small");
        Spot { at, len, moving, mapping: self.mapping.clone(), away }
    }

    fn adopt(&self, engine: &Engine) -> Region {
        let Range { start, end } = self.managed;
        // SAFETY: mapped by `new`, private and anonymous; parts that a call takes away are expected
        // to be gone.
        let region = unsafe { engine.adopt(ptr(start).cast(), end - start, References::Possible) };
        region.expect("aligned")
    }

    /// What became of the call's pages: those at the spot (unless `blind`), the next ones beyond the
    /// mapping, and those away.
    pub(crate) fn pages(&self, spot: &Spot, blind: bool) -> Vec<i64> {
        let step = page_size();
        let here = (spot.at..spot.at + spot.len).step_by(step).filter(|_| !blind);
        let beyond = (self.mapping.end..self.mapping.end + spot.len).step_by(step);
        let away = (spot.away..spot.away + 2 * spot.len).step_by(step);
        here.chain(beyond).chain(away).map(look).collect()
    }

    /// Pages that move, beside the call's, and that do not hold what they held.
    pub(crate) fn damaged(&self, spot: &Spot) -> usize {
        let pages = self.moved.clone().step_by(page_size());
        let others = pages.filter(|page| !(spot.at..spot.at + spot.len).contains(page));
        others.filter(|&page| look(page) >= 0 && !is_intact(page)).count()
    }

    /// The mappings here and away, from the mapping's start, and what `/proc/self/smaps` says of them.
    pub(crate) fn mappings(&self) -> Vec<(usize, usize, String)> {
        let all = self.mapping.start..self.mapping.start + (1 << 30);
        let mut found: Vec<(usize, usize, String)> = Vec::new();
        let mut ours = false;
        for line in std::fs::read_to_string("/proc/self/smaps").expect("procfs").lines() {
            let number = |text| usize::from_str_radix(text, 16).ok();
            let first = line.split(' ').next().unwrap_or("");
            if let Some((Some(start), Some(end))) =
                first.split_once('-').map(|(start, end)| (number(start), number(end)))
            {
                ours = all.contains(&start);
                if ours {
                    let flags = line.split(' ').nth(1).unwrap_or("").to_owned();
                    found.push((start - all.start, end - all.start, flags));
                }
            } else if let (true, Some(flags), Some(last)) =
                (ours, line.strip_prefix("VmFlags:"), found.last_mut())
            {
                // "gu": guard markers are there, or were once.
                last.2.push_str(flags.replace(" gu", "").trim_end());
            }
        }
        found
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // SAFETY: the stage's own address space, which nobody uses any more. What is sealed stays.
        unsafe { libc::munmap(ptr(self.mapping.start), 1 << 30) };
    }
}

/// A door that is opened once.
#[derive(Default)]
struct Door(Mutex<bool>, Condvar);

impl Door {
    fn open(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.1.notify_all();
    }
    /// Whether it opens within a moment.
    fn opens(&self) -> bool {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let moment = Duration::from_millis(20);
        let waited = self.1.wait_timeout_while(open, moment, |open| !*open);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
    fn pass(&self) {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = self.1.wait_while(open, |open| !*open);
        drop(passed.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Opens its door when it goes, also by a panic.
struct OpenOnDrop(Arc<Door>);

impl Drop for OpenOnDrop {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// Copies faithfully, but does not take the batch with the call's pages before its door opens.
struct Held {
    /// Whether those are in the air, or protected: a move may begin with a smaller batch.
    has_them: Box<dyn Fn() -> bool + Send + Sync>,
    begun: Arc<Door>,
    door: Arc<Door>,
    model: Mutex<Option<ModelEngine>>,
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Held")
    }
}

impl CopyEngine for Held {
    fn name(&self) -> &str {
        "held"
    }
    fn capabilities(&self) -> Capabilities {
        ModelEngine::polled(Behaviour::Faithful).capabilities()
    }
    unsafe fn submit(&self, batch: &Arc<CopyBatch>) -> Result<(), SubmitError> {
        if (self.has_them)() {
            self.begun.open();
            self.door.pass();
        }
        let mut model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        let model = model.get_or_insert_with(|| ModelEngine::polled(Behaviour::Faithful));
        // SAFETY: the same promise.
        unsafe { model.submit(batch) }
    }
    fn poll(&self) {
        let model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        model.iter().for_each(CopyEngine::poll);
    }
    fn cancel(&self, batch: &CopyBatch) {
        let model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        model.iter().for_each(|model| model.cancel(batch));
    }
}

/// Makes `call` on a thread of its own while the spot's pages are in the air (`Order::Frozen`) or
/// protected (`Order::Live`). They are let go when it has returned, or after `patience`: the second
/// value tells which. `None`: they were not there at the same time, and no call was made.
pub(crate) fn while_held(
    engine: &Engine,
    (stage, spot): (&Stage, &Spot),
    order: Order,
    patience: Duration,
    call: impl FnOnce() -> Vec<i64> + Send,
) -> Option<(Vec<i64>, bool)> {
    let region = stage.adopt(engine);
    let moving = usize::try_from(spot.moving).expect("not negative");
    let theirs = spot.at..spot.at + moving * page_size();
    let is_held = if order == Order::Frozen { is_missing } else { is_protected };
    let held = Arc::new(Held {
        has_them: Box::new(move || theirs.clone().step_by(page_size()).all(is_held)),
        begun: Arc::default(),
        door: Arc::default(),
        model: Mutex::default(),
    });
    let offset = stage.moved.start - region.addr()..stage.moved.end - region.addr();
    let moving = engine
        .migrate(region.to(first_node(engine)).range(offset))
        .even_if_there()
        .order(order)
        // All of them in one batch, if there are frames side by side.
        .stall_budget(Duration::from_secs(10))
        // So that the kernel does not copy where no frame is at rest.
        .frames(Frames::Fresh)
        .engine(Arc::clone(&held) as Arc<dyn CopyEngine>)
        .start()
        .expect("a move");
    let answer = std::thread::scope(|scope| {
        let open = OpenOnDrop(Arc::clone(&held.door));
        while !held.begun.opens() {
            if moving.is_finished() {
                return None;
            }
        }
        let (told, tells) = channel();
        let thread = scope.spawn(move || {
            let said = call();
            let _ = told.send(());
            said
        });
        // Not received: still busy, or it has panicked, which `join` tells.
        let returned = tells.recv_timeout(patience).is_ok();
        drop(open);
        Some((thread.join().expect("a call"), returned))
    });
    moving.wait().expect("a move");
    answer
}

/// A stage as [`while_moving`] makes one, and a place of its.
pub(crate) fn at_rest() -> (Stage, Spot) {
    let stage = Stage::new(Layout::Part);
    let spot = stage.spot_at(stage.moved.end - (TARGET / 2 + PATTERN) * page_size(), 1);
    (stage, spot)
}

/// Makes `call` at one place after the other of a region that moves back to back, half of the times
/// in a moment when a page of the place is in the air. The last place lies across the end of what
/// moves, if `border` says so.
pub(crate) fn while_moving(
    engine: &Engine,
    layout: Layout,
    order: Order,
    border: bool,
    mut call: impl FnMut(&Stage, &Spot),
) {
    let mut stage = Stage::new(Layout::Part);
    if layout == Layout::Whole {
        stage.moved = stage.mapping.clone();
    } else {
        stage.moved.start = stage.moved.end - HUGE / 2;
    }
    let region = stage.adopt(engine);
    let offset = stage.moved.start - region.addr()..stage.moved.end - region.addr();
    let border = border && layout != Layout::Whole;
    let (stop, moves) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let part = region.to(first_node(engine)).range(offset.clone());
                let report = engine.migrate(part).even_if_there().order(order).run();
                let report = match report {
                    // A call has put shared memory there for a moment.
                    Err(MigrateError::Register { .. }) => continue,
                    report => report.expect("a move"),
                };
                if layout == Layout::Whole {
                    account(&region, &report);
                }
                moves.fetch_add(1, Ordering::Relaxed);
            }
        });
        let _stop = StopOnDrop(&stop);
        let end = stage.moved.end;
        for turn in 1..=PATTERN {
            if turn == PATTERN && !border {
                break;
            }

            let back = if turn == PATTERN { TARGET / 2 } else { TARGET / 2 + turn * PATTERN };
            let spot = stage.spot_at(end - back * page_size(), turn);
            let before = moves.load(Ordering::Relaxed);
            while turn % 2 == 0
                && !is_missing(spot.at)
                && moves.load(Ordering::Relaxed) < before + 3
                && !mover.is_finished()
            {
                std::hint::spin_loop();
            }
            call(&stage, &spot);
        }
        stop.store(true, Ordering::Relaxed);
        mover.join().expect("the moves went well");
    });
    assert!(moves.into_inner() > 0, "nothing moved");
}

fn is_missing(addr: usize) -> bool {
    let mut resident = 1u8;
    // SAFETY: the kernel writes one byte.
    unsafe { libc::mincore(ptr(addr), page_size(), &raw mut resident) == 0 && resident & 1 == 0 }
}

/// Whether a userfaultfd keeps writers from it (bit 57:
/// Documentation/admin-guide/mm/pagemap.rst).
fn is_protected(addr: usize) -> bool {
    let mut entry = [Entry(0)];
    let pagemap = Pagemap::open().expect("procfs");
    pagemap.entries(addr, &mut entry).expect("mapped");
    entry[0].0 >> 57 & 1 == 1
}
