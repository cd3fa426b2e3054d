//! What will be measured: the options, checked against the machine before anything runs.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use pageferry_sys::{affinity, cgroup, usage};

use crate::output::Problem;
use crate::size::{parse_size, size as human};

/// A part of the bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Scenario {
    /// The best copy rate of all CPUs between huge pages
    Roofline,
    /// Every copy kernel, by threads and length of a copy
    Copy,
    /// Moves by folio size, order, division, frames, threads and batch, and exchanges, beside the
    /// sequential move
    Moves,
    /// Time to the first folio, by batch size
    FirstFolio,
    /// What readers and writers feel, by stall budget, beside idle and burnt CPU
    Feel,
    /// Default moves beside sequential ones: on one CPU, with busy CPUs, of a single folio
    NeverSlower,
    /// The engine's own memory, and its allocations per folio
    Memory,
}

impl Scenario {
    /// All, in the order in which they run. Memory is first: later ones grow the heap.
    pub(super) const ALL: [Self; 7] = [
        Self::Memory,
        Self::Roofline,
        Self::Copy,
        Self::Moves,
        Self::FirstFolio,
        Self::NeverSlower,
        Self::Feel,
    ];

    /// The name on the command line.
    pub(super) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Seconds that it may take in a quick run; together less than a minute.
    fn quick_seconds(self) -> u64 {
        match self {
            Self::Roofline => 1,
            Self::Copy => 5,
            Self::Moves => 18,
            Self::FirstFolio => 4,
            Self::Feel => 16,
            Self::NeverSlower => 6,
            Self::Memory => 2,
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "GB are 10^9 bytes. The JSON format is described in docs/bench-schema.md.")]
pub(crate) struct BenchArgs {
    /// End within a minute on two CPUs: fewer sizes and rounds
    #[arg(long)]
    quick: bool,

    /// Only see that everything works, in seconds: the figures mean nothing
    #[arg(long, hide = true, conflicts_with = "quick")]
    smoke: bool,

    /// Write the results as JSON to FILE; to stdout, instead of the tables, if FILE is - or left out
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub(super) json: Option<PathBuf>,

    /// Write a page with charts to FILE, all in one
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,

    /// Run these parts only
    #[arg(long, value_enum, value_name = "SCENARIO", value_delimiter = ',', num_args = 1..)]
    only: Vec<Scenario>,

    /// Measure the kernel's migration between two nodes instead: folios of 4K to 2M, by the kernel
    /// as it is, 1 to 16 threads, 1 to 16 DMA channels (docs/kernel.md). Takes root; THP settings
    /// and module parameters are changed meanwhile and put back
    #[arg(long, conflicts_with_all = ["quick", "smoke", "html", "only", "seconds"])]
    pub(super) kernel_matrix: bool,

    /// The node from which --kernel-matrix moves [default: the first with memory]
    #[arg(long, value_name = "NODE", requires = "kernel_matrix")]
    pub(super) from: Option<u32>,

    /// The node to which --kernel-matrix moves [default: the next with memory]
    #[arg(long, value_name = "NODE", requires = "kernel_matrix")]
    pub(super) to: Option<u32>,

    /// Size of each region that is moved, such as 512M [default: what fits; 1G of the matrix]
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    pub(super) size: Option<u64>,

    /// Seconds of each latency measurement, each round
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,

    /// Measured rounds
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) rounds: Option<u32>,

    /// Print the JSON Schema of the results and end
    #[arg(long, exclusive = true)]
    pub(super) schema: bool,
}

/// How thorough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Smoke,
    Quick,
    Full,
}

/// What will be measured.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) mode: Mode,
    pub(super) scenarios: Vec<Scenario>,
    /// Bytes of a region, a multiple of [`REGION_STEP`].
    pub(super) region: usize,
    /// Measured rounds.
    pub(super) rounds: usize,
    /// Of each latency measurement.
    pub(super) feel: Duration,
    /// That a measurement of throughput should take.
    pub(super) target: Duration,
    /// CPUs that this process may use.
    pub(super) cpus: Vec<u32>,
    /// Threads that read, and as many that write.
    pub(super) accessors: usize,
    /// Moves of one folio in each round.
    pub(super) singles: usize,
    /// Batch sizes of moves of base pages.
    pub(super) batches: Vec<usize>,
    /// Batch sizes of the first-folio curve.
    pub(super) curve: Vec<usize>,
}

/// Regions are a whole number of this: eight huge folios.
pub(super) const REGION_STEP: usize = 16 << 20;
/// A region of a quick or full run must not fit any last-level cache: below this it would.
const SMALLEST: u64 = 64 << 20;

impl Mode {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Smoke => "smoke",
            Self::Quick => "quick",
            Self::Full => "full",
        }
    }

    /// Bytes of a region if memory is plenty, and below which it makes no sense.
    fn region(self) -> (u64, u64) {
        match self {
            Self::Smoke => (REGION_STEP as u64, REGION_STEP as u64),
            Self::Quick => (256 << 20, SMALLEST),
            Self::Full => (1 << 30, SMALLEST),
        }
    }
}

impl Plan {
    /// Checks the options against the machine.
    pub(super) fn new(args: &BenchArgs) -> Result<Self, Problem> {
        let mode = match (args.smoke, args.quick) {
            (true, _) => Mode::Smoke,
            (false, true) => Mode::Quick,
            (false, false) => Mode::Full,
        };
        let cpus = affinity::allowed_cpus();
        let region = region(mode, args.size, free())?;
        let seconds = args.seconds.unwrap_or(match mode {
            Mode::Smoke => 0.01,
            Mode::Quick => 0.25,
            Mode::Full => 1.0,
        });
        if !(0.001..=600.0).contains(&seconds) {
            return Err(Problem::bad_input(
                format!("--seconds {seconds} cannot be used"),
                "a latency measurement takes between 0.001 and 600 seconds each round",
                "give a number in that range, such as 1",
            ));
        }
        for file in [&args.json, &args.html].into_iter().flatten() {
            check_writable(file)?;
        }
        let ordered = Scenario::ALL.into_iter();
        let chosen = ordered.filter(|s| args.only.is_empty() || args.only.contains(s)).collect();
        let (rounds, target, singles) = match mode {
            Mode::Smoke => (1, 1, 3),
            Mode::Quick => (5, 60, 60),
            Mode::Full => (9, 120, 200),
        };
        let kib = |sizes: &[usize]| sizes.iter().map(|kib| kib << 10).collect::<Vec<_>>();
        Ok(Self {
            mode,
            scenarios: chosen,
            region,
            rounds: args.rounds.map_or(rounds, |n| n as usize),
            feel: Duration::from_secs_f64(seconds),
            target: Duration::from_millis(target),
            // One reader and one writer for two CPUs; a few for many, so that they disturb the
            // move like a program and not like a load generator.
            accessors: (cpus.len() / 4).clamp(1, 8),
            cpus,
            singles,
            batches: match mode {
                Mode::Smoke => kib(&[2048]),
                Mode::Quick => kib(&[128, 512, 2048]),
                Mode::Full => kib(&[16, 64, 128, 256, 512, 1024, 2048]),
            },
            curve: match mode {
                Mode::Smoke => kib(&[4, 2048]),
                Mode::Quick | Mode::Full => kib(&[4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]),
            },
        })
    }

    /// How long a scenario may take; `None` without a limit.
    pub(super) fn limit(&self, scenario: Scenario) -> Option<Duration> {
        (self.mode == Mode::Quick).then(|| Duration::from_secs(scenario.quick_seconds()))
    }

    /// Whether all combinations are wanted.
    pub(super) fn is_full(&self) -> bool {
        self.mode == Mode::Full
    }
}

/// Bytes that the bench may take: free memory, and what the control group leaves.
fn free() -> u64 {
    let group = cgroup::Headroom::default().look().unwrap_or(u64::MAX);
    usage::available_bytes().unwrap_or(u64::MAX).min(group)
}

/// What is there at once, in regions: one for each folio size, one of half of it for the moves
/// without a promise and two of an eighth for the exchanges of each, two copy buffers, fresh frames
/// of a whole move.
const REGIONS_AT_ONCE: u64 = 7;

/// Bytes that a run with regions of `region` bytes needs, with spare frames and the program.
fn needed(region: u64) -> u64 {
    region.saturating_mul(REGIONS_AT_ONCE).saturating_add(192 << 20)
}

fn region(mode: Mode, asked: Option<u64>, free: u64) -> Result<usize, Problem> {
    let (usual, least) = mode.region();
    let step = REGION_STEP as u64;
    let least = if asked.is_some() { step } else { least };
    let largest = (free.saturating_sub(needed(0)) / REGIONS_AT_ONCE) / step * step;
    if largest < least {
        return Err(Problem::bad_input(
            format!("there is not enough free memory for regions of {}", human(least)),
            format!("{} are needed, {} are free", human(needed(least)), human(free)),
            "free some memory, raise the limit of the control group, or give a smaller --size",
        ));
    }
    let bytes = match asked {
        None => usual.min(largest),
        Some(bytes) if bytes < step => {
            return Err(Problem::bad_input(
                format!("--size {bytes} is too small"),
                format!("a region has at least {}, eight huge folios", human(step)),
                format!(
                    "give at least {}; {} or more to defeat caches",
                    human(step),
                    human(SMALLEST)
                ),
            ));
        }
        Some(bytes) if bytes > largest => {
            return Err(Problem::bad_input(
                format!("--size {} does not fit", human(bytes)),
                format!("it needs {} in all, {} are free", human(needed(bytes)), human(free)),
                format!("give at most {}", human(largest)),
            ));
        }
        Some(bytes) => bytes / step * step,
    };
    usize::try_from(bytes).map_err(|_| {
        Problem::bad_input("--size is too large", "it exceeds the address space", "give less")
    })
}

/// That an output can be written must be known before minutes are spent on its content.
pub(super) fn check_writable(file: &std::path::Path) -> Result<(), Problem> {
    if file.as_os_str() == "-" {
        return Ok(());
    }
    let is_new = !file.exists();
    let opened = std::fs::OpenOptions::new().append(true).create(true).open(file);
    if is_new && opened.is_ok() {
        // Nothing to write yet; a run that fails leaves no empty file behind.
        let _ = std::fs::remove_file(file);
    }
    opened.map(drop).map_err(|error| {
        Problem::bad_input(
            format!("cannot write {}", file.display()),
            error.to_string(),
            "name a file in a directory that exists and that you may write to",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_region_adapts_to_free_memory_unless_asked_for() {
        assert_eq!(region(Mode::Quick, None, 64 * GIB).ok(), Some(256 << 20));
        let tight = region(Mode::Quick, None, GIB).expect("a smaller one fits");
        assert!(
            (64 << 20..256 << 20).contains(&tight) && tight.is_multiple_of(REGION_STEP),
            "{tight}"
        );
        assert!(region(Mode::Quick, None, GIB / 4).is_err());
        assert_eq!(region(Mode::Full, Some(40 << 20), 64 * GIB).ok(), Some(32 << 20));
    }

    #[test]
    fn a_size_that_does_not_fit_is_refused_with_the_largest_that_does() {
        let problem = region(Mode::Full, Some(8 * GIB), 8 * GIB).expect_err("too large");
        assert!(problem.remedy.contains("at most"), "{}", problem.remedy);
        let problem = region(Mode::Full, Some(4096), 8 * GIB).expect_err("too small");
        assert!(problem.what.contains("too small"), "{}", problem.what);
    }

    #[test]
    fn the_parts_of_a_quick_run_fit_a_minute() {
        let sum: u64 = Scenario::ALL.iter().map(|s| s.quick_seconds()).sum();
        assert!(sum <= 55, "{sum} s");
    }
}
