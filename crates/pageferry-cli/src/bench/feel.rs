//! What a program feels: random readers and writers while their memory moves.
//!
//! Who reads and writes, and what is timed, is told in [`access`].
//!
//! Beside the moves, in the same rounds: *idle*, the same readers and writers alone; and *burnt*,
//! with as many threads as the move had, that copy private memory for as much CPU time as the
//! moves of this round took. The second is the fair control: moving costs CPU time however it
//! is done, and a machine with no CPU to spare feels that first.

use std::cell::Cell;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use pageferry_copy::Kernel;
use pageferry_sys::sched;

use super::access;
use super::config::{Account, Config, folio_name};
use super::content::{Owned, Tally};
use super::lab::{Case, Field, Lab, Trouble};
use super::plan::Scenario;
use super::probe::{Buffer, Words};
use super::schema::{Felt, Results, Run};
use super::stats::{self, Latencies, Reading};
use crate::cancel;

/// The budgets, in microseconds.
pub(super) const BUDGETS_US: [u64; 5] = [50, 100, 250, 1000, 5000];
/// Bytes of each of the moves that follow each other during a measurement.
const MOVE_BYTES: usize = 32 << 20;
/// Bytes that a burner copies before it looks at its CPU time.
const BURN_BYTES: usize = 128 << 10;
/// Bytes of a burner's two buffers: more than a second-level cache, as the moved memory is.
const BURN_BUFFER: usize = 16 << 20;

/// What goes on beside the readers and writers.
enum Beside {
    Nothing,
    Burning { buffers: Vec<(Buffer, Buffer)> },
    Moving { config: Config, account: Box<Account> },
}

/// Threads' worth of CPU time that the moves of a round took, as its control must burn.
#[derive(Default)]
struct Duty {
    cpu: Cell<Duration>,
    wall: Cell<Duration>,
}

impl Duty {
    fn add(&self, cpu: Duration, wall: Duration) {
        self.cpu.set(self.cpu.get() + cpu);
        self.wall.set(self.wall.get() + wall);
    }

    /// CPU seconds per second since it was last taken.
    fn take(&self) -> f64 {
        let (cpu, wall) = (self.cpu.take().as_secs_f64(), self.wall.take().as_secs_f64());
        if wall > 0.0 { cpu / wall } else { 0.0 }
    }
}

struct FeelCase<'a> {
    field: &'a Field,
    duty: &'a Duty,
    beside: Beside,
    readers: Latencies,
    writers: Latencies,
    wall: Duration,
    rates: Vec<f64>,
    rounds: usize,
    /// CPU time beside the accesses, in all rounds.
    cpu: Duration,
}

impl Case for FeelCase<'_> {
    fn name(&self) -> String {
        let folio = folio_name(self.field.folio);
        match &self.beside {
            Beside::Nothing => format!("feel {folio}, idle"),
            Beside::Burning { .. } => format!("feel {folio}, burnt CPU"),
            Beside::Moving { config, .. } => {
                format!("feel {folio}, budget {:?}", config.budget.unwrap_or_default())
            }
        }
    }

    fn measure(&mut self, lab: &Lab<'_>, warm_up: bool) -> Result<(), Trouble> {
        let length = if warm_up { lab.plan.feel / 5 } else { lab.plan.feel };
        let field = self.field;
        let (content, words) = (field.content(), Words::of(&field.region));
        let stop = AtomicBool::new(false);
        // All begin together: a thread that is still being started would measure nothing.
        let start = Barrier::new(2 * lab.plan.accessors + 1);
        let reading = Reading::now();
        let (accesses, moved, wall) = thread::scope(|scope| {
            let (readers, writers): (Vec<_>, Vec<_>) = (0..lab.plan.accessors)
                .map(|id| {
                    let (stop, start) = (&stop, &start);
                    let count = lab.plan.accessors;
                    let owned = Owned::new(id, words.len());
                    (
                        scope.spawn(move || {
                            start.wait();
                            access::read(words, content, count, id, stop)
                        }),
                        scope.spawn(move || {
                            start.wait();
                            access::write(words, content, owned, stop)
                        }),
                    )
                })
                .unzip();
            start.wait();
            let began = Instant::now();
            let moved = go_on(&mut self.beside, field, self.duty, began + length, warm_up);
            stop.store(true, Ordering::Relaxed);
            let wall = began.elapsed();
            (access::join(readers, writers), moved, wall)
        });
        let accesses = accesses?;
        let moved = moved?;
        let cpu = reading.elapsed().cpu().saturating_sub(accesses.cpu);
        access::settle(field, words, &content, accesses.wrong, accesses.owned)?;
        if let Beside::Moving { .. } = self.beside {
            self.duty.add(cpu, wall);
        }
        if !warm_up {
            self.readers.add(&accesses.readers);
            self.writers.add(&accesses.writers);
            self.wall += wall;
            self.cpu += cpu;
            self.rounds += 1;
            self.rates.extend(moved.map(|(bytes, took)| stats::gb_per_s(bytes, took)));
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Option<Run> {
        let mut both = self.readers.clone();
        both.add(&self.writers);
        let mut run = Run::new(match self.beside {
            Beside::Nothing => "feel_idle",
            Beside::Burning { .. } => "feel_burn",
            Beside::Moving { .. } => "feel",
        });
        run.folio_bytes = Some(self.field.folio.bytes() as u64);
        run.threads = match &self.beside {
            Beside::Nothing => 0,
            Beside::Burning { buffers } => buffers.len(),
            Beside::Moving { .. } => self.field.threads,
        };
        if let Beside::Moving { config, account } = &self.beside {
            account.describe(config, &mut run);
        } else {
            run.engine = "none".to_owned();
        }
        run.stall_us = both.quantiles();
        run.readers = felt(&self.readers, self.wall);
        run.writers = felt(&self.writers, self.wall);
        run.gb_per_s = stats::spread(&self.rates);
        run.rounds = self.rounds;
        run.verified = Some(true);
        let share = self.cpu.as_secs_f64() / self.wall.as_secs_f64().max(1e-9);
        super::config::add_note(&mut run, format!("{share:.2} CPUs busy beside the accesses"));
        run.stall_us.is_some().then_some(run)
    }
}

fn felt(latencies: &Latencies, wall: Duration) -> Option<Felt> {
    let seconds = wall.as_secs_f64().max(1e-9);
    Some(Felt {
        latency_us: latencies.quantiles()?,
        curve: latencies.curve(),
        accesses_per_s: latencies.count() as f64 / seconds,
        stalled_share: latencies.stalled_share(),
        preempted_share: latencies.preempted_share(),
    })
}

/// Moves, burns or waits until the time is over. Bytes moved, and in which time.
fn go_on(
    beside: &mut Beside,
    field: &Field,
    duty: &Duty,
    end: Instant,
    warm_up: bool,
) -> Result<Option<(u64, Duration)>, Trouble> {
    let goes_on = || Instant::now() < end && !cancel::requested();
    match beside {
        Beside::Nothing => {
            while goes_on() {
                let left = end.saturating_duration_since(Instant::now());
                thread::sleep(left.min(Duration::from_millis(20)));
            }
            Ok(None)
        }
        Beside::Burning { buffers } => {
            let share = duty.take() / buffers.len() as f64;
            burn(buffers, share, &goes_on)?;
            Ok(None)
        }
        Beside::Moving { config, account } => {
            let (mut bytes, mut wall) = (0, Duration::ZERO);
            while goes_on() || bytes == 0 {
                let fail = |error: anyhow::Error| Trouble::Fail(format!("{error:#}"));
                let window = field.window(MOVE_BYTES).map_err(fail)?;
                let began = Instant::now();
                let report = config.execute(field, &window).map_err(|e| fail(e.into()))?;
                let took = began.elapsed();
                field.moved(&window).map_err(fail)?;
                if report.bytes_moved == 0 {
                    return Err(Trouble::Fail("no page was moved".to_owned()));
                }
                if !warm_up {
                    account.add(&report, took);
                }
                bytes += report.bytes_moved;
                wall += took;
            }
            Ok(Some((bytes, wall)))
        }
    }
}

/// Copies private memory, each thread for `share` of its time, while `goes_on`.
fn burn(
    buffers: &[(Buffer, Buffer)],
    share: f64,
    goes_on: &(dyn Fn() -> bool + Sync),
) -> Result<(), Trouble> {
    let faults = Tally::default();
    thread::scope(|scope| {
        for (from, to) in buffers {
            let faults = &faults;
            scope.spawn(move || {
                let (began, mut at) = (Instant::now(), 0);
                while goes_on() {
                    let owed = began.elapsed().mul_f64(share.clamp(0.0, 1.0));
                    let spent = Duration::from_nanos(sched::thread_cpu_ns());
                    if spent >= owed {
                        thread::sleep((spent - owed).max(Duration::from_micros(50)));
                        continue;
                    }
                    let range = at..(at + BURN_BYTES).min(from.len());
                    at = if range.end == from.len() { 0 } else { range.end };
                    faults.add(u64::from(to.copy_from(from, range, Kernel::MEMCPY).is_err()));
                }
            });
        }
    });
    match faults.get() {
        0 => Ok(()),
        n => Err(Trouble::Fail(format!("{n} copies of the control faulted"))),
    }
}

/// The scenario `feel`.
pub(super) fn run(lab: &Lab<'_>, results: &mut Results) -> anyhow::Result<bool> {
    let sizes = lab.folio_sizes();
    // All of it is read back after each measurement: so large that no cache holds it is enough.
    let bytes = lab.plan.region.min(if lab.plan.is_full() { usize::MAX } else { 128 << 20 });
    let fields = sizes
        .into_iter()
        .map(|folio| Field::new(&lab.engine, folio, bytes, lab.content))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let duties: Vec<Duty> = fields.iter().map(|_| Duty::default()).collect();
    let mut cases: Vec<Box<dyn Case + '_>> = Vec::new();
    for (field, duty) in fields.iter().zip(&duties) {
        let buffer = || Buffer::new(BURN_BUFFER, true).context("cannot map a buffer");
        let buffers = (0..field.threads)
            .map(|_| Ok((buffer()?, buffer()?)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let mut besides = vec![Beside::Nothing];
        for budget in BUDGETS_US {
            let budget = Some(Duration::from_micros(budget));
            let config = Config { budget, ..Config::new("feel") };
            let account = Account::new().map_err(|_| anyhow::anyhow!("no histogram"))?;
            let account = Box::new(account);
            besides.push(Beside::Moving { config, account });
        }
        // After the moves: it burns what they took.
        besides.push(Beside::Burning { buffers });
        for beside in besides {
            cases.push(Box::new(FeelCase {
                field,
                duty,
                beside,
                readers: Latencies::new()?,
                writers: Latencies::new()?,
                wall: Duration::ZERO,
                rates: Vec::new(),
                rounds: 0,
                cpu: Duration::ZERO,
            }));
        }
    }
    Ok(lab.interleave(Scenario::Feel, lab.plan.rounds.min(5), cases, results))
}
