//! What the demo says in the end, for people and for programs.

use super::corpus::Taken;
use super::index::Comparison;
use super::load::{Kind, Phase, Tally};
use super::memory::{iec, si};
use super::moving::{Frames, Route, Sum};
use crate::output::{BOLD, DIM, GREEN, RED};
use hdrhistogram::Histogram;
use serde::Serialize;
use std::fmt::{self, Display, Formatter};

/// Version of the JSON; a change that breaks readers raises it.
pub(super) const SCHEMA: u32 = 1;

/// See the module.
#[derive(Debug, Serialize)]
pub(super) struct DemoReport {
    pub(super) schema: u32,
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
    /// GB/s of the engine over GB/s one folio at a time.
    pub(super) ratio: Option<f64>,
    pub(super) queries: Felt,
    pub(super) updates: Felt,
    /// Documents that were to be added when the region was full.
    pub(super) updates_without_room: u64,
    pub(super) answers: Answers,
    /// The whole index at the end against the one that was not moved.
    pub(super) scan: Comparison,
    pub(super) physical_pages: Frames,
    /// The user ended it early.
    pub(super) cancelled: bool,
}

/// What is in managed memory.
#[derive(Debug, Serialize)]
pub(super) struct IndexSize {
    /// Bytes in use.
    pub(super) bytes: u64,
    /// Address space of the region.
    pub(super) region_bytes: u64,
    /// Bytes of the region with a page behind them, as the last move found it.
    pub(super) present_bytes: u64,
    /// Documents at the end.
    pub(super) documents: u64,
    /// How many times the text went in.
    pub(super) editions: f64,
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
    pub(super) longest_hole_us: f64,
    pub(super) stayed: Vec<Stayed>,
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
            longest_hole_us: sum.longest_hole.as_secs_f64() * 1e6,
            stayed: stayed.map(|(o, b)| Stayed { because: o.to_string(), bytes: *b }).collect(),
        }
    }
}

/// Latencies of operations in the three phases; `None` where there was no operation.
#[derive(Debug, Serialize)]
pub(super) struct Felt {
    pub(super) not_moving: Option<Latency>,
    pub(super) moving: Option<Latency>,
    pub(super) one_folio_at_a_time: Option<Latency>,
}

impl Felt {
    pub(super) fn new(tally: &Tally, kinds: &[Kind]) -> Self {
        let latency = |phase| tally.latencies(phase, kinds).and_then(|h| Latency::new(&h));
        Self {
            not_moving: latency(Phase::Still),
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
#[derive(Debug, Serialize)]
pub(super) struct Answers {
    pub(super) compared: u64,
    pub(super) differing: u64,
    pub(super) first_difference: Option<String>,
}

impl DemoReport {
    /// Whether every answer and every posting is as in the index that was not moved.
    pub(super) fn is_right(&self) -> bool {
        self.answers.differing == 0 && self.scan.differing == 0
    }
}

/// Left column, with what follows it.
fn row(f: &mut Formatter<'_>, name: &str, text: impl Display) -> fmt::Result {
    writeln!(f, "{BOLD}{name:<10}{BOLD:#} {text}")
}

impl Display for DemoReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.what(f)?;
        self.rates(f)?;
        self.latencies(f)?;
        self.proofs(f)
    }
}

impl DemoReport {
    fn what(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let text = &self.text;
        let sizes = (si(text.bytes, "B"), si(text.files, ""), text.documents);
        row(f, "text", format_args!("{} in {} files, {} documents", sizes.0, sizes.1, sizes.2))?;
        for folder in &text.folders {
            row(f, "", format_args!("{:>8}  {}", si(folder.bytes, "B"), folder.path.display()))?;
        }
        let mut left_out = Vec::new();
        for (count, why) in [
            (text.not_text, "not text"),
            (text.unreadable, "unreadable"),
            (text.cut, "read in part, for they are long"),
        ] {
            if count > 0 {
                left_out.push(format!("{count} {why}"));
            }
        }
        if text.more {
            left_out.push("there is more, which was not needed".to_owned());
        }
        if !left_out.is_empty() {
            row(f, "", format_args!("{DIM}files: {}{DIM:#}", left_out.join(", ")))?;
        }
        let index = &self.index;
        row(
            f,
            "index",
            format_args!(
                "{} in managed memory: {} words, {} places, {} documents",
                iec(index.bytes),
                si(self.scan.words, ""),
                si(self.scan.positions, ""),
                index.documents,
            ),
        )?;
        if index.editions > 1.0 {
            row(
                f,
                "",
                format_args!(
                    "{DIM}the text went in {:.1} times to make it this large{DIM:#}",
                    index.editions
                ),
            )?;
        }
        row(
            f,
            "region",
            format_args!(
                "{}, of which {} hold pages; {}",
                iec(index.region_bytes),
                iec(index.present_bytes),
                self.folios
            ),
        )?;
        match self.route {
            Route::Nodes { home, away } => {
                row(f, "route", format_args!("node {home} to node {away} and back"))?;
            }
            Route::Frames { node } => {
                let why = if self.memory_nodes > 1 {
                    "the other nodes have no room for the region"
                } else {
                    "this machine has one node with memory"
                };
                row(f, "route", format_args!("frame to frame on node {node}: {why}"))?;
            }
        }
        if self.user_mode_only {
            row(f, "rights", "user-mode-only: no system call was given the index's memory")?;
        }
        Ok(())
    }

    fn rates(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{BOLD}{:<26}{:>12}{:>10}{:>9}{BOLD:#}", "move", "moved", "time", "GB/s")?;
        let ways = [("pageferry", &self.moved), ("one folio at a time", &self.one_folio_at_a_time)];
        for (name, moved) in ways {
            let (bytes, time) = (si(moved.bytes, "B"), format!("{:.2} s", moved.seconds));
            write!(f, "  {name:<24}{bytes:>12}{time:>10}{:>9.2}", moved.gb_per_s)?;
            if let (Some(ratio), true) = (self.ratio, name == "pageferry") {
                write!(f, "   {BOLD}{ratio:.1} x{BOLD:#}")?;
            }
            writeln!(f)?;
        }
        for stayed in &self.moved.stayed {
            let (bytes, because) = (iec(stayed.bytes), &stayed.because);
            writeln!(f, "  {DIM}did not move: {bytes}, {because} (all moves together){DIM:#}")?;
        }
        if self.moved.stayed.is_empty() && self.moved.moves > 0 {
            writeln!(f, "  {DIM}{} moves, every page moved{DIM:#}", self.moved.moves)?;
        }
        Ok(())
    }

    fn latencies(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (name, felt) in [("queries", &self.queries), ("updates", &self.updates)] {
            let title = format!("{name} felt");
            writeln!(
                f,
                "\n{BOLD}{title:<26}{:>10}{:>10}{:>10}{:>10}{:>12}{BOLD:#}",
                "p50", "p99", "p99.9", "max", name
            )?;
            for (phase, latency) in [
                ("nothing moves", felt.not_moving),
                ("pageferry moves it", felt.moving),
                ("moved folio by folio", felt.one_folio_at_a_time),
            ] {
                write!(f, "  {phase:<24}")?;
                match latency {
                    None => writeln!(f, "{:>10}", "none")?,
                    Some(l) => {
                        for us in [l.p50_us, l.p99_us, l.p999_us, l.max_us] {
                            write!(f, "{:>10}", time(us))?;
                        }
                        writeln!(f, "{:>12}", l.operations)?;
                    }
                }
            }
        }
        if self.updates_without_room > 0 {
            let count = self.updates_without_room;
            writeln!(f, "  {DIM}{count} documents were not added: the region was full{DIM:#}")?;
        }
        writeln!(f)
    }

    fn proofs(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let verdict = |f: &mut Formatter<'_>, differing: u64| match differing {
            0 => writeln!(f, "{GREEN}none differs{GREEN:#}"),
            n => writeln!(f, "{RED}{n} differ{RED:#}"),
        };
        write!(f, "{BOLD}{:<10}{BOLD:#} ", "answers")?;
        write!(f, "{} compared with an index that was not moved: ", self.answers.compared)?;
        verdict(f, self.answers.differing)?;
        if let Some(difference) = &self.answers.first_difference {
            row(f, "", difference)?;
        }
        let scan = &self.scan;
        write!(f, "{BOLD}{:<10}{BOLD:#} ", "at the end")?;
        write!(
            f,
            "{} words with {} places compared: ",
            si(scan.words, ""),
            si(scan.positions, "")
        )?;
        verdict(f, scan.differing)?;
        let Frames { sampled, changed, hidden } = self.physical_pages;
        if hidden {
            row(f, "pages", "physical addresses are shown to CAP_SYS_ADMIN only (try as root)")?;
        } else {
            let text = "looked at had another physical address after a move";
            row(f, "pages", format_args!("{changed} of {sampled} {text}"))?;
        }
        if self.cancelled {
            row(f, "cancelled", "by the user; what was done until then is reported")?;
        }
        Ok(())
    }
}

/// A time with a unit that suits it.
fn time(us: f64) -> String {
    match us {
        us if us < 99.95 => format!("{us:.1} us"),
        us if us < 9999.5 => format!("{us:.0} us"),
        us if us < 999_950.0 => format!("{:.1} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_unit_that_suits_it() {
        let written = [0.94, 99.9, 1234.4, 45_600.0, 2_500_000.0].map(time);
        assert_eq!(written, ["0.9 us", "99.9 us", "1234 us", "45.6 ms", "2.50 s"]);
    }

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
