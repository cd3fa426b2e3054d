//! What a move would cost: calls and seconds, and what that is reckoned from.
//!
//! Where there are two nodes the rate is measured, on memory of this command that is moved between
//! them: no page of another process is touched.

use std::hint::black_box;
use std::time::Duration;

use pageferry::Outcome;
use pageferry::process::{Destination, Filter, Line, ProcessMove, Selection};
use pageferry_topology::{Machine, NodeId};
use serde::Serialize;

use super::args;
use crate::{cancel, size};

/// Memory that is moved to measure; about 20 ms at [`BASE_RATE`].
const SAMPLE: usize = 32 << 20;
/// Bytes per second of the kernel's own moves by one thread, base pages and huge pages: measured
/// on a two-core Zen 4, Linux 6.18.
const BASE_RATE: f64 = 1.8e9;
const HUGE_RATE: f64 = 12.7e9;
/// Pages of a call at most, and the share of its latency target that it is planned to take; see
/// [`pageferry::process`].
const CALL_PAGES: f64 = 16_384.0;
const CALL_SHARE: f64 = 0.7;

/// What a move would cost.
#[derive(Debug, Serialize)]
pub(super) struct Estimate {
    pub(super) bytes: u64,
    pub(super) pages: u64,
    /// `move_pages(2)` calls, about.
    pub(super) calls: u64,
    /// How long it would take, about.
    pub(super) seconds: f64,
    /// What this was reckoned from.
    pub(super) basis: String,
}

/// Bytes per second.
#[derive(Clone, Debug, PartialEq)]
struct Rates {
    base: f64,
    huge: f64,
    basis: String,
}

impl Rates {
    fn known() -> Self {
        Self {
            base: BASE_RATE,
            huge: HUGE_RATE,
            basis: "1.8 GB/s in base pages and 12.7 GB/s in huge pages with one worker, as on a \
                    two-core Zen 4 with Linux 6.18; not measured here"
                .into(),
        }
    }

    /// From one measurement, of pages of this size; the others are in the known proportion.
    fn measured(page_bytes: u64, rate: f64) -> Self {
        let is_huge = page_bytes > pageferry_sys::page_size() as u64;
        let factor = rate / if is_huge { HUGE_RATE } else { BASE_RATE };
        let (base, huge) = (BASE_RATE * factor, HUGE_RATE * factor);
        let (what, other) = if is_huge { ("huge", "base") } else { ("base", "huge") };
        Self {
            base,
            huge,
            basis: format!(
                "{} in {what} pages with one worker, measured here on 32 MiB of this \
                 command's own; {other} pages in the usual proportion",
                size::rate(rate)
            ),
        }
    }
}

/// What it would cost to move what these lines say would be moved, to the first of the nodes.
/// `None`: cancelled while it was measured.
pub(super) fn estimate(
    lines: &[Line],
    to: Option<NodeId>,
    machine: &Machine,
    latency: Duration,
    limit: Option<u64>,
) -> Option<Estimate> {
    let would: Vec<&Line> = lines.iter().filter(|l| l.outcome == Outcome::WouldMove).collect();
    let measured = match to {
        Some(to) if !would.is_empty() => measure(to, machine),
        _ => None,
    };
    if cancel::requested() {
        return None;
    }
    let rates = measured.map_or_else(Rates::known, |(bytes, rate)| Rates::measured(bytes, rate));
    Some(reckon(&would, rates, latency, limit))
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a positive number of calls, rounded to be read"
)]
fn reckon(would: &[&Line], rates: Rates, latency: Duration, limit: Option<u64>) -> Estimate {
    let (mut calls, mut seconds) = (0.0, 0.0);
    for line in would {
        let is_huge = line.page_bytes > pageferry_sys::page_size() as u64;
        let rate = if is_huge { rates.huge } else { rates.base };
        let at_once = rate * latency.as_secs_f64() * CALL_SHARE / line.page_bytes as f64;
        calls += (line.pages as f64 / at_once.clamp(1.0, CALL_PAGES)).ceil();
        seconds += line.bytes as f64 / rate;
    }
    let bytes = would.iter().map(|line| line.bytes).sum();
    let mut basis = rates.basis;
    if let Some(limit) = limit.filter(|limit| *limit > 0) {
        let limited = bytes as f64 / limit as f64;
        if limited > seconds {
            (seconds, basis) = (limited, "the --rate that was given".into());
        }
    }
    let pages = would.iter().map(|line| line.pages).sum();
    Estimate { bytes, pages, calls: calls as u64, seconds, basis }
}

/// The size of the pages that were moved, and how many bytes of them per second.
fn measure(to: NodeId, machine: &Machine) -> Option<(u64, f64)> {
    let away = machine.memory_nodes().map(|node| node.id).find(|node| *node != to)?;
    let memory = black_box(vec![1u8; SAMPLE]);
    let start = memory.as_ptr().addr();
    let range = args::whole_pages(start..start + SAMPLE)?;
    let own = Selection::new().pid(std::process::id()).filter(Filter::new().range(range));
    let go = |node| {
        ProcessMove::new(own.clone(), Destination::node(node))
            .workers(1)
            .cancelled_by(cancel::requested_flag().clone())
            .run()
            .ok()
    };
    go(away)?;
    let report = go(to)?;
    drop(black_box(memory));
    let moved = report.lines.iter().filter(|line| line.outcome == Outcome::Moved);
    let most = moved.max_by_key(|line| line.bytes)?;
    // Of fewer the time is that of what went wrong.
    (report.bytes_moved() >= SAMPLE as u64 / 2).then(|| (most.page_bytes, report.rate()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_sets_both_rates() {
        let rates = Rates::measured(pageferry_sys::page_size() as u64, 0.9e9);
        assert_eq!((rates.base, rates.huge), (0.9e9, 6.35e9));
        let rates = Rates::measured(2 << 20, 12.7e9);
        assert_eq!((rates.base, rates.huge), (BASE_RATE, HUGE_RATE));
    }

    #[test]
    fn nothing_to_move_costs_nothing() {
        let estimate = reckon(&[], Rates::known(), Duration::from_millis(20), Some(1));
        assert_eq!((estimate.calls, estimate.bytes, estimate.seconds), (0, 0, 0.0));
    }

    #[test]
    fn one_node_is_not_measured() -> anyhow::Result<()> {
        let machine = Machine::read()?;
        if machine.memory_nodes().count() > 1 {
            eprintln!("skipped: this machine has several nodes");
            return Ok(());
        }
        let only = machine.memory_nodes().next().map(|node| node.id);
        assert_eq!(only.and_then(|node| measure(node, &machine)), None);
        Ok(())
    }
}
