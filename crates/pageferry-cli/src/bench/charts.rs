//! The sections of the page that are charts: throughput, batch sizes, latencies.

use std::fmt::{self, Write as _};

use super::figures::{self, FOLIOS, size};
use super::schema::{Results, Run};
use super::svg::{self, Bar, Lines, Scale, Series, number};

/// Bars of a chart at most: the rest is in the table.
const MOST_BARS: usize = 14;

/// A chart of the fastest moves of each folio size, with the baseline, against the roofline.
pub(super) fn throughput(results: &Results, out: &mut String) -> fmt::Result {
    let roofline = figures::best(&results.runs, |run| run.scenario == "roofline");
    let reference = roofline.and_then(Run::rate).map(|rate| (rate, "the roofline"));
    const KINDS: [(&str, usize); 9] = [
        ("move", 0),
        ("move_default", 2),
        ("move_unpromised", 2),
        ("exchange", 3),
        ("one_way", 4),
        ("sequential", 6),
        ("exchange_sequential", 6),
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
        // The baselines and exchanges are always shown, however slow.
        let (baselines, mut others): (Vec<_>, Vec<_>) = runs.into_iter().partition(|(run, _)| {
            run.scenario.ends_with("sequential")
                || ["exchange", "move_pages", "move_unpromised"].contains(&run.scenario.as_str())
        });
        others.truncate(MOST_BARS);
        let shown = others.into_iter().chain(baselines);
        let bars: Vec<Bar> = shown
            .filter_map(|(run, class)| {
                let spread = run.gb_per_s?;
                let words = [&run.order, &run.division, &run.frames].into_iter().flatten();
                let mut words: Vec<&str> = words.map(String::as_str).collect();
                words.retain(|word| *word != "recycled");
                let batch = run.batch_bytes.map(size).unwrap_or_default();
                let own = run.engine == results.settings.default_engine;
                if !own && run.scenario == "move" {
                    words.push(run.engine.trim_start_matches("cpu:"));
                }
                let kind = match run.scenario.as_str() {
                    "move" | "one_way" => String::new(),
                    "move_default" => "default: ".to_owned(),
                    "move_unpromised" => "default, old pages freed: ".to_owned(),
                    "move_pages" => "move_pages(2) ".to_owned(),
                    "exchange" => "exchange: ".to_owned(),
                    "exchange_sequential" => "sequential exchange: ".to_owned(),
                    _ => "sequential: ".to_owned(),
                };
                let name = format!("{kind}{} {}T {batch}", words.join(" "), run.threads);
                Some(Bar { name, low: spread.min, value: spread.median, high: spread.max, class })
            })
            .collect();
        let title = format!("Moves of {} folios", name.to_uppercase());
        charts += &svg::bars(&title, "GB/s, median and spread", &bars, reference)?;
    }
    section(
        out,
        "Throughput",
        "Moves of recycled and fresh frames, and exchanges of two sets of pages (both count), \
             beside the same transaction done folio after folio by one thread. T: threads; then the largest batch.",
        &charts,
    )?;

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
                    series.push(Series {
                        name: format!("{order}, {division}"),
                        points,
                        dashed: false,
                    });
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
pub(super) fn batches(results: &Results, out: &mut String) -> fmt::Result {
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
pub(super) fn felt(results: &Results, out: &mut String) -> fmt::Result {
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
            let marks = [
                (1.0, "0"),
                (10.0, "90 %"),
                (100.0, "99 %"),
                (1e3, "99.9 %"),
                (1e4, "99.99 %"),
                (1e5, "99.999 %"),
                (1e6, "99.9999 %"),
            ];
            let marks = marks.map(|(at, name)| (at, name.to_owned())).to_vec();
            let title = format!("Latency of {who}, {} folios", name.to_uppercase());
            let axes = (Scale::Log, Scale::Log);
            charts +=
                &lines(title, "accesses that took no longer", "microseconds", axes, marks, series)?;
        }
    }
    section(
        out,
        "What a program feels",
        "Every access of random readers and writers is timed and checked while the memory moves \
         without a pause. Broken lines are the controls: idle, and as many threads as the move \
         has that burn the same CPU time by copying private memory. The table below has, as \
         \u{201c}time in &gt; 20 us\u{201d}, the share of the time that went by in accesses longer \
         than that, whatever held them up, and as \u{201c}no CPU\u{201d} the part of it in which \
         another thread had the accessing thread's CPU; the rest is waiting for pages and \
         page-table work.",
        &charts,
    )
}
