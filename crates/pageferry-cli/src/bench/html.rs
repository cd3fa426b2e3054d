//! The results as one self-contained page: style and charts inline, nothing loaded from elsewhere.

use std::fmt::{self, Write as _};

use super::charts;
use super::figures::size;
use super::schema::{Bound, Results, Run, Target, Verdict};
use super::svg::{escape, number};

/// The page.
pub(super) fn render(results: &Results) -> Result<String, fmt::Error> {
    let mut out = String::new();
    let machine = &results.machine;
    let settings = &results.settings;
    writeln!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>pageferry bench: {0}</title>\n<style>\n{1}</style></head><body>\n\
         <h1>pageferry bench</h1>\n<p class=\"dim\">{0}, {2} CPUs, {3} node(s), Linux {4}, {5} of \
         memory, huge pages: {6}, clock: {7}. pageferry {8}, {9} run of {10:.0} s, regions of \
         {11}, medians of up to {12} rounds; a clock reading takes {13:.0} ns.</p>",
        escape(&machine.cpu_model),
        include_str!("page.css"),
        machine.cpus,
        machine.nodes,
        escape(&machine.kernel),
        crate::size::size(machine.memory_bytes),
        escape(&machine.thp),
        escape(&machine.clocksource),
        results.pageferry_version,
        settings.mode,
        settings.elapsed_s,
        size(settings.region_bytes),
        settings.rounds,
        settings.clock_overhead_ns,
    )?;
    if !results.complete {
        out.push_str(
            "<p class=\"missed\"><span class=\"verdict\">Cut short: not everything was \
                      measured.</span></p>\n",
        );
    }
    for failure in &results.failures {
        writeln!(
            out,
            "<p class=\"missed\"><span class=\"verdict\">failed: {}</span></p>",
            escape(failure)
        )?;
    }
    headlines(results, &mut out)?;
    charts::throughput(results, &mut out)?;
    charts::batches(results, &mut out)?;
    charts::felt(results, &mut out)?;
    losses(results, &mut out)?;
    tables(results, &mut out)?;
    out.push_str("</body></html>\n");
    Ok(out)
}

fn verdict_class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Met => "met",
        Verdict::WithinNoise => "within_noise",
        Verdict::Missed => "missed",
        Verdict::NotMeasured => "not_measured",
    }
}

fn verdict_text(target: &Target) -> String {
    let bound = match target.bound {
        Bound::AtLeast => "at least",
        Bound::AtMost => "at most",
    };
    let word = match target.verdict {
        Verdict::Met => "met",
        Verdict::WithinNoise => "a tie within the noise",
        Verdict::Missed => "missed",
        Verdict::NotMeasured => "not measured",
    };
    format!("{word}: target {bound} {}", target.target)
}

fn value(target: &Target) -> String {
    target.value.map_or_else(|| "-".to_owned(), number)
}

/// Targets of throughput as cards, all of them as a table.
fn headlines(results: &Results, out: &mut String) -> fmt::Result {
    let count = |verdict| results.targets.iter().filter(|t| t.verdict == verdict).count();
    writeln!(
        out,
        "<h2>Targets</h2><p class=\"dim\">{} met, {} within the noise, {} missed, {} not measured</p>",
        count(Verdict::Met),
        count(Verdict::WithinNoise),
        count(Verdict::Missed),
        count(Verdict::NotMeasured),
    )?;
    out.push_str("<div class=\"cards\">");
    let is_headline = |t: &&Target| t.bound == Bound::AtLeast && t.verdict != Verdict::NotMeasured;
    for target in results.targets.iter().filter(is_headline) {
        writeln!(
            out,
            "<div class=\"card {}\"><b>{}</b>{}<br><span class=\"verdict\">{}</span></div>",
            verdict_class(target.verdict),
            value(target),
            escape(&target.ratio.replace('_', " ")),
            verdict_text(target)
        )?;
    }
    out.push_str(
        "</div>\n<details><summary>All targets</summary><div class=\"scroll\"><table><tr>\
                  <th class=\"text\">ratio</th><th>value</th><th class=\"text\">target</th>\
                  <th class=\"text\">meaning</th></tr>\n",
    );
    for target in &results.targets {
        writeln!(
            out,
            "<tr class=\"{}\"><td class=\"text\">{}</td><td>{}</td><td class=\"text verdict\">{}</td>\
             <td class=\"text\">{}</td></tr>",
            verdict_class(target.verdict),
            escape(&target.ratio),
            value(target),
            verdict_text(target),
            escape(&target.meaning)
        )?;
    }
    out.push_str("</table></div></details>\n");
    Ok(())
}

fn losses(results: &Results, out: &mut String) -> fmt::Result {
    out.push_str("<h2>Where this loses</h2>");
    if results.losses.is_empty() {
        out.push_str("<p>Nothing measured was slower than its baseline.</p>\n");
        return Ok(());
    }
    out.push_str(
        "<div class=\"scroll\"><table><tr><th>ratio</th><th class=\"text\">what</th>\
                  <th class=\"text\">beside</th></tr>\n",
    );
    for loss in &results.losses {
        writeln!(
            out,
            "<tr><td>{:.2}</td><td class=\"text\">{}</td><td class=\"text\">{}</td></tr>",
            loss.ratio,
            escape(&loss.what),
            escape(&loss.against)
        )?;
    }
    out.push_str("</table></div>\n");
    Ok(())
}

/// Every run, and what was skipped.
fn tables(results: &Results, out: &mut String) -> fmt::Result {
    out.push_str("<h2>Everything measured</h2><div class=\"scroll\"><table><tr>");
    let heads = [
        "scenario",
        "folio",
        "order",
        "division",
        "frames",
        "engine",
        "threads",
        "batch",
        "budget us",
        "GB/s",
        "min",
        "max",
        "hole p50 us",
        "p99",
        "max",
        "reader p99 us",
        "p99.9",
        "time in &gt; 20 us",
        "no CPU",
        "writer p99 us",
        "p99.9",
        "time in &gt; 20 us",
        "no CPU",
        "first folio us",
        "call us",
        "CPU s/GiB",
        "rusage",
        "faults/GiB",
        "switches/GiB",
        "TLB/GiB",
        "rounds",
        "verified",
        "note",
    ];
    for head in heads {
        let class = if is_text(head) { " class=\"text\"" } else { "" };
        write!(out, "<th{class}>{head}</th>")?;
    }
    out.push_str("</tr>\n");
    for run in &results.runs {
        out.push_str("<tr>");
        for (head, cell) in heads.into_iter().zip(cells(run)) {
            let class = match head {
                "note" => " class=\"text wide\"",
                head if is_text(head) => " class=\"text\"",
                _ => "",
            };
            write!(out, "<td{class}>{}</td>", escape(&cell))?;
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
    for skipped in &results.skipped {
        writeln!(
            out,
            "<p class=\"dim\">Not measured: {}: {}</p>",
            escape(&skipped.what),
            escape(&skipped.because)
        )?;
    }
    Ok(())
}

fn is_text(head: &str) -> bool {
    ["scenario", "order", "division", "frames", "engine", "note"].contains(&head)
}

fn cells(run: &Run) -> [String; 33] {
    let text = |t: &Option<String>| t.clone().unwrap_or_default();
    let num = |v: Option<f64>| v.map(number).unwrap_or_default();
    let (readers, writers) = (run.readers.as_ref(), run.writers.as_ref());
    let percent = |share: Option<f64>| {
        share.map(|share| format!("{:.1} %", share * 100.0)).unwrap_or_default()
    };
    let counters = run.per_gib;
    [
        run.scenario.replace('_', " "),
        run.folio_bytes.map(size).unwrap_or_default(),
        text(&run.order),
        text(&run.division),
        text(&run.frames),
        run.engine.clone(),
        run.threads.to_string(),
        run.batch_bytes.map(size).unwrap_or_default(),
        num(run.stall_budget_us),
        num(run.rate()),
        num(run.gb_per_s.map(|s| s.min)),
        num(run.gb_per_s.map(|s| s.max)),
        num(run.hole_us.map(|h| h.p50)),
        num(run.hole_us.map(|h| h.p99)),
        num(run.hole_us.map(|h| h.max)),
        num(readers.map(|f| f.latency_us.p99)),
        num(readers.map(|f| f.latency_us.p999)),
        percent(readers.map(|f| f.stalled_share)),
        percent(readers.map(|f| f.preempted_share)),
        num(writers.map(|f| f.latency_us.p99)),
        num(writers.map(|f| f.latency_us.p999)),
        percent(writers.map(|f| f.stalled_share)),
        percent(writers.map(|f| f.preempted_share)),
        num(run.first_folio_us),
        num(run.call_us),
        num(run.cpu_s_per_gib),
        num(counters.map(|c| c.rusage_cpu_s)),
        num(counters.map(|c| c.minor_faults)),
        num(counters.map(|c| c.voluntary_switches + c.involuntary_switches)),
        num(counters.and_then(|c| c.tlb_shootdowns)),
        run.rounds.to_string(),
        match run.verified {
            Some(true) => "yes".to_owned(),
            Some(false) => "no".to_owned(),
            None => String::new(),
        },
        text(&run.note),
    ]
}
