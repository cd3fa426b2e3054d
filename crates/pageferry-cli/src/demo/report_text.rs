//! The report for people.

use super::burn::Burnt;
use super::look::Frames;
use super::memory::{iec, si};
use super::moving::Route;
use super::report::{Away, DemoReport, Felt, Latency, Moved, Spread};
use super::twin::EDITIONS;
use crate::output::{BOLD, DIM, GREEN, RED};
use std::fmt::{self, Display, Formatter};

/// Beyond this, in times of what the control feels, a move is called felt.
const FELT: f64 = 1.5;
/// Rounds in which nothing moves and that differ by more, in times, tell of a busy machine.
const UNSTEADY: f64 = 3.0;

/// Left column, with what follows it.
fn row(f: &mut Formatter<'_>, name: &str, text: impl Display) -> fmt::Result {
    writeln!(f, "{BOLD}{name:<10}{BOLD:#} {text}")
}

/// A line of column headings over rows whose names take 22 characters.
fn heading(f: &mut Formatter<'_>, columns: [&str; 5]) -> fmt::Result {
    let [a, b, c, d, e] = columns;
    let line = format!("{:<22}{a:>14}{b:>16}{c:>20}{d:>12}{e:>10}", "");
    writeln!(f, "{DIM}{}{DIM:#}", line.trim_end())
}

impl Display for DemoReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.what(f)?;
        self.rates(f)?;
        self.holes(f)?;
        self.latencies(f)?;
        self.proofs(f)?;
        writeln!(f, "\n{BOLD}In short:{BOLD:#} {}", self.verdict())
    }
}

impl DemoReport {
    fn ways(&self) -> [(&'static str, &Moved); 2] {
        [("pageferry", &self.moved), ("folio by folio", &self.one_folio_at_a_time)]
    }

    fn what(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let text = &self.text;
        let sizes = (si(text.bytes, "B"), si(text.files, ""), text.documents);
        row(f, "text", format_args!("{} in {} files, {} documents", sizes.0, sizes.1, sizes.2))?;
        for folder in &text.folders {
            row(f, "", format_args!("{:>8}  {}", si(folder.bytes, "B"), folder.path.display()))?;
        }
        let mut left_out = Vec::new();
        for (count, why) in [
            (text.not_text, "not text"),
            (text.unreadable, "unreadable"),
            (text.cut, "read in part, for they are long"),
        ] {
            if count > 0 {
                left_out.push(format!("{count} {why}"));
            }
        }
        if text.more {
            left_out.push("there is more, which was not needed".to_owned());
        }
        if !left_out.is_empty() {
            row(f, "", format_args!("{DIM}files: {}{DIM:#}", left_out.join(", ")))?;
        }
        let index = &self.index;
        row(
            f,
            "index",
            format_args!(
                "{} in managed memory: {} words, {} places, {} documents",
                iec(index.bytes),
                si(self.scan.words, ""),
                si(self.scan.positions, ""),
                index.documents,
            ),
        )?;
        if index.text_used_up {
            let wanted = iec(index.wanted_bytes);
            let text = format!("the text went in {EDITIONS} times, as often as it may");
            row(f, "", format_args!("{text}: there is too little for {wanted}"))?;
        } else if index.editions > 1.0 {
            let text = format!("the text went in {:.1} times", index.editions);
            row(f, "", format_args!("{DIM}{text} to make it this large{DIM:#}"))?;
        }
        row(
            f,
            "region",
            format_args!(
                "{}, of which {} hold pages; {}",
                iec(index.region_bytes),
                iec(index.present_bytes),
                self.folios
            ),
        )?;
        match self.route {
            Route::Nodes { home, away } => {
                row(f, "route", format_args!("node {home} to node {away} and back"))?;
            }
            Route::Frames { node } => {
                let why = if self.memory_nodes > 1 {
                    "the other nodes have no room for the region"
                } else {
                    "this machine has one node with memory"
                };
                row(f, "route", format_args!("frame to frame on node {node}: {why}"))?;
            }
        }
        if self.user_mode_only {
            row(f, "rights", "user-mode-only: no system call was given the index's memory")?;
        }
        Ok(())
    }

    fn rates(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{BOLD}How fast memory moves at full speed, while the index is in use{BOLD:#}"
        )?;
        heading(f, ["moved in", "of moving", "GB/s in the", "slowest to", ""])?;
        heading(f, ["all rounds", "time", "middle round", "fastest", ""])?;
        for (name, moved) in self.ways() {
            let (bytes, seconds) = (si(moved.bytes, "B"), format!("{:.2} s", moved.seconds));
            let (middle, range) = moved.spread.map_or_else(Default::default, |s| {
                (format!("{:.2}", s.median), format!("{:.2}..{:.2}", s.min, s.max))
            });
            write!(f, "  {name:<20}{bytes:>14}{seconds:>16}{middle:>20}{range:>12}")?;
            if let (Some(ratio), true) = (self.ratio, name == "pageferry") {
                write!(f, "   {BOLD}{ratio:.1} times{BOLD:#}")?;
            }
            writeln!(f)?;
        }
        for stayed in &self.moved.stayed {
            let (bytes, because) = (iec(stayed.bytes), &stayed.because);
            writeln!(f, "  {DIM}did not move: {bytes}, {because} (all moves together){DIM:#}")?;
        }
        if self.moved.stayed.is_empty() && self.moved.moves > 0 {
            let moves = self.moved.moves;
            writeln!(f, "  {DIM}{moves} moves by pageferry, every page moved{DIM:#}")?;
        }
        writeln!(
            f,
            "  {DIM}folio by folio: the same move by one thread, one page (4 KiB or 2 MiB) after \
             another{DIM:#}"
        )
    }

    fn latencies(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let work = &self.equal_work;
        for (name, count, felt) in [
            ("queries", work.queries_per_round, &self.queries),
            ("updates", work.updates_per_round, &self.updates),
        ] {
            writeln!(
                f,
                "\n{BOLD}How long {name} took: in each row the same {count} in each of {} \
                 rounds{BOLD:#}",
                work.rounds
            )?;
            heading(f, ["half took", "99 of 100 took", "99 of 100 took", "the slowest", ""])?;
            heading(f, ["less than", "less than", "(best..worst)", "took", ""])?;
            for (phase, latency) in [
                ("nothing moves", &felt.not_moving),
                ("CPU burnt, no move", &felt.burnt_cpu),
                ("pageferry moves it", &felt.moving),
                ("moved folio by folio", &felt.one_folio_at_a_time),
            ] {
                write!(f, "  {phase:<20}")?;
                match latency {
                    None => writeln!(f, "{:>14}", "none")?,
                    Some(l) => {
                        let Spread { min, median, max } = l.p99_spread_us;
                        let range = format!("{}..{}", time(min), time(max));
                        let (half, most) = (time(l.p50_spread_us.median), time(median));
                        let slowest = time(l.max_us);
                        writeln!(f, "{half:>14}{most:>16}{range:>20}{slowest:>12}")?;
                    }
                }
            }
            if (1..100).contains(&count) {
                writeln!(
                    f,
                    "  {DIM}fewer than 100 in a round: \"99 of 100\" is the slowest one there; \
                     give more --seconds{DIM:#}"
                )?;
            }
            if let (Some(l), true) = (&felt.moving_at_full_speed, felt.moving.is_some()) {
                let most = time(l.p99_spread_us.median);
                writeln!(
                    f,
                    "  {DIM}not to be compared: while pageferry moved at full speed, 99 of 100 took \
                     less than {most}{DIM:#}"
                )?;
            }
        }
        writeln!(f)?;
        if self.updates_without_room > 0 {
            let count = self.updates_without_room;
            writeln!(
                f,
                "  {DIM}{count} times a document could not be put back: no room was left{DIM:#}"
            )?;
        }
        self.explain(f)
    }

    /// What the rows are.
    fn explain(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let work = &self.equal_work;
        if work.rounds == 0 {
            return Ok(());
        }
        let middle = |spread: Option<Spread>| spread.map_or(0.0, |s| s.median * 1e3);
        writeln!(
            f,
            "  {DIM}Figures are of the middle round; the rows take turns. An update takes a \
             document out or back in.\n  Both moves take the same {} of the index in each \
             round, at a common pace of {:.1} MB/s,\n  half of what the slower one can (pageferry \
             kept {:.1}, folio by folio {:.1} MB/s).{DIM:#}",
            si(work.bytes_per_round, "B"),
            work.gb_per_s * 1e3,
            middle(work.moving.spread),
            middle(work.one_folio_at_a_time.spread),
        )?;
        let Burnt { threads, cpus_moving, cpus_burnt } = self.burnt_cpu;
        writeln!(
            f,
            "  {DIM}CPU burnt: {threads} threads copied other memory for as much CPU time as \
             pageferry's move took\n  (they kept {cpus_burnt:.2} CPUs busy, the move \
             {cpus_moving:.2}): what is felt beyond that is the move itself.{DIM:#}\n"
        )
    }

    fn holes(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let budget = time(self.stall_budget_us);
        writeln!(f, "\n{BOLD}How long a piece of memory was away while it moved{BOLD:#}")?;
        heading(f, ["half were", "99 of 100 were", "the longest", "back in", "pieces"])?;
        heading(f, ["back in", "back in", "was away", &budget, "moved"])?;
        for (name, moved) in self.ways() {
            write!(f, "  {name:<20}")?;
            match moved.holes {
                None => writeln!(f, "{:>14}", "none")?,
                Some(away) => {
                    let [half, most, longest] = [away.p50_us, away.p99_us, away.max_us].map(time);
                    write!(f, "{half:>14}{most:>16}{longest:>20}")?;
                    writeln!(f, "{:>12}{:>10}", percent(&away), away.count)?;
                }
            }
        }
        writeln!(
            f,
            "  {DIM}who touches it meanwhile waits; pageferry is told to have it back in \
             {budget}{DIM:#}"
        )
    }

    /// The closing sentences: what it all means, also when that is bad news.
    fn verdict(&self) -> String {
        if !self.is_right() {
            return "WRONG ANSWERS: what was moved is not what it was. Please report this.".into();
        }
        let right = "every answer was right";
        let p99 = |latency: &Option<Latency>| latency.as_ref().map(|l| l.p99_spread_us.median);
        let felt = |felt: &Felt| Some((p99(&felt.moving)?, p99(&felt.burnt_cpu)?));
        let (Some(queries), Some(updates)) = (felt(&self.queries), felt(&self.updates)) else {
            return format!("{right}; too little was measured to say what was felt.");
        };
        let times = |(moving, burnt): (f64, f64)| moving / burnt.max(f64::MIN_POSITIVE);
        let worse = times(queries).max(times(updates));
        let judged = match worse {
            worse if worse <= 1.0 => "the move itself was not felt",
            worse if worse <= FELT => "the move itself was hardly felt",
            _ => "THE MOVE WAS FELT",
        };
        let mut text = format!(
            "{right}, and {judged} at {:.0} MB/s.\n99 of 100 queries took less than {}: {:.1} times of what they \
             take when as much CPU is burnt.\n99 of 100 updates took less than {}: {:.1} times.",
            self.equal_work.gb_per_s * 1e3,
            time(queries.0),
            times(queries),
            time(updates.0),
            times(updates),
        );
        let work = &self.equal_work;
        if !work.bytes_are_equal() {
            text +=
                "\nBut the two moves did not move the same bytes, so do not compare their rows.";
        } else if !work.pace_was_held() {
            text += "\nBut a move fell behind the common pace, so do not compare the moves' rows.";
        }
        if self.updates_without_room > 0 {
            text +=
                "\nBut some updates had no room, so the rows of updates are not quite equal work.";
        }
        let unsteady = [&self.queries, &self.updates].into_iter().any(|felt| {
            let spread = felt.not_moving.as_ref().map(|l| l.p99_spread_us);
            spread.is_some_and(|s| s.max > s.min * UNSTEADY)
        });
        if unsteady {
            text += "\nThis machine was busy otherwise: with nothing moving, rounds differ widely. \
                     Take the figures with care.";
        }
        text
    }

    fn proofs(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let verdict = |f: &mut Formatter<'_>, differing: u64| match differing {
            0 => writeln!(f, "{GREEN}none differs{GREEN:#}"),
            n => writeln!(f, "{RED}{n} differ{RED:#}"),
        };
        write!(f, "{BOLD}{:<10}{BOLD:#} ", "answers")?;
        write!(f, "{} compared with an index that was not moved: ", self.answers.compared)?;
        verdict(f, self.answers.differing)?;
        if let Some(difference) = &self.answers.first_difference {
            row(f, "", difference)?;
        }
        let scan = &self.scan;
        write!(f, "{BOLD}{:<10}{BOLD:#} ", "at the end")?;
        write!(
            f,
            "{} words with {} places compared: ",
            si(scan.words, ""),
            si(scan.positions, "")
        )?;
        verdict(f, scan.differing)?;
        self.pages(f)?;
        if self.cancelled {
            row(f, "cancelled", "by the user; what was done until then is reported")?;
        }
        Ok(())
    }

    /// What was seen from outside.
    fn pages(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Frames { moves, sampled, changed, hidden, base, huge } = &self.physical_pages;
        if *hidden {
            row(f, "pages", "physical addresses are shown to CAP_SYS_ADMIN only (try as root)")?;
        } else {
            let text = "looked at had another physical address after a move";
            row(f, "pages", format_args!("{changed} of {sampled} {text}"))?;
        }
        for (name, seen) in [("huge", huge), ("base", base)] {
            if seen.present_bytes == 0 {
                continue;
            }
            let (there, moved) = (iec(seen.present_bytes), iec(seen.moved_bytes));
            let whole = if name == "huge" { " whole" } else { "" };
            write!(f, "{:<10} {name} pages: {there} there, {moved} moved{whole}", "")?;
            if !hidden {
                write!(f, "; {} of {} at another address", seen.changed, seen.sampled)?;
            }
            writeln!(f, " (in {moves} moves)")?;
        }
        Ok(())
    }
}

/// How many of the ranges were back within the budget; never rounded up to all of them.
#[allow(clippy::cast_precision_loss, reason = "rounded to be read")]
fn percent(away: &Away) -> String {
    let share = away.within_budget as f64 / away.count.max(1) as f64 * 1e4;
    format!("{:.2} %", share.floor() / 100.0)
}

/// A time with a unit that suits it.
fn time(us: f64) -> String {
    match us {
        us if us < 99.95 => format!("{us:.1} us"),
        us if us < 9999.5 => format!("{us:.0} us"),
        us if us < 999_950.0 => format!("{:.1} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::super::corpus::Taken;
    use super::super::report::{EqualWork, IndexSize, Paced, Setting};
    use super::*;
    use pageferry_topology::NodeId;

    fn spread(median: f64) -> Spread {
        Spread { min: median / 2.0, median, max: median * 1.5 }
    }

    fn took(operations: u64, p99: f64) -> Option<Latency> {
        Some(Latency {
            operations,
            p50_us: p99 / 10.0,
            p99_us: p99,
            p999_us: p99 * 1.5,
            max_us: p99 * 2.0,
            rounds: Vec::new(),
            p50_spread_us: spread(p99 / 10.0),
            p99_spread_us: spread(p99),
        })
    }

    fn felt(operations: u64, [still, burnt, moving, one, full]: [f64; 5]) -> Felt {
        Felt {
            not_moving: took(operations, still),
            burnt_cpu: took(operations, burnt),
            moving: took(operations, moving),
            one_folio_at_a_time: took(operations, one),
            moving_at_full_speed: took(operations, full),
            one_folio_at_a_time_at_full_speed: None,
        }
    }

    fn moved(bytes: u64, rate: f64) -> Moved {
        let away = Away {
            count: 40_000,
            p50_us: 50.0,
            p99_us: 700.0,
            max_us: 12_345.0,
            within_budget: 39_999,
        };
        Moved {
            moves: 12,
            bytes,
            seconds: 1.5,
            cpu_seconds: 2.0,
            gb_per_s: rate,
            rounds: vec![rate; 4],
            spread: Some(spread(rate)),
            holes: Some(away),
            stayed: Vec::new(),
        }
    }

    /// A report as of a quiet machine.
    fn report() -> DemoReport {
        let setting = Setting {
            route: Route::Frames { node: NodeId::new(0) },
            memory_nodes: 1,
            user_mode_only: false,
            folios: "base pages",
            query_threads: 2,
            wanted_bytes: 256 << 20,
        };
        let text = Taken { files: 7169, bytes: 134_000_000, documents: 9878, ..Taken::default() };
        let paced = |late_steps| Paced {
            bytes: vec![60_000_000; 4],
            rounds: vec![0.1; 4],
            spread: Some(spread(0.1)),
            steps: 240,
            late_steps,
        };
        let mut report = DemoReport::new(setting, text);
        report.index = IndexSize { bytes: 262 << 20, documents: 10_467, ..IndexSize::default() };
        report.moved = moved(3_700_000_000, 4.5);
        report.one_folio_at_a_time = moved(194_000_000, 0.2);
        report.ratio = Some(22.5);
        report.equal_work = EqualWork {
            rounds: 4,
            queries_per_round: 480,
            updates_per_round: 60,
            bytes_per_round: 60_000_000,
            steps_per_round: 60,
            gb_per_s: 0.1,
            moving: paced(0),
            one_folio_at_a_time: paced(3),
        };
        report.queries = felt(1920, [900.0, 1000.0, 1100.0, 2000.0, 5000.0]);
        report.updates = felt(240, [1500.0, 2000.0, 1900.0, 30_000.0, 60_000.0]);
        report.burnt_cpu = Burnt { threads: 2, cpus_moving: 0.06, cpus_burnt: 0.061 };
        report.answers.compared = 20_000;
        report
    }

    fn plain(text: &impl Display) -> String {
        anstream::adapter::strip_str(&text.to_string()).to_string()
    }

    #[test]
    fn a_report_reads_so() {
        insta::assert_snapshot!(plain(&report()));
    }

    #[test]
    fn bad_news_is_told() {
        let said = |change: fn(&mut DemoReport)| {
            let mut report = report();
            change(&mut report);
            report.verdict()
        };
        let all = [
            said(|r| r.updates.moving = took(240, 6000.0)),
            said(|r| r.equal_work.one_folio_at_a_time.bytes[1] -= 4096),
            said(|r| r.equal_work.moving.spread = Some(spread(0.08))),
            said(|r| {
                r.queries.not_moving = took(0, 1.0).map(|l| Latency {
                    p99_spread_us: Spread { min: 100.0, median: 200.0, max: 400.0 },
                    ..l
                })
            }),
            said(|r| r.updates_without_room = 7),
            said(|r| r.queries.moving = None),
            said(|r| r.scan.differing = 1),
        ];
        insta::assert_snapshot!(all.join("\n\n"));
    }

    #[test]
    fn no_line_is_wider_than_a_terminal_should_be() {
        let text = plain(&report());
        let widest = text.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(100), "{widest:?}");
    }

    #[test]
    fn a_time_has_a_unit_that_suits_it() {
        let written = [0.94, 99.9, 1234.4, 45_600.0, 2_500_000.0].map(time);
        assert_eq!(written, ["0.9 us", "99.9 us", "1234 us", "45.6 ms", "2.50 s"]);
    }

    #[test]
    fn a_share_is_all_only_if_it_is() {
        let away = |within_budget| {
            let (count, p50_us, p99_us, max_us) = (100_000, 0.0, 0.0, 0.0);
            percent(&Away { count, p50_us, p99_us, max_us, within_budget })
        };
        assert_eq!([away(100_000), away(99_999), away(0)], ["100.00 %", "99.99 %", "0.00 %"]);
    }
}
