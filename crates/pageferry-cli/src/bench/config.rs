//! A way to move memory, and a case that measures it.

use std::ops::Range;
use std::time::{Duration, Instant};

use pageferry::{Division, FolioSize, Frames, MigrateError, Move, Order, Report};
use pageferry_copy::Kernel;

use super::lab::{Case, Field, Lab, Trouble, Window};
use super::schema::Run;
use super::stats::{self, Counted, Latencies, Reading};

/// A way to move memory; what is `None` is left to the engine.
#[derive(Clone, Debug)]
pub(super) struct Config {
    pub(super) scenario: &'static str,
    pub(super) order: Option<Order>,
    pub(super) division: Option<Division>,
    pub(super) frames: Frames,
    pub(super) threads: Option<usize>,
    pub(super) batch: Option<usize>,
    pub(super) budget: Option<Duration>,
    /// The copy kernel; none: the engine's own.
    pub(super) kernel: Option<Kernel>,
}

impl Config {
    /// The engine's defaults.
    pub(super) fn new(scenario: &'static str) -> Self {
        Self {
            scenario,
            order: None,
            division: None,
            frames: Frames::Recycled,
            threads: None,
            batch: None,
            budget: None,
            kernel: None,
        }
    }

    /// The same transaction, one thread, folio after folio, libc memcpy.
    pub(super) fn sequential(
        scenario: &'static str,
        folio: FolioSize,
        order: Order,
        frames: Frames,
    ) -> Self {
        Self {
            order: Some(order),
            division: Some(Division::Shared),
            frames,
            threads: Some(1),
            batch: Some(folio.bytes()),
            kernel: Some(Kernel::MEMCPY),
            ..Self::new(scenario)
        }
    }

    /// Moves a window.
    pub(super) fn execute(&self, field: &Field, window: &Window) -> Result<Report, MigrateError> {
        let part = field.region.to(window.to).range(window.range.clone());
        let mut migration = field.engine.migrate(part);
        if !field.is_node_to_node() {
            migration = migration.even_if_there();
        }
        self.options(migration).run()
    }

    /// Gives a move, or an exchange, its options.
    pub(super) fn options(&self, migration: Move) -> Move {
        let mut migration = migration.frames(self.frames);
        if let Some(order) = self.order {
            migration = migration.order(order);
        }
        if let Some(division) = self.division {
            migration = migration.division(division);
        }
        if let Some(threads) = self.threads {
            migration = migration.threads(threads);
        }
        if let Some(batch) = self.batch {
            migration = migration.batch_bytes(batch);
        }
        // A batch size that is asked for is not to be cut by the default budget.
        let budget = self.budget.or(self.order.map(|_| Duration::from_secs(1)));
        if let Some(budget) = budget {
            migration = migration.stall_budget(budget);
        }
        if let Some(kernel) = self.kernel {
            migration = migration.kernel(kernel);
        }
        migration
    }

    /// In a few words, for progress and troubles.
    pub(super) fn describe(&self, folio: FolioSize) -> String {
        let mut name = format!("{} {}", self.scenario, folio_name(folio));
        let words = [self.order.map(order_name), self.division.map(division_name)];
        for word in words.into_iter().flatten() {
            name.push(' ');
            name.push_str(word);
        }
        name.push(' ');
        name.push_str(frames_name(self.frames));
        if let Some(batch) = self.batch {
            name.push_str(&format!(" in {} KiB", batch >> 10));
        }
        name
    }
}

pub(super) fn order_name(order: Order) -> &'static str {
    match order {
        Order::Live => "live",
        Order::Frozen => "frozen",
    }
}

pub(super) fn division_name(division: Division) -> &'static str {
    match division {
        Division::Conducted => "conducted",
        Division::Shared => "shared",
    }
}

pub(super) fn frames_name(frames: Frames) -> &'static str {
    match frames {
        Frames::Recycled => "recycled",
        Frames::Fresh => "fresh",
        Frames::KernelCopy => "kernel_copy",
    }
}

/// Sums over reports.
#[derive(Debug)]
pub(super) struct Account {
    pub(super) bytes: u64,
    pub(super) wall: Duration,
    pub(super) cpu: Duration,
    pub(super) holes: Latencies,
    frozen: u64,
    live: u64,
    division: Option<Division>,
    engine: String,
    repairs: u64,
    fallbacks: u64,
    /// Why pages stayed, and how many bytes of them.
    stayed: Vec<(String, u64)>,
}

impl Account {
    pub(super) fn new() -> Result<Self, Trouble> {
        Ok(Self {
            bytes: 0,
            wall: Duration::ZERO,
            cpu: Duration::ZERO,
            holes: Latencies::new().map_err(|e| Trouble::Fail(e.to_string()))?,
            frozen: 0,
            live: 0,
            division: None,
            engine: String::new(),
            repairs: 0,
            fallbacks: 0,
            stayed: Vec::new(),
        })
    }

    pub(super) fn add(&mut self, report: &Report, wall: Duration) {
        self.bytes += report.bytes_moved;
        self.wall += wall;
        self.cpu += report.cpu_time();
        self.holes.record_holes(&report.holes);
        self.frozen += report.batches_frozen;
        self.live += report.batches_live;
        self.division = Some(report.division);
        self.engine.clone_from(&report.engine);
        self.repairs += report.repairs;
        self.fallbacks += report.fallbacks;
        for (outcome, bytes) in report.by_outcome() {
            if outcome != pageferry::Outcome::Moved {
                let name = outcome.to_string();
                match self.stayed.iter_mut().find(|(known, _)| *known == name) {
                    Some((_, sum)) => *sum += bytes,
                    None => self.stayed.push((name, bytes)),
                }
            }
        }
    }

    /// Puts what was seen, and what was asked for, into a run.
    pub(super) fn describe(&self, config: &Config, run: &mut Run) {
        let seen = match (self.frozen, self.live) {
            (_, 0) => "frozen".to_owned(),
            (0, _) => "live".to_owned(),
            (frozen, live) => {
                let share = 100.0 * live as f64 / (frozen + live) as f64;
                add_note(run, format!("{share:.0} % of the batches live, the others frozen"));
                if live > frozen { "live" } else { "frozen" }.to_owned()
            }
        };
        let asked = config.order.map(order_name);
        let division = self.division.map(division_name);
        let asked_division = config.division.map(division_name);
        for (asked, seen) in [(asked, Some(&*seen)), (asked_division, division)] {
            if let Some(asked) = asked.filter(|&asked| Some(asked) != seen) {
                add_note(run, format!("asked for {asked}"));
            }
        }
        run.order = Some(seen);
        run.division = division.map(str::to_owned);
        run.frames = Some(frames_name(config.frames).to_owned());
        run.engine.clone_from(&self.engine);
        run.batch_bytes = config.batch.map(|bytes| bytes as u64);
        run.stall_budget_us = config.budget.map(stats::us);
        run.hole_us = self.holes.quantiles();
        if self.bytes > 0 {
            run.cpu_s_per_gib = Some(self.cpu.as_secs_f64() / (self.bytes as f64 / stats::GIB));
        }
        if self.repairs > 0 {
            add_note(run, format!("{} pages copied again", self.repairs));
        }
        if self.fallbacks > 0 {
            add_note(run, format!("{} pages placed another way than asked for", self.fallbacks));
        }
        for (why, bytes) in &self.stayed {
            add_note(run, format!("{bytes} bytes not moved: {why}"));
        }
    }
}

/// Adds a sentence to a run's note.
pub(super) fn add_note(run: &mut Run, text: String) {
    match &mut run.note {
        Some(note) => {
            note.push_str("; ");
            note.push_str(&text);
        }
        none => *none = Some(text),
    }
}

/// How much one measurement of a [`MoveCase`] moves.
#[derive(Clone, Copy, Debug)]
pub(super) enum Extent {
    /// As much as takes about the plan's target time; found in the warm-up round.
    Timed,
    /// So many moves of so many bytes, each timed by itself.
    Repeat {
        /// Bytes of each.
        bytes: usize,
        /// How many.
        times: usize,
    },
}

/// Bytes moved before a timed measurement of recycled frames: as many as are kept (the frame budget).
const SETTLE: usize = 64 << 20;

/// Measures a way to move memory.
pub(super) struct MoveCase<'a> {
    config: Config,
    field: &'a Field,
    extent: Extent,
    /// Bytes of a timed measurement.
    window: usize,
    account: Option<Account>,
    rates: Vec<f64>,
    first_us: Vec<f64>,
    call_us: Vec<f64>,
    counted: Counted,
}

impl<'a> MoveCase<'a> {
    pub(super) fn boxed(config: Config, field: &'a Field, extent: Extent) -> Box<dyn Case + 'a> {
        Box::new(Self {
            config,
            field,
            extent,
            // A quarter tells how fast it goes, at a price that slow ways can pay.
            window: field.region.len() / 4,
            account: None,
            rates: Vec::new(),
            first_us: Vec::new(),
            call_us: Vec::new(),
            counted: Counted::default(),
        })
    }

    /// One move: timed, then checked.
    fn once(&self, bytes: usize) -> Result<(Report, Duration, Counted, Range<usize>), Trouble> {
        let fail = |error: String| Trouble::Fail(error);
        let window = self.field.window(bytes).map_err(|e| fail(format!("{e:#}")))?;
        let reading = Reading::now();
        let began = Instant::now();
        let report = self.config.execute(self.field, &window);
        let wall = began.elapsed();
        let counted = reading.elapsed();
        let report = report.map_err(|e| fail(e.to_string()))?;
        self.field.check(window.range.clone())?;
        if report.bytes_moved == 0 {
            return Err(fail("no page was moved".to_owned()));
        }
        self.field.moved(&window).map_err(|e| fail(format!("{e:#}")))?;
        Ok((report, wall, counted, window.range))
    }

    fn keep(&mut self, report: &Report, wall: Duration) -> Result<(), Trouble> {
        if self.account.is_none() {
            self.account = Some(Account::new()?);
        }
        if let Some(account) = &mut self.account {
            account.add(report, wall);
        }
        self.call_us.push(stats::us(wall));
        self.first_us.extend(report.first_folio.map(stats::us));
        Ok(())
    }
}

impl Case for MoveCase<'_> {
    fn name(&self) -> String {
        self.config.describe(self.field.folio)
    }

    fn measure(&mut self, lab: &Lab<'_>, warm_up: bool) -> Result<(), Trouble> {
        match self.extent {
            Extent::Timed => {
                // What ran before was of another kind, and left frames of that: the first batches
                // would measure how these are exchanged for such as this kind needs.
                if self.config.frames == Frames::Recycled {
                    self.once(self.window.min(SETTLE))?;
                }
                let (report, wall, counted, _) = self.once(self.window)?;
                if warm_up {
                    let per_second = report.bytes_moved as f64 / wall.as_secs_f64().max(1e-6);
                    self.window = window(per_second, lab.plan.target, self.field.region.len());
                    return Ok(());
                }
                self.keep(&report, wall)?;
                self.counted.add(&counted);
                self.rates.push(stats::gb_per_s(report.bytes_moved, wall));
            }
            Extent::Repeat { bytes, times } => {
                let (mut moved, mut spent) = (0, Duration::ZERO);
                for _ in 0..if warm_up { times.div_ceil(4) } else { times } {
                    let (report, wall, counted, _) = self.once(bytes)?;
                    if !warm_up {
                        moved += report.bytes_moved;
                        spent += wall;
                        self.keep(&report, wall)?;
                        self.counted.add(&counted);
                    }
                }
                if !warm_up {
                    self.rates.push(stats::gb_per_s(moved, spent));
                }
            }
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Option<Run> {
        let account = self.account?;
        let mut run = Run::new(self.config.scenario);
        account.describe(&self.config, &mut run);
        run.folio_bytes = Some(self.field.folio.bytes() as u64);
        run.threads = self.config.threads.unwrap_or(self.field.threads);
        run.gb_per_s = stats::spread(&self.rates);
        run.first_folio_us = stats::median(&self.first_us);
        if matches!(self.extent, Extent::Repeat { .. }) {
            run.call_us = stats::median(&self.call_us);
        }
        run.per_gib = self.counted.per_gib(account.bytes);
        run.rounds = self.rates.len();
        // A word that was wrong would have ended the case.
        run.verified = Some(true);
        Some(run)
    }
}

/// Bytes that take about `target` at a given speed: whole huge folios, at least four of them.
fn window(bytes_per_second: f64, target: Duration, region: usize) -> usize {
    const HUGE: usize = 2 << 20;
    let folios = bytes_per_second * target.as_secs_f64() / HUGE as f64;
    // Saturates; the result is bounded by the region.
    #[allow(clippy::cast_possible_truncation, reason = "a float-to-integer cast saturates")]
    #[allow(clippy::cast_sign_loss, reason = "a float-to-integer cast saturates")]
    let folios = folios.round() as usize;
    (folios.clamp(4, region / HUGE)) * HUGE
}

/// `4K` or `2M`.
pub(super) fn folio_name(folio: FolioSize) -> &'static str {
    match folio {
        FolioSize::Base => "4K",
        FolioSize::Huge => "2M",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_takes_about_the_time_wanted_and_fits_the_region() {
        let target = Duration::from_millis(100);
        assert_eq!(window(200e6, target, 1 << 30), 20 << 20);
        assert_eq!(window(1e12, target, 64 << 20), 64 << 20);
        assert_eq!(window(1.0, target, 64 << 20), 8 << 20);
    }
}
