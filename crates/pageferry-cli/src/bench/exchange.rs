//! Exchanges: two sets of pages that change places, beside the same folio after folio.
//!
//! With several nodes, one set is on the first and the other on the second, and each goes where
//! the other is. With one node there is nowhere to go: the pages of both sets get other frames of
//! that node, each the ones that the other set left.
//!
//! What counts is what was moved: both sets, so that the rates compare with those of one-sided
//! moves and the roofline.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use pageferry::{Division, FolioSize, Frames, MigrateError, Order, Report};
use pageferry_topology::NodeId;

use super::config::{self, Account, Config};
use super::lab::{Case, Field, Lab, Trouble};
use super::schema::Run;
use super::stats::{self, Counted, Reading};

/// Of a region's bytes, those of each set: both together are as much as the moves' first window.
pub(super) const PART: usize = 8;

/// Two sets of pages of one folio size, which all the cases of that size share.
#[derive(Debug)]
pub(super) struct Pair {
    one: Field,
    other: Field,
    /// Where `one` is, and where `other` is.
    homes: Cell<(NodeId, NodeId)>,
}

impl Pair {
    /// Maps and fills both, each on its node.
    pub(super) fn new(lab: &Lab<'_>, folio: FolioSize) -> anyhow::Result<Self> {
        let mut nodes = lab.engine.machine().memory_nodes().map(|node| node.id);
        let first = nodes.next().context("no node of this machine has memory")?;
        let second = nodes.next().unwrap_or(first);
        let field = || Field::new(&lab.engine, folio, lab.plan.region / PART, lab.content);
        let (one, other) = (field()?, field()?);
        if other.is_node_to_node() {
            lab.engine.migrate(other.region.to(second)).run().context("cannot place a region")?;
        }
        Ok(Self { one, other, homes: Cell::new((first, second)) })
    }

    /// The cases.
    pub(super) fn cases(&self, lab: &Lab<'_>) -> Vec<Box<dyn Case + '_>> {
        let (folio, recycled) = (self.one.folio, Frames::Recycled);
        let mut configs = vec![
            Config::sequential("exchange_sequential", folio, Order::Frozen, recycled),
            Config::new("exchange"),
        ];
        if lab.plan.is_full() {
            for order in [Order::Frozen, Order::Live] {
                for division in [Division::Conducted, Division::Shared] {
                    let (order, division) = (Some(order), Some(division));
                    configs.push(Config { order, division, ..Config::new("exchange") });
                }
            }
        }
        configs.into_iter().map(|config| ExchangeCase::boxed(self, config)).collect()
    }

    /// Sends each to where the other is.
    fn exchange(&self, config: &Config) -> Result<Report, MigrateError> {
        let (here, there) = self.homes.get();
        let sides = (self.one.region.to(there), self.other.region.to(here));
        let mut exchange = self.one.engine.exchange(sides.0, sides.1);
        if !self.one.is_node_to_node() {
            exchange = exchange.even_if_there();
        }
        let report = config.options(exchange).run()?;
        self.homes.set((there, here));
        Ok(report)
    }

    /// Reads back every word of both.
    fn check(&self) -> Result<(), Trouble> {
        self.one.check_all()?;
        self.other.check_all()
    }
}

/// Measures a way to exchange them.
struct ExchangeCase<'a> {
    pair: &'a Pair,
    config: Config,
    account: Option<Account>,
    rates: Vec<f64>,
    first_us: Vec<f64>,
    counted: Counted,
}

impl<'a> ExchangeCase<'a> {
    fn boxed(pair: &'a Pair, config: Config) -> Box<dyn Case + 'a> {
        Box::new(Self {
            pair,
            config,
            account: None,
            rates: Vec::new(),
            first_us: Vec::new(),
            counted: Counted::default(),
        })
    }
}

impl Case for ExchangeCase<'_> {
    fn name(&self) -> String {
        self.config.describe(self.pair.one.folio)
    }

    fn measure(&mut self, lab: &Lab<'_>, warm_up: bool) -> Result<(), Trouble> {
        // Exchanges follow each other until a measurement is as long as that of a move; one at
        // least, so that a slow way has a value too.
        let (mut bytes, mut wall) = (0, Duration::ZERO);
        while bytes == 0 || (wall < lab.plan.target && !warm_up) {
            let reading = Reading::now();
            let began = Instant::now();
            let report = self.pair.exchange(&self.config);
            let took = began.elapsed();
            let counted = reading.elapsed();
            let report = report.map_err(|error| Trouble::Fail(error.to_string()))?;
            if report.bytes_moved == 0 {
                return Err(Trouble::Fail("no page was moved".to_owned()));
            }
            bytes += report.bytes_moved;
            wall += took;
            if !warm_up {
                if self.account.is_none() {
                    self.account = Some(Account::new()?);
                }
                if let Some(account) = &mut self.account {
                    account.add(&report, took);
                }
                self.counted.add(&counted);
                self.first_us.extend(report.first_folio.map(stats::us));
            }
        }
        self.pair.check()?;
        if !warm_up {
            self.rates.push(stats::gb_per_s(bytes, wall));
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Option<Run> {
        let account = self.account?;
        let mut run = Run::new(self.config.scenario);
        account.describe(&self.config, &mut run);
        let field = &self.pair.one;
        run.folio_bytes = Some(field.folio.bytes() as u64);
        run.threads = self.config.threads.unwrap_or(field.threads);
        run.gb_per_s = stats::spread(&self.rates);
        run.first_folio_us = stats::median(&self.first_us);
        run.per_gib = self.counted.per_gib(account.bytes);
        run.rounds = self.rates.len();
        // A word that was wrong would have ended the case.
        run.verified = Some(true);
        let how = if field.is_node_to_node() { "between nodes" } else { "frame to frame" };
        let each = field.region.len() as u64;
        config::add_note(&mut run, format!("two sets of {} {how}", super::figures::size(each)));
        Some(run)
    }
}
