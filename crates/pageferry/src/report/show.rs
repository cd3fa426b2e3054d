//! A report in words: [`Display`](fmt::Display) for people, [`Debug`](fmt::Debug) for tests and
//! logs. Neither grows with the number of pages: a report of scattered pages has as many ranges
//! as pages.

use super::{Division, Holes, Order, Outcome, Report};
use std::fmt::{self, Write as _};
use std::ops::Range;
use std::time::Duration;

/// Ranges that `Debug` shows before it says how many more there are.
const RANGES_SHOWN: usize = 4;
const GIB: f64 = (1u64 << 30) as f64;

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Live => "live",
            Self::Frozen => "frozen",
        })
    }
}

impl fmt::Display for Division {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Conducted => "conducted",
            Self::Shared => "shared",
        })
    }
}

/// A few lines, without a line break at the end: what was moved and how fast, what became of the
/// pages, how it was done, how long pages were away, what it cost. Rates are in 10^9 bytes per
/// second.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cancelled = if self.cancelled { "cancelled: " } else { "" };
        write!(f, "{cancelled}moved {} in {}", Bytes(self.bytes_moved), Time(self.elapsed))?;
        let seconds = self.elapsed.as_secs_f64();
        if self.bytes_moved > 0 && seconds > 0.0 {
            write!(f, ", {:.2} GB/s", self.bytes_moved as f64 / 1e9 / seconds)?;
        }
        if let Some(first) = self.first_folio {
            write!(f, ", first folio after {}", Time(first))?;
        }
        f.write_str("\n  pages: ")?;
        for (i, (outcome, bytes)) in self.by_outcome().into_iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            write!(f, "{comma}{} {outcome}", Bytes(bytes))?;
        }
        if self.pages.is_empty() {
            f.write_str("none")?;
        }
        f.write_str("\n  how:   ")?;
        let batches = [(self.batches_frozen, Order::Frozen), (self.batches_live, Order::Live)];
        for (count, order) in batches.into_iter().filter(|(count, _)| *count > 0) {
            let plural = if count == 1 { "" } else { "es" };
            write!(f, "{count} batch{plural} {order}, ")?;
        }
        write!(f, "{}, copied by {}", self.division, self.engine)?;
        write!(f, "; {} pages repaired, {} fallbacks", self.repairs, self.fallbacks)?;
        let holes = &self.holes;
        if holes.count() > 0 {
            let (p50, p99) = (Time(holes.quantile(0.5)), Time(holes.quantile(0.99)));
            let (count, longest) = (holes.count(), Time(holes.longest));
            write!(f, "\n  holes: {count}, p50 {p50}, p99 {p99}, max {longest}")?;
        }
        let cpu = self.cpu_time();
        write!(f, "\n  CPU:   {}", Time(cpu))?;
        if self.bytes_moved > 0 {
            let per_gib = cpu.as_secs_f64() / (self.bytes_moved as f64 / GIB);
            write!(f, ", {per_gib:.3} s/GiB")?;
        }
        Ok(())
    }
}

/// Every field; of the ranges only the first few, as addresses.
impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // By name, so that a new field cannot be forgotten here.
        let Self {
            pages,
            bytes_moved,
            elapsed,
            first_folio,
            phases,
            cpu,
            engine,
            batches_frozen,
            batches_live,
            division,
            repairs,
            fallbacks,
            holes,
            cancelled,
        } = self;
        f.debug_struct("Report")
            .field("pages", &Few(pages))
            .field("bytes_moved", bytes_moved)
            .field("elapsed", elapsed)
            .field("first_folio", first_folio)
            .field("phases", phases)
            .field("cpu", cpu)
            .field("engine", engine)
            .field("batches_frozen", batches_frozen)
            .field("batches_live", batches_live)
            .field("division", division)
            .field("repairs", repairs)
            .field("fallbacks", fallbacks)
            .field("holes", holes)
            .field("cancelled", cancelled)
            .finish()
    }
}

/// The figures, not the buckets.
impl fmt::Debug for Holes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holes")
            .field("count", &self.count())
            .field("p50", &self.quantile(0.5))
            .field("p99", &self.quantile(0.99))
            .field("longest", &self.longest)
            .finish_non_exhaustive()
    }
}

/// The first few ranges, and how many more there are.
struct Few<'a>(&'a [(Range<usize>, Outcome)]);

impl fmt::Debug for Few<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut list = f.debug_list();
        for (range, outcome) in self.0.iter().take(RANGES_SHOWN) {
            list.entry(&format_args!("{:#x}..{:#x} {outcome:?}", range.start, range.end));
        }
        if self.0.len() > RANGES_SHOWN {
            list.entry(&format_args!("{} more", self.0.len() - RANGES_SHOWN));
        }
        list.finish()
    }
}

/// `64 MiB`, `1.5 GiB`.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
        let (mut value, mut unit) = (self.0 as f64, "B");
        for next in UNITS {
            if value < 1024.0 {
                break;
            }
            value /= 1024.0;
            unit = next;
        }
        let digits = usize::from(value.fract() != 0.0);
        write!(f, "{value:.digits$} {unit}")
    }
}

/// A duration in a fitting unit: `4.31 ms`.
struct Time(Duration);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        match seconds {
            0.0 => f.write_char('0'),
            s if s < 1e-3 => write!(f, "{:.1} us", s * 1e6),
            s if s < 1.0 => write!(f, "{:.2} ms", s * 1e3),
            s => write!(f, "{s:.2} s"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Busy, Phases};

    fn report(ranges: usize) -> Report {
        let mut report = Report::empty("cpu:memcpy".to_owned(), Division::Shared);
        for i in 0..ranges {
            let outcome = if i % 2 == 0 { Outcome::Moved } else { Outcome::Busy(Busy::Pinned) };
            report.pages.push((i << 12..(i + 1) << 12, outcome));
        }
        report.bytes_moved = report.bytes(|outcome| outcome == Outcome::Moved);
        report.elapsed = Duration::from_micros(2500);
        report
    }

    #[test]
    fn a_report_is_told_in_a_few_lines() {
        let mut report = report(2048);
        report.first_folio = Some(Duration::from_micros(90));
        report.batches_frozen = 1;
        report.batches_live = 3;
        report.repairs = 7;
        report.cpu = Phases { copy: Duration::from_millis(1), ..Phases::default() };
        for us in [100, 100, 400] {
            report.holes.record(Duration::from_micros(us));
        }
        assert_eq!(
            report.to_string(),
            "moved 4 MiB in 2.50 ms, 1.68 GB/s, first folio after 90.0 us\n  \
             pages: 4 MiB moved, 4 MiB busy: pinned for device access\n  \
             how:   1 batch frozen, 3 batches live, shared, copied by cpu:memcpy; \
             7 pages repaired, 0 fallbacks\n  \
             holes: 3, p50 114.7 us, p99 400.0 us, max 400.0 us\n  \
             CPU:   1.00 ms, 0.256 s/GiB"
        );
    }

    #[test]
    fn a_report_of_nothing_has_no_rates() {
        let mut report = report(0);
        report.cancelled = true;
        report.elapsed = Duration::ZERO;
        assert_eq!(
            report.to_string(),
            "cancelled: moved 0 B in 0\n  pages: none\n  how:   shared, copied by cpu:memcpy; \
             0 pages repaired, 0 fallbacks\n  CPU:   0"
        );
    }

    #[test]
    fn debug_output_does_not_grow_with_the_pages() {
        let (few, many) = (format!("{:#?}", report(6)), format!("{:#?}", report(100_000)));
        assert_eq!(few.lines().count(), many.lines().count());
        assert!(many.lines().count() < 60, "{many}");
        assert!(many.contains("0x1000..0x2000 Busy(Pinned)"), "{many}");
        assert!(few.contains("2 more") && many.contains("99996 more"), "{many}");
        assert!(many.contains("p99"), "{many}");
    }

    #[test]
    fn sizes_and_times_have_fitting_units() {
        let sizes = [0, 4096, 1536 << 10, 3 << 30, 2 << 50].map(|bytes| Bytes(bytes).to_string());
        assert_eq!(sizes, ["0 B", "4 KiB", "1.5 MiB", "3 GiB", "2048 TiB"]);
        let times = [4, 4_000, 4_000_000].map(|us| Time(Duration::from_micros(us)).to_string());
        assert_eq!(times, ["4.0 us", "4.00 ms", "4.00 s"]);
    }
}
