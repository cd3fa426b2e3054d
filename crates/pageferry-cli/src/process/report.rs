//! What a move came to, of whichever way each process went.

use std::time::Duration;

use pageferry::control::Summary;
use pageferry::process::{Example, Line, Notes, ProcessReport};
use pageferry::{Holes, Outcome};
use pageferry_topology::NodeList;
use serde::Serialize;

use super::ask::Asked;
use super::estimate::Estimate;
use super::residency::{Told, told};

/// Everything that is reported.
#[derive(Debug)]
pub(super) struct Moved {
    pub(super) dry_run: bool,
    pub(super) cancelled: bool,
    /// Bytes that a cancelled move had not come to, about.
    pub(super) not_looked_at: u64,
    /// Where to.
    pub(super) to: NodeList,
    pub(super) elapsed: Duration,
    /// Programs that were asked to do it themselves.
    pub(super) asked: Vec<Asked>,
    /// Processes looked at from outside.
    pub(super) processes: u64,
    /// The time that moving from outside took.
    pub(super) outside: Duration,
    /// Before that, to see which pages are used.
    pub(super) waited: Duration,
    /// Every page looked at from outside is in one of them.
    pub(super) lines: Vec<Line>,
    pub(super) examples: Vec<Example>,
    pub(super) notes: Notes,
    /// What else there is to say, in words.
    pub(super) remarks: Vec<String>,
    /// `move_pages(2)` calls of each run.
    pub(super) calls: Vec<Holes>,
    pub(super) retried_bytes: u64,
    pub(super) workers: usize,
    pub(super) estimate: Option<Estimate>,
}

impl Moved {
    pub(super) fn new(dry_run: bool, to: NodeList) -> Self {
        Self {
            dry_run,
            cancelled: false,
            not_looked_at: 0,
            to,
            elapsed: Duration::ZERO,
            asked: Vec::new(),
            processes: 0,
            outside: Duration::ZERO,
            waited: Duration::ZERO,
            lines: Vec::new(),
            examples: Vec::new(),
            notes: Notes::default(),
            remarks: Vec::new(),
            calls: Vec::new(),
            retried_bytes: 0,
            workers: 0,
            estimate: None,
        }
    }

    /// Adds what was moved from outside.
    pub(super) fn add(&mut self, report: ProcessReport) {
        for line in report.lines {
            let key = |l: &Line| (l.outcome, l.kind, l.page_bytes);
            match self.lines.iter_mut().find(|known| key(known) == key(&line)) {
                Some(known) => {
                    known.pages += line.pages;
                    known.bytes += line.bytes;
                }
                None => self.lines.push(line),
            }
        }
        self.lines.sort_by_key(|l| (l.outcome, l.kind, l.page_bytes));
        self.examples.extend(report.examples);
        self.notes.extend(report.notes);
        self.calls.push(report.calls);
        self.processes += report.processes;
        self.outside += report.elapsed.saturating_sub(report.waited);
        self.waited += report.waited;
        self.retried_bytes += report.retried_bytes;
        self.workers = self.workers.max(report.workers);
        self.cancelled |= report.cancelled;
        self.not_looked_at += report.not_looked_at;
    }

    /// Whether nothing could be looked at though nobody broke it off.
    pub(super) fn is_nobody(&self) -> bool {
        self.processes == 0 && self.asked.is_empty() && !self.cancelled
    }

    /// Whether every page is where it was to go, or gone.
    pub(super) fn is_complete(&self) -> bool {
        let settled = |summary: &Summary| {
            !summary.cancelled && summary.shares.iter().all(|share| share.settled)
        };
        !self.cancelled
            && self.lines.iter().all(|line| line.outcome.is_settled())
            && self.asked.iter().all(|asked| asked.answer.as_ref().is_ok_and(settled))
    }

    /// Bytes with these outcomes, of those looked at from outside.
    pub(super) fn bytes(&self, is: impl Fn(Outcome) -> bool) -> u64 {
        self.lines.iter().filter(|line| is(line.outcome)).map(|line| line.bytes).sum()
    }

    /// Bytes by outcome, of those looked at from outside.
    pub(super) fn by_outcome(&self) -> Vec<(Outcome, u64)> {
        let mut sums: Vec<(Outcome, u64)> = Vec::new();
        for line in &self.lines {
            match sums.last_mut() {
                Some((outcome, sum)) if *outcome == line.outcome => *sum += line.bytes,
                _ => sums.push((line.outcome, line.bytes)),
            }
        }
        sums
    }

    /// How many calls moved pages, and how long they took: a percentile is the worse run's.
    pub(super) fn calls(&self) -> Calls {
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let worst =
            |of: &dyn Fn(&Holes) -> Duration| self.calls.iter().map(of).max().map_or(0.0, us);
        Calls {
            count: self.calls.iter().map(Holes::count).sum(),
            p50_us: worst(&|calls| calls.quantile(0.5)),
            p99_us: worst(&|calls| calls.quantile(0.99)),
            max_us: worst(&|calls| calls.longest),
        }
    }

    pub(super) fn document(&self) -> Document<'_> {
        let outcomes = self.by_outcome().into_iter().map(|(outcome, bytes)| OutcomeBytes {
            outcome,
            text: outcome.to_string(),
            settled: outcome.is_settled(),
            bytes,
        });
        Document {
            schema_version: 1,
            dry_run: self.dry_run,
            cancelled: self.cancelled,
            not_looked_at: self.not_looked_at,
            complete: self.is_complete(),
            to: &self.to,
            elapsed_s: self.elapsed.as_secs_f64(),
            waited_s: self.waited.as_secs_f64(),
            processes: self.processes,
            bytes_looked_at: self.bytes(|_| true),
            bytes_moved: self.bytes(|outcome| outcome == Outcome::Moved),
            outcomes: outcomes.collect(),
            lines: &self.lines,
            examples: &self.examples,
            calls: self.calls(),
            retried_bytes: self.retried_bytes,
            workers: self.workers,
            asked: self.asked.iter().map(AskedDocument::new).collect(),
            estimate: self.estimate.as_ref(),
            notes: told(&self.notes),
            notes_left_out: self.notes.left_out,
            remarks: &self.remarks,
        }
    }
}

/// The JSON form; the number changes when a field changes its meaning or goes.
#[derive(Serialize)]
pub(super) struct Document<'a> {
    schema_version: u32,
    dry_run: bool,
    cancelled: bool,
    /// Bytes that a cancelled move had not come to: an estimate. They are in no line.
    not_looked_at: u64,
    complete: bool,
    to: &'a NodeList,
    elapsed_s: f64,
    /// Of this, to see which pages are used.
    waited_s: f64,
    processes: u64,
    bytes_looked_at: u64,
    bytes_moved: u64,
    outcomes: Vec<OutcomeBytes>,
    lines: &'a [Line],
    examples: &'a [Example],
    calls: Calls,
    retried_bytes: u64,
    workers: usize,
    asked: Vec<AskedDocument<'a>>,
    estimate: Option<&'a Estimate>,
    notes: Vec<Told<'a>>,
    notes_left_out: u64,
    remarks: &'a [String],
}

#[derive(Serialize)]
struct OutcomeBytes {
    outcome: Outcome,
    text: String,
    /// Where it was to go, or gone.
    settled: bool,
    bytes: u64,
}

/// `move_pages(2)` calls that moved pages.
#[derive(Debug, Serialize)]
pub(super) struct Calls {
    pub(super) count: u64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) max_us: f64,
}

#[derive(Serialize)]
struct AskedDocument<'a> {
    pid: u32,
    summary: Option<&'a Summary>,
    error: Option<&'a str>,
}

impl<'a> AskedDocument<'a> {
    fn new(asked: &'a Asked) -> Self {
        Self {
            pid: asked.pid,
            summary: asked.answer.as_ref().ok(),
            error: asked.answer.as_ref().err().map(String::as_str),
        }
    }
}
