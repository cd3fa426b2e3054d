//! Numbers out of samples: spreads, quantiles, counters per GiB.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use pageferry::Holes;
use pageferry_sys::sched::Moment;
use pageferry_sys::usage::{self, Usage};

use super::schema::{Counters, Point, Quantiles, Spread};

/// Bytes of a GiB.
pub(super) const GIB: f64 = (1u64 << 30) as f64;
/// An access longer than this is counted as a stall: many times a miss in memory behind CXL
/// (hundreds of ns), and less than a page-table call with two CPUs in the process (20 us).
pub(super) const STALL: Duration = Duration::from_micros(20);

/// GB/s, or 0 when no time passed.
pub(super) fn gb_per_s(bytes: u64, wall: Duration) -> f64 {
    let seconds = wall.as_secs_f64();
    if seconds > 0.0 { bytes as f64 / 1e9 / seconds } else { 0.0 }
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Microseconds.
pub(super) fn us(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// The middle value, of an even number the mean of the two; `None` of nothing.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get((sorted.len() - 1) / 2)?;
    Some((lower + upper) / 2.0)
}

/// The spread of values; `None` of nothing.
pub(super) fn spread(values: &[f64]) -> Option<Spread> {
    let median = median(values)?;
    let min = values.iter().copied().fold(f64::INFINITY, f64::min);
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    Some(Spread { min, median, max })
}

/// Latencies from 1 ns to 2 minutes, to two digits. Recording allocates nothing.
#[derive(Clone, Debug)]
pub(super) struct Latencies {
    histogram: Histogram<u64>,
    /// Nanoseconds in accesses longer than [`STALL`].
    stalled_ns: u64,
    /// Those of them in which the thread had lost its CPU.
    preempted_ns: u64,
    /// Nanoseconds that the threads spent making accesses, their own work in between included.
    threads_ns: u64,
}

impl Latencies {
    /// No latencies yet.
    pub(super) fn new() -> anyhow::Result<Self> {
        let histogram = Histogram::new_with_bounds(1, 120_000_000_000, 2)?;
        Ok(Self { histogram, stalled_ns: 0, preempted_ns: 0, threads_ns: 0 })
    }

    /// Records one.
    #[inline]
    pub(super) fn record(&mut self, latency: Duration) {
        let ns = ns(latency);
        self.histogram.saturating_record(ns);
        if latency > STALL {
            self.stalled_ns = self.stalled_ns.saturating_add(ns);
        }
    }

    /// Adds holes, at the resolution of their histogram.
    pub(super) fn record_holes(&mut self, holes: &Holes) {
        let count = holes.count();
        for rank in 0..count {
            self.record(holes.quantile((rank as f64 + 0.5) / count as f64));
        }
    }

    /// Adds all of another.
    pub(super) fn add(&mut self, other: &Self) {
        // Both have the same bounds, so that nothing can be out of range.
        let added = self.histogram.add(&other.histogram);
        debug_assert!(added.is_ok());
        self.stalled_ns = self.stalled_ns.saturating_add(other.stalled_ns);
        self.preempted_ns = self.preempted_ns.saturating_add(other.preempted_ns);
        self.threads_ns = self.threads_ns.saturating_add(other.threads_ns);
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// Share of the threads' time in accesses longer than [`STALL`], whatever held them up.
    pub(super) fn stalled_share(&self) -> f64 {
        self.stalled_ns as f64 / self.threads_ns.max(1) as f64
    }

    /// The part of [`Latencies::stalled_share`] in which another thread had the CPU.
    pub(super) fn preempted_share(&self) -> f64 {
        self.preempted_ns as f64 / self.threads_ns.max(1) as f64
    }

    fn at(&self, quantile: f64) -> f64 {
        let ns = self.histogram.value_at_quantile(quantile).min(self.histogram.max());
        ns as f64 / 1e3
    }

    /// The quantiles; `None` of nothing.
    pub(super) fn quantiles(&self) -> Option<Quantiles> {
        (self.count() > 0).then(|| Quantiles {
            p50: self.at(0.5),
            p99: self.at(0.99),
            p999: self.at(0.999),
            max: self.at(1.0),
            count: self.count(),
        })
    }

    /// The distribution, denser towards its end, up to what the number of samples can tell.
    pub(super) fn curve(&self) -> Vec<Point> {
        let mut quantiles = vec![0.0, 0.25, 0.5, 0.75];
        let mut tail = 0.1;
        while tail * self.count() as f64 >= 10.0 && tail > 1e-8 {
            quantiles.extend([1.0 - tail, 1.0 - tail / 2.0, 1.0 - tail / 5.0]);
            tail /= 10.0;
        }
        let point = |quantile| Point { quantile, us: self.at(quantile) };
        let mut points: Vec<_> = quantiles.into_iter().map(point).collect();
        points.push(point(1.0));
        points
    }
}

/// Times the accesses of one thread, which makes it.
#[derive(Debug)]
pub(super) struct Timer {
    latencies: Latencies,
    began: Instant,
    /// After the last long access.
    last: Moment,
}

impl Timer {
    /// Begins now.
    pub(super) fn new() -> anyhow::Result<Self> {
        Ok(Self { latencies: Latencies::new()?, began: Instant::now(), last: Moment::now() })
    }

    /// Times an access.
    #[inline]
    pub(super) fn time<T>(&mut self, access: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = access();
        let latency = began.elapsed();
        self.latencies.record(latency);
        if latency > STALL {
            self.long(latency);
        }
        result
    }

    /// Asks what held up an access. If the thread waited for a page as well, or lost its CPU in a
    /// page fault that it then waited in, all of it counts as waiting.
    #[cold]
    fn long(&mut self, latency: Duration) {
        // Losing the CPU makes an access long, so it happened in this one, or in the few
        // instructions between accesses since the last that was.
        let preempted = self.last.preempted_for().min(latency);
        self.latencies.preempted_ns = self.latencies.preempted_ns.saturating_add(ns(preempted));
        self.last = Moment::now();
    }

    /// What was timed; the thread makes no more accesses.
    pub(super) fn end(mut self) -> Latencies {
        self.latencies.threads_ns = ns(self.began.elapsed());
        self.latencies
    }
}

/// A reading of everything that is counted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    usage: Usage,
    tlb: Option<u64>,
}

/// What was counted between two readings, summed over several such intervals.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counted {
    usage: Usage,
    tlb: Option<u64>,
}

impl Reading {
    /// Reads. Costs a parse of `/proc/interrupts`, so it stands outside of timed sections.
    pub(super) fn now() -> Self {
        Self { tlb: usage::tlb_shootdowns(), usage: Usage::of_process() }
    }

    /// What was counted since.
    pub(super) fn elapsed(&self) -> Counted {
        let usage = Usage::of_process().since(&self.usage);
        let tlb = usage::tlb_shootdowns().zip(self.tlb).map(|(now, then)| now.saturating_sub(then));
        Counted { usage, tlb }
    }
}

impl Counted {
    /// CPU time of the process.
    pub(super) fn cpu(&self) -> Duration {
        Duration::from_nanos(self.usage.cpu_ns())
    }

    /// Adds another interval.
    pub(super) fn add(&mut self, other: &Self) {
        let (a, b) = (&mut self.usage, &other.usage);
        a.user_ns += b.user_ns;
        a.system_ns += b.system_ns;
        a.minor_faults += b.minor_faults;
        a.major_faults += b.major_faults;
        a.voluntary_switches += b.voluntary_switches;
        a.involuntary_switches += b.involuntary_switches;
        if let Some(tlb) = other.tlb {
            *self.tlb.get_or_insert(0) += tlb;
        }
    }

    /// Events for each GiB; `None` when nothing was moved.
    pub(super) fn per_gib(&self, bytes: u64) -> Option<Counters> {
        let gib = bytes as f64 / GIB;
        let per = |n: u64| n as f64 / gib;
        (bytes > 0).then(|| Counters {
            rusage_cpu_s: self.usage.cpu_ns() as f64 / 1e9 / gib,
            minor_faults: per(self.usage.minor_faults),
            major_faults: per(self.usage.major_faults),
            voluntary_switches: per(self.usage.voluntary_switches),
            involuntary_switches: per(self.usage.involuntary_switches),
            tlb_shootdowns: self.tlb.map(per),
        })
    }
}

/// Median time between two readings of the clock, in nanoseconds, per reading.
pub(super) fn clock_overhead_ns() -> f64 {
    const READINGS: u32 = 100;
    let per_reading: Vec<f64> = (0..51)
        .map(|_| {
            let start = Instant::now();
            for _ in 1..READINGS {
                std::hint::black_box(Instant::now());
            }
            start.elapsed().as_nanos() as f64 / f64::from(READINGS)
        })
        .collect();
    median(&per_reading).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_spread_has_the_ends_and_the_middle() {
        let spread = spread(&[2.0, 9.0, 4.0]).expect("values");
        assert_eq!((spread.min, spread.median, spread.max), (2.0, 4.0, 9.0));
    }

    #[test]
    fn quantiles_are_those_of_what_was_recorded_to_two_digits() {
        let mut latencies = Latencies::new().expect("bounds");
        for us in 1..=1000 {
            latencies.record(Duration::from_micros(us));
        }
        let found = latencies.quantiles().expect("some");
        assert!((found.p50 - 500.0).abs() < 5.0, "{found:?}");
        assert!((found.p99 - 990.0).abs() < 10.0, "{found:?}");
        assert!((found.max - 1000.0).abs() < 10.0, "{found:?}");
        assert_eq!(found.count, 1000);
        let long: u64 = (21..=1000).sum();
        assert_eq!(latencies.stalled_ns, long * 1000);
    }

    #[test]
    fn an_access_that_waits_is_long_but_not_preempted() {
        let mut timer = Timer::new().expect("bounds");
        // Sleeping gives the CPU up, as a page fault that waits does.
        timer.time(|| std::thread::sleep(STALL * 50));
        let latencies = timer.end();
        assert_eq!(latencies.count(), 1);
        let share = latencies.stalled_share();
        assert!(0.0 < share && share <= 1.0, "{share}");
        assert_eq!(latencies.preempted_share(), 0.0);
    }

    #[test]
    fn a_curve_rises_and_ends_at_the_longest() {
        let mut latencies = Latencies::new().expect("bounds");
        for ns in 1..=100_000 {
            latencies.record(Duration::from_nanos(ns));
        }
        let curve = latencies.curve();
        assert!(curve.is_sorted_by(|a, b| a.quantile <= b.quantile && a.us <= b.us), "{curve:?}");
        assert_eq!(curve.last().map(|p| p.quantile), Some(1.0));
    }

    #[test]
    fn throughput_is_in_powers_of_ten() {
        assert!((gb_per_s(2_000_000_000, Duration::from_secs(1)) - 2.0).abs() < 1e-9);
        assert_eq!(gb_per_s(1, Duration::ZERO), 0.0);
    }
}
