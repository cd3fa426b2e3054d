//! The headline figures, made from the runs: ratios, targets, and where this loses.
//!
//! Every ratio is one of medians of runs that were measured in the same rounds. "Best" is the
//! best of the configurations measured, on both sides of a ratio.

use super::feel::BUDGETS_US;
use super::schema::{Bound, Loss, Results, Run, Target, Verdict};

/// Folio sizes with the names that ratios use.
pub(super) const FOLIOS: [(u64, &str); 2] = [(4096, "4k"), (2 << 20, "2m")];
/// Medians closer than this, with spreads that overlap, cannot be told apart in a few rounds.
const NOISE: f64 = 0.05;
/// Allocations that a move may make per folio: some per call, none per folio.
const ALLOCATIONS: f64 = 0.001;

/// Computes everything that follows from the runs.
pub(super) fn conclude(results: &mut Results) {
    let mut figures = Figures { targets: Vec::new(), ratios: Vec::new() };
    figures.of(&results.runs);
    results.ratios.extend(figures.ratios);
    let mut targets = figures.targets;
    for (name, meaning, bound) in [
        ("engine_metadata_over_managed", "the engine's own tables, of managed memory", 0.005),
        ("engine_resident_over_managed", "resident memory of the idle engine, of managed", 0.005),
        ("allocations_per_folio", "allocations of a move for each further folio", ALLOCATIONS),
    ] {
        let value = results.ratios.get(name).copied();
        targets.push(target(name, meaning, value, Bound::AtMost, bound, false));
    }
    results.targets = targets;
    results.losses = losses(&results.runs);
}

struct Figures {
    ratios: Vec<(String, f64)>,
    targets: Vec<Target>,
}

impl Figures {
    fn of(&mut self, runs: &[Run]) {
        let roofline = best(runs, |run| run.scenario == "roofline");
        for (folio, name) in FOLIOS {
            let of = |scenario: &'static str, order: Option<&'static str>| {
                best(runs, move |run| {
                    run.scenario == scenario
                        && run.folio_bytes == Some(folio)
                        && order.is_none_or(|order| run.order.as_deref() == Some(order))
                })
            };
            let moved = of("move", Some("frozen"));
            let live = of("move", Some("live"));
            let (frozen_floor, live_floor) = if folio == 4096 { (0.55, 0.4) } else { (0.8, 0.0) };
            self.at_least(
                format!("move_{name}_over_roofline"),
                "best frozen move of recycled frames, of the best copy",
                (moved, roofline),
                frozen_floor,
            );
            let ratio = format!("live_{name}_over_roofline");
            if folio == 4096 {
                let meaning = "best live move of recycled frames, of the best copy";
                self.at_least(ratio, meaning, (live, roofline), live_floor);
            } else {
                self.ratio(ratio, (live, roofline));
            }
            let sequential = of("sequential", Some("frozen"));
            self.at_least(
                format!("move_{name}_over_sequential"),
                "the same, beside folio after folio by one thread",
                (moved, sequential),
                1.0,
            );
            self.ratio(
                format!("live_{name}_over_sequential"),
                (live, of("sequential", Some("live"))),
            );
            self.ratio(format!("default_{name}_over_best"), (of("move_default", None), moved));
            let (unpromised, by_kernel) = (of("move_unpromised", None), of("move_pages", None));
            for (against, what, meaning, floor) in [
                (roofline, "roofline", "default move, old pages freed, of the best copy", 0.22),
                (by_kernel, "move_pages", "the same, beside the kernel's move_pages(2)", 2.5),
            ] {
                let (ratio, pair) =
                    (format!("unpromised_{name}_over_{what}"), (unpromised, against));
                if folio == 4096 {
                    self.at_least(ratio, meaning, pair, floor);
                } else {
                    self.ratio(ratio, pair);
                }
            }
            let exchanged = of("exchange", None);
            self.ratio(format!("exchange_{name}_over_roofline"), (exchanged, roofline));
            self.ratio(
                format!("exchange_{name}_over_sequential"),
                (exchanged, of("exchange_sequential", None)),
            );
            self.ratio(format!("move_{name}_over_move_pages"), (moved, of("move_pages", None)));
            let fresh = |run: &&Run| {
                run.scenario == "one_way_sequential"
                    && run.folio_bytes == Some(folio)
                    && run.frames.as_deref() == Some("fresh")
            };
            self.at_least(
                format!("one_way_{name}_over_sequential"),
                "best move to fresh frames, beside folio after folio by one thread",
                (of("one_way", None), runs.iter().find(fresh)),
                1.5,
            );
            for (scenario, baseline, meaning) in [
                ("one_cpu", "one_cpu_sequential", "default move on one CPU, beside sequential"),
                ("busy", "busy_sequential", "default move with busy CPUs, beside sequential"),
                ("single", "single_sequential", "default move of one folio, beside sequential"),
            ] {
                let pair = (of(scenario, None), of(baseline, None));
                self.at_least(format!("{scenario}_{name}_over_sequential"), meaning, pair, 1.0);
            }
            self.felt(runs, folio, name);
        }
    }

    fn ratio(&mut self, name: String, pair: (Option<&Run>, Option<&Run>)) -> Option<f64> {
        let (ours, theirs) = (pair.0?.rate()?, pair.1?.rate()?);
        let value = (theirs > 0.0).then(|| ours / theirs)?;
        self.ratios.push((name, value));
        Some(value)
    }

    fn at_least(
        &mut self,
        name: String,
        meaning: &str,
        pair: (Option<&Run>, Option<&Run>),
        bound: f64,
    ) {
        let value = self.ratio(name.clone(), pair);
        let spreads = pair.0.and_then(|run| run.gb_per_s).zip(pair.1.and_then(|run| run.gb_per_s));
        // Noise can excuse a tie with the baseline, not a floor that was missed.
        let tied = bound == 1.0
            && spreads.is_some_and(|(a, b)| a.max >= b.min && b.max >= a.min)
            && value.is_some_and(|value| value >= 1.0 - NOISE);
        self.targets.push(target(&name, meaning, value, Bound::AtLeast, bound, tied));
    }

    /// Holes against budgets, accesses against the control.
    fn felt(&mut self, runs: &[Run], folio: u64, name: &str) {
        let control =
            runs.iter().find(|r| r.scenario == "feel_burn" && r.folio_bytes == Some(folio));
        for budget in BUDGETS_US {
            let run = runs.iter().find(|run| {
                run.scenario == "feel"
                    && run.folio_bytes == Some(folio)
                    && run.stall_budget_us == Some(budget as f64)
            });
            let hole = run.and_then(|run| run.hole_us).map(|hole| hole.p99 / budget as f64);
            let ratio = format!("hole_p99_{name}_over_budget_{budget}us");
            self.ratios.extend(hole.map(|value| (ratio.clone(), value)));
            if budget >= 100 {
                let meaning = "99 of 100 holes, of the stall budget";
                self.targets.push(target(&ratio, meaning, hole, Bound::AtMost, 1.0, false));
            }
            for (who, pick) in [
                (
                    "readers",
                    (|run: &Run| run.readers.as_ref().map(|f| f.latency_us.p99)) as fn(&Run) -> _,
                ),
                ("writers", |run: &Run| run.writers.as_ref().map(|f| f.latency_us.p99)),
            ] {
                let pair: (Option<f64>, Option<f64>) = (run.and_then(pick), control.and_then(pick));
                let value = pair.0.zip(pair.1).filter(|(_, c)| *c > 0.0).map(|(run, c)| run / c);
                let ratio = format!("{who}_p99_{name}_over_burn_{budget}us");
                self.ratios.extend(value.map(|value| (ratio.clone(), value)));
                let meaning = "99 of 100 accesses during moves, of the same with burnt CPU";
                self.targets.push(target(&ratio, meaning, value, Bound::AtMost, 1.5, false));
            }
        }
    }
}

fn target(
    ratio: &str,
    meaning: &str,
    value: Option<f64>,
    bound: Bound,
    target: f64,
    tied: bool,
) -> Target {
    let verdict = match (value, bound) {
        (None, _) => Verdict::NotMeasured,
        (Some(value), Bound::AtLeast) if value >= target => Verdict::Met,
        (Some(value), Bound::AtMost) if value <= target => Verdict::Met,
        (Some(_), _) if tied => Verdict::WithinNoise,
        (Some(_), _) => Verdict::Missed,
    };
    let (ratio, meaning) = (ratio.to_owned(), meaning.to_owned());
    Target { ratio, meaning, value, target, bound, verdict }
}

/// The run with the highest median.
pub(super) fn best(runs: &[Run], is: impl Fn(&Run) -> bool) -> Option<&Run> {
    runs.iter()
        .filter(|run| is(run) && run.rate().is_some())
        .max_by(|a, b| a.rate().unwrap_or(0.0).total_cmp(&b.rate().unwrap_or(0.0)))
}

/// Everything that is slower than its baseline, the worst first.
fn losses(runs: &[Run]) -> Vec<Loss> {
    let mut losses = Vec::new();
    for run in runs {
        let baseline = match run.scenario.as_str() {
            "move" | "move_default" | "move_unpromised" => "sequential",
            "one_way" => "one_way_sequential",
            "exchange" => "exchange_sequential",
            "one_cpu" => "one_cpu_sequential",
            "busy" => "busy_sequential",
            "single" => "single_sequential",
            _ => continue,
        };
        let against = runs.iter().find(|other| {
            other.scenario == baseline
                && other.folio_bytes == run.folio_bytes
                && other.frames == run.frames
                && (other.order == run.order || baseline != "sequential")
        });
        let Some(against) = against else { continue };
        let ratio = run.rate().zip(against.rate()).map(|(ours, theirs)| ours / theirs);
        if let Some(ratio) = ratio.filter(|&ratio| ratio < 1.0) {
            losses.push(Loss { what: describe(run), against: describe(against), ratio });
        }
    }
    losses.sort_by(|a, b| a.ratio.total_cmp(&b.ratio));
    losses
}

/// A run in a few words.
pub(super) fn describe(run: &Run) -> String {
    let mut words = vec![run.scenario.replace('_', " ")];
    words.extend(run.folio_bytes.map(size));
    words.extend([&run.order, &run.division, &run.frames].into_iter().flatten().cloned());
    words.push(run.engine.clone());
    words.push(format!("{} threads", run.threads));
    words.extend(run.batch_bytes.map(|bytes| format!("in {}", size(bytes))));
    words.extend(run.stall_budget_us.map(|us| format!("budget {us:.0} us")));
    words.join(" ")
}

/// `4K`, `2M`.
pub(super) fn size(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 && b % (1 << 30) == 0 => format!("{}G", b >> 30),
        b if b >= 1 << 20 && b % (1 << 20) == 0 => format!("{}M", b >> 20),
        b if b >= 1 << 10 && b % (1 << 10) == 0 => format!("{}K", b >> 10),
        b => b.to_string(),
    }
}

/// The smallest batch that reaches 90 % of the best throughput of its curve, and the first
/// folio's latency with it.
pub(super) fn best_batch(runs: &[Run], folio: u64, order: &str) -> Option<(u64, f64, f64)> {
    let curve = curve(runs, folio, order);
    let top = curve.iter().filter_map(|run| run.rate()).fold(0.0, f64::max);
    let run = curve.into_iter().find(|run| run.rate().is_some_and(|rate| rate >= 0.9 * top))?;
    Some((run.batch_bytes?, run.rate()?, run.first_folio_us?))
}

/// The first-folio runs of a folio size and order, by batch.
pub(super) fn curve<'a>(runs: &'a [Run], folio: u64, order: &str) -> Vec<&'a Run> {
    let mut curve: Vec<&Run> = runs
        .iter()
        .filter(|run| {
            run.scenario == "first_folio"
                && run.folio_bytes == Some(folio)
                && run.order.as_deref() == Some(order)
        })
        .collect();
    curve.sort_by_key(|run| run.batch_bytes);
    curve
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::schema::Spread;

    fn run(scenario: &str, order: &str, median: f64) -> Run {
        Run {
            folio_bytes: Some(4096),
            order: Some(order.to_owned()),
            frames: Some("recycled".to_owned()),
            gb_per_s: Some(Spread { min: median * 0.9, median, max: median * 1.1 }),
            ..Run::new(scenario)
        }
    }

    fn figures(runs: &[Run]) -> Figures {
        let mut figures = Figures { ratios: Vec::new(), targets: Vec::new() };
        figures.of(runs);
        figures
    }

    fn verdict(figures: &Figures, name: &str) -> Verdict {
        let target = figures.targets.iter().find(|target| target.ratio == name);
        target.map_or(Verdict::NotMeasured, |target| target.verdict)
    }

    #[test]
    fn the_best_move_counts_against_the_best_copy() {
        let roofline = |rate| Run { folio_bytes: None, ..run("roofline", "", rate) };
        let runs = [
            roofline(10.0),
            roofline(20.0),
            run("move", "frozen", 8.0),
            run("move", "frozen", 10.0),
            run("move", "live", 9.5),
            run("sequential", "frozen", 2.0),
        ];
        let figures = figures(&runs);
        let ratio = |name: &str| figures.ratios.iter().find(|(n, _)| n == name).map(|(_, v)| *v);
        assert_eq!(ratio("move_4k_over_roofline"), Some(0.5));
        assert_eq!(ratio("move_4k_over_sequential"), Some(5.0));
        assert_eq!(ratio("move_2m_over_roofline"), None);
        assert_eq!(verdict(&figures, "move_4k_over_roofline"), Verdict::Missed);
        assert_eq!(verdict(&figures, "live_4k_over_roofline"), Verdict::Met);
        assert_eq!(verdict(&figures, "move_2m_over_roofline"), Verdict::NotMeasured);
    }

    #[test]
    fn a_tie_with_the_baseline_is_told_from_a_loss() {
        let single =
            |rate| [run("single", "frozen", rate), run("single_sequential", "frozen", 1.0)];
        let name = "single_4k_over_sequential";
        assert_eq!(verdict(&figures(&single(1.01)), name), Verdict::Met);
        assert_eq!(verdict(&figures(&single(0.97)), name), Verdict::WithinNoise);
        assert_eq!(verdict(&figures(&single(0.80)), name), Verdict::Missed);
    }

    #[test]
    fn what_is_slower_than_its_baseline_is_listed_worst_first() {
        let runs = [
            run("sequential", "frozen", 2.0),
            run("move", "frozen", 1.5),
            run("move", "frozen", 1.0),
            run("move", "frozen", 3.0),
            run("move", "live", 0.1),
        ];
        let found: Vec<f64> = losses(&runs).iter().map(|loss| loss.ratio).collect();
        assert_eq!(found, [0.5, 0.75]);
    }

    #[test]
    fn the_best_batch_is_the_smallest_that_is_nearly_the_fastest() {
        let at = |batch, rate, first| Run {
            batch_bytes: Some(batch),
            first_folio_us: Some(first),
            ..run("first_folio", "frozen", rate)
        };
        let runs = [at(2 << 20, 10.0, 200.0), at(4096, 1.0, 5.0), at(512 << 10, 9.2, 60.0)];
        assert_eq!(best_batch(&runs, 4096, "frozen"), Some((512 << 10, 9.2, 60.0)));
    }

    #[test]
    fn sizes_are_short() {
        assert_eq!([4096, 65536, 2 << 20, 1000].map(size), ["4K", "64K", "2M", "1000"]);
    }
}
