//! What the demo says in the end, for programs; [`super::report_text`] says it to people.

use super::burn::Burnt;
use super::corpus::Taken;
use super::holes::HoleCounts;
use super::index::Comparison;
use super::look::Frames;
use super::moving::{Route, STALL_BUDGET, Sum};
use super::rounds::{Equal, Slice};
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
    /// By the engine, at full speed.
    pub(super) moved: Moved,
    /// One folio at a time, at full speed.
    pub(super) one_folio_at_a_time: Moved,
    /// How long a range may be away in a move by the engine, in microseconds.
    pub(super) stall_budget_us: f64,
    /// GB/s of the engine over GB/s one folio at a time: medians of the rounds.
    pub(super) ratio: Option<f64>,
    /// What was equal in the phases whose latencies are compared.
    pub(super) equal_work: EqualWork,
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
    /// Bytes in use when it was built.
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
    /// Lowest, middle and highest of them.
    pub(super) spread: Option<Spread>,
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
            spread: Spread::of(sum.rounds.iter().copied()),
            holes: Away::new(&sum.holes),
            stayed: stayed.map(|(o, b)| Stayed { because: o.to_string(), bytes: *b }).collect(),
        }
    }
}

/// Lowest, middle and highest value of the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) min: f64,
    /// Of an even number of rounds the mean of the two in the middle.
    pub(super) median: f64,
    pub(super) max: f64,
}

impl Spread {
    /// `None` of nothing.
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
        Some(Self { min, median: middle, max })
    }
}

/// What was equal in the phases whose latencies are compared: in every round each of them did the
/// same operations from the same documents, and those that moved took the same pages at the same
/// times.
#[derive(Debug, Default, Serialize)]
pub(super) struct EqualWork {
    /// Rounds that were done in whole.
    pub(super) rounds: u64,
    /// Queries of each phase in each round.
    pub(super) queries_per_round: u64,
    /// Updates of each phase in each round, those without room included.
    pub(super) updates_per_round: u64,
    /// Bytes that each way was to move in each round.
    pub(super) bytes_per_round: u64,
    /// Moves in which it was to do so.
    pub(super) steps_per_round: u64,
    /// The common pace: half of what the slower way managed at full speed in the warm-up, in GB/s.
    pub(super) gb_per_s: f64,
    /// What the engine did of it.
    pub(super) moving: Paced,
    /// What was done of it one folio at a time.
    pub(super) one_folio_at_a_time: Paced,
}

impl EqualWork {
    /// Takes over what was planned.
    pub(super) fn planned(&mut self, equal: &Equal) {
        [self.queries_per_round, self.updates_per_round] = equal.operations;
        self.bytes_per_round = equal.plan.bytes;
        self.steps_per_round = equal.plan.dues.len() as u64;
        self.gb_per_s = equal.plan.gb_per_s;
    }

    /// Whether both ways moved the same in every round.
    pub(super) fn bytes_are_equal(&self) -> bool {
        self.moving.bytes == self.one_folio_at_a_time.bytes
    }

    /// Whether both ways kept the pace: no more than a tenth slower, in the middle round.
    pub(super) fn pace_was_held(&self) -> bool {
        [&self.moving, &self.one_folio_at_a_time]
            .iter()
            .all(|paced| paced.spread.is_none_or(|spread| spread.median >= self.gb_per_s * 0.9))
    }
}

/// What a way did at the common pace.
#[derive(Debug, Default, Serialize)]
pub(super) struct Paced {
    /// Bytes moved, of every round.
    pub(super) bytes: Vec<u64>,
    /// GB/s from the first step's beginning to the last one's end, of every round.
    pub(super) rounds: Vec<f64>,
    /// Lowest, middle and highest of them.
    pub(super) spread: Option<Spread>,
    /// Steps taken in all rounds.
    pub(super) steps: u64,
    /// Of those, steps that began when the next one was due already.
    pub(super) late_steps: u64,
}

/// Latencies of operations in the phases; `None` where there was no operation.
#[derive(Debug, Default, Serialize)]
pub(super) struct Felt {
    pub(super) not_moving: Option<Latency>,
    /// Nothing moves, and as much CPU time is burnt as moving takes.
    pub(super) burnt_cpu: Option<Latency>,
    /// At the common pace.
    pub(super) moving: Option<Latency>,
    /// At the common pace.
    pub(super) one_folio_at_a_time: Option<Latency>,
    /// At full speed: not to be compared with the others, nor these two with each other.
    pub(super) moving_at_full_speed: Option<Latency>,
    pub(super) one_folio_at_a_time_at_full_speed: Option<Latency>,
}

/// Rounds as they come, until all are added up.
#[derive(Debug)]
pub(super) struct Rounds {
    all: Vec<(Phase, Tally, [Vec<Quantiles>; 2])>,
    moving: Paced,
    one_by_one: Paced,
    count: u64,
}

/// Quantiles of one round, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Quantiles {
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
}

impl Rounds {
    pub(super) fn new() -> Result<Self, hdrhistogram::CreationError> {
        let row = |phase| Ok((phase, Tally::new()?, Default::default()));
        Ok(Self {
            all: Phase::ALL.into_iter().map(row).collect::<Result<_, _>>()?,
            moving: Paced::default(),
            one_by_one: Paced::default(),
            count: 0,
        })
    }

    /// Adds a round that was done in whole.
    pub(super) fn add(&mut self, round: Vec<Slice>) -> anyhow::Result<()> {
        self.count += 1;
        for Slice { phase, tally, followed } in round {
            for (_, all, rounds) in self.all.iter_mut().filter(|(p, ..)| *p == phase) {
                all.merge(&tally)?;
                for kind in Kind::ALL {
                    rounds[kind as usize].extend(Latency::of(tally.latencies(kind)));
                }
            }
            let paced = match phase {
                Phase::Moving => &mut self.moving,
                Phase::OneByOne => &mut self.one_by_one,
                _ => continue,
            };
            if let Some(followed) = followed {
                paced.bytes.push(followed.bytes);
                paced.rounds.push(followed.gb_per_s);
                paced.steps += followed.kept.steps;
                paced.late_steps += followed.kept.late;
            }
        }
        Ok(())
    }

    /// What operations of a kind felt.
    pub(super) fn felt(&self, kind: Kind) -> Felt {
        let latency = |phase| {
            let (_, all, rounds) = self.all.iter().find(|(p, ..)| *p == phase)?;
            Latency::new(all.latencies(kind), rounds[kind as usize].clone())
        };
        Felt {
            not_moving: latency(Phase::Still),
            burnt_cpu: latency(Phase::Burning),
            moving: latency(Phase::Moving),
            one_folio_at_a_time: latency(Phase::OneByOne),
            moving_at_full_speed: latency(Phase::FullSpeed),
            one_folio_at_a_time_at_full_speed: latency(Phase::FullSpeedOneByOne),
        }
    }

    pub(super) fn equal_work(self, equal: &Equal) -> EqualWork {
        let mut work = EqualWork { rounds: self.count, ..EqualWork::default() };
        work.planned(equal);
        let spread = |paced: Paced| {
            let spread = Spread::of(paced.rounds.iter().copied());
            Paced { spread, ..paced }
        };
        work.moving = spread(self.moving);
        work.one_folio_at_a_time = spread(self.one_by_one);
        work
    }
}

/// Quantiles in microseconds, over all rounds and of each.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Latency {
    pub(super) operations: u64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) p999_us: f64,
    pub(super) max_us: f64,
    /// Of every round.
    pub(super) rounds: Vec<Quantiles>,
    /// Lowest, middle and highest p50 of the rounds.
    pub(super) p50_spread_us: Spread,
    /// Lowest, middle and highest p99 of the rounds.
    pub(super) p99_spread_us: Spread,
}

#[allow(clippy::cast_precision_loss, reason = "rounded to be read")]
fn quantile(histogram: &Histogram<u64>, q: f64) -> f64 {
    histogram.value_at_quantile(q) as f64 / 1e3
}

impl Latency {
    /// The quantiles of one round; `None` of nothing.
    fn of(round: &Histogram<u64>) -> Option<Quantiles> {
        let at = |q| quantile(round, q);
        (!round.is_empty()).then(|| Quantiles { p50_us: at(0.5), p99_us: at(0.99) })
    }

    fn new(all: &Histogram<u64>, rounds: Vec<Quantiles>) -> Option<Self> {
        let p50_spread_us = Spread::of(rounds.iter().map(|r| r.p50_us))?;
        let p99_spread_us = Spread::of(rounds.iter().map(|r| r.p99_us))?;
        Some(Self {
            operations: all.len(),
            p50_us: quantile(all, 0.5),
            p99_us: quantile(all, 0.99),
            p999_us: quantile(all, 0.999),
            max_us: quantile(all, 1.0),
            rounds,
            p50_spread_us,
            p99_spread_us,
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
            equal_work: EqualWork::default(),
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
        assert_eq!(Latency::of(&histogram), None);
        assert_eq!(Latency::new(&histogram, Vec::new()), None);
        (1..=1000u64).for_each(|us| histogram.saturating_record(us * 1000));
        let rounds = Latency::of(&histogram).into_iter().collect();
        let Some(latency) = Latency::new(&histogram, rounds) else { panic!("not empty") };
        assert_eq!(latency.operations, 1000);
        for (got, want) in [
            (latency.p50_us, 500.0),
            (latency.p99_us, 990.0),
            (latency.p999_us, 999.0),
            (latency.max_us, 1000.0),
            (latency.p99_spread_us.median, 990.0),
        ] {
            assert!((got / want - 1.0).abs() < 2e-3, "{got} for {want}");
        }
        Ok(())
    }

    #[test]
    fn a_spread_has_the_middle_of_the_rounds_whatever_their_order() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied());
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[9.0, 1.0, 2.0]), Some(Spread { min: 1.0, median: 2.0, max: 9.0 }));
        assert_eq!(spread(&[9.0, 1.0, 2.0, 4.0]).map(|s| s.median), Some(3.0));
    }
}
