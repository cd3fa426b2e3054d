//! The results as one self-contained page: style and charts inline, nothing loaded from elsewhere.

use std::fmt::{self, Write as _};

use super::figures::{self, FOLIOS, size};
use super::schema::{Bound, Results, Run, Target, Verdict};
use super::svg::{self, Bar, Lines, Scale, Series, escape, number};

/// Bars of a chart at most: the rest is in the table.
const MOST_BARS: usize = 14;

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
        crate::topology::size(machine.memory_bytes),
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
        out.push_str("<p class=\"missed\"><span class=\"verdict\">Cut short: not everything was \
                      measured.</span></p>\n");
    }
    for failure in &results.failures {
        writeln!(out, "<p class=\"missed\"><span class=\"verdict\">failed: {}</span></p>", escape(failure))?;
    }
    headlines(results, &mut out)?;
    throughput(results, &mut out)?;
    batches(results, &mut out)?;
    felt(results, &mut out)?;
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
    out.push_str("</div>\n<details><summary>All targets</summary><div class=\"scroll\"><table><tr>\
                  <th class=\"text\">ratio</th><th>value</th><th class=\"text\">target</th>\
                  <th class=\"text\">meaning</th></tr>\n");
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

/// A chart of the fastest moves of each folio size, with the baseline, against the roofline.
fn throughput(results: &Results, out: &mut String) -> fmt::Result {
    let roofline = figures::best(&results.runs, |run| run.scenario == "roofline");
    let reference = roofline.and_then(Run::rate).map(|rate| (rate, "the roofline"));
    const KINDS: [(&str, usize); 6] = [
        ("move", 0),
        ("move_default", 2),
        ("one_way", 4),
        ("sequential", 6),
        ("one_way_sequential", 6),
        ("move_pages", 1),
    ];
    let mut charts = String::new();
    for (folio, name) in FOLIOS {
        let class = |run: &Run| KINDS.iter().find(|(kind, _)| *kind == run.scenario).map(|k| k.1);
        let mut runs: Vec<(&Run, usize)> = results
            .runs
            .iter()
            .filter(|run| run.folio_bytes == Some(folio))
            .filter_map(|run| Some((run, class(run)?)))
            .collect();
        runs.sort_by(|a, b| b.0.rate().unwrap_or(0.0).total_cmp(&a.0.rate().unwrap_or(0.0)));
        // The baselines are always shown, however slow.
        let (baselines, mut others): (Vec<_>, Vec<_>) = runs
            .into_iter()
            .partition(|(run, _)| run.scenario.ends_with("sequential") || run.scenario == "move_pages");
        others.truncate(MOST_BARS);
        let shown = others.into_iter().chain(baselines);
        let bars: Vec<Bar> = shown
            .filter_map(|(run, class)| {
                let spread = run.gb_per_s?;
                let words = [&run.order, &run.division, &run.frames].into_iter().flatten();
                let mut words: Vec<&str> = words.map(String::as_str).collect();
                words.retain(|word| *word != "recycled");
                let batch = run.batch_bytes.map(size).unwrap_or_default();
                let kind = match run.scenario.as_str() {
                    "move" | "one_way" => String::new(),
                    "move_default" => "default: ".to_owned(),
                    "move_pages" => "move_pages(2) ".to_owned(),
                    _ => "sequential: ".to_owned(),
                };
                let name = format!("{kind}{} {}T {batch}", words.join(" "), run.threads);
                Some(Bar { name, low: spread.min, value: spread.median, high: spread.max, class })
            })
            .collect();
        let title = format!("Moves of {} folios", name.to_uppercase());
        charts += &svg::bars(&title, "GB/s, median and spread", &bars, reference)?;
    }
    section(out, "Throughput", "Moves of recycled and fresh frames beside the same transaction \
             done folio after folio by one thread. T: threads; then the largest batch.", &charts)?;

    let mut charts = String::new();
    for (folio, name) in FOLIOS {
        let mut series = Vec::new();
        for order in ["frozen", "live"] {
            for division in ["conducted", "shared"] {
                let mut points: Vec<(f64, f64)> = results
                    .runs
                    .iter()
                    .filter(|run| {
                        run.scenario == "move"
                            && run.folio_bytes == Some(folio)
                            && run.order.as_deref() == Some(order)
                            && run.division.as_deref() == Some(division)
                            && run.threads == results.machine.cpus
                            && run.engine == results.settings.default_engine
                    })
                    .filter_map(|run| Some((run.batch_bytes? as f64, run.rate()?)))
                    .collect();
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                if points.len() > 1 {
                    series.push(Series { name: format!("{order}, {division}"), points, dashed: false });
                }
            }
        }
        if series.is_empty() {
            continue;
        }
        let marks = byte_marks(&series);
        if let (Some((rate, _)), Some((low, high))) = (reference, ends(&marks)) {
            let points = vec![(low, rate), (high, rate)];
            series.push(Series { name: "roofline".to_owned(), points, dashed: true });
        }
        let title = format!("Throughput by batch, {} folios, all threads", name.to_uppercase());
        charts += &lines(title, "batch", "GB/s", (Scale::Log, Scale::Linear), marks, series)?;
    }
    section(out, "Batch and division of labour", "", &charts)
}

fn ends(marks: &[(f64, String)]) -> Option<(f64, f64)> {
    Some((marks.first()?.0, marks.last()?.0))
}

fn byte_marks(series: &[Series]) -> Vec<(f64, String)> {
    let mut at: Vec<f64> = series.iter().flat_map(|s| s.points.iter().map(|p| p.0)).collect();
    at.sort_by(f64::total_cmp);
    at.dedup();
    #[allow(clippy::cast_possible_truncation, reason = "batch sizes, which came from integers")]
    #[allow(clippy::cast_sign_loss, reason = "batch sizes, which came from integers")]
    at.into_iter().map(|bytes| (bytes, size(bytes as u64))).collect()
}

fn lines(
    title: String,
    x_label: &str,
    y_label: &str,
    (x, y): (Scale, Scale),
    x_marks: Vec<(f64, String)>,
    series: Vec<Series>,
) -> Result<String, fmt::Error> {
    let (x_label, y_label) = (x_label.to_owned(), y_label.to_owned());
    Lines { title, x_label, y_label, x, y, x_marks, series }.render()
}

fn section(out: &mut String, title: &str, text: &str, charts: &str) -> fmt::Result {
    if charts.is_empty() {
        return Ok(());
    }
    writeln!(out, "<h2>{title}</h2><p class=\"dim\">{text}</p><div class=\"charts\">{charts}</div>")
}

/// First folio and throughput by batch.
fn batches(results: &Results, out: &mut String) -> fmt::Result {
    let (mut latency, mut rate, mut text) = (Vec::new(), Vec::new(), String::new());
    for (folio, name) in FOLIOS {
        for order in ["frozen", "live"] {
            let curve = figures::curve(&results.runs, folio, order);
            if curve.len() < 2 {
                continue;
            }
            let name = format!("{}, {order}", name.to_uppercase());
            let points = |pick: &dyn Fn(&Run) -> Option<f64>| -> Vec<(f64, f64)> {
                curve.iter().filter_map(|run| Some((run.batch_bytes? as f64, pick(run)?))).collect()
            };
            let dashed = order == "live";
            let first = points(&|run| run.first_folio_us);
            latency.push(Series { name: name.clone(), points: first, dashed });
            rate.push(Series { name: name.clone(), points: points(&Run::rate), dashed });
            if let Some((batch, gb, us)) = figures::best_batch(&results.runs, folio, order) {
                write!(
                    text,
                    "{name}: the smallest batch within 10 % of the fastest is {}, {} GB/s, first \
                     folio after {us:.0} us. ",
                    size(batch),
                    number(gb)
                )?;
            }
        }
    }
    let marks = byte_marks(&latency);
    let title = |text: &str| text.to_owned();
    let mut charts = lines(
        title("Time to the first folio, by batch"),
        "batch",
        "microseconds, median",
        (Scale::Log, Scale::Log),
        marks.clone(),
        latency,
    )?;
    charts += &lines(
        title("Throughput of short moves, by batch"),
        "batch",
        "GB/s",
        (Scale::Log, Scale::Linear),
        marks,
        rate,
    )?;
    section(out, "First folio against batch size", &text, &charts)
}

/// Percentile curves of accesses by budget.
fn felt(results: &Results, out: &mut String) -> fmt::Result {
    let mut charts = String::new();
    for (folio, name) in FOLIOS {
        for who in ["readers", "writers"] {
            let mut series = Vec::new();
            for run in results.runs.iter().filter(|run| run.folio_bytes == Some(folio)) {
                let felt = if who == "readers" { &run.readers } else { &run.writers };
                let Some(felt) = felt else { continue };
                let name = match run.stall_budget_us {
                    Some(us) => format!("budget {us:.0} us"),
                    None => run.scenario.trim_start_matches("feel_").replace("burn", "burnt CPU"),
                };
                // The axis is 1/(1-q), so that each decade is one more nine; the maximum stands
                // where the number of accesses puts it.
                let most = felt.latency_us.count.max(1) as f64;
                let nines = |q: f64| (1.0 / (1.0 - q).max(1e-12)).min(most);
                let points = felt.curve.iter().map(|p| (nines(p.quantile), p.us)).collect();
                series.push(Series { name, points, dashed: run.stall_budget_us.is_none() });
            }
            let marks = [(1.0, "0"), (10.0, "90 %"), (100.0, "99 %"), (1e3, "99.9 %"),
                (1e4, "99.99 %"), (1e5, "99.999 %"), (1e6, "99.9999 %")];
            let marks = marks.map(|(at, name)| (at, name.to_owned())).to_vec();
            let title = format!("Latency of {who}, {} folios", name.to_uppercase());
            let axes = (Scale::Log, Scale::Log);
            charts += &lines(title, "accesses that took no longer", "microseconds", axes, marks, series)?;
        }
    }
    section(
        out,
        "What a program feels",
        "Every access of random readers and writers is timed and checked while the memory moves \
         without a pause. Broken lines are the controls: idle, and as many threads as the move \
         has that burn the same CPU time by copying private memory.",
        &charts,
    )
}

fn losses(results: &Results, out: &mut String) -> fmt::Result {
    out.push_str("<h2>Where this loses</h2>");
    if results.losses.is_empty() {
        out.push_str("<p>Nothing measured was slower than its baseline.</p>\n");
        return Ok(());
    }
    out.push_str("<div class=\"scroll\"><table><tr><th>ratio</th><th class=\"text\">what</th>\
                  <th class=\"text\">beside</th></tr>\n");
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
    let heads = ["scenario", "folio", "order", "division", "frames", "engine", "threads", "batch",
        "budget us", "GB/s", "min", "max", "hole p50 us", "p99", "max", "reader p99 us", "p99.9",
        "writer p99 us", "p99.9", "first folio us", "call us", "CPU s/GiB", "rusage", "faults/GiB",
        "switches/GiB", "TLB/GiB", "rounds", "verified", "note"];
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
        writeln!(out, "<p class=\"dim\">Not measured: {}: {}</p>", escape(&skipped.what), escape(&skipped.because))?;
    }
    Ok(())
}

fn is_text(head: &str) -> bool {
    ["scenario", "order", "division", "frames", "engine", "note"].contains(&head)
}

fn cells(run: &Run) -> [String; 29] {
    let text = |t: &Option<String>| t.clone().unwrap_or_default();
    let num = |v: Option<f64>| v.map(number).unwrap_or_default();
    let latency = |f: &Option<super::schema::Felt>| f.as_ref().map(|f| f.latency_us);
    let (readers, writers) = (latency(&run.readers), latency(&run.writers));
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
        num(readers.map(|q| q.p99)),
        num(readers.map(|q| q.p999)),
        num(writers.map(|q| q.p99)),
        num(writers.map(|q| q.p999)),
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
