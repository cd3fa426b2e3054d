//! The results as text: headline figures first, then what they are made from.

use std::fmt::{self, Write as _};

use super::figures::{self, FOLIOS, size};
use super::schema::{Bound, Felt, Results, Run, Spread, Verdict};
use super::stats::STALL;
use crate::output::{BOLD, DIM, GREEN, RED, YELLOW};

/// Everything, for a person.
pub(super) fn render(results: &Results) -> Result<String, fmt::Error> {
    let mut out = String::new();
    let machine = &results.machine;
    writeln!(
        out,
        "{BOLD}{}{BOLD:#}, {} CPUs, {} node(s), Linux {}, huge pages: {}",
        machine.cpu_model, machine.cpus, machine.nodes, machine.kernel, machine.thp
    )?;
    let settings = &results.settings;
    writeln!(
        out,
        "{DIM}{} run of {:.0} s; regions of {}, {}; medians of up to {} rounds; copies by {}; \
         a clock reading takes {:.0} ns{DIM:#}",
        settings.mode,
        settings.elapsed_s,
        size(settings.region_bytes),
        if machine.nodes > 1 { "node to node" } else { "frame to frame on the one node" },
        settings.rounds,
        settings.default_engine,
        settings.clock_overhead_ns,
    )?;
    throughput(results, &mut out)?;
    first_folio(results, &mut out)?;
    felt(results, &mut out)?;
    others(results, &mut out)?;
    targets(results, &mut out)?;
    endings(results, &mut out)?;
    Ok(out)
}

fn spread(spread: Option<Spread>) -> String {
    spread.map_or_else(String::new, |s| {
        format!("{:7.2} {DIM}{:6.2} {:6.2}{DIM:#}", s.median, s.min, s.max)
    })
}

fn optional(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

fn short(text: &Option<String>) -> &str {
    text.as_deref().unwrap_or("-")
}

/// The roofline, and a row for each kernel with a column for each number of threads and length.
fn copies(results: &Results, out: &mut String) -> fmt::Result {
    let of = |scenario: &'static str| {
        results.runs.iter().filter(move |run| run.scenario == scenario).collect::<Vec<_>>()
    };
    let (roofline, copies) = (of("roofline"), of("copy"));
    if !roofline.is_empty() {
        writeln!(out, "\n{BOLD}roofline{BOLD:#}, GB/s: median {DIM}min max{DIM:#}")?;
    }
    for run in roofline {
        writeln!(out, "  {:<24} {:>3} threads  {}", run.engine, run.threads, spread(run.gb_per_s))?;
    }
    let mut columns: Vec<(usize, u64)> =
        copies.iter().filter_map(|run| Some((run.threads, run.batch_bytes?))).collect();
    columns.sort_unstable();
    columns.dedup();
    if columns.is_empty() {
        return Ok(());
    }
    writeln!(out, "\n{BOLD}copies{BOLD:#} by threads and length, GB/s, medians")?;
    write!(out, "  {:<24}", "")?;
    for (threads, bytes) in &columns {
        write!(out, "{:>9}", format!("{threads}x{}", size(*bytes)))?;
    }
    writeln!(out)?;
    for first in copies
        .iter()
        .filter(|run| (run.threads, run.batch_bytes) == (columns[0].0, Some(columns[0].1)))
    {
        write!(out, "  {:<24}", first.engine)?;
        for (threads, bytes) in &columns {
            let run = copies.iter().find(|run| {
                (&run.engine, run.threads, run.batch_bytes)
                    == (&first.engine, *threads, Some(*bytes))
            });
            write!(out, "{:>9}", optional(run.and_then(|run| run.rate()), 2))?;
        }
        writeln!(out)?;
    }
    Ok(())
}

/// Copies and moves.
fn throughput(results: &Results, out: &mut String) -> fmt::Result {
    copies(results, out)?;
    const MOVES: [&str; 9] = [
        "sequential",
        "move",
        "move_default",
        "move_unpromised",
        "exchange_sequential",
        "exchange",
        "one_way_sequential",
        "one_way",
        "move_pages",
    ];
    for (folio, _) in FOLIOS {
        let of = |scenario: &str| {
            let is = |run: &&Run| run.scenario == scenario && run.folio_bytes == Some(folio);
            results.runs.iter().filter(is).collect::<Vec<_>>()
        };
        let runs: Vec<&Run> = MOVES.into_iter().flat_map(of).collect();
        if runs.is_empty() {
            continue;
        }
        writeln!(
            out,
            "\n{BOLD}moves of {} folios{BOLD:#}, GB/s: median {DIM}min max{DIM:#}; \
             hole p50 and p99 in us; first folio in us; per GiB: CPU seconds (getrusage), faults, \
             switches, TLB shootdowns",
            size(folio)
        )?;
        for run in runs {
            let counters = run.per_gib;
            writeln!(
                out,
                "  {:<19} {:<6} {:<9} {:<11} {:<20} {:>2} thr {:>4}  {}  {:>6} {:>6}  {:>6}  {:>5} ({}) {} {} {}",
                run.scenario,
                short(&run.order),
                short(&run.division),
                short(&run.frames),
                run.engine,
                run.threads,
                run.batch_bytes.map_or_else(|| "auto".to_owned(), size),
                spread(run.gb_per_s),
                optional(run.hole_us.map(|h| h.p50), 0),
                optional(run.hole_us.map(|h| h.p99), 0),
                optional(run.first_folio_us, 0),
                optional(run.cpu_s_per_gib, 3),
                optional(counters.map(|c| c.rusage_cpu_s), 3),
                optional(counters.map(|c| c.minor_faults), 0),
                optional(counters.map(|c| c.voluntary_switches + c.involuntary_switches), 0),
                optional(counters.and_then(|c| c.tlb_shootdowns), 0),
            )?;
        }
    }
    Ok(())
}

fn first_folio(results: &Results, out: &mut String) -> fmt::Result {
    for (folio, _) in FOLIOS {
        for order in ["frozen", "live"] {
            let curve = figures::curve(&results.runs, folio, order);
            if curve.is_empty() {
                continue;
            }
            writeln!(
                out,
                "\n{BOLD}batch size{BOLD:#}, {} folios, {order}: first folio in us, GB/s",
                size(folio)
            )?;
            for run in curve {
                writeln!(
                    out,
                    "  {:>5}  {:>8}  {}",
                    run.batch_bytes.map(size).unwrap_or_default(),
                    optional(run.first_folio_us, 1),
                    spread(run.gb_per_s)
                )?;
            }
            if let Some((batch, rate, first)) = figures::best_batch(&results.runs, folio, order) {
                writeln!(
                    out,
                    "  the smallest within 10 % of the fastest: {}, {rate:.2} GB/s, first \
                     folio after {first:.0} us",
                    size(batch)
                )?;
            }
        }
    }
    Ok(())
}

fn felt(results: &Results, out: &mut String) -> fmt::Result {
    for (folio, _) in FOLIOS {
        let is = |run: &&Run| run.scenario.starts_with("feel") && run.folio_bytes == Some(folio);
        let runs: Vec<&Run> = results.runs.iter().filter(is).collect();
        if runs.is_empty() {
            continue;
        }
        writeln!(
            out,
            "\n{BOLD}what a program feels{BOLD:#}, {} folios: latency of an access in us; million \
             accesses a second; > {} us: share of the time in accesses that took longer, whatever \
             held them up; no CPU: the part of it in which another thread had the CPU; holes in \
             us; the move's GB/s",
            size(folio),
            STALL.as_micros()
        )?;
        writeln!(
            out,
            "  {DIM}{:<14} {:<9} {:>8} {:>8} {:>8} {:>9} {:>8} {:>7} {:>7} | {:>7} {:>7} {:>8} | GB/s{DIM:#}",
            "beside",
            "",
            "p50",
            "p99",
            "p99.9",
            "max",
            "M/s",
            format!("> {} us", STALL.as_micros()),
            "no CPU",
            "p50",
            "p99",
            "max"
        )?;
        for run in runs {
            let beside = match run.stall_budget_us {
                Some(us) => format!("budget {us:.0} us"),
                None => run.scenario.trim_start_matches("feel_").to_owned(),
            };
            for (who, felt) in [("readers", &run.readers), ("writers", &run.writers)] {
                let Some(felt) = felt else { continue };
                let Felt { latency_us: q, accesses_per_s, stalled_share, preempted_share, .. } =
                    felt;
                write!(
                    out,
                    "  {beside:<14} {who:<9} {:>8.2} {:>8.2} {:>8.1} {:>9.0} {:>8.2} {:>6.1}% {:>6.1}% |",
                    q.p50,
                    q.p99,
                    q.p999,
                    q.max,
                    accesses_per_s / 1e6,
                    stalled_share * 100.0,
                    preempted_share * 100.0
                )?;
                match run.hole_us.filter(|_| who == "readers") {
                    Some(hole) => writeln!(
                        out,
                        " {:>7.0} {:>7.0} {:>8.0} | {} {}",
                        hole.p50,
                        hole.p99,
                        hole.max,
                        optional(run.rate(), 2),
                        short(&run.order)
                    )?,
                    None => writeln!(out)?,
                }
            }
        }
    }
    Ok(())
}

/// Never slower, and memory.
fn others(results: &Results, out: &mut String) -> fmt::Result {
    const NAMES: [&str; 6] =
        ["one_cpu", "one_cpu_sequential", "busy", "busy_sequential", "single", "single_sequential"];
    let is = |run: &&Run| NAMES.contains(&run.scenario.as_str());
    let mut runs: Vec<&Run> = results.runs.iter().filter(is).collect();
    runs.sort_by_key(|run| (NAMES.iter().position(|name| run.scenario == *name), run.folio_bytes));
    if !runs.is_empty() {
        writeln!(
            out,
            "\n{BOLD}little to win{BOLD:#}, GB/s: median {DIM}min max{DIM:#}; a call of one folio in us"
        )?;
        for run in runs {
            writeln!(
                out,
                "  {:<18} {:>3}  {:<6} {:<9} {}  {:>8}",
                run.scenario,
                run.folio_bytes.map(size).unwrap_or_default(),
                short(&run.order),
                short(&run.division),
                spread(run.gb_per_s),
                optional(run.call_us, 1)
            )?;
        }
    }
    for run in results.runs.iter().filter(|run| run.scenario == "memory") {
        writeln!(out, "\n{BOLD}memory{BOLD:#}: {}", short(&run.note))?;
    }
    Ok(())
}

fn targets(results: &Results, out: &mut String) -> fmt::Result {
    let measured: Vec<_> =
        results.targets.iter().filter(|t| t.verdict != Verdict::NotMeasured).collect();
    if measured.is_empty() {
        return Ok(());
    }
    writeln!(out, "\n{BOLD}targets{BOLD:#}")?;
    for target in measured {
        let (style, word) = match target.verdict {
            Verdict::Met => (GREEN, "met"),
            Verdict::WithinNoise => (YELLOW, "a tie"),
            Verdict::Missed => (RED, "missed"),
            Verdict::NotMeasured => (DIM, "not measured"),
        };
        let bound = match target.bound {
            Bound::AtLeast => ">=",
            Bound::AtMost => "<=",
        };
        writeln!(
            out,
            "  {style}{word:<6}{style:#} {:<36} {:>9} {bound} {:<6} {DIM}{}{DIM:#}",
            target.ratio,
            optional(target.value, 4),
            target.target,
            target.meaning
        )?;
    }
    Ok(())
}

fn endings(results: &Results, out: &mut String) -> fmt::Result {
    writeln!(out, "\n{BOLD}where this loses{BOLD:#}")?;
    if results.losses.is_empty() {
        writeln!(out, "  nothing measured was slower than its baseline")?;
    }
    for loss in &results.losses {
        writeln!(out, "  {:.2} x  {}  {DIM}beside {}{DIM:#}", loss.ratio, loss.what, loss.against)?;
    }
    for skipped in &results.skipped {
        writeln!(out, "{DIM}not measured: {}: {}{DIM:#}", skipped.what, skipped.because)?;
    }
    let noted = results.runs.iter().filter(|run| run.scenario != "memory");
    for (run, note) in noted.filter_map(|run| Some((run, run.note.as_ref()?))) {
        writeln!(out, "{DIM}note: {}: {note}{DIM:#}", figures::describe(run))?;
    }
    for failure in &results.failures {
        writeln!(out, "{RED}failed:{RED:#} {failure}")?;
    }
    let verified = results.runs.iter().filter(|run| run.verified == Some(true)).count();
    match (results.failures.is_empty(), results.complete) {
        (true, true) => writeln!(out, "every word was read back and was right, in {verified} runs"),
        (true, false) => writeln!(out, "{YELLOW}cut short{YELLOW:#}: what is shown was measured"),
        (false, _) => Ok(()),
    }
}
