//! The report for people.

use super::burn::Burnt;
use super::look::Frames;
use super::memory::{iec, si};
use super::moving::Route;
use super::report::{Away, DemoReport, Moved};
use super::twin::EDITIONS;
use crate::output::{BOLD, DIM, GREEN, RED};
use std::fmt::{self, Display, Formatter};

/// Left column, with what follows it.
fn row(f: &mut Formatter<'_>, name: &str, text: impl Display) -> fmt::Result {
    writeln!(f, "{BOLD}{name:<10}{BOLD:#} {text}")
}

impl Display for DemoReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.what(f)?;
        self.rates(f)?;
        self.latencies(f)?;
        self.proofs(f)
    }
}

impl DemoReport {
    fn ways(&self) -> [(&'static str, &Moved); 2] {
        [("pageferry", &self.moved), ("one folio at a time", &self.one_folio_at_a_time)]
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
        writeln!(f, "\n{BOLD}{:<26}{:>12}{:>10}{:>9}{BOLD:#}", "move", "moved", "time", "GB/s")?;
        for (name, moved) in self.ways() {
            let (bytes, time) = (si(moved.bytes, "B"), format!("{:.2} s", moved.seconds));
            write!(f, "  {name:<24}{bytes:>12}{time:>10}{:>9.2}", moved.gb_per_s)?;
            if let (Some(ratio), true) = (self.ratio, name == "pageferry") {
                write!(f, "   {BOLD}{ratio:.1} x{BOLD:#}")?;
            }
            writeln!(f)?;
        }
        for stayed in &self.moved.stayed {
            let (bytes, because) = (iec(stayed.bytes), &stayed.because);
            writeln!(f, "  {DIM}did not move: {bytes}, {because} (all moves together){DIM:#}")?;
        }
        if self.moved.stayed.is_empty() && self.moved.moves > 0 {
            writeln!(f, "  {DIM}{} moves, every page moved{DIM:#}", self.moved.moves)?;
        }
        Ok(())
    }

    fn latencies(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.holes(f)?;
        for (name, felt) in [("queries", &self.queries), ("updates", &self.updates)] {
            let title = format!("{name} felt");
            writeln!(
                f,
                "\n{BOLD}{title:<26}{:>10}{:>10}{:>10}{:>10}{:>12}{BOLD:#}",
                "p50", "p99", "p99.9", "max", name
            )?;
            for (phase, latency) in [
                ("nothing moves", felt.not_moving),
                ("CPU burnt, no move", felt.burnt_cpu),
                ("pageferry moves it", felt.moving),
                ("moved folio by folio", felt.one_folio_at_a_time),
            ] {
                write!(f, "  {phase:<24}")?;
                match latency {
                    None => writeln!(f, "{:>10}", "none")?,
                    Some(l) => {
                        for us in [l.p50_us, l.p99_us, l.p999_us, l.max_us] {
                            write!(f, "{:>10}", time(us))?;
                        }
                        writeln!(f, "{:>12}", l.operations)?;
                    }
                }
            }
        }
        if self.updates_without_room > 0 {
            let count = self.updates_without_room;
            writeln!(f, "  {DIM}{count} documents were not added: no room was left{DIM:#}")?;
        }
        let Burnt { threads, cpus_moving, cpus_burnt } = self.burnt_cpu;
        if cpus_burnt > 0.0 {
            writeln!(
                f,
                "  {DIM}CPU burnt: {threads} threads copied private memory and kept {cpus_burnt:.2} \
                 CPUs busy; moving kept {cpus_moving:.2} busy{DIM:#}"
            )?;
        }
        writeln!(f)
    }

    fn holes(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let budget = format!("in {}", time(self.stall_budget_us));
        writeln!(
            f,
            "\n{BOLD}{:<26}{:>10}{:>10}{:>10}{budget:>14}{:>8}{BOLD:#}",
            "a range was away", "p50", "p99", "max", "holes"
        )?;
        for (name, moved) in self.ways() {
            write!(f, "  {name:<24}")?;
            match moved.holes {
                None => writeln!(f, "{:>10}", "none")?,
                Some(away) => {
                    for us in [away.p50_us, away.p99_us, away.max_us] {
                        write!(f, "{:>10}", time(us))?;
                    }
                    writeln!(f, "{:>14}{:>8}", percent(&away), away.count)?;
                }
            }
        }
        let budget = time(self.stall_budget_us);
        writeln!(f, "  {DIM}from detach to attach; pageferry's stall budget is {budget}{DIM:#}")
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
    use super::*;

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
