//! The laboratory: what every scenario measures with.
//!
//! # How it is measured
//! A scenario makes [`Case`]s. All of them are measured once, in turn, then all again: so that a
//! change of the machine's mood falls on all alike. The first round warms up and is thrown away.
//! Between two measurements the moved words are read back and compared; that is not timed.
//!
//! A case that goes wrong is not measured again, and why is reported.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use pageferry::{BuildError, Engine, EngineBuilder, FolioSize, Folios, References, Region};
use pageferry_copy::CopyEngine;
use pageferry_topology::NodeId;

use super::content::Content;
use super::plan::{Plan, Scenario};
use super::probe::{WORD, Words};
use super::schema::{Results, Run, Skipped};
use crate::cancel;
use crate::output::Context;

/// How long the bench's engines keep idle frames: longer than a round takes, so that recycled
/// frames are still there when a case's turn comes again.
pub(super) const KEEP_FRAMES: Duration = Duration::from_secs(60);

/// Tools that all scenarios share.
#[derive(Debug)]
pub(super) struct Lab<'a> {
    pub(super) plan: &'a Plan,
    /// Default settings, but for [`KEEP_FRAMES`].
    pub(super) engine: Engine,
    pub(super) content: Content,
    /// Why there are no huge folios, if there are none.
    pub(super) no_huge: Option<String>,
    bar: ProgressBar,
}

/// Why a case is not measured (any more).
#[derive(Debug)]
pub(super) enum Trouble {
    /// It cannot be measured here.
    Skip(String),
    /// It went wrong.
    Fail(String),
}

/// Something to measure again and again.
pub(super) trait Case {
    /// What it is, in a few words.
    fn name(&self) -> String;
    /// Measures once; a warm-up round's values are not kept.
    fn measure(&mut self, lab: &Lab<'_>, warm_up: bool) -> Result<(), Trouble>;
    /// What was found; `None` if nothing was.
    fn finish(self: Box<Self>) -> Option<Run>;
}

/// An engine for the bench. Without full rights, one that needs none: the bench gives no system
/// call the memory of a region while it moves.
pub(super) fn build_engine() -> anyhow::Result<Engine> {
    build_with(|builder| builder.idle_release(KEEP_FRAMES))
}

/// As [`build_engine`], with other options.
pub(super) fn build_with(
    options: impl Fn(EngineBuilder) -> EngineBuilder,
) -> anyhow::Result<Engine> {
    match options(Engine::builder()).build() {
        Err(BuildError::NotPermitted(_)) => {
            Ok(options(Engine::builder()).user_mode_only(true).build()?)
        }
        built => Ok(built?),
    }
}

impl<'a> Lab<'a> {
    pub(super) fn new(plan: &'a Plan, context: &Context) -> anyhow::Result<Self> {
        let bar = if context.progress { ProgressBar::new(0) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template("{prefix:>12} {wide_bar} {pos}/{len} {msg:<40!}");
        bar.set_style(style.context("progress bar")?);
        let engine = build_engine().context("cannot build a migration engine")?;
        let thp = super::machine::thp();
        Ok(Self {
            content: Content { seed: seed(), threads: plan.cpus.len() },
            no_huge: (thp == "never" || thp == "none")
                .then(|| format!("transparent huge pages are off (setting: {thp}); allow madvise")),
            plan,
            engine,
            bar,
        })
    }

    /// The folio sizes that can be measured.
    pub(super) fn folio_sizes(&self) -> Vec<FolioSize> {
        let all = [FolioSize::Base, FolioSize::Huge];
        all.into_iter().filter(|&f| f == FolioSize::Base || self.no_huge.is_none()).collect()
    }

    /// Measures all cases in turn, round after round, and adds what was found to the results.
    /// False if it was cut short by the user.
    pub(super) fn interleave(
        &self,
        scenario: Scenario,
        rounds: usize,
        cases: Vec<Box<dyn Case + '_>>,
        results: &mut Results,
    ) -> bool {
        let deadline = self.plan.limit(scenario).map(|limit| Instant::now() + limit);
        self.bar.reset();
        self.bar.set_prefix(scenario.name());
        self.bar.set_length(cases.len() as u64 * (rounds as u64 + 1));
        let mut cases: Vec<Option<Box<dyn Case + '_>>> = cases.into_iter().map(Some).collect();
        'rounds: for round in 0..=rounds {
            let began = Instant::now();
            for slot in &mut cases {
                if cancel::requested() {
                    break 'rounds;
                }
                let Some(case) = slot else { continue };
                self.bar.set_message(case.name());
                if let Err(trouble) = case.measure(self, round == 0) {
                    let name = case.name();
                    match trouble {
                        Trouble::Skip(because) => {
                            results.skipped.push(Skipped { what: name, because });
                        }
                        Trouble::Fail(why) => results.failures.push(format!("{name}: {why}")),
                    }
                    *slot = None;
                }
                self.bar.inc(1);
            }
            // A further round is begun only if it is likely to end in time.
            let late = |end: Instant| Instant::now() + began.elapsed() > end;
            if round > 0 && deadline.is_some_and(late) {
                break;
            }
        }
        for case in cases.into_iter().flatten() {
            let what = case.name();
            match case.finish() {
                Some(run) => results.runs.push(run),
                None if cancel::requested() => {}
                None => {
                    let because = "nothing was measured in the time there was".to_owned();
                    results.skipped.push(Skipped { what, because });
                }
            }
        }
        self.bar.set_message("");
        !cancel::requested()
    }

    /// Clears the progress bar.
    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}

/// Differs from run to run, so that yesterday's pages do not pass for today's.
fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let ns = now.map_or(1, |d| d.as_nanos());
    u64::try_from(ns & u128::from(u64::MAX)).unwrap_or(1).rotate_left(17)
}

/// A region that is moved window by window, filled and checked.
#[derive(Debug)]
pub(super) struct Field {
    pub(super) engine: Engine,
    pub(super) region: Region,
    pub(super) folio: FolioSize,
    /// Threads that its engine moves with.
    pub(super) threads: usize,
    content: Content,
    nodes: Vec<NodeId>,
    /// Where the next window begins.
    next: Cell<usize>,
    /// The node of each 2 MiB, as an index into `nodes`.
    places: RefCell<Vec<usize>>,
}

/// What is moved to where.
#[derive(Clone, Debug)]
pub(super) struct Window {
    pub(super) range: Range<usize>,
    pub(super) to: NodeId,
}

const BLOCK: usize = 2 << 20;

impl Field {
    /// Maps a region whose old pages may be recycled, and fills it.
    pub(super) fn new(
        engine: &Engine,
        folio: FolioSize,
        bytes: usize,
        content: Content,
    ) -> anyhow::Result<Self> {
        Self::with_references(engine, folio, bytes, content, References::Never)
    }

    /// Maps a region and fills it.
    pub(super) fn with_references(
        engine: &Engine,
        folio: FolioSize,
        bytes: usize,
        content: Content,
        references: References,
    ) -> anyhow::Result<Self> {
        let nodes: Vec<NodeId> = engine.machine().memory_nodes().map(|node| node.id).collect();
        let home = nodes.first().copied().context("no node of this machine has memory")?;
        let folios = match folio {
            FolioSize::Base => Folios::Base,
            FolioSize::Huge => Folios::Huge,
        };
        let mut options = engine.map(bytes).folios(folios).prefer(home);
        if references == References::Never {
            // SAFETY: the region is read and written by threads of the bench alone, and no system
            // call is given any of it.
            options = unsafe { options.no_references() };
        }
        let region = options.build().context("cannot map a region")?;
        content.fill(Words::of(&region));
        Ok(Self {
            engine: engine.clone(),
            places: RefCell::new(vec![0; region.len().div_ceil(BLOCK)]),
            threads: engine.cpu().capabilities().max_parallel,
            region,
            folio,
            content,
            nodes,
            next: Cell::new(0),
        })
    }

    /// Whether pages go from node to node, or from frame to frame on the only one.
    pub(super) fn is_node_to_node(&self) -> bool {
        self.nodes.len() > 1
    }

    /// The next window of at most `bytes` (at least a folio), round and round the region, and
    /// the node to which it is to go. Where there are several nodes, all of the window is brought
    /// to one of them first.
    pub(super) fn window(&self, bytes: usize) -> anyhow::Result<Window> {
        let folio = self.folio.bytes();
        let bytes = (bytes.max(folio) / folio * folio).min(self.region.len());
        let start = match self.next.get().next_multiple_of(folio) {
            start if start + bytes <= self.region.len() => start,
            _ => 0,
        };
        self.next.set(start + bytes);
        let range = start..start + bytes;
        if !self.is_node_to_node() {
            return Ok(Window { range, to: self.nodes[0] });
        }
        // Blocks are moved whole beforehand, so that a window within one is on one node too.
        let blocks = start / BLOCK..range.end.div_ceil(BLOCK);
        let mut places = self.places.borrow_mut();
        let from = places[blocks.start];
        for block in blocks {
            if places[block] != from {
                let end = self.region.len().min((block + 1) * BLOCK);
                self.engine
                    .migrate(self.region.to(self.nodes[from]).range(block * BLOCK..end))
                    .run()?;
                places[block] = from;
            }
        }
        Ok(Window { range, to: self.nodes[usize::from(from == 0)] })
    }

    /// Remembers that a window went to its destination. One that is not made of whole blocks is
    /// brought back, so that blocks stay whole.
    pub(super) fn moved(&self, window: &Window) -> anyhow::Result<()> {
        if !self.is_node_to_node() {
            return Ok(());
        }
        let Range { start, end } = window.range;
        let to = usize::from(window.to != self.nodes[0]);
        if start % BLOCK == 0 && end % BLOCK == 0 {
            self.places.borrow_mut()[start / BLOCK..end / BLOCK].fill(to);
        } else {
            let back = self.nodes[usize::from(to == 0)];
            self.engine.migrate(self.region.to(back).range(start..end)).run()?;
        }
        Ok(())
    }

    /// Reads back every word of a range of bytes.
    pub(super) fn check(&self, range: Range<usize>) -> Result<(), Trouble> {
        self.content
            .check(Words::of(&self.region), range.start / WORD..range.end / WORD)
            .map_err(|mismatch| Trouble::Fail(format!("content lost: {mismatch}")))
    }

    /// Reads back all of it.
    pub(super) fn check_all(&self) -> Result<(), Trouble> {
        self.check(0..self.region.len())
    }

    /// What its words hold.
    pub(super) fn content(&self) -> Content {
        self.content
    }
}
