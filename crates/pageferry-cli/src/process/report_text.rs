//! What a move came to, in words.

use std::fmt::{self, Write as _};
use std::time::Duration;

use pageferry::{Busy, Outcome, Shortage};

use super::ask::Asked;
use super::report::Moved;
use super::residency_text::{counted, notes};
use crate::output::{BOLD, DIM, YELLOW};
use crate::size::{rate, size};
use crate::table::Table;

pub(super) fn text(moved: &Moved) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_text(moved, &mut out);
    out
}

fn write_text(moved: &Moved, out: &mut String) -> fmt::Result {
    headline(moved, out)?;
    if moved.not_looked_at > 0 {
        let bytes = size(moved.not_looked_at);
        writeln!(out, "  {YELLOW}about {bytes} more were not looked at{YELLOW:#}")?;
    }
    for asked in &moved.asked {
        of_asked(asked, out)?;
    }
    let mut table = Table::new(&["outcome", "kind", ">pages of", ">pages", ">bytes"]);
    for line in &moved.lines {
        table.row([
            line.outcome.to_string(),
            line.kind.to_string(),
            size(line.page_bytes),
            line.pages.to_string(),
            size(line.bytes),
        ]);
    }
    if !table.is_empty() {
        write!(out, "\n{table}")?;
    }
    stayed(moved, out)?;
    let calls = moved.calls();
    if calls.count > 0 {
        let time = |us: f64| time(Duration::from_secs_f64(us / 1e6));
        writeln!(
            out,
            "\n{}, at most {}: p50 {}, p99 {}, longest {}; {} tried again",
            counted(calls.count, "call", "calls"),
            counted(moved.workers as u64, "worker", "workers"),
            time(calls.p50_us),
            time(calls.p99_us),
            time(calls.max_us),
            size(moved.retried_bytes),
        )?;
    }
    notes(&moved.notes, &moved.remarks, out)
}

fn headline(moved: &Moved, out: &mut String) -> fmt::Result {
    let all = moved.bytes(|_| true);
    let processes = counted(moved.processes, "process", "processes");
    if moved.cancelled {
        write!(out, "{YELLOW}cancelled:{YELLOW:#} ")?;
    }
    if moved.dry_run {
        writeln!(
            out,
            "{BOLD}would move {}{BOLD:#} of {} to node {}; {processes}",
            size(moved.bytes(|outcome| outcome == Outcome::WouldMove)),
            size(all),
            moved.to,
        )?;
        // None if it was cancelled before the cost was known.
        if let Some(estimate) = moved.estimate.as_ref().filter(|estimate| estimate.bytes > 0) {
            writeln!(
                out,
                "  {}, about {}, about {}\n  {DIM}reckoned from {}{DIM:#}",
                counted(estimate.pages, "page", "pages"),
                counted(estimate.calls, "call", "calls"),
                time(Duration::try_from_secs_f64(estimate.seconds).unwrap_or(Duration::MAX)),
                estimate.basis,
            )?;
        }
        return Ok(());
    }
    let bytes = moved.bytes(|outcome| outcome == Outcome::Moved);
    write!(
        out,
        "{BOLD}moved {}{BOLD:#} of {} to node {} in {}",
        size(bytes),
        size(all),
        moved.to,
        time(moved.elapsed),
    )?;
    let seconds = moved.outside.as_secs_f64();
    if bytes > 0 && seconds > 0.0 {
        write!(out, ", {}", rate(bytes as f64 / seconds))?;
    }
    if !moved.waited.is_zero() {
        write!(out, " after {} to see which pages are used", time(moved.waited))?;
    }
    writeln!(out, "; {processes}")
}

/// A program that was asked to move its regions itself.
fn of_asked(asked: &Asked, out: &mut String) -> fmt::Result {
    let pid = asked.pid;
    let summary = match &asked.answer {
        Ok(summary) => summary,
        Err(why) => {
            return writeln!(
                out,
                "\n{YELLOW}process {pid} was asked to move its regions, and did not:{YELLOW:#} \
                 {why}\n  its anonymous memory was left alone"
            );
        }
    };
    writeln!(
        out,
        "\n{BOLD}process {pid} moved {} of its {} itself{BOLD:#} in {:.2} s; {}, p99 {:.0} us, \
         longest {:.0} us; CPU {:.2} s",
        size(summary.bytes_moved()),
        counted(summary.regions.into(), "region", "regions"),
        summary.elapsed_s,
        counted(summary.holes, "hole", "holes"),
        summary.hole_p99_us,
        summary.hole_max_us,
        summary.cpu_s,
    )?;
    let mut table = Table::new(&["outcome", ">bytes"]);
    for share in &summary.shares {
        table.row([share.outcome.clone(), size(share.bytes)]);
    }
    write!(out, "{table}")
}

/// Why pages stayed, where for example, and what can be done.
fn stayed(moved: &Moved, out: &mut String) -> fmt::Result {
    let stayed: Vec<(Outcome, u64)> = moved
        .by_outcome()
        .into_iter()
        .filter(|(outcome, _)| !outcome.is_settled() && *outcome != Outcome::WouldMove)
        .collect();
    if stayed.is_empty() {
        return Ok(());
    }
    let total = stayed.iter().map(|(_, bytes)| bytes).sum();
    writeln!(out, "\n{BOLD}{} stayed{BOLD:#}", size(total))?;
    for (outcome, bytes) in stayed {
        write!(out, "  {YELLOW}{outcome}{YELLOW:#}, {}", size(bytes))?;
        if let Some(example) = moved.examples.iter().find(|e| e.outcome == outcome) {
            let (start, end) = (example.range.start, example.range.end);
            write!(out, "; such as {start:x}-{end:x} of process {}", example.pid)?;
        }
        writeln!(out)?;
        if let Some(remedy) = remedy(outcome) {
            writeln!(out, "    {DIM}remedy:{DIM:#} {remedy}")?;
        }
    }
    Ok(())
}

/// What a user can do for pages that stayed.
fn remedy(outcome: Outcome) -> Option<&'static str> {
    Some(match outcome {
        Outcome::Busy(Busy::Shared) => "run as root or with CAP_SYS_NICE: other processes map them",
        Outcome::Busy(Busy::Contended | Busy::Again) => {
            "run it again; pages pinned for a device (RDMA, VFIO, io_uring buffers) never move"
        }
        Outcome::Busy(Busy::Other(_)) => "`pageferry doctor` says what is missing",
        Outcome::NoFrame(Shortage::Node) => {
            "free memory on the destination, or name another node in --to"
        }
        Outcome::NoFrame(Shortage::Huge) => {
            "have huge pages free there: echo 1 > /proc/sys/vm/compact_memory, or \
             nr_hugepages of the node for hugetlb"
        }
        Outcome::NoFrame(Shortage::Reserve) => {
            "free memory on the destination, name another node in --to, or lower --reserve"
        }
        Outcome::NoFrame(Shortage::Forbidden) => {
            "widen cpuset.mems of the process's cgroup, or name another node in --to"
        }
        Outcome::Cancelled => "run it again: what has been moved stays where it is",
        _ => return None,
    })
}

/// `4.31 ms`, `12.0 s`.
fn time(time: Duration) -> String {
    match time.as_secs_f64() {
        s if s < 1e-3 => format!("{:.0} us", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.1} s"),
    }
}

#[cfg(test)]
mod tests {
    use pageferry_topology::NodeList;

    use super::*;

    #[test]
    fn a_dry_run_that_was_cancelled_reckons_nothing_and_has_moved_nothing() {
        let mut moved = Moved::new(true, NodeList::default());
        moved.cancelled = true;
        let plain = anstream::adapter::strip_str(&text(&moved)).to_string();
        assert!(plain.starts_with("cancelled: would move 0 B of 0 B"), "{plain}");
        assert!(!plain.contains("reckoned") && !plain.contains("moved"), "{plain}");
        assert!(!plain.contains("not looked at"), "{plain}");
    }

    #[test]
    fn what_a_cancelled_move_had_not_come_to_is_told_in_text_and_json() {
        let mut moved = Moved::new(false, NodeList::default());
        moved.cancelled = true;
        moved.not_looked_at = 3 << 30;
        let plain = anstream::adapter::strip_str(&text(&moved)).to_string();
        assert!(plain.contains("about 3 GiB more were not looked at"), "{plain}");
        let json = serde_json::to_value(moved.document()).expect("no maps in it");
        assert_eq!(json["not_looked_at"], 3u64 << 30);
    }

    #[test]
    fn whatever_can_keep_a_page_from_the_kernels_way_has_a_remedy() {
        for outcome in [
            Outcome::Busy(Busy::Shared),
            Outcome::Busy(Busy::Contended),
            Outcome::Busy(Busy::Again),
            Outcome::Busy(Busy::Other(1)),
            Outcome::NoFrame(Shortage::Node),
            Outcome::NoFrame(Shortage::Huge),
            Outcome::NoFrame(Shortage::Reserve),
            Outcome::NoFrame(Shortage::Forbidden),
            Outcome::Cancelled,
        ] {
            assert!(remedy(outcome).is_some(), "{outcome}");
        }
    }
}
