//! Copying without moving: the roofline, and every kernel by threads and length of a copy.
//!
//! The threads are the bench's own, not the engine's pool: the roofline must not inherit what the
//! engine does badly. They claim 2 MiB at a time, and copy it in pieces of the length asked for.

use std::ops::Range;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use pageferry_copy::{CopyFault, Kernel};

use super::lab::{Case, Lab, Trouble};
use super::plan::Scenario;
use super::probe::Buffer;
use super::schema::{Results, Run};
use super::stats::{self, Counted, Reading};

/// Bytes that a thread claims at once.
const CLAIM: usize = 2 << 20;
/// Candidates for the roofline that are measured together with the moves.
const CANDIDATES: usize = 3;

/// Two buffers in huge pages.
#[derive(Debug)]
pub(super) struct Buffers {
    from: Buffer,
    to: Buffer,
}

impl Buffers {
    /// Maps and populates both.
    pub(super) fn new(lab: &Lab<'_>) -> anyhow::Result<Self> {
        let buffer = || Buffer::new(lab.plan.region, true).context("cannot map a copy buffer");
        Ok(Self { from: buffer()?, to: buffer()? })
    }
}

/// A way to copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    kernel: Kernel,
    threads: usize,
    chunk: usize,
}

/// Copies for about `target`: bytes copied, and the time it took.
fn copy(buffers: &Buffers, way: Way, target: Duration) -> Result<(u64, Duration), CopyFault> {
    let next = AtomicUsize::new(0);
    let claims = buffers.from.len() / CLAIM;
    let start = Barrier::new(way.threads);
    let worker = || -> Result<(usize, Instant, Instant), CopyFault> {
        start.wait();
        let began = Instant::now();
        let mut bytes = 0;
        while began.elapsed() < target {
            // Relaxed: the claims are only shared out.
            let at = next.fetch_add(1, Ordering::Relaxed) % claims * CLAIM;
            for piece in pieces(at..at + CLAIM, way.chunk) {
                buffers.to.copy_from(&buffers.from, piece, way.kernel)?;
            }
            bytes += CLAIM;
        }
        Ok((bytes, began, Instant::now()))
    };
    let done: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..way.threads).map(|_| scope.spawn(worker)).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    let done = done.into_iter().collect::<Result<Vec<_>, _>>()?;
    let bytes: usize = done.iter().map(|(bytes, ..)| bytes).sum();
    let first = done.iter().map(|(_, began, _)| *began).min();
    let last = done.iter().map(|(.., ended)| *ended).max();
    let wall = first.zip(last).map_or(Duration::ZERO, |(first, last)| last - first);
    Ok((bytes as u64, wall))
}

fn pieces(range: Range<usize>, chunk: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(chunk).map(move |at| at..end.min(at + chunk))
}

/// One way to copy, as a case.
struct CopyCase<'a> {
    scenario: &'static str,
    buffers: &'a Buffers,
    way: Way,
    rates: Vec<f64>,
    bytes: u64,
    counted: Counted,
}

impl Case for CopyCase<'_> {
    fn name(&self) -> String {
        let Way { kernel, threads, chunk } = self.way;
        format!("{} {kernel}, {threads} threads, {} KiB", self.scenario, chunk >> 10)
    }

    fn measure(&mut self, lab: &Lab<'_>, warm_up: bool) -> Result<(), Trouble> {
        let target = lab.plan.target / if self.scenario == "copy" { 3 } else { 1 };
        let reading = Reading::now();
        let (bytes, wall) = copy(self.buffers, self.way, target)
            .map_err(|fault| Trouble::Fail(fault.to_string()))?;
        if !warm_up {
            self.counted.add(&reading.elapsed());
            self.bytes += bytes;
            self.rates.push(stats::gb_per_s(bytes, wall));
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Option<Run> {
        let gb_per_s = stats::spread(&self.rates)?;
        let per_gib = self.counted.per_gib(self.bytes);
        Some(Run {
            engine: format!("cpu:{}", self.way.kernel),
            threads: self.way.threads,
            batch_bytes: Some(self.way.chunk as u64),
            gb_per_s: Some(gb_per_s),
            cpu_s_per_gib: per_gib.map(|c| c.rusage_cpu_s),
            per_gib,
            rounds: self.rates.len(),
            ..Run::new(self.scenario)
        })
    }
}

fn case<'a>(scenario: &'static str, buffers: &'a Buffers, way: Way) -> Box<dyn Case + 'a> {
    let (rates, counted) = (Vec::new(), Counted::default());
    Box::new(CopyCase { scenario, buffers, way, rates, bytes: 0, counted })
}

/// The fastest ways, found by a short look at each kernel with all CPUs and with half of them (a
/// few threads can saturate memory better than many).
pub(super) fn roofline<'a>(
    lab: &Lab<'_>,
    buffers: &'a Buffers,
) -> anyhow::Result<Vec<Box<dyn Case + 'a>>> {
    let all = lab.plan.cpus.len();
    let mut ways = Vec::new();
    for kernel in Kernel::available() {
        for threads in [all, all.div_ceil(2)] {
            let way = Way { kernel, threads, chunk: CLAIM };
            let (bytes, wall) = copy(buffers, way, lab.plan.target / 5)?;
            ways.push((stats::gb_per_s(bytes, wall), way));
        }
    }
    ways.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(ways.into_iter().take(CANDIDATES).map(|(_, way)| case("roofline", buffers, way)).collect())
}

/// The scenario `copy`.
pub(super) fn run(lab: &Lab<'_>, results: &mut Results) -> anyhow::Result<bool> {
    let buffers = Buffers::new(lab)?;
    let all = lab.plan.cpus.len();
    let mut threads = vec![1, all];
    if lab.plan.is_full() {
        threads.extend([2, all / 4, all / 2]);
    }
    threads.retain(|&n| (1..=all).contains(&n));
    threads.sort_unstable();
    threads.dedup();
    let mut cases = Vec::new();
    for kernel in Kernel::available() {
        for &threads in &threads {
            for chunk in [4 << 10, 64 << 10, 2 << 20] {
                cases.push(case("copy", &buffers, Way { kernel, threads, chunk }));
            }
        }
    }
    Ok(lab.interleave(Scenario::Copy, lab.plan.rounds, cases, results))
}

/// The scenario `roofline` by itself.
pub(super) fn run_roofline(lab: &Lab<'_>, results: &mut Results) -> anyhow::Result<bool> {
    let buffers = Buffers::new(lab)?;
    let cases = roofline(lab, &buffers)?;
    Ok(lab.interleave(Scenario::Roofline, lab.plan.rounds, cases, results))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_the_range_once() {
        let cut: Vec<_> = pieces(10..25, 10).collect();
        assert_eq!(cut, [10..20, 20..25]);
    }

    #[test]
    fn a_copy_takes_about_as_long_as_asked_and_copies_the_bytes() {
        let buffers = Buffers {
            from: Buffer::new(4 << 20, false).expect("memory"),
            to: Buffer::new(4 << 20, false).expect("memory"),
        };
        let way = Way { kernel: Kernel::MEMCPY, threads: 2, chunk: 4096 };
        let (bytes, wall) = copy(&buffers, way, Duration::from_millis(1)).expect("no fault");
        assert!(bytes >= CLAIM as u64 && wall >= Duration::from_millis(1), "{bytes} in {wall:?}");
    }
}
