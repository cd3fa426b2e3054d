//! The matrix as text and as JSON.

use std::fmt::{self, Write as _};

use serde::Serialize;

use super::settings::Copier;
use super::{Plan, Seen};
use crate::bench::schema::Spread;
use crate::output::{BOLD, DIM};
use crate::size::size;
use crate::table::{Table, percent};

/// The JSON form; the number changes when a field changes its meaning or goes.
#[derive(Debug, Serialize)]
pub(super) struct Matrix {
    schema_version: u32,
    pageferry_version: &'static str,
    cpu_model: String,
    /// Why there are no rates; null on a machine that is not emulated.
    emulated: Option<String>,
    from_node: u32,
    to_node: u32,
    /// Moved in each measurement.
    bytes: usize,
    rounds: u32,
    /// False: it was cancelled.
    pub(super) complete: bool,
    pub(super) rows: Vec<Row>,
}

/// A folio size.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) folio_bytes: usize,
    pub(super) cells: Vec<Cell>,
    /// Why there are no cells.
    pub(super) skipped: Option<String>,
    #[serde(skip)]
    pub(super) complete: bool,
}

/// A way to copy.
#[derive(Debug, Serialize)]
pub(super) struct Cell {
    #[serde(flatten)]
    pub(super) copier: Copier,
    /// GB (10^9 bytes) a second of the rounds.
    pub(super) gb_per_s: Option<Spread>,
    /// Of all rounds.
    moved_bytes: u64,
    stayed_bytes: u64,
    /// Of what moved, copied by the module.
    offloaded_bytes: u64,
    /// Of that, by its helpers.
    helped_bytes: u64,
    /// Why it was not measured.
    pub(super) skipped: Option<String>,
}

impl Cell {
    pub(super) fn new(copier: Copier, skipped: Option<String>) -> Self {
        let (moved_bytes, stayed_bytes, offloaded_bytes, helped_bytes) = (0, 0, 0, 0);
        Self {
            copier,
            gb_per_s: None,
            moved_bytes,
            stayed_bytes,
            offloaded_bytes,
            helped_bytes,
            skipped,
        }
    }

    pub(super) fn count(&mut self, seen: &Seen) {
        self.moved_bytes += seen.moved_bytes;
        self.stayed_bytes += seen.stayed_bytes;
        self.offloaded_bytes += seen.offloaded_bytes;
        self.helped_bytes += seen.helped_bytes;
    }

    /// What stands in the table.
    fn text(&self) -> String {
        match (&self.gb_per_s, self.moved_bytes) {
            _ if self.skipped.is_some() => "-".into(),
            (Some(rate), _) => format!("{:.2}", rate.median),
            (None, 0) => "none".into(),
            (None, _) if self.stayed_bytes > 0 => "part".into(),
            (None, _) => "moved".into(),
        }
    }

    /// What is to be said of it beside its rate.
    fn remark(&self) -> Option<String> {
        let mut remarks = Vec::new();
        if self.stayed_bytes > 0 {
            remarks.push(format!("{} stayed", size(self.stayed_bytes)));
        }
        if self.copier != Copier::Kernel && self.offloaded_bytes < self.moved_bytes {
            let share = percent(self.offloaded_bytes, self.moved_bytes);
            remarks.push(format!("{share} was copied by the module, the rest by the kernel"));
        }
        if matches!(self.copier, Copier::Threads(n) if n > 1) && self.moved_bytes > 0 {
            remarks
                .push(format!("helpers copied {}", percent(self.helped_bytes, self.moved_bytes)));
        }
        (!remarks.is_empty()).then(|| format!("{}: {}", self.copier, remarks.join(", ")))
    }
}

impl Matrix {
    pub(super) fn new(plan: &Plan) -> Self {
        Self {
            schema_version: 1,
            pageferry_version: env!("CARGO_PKG_VERSION"),
            cpu_model: plan.cpu_model.clone(),
            emulated: plan.emulated.clone(),
            from_node: plan.from,
            to_node: plan.to,
            bytes: plan.bytes,
            rounds: plan.rounds,
            complete: true,
            rows: Vec::new(),
        }
    }

    /// How far the rounds of a cell lie apart at most, in percent of their median.
    fn widest(&self) -> Option<f64> {
        let rates = self.rows.iter().flat_map(|row| &row.cells).filter_map(|cell| cell.gb_per_s);
        rates.map(|rate| 100.0 * (rate.max - rate.min) / rate.median).reduce(f64::max)
    }
}

impl fmt::Display for Copier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel => f.write_str("the kernel"),
            Self::Threads(1) => f.write_str("1 thread"),
            Self::Threads(n) => write!(f, "{n} threads"),
            Self::Channels(1) => f.write_str("1 channel"),
            Self::Channels(n) => write!(f, "{n} channels"),
        }
    }
}

pub(super) fn text(matrix: &Matrix) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_text(matrix, &mut out);
    out
}

fn write_text(matrix: &Matrix, out: &mut String) -> fmt::Result {
    let Matrix { from_node, to_node, rounds, .. } = matrix;
    writeln!(
        out,
        "{BOLD}{} from node {from_node} to node {to_node} by move_pages(2){BOLD:#}, {}",
        size(matrix.bytes as u64),
        matrix.cpu_model
    )?;
    match &matrix.emulated {
        Some(why) => writeln!(
            out,
            "emulated ({why}): no speed is given; every word was read back after each of {rounds} moves\n"
        )?,
        None => writeln!(out, "GB/s (10^9 bytes), medians of {rounds} rounds in turn\n")?,
    }
    let mut headings = vec!["folio".to_owned()];
    headings.extend(Copier::all().iter().map(|copier| match copier {
        Copier::Kernel => ">kernel".to_owned(),
        Copier::Threads(n) => format!(">mt {n}"),
        Copier::Channels(n) => format!(">dma {n}"),
    }));
    let mut table = Table::new(&headings.iter().map(String::as_str).collect::<Vec<_>>());
    for row in &matrix.rows {
        let cells = row.cells.iter().map(Cell::text);
        table.row([size(row.folio_bytes as u64)].into_iter().chain(cells));
    }
    writeln!(out, "{table}")?;
    writeln!(out, "{DIM}mt: pageferry_copy_mt, threads; dma: pageferry_copy_dma, channels{DIM:#}")?;
    if let Some(widest) = matrix.widest() {
        writeln!(out, "the rounds of a cell lie {widest:.0} % apart at most")?;
    }
    let mut left_out: Vec<String> = Vec::new();
    for row in &matrix.rows {
        let folio = size(row.folio_bytes as u64);
        if let Some(why) = &row.skipped {
            left_out.push(format!("{folio}: {why}"));
        }
        for remark in row.cells.iter().filter_map(Cell::remark) {
            writeln!(out, "{folio}, {remark}")?;
        }
        for cell in &row.cells {
            let told = cell.skipped.as_ref().map(|why| format!("{}: {why}", cell.copier));
            left_out.extend(told);
        }
    }
    let mut told: Vec<&String> = Vec::new();
    for line in &left_out {
        if !told.contains(&line) {
            writeln!(out, "left out, {line}")?;
            told.push(line);
        }
    }
    if !matrix.complete {
        writeln!(out, "cancelled: not all was measured")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(emulated: Option<&str>, rate: Option<f64>) -> Matrix {
        let cells = Copier::all().into_iter().map(|copier| {
            let why = matches!(copier, Copier::Channels(_)).then(|| "not loaded".to_owned());
            let mut cell = Cell::new(copier, why);
            if cell.skipped.is_none() {
                let offloaded_bytes = if copier == Copier::Kernel { 0 } else { 1 << 20 };
                let seen = Seen {
                    moved_bytes: 2 << 20,
                    stayed_bytes: 0,
                    offloaded_bytes,
                    helped_bytes: 0,
                };
                cell.count(&seen);
                cell.gb_per_s =
                    rate.map(|median| Spread { min: median - 0.1, median, max: median + 0.1 });
            }
            cell
        });
        let row = |cells, skipped| Row { folio_bytes: 4096, cells, skipped, complete: true };
        Matrix {
            schema_version: 1,
            pageferry_version: "0",
            cpu_model: "a CPU".into(),
            emulated: emulated.map(str::to_owned),
            from_node: 0,
            to_node: 1,
            bytes: 2 << 20,
            rounds: 3,
            complete: true,
            rows: vec![row(cells.collect(), None), row(Vec::new(), Some("none".into()))],
        }
    }

    #[test]
    fn an_emulated_machine_gets_no_rates() {
        let text = text(&matrix(Some("by something"), None));
        assert!(text.contains("no speed is given") && !text.contains("GB/s"), "{text}");
        assert!(
            text.contains("  moved  moved") && text.contains("left out, 4 KiB: none"),
            "{text}"
        );
    }

    #[test]
    fn a_real_machine_gets_medians_their_spread_and_who_copied() {
        let text = text(&matrix(None, Some(2.0)));
        for part in [
            "GB/s (10^9 bytes), medians of 3 rounds",
            "   2.00  2.00",
            "the rounds of a cell lie 10 % apart at most",
            "2 threads: 50 % was copied by the module, the rest by the kernel, helpers copied 0 %",
            "left out, 16 channels: not loaded",
        ] {
            assert!(text.contains(part), "{part:?} in {text}");
        }
        assert!(!text.contains("the kernel:"), "{text}");
    }
}
