//! The child: memory of each kind on a node, a thread that reads it, and one that maps and unmaps.
//!
//! It answers each line of its standard input with one of its standard output (`quiet`, `watch`,
//! `tell`) and ends when that input does. A page that has not its own content ends it.

use super::{Failure, MIB};
use pageferry_sys::mm::PreferringNode;
use std::io::{Write as _, stdin, stdout};
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::ptr::{null_mut, with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;
/// The area that is mapped and unmapped.
const AREA: usize = 16 * PAGE;
/// Reads, and mappings, between two rests.
const READS: u32 = 256;
const MAPPINGS: u32 = 4;
const REST: Duration = Duration::from_micros(500);

/// How long something took, again and again: four buckets for each power of two of
/// nanoseconds. Relaxed everywhere: sums that one thread makes and another reads later.
struct Times {
    buckets: [AtomicU64; 256],
    longest: AtomicU64,
    rests: AtomicU64,
}

static READING: Times = Times::new();
static MAPPING: Times = Times::new();
static MAPPED: AtomicU64 = AtomicU64::new(0);
static QUIET: AtomicBool = AtomicBool::new(true);

impl Times {
    const fn new() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; 256],
            longest: AtomicU64::new(0),
            rests: AtomicU64::new(0),
        }
    }

    fn record(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(4);
        let octave = ns.ilog2();
        let index = octave as usize * 4 + (ns >> (octave - 2) & 3) as usize;
        self.buckets[index].fetch_add(1, Relaxed);
        self.longest.fetch_max(ns, Relaxed);
    }

    fn clear(&self) {
        self.buckets.iter().for_each(|bucket| bucket.store(0, Relaxed));
        self.longest.store(0, Relaxed);
    }

    /// Waits until what is under way now has been recorded.
    fn settle(&self) {
        let before = self.rests.load(Relaxed);
        while self.rests.load(Relaxed) < before + 2 {
            sleep(REST);
        }
    }

    /// How many; what 99.9 % of them did not exceed (at most a quarter too much); the longest.
    fn told(&self) -> String {
        let counts: Vec<u64> = self.buckets.iter().map(|b| b.load(Relaxed)).collect();
        let (all, longest) = (counts.iter().sum::<u64>(), self.longest.load(Relaxed));
        let mut left = all / 1000;
        let index = counts.iter().rposition(|&n| {
            let found = n > left;
            left = left.saturating_sub(n);
            found
        });
        let most = index.map_or(0, |i| {
            let (octave, quarter) = ((i + 1) / 4, (i + 1) as u64 % 4);
            (1u64 << octave) + ((quarter << octave) / 4)
        });
        format!("{all} {} {longest}", most.min(longest))
    }
}

pub(crate) fn run(mib: u64, node: u32) -> Result<(), Failure> {
    let part = usize::try_from(mib * MIB / 4)? & !(HUGE - 1);
    let memory = fill(part, node)?;
    spawn(move || read(&memory));
    spawn(map_and_unmap);
    let mut out = stdout();
    writeln!(out, "ready")?;
    for line in stdin().lines() {
        match line?.as_str() {
            "quiet" => {
                QUIET.store(true, Relaxed);
                MAPPING.settle();
                writeln!(out, "quiet")?;
            }
            "watch" => {
                READING.clear();
                MAPPING.clear();
                MAPPED.store(0, Relaxed);
                QUIET.store(false, Relaxed);
                writeln!(out, "watching")?;
            }
            _ => {
                READING.settle();
                MAPPING.settle();
                let mapped = MAPPED.load(Relaxed);
                writeln!(out, "{} {} {mapped}", READING.told(), MAPPING.told())?;
            }
        }
    }
    Ok(())
}

/// Memory of each kind, on this node.
fn fill(part: usize, node: u32) -> Result<Vec<Range<usize>>, Failure> {
    let _here = PreferringNode::new(node)?;
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let mut memory = Vec::new();
    for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE] {
        let start = map(part + HUGE, private, -1)?.next_multiple_of(HUGE);
        // SAFETY: advice about pages of the mapping just made. A kernel without huge pages
        // refuses it, and gives base pages.
        unsafe { libc::madvise(with_exposed_provenance_mut(start), part, advice) };
        memory.push(start..start + part);
    }
    let shared = map(part, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1)?;
    memory.push(shared..shared + part);
    let file = tempfile::tempfile()?;
    file.set_len(part as u64)?;
    let start = map(part, libc::MAP_SHARED, file.as_raw_fd())?;
    memory.push(start..start + part);
    memory.iter().for_each(|range| write(range.clone()));
    Ok(memory)
}

fn map(len: usize, flags: i32, file: i32) -> std::io::Result<usize> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { libc::mmap(null_mut(), len, prot, flags, file, 0) };
    if at == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    Ok(at.expose_provenance())
}

fn write(range: Range<usize>) {
    for at in range.step_by(PAGE) {
        // SAFETY: pages of our mappings, writable, and nobody holds a reference to them.
        unsafe { with_exposed_provenance_mut::<usize>(at).write_volatile(at) };
    }
}

/// Reads pages at random, without end.
fn read(memory: &[Range<usize>]) {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    loop {
        let mut last = Instant::now();
        for _ in 0..READS {
            // xorshift64, Marsaglia 2003.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let number = usize::try_from(random >> 8).unwrap_or(0);
            let range = &memory[number % memory.len()];
            let page = number / memory.len() % (range.len() / PAGE);
            let at = range.start + page * PAGE;
            // SAFETY: a page of our mappings, which stay; written once, by `write`, before.
            let found = unsafe { with_exposed_provenance::<usize>(at).read_volatile() };
            let now = Instant::now();
            READING.record(now - last);
            last = now;
            if found != at {
                // A panic would end this thread alone.
                eprintln!("the page at {at:#x} holds {found:#x} instead of its address");
                std::process::abort();
            }
        }
        READING.rests.fetch_add(1, Relaxed);
        sleep(REST);
    }
}

/// Maps, touches and unmaps an area, without end, unless it is to be quiet.
fn map_and_unmap() {
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    loop {
        for _ in 0..MAPPINGS {
            if QUIET.load(Relaxed) {
                break;
            }
            let began = Instant::now();
            let Ok(at) = map(AREA, private, -1) else { continue };
            MAPPING.record(began.elapsed());
            MAPPED.fetch_add(AREA as u64, Relaxed);
            write(at..at + AREA);
            let began = Instant::now();
            // SAFETY: mapped above, and used by nobody else.
            unsafe { libc::munmap(with_exposed_provenance_mut(at), AREA) };
            MAPPING.record(began.elapsed());
        }
        MAPPING.rests.fetch_add(1, Relaxed);
        sleep(REST);
    }
}
