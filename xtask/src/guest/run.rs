//! Runs a plan of tests in one machine and prints their results.

use super::machine::Machine;
use super::qemu::{BOOT, Boot};
use super::record::{self, Record, Test};
use crate::stage::say;
use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

/// The guest ends a test that takes too long; this much later the guest itself hangs.
const GRACE: Duration = Duration::from_secs(60);
/// Lines of a test's output that are kept.
const KEPT: usize = 200;

/// What became of a plan.
#[derive(Debug, Default)]
pub(crate) struct Ran {
    pub(crate) failed: Vec<Test>,
    passed: usize,
    skipped: usize,
}

/// Boots a machine and runs the plan. What goes wrong in it is a result, not an error.
pub(crate) fn run(boot: &Boot<'_>, work: &Path, plan: Vec<Test>) -> anyhow::Result<Ran> {
    let started = Instant::now();
    let machine = boot.machine;
    say(format_args!("\nmachine {machine}; {} tests", plan.len()));
    let mut log = Log::new(machine, plan);
    let mut guest = boot.start(work)?;
    let patience = Duration::from_secs(boot.seconds) + GRACE;
    let mut listening = guest.ready(BOOT).map(drop);
    while listening.is_ok() && !log.over {
        match guest.next(Instant::now() + patience) {
            Ok((text, record)) => log.take(&text, record),
            Err(why) => listening = Err(why),
        }
    }
    if let Err(why) = listening {
        say(format_args!("machine {}: {why:#}; the end of its console:", machine.name));
        say(guest.console());
    }
    let ran = log.conclude();
    say(format_args!(
        "machine {}: {} passed ({} of them skipped, at least in part), {} failed; {:.0} s, {:.0} s \
         of CPU time",
        machine.name,
        ran.passed,
        ran.skipped,
        ran.failed.len(),
        started.elapsed().as_secs_f64(),
        guest.cpu_seconds(),
    ));
    Ok(ran)
}

/// Follows the records.
#[derive(Debug)]
struct Log {
    machine: &'static str,
    /// Not begun yet.
    left: VecDeque<Test>,
    /// Under way: since when, and what it has printed.
    now: Option<(Test, Instant, VecDeque<String>)>,
    ran: Ran,
    over: bool,
}

impl Log {
    fn new(machine: &Machine, plan: Vec<Test>) -> Self {
        let (left, ran) = (plan.into(), Ran::default());
        Self { machine: machine.name, left, now: None, ran, over: false }
    }

    fn take(&mut self, text: &str, record: Option<Record>) {
        if let Some((_, _, output)) = self.now.as_mut().filter(|_| !text.is_empty()) {
            output.push_back(text.to_owned());
            if output.len() > KEPT {
                output.pop_front();
            }
        }
        match record {
            None | Some(Record::Ready(_)) => {}
            Some(Record::Begin(test)) => {
                self.left.retain(|other| *other != test);
                self.now = Some((test, Instant::now(), VecDeque::new()));
            }
            Some(Record::End(test, status)) => match self.now.take() {
                Some((begun, since, output)) if begun == test => {
                    self.end(test, status, since.elapsed(), &output);
                }
                other => {
                    self.now = other;
                    self.fail(test, "ended without having begun");
                }
            },
            Some(Record::Over) => self.over = true,
            Some(Record::Garbled(text)) => {
                say(format_args!("machine {}: a record that is garbled: {text}", self.machine));
            }
        }
    }

    fn end(&mut self, test: Test, status: i32, took: Duration, output: &VecDeque<String>) {
        // A binary that has no such test says so by running none, and passes.
        let one = output.iter().any(|line| line == "running 1 test");
        if status == 0 && one {
            let skips: Vec<_> = output.iter().filter(|l| l.contains("skipped")).collect();
            self.ran.passed += 1;
            self.ran.skipped += usize::from(!skips.is_empty());
            let seconds = took.as_secs_f64();
            say(format_args!("machine {}: {test} ... ok ({seconds:.1} s)", self.machine));
            for skip in skips {
                say(format_args!("    {skip}"));
            }
            return;
        }
        let why = if status == 0 { "ran no test".into() } else { record::meaning(status) };
        self.fail(test, &why);
        for line in output {
            say(format_args!("    {line}"));
        }
    }

    fn fail(&mut self, test: Test, why: &str) {
        say(format_args!("machine {}: {test} ... FAILED: {why}", self.machine));
        self.ran.failed.push(test);
    }

    /// Whatever has no result has failed.
    fn conclude(mut self) -> Ran {
        if let Some((test, _, output)) = self.now.take() {
            self.fail(test, "the machine ended or hung during this test");
            for line in &output {
                say(format_args!("    {line}"));
            }
        }
        while let Some(test) = self.left.pop_front() {
            self.fail(test, "never ran");
        }
        self.ran
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(name: &str) -> Test {
        Test { binary: "moves".into(), name: name.into() }
    }

    fn log(names: &[&str]) -> Log {
        let machine = Machine::named("two").expect("in the table");
        Log::new(machine, names.iter().map(|name| test(name)).collect())
    }

    fn play(log: &mut Log, name: &str, output: &[&str], status: i32) {
        log.take("", Some(Record::Begin(test(name))));
        for line in output {
            log.take(line, None);
        }
        log.take("", Some(Record::End(test(name), status)));
    }

    #[test]
    fn every_test_of_the_plan_is_counted_once() {
        let mut log = log(&["a", "b", "c", "d", "e"]);
        play(&mut log, "a", &["running 1 test", "test a ... ok"], 0);
        play(&mut log, "b", &["running 1 test", "skipped: one node"], 0);
        play(&mut log, "c", &["running 1 test"], 101);
        log.take("", Some(Record::Begin(test("d"))));
        let ran = log.conclude();
        assert_eq!((ran.passed, ran.skipped), (2, 1));
        assert_eq!(ran.failed, [test("c"), test("d"), test("e")]);
    }

    #[test]
    fn a_binary_that_ran_no_test_has_not_passed() {
        let mut log = log(&["a"]);
        play(&mut log, "a", &["running 0 tests"], 0);
        assert_eq!(log.conclude().failed, [test("a")]);
    }

    #[test]
    fn a_result_of_a_test_that_did_not_begin_is_a_failure() {
        let mut log = log(&[]);
        log.take("", Some(Record::End(test("a"), 0)));
        assert_eq!(log.conclude().failed, [test("a")]);
    }

    #[test]
    fn output_is_kept_within_bounds() {
        let mut log = log(&["a"]);
        log.take("", Some(Record::Begin(test("a"))));
        for _ in 0..3 * KEPT {
            log.take("a line", None);
        }
        assert_eq!(log.now.as_ref().map(|(_, _, output)| output.len()), Some(KEPT));
    }
}
