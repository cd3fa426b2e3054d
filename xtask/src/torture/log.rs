//! What the preloaded library says that it did.

use anyhow::{Context as _, bail};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// Of all processes of a program.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Moved {
    processes: u64,
    bytes: u64,
    moves: u64,
    live: u64,
    frozen: u64,
    outcomes: BTreeMap<String, u64>,
    refused: BTreeMap<String, u64>,
    panics: Vec<String>,
}

/// Reads the log.
pub(crate) fn read(log: &Path) -> anyhow::Result<Moved> {
    let text = std::fs::read_to_string(log).with_context(|| format!("{}", log.display()))?;
    parse(&text)
}

fn parse(text: &str) -> anyhow::Result<Moved> {
    let mut all = Moved::default();
    let mut last: BTreeMap<u64, Value> = BTreeMap::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).with_context(|| format!("a line: {line}"))?;
        let pid = number(&line, "pid");
        if let Some(panic) = line.get("panic").and_then(Value::as_str) {
            all.panics.push(panic.to_owned());
            continue;
        }
        // Totals only grow: fewer moves are another process that has got the number.
        let before = last.get(&pid).filter(|v| number(&line, "moves") < number(v, "moves"));
        if let Some(other) = before {
            all.add(other);
        }
        last.insert(pid, line);
    }
    last.values().for_each(|line| all.add(line));
    Ok(all)
}

fn number(line: &Value, name: &str) -> u64 {
    line.get(name).and_then(Value::as_u64).unwrap_or(0)
}

impl Moved {
    fn add(&mut self, line: &Value) {
        self.processes += 1;
        self.bytes += number(line, "bytes");
        self.moves += number(line, "moves");
        self.live += number(line, "live");
        self.frozen += number(line, "frozen");
        for (sums, name) in [(&mut self.outcomes, "outcomes"), (&mut self.refused, "refused")] {
            for (key, n) in line.get(name).and_then(Value::as_object).into_iter().flatten() {
                *sums.entry(key.clone()).or_default() += n.as_u64().unwrap_or(0);
            }
        }
    }

    /// Why nothing can be moved here, if that is so.
    pub(crate) fn cannot(&self) -> Option<&str> {
        let says = |why: &&String| {
            why.starts_with("userfaultfd is not permitted")
                || why.starts_with("this kernel cannot move pages")
        };
        self.refused.keys().find(says).filter(|_| self.bytes == 0).map(String::as_str)
    }

    /// Whether moving went well.
    pub(crate) fn judge(&self) -> anyhow::Result<()> {
        if let Some(first) = self.panics.first() {
            bail!("the engine panicked {} times, first: {first}", self.panics.len());
        }
        if self.bytes == 0 {
            bail!("nothing was moved, so nothing was tested");
        }
        Ok(())
    }
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processes, moves, live, frozen, .. } = self;
        let mib = self.bytes >> 20;
        writeln!(
            f,
            "moved {mib} MiB in {moves} moves of {processes} processes, {live} batches live, {frozen} frozen"
        )?;
        for (outcome, bytes) in &self.outcomes {
            writeln!(f, "  {outcome}: {} MiB", bytes >> 20)?;
        }
        for (why, n) in &self.refused {
            writeln!(f, "  refused {n} times: {why}")?;
        }
        for panic in &self.panics {
            writeln!(f, "  PANIC: {panic}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_totals_of_each_process_count_and_a_number_can_be_used_again() {
        let text = r#"{"pid":1,"bytes":10,"moves":1,"outcomes":{"moved":10}}
            {"pid":1,"bytes":30,"moves":3,"outcomes":{"moved":30}}
            {"pid":2,"bytes":5,"moves":1,"refused":{"no":2}}
            {"pid":1,"bytes":1,"moves":1,"outcomes":{"moved":1}}"#;
        let moved = parse(text).expect("JSON");
        assert_eq!((moved.processes, moved.bytes, moved.moves), (3, 36, 5));
        assert_eq!((moved.outcomes["moved"], moved.refused["no"]), (31, 2));
        moved.judge().expect("something was moved");
    }

    #[test]
    fn a_run_that_moved_nothing_or_panicked_fails() {
        let judge = |text| parse(text).expect("JSON").judge().expect_err("it fails").to_string();
        assert!(judge("").contains("nothing was moved"));
        assert!(judge(r#"{"pid":1,"bytes":0,"moves":9}"#).contains("nothing was moved"));
        let panicked = "{\"pid\":1,\"bytes\":7,\"moves\":9}\n{\"pid\":1,\"panic\":\"oh\"}";
        assert!(judge(panicked).contains("panicked 1 times, first: oh"));
    }
}
