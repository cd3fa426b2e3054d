//! What a bench run found, as it is written to JSON; every other output is made from it.
//!
//! The field names are a contract: a field may be added within a version, and
//! [`SCHEMA_VERSION`] grows when one is renamed, removed or given another meaning.
//! `docs/bench.schema.json` is generated from these types (`pageferry bench --schema`) and a
//! test keeps it so. GB are 10^9 bytes, GiB are 2^30.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;

/// Version of the format.
pub(super) const SCHEMA_VERSION: u32 = 1;

/// Everything that one run of `pageferry bench` found.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct Results {
    /// Version of this format.
    pub(super) schema_version: u32,
    /// Version of pageferry.
    pub(super) pageferry_version: String,
    /// Whether every scenario asked for ran to its end.
    pub(super) complete: bool,
    /// Where it ran.
    pub(super) machine: MachineInfo,
    /// How it was measured.
    pub(super) settings: Settings,
    /// One for each configuration.
    pub(super) runs: Vec<Run>,
    /// The headline figures by name; one that was not measured is absent.
    pub(super) ratios: BTreeMap<String, f64>,
    /// The headline figures that have a target, and whether they reach it.
    pub(super) targets: Vec<Target>,
    /// Configurations that are slower than what they are compared with.
    pub(super) losses: Vec<Loss>,
    /// What was not measured, and why.
    pub(super) skipped: Vec<Skipped>,
    /// What went wrong: content that was not what had been written, moves that failed.
    pub(super) failures: Vec<String>,
}

/// The machine.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct MachineInfo {
    /// The CPU's name.
    pub(super) cpu_model: String,
    /// CPUs that this process may use.
    pub(super) cpus: usize,
    /// NUMA nodes with memory.
    pub(super) nodes: usize,
    /// Release of the running kernel.
    pub(super) kernel: String,
    /// Memory of all nodes, in bytes.
    pub(super) memory_bytes: u64,
    /// The system's setting of transparent huge pages: `always`, `madvise` or `never`.
    pub(super) thp: String,
    /// How the process may use userfaultfd.
    pub(super) rights: String,
    /// What tells the time (`tsc` is read without a system call).
    pub(super) clocksource: String,
}

/// How it was measured.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct Settings {
    /// `smoke`, `quick` or `full`.
    pub(super) mode: String,
    /// Scenarios asked for.
    pub(super) scenarios: Vec<String>,
    /// Bytes of each region that is moved.
    pub(super) region_bytes: u64,
    /// Measured rounds, at most; one more, the first, is thrown away.
    pub(super) rounds: usize,
    /// Seconds of each latency measurement in each round.
    pub(super) seconds: f64,
    /// Seed of the content that is verified.
    pub(super) seed: u64,
    /// Time between two readings of the clock with nothing in between, in nanoseconds (median):
    /// it is part of every access latency, and is not subtracted.
    pub(super) clock_overhead_ns: f64,
    /// The copy kernel that the engine chose for this machine.
    pub(super) default_engine: String,
    /// From the first measurement to the last, in seconds.
    pub(super) elapsed_s: f64,
}

/// Smallest, middle and largest value of the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
pub(super) struct Spread {
    /// Smallest.
    pub(super) min: f64,
    /// Median.
    pub(super) median: f64,
    /// Largest.
    pub(super) max: f64,
}

/// Quantiles of a duration, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
pub(super) struct Quantiles {
    /// Half did not take longer.
    pub(super) p50: f64,
    /// 99 of 100 did not take longer.
    pub(super) p99: f64,
    /// 999 of 1000 did not take longer.
    pub(super) p999: f64,
    /// The longest.
    pub(super) max: f64,
    /// How many there were.
    pub(super) count: u64,
}

/// A point of a percentile curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
pub(super) struct Point {
    /// Fraction of the accesses, 0 to 1.
    pub(super) quantile: f64,
    /// They did not take longer than this, in microseconds.
    pub(super) us: f64,
}

/// What a kind of access felt.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub(super) struct Felt {
    /// Latency of one access, the clock's overhead included.
    pub(super) latency_us: Quantiles,
    /// The whole distribution.
    pub(super) curve: Vec<Point>,
    /// Accesses per second, all threads of the kind together.
    pub(super) accesses_per_s: f64,
    /// Share of the threads' time that went by in accesses of more than 20 us, 0 to 1, whatever held
    /// them up: a page in the air, the page-table work of the move, or `preempted_share`.
    pub(super) stalled_share: f64,
    /// The part of `stalled_share` in which another thread had the accessing thread's CPU, which
    /// a move costs as any other work does: compare with that of `feel_burn`.
    pub(super) preempted_share: f64,
}

/// Events for each GiB moved or copied, in the whole process.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
pub(super) struct Counters {
    /// CPU seconds by getrusage(2), which checks `cpu_s_per_gib`.
    pub(super) rusage_cpu_s: f64,
    /// Page faults without I/O.
    pub(super) minor_faults: f64,
    /// Page faults with I/O.
    pub(super) major_faults: f64,
    /// Context switches because a thread waited.
    pub(super) voluntary_switches: f64,
    /// Context switches because a thread's turn was over.
    pub(super) involuntary_switches: f64,
    /// TLB shootdown interrupts, system-wide; null where the kernel does not count them.
    pub(super) tlb_shootdowns: Option<f64>,
}

/// One configuration and what was measured.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct Run {
    /// What was measured; see docs/bench-schema.md for the names.
    pub(super) scenario: String,
    /// Size of the folios, in bytes; null where nothing is moved.
    pub(super) folio_bytes: Option<u64>,
    /// `live` or `frozen`; where the engine chose, what it chose.
    pub(super) order: Option<String>,
    /// `conducted` or `shared`; where the engine chose, what it chose.
    pub(super) division: Option<String>,
    /// `recycled`, `fresh` or `kernel_copy`.
    pub(super) frames: Option<String>,
    /// Copy engine or kernel.
    pub(super) engine: String,
    /// Threads that move or copy.
    pub(super) threads: usize,
    /// Upper bound of a batch, or length of one copy.
    pub(super) batch_bytes: Option<u64>,
    /// The stall budget, in microseconds; null where it was left alone.
    pub(super) stall_budget_us: Option<f64>,
    /// Throughput; null where none was measured.
    pub(super) gb_per_s: Option<Spread>,
    /// Latency of every access of readers and writers together; null without them.
    pub(super) stall_us: Option<Quantiles>,
    /// What readers felt.
    pub(super) readers: Option<Felt>,
    /// What writers felt.
    pub(super) writers: Option<Felt>,
    /// How long pages were away, from detach to attach.
    pub(super) hole_us: Option<Quantiles>,
    /// From the call until the first folio was in place: the median.
    pub(super) first_folio_us: Option<f64>,
    /// The whole call, in microseconds: the median. For moves of one folio.
    pub(super) call_us: Option<f64>,
    /// CPU seconds for each GiB moved, all threads, by the engine's own account.
    pub(super) cpu_s_per_gib: Option<f64>,
    /// Events for each GiB.
    pub(super) per_gib: Option<Counters>,
    /// Measured rounds.
    pub(super) rounds: usize,
    /// Whether every word was read back and was right; null where no content was moved.
    pub(super) verified: Option<bool>,
    /// What else is to be known.
    pub(super) note: Option<String>,
}

impl Run {
    /// A run in which nothing was measured yet.
    pub(super) fn new(scenario: &str) -> Self {
        Self {
            scenario: scenario.to_owned(),
            folio_bytes: None,
            order: None,
            division: None,
            frames: None,
            engine: String::new(),
            threads: 0,
            batch_bytes: None,
            stall_budget_us: None,
            gb_per_s: None,
            stall_us: None,
            readers: None,
            writers: None,
            hole_us: None,
            first_folio_us: None,
            call_us: None,
            cpu_s_per_gib: None,
            per_gib: None,
            rounds: 0,
            verified: None,
            note: None,
        }
    }

    /// Median throughput.
    pub(super) fn rate(&self) -> Option<f64> {
        self.gb_per_s.map(|spread| spread.median)
    }
}

/// A figure to reach.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct Target {
    /// Name of the ratio.
    pub(super) ratio: String,
    /// What it means, in words.
    pub(super) meaning: String,
    /// Its value; null if it was not measured.
    pub(super) value: Option<f64>,
    /// The bound.
    pub(super) target: f64,
    /// Whether the value must be at least or at most the bound.
    pub(super) bound: Bound,
    /// Whether it is reached.
    pub(super) verdict: Verdict,
}

/// Direction of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Bound {
    /// The value must not be below.
    AtLeast,
    /// The value must not be above.
    AtMost,
}

/// Whether a target is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    /// It is.
    Met,
    /// It is not, but the spreads of both sides overlap and the medians differ by less than 5 %:
    /// more rounds could tell.
    WithinNoise,
    /// It is not.
    Missed,
    /// There is no value.
    NotMeasured,
}

/// A configuration that is slower than what it is compared with.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct Loss {
    /// The configuration.
    pub(super) what: String,
    /// What it is compared with.
    pub(super) against: String,
    /// Its throughput divided by the other's: below 1.
    pub(super) ratio: f64,
}

/// Something that was not measured.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct Skipped {
    /// What.
    pub(super) what: String,
    /// Why.
    pub(super) because: String,
}

/// The JSON Schema of [`Results`].
pub(super) fn json_schema() -> schemars::Schema {
    schemars::schema_for!(Results)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_schema_in_the_docs_is_the_one_of_the_types() {
        let written = include_str!("../../../../docs/bench.schema.json");
        let written: serde_json::Value = serde_json::from_str(written).expect("JSON");
        let ours = serde_json::to_value(super::json_schema()).expect("a schema");
        assert!(
            written == ours,
            "write it anew: pageferry bench --schema > docs/bench.schema.json"
        );
    }
}
