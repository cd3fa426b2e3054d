//! The thread that moves what it finds, back to back, in every way there is.

use crate::maps::{all, is_whole, movable, without};
use crate::own::{self, Moving, Recorded};
use crate::tally::Tally;
use pageferry::topology::NodeId;
use pageferry::{Division, Engine, Frames, Order, References, Region};
use std::fs::read_to_string;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

const MAPS: &str = "/proc/self/maps";
/// Bytes of a move at most: a look at the mappings comes soon enough.
const MOST: usize = 64 << 20;
/// Regions at once, and moves until the mappings are read again.
const REGIONS: usize = 4;
const MOVES: usize = 12;
const SPARE: usize = 16 << 20;
const PAUSE: Duration = Duration::from_millis(3);

/// What was there before the engine, in this process or the one that it was forked from.
pub(crate) type Before = OnceLock<Vec<Range<usize>>>;

/// xorshift64*, by Sebastiano Vigna.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    fn next(&mut self) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33).unwrap_or(0)
    }

    fn below(&mut self, n: usize) -> usize {
        self.next() % n.max(1)
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// Moves as long as the process lives.
pub(crate) fn run(tally: &Tally, before: &Before, mut random: Random) {
    own::this_thread_is_ours();
    // The engine's files are in a table of its own: the program may close all it knows of, has its
    // lowest numbers for itself, and sees the end of its pipes.
    // SAFETY: this thread has no files, and others keep theirs.
    unsafe { libc::close_range(0, u32::MAX, libc::CLOSE_RANGE_UNSHARE as i32) };
    let engine = match Engine::builder().frame_budget(SPARE).sys(Arc::new(Recorded)).build() {
        Ok(engine) => engine,
        Err(error) => {
            tally.refuse(&error.to_string());
            return tally.write();
        }
    };
    let Some(node) = engine.machine().memory_nodes().next().map(|node| node.id) else { return };
    let Ok(text) = read_to_string(MAPS) else { return };
    let before = before.get_or_init(|| all(&text));
    let mut written = Instant::now();
    let mut patience = Duration::from_millis(50);
    loop {
        if !round(&engine, node, tally, before, &mut random) {
            std::thread::sleep(PAUSE);
        }
        if written.elapsed() >= patience {
            tally.write();
            (written, patience) = (Instant::now(), Duration::from_secs(1));
        }
    }
}

/// Adopts some of what is there and moves it some times. `false`: there was nothing.
fn round(
    engine: &Engine,
    node: NodeId,
    tally: &Tally,
    before: &[Range<usize>],
    random: &mut Random,
) -> bool {
    let seen = own::threads_seen();
    let Ok(text) = read_to_string(MAPS) else { return false };
    let Some(own) = own::ranges() else { return false };
    let mut found: Vec<_> = text
        .lines()
        .filter_map(movable)
        .flat_map(|range| without(range, before))
        .flat_map(|range| without(range, &own))
        .collect();
    let mut regions: Vec<Region> = Vec::new();
    while regions.len() < REGIONS && !found.is_empty() {
        let range = found.swap_remove(random.below(found.len()));
        let start = std::ptr::with_exposed_provenance_mut(range.start);
        // SAFETY: it was private anonymous memory when the mappings were read, and is the
        // program's; what becomes of it later is up to the program, and reported. It is no stack
        // and nothing that this library, the engine or the C library had before. Engine and
        // library use their own allocator and thread-locals that are not in malloc's memory.
        match unsafe { engine.adopt(start, range.len(), References::Possible) } {
            Ok(region) => regions.push(region),
            Err(error) => tally.refuse(&kind(&error.to_string())),
        }
    }
    if regions.is_empty() {
        return false;
    }
    for _ in 0..MOVES {
        let region = &regions[random.below(regions.len())];
        // The program maps what it likes, also next to what was adopted, where it becomes a part of
        // the same mapping.
        let Ok(text) = read_to_string(MAPS) else { break };
        if !is_whole(&text, &region.addresses()) {
            break;
        }
        let Some(_moving) = Moving::begin(seen) else { break };
        one(engine, region, node, tally, random);
    }
    true
}

fn one(engine: &Engine, region: &Region, node: NodeId, tally: &Tally, random: &mut Random) {
    let mut part = region.to(node);
    if region.len() > MOST || random.below(3) == 0 {
        let pages = region.len() / 4096;
        let first = random.below(pages);
        let count = 1 + random.below((pages - first).min(MOST / 4096));
        part = part.range(first * 4096..(first + count) * 4096);
    }
    let budget = Duration::from_micros(10 << random.below(11));
    let mut wish = engine.migrate(part).even_if_there().stall_budget(budget);
    if let Some(order) = random.of(&[None, Some(Order::Live), Some(Order::Frozen)]) {
        wish = wish.order(order);
    }
    if let Some(division) = random.of(&[None, Some(Division::Shared), Some(Division::Conducted)]) {
        wish = wish.division(division);
    }
    let frames = [Frames::Recycled, Frames::Recycled, Frames::Fresh, Frames::KernelCopy];
    wish = wish.frames(random.of(&frames)).batch_bytes(4096 << random.below(10));
    match wish.run() {
        Ok(report) => tally.count(&report),
        Err(error) => tally.refuse(&kind(&error.to_string())),
    }
}

/// The text without its numbers, so that there are few of them.
fn kind(text: &str) -> String {
    let mut words = text.split(' ').map(|word| if word.contains("0x") { "N" } else { word });
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |all, word| all + " " + word)
}
