//! Moving the region: by the engine as it comes, and one folio at a time for comparison.
//!
//! Both ways are the same transaction on the same memory under the same load. Where two nodes have
//! room for the region it goes to the other one and back; elsewhere every page goes to another
//! frame of the same node, which costs the same but for the distance.
//!
//! At full speed each way moves as much as it can. Where what is felt of them is compared, both take
//! the steps of one [`Plan`]: the same pages at the same times.
//!
//! While a move is under way, nothing here hands an address of the region to the kernel: physical
//! addresses are read before and after, by number.

use super::holes::HoleCounts;
use super::look::{Frames, Look};
use super::pace::{self, Kept, Wall};
use crate::cancel;
use anyhow::Context as _;
use pageferry::{
    DEFAULT_STALL_BUDGET, Division, Engine, FolioSize, Order, Outcome, Region, Report,
};
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
/// Bytes of one step of a paced move: many in a slice, each more than what beginning it costs.
const STEP: usize = 1 << 20;
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

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Step {
    range: Range<usize>,
    /// It comes back from where the step before took it.
    back: bool,
}

/// What is moved in a slice, and when: ranges in which every page is there, spread over the
/// region.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Plan {
    steps: Vec<Step>,
    /// When each step is due, from the slice's beginning.
    pub(super) dues: Vec<Duration>,
    /// Bytes of all steps.
    pub(super) bytes: u64,
    /// GB/s (10^9) at which they are due.
    pub(super) gb_per_s: f64,
}

impl Plan {
    /// For a slice of `length` at `gb_per_s`, about, from the ranges that are `there`, each in
    /// whole folios; one step at least if anything is there.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bytes of a slice are far fewer than 2^52; a plan is about so large"
    )]
    fn new(
        there: &[(Range<usize>, usize)],
        length: Duration,
        gb_per_s: f64,
        returns: bool,
    ) -> Self {
        let mut pieces = Vec::new();
        for (range, step) in there {
            let starts = range.clone().step_by(*step);
            pieces.extend(starts.map(|start| start..(start + step).min(range.end)));
        }
        let all: usize = pieces.iter().map(Range::len).sum();
        let ways = 1 + usize::from(returns);
        if all == 0 || gb_per_s <= 0.0 {
            return Self::default();
        }
        let wanted = gb_per_s * 1e9 * length.as_secs_f64();
        let mean = (all * ways) as f64 / pieces.len() as f64;
        let count = ((wanted / mean) as usize).max(1);
        let mut plan = Self { gb_per_s, ..Self::default() };
        for number in 0..count {
            // Spread over the region; more than the region goes round it.
            let at = if count <= pieces.len() { number * pieces.len() / count } else { number };
            let range = &pieces[at % pieces.len()];
            for back in [false, true].into_iter().take(ways) {
                plan.dues.push(Duration::from_secs_f64(plan.bytes as f64 / (gb_per_s * 1e9)));
                plan.steps.push(Step { range: range.clone(), back });
                plan.bytes += range.len() as u64;
            }
        }
        plan
    }
}

/// Who moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The engine as it comes.
    Engine,
    /// One thread, one folio after another.
    OneByOne,
}

/// What a way did of a plan.
#[derive(Clone, Copy, Debug)]
pub(super) struct Followed {
    pub(super) bytes: u64,
    /// GB/s from the first step's beginning to the last one's end.
    pub(super) gb_per_s: f64,
    pub(super) kept: Kept,
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

    /// The common pace: half of what the slower way manages at full speed, so that both can keep
    /// it. GB/s; nothing of this is in the sums.
    pub(super) fn find_pace(&mut self, glance: impl Fn()) -> anyhow::Result<f64> {
        let whole = self.move_all(&glance)?;
        let mut piece = Sum::default();
        self.piece_there_and_back(&mut piece)?;
        Ok(rate(whole.bytes_moved, whole.elapsed).min(piece.gb_per_s()) / 2.0)
    }

    /// The plan of all paced slices, from what is there now.
    pub(super) fn plan(&self, length: Duration, gb_per_s: f64) -> anyhow::Result<Plan> {
        let look = Look::at(&self.region)?;
        let start = self.region.addr();
        let mut there = Vec::new();
        for (size, step) in [(FolioSize::Base, STEP), (FolioSize::Huge, pageferry::HUGE)] {
            let ranges = look.of(size).iter();
            there.extend(ranges.map(|r| (r.start - start..r.end - start, step)));
        }
        there.sort_by_key(|(range, _)| range.start);
        let returns = matches!(self.route, Route::Nodes { .. });
        Ok(Plan::new(&there, length, gb_per_s, returns))
    }

    /// Moves what a plan says, when it says so.
    pub(super) fn follow(
        &mut self,
        plan: &Plan,
        way: Way,
        glance: impl Fn(),
    ) -> anyhow::Result<Followed> {
        let (begin, mut bytes) = (Instant::now(), 0);
        let kept = pace::keep(&plan.dues, &Wall(begin), |number| {
            let step = &plan.steps[number];
            let to = self.route.ends()[usize::from(self.away == step.back)];
            bytes += self.part(way, step.range.clone(), to)?.bytes_moved;
            glance();
            Ok::<_, anyhow::Error>(())
        })?;
        Ok(Followed { bytes, gb_per_s: rate(bytes, begin.elapsed()), kept })
    }

    fn part(&self, way: Way, range: Range<usize>, to: NodeId) -> anyhow::Result<Report> {
        let mut migrate = self.engine.migrate(self.region.to(to).range(range));
        migrate = match way {
            Way::Engine => migrate.stall_budget(STALL_BUDGET),
            Way::OneByOne => migrate
                .order(Order::Frozen)
                .division(Division::Shared)
                .threads(1)
                .batch_bytes(pageferry_sys::page_size())
                .kernel(Kernel::MEMCPY),
        };
        if let Route::Frames { .. } = self.route {
            migrate = migrate.even_if_there();
        }
        migrate.run().context("moving a part of the index failed")
    }

    /// Moves the whole region again and again while `goes_on`, once at least. The first move is
    /// looked at from outside too.
    pub(super) fn full_speed(
        &mut self,
        goes_on: impl Fn() -> bool,
        glance: impl Fn(),
    ) -> anyhow::Result<()> {
        let (bytes, elapsed) = (self.by_engine.bytes, self.by_engine.elapsed);
        let before = Look::at(&self.region)?;
        let report = self.move_all(&glance)?;
        self.by_engine.add(&report);
        self.frames.add(&before, &Look::at(&self.region)?, &report);
        while goes_on() && !cancel::requested() {
            let report = self.move_all(&glance)?;
            self.by_engine.add(&report);
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
        if !report.cancelled {
            self.away = !self.away;
        }
        Ok(report)
    }

    /// Moves piece after piece of the region, there and back, one folio at a time, while
    /// `goes_on`, one piece at least.
    pub(super) fn full_speed_one_by_one(
        &mut self,
        goes_on: impl Fn() -> bool,
        glance: impl Fn(),
    ) -> anyhow::Result<()> {
        let mut sum = std::mem::take(&mut self.one_by_one);
        let (bytes, elapsed) = (sum.bytes, sum.elapsed);
        loop {
            self.piece_there_and_back(&mut sum)?;
            glance();
            if !goes_on() || cancel::requested() {
                break;
            }
        }
        sum.rounds.push(rate(sum.bytes - bytes, sum.elapsed - elapsed));
        self.one_by_one = sum;
        Ok(())
    }

    fn piece_there_and_back(&mut self, sum: &mut Sum) -> anyhow::Result<()> {
        let piece = self.next..(self.next + PIECE).min(self.region.len());
        self.next = if piece.end == self.region.len() { 0 } else { piece.end };
        let [home, away] = self.route.ends();
        // There and back: the region stays on one node as a whole.
        for to in if self.away { [home, away] } else { [away, home] } {
            sum.add(&self.part(Way::OneByOne, piece.clone(), to)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn a_plan_takes_whole_pieces_of_what_is_there_at_an_even_pace() {
        let there =
            [(0..3 * MIB, STEP), (8 * MIB..10 * MIB + 4096, STEP), (16 * MIB..20 * MIB, 2 * MIB)];
        // 8.39 MB in a second of 10 MB/s: every piece but what is left.
        let plan = Plan::new(&there, Duration::from_secs(1), 0.01, false);
        assert_eq!(plan.bytes, plan.steps.iter().map(|s| s.range.len() as u64).sum::<u64>());
        let mut before = 0;
        for (step, due) in plan.steps.iter().zip(&plan.dues) {
            assert_eq!(due.as_micros(), before / 10, "bytes before it, at 10 bytes/us");
            assert!(
                there.iter().any(|(r, _)| r.start <= step.range.start && step.range.end <= r.end)
            );
            before += step.range.len() as u128;
        }
        let both = Plan::new(&there, Duration::from_secs(1), 0.01, true);
        assert!(both.steps.chunks(2).all(|s| s[0].range == s[1].range && !s[0].back && s[1].back));
        let long = Plan::new(&there, Duration::from_secs(100), 0.01, false);
        assert!(long.bytes > 900_000_000, "it goes round the region: {}", long.bytes);
        let short = Plan::new(&there, Duration::from_millis(1), 0.01, false);
        assert_eq!(short.steps.len(), 1);
    }

    #[test]
    fn where_nothing_is_or_can_be_moved_nothing_is_planned() {
        let second = Duration::from_secs(1);
        assert_eq!(Plan::new(&[], second, 1.0, false), Plan::default());
        assert_eq!(Plan::new(&[(0..MIB, STEP)], second, 0.0, true), Plan::default());
    }
}
