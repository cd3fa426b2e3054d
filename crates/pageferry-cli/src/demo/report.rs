//! What the demo says in the end, for programs; [`super::report_text`] says it to people.

use super::burn::Burnt;
use super::corpus::Taken;
use super::holes::HoleCounts;
use super::index::Comparison;
use super::look::Frames;
use super::moving::{Route, STALL_BUDGET, Sum};
use super::tally::{Kind, Phase, Tally};
use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::Duration;

/// Version of the JSON; a change that breaks readers raises it.
pub(super) const SCHEMA_VERSION: u32 = 1;

/// See the module.
#[derive(Debug, Serialize)]
pub(super) struct DemoReport {
    pub(super) schema_version: u32,
    pub(super) text: Taken,
    pub(super) index: IndexSize,
    pub(super) route: Route,
    /// Nodes of this machine that have memory.
    pub(super) memory_nodes: usize,
    /// Without full userfaultfd rights: no system call may be given the region's memory during a
    /// move.
    pub(super) user_mode_only: bool,
    pub(super) folios: &'static str,
    /// Threads that query; one more updates.
    pub(super) query_threads: usize,
    pub(super) moved: Moved,
    pub(super) one_folio_at_a_time: Moved,
    /// How long a range may be away in a move by the engine, in microseconds.
    pub(super) stall_budget_us: f64,
    /// GB/s of the engine over GB/s one folio at a time.
    pub(super) ratio: Option<f64>,
    pub(super) queries: Felt,
    pub(super) updates: Felt,
    /// The control of both.
    pub(super) burnt_cpu: Burnt,
    /// Documents that were to be added when there was no room for them.
    pub(super) updates_without_room: u64,
    pub(super) answers: Answers,
    /// The whole index at the end against the one that was not moved.
    pub(super) scan: Comparison,
    pub(super) physical_pages: Frames,
    /// The user ended it early.
    pub(super) cancelled: bool,
}

/// What is in managed memory.
#[derive(Debug, Default, Serialize)]
pub(super) struct IndexSize {
    /// Bytes in use.
    pub(super) bytes: u64,
    /// Bytes that it was to have.
    pub(super) wanted_bytes: u64,
    /// Address space of the region.
    pub(super) region_bytes: u64,
    /// Bytes of the region with a page behind them, as the last move found it.
    pub(super) present_bytes: u64,
    /// Documents at the end.
    pub(super) documents: u64,
    /// How many times the text went in.
    pub(super) editions: f64,
    /// The text went in as often as it may, and the index is smaller than wanted.
    pub(super) text_used_up: bool,
}

/// Moves of one way.
#[derive(Debug, Serialize)]
pub(super) struct Moved {
    pub(super) moves: u64,
    pub(super) bytes: u64,
    pub(super) seconds: f64,
    pub(super) cpu_seconds: f64,
    pub(super) gb_per_s: f64,
    /// GB/s of every round.
    pub(super) rounds: Vec<f64>,
    /// Times from detach to attach, without those in which the mover's CPU was taken away.
    pub(super) holes: Option<Away>,
    pub(super) stayed: Vec<Stayed>,
}

/// How long ranges were away: quantiles in microseconds, to about a fifth.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Away {
    /// How many ranges.
    pub(super) count: u64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) max_us: f64,
    /// Those that were back within the stall budget.
    pub(super) within_budget: u64,
}

impl Away {
    fn new(holes: &HoleCounts) -> Option<Self> {
        let at = |q| us(holes.quantile(q));
        (holes.count() > 0).then(|| Self {
            count: holes.count(),
            p50_us: at(0.5),
            p99_us: at(0.99),
            max_us: at(1.0),
            within_budget: holes.within(STALL_BUDGET),
        })
    }
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Memory that did not move.
#[derive(Debug, Serialize)]
pub(super) struct Stayed {
    pub(super) because: String,
    /// Summed over all moves.
    pub(super) bytes: u64,
}

impl From<&Sum> for Moved {
    fn from(sum: &Sum) -> Self {
        let stayed = sum.stayed.iter();
        Self {
            moves: sum.moves,
            bytes: sum.bytes,
            seconds: sum.elapsed.as_secs_f64(),
            cpu_seconds: sum.cpu.as_secs_f64(),
            gb_per_s: sum.gb_per_s(),
            rounds: sum.rounds.clone(),
            holes: Away::new(&sum.holes),
            stayed: stayed.map(|(o, b)| Stayed { because: o.to_string(), bytes: *b }).collect(),
        }
    }
}

/// Latencies of operations in the phases; `None` where there was no operation.
#[derive(Debug, Default, Serialize)]
pub(super) struct Felt {
    pub(super) not_moving: Option<Latency>,
    /// Nothing moves, and as much CPU time is burnt as moving takes.
    pub(super) burnt_cpu: Option<Latency>,
    pub(super) moving: Option<Latency>,
    pub(super) one_folio_at_a_time: Option<Latency>,
}

impl Felt {
    pub(super) fn new(tally: &Tally, kinds: &[Kind]) -> Self {
        let latency = |phase| tally.latencies(phase, kinds).and_then(|h| Latency::new(&h));
        Self {
            not_moving: latency(Phase::Still),
            burnt_cpu: latency(Phase::Burning),
            moving: latency(Phase::Moving),
            one_folio_at_a_time: latency(Phase::OneByOne),
        }
    }
}

/// Quantiles in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Latency {
    pub(super) operations: u64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) p999_us: f64,
    pub(super) max_us: f64,
}

impl Latency {
    #[allow(clippy::cast_precision_loss, reason = "rounded to be read")]
    fn new(histogram: &Histogram<u64>) -> Option<Self> {
        let us = |ns: u64| ns as f64 / 1e3;
        let quantile = |q| us(histogram.value_at_quantile(q));
        (!histogram.is_empty()).then(|| Self {
            operations: histogram.len(),
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
            p999_us: quantile(0.999),
            max_us: us(histogram.max()),
        })
    }
}

/// Answers against the index that was not moved.
#[derive(Debug, Default, Serialize)]
pub(super) struct Answers {
    pub(super) compared: u64,
    pub(super) differing: u64,
    pub(super) first_difference: Option<String>,
}

/// What is known before anything moves.
#[derive(Debug)]
pub(super) struct Setting {
    pub(super) route: Route,
    pub(super) memory_nodes: usize,
    pub(super) user_mode_only: bool,
    pub(super) folios: &'static str,
    pub(super) query_threads: usize,
    pub(super) wanted_bytes: u64,
}

impl DemoReport {
    /// The report of a demo in which nothing has been indexed or moved.
    pub(super) fn new(setting: Setting, text: Taken) -> Self {
        let Setting { route, memory_nodes, user_mode_only, folios, query_threads, wanted_bytes } =
            setting;
        Self {
            schema_version: SCHEMA_VERSION,
            text,
            index: IndexSize { wanted_bytes, ..IndexSize::default() },
            route,
            memory_nodes,
            user_mode_only,
            folios,
            query_threads,
            moved: Moved::from(&Sum::default()),
            one_folio_at_a_time: Moved::from(&Sum::default()),
            stall_budget_us: us(STALL_BUDGET),
            ratio: None,
            queries: Felt::default(),
            updates: Felt::default(),
            burnt_cpu: Burnt::default(),
            updates_without_room: 0,
            answers: Answers::default(),
            scan: Comparison::default(),
            physical_pages: Frames::default(),
            cancelled: false,
        }
    }

    /// Whether every answer and every posting is as in the index that was not moved.
    pub(super) fn is_right(&self) -> bool {
        self.answers.differing == 0 && self.scan.differing == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_histogram() -> Result<(), hdrhistogram::CreationError> {
        let mut histogram = Histogram::new_with_bounds(1, 10_000_000, 3)?;
        assert_eq!(Latency::new(&histogram), None);
        (1..=1000u64).for_each(|us| histogram.saturating_record(us * 1000));
        let Some(latency) = Latency::new(&histogram) else { panic!("not empty") };
        assert_eq!(latency.operations, 1000);
        for (got, want) in [
            (latency.p50_us, 500.0),
            (latency.p99_us, 990.0),
            (latency.p999_us, 999.0),
            (latency.max_us, 1000.0),
        ] {
            assert!((got / want - 1.0).abs() < 2e-3, "{got} for {want}");
        }
        Ok(())
    }
}
