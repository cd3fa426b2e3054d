//! What became of every page that a move of processes looked at.
//!
//! What always holds: each page looked at is in exactly one [`Line`]. Memory does not grow with
//! the processes: lines are one for each outcome, kind and page size; examples and notes are
//! bounded in number, and what is left out of them is counted.

use super::notes::{Note, Notes};
use super::select::Kind;
use crate::report::{Holes, Outcome};
use serde::Serialize;
use std::ops::Range;
use std::time::Duration;

/// Examples kept for each outcome.
const EXAMPLES: usize = 4;
/// Pages of one outcome, kind and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Line {
    /// What became of them.
    pub outcome: Outcome,
    /// The kind of their mappings.
    pub kind: Kind,
    /// Bytes of each page: the base size, that of a huge page, or of a hugetlb page.
    pub page_bytes: u64,
    /// How many pages.
    pub pages: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Where pages with an outcome were, for the reader who wants to look.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Example {
    /// What became of them.
    pub outcome: Outcome,
    /// The process.
    pub pid: u32,
    /// Addresses.
    pub range: Range<usize>,
    /// The kind of their mapping.
    pub kind: Kind,
}

/// What a move of processes' pages did.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct ProcessReport {
    /// Every page looked at: those present in the mappings asked for. Anonymous memory that processes
    /// have in common is looked at for each of them, and moves once; a dry run looks at it once, if
    /// the caller may see which it is ([`Note::CommonOnce`], [`Note::CommonUntold`]).
    pub lines: Vec<Line>,
    /// Some of the pages that did not move, at most four ranges for each outcome.
    pub examples: Vec<Example>,
    /// What else is worth knowing.
    pub notes: Notes,
    /// Processes looked at.
    pub processes: u64,
    /// From the start of the move to its end.
    pub elapsed: Duration,
    /// Of this, for marking pages and waiting for their minimum age.
    pub waited: Duration,
    /// `move_pages(2)` calls that moved pages, by how long each took: what the program may have
    /// waited for at most.
    pub calls: Holes,
    /// Bytes that were tried more than once, by try.
    pub retried_bytes: u64,
    /// The most workers that were at it.
    pub workers: usize,
    /// Whether it was cancelled. Pages that it had not come to are in no line.
    pub cancelled: bool,
    /// Bytes that a cancelled move had not come to: what the kernel counts as resident of the
    /// processes found until then and of the kinds asked for, without what was looked at. An
    /// estimate; names of mappings that were asked for are not considered. 0 if it came to all.
    pub not_looked_at: u64,
    /// Whether it was a dry run.
    pub dry_run: bool,
}

impl ProcessReport {
    /// Bytes with a given outcome.
    pub fn bytes(&self, is: impl Fn(Outcome) -> bool) -> u64 {
        self.lines.iter().filter(|l| is(l.outcome)).map(|l| l.bytes).sum()
    }

    /// Bytes looked at: the sum of all outcomes.
    pub fn bytes_looked_at(&self) -> u64 {
        self.bytes(|_| true)
    }

    /// Bytes moved.
    pub fn bytes_moved(&self) -> u64 {
        self.bytes(|o| o == Outcome::Moved)
    }

    /// Bytes by outcome, in ascending order of outcome.
    pub fn by_outcome(&self) -> Vec<(Outcome, u64)> {
        let mut sums = std::collections::BTreeMap::new();
        for line in &self.lines {
            *sums.entry(line.outcome).or_insert(0) += line.bytes;
        }
        sums.into_iter().collect()
    }

    /// Whether every page looked at is where it was asked to be, or gone, and none was left out.
    pub fn is_complete(&self) -> bool {
        !self.cancelled && self.lines.iter().all(|l| l.outcome.is_settled())
    }

    /// Bytes moved per second, from when it began to move.
    pub fn rate(&self) -> f64 {
        let seconds = self.elapsed.saturating_sub(self.waited).as_secs_f64();
        if seconds > 0.0 { self.bytes_moved() as f64 / seconds } else { 0.0 }
    }

    pub(super) fn add(&mut self, mut tally: Tally) {
        tally.close();
        for line in tally.lines {
            add_line(&mut self.lines, line);
        }
        for example in tally.examples {
            add_example(&mut self.examples, example);
        }
        self.notes.extend(tally.notes);
        self.calls.add(&tally.calls);
        self.retried_bytes += tally.retried_bytes;
    }

    /// Puts lines and examples in order.
    pub(super) fn tidy(&mut self) {
        self.lines.sort_by_key(|l| (l.outcome, l.kind, l.page_bytes));
        self.examples.sort_by_key(|e| (e.outcome, e.pid, e.range.start));
    }
}

fn add_line(lines: &mut Vec<Line>, line: Line) {
    let key = |l: &Line| (l.outcome, l.kind, l.page_bytes);
    match lines.iter_mut().find(|l| key(l) == key(&line)) {
        Some(known) => {
            known.pages += line.pages;
            known.bytes += line.bytes;
        }
        None => lines.push(line),
    }
}

fn add_example(examples: &mut Vec<Example>, example: Example) {
    if examples.iter().filter(|e| e.outcome == example.outcome).count() < EXAMPLES {
        examples.push(example);
    }
}

/// A run of pages with one fate.
#[derive(Clone, Copy, Debug)]
struct Fate {
    pid: u32,
    outcome: Outcome,
    kind: Kind,
    page_bytes: usize,
    start: usize,
    end: usize,
}

/// One worker's account; neighbours of one fate are joined, so that a page costs little.
#[derive(Debug, Default)]
pub(super) struct Tally {
    open: Option<Fate>,
    lines: Vec<Line>,
    examples: Vec<Example>,
    pub(super) notes: Notes,
    pub(super) calls: Holes,
    pub(super) retried_bytes: u64,
    /// Bytes of anonymous memory that other processes map too.
    pub(super) common: u64,
    /// Calls that were as small as calls get and took longer than they should.
    pub(super) slow_calls: u64,
}

impl Tally {
    /// A page has its outcome.
    #[inline]
    pub(super) fn page(
        &mut self,
        pid: u32,
        kind: Kind,
        address: usize,
        page_bytes: usize,
        outcome: Outcome,
    ) {
        if let Some(open) = &mut self.open
            && open.end == address
            && open.outcome == outcome
            && open.page_bytes == page_bytes
            && open.kind == kind
            && open.pid == pid
        {
            open.end += page_bytes;
            return;
        }
        self.close();
        let end = address + page_bytes;
        self.open = Some(Fate { pid, outcome, kind, page_bytes, start: address, end });
    }

    pub(super) fn close(&mut self) {
        let Some(fate) = self.open.take() else { return };
        let bytes = (fate.end - fate.start) as u64;
        let page_bytes = fate.page_bytes as u64;
        let (pid, kind, outcome) = (fate.pid, fate.kind, fate.outcome);
        add_line(
            &mut self.lines,
            Line { outcome, kind, page_bytes, pages: bytes / page_bytes, bytes },
        );
        match outcome {
            Outcome::Gone | Outcome::Unmapped => self.notes.add(Note::Changing { pid, bytes }),
            Outcome::Moved
            | Outcome::AlreadyThere
            | Outcome::NotAsked
            | Outcome::Young
            | Outcome::WouldMove => return,
            _ => {}
        }
        add_example(
            &mut self.examples,
            Example { outcome, pid, range: fate.start..fate.end, kind },
        );
    }
}
