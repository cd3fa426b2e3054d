//! What a program feels: random readers and writers while their memory moves.
//!
//! Each access is timed by itself, the clock's cost included, and each word is checked. Readers
//! read words that nobody writes; a writer reads a word of its own, compares it with what it
//! wrote last, and writes the next version. So a lost write shows at once.
//!
//! Beside the moves, in the same rounds: *idle*, the same readers and writers alone; and *burnt*,
//! with as many threads as the move had, that copy private memory for as much CPU time as the
//! moves of this round took. The second is the fair control: moving costs CPU time however it
//! is done, and a machine with no CPU to spare feels that first.
//!
//! The accesses follow each other without a pause (a closed loop): a stall counts once, however
//! many accesses it held up. [`Felt::stalled_share`] says how much of the time stalls took.

use std::cell::Cell;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use pageferry_copy::Kernel;
use pageferry_sys::sched;

use super::config::{Account, Config, folio_name};
use super::content::{Content, Owned, PAGE_WORDS, Random, Tally};
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

/// What the accessors of one measurement have to say.
struct Accesses {
    readers: Latencies,
    writers: Latencies,
    wrong: u64,
    owned: Vec<Owned>,
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
                            read(words, content, count, id, stop)
                        }),
                        scope.spawn(move || {
                            start.wait();
                            write(words, content, owned, stop)
                        }),
                    )
                })
                .unzip();
            start.wait();
            let began = Instant::now();
            let moved = go_on(&mut self.beside, field, self.duty, began + length, warm_up);
            stop.store(true, Ordering::Relaxed);
            let wall = began.elapsed();
            (join(readers, writers), moved, wall)
        });
        let accesses = accesses?;
        let moved = moved?;
        let cpu = reading.elapsed().cpu().saturating_sub(accesses.cpu);
        settle(field, words, &content, accesses.wrong, accesses.owned)?;
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
        stalled_share: latencies.stalled().as_secs_f64() / seconds,
    })
}

/// Reads random words that no writer owns, until told to stop.
fn read(
    words: Words<'_>,
    content: Content,
    writers: usize,
    id: usize,
    stop: &AtomicBool,
) -> Result<(Latencies, u64, u64), Trouble> {
    let mut latencies = latencies()?;
    let mut random = Random::new(content.seed ^ (0x5eed << 8) ^ id as u64);
    let taken: Vec<usize> = (0..writers).map(|w| Owned::new(w, PAGE_WORDS).index(0)).collect();
    let mut wrong = 0;
    // Relaxed: stopping publishes nothing, and needs to be seen soon, not at once.
    while !stop.load(Ordering::Relaxed) {
        let index = random.below(words.len());
        if taken.contains(&(index % PAGE_WORDS)) {
            continue;
        }
        let began = Instant::now();
        let found = words.load(index);
        latencies.record(began.elapsed());
        wrong += u64::from(found != content.word(index, 0));
    }
    Ok((latencies, wrong, sched::thread_cpu_ns()))
}

/// Reads and rewrites owned words, until told to stop.
fn write(
    words: Words<'_>,
    content: Content,
    mut owned: Owned,
    stop: &AtomicBool,
) -> Result<(Latencies, u64, Owned, u64), Trouble> {
    let mut latencies = latencies()?;
    let mut random = Random::new(content.seed.rotate_left(9) ^ owned.index(0) as u64);
    let mut wrong = 0;
    while !stop.load(Ordering::Relaxed) {
        let page = random.below(owned.pages());
        let index = owned.index(page);
        let expected = owned.expected(page, &content);
        let next = owned.next(page, &content);
        // Reading back and writing are one access: the read finds the page cold or away, the
        // write finds it protected.
        let began = Instant::now();
        let found = words.load(index);
        words.store(index, next);
        latencies.record(began.elapsed());
        wrong += u64::from(found != expected);
    }
    Ok((latencies, wrong, owned, sched::thread_cpu_ns()))
}

fn latencies() -> Result<Latencies, Trouble> {
    Latencies::new().map_err(|error| Trouble::Fail(error.to_string()))
}

type Reader<'scope> = thread::ScopedJoinHandle<'scope, Result<(Latencies, u64, u64), Trouble>>;
type Writer<'scope> =
    thread::ScopedJoinHandle<'scope, Result<(Latencies, u64, Owned, u64), Trouble>>;

fn join(readers: Vec<Reader<'_>>, writers: Vec<Writer<'_>>) -> Result<Accesses, Trouble> {
    let died = |_| Trouble::Fail("a reader or writer panicked".to_owned());
    let mut all = Accesses {
        readers: latencies()?,
        writers: latencies()?,
        wrong: 0,
        owned: Vec::new(),
        cpu: Duration::ZERO,
    };
    for reader in readers {
        let (latencies, wrong, cpu) = reader.join().map_err(died)??;
        all.readers.add(&latencies);
        all.wrong += wrong;
        all.cpu += Duration::from_nanos(cpu);
    }
    for writer in writers {
        let (latencies, wrong, owned, cpu) = writer.join().map_err(died)??;
        all.writers.add(&latencies);
        all.wrong += wrong;
        all.owned.push(owned);
        all.cpu += Duration::from_nanos(cpu);
    }
    Ok(all)
}

/// Compares every word of the region, and makes it as it was before.
fn settle(
    field: &Field,
    words: Words<'_>,
    content: &Content,
    wrong: u64,
    owned: Vec<Owned>,
) -> Result<(), Trouble> {
    let mut lost = Vec::new();
    if wrong > 0 {
        lost.push(format!("{wrong} accesses saw a word that was not what had been written"));
    }
    for owned in owned {
        if let Some((count, mismatch)) = owned.settle(words, content) {
            lost.push(format!("{count} written words are lost, such as: {mismatch}"));
        }
    }
    if !lost.is_empty() {
        return Err(Trouble::Fail(lost.join("; ")));
    }
    field.check_all()
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
