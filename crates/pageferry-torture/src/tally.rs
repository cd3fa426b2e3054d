//! What was moved, for `cargo xtask torture`: a line of JSON at a time, appended to its log.
//!
//! A line has the totals of its process so far, so the last one counts, however the process ends.

use pageferry::{Outcome, Report};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Mutex;

/// Of one process.
#[derive(Debug)]
pub(crate) struct Tally {
    log: PathBuf,
    program: String,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    bytes: u64,
    moves: u64,
    live: u64,
    frozen: u64,
    outcomes: BTreeMap<Outcome, u64>,
    refused: BTreeMap<String, u64>,
    panics: u64,
}

impl Tally {
    pub(crate) fn new(log: PathBuf, program: String) -> Self {
        Self { log, program, counts: Mutex::default() }
    }

    /// The same log, from nothing, for a forked child.
    pub(crate) fn afresh(&self) -> Self {
        Self::new(self.log.clone(), self.program.clone())
    }

    pub(crate) fn count(&self, report: &Report) {
        let Ok(mut counts) = self.counts.lock() else { return };
        counts.moves += 1;
        counts.bytes += report.bytes_moved;
        counts.live += report.batches_live;
        counts.frozen += report.batches_frozen;
        for (outcome, bytes) in report.by_outcome() {
            *counts.outcomes.entry(outcome).or_default() += bytes;
        }
    }

    /// A move, or an engine, that was not to be had.
    pub(crate) fn refuse(&self, why: &str) {
        let Ok(mut counts) = self.counts.lock() else { return };
        *counts.refused.entry(why.to_owned()).or_default() += 1;
    }

    /// A panic of a thread of ours.
    pub(crate) fn panic(&self, what: &str) {
        if let Ok(mut counts) = self.counts.try_lock() {
            counts.panics += 1;
        }
        self.append(&format!("{{\"pid\":{},\"panic\":{}}}\n", std::process::id(), quoted(what)));
    }

    /// Appends the totals.
    pub(crate) fn write(&self) {
        let line = match self.counts.try_lock() {
            Ok(counts) => self.line(&counts),
            Err(_) => return,
        };
        self.append(&line);
    }

    fn line(&self, counts: &Counts) -> String {
        let mut line = String::new();
        let pid = std::process::id();
        let Counts { bytes, moves, live, frozen, panics, .. } = counts;
        let program = quoted(&self.program);
        let _ = write!(
            line,
            "{{\"pid\":{pid},\"program\":{program},\"bytes\":{bytes},\"moves\":{moves},\
             \"live\":{live},\"frozen\":{frozen},\"panics\":{panics}"
        );
        let outcomes = counts.outcomes.iter().map(|(outcome, n)| (outcome.to_string(), *n));
        object(&mut line, "outcomes", outcomes);
        object(&mut line, "refused", counts.refused.iter().map(|(why, n)| (why.clone(), *n)));
        line + "}\n"
    }

    fn append(&self, line: &str) {
        let log = std::fs::OpenOptions::new().append(true).open(&self.log);
        // One call: lines of several processes do not mix. Without a log the run fails by itself.
        let _ = log.and_then(|mut log| log.write_all(line.as_bytes()));
    }
}

fn object(line: &mut String, name: &str, members: impl Iterator<Item = (String, u64)>) {
    let members: Vec<_> = members.map(|(key, n)| format!("{}:{n}", quoted(&key))).collect();
    let _ = write!(line, ",\"{name}\":{{{}}}", members.join(","));
}

/// A string of JSON.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if u32::from(c) < 0x20 => out.push(' '),
            c => out.push(c),
        }
    }
    out + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_totals_and_quotes_what_programs_are_called() {
        let tally = Tally::new(PathBuf::new(), "a\"b\\c\n".into());
        tally.refuse("no");
        tally.refuse("no");
        let line = tally.line(&tally.counts.lock().expect("whole"));
        let pid = std::process::id();
        assert_eq!(
            line,
            format!(
                "{{\"pid\":{pid},\"program\":\"a\\\"b\\\\c \",\"bytes\":0,\"moves\":0,\"live\":0,\
                 \"frozen\":0,\"panics\":0,\"outcomes\":{{}},\"refused\":{{\"no\":2}}}}\n"
            )
        );
    }
}
