//! Columns of text, and bars.

use std::fmt::{self, Write as _};

/// Characters of a bar that stands for all.
const BAR: u32 = 24;

/// A table: its columns are as wide as what they hold.
#[derive(Debug)]
pub(crate) struct Table {
    /// Whether each column is aligned to the right.
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings; those that begin with `>` are aligned to the right, with what
    /// stands below them.
    pub(crate) fn new(headings: &[&str]) -> Self {
        let right = headings.iter().map(|heading| heading.starts_with('>')).collect();
        let first = headings.iter().map(|heading| heading.trim_start_matches('>').to_owned());
        Self { right, rows: vec![first.collect()] }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.len() < 2
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.right.len()).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, right), width) in row.iter().zip(&self.right).zip(&widths) {
                match right {
                    true => write!(line, "  {cell:>width$}")?,
                    false => write!(line, "  {cell:<width$}")?,
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A bar as long as `part` is of `whole`; what is there at all can be seen.
pub(crate) fn bar(part: u64, whole: u64) -> String {
    let rest = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = u128::from(part) * u128::from(BAR * 8) / u128::from(whole.max(1));
    let eighths = usize::try_from(eighths).unwrap_or(usize::MAX).min(BAR as usize * 8);
    match eighths {
        0 if part > 0 => "▏".to_owned(),
        _ => "█".repeat(eighths / 8) + rest[eighths % 8],
    }
}

/// A share in percent, of whole numbers; what is there at all is not 0.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    let share = u128::from(part) * 100 / u128::from(whole.max(1));
    if share == 0 && part > 0 { "<1 %".into() } else { format!("{share} %") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_with_text() {
        let mut table = Table::new(&["kind", ">bytes", "name"]);
        assert!(table.is_empty());
        table.row(["heap".into(), "1 KiB".into(), String::new()]);
        table.row(["anonymous".into(), "12 KiB".into(), "x".into()]);
        assert_eq!(
            table.to_string(),
            "  kind        bytes  name\n  heap        1 KiB\n  anonymous  12 KiB  x\n"
        );
    }

    #[test]
    fn a_bar_is_as_long_as_its_share_and_never_too_short_to_be_seen() {
        assert_eq!(bar(0, 10), "");
        assert_eq!(bar(1, u64::MAX), "▏");
        assert_eq!(bar(u64::MAX, u64::MAX).chars().count(), 24);
        assert_eq!(bar(1, 48), "▌");
        assert_eq!((percent(1, 1000), percent(999, 1000)), ("<1 %".into(), "99 %".into()));
        assert_eq!(percent(0, 0), "0 %");
    }
}
