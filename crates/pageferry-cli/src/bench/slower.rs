//! Never slower: default moves beside sequential ones where there is little to win.
//!
//! - *One CPU*: an engine whose threads, and the caller, all run on one CPU.
//! - *Busy*: as many other threads as there are CPUs compute all the time.
//! - *Single*: one folio at a time, each call timed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::Context as _;
use pageferry::{Engine, FolioSize, Frames, Order};
use pageferry_sys::affinity::CpuSet;

use super::config::{Config, Extent, MoveCase};
use super::content::Content;
use super::lab::{self, Case, Field, Lab};
use super::plan::Scenario;
use super::schema::Results;

/// A default move and a sequential one, for each folio size.
fn pairs<'a>(
    lab: &Lab<'_>,
    fields: &'a [Field],
    names: (&'static str, &'static str),
    single: bool,
) -> Vec<Box<dyn Case + 'a>> {
    let mut cases = Vec::new();
    for field in fields {
        let folio = field.folio;
        let sequential = Config::sequential(names.1, folio, Order::Frozen, Frames::Recycled);
        let extent = if single {
            Extent::Repeat { bytes: folio.bytes(), times: lab.plan.singles }
        } else {
            Extent::Timed
        };
        for config in [Config::new(names.0), sequential] {
            cases.push(MoveCase::boxed(config, field, extent));
        }
    }
    cases
}

fn fields(lab: &Lab<'_>, engine: &Engine, content: Content) -> anyhow::Result<Vec<Field>> {
    // Large enough to be no cache's; there is one of each size at once.
    let bytes = lab.plan.region.min(128 << 20);
    let sizes: Vec<FolioSize> = lab.folio_sizes();
    sizes.into_iter().map(|folio| Field::new(engine, folio, bytes, content)).collect()
}

/// The scenario `never-slower`.
pub(super) fn run(lab: &Lab<'_>, results: &mut Results) -> anyhow::Result<bool> {
    let all = fields(lab, &lab.engine, lab.content)?;
    let rounds = lab.plan.rounds;
    let single = pairs(lab, &all, ("single", "single_sequential"), true);
    if !lab.interleave(Scenario::NeverSlower, rounds, single, results) {
        return Ok(false);
    }
    let stop = AtomicBool::new(false);
    let done = thread::scope(|scope| {
        for _ in &lab.plan.cpus {
            scope.spawn(|| {
                // Relaxed: stopping publishes nothing.
                while !stop.load(Ordering::Relaxed) {
                    std::hint::black_box((0..1000u64).fold(0, |a, b| a ^ b.wrapping_mul(a | 1)));
                }
            });
        }
        let busy = pairs(lab, &all, ("busy", "busy_sequential"), false);
        let done = lab.interleave(Scenario::NeverSlower, rounds.min(5), busy, results);
        stop.store(true, Ordering::Relaxed);
        done
    });
    drop(all);
    if !done {
        return Ok(false);
    }
    thread::scope(|scope| {
        let thread = scope.spawn(|| on_one_cpu(lab, results));
        thread.join().map_err(|_| anyhow::anyhow!("the measurement on one CPU panicked"))?
    })
}

/// Pins this thread, and so the threads of the engine that it builds, to the first CPU.
fn on_one_cpu(lab: &Lab<'_>, results: &mut Results) -> anyhow::Result<bool> {
    let first = lab.plan.cpus.first().copied().unwrap_or(0);
    CpuSet::from_iter([first]).apply(0).context("cannot pin a thread to one CPU")?;
    let engine = lab::build_with(|builder| builder.threads(1).idle_release(lab::KEEP_FRAMES))?;
    let fields = fields(lab, &engine, Content { threads: 1, ..lab.content })?;
    let cases = pairs(lab, &fields, ("one_cpu", "one_cpu_sequential"), false);
    Ok(lab.interleave(Scenario::NeverSlower, lab.plan.rounds, cases, results))
}
