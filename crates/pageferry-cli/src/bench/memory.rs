//! What the engine itself costs: memory once its frames are given back, and allocations per folio.

use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use pageferry::FolioSize;
use pageferry_sys::usage;

use super::alloc;
use super::config::Config;
use super::lab::{self, Field, Lab, Trouble};
use super::schema::{Results, Run, Skipped};

/// After which the engine under test frees its frames.
const IDLE: Duration = Duration::from_millis(100);
/// How long we wait for that at most.
const PATIENCE: Duration = Duration::from_secs(3);

/// The scenario `memory`.
pub(super) fn run(lab: &Lab<'_>, results: &mut Results) -> anyhow::Result<bool> {
    let before = usage::resident_bytes();
    let engine = lab::build_with(|builder| builder.idle_release(IDLE))?;
    let field = Field::new(&engine, FolioSize::Base, lab.plan.region, lab.content)?;
    let config = Config::new("memory");
    let bytes = field.region.len();
    let mut run = Run::new("memory");
    run.folio_bytes = Some(FolioSize::Base.bytes() as u64);
    // Twice, so that everything that is made once has been made.
    let (mut small, mut large) = (0, 0);
    for _ in 0..2 {
        small = allocations(&config, &field, bytes / 4)?;
        large = allocations(&config, &field, bytes)?;
    }
    let folios = (bytes - bytes / 4) / FolioSize::Base.bytes();
    let per_folio = large.saturating_sub(small) as f64 / folios as f64;
    results.ratios.insert("allocations_per_folio".to_owned(), per_folio);
    if let Err(Trouble::Fail(why) | Trouble::Skip(why)) = field.check_all() {
        results.failures.push(format!("memory: {why}"));
    }
    run.verified = Some(true);

    let mut waited = Duration::ZERO;
    while engine.stats().frame_bytes > 0 && waited < PATIENCE {
        thread::sleep(IDLE / 2);
        waited += IDLE / 2;
    }
    let stats = engine.stats();
    let fraction = stats.metadata_bytes as f64 / bytes as f64;
    results.ratios.insert("engine_metadata_over_managed".to_owned(), fraction);
    let managed = bytes as u64;
    let grown = before
        .zip(usage::resident_bytes())
        .map(|(before, after)| after.saturating_sub(before).saturating_sub(managed));
    match grown {
        Some(grown) => {
            let fraction = grown as f64 / managed as f64;
            results.ratios.insert("engine_resident_over_managed".to_owned(), fraction);
        }
        None => results.skipped.push(Skipped {
            what: "resident memory of the engine".to_owned(),
            because: "/proc/self/smaps_rollup cannot be read".to_owned(),
        }),
    }
    run.engine = "all of it".to_owned();
    run.threads = field.threads;
    run.rounds = 1;
    run.note = Some(format!(
        "{managed} bytes managed; engine's tables {} bytes, frames after {waited:?} idle {} bytes, \
         resident growth {}; {small} allocations in a move of a quarter, {large} of all",
        stats.metadata_bytes,
        stats.frame_bytes,
        grown.map_or_else(|| "unknown".to_owned(), |bytes| format!("{bytes} bytes")),
    ));
    results.runs.push(run);
    Ok(!crate::cancel::requested())
}

/// Allocations of the process during one move.
fn allocations(config: &Config, field: &Field, bytes: usize) -> anyhow::Result<u64> {
    let window = field.window(bytes)?;
    let (report, count) = alloc::during(|| config.execute(field, &window));
    let report = report.context("cannot move")?;
    anyhow::ensure!(report.bytes_moved > 0, "no page was moved: {report}");
    field.moved(&window)?;
    Ok(count)
}
