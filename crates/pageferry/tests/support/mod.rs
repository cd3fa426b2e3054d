//! What the integration tests share: an engine or the reason why there is none, words in managed
//! memory, and racing readers and writers that verify every word.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

pub mod siege;

use pageferry::{Engine, EngineBuilder, Outcome, Region, RegionBuilder, Report};
use pageferry_sys::pagemap::{Entry, Pagemap};
use pageferry_sys::{Linux, Sys as _, page_size};
use pageferry_topology::NodeId;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// An engine, full rights; prints why the test is skipped where there are none.
pub fn engine() -> Option<Engine> {
    build(Engine::builder())
}

pub fn build(builder: EngineBuilder) -> Option<Engine> {
    match builder.build() {
        Ok(engine) => Some(engine),
        Err(why) => {
            eprintln!("skipped: {why}");
            None
        }
    }
}

/// Tells threads to stop, also where the one that tells them fails.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A region whose old pages are used again: no test that asks for one gives a system call more of it
/// than the call needs while it runs.
pub fn promised(region: RegionBuilder) -> RegionBuilder {
    // SAFETY: promised by the test, as above.
    unsafe { region.no_references() }
}

/// Whether this is a machine of `cargo xtask guest`, perhaps emulated: a tenth as fast, or less.
pub fn is_guest() -> bool {
    std::env::var_os("PAGEFERRY_GUEST").is_some()
}

/// A size that is reached in good time: in a guest a quarter.
pub fn sized(bytes: usize) -> usize {
    if is_guest() { bytes / 4 } else { bytes }
}

/// A sample of many cases: all of them on a real machine, in a guest the first and of the others
/// about a third, in no step with lists that are crossed (multiples of the golden ratio, modulo 1).
pub fn thinned<T>(cases: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
    let most = if is_guest() { u32::MAX / 3 } else { u32::MAX };
    let mut at = 0u32.wrapping_sub(0x9E37_79B9);
    cases.into_iter().filter(move |_| {
        at = at.wrapping_add(0x9E37_79B9);
        at <= most
    })
}

/// The time between two disturbances: in a guest four times as long, or it does nothing else.
pub fn spaced(pause: Duration) -> Duration {
    if is_guest() { 4 * pause } else { pause }
}

/// Seconds after which something hangs: in a guest four times as many.
pub fn patient(seconds: u64) -> u64 {
    if is_guest() { 4 * seconds } else { seconds }
}

pub fn first_node(engine: &Engine) -> NodeId {
    engine.machine().memory_nodes().next().expect("a machine has memory").id
}

/// The destination of a move that changes frames, whatever the machine: the second node where
/// there is one.
pub fn nodes(engine: &Engine) -> (NodeId, NodeId) {
    let mut nodes = engine.machine().memory_nodes().map(|n| n.id);
    let first = nodes.next().expect("a machine has memory");
    (first, nodes.next().unwrap_or(first))
}

/// Word `index` of a region.
pub fn word(region: &Region, index: usize) -> &AtomicU64 {
    assert!((index + 1) * 8 <= region.len());
    // SAFETY: aligned, within the region, which outlives the reference; only atomics are used.
    unsafe { AtomicU64::from_ptr(region.as_ptr().cast::<u64>().add(index)) }
}

/// What word `index` holds after `round` writes.
pub fn value(index: usize, round: u64) -> u64 {
    (index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (round << 48) ^ round
}

pub fn fill(region: &Region, bytes: std::ops::Range<usize>) {
    for i in bytes.start / 8..bytes.end / 8 {
        word(region, i).store(value(i, 0), Ordering::Relaxed);
    }
}

/// Every word of the range holds what `fill` wrote.
pub fn check(region: &Region, bytes: std::ops::Range<usize>) {
    for i in bytes.start / 8..bytes.end / 8 {
        let found = word(region, i).load(Ordering::Relaxed);
        assert_eq!(found, value(i, 0), "word {i} at byte {:#x}", i * 8);
    }
}

/// Page frame numbers; `None` where they are hidden from this user.
pub fn frames(region: &Region) -> Option<Vec<u64>> {
    let mut entries = vec![Entry(0); region.len() / page_size()];
    let pagemap = Pagemap::open().expect("procfs");
    pagemap.entries(region.addr(), &mut entries).expect("readable");
    entries.iter().map(|e| e.pfn()).collect()
}

/// The node of each page of a region as `move_pages(2)` tells it, or a negative errno.
pub fn nodes_of(region: &Region) -> Vec<i32> {
    let pages: Vec<_> = (0..region.len()).step_by(page_size()).map(|b| region.addr() + b).collect();
    let mut nodes = vec![-1; pages.len()];
    Linux.page_nodes(&pages, &mut nodes).expect("a kernel with NUMA");
    nodes
}

/// Every page that the report calls moved, or there already, is on `to`: each one is asked for.
/// Only for regions that the program leaves mapped as they are. One in swap is nowhere.
pub fn on_their_node(region: &Region, report: &Report, to: NodeId) {
    let wanted = i32::try_from(to.get()).expect("a small number");
    let nodes = nodes_of(region);
    let settled = report
        .pages
        .iter()
        .filter(|(_, outcome)| matches!(outcome, Outcome::Moved | Outcome::AlreadyThere));
    let pages = settled.flat_map(|(range, _)| range.clone().step_by(page_size()));
    let astray: Vec<_> = pages
        .map(|addr| (addr, nodes[(addr - region.addr()) / page_size()]))
        .filter(|(_, node)| *node != wanted && *node != -libc::ENOENT)
        .collect();
    assert!(
        astray.is_empty(),
        "{} pages were sent to {to:?} and are elsewhere: {:x?}",
        astray.len(),
        &astray[..astray.len().min(8)]
    );
}

/// Threads that read and write a region while it moves. Word `i` belongs to writer `i % writers`;
/// a writer checks what it wrote last; readers check that a word is one of its possible values.
pub struct Racers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
    rounds: Arc<Vec<AtomicU64>>,
    /// The first words of the lines of 64 words that they use.
    lines: Arc<Vec<usize>>,
    region: Arc<Region>,
}

/// Xorshift64.
pub fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

impl Racers {
    /// Starts them on the whole region, which `fill` has filled. One word in 64 is written.
    pub fn start(region: &Arc<Region>, readers: usize, writers: usize) -> Self {
        Self::start_on(region, std::slice::from_ref(&(0..region.len())), readers, writers)
    }

    /// Starts them on parts of a region (bytes from its start).
    pub fn start_on(
        region: &Arc<Region>,
        parts: &[Range<usize>],
        readers: usize,
        writers: usize,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let lines: Vec<usize> =
            parts.iter().flat_map(|p| (p.start / 8..p.end / 8).step_by(64)).collect();
        let owned = lines.len();
        let lines = Arc::new(lines);
        let rounds: Arc<Vec<_>> = Arc::new((0..owned).map(|_| AtomicU64::new(0)).collect());
        let mut threads = Vec::new();
        for id in 0..readers + writers {
            let (stop, region, rounds, lines) =
                (Arc::clone(&stop), Arc::clone(region), Arc::clone(&rounds), Arc::clone(&lines));
            threads.push(std::thread::spawn(move || {
                let mut seed = 0x1234_5678_9ABC_DEF1 ^ (id as u64) << 32;
                let mut done = 0;
                while !stop.load(Ordering::Relaxed) {
                    let pick = usize::try_from(next(&mut seed) % owned as u64).expect("small");
                    if id < writers {
                        let pick = pick - pick % writers + id;
                        if pick >= owned {
                            continue;
                        }
                        let (i, round) = (lines[pick], rounds[pick].load(Ordering::Relaxed));
                        let found = word(&region, i).load(Ordering::Relaxed);
                        assert_eq!(found, value(i, round), "own word {i}, round {round}");
                        word(&region, i).store(value(i, round + 1), Ordering::Relaxed);
                        rounds[pick].store(round + 1, Ordering::Relaxed);
                    } else {
                        let i =
                            lines[pick] + 1 + usize::try_from(next(&mut seed) % 63).expect("small");
                        let found = word(&region, i).load(Ordering::Relaxed);
                        assert_eq!(found, value(i, 0), "word {i} that nobody writes");
                    }
                    done += 1;
                }
                done
            }));
        }
        Self { stop, threads, rounds, lines, region: Arc::clone(region) }
    }

    /// Ends them and scans all their parts; returns how many accesses there were.
    pub fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let mut done = 0;
        for thread in self.threads {
            done += thread.join().expect("every word was right");
        }
        for (line, &first) in self.lines.iter().enumerate() {
            for i in first..first + 64 {
                let round = if i == first { self.rounds[line].load(Ordering::Relaxed) } else { 0 };
                let found = word(&self.region, i).load(Ordering::Relaxed);
                assert_eq!(found, value(i, round), "word {i} at the end");
            }
        }
        done
    }
}
