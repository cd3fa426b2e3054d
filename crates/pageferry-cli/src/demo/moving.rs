//! Moving the region: by the engine as it comes, and one folio at a time for comparison.
//!
//! Both ways are the same transaction on the same memory under the same load. Where two nodes have
//! room for the region it goes to the other one and back; elsewhere every page goes to another
//! frame of the same node, which costs the same but for the distance.
//!
//! While a move is under way, nothing here hands an address of the region to the kernel: physical
//! addresses are read before and after, by number.

use super::holes::HoleCounts;
use super::look::{Frames, Look};
use crate::cancel;
use anyhow::Context as _;
use pageferry::{DEFAULT_STALL_BUDGET, Division, Engine, Order, Outcome, Region, Report};
use pageferry_copy::Kernel;
use pageferry_topology::{Machine, NodeId};
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of one move of the baseline: large enough that beginning and ending it is nothing beside
/// its folios, small enough that it ends soon when its time is over.
const PIECE: usize = 8 << 20;
/// How long a range may be away, as the moves of the engine are told.
pub(super) const STALL_BUDGET: Duration = DEFAULT_STALL_BUDGET;
/// How often a move under way is looked at.
const GLANCE: Duration = Duration::from_millis(2);

/// Between what the region moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(super) enum Route {
    /// To the other node and back.
    Nodes {
        /// Where it begins.
        home: NodeId,
        /// Where it goes.
        away: NodeId,
    },
    /// From frame to frame of one node.
    Frames {
        /// The node.
        node: NodeId,
    },
}

impl Route {
    /// The route for a region of `bytes` on this machine; `None` if no node has memory.
    pub(super) fn on(machine: &Machine, bytes: u64) -> Option<Self> {
        let mut nodes: Vec<_> = machine.memory_nodes().collect();
        // The node with most free memory is home; among equals the first.
        nodes.sort_by_key(|node| std::cmp::Reverse(node.free_bytes));
        let home = nodes.first()?.id;
        let away = nodes.get(1).filter(|node| node.free_bytes >= bytes);
        Some(away.map_or(Self::Frames { node: home }, |away| Self::Nodes { home, away: away.id }))
    }

    /// Where the region begins.
    pub(super) fn home(self) -> NodeId {
        match self {
            Self::Nodes { home, .. } => home,
            Self::Frames { node } => node,
        }
    }

    fn ends(self) -> [NodeId; 2] {
        match self {
            Self::Nodes { home, away } => [home, away],
            Self::Frames { node } => [node, node],
        }
    }
}

/// What all moves of one way did.
#[derive(Debug, Default)]
pub(super) struct Sum {
    pub(super) moves: u64,
    pub(super) bytes: u64,
    pub(super) elapsed: Duration,
    pub(super) cpu: Duration,
    /// GB/s of each round.
    pub(super) rounds: Vec<f64>,
    /// Bytes that are there and did not move, by reason.
    pub(super) stayed: BTreeMap<Outcome, u64>,
    /// Times from detach to attach.
    pub(super) holes: HoleCounts,
}

impl Sum {
    fn add(&mut self, report: &Report) {
        self.moves += 1;
        self.bytes += report.bytes_moved;
        self.elapsed += report.elapsed;
        self.cpu += report.cpu_time();
        self.holes.add(&report.holes);
        for (outcome, bytes) in report.by_outcome() {
            if !outcome.is_settled() && outcome != Outcome::Cancelled {
                *self.stayed.entry(outcome).or_default() += bytes;
            }
        }
    }

    /// GB/s (10^9) over all moves; 0 when there was none.
    #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
    pub(super) fn gb_per_s(&self) -> f64 {
        rate(self.bytes, self.elapsed)
    }
}

#[allow(clippy::cast_precision_loss, reason = "a rate for people")]
fn rate(bytes: u64, elapsed: Duration) -> f64 {
    if elapsed.is_zero() { 0.0 } else { bytes as f64 / 1e9 / elapsed.as_secs_f64() }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Mover {
    engine: Engine,
    region: Arc<Region>,
    route: Route,
    away: bool,
    /// Where the baseline goes on.
    next: usize,
    pub(super) by_engine: Sum,
    pub(super) one_by_one: Sum,
    pub(super) frames: Frames,
}

impl Mover {
    pub(super) fn new(engine: Engine, region: Arc<Region>, route: Route) -> Self {
        Self {
            engine,
            region,
            route,
            away: false,
            next: 0,
            by_engine: Sum::default(),
            one_by_one: Sum::default(),
            frames: Frames::default(),
        }
    }

    /// Moves the whole region again and again until `end`, once at least. The first move is looked
    /// at from outside too.
    pub(super) fn move_until(&mut self, end: Instant, glance: impl Fn()) -> anyhow::Result<()> {
        let (bytes, elapsed) = (self.by_engine.bytes, self.by_engine.elapsed);
        let before = Look::at(&self.region)?;
        let report = self.move_all(&glance)?;
        self.frames.add(&before, &Look::at(&self.region)?, &report);
        while Instant::now() < end && !cancel::requested() {
            self.move_all(&glance)?;
        }
        let sum = &mut self.by_engine;
        sum.rounds.push(rate(sum.bytes - bytes, sum.elapsed - elapsed));
        Ok(())
    }

    fn move_all(&mut self, glance: &impl Fn()) -> anyhow::Result<Report> {
        let to = self.route.ends()[usize::from(!self.away)];
        let mut migrate = self.engine.migrate(self.region.to(to)).stall_budget(STALL_BUDGET);
        if let Route::Frames { .. } = self.route {
            migrate = migrate.even_if_there();
        }
        let handle = migrate.start().context("cannot move the index")?;
        while !handle.is_finished() {
            if cancel::requested() {
                handle.cancel();
                break;
            }
            glance();
            std::thread::sleep(GLANCE);
        }
        let report = handle.wait().context("moving the index failed")?;
        self.by_engine.add(&report);
        if !report.cancelled {
            self.away = !self.away;
        }
        Ok(report)
    }

    /// Moves piece after piece of the region, there and back, one folio at a time, until `end`,
    /// one piece at least.
    pub(super) fn one_by_one_until(
        &mut self,
        end: Instant,
        glance: impl Fn(),
    ) -> anyhow::Result<()> {
        let (bytes, elapsed) = (self.one_by_one.bytes, self.one_by_one.elapsed);
        loop {
            let piece = self.next..(self.next + PIECE).min(self.region.len());
            let [home, away] = self.route.ends();
            // There and back: the region stays on one node as a whole.
            let ends = if self.away { [home, away] } else { [away, home] };
            for to in ends {
                self.move_one_by_one(piece.clone(), to)?;
                glance();
            }
            self.next = if piece.end == self.region.len() { 0 } else { piece.end };
            if Instant::now() >= end || cancel::requested() {
                break;
            }
        }
        let sum = &mut self.one_by_one;
        sum.rounds.push(rate(sum.bytes - bytes, sum.elapsed - elapsed));
        Ok(())
    }

    fn move_one_by_one(&mut self, piece: Range<usize>, to: NodeId) -> anyhow::Result<()> {
        let mut migrate = self
            .engine
            .migrate(self.region.to(to).range(piece))
            .order(Order::Frozen)
            .division(Division::Shared)
            .threads(1)
            .batch_bytes(pageferry_sys::page_size())
            .kernel(Kernel::MEMCPY);
        if let Route::Frames { .. } = self.route {
            migrate = migrate.even_if_there();
        }
        let report = migrate.run().context("moving the index one folio at a time failed")?;
        self.one_by_one.add(&report);
        Ok(())
    }
}
