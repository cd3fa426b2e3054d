//! Stages: one after the other, each with a heading and an outcome, and a summary at the end.

use anyhow::{Context as _, bail};
use std::fmt;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// How a stage ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

/// What a stage says of itself: done, or the reason why it could not run here.
#[derive(Debug)]
pub(crate) enum Ran {
    Done,
    Skip(String),
}

/// The stages that have run.
#[derive(Debug, Default)]
pub(crate) struct Stages(Vec<(&'static str, Outcome, Duration)>);

impl Stages {
    /// Runs a stage. Later stages run whatever its outcome: one run shows all that is wrong.
    pub(crate) fn run(&mut self, name: &'static str, stage: impl FnOnce() -> anyhow::Result<Ran>) {
        say(format_args!("\n=== {name}"));
        let started = Instant::now();
        let outcome = Outcome::from(stage());
        say(format_args!("--- {outcome}"));
        self.0.push((name, outcome, started.elapsed()));
    }

    /// Prints the summary.
    pub(crate) fn conclude(self) -> ExitCode {
        say("\n=== Summary");
        say(self.summary());
        let failed = self.0.iter().any(|(_, outcome, _)| matches!(outcome, Outcome::Failed(_)));
        if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }

    /// A line for each stage, and last the counts.
    fn summary(&self) -> String {
        let mut out = String::new();
        let width = self.0.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
        for (name, outcome, took) in &self.0 {
            out += &format!("{name:width$}  {:>6.1} s  {outcome}\n", took.as_secs_f64());
        }
        let count = |is: fn(&Outcome) -> bool| self.0.iter().filter(|(_, o, _)| is(o)).count();
        out += &format!(
            "{} passed, {} failed, {} skipped",
            count(|o| matches!(o, Outcome::Passed)),
            count(|o| matches!(o, Outcome::Failed(_))),
            count(|o| matches!(o, Outcome::Skipped(_))),
        );
        out
    }
}

impl From<anyhow::Result<Ran>> for Outcome {
    fn from(ran: anyhow::Result<Ran>) -> Self {
        match ran {
            Ok(Ran::Done) => Self::Passed,
            Ok(Ran::Skip(reason)) => Self::Skipped(reason),
            Err(error) => Self::Failed(format!("{error:#}")),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("passed"),
            Self::Failed(why) => write!(f, "FAILED: {why}"),
            Self::Skipped(why) => write!(f, "skipped: {why}"),
        }
    }
}

/// Prints a line. If nobody listens, the exit code still tells.
pub(crate) fn say(line: impl fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// The workspace's folder.
pub(crate) fn root() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

/// Where this run builds.
pub(crate) fn target_dir() -> PathBuf {
    let given = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    root().join(given.unwrap_or_else(|| "target".into()))
}

/// The cargo that runs this, in the workspace's folder.
pub(crate) fn cargo<'a>(args: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(args);
    command
}

/// Runs a command to its end; anything but success is an error.
pub(crate) fn finish(command: &mut Command) -> anyhow::Result<Ran> {
    say(format_args!("$ {}", shown(command)));
    let status = command.status().with_context(|| format!("cannot run {}", shown(command)))?;
    if !status.success() {
        bail!("`{}`: {status}", shown(command));
    }
    Ok(Ran::Done)
}

/// As [`finish`], for a command that runs tests: the error names those that failed.
pub(crate) fn finish_tests(command: &mut Command) -> anyhow::Result<Ran> {
    say(format_args!("$ {}", shown(command)));
    let context = format!("cannot run {}", shown(command));
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| context.clone())?;
    let mut failed = Vec::new();
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).split(b'\n') {
            let line = line.with_context(|| context.clone())?;
            let line = String::from_utf8_lossy(&line);
            say(&line);
            failed.extend(failed_test(&line).map(str::to_owned));
        }
    }
    let status = child.wait().context(context)?;
    if !status.success() {
        bail!("`{}`: {status}; failed: {}", shown(command), failed.join(", "));
    }
    Ok(Ran::Done)
}

/// The name, where the test harness says that a test has failed.
fn failed_test(line: &str) -> Option<&str> {
    line.strip_prefix("test ")?.strip_suffix(" ... FAILED")
}

/// The command as one would type it.
fn shown(command: &Command) -> String {
    let set = command.get_envs().filter_map(|(name, value)| {
        Some(format!("{}={:?}", name.to_string_lossy(), value?.to_string_lossy()))
    });
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    let words = words.map(|word| word.to_string_lossy().into_owned());
    set.chain(words).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_gives_each_stage_its_reason_and_ends_with_the_counts() {
        let ran = [
            ("one", Err(anyhow::anyhow!("broken").context("it"))),
            ("seven", Ok(Ran::Skip("not here".into()))),
            ("three", Ok(Ran::Done)),
        ];
        let took = Duration::from_millis(1500);
        let stages = Stages(ran.into_iter().map(|(n, r)| (n, r.into(), took)).collect());
        assert_eq!(
            stages.summary(),
            "one       1.5 s  FAILED: it: broken\n\
             seven     1.5 s  skipped: not here\n\
             three     1.5 s  passed\n\
             1 passed, 1 failed, 1 skipped"
        );
    }

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        let mut command = Command::new("/opt/bin/cargo");
        command.args(["test", "--lib"]).env("RUSTFLAGS", "--cfg loom");
        assert_eq!(shown(&command), "RUSTFLAGS=\"--cfg loom\" cargo test --lib");
    }

    #[test]
    fn a_test_that_fails_is_told_from_others() {
        assert_eq!(failed_test("test a::b ... FAILED"), Some("a::b"));
        for line in ["test a::b ... ok", "test result: FAILED. 1 passed", "", "machine: FAILED"] {
            assert_eq!(failed_test(line), None);
        }
    }

    #[test]
    fn a_command_that_fails_is_named_in_the_error() {
        let error = finish(&mut Command::new("false")).expect_err("false fails");
        assert!(error.to_string().starts_with("`false`: exit status: 1"), "{error}");
    }
}
