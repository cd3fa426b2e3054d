//! Moves by folio size, order, division, frames, threads and batch, beside the sequential move,
//! exchanges, the roofline and, where there are two nodes, the kernel's own move_pages(2); and the
//! time to the first folio by batch size.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use pageferry::{Division, FolioSize, Frames, Order, References};
use pageferry_copy::{Kernel, KernelFamily};
use pageferry_sys::usage;

use super::config::{Config, Extent, MoveCase};
use super::copying::{self, Buffers};
use super::exchange::Pair;
use super::lab::{Case, Field, Lab, Trouble};
use super::plan::Scenario;
use super::probe::Buffer;
use super::schema::{Results, Run, Skipped};
use super::stats::{self, Counted, Reading};

const DIVISIONS: [Division; 2] = [Division::Conducted, Division::Shared];
/// What part of a region's size those have that promise nothing.
const UNPROMISED: usize = 2;
const ORDERS: [Order; 2] = [Order::Frozen, Order::Live];
/// Bytes of a move in which the first folio is timed: many small batches, a few large ones.
const FIRST_FOLIO_BYTES: usize = 8 << 20;

/// A region for each folio size that can be measured.
fn fields(lab: &Lab<'_>, results: &mut Results) -> anyhow::Result<Vec<Field>> {
    if let Some(because) = &lab.no_huge {
        let what = "moves of 2M folios".to_owned();
        results.skipped.push(Skipped { what, because: because.clone() });
    }
    let sizes = lab.folio_sizes().into_iter();
    sizes.map(|folio| Field::new(&lab.engine, folio, lab.plan.region, lab.content)).collect()
}

/// A smaller region for each folio size that promises nothing about references, as by default: its
/// old pages are freed.
fn unpromised(lab: &Lab<'_>) -> anyhow::Result<Vec<Field>> {
    let bytes = lab.plan.region / UNPROMISED;
    let field = |folio| {
        Field::with_references(&lab.engine, folio, bytes, lab.content, References::Possible)
    };
    lab.folio_sizes().into_iter().map(field).collect()
}

/// The scenario `moves`.
pub(super) fn run(lab: &Lab<'_>, results: &mut Results) -> anyhow::Result<bool> {
    let fields = fields(lab, results)?;
    let pairs: Vec<Pair> =
        fields.iter().map(|field| Pair::new(lab, field.folio)).collect::<Result<_, _>>()?;
    let unpromised = unpromised(lab)?;
    let buffers = Buffers::new(lab)?;
    let kernels = other_kernels(lab);
    let mut cases = copying::roofline(lab, &buffers)?;
    for field in &fields {
        cases.extend(recycled(lab, field, &kernels));
        cases.extend(fresh(field));
        if let Some(case) = kernel_moves(lab, field)? {
            cases.push(case);
        }
    }
    for field in &unpromised {
        cases.extend(boxed(vec![Config::new("move_unpromised")], field));
    }
    cases.extend(pairs.iter().flat_map(|pair| pair.cases(lab)));
    if !fields.first().is_some_and(Field::is_node_to_node) {
        let because = "one node: there is nowhere that the kernel could move a page to".to_owned();
        results.skipped.push(Skipped { what: "move_pages(2)".to_owned(), because });
    }
    let done = lab.interleave(Scenario::Moves, lab.plan.rounds, cases, results);
    for field in fields.iter().chain(&unpromised) {
        if let Err(Trouble::Fail(why) | Trouble::Skip(why)) = field.check_all() {
            results.failures.push(format!("after all moves: {why}"));
        }
    }
    Ok(done)
}

/// Copy kernels beside the default: libc memcpy always, all of them when there is time.
fn other_kernels(lab: &Lab<'_>) -> Vec<Kernel> {
    let chosen = lab.engine.cpu().kernel();
    let mut kernels = Kernel::available();
    if !lab.plan.is_full() {
        kernels.retain(|kernel| kernel.family() == KernelFamily::Memcpy && !kernel.prefetch());
    }
    kernels.retain(|&kernel| kernel != chosen);
    kernels
}

fn recycled<'a>(lab: &Lab<'_>, field: &'a Field, kernels: &[Kernel]) -> Vec<Box<dyn Case + 'a>> {
    let is_huge = field.folio == FolioSize::Huge;
    let batches = if is_huge { vec![FolioSize::Huge.bytes()] } else { lab.plan.batches.clone() };
    let largest = batches.last().copied();
    let mut configs = vec![Config::new("move_default")];
    for order in ORDERS {
        configs.push(Config::sequential("sequential", field.folio, order, Frames::Recycled));
        let base = Config { order: Some(order), ..Config::new("move") };
        for division in DIVISIONS {
            for &batch in &batches {
                let (division, batch) = (Some(division), Some(batch));
                configs.push(Config { division, batch, ..base.clone() });
            }
            for &kernel in kernels {
                let (division, kernel) = (Some(division), Some(kernel));
                configs.push(Config { division, batch: largest, kernel, ..base.clone() });
            }
        }
        for threads in fewer_threads(lab) {
            let division = Some(Division::Shared);
            configs.push(Config {
                division,
                batch: largest,
                threads: Some(threads),
                ..base.clone()
            });
        }
    }
    boxed(configs, field)
}

/// Numbers of threads below all, to see how a move scales.
fn fewer_threads(lab: &Lab<'_>) -> Vec<usize> {
    let all = lab.plan.cpus.len();
    let powers = (0..).map(|n| 1usize << n).take_while(|&n| n < all);
    if lab.plan.is_full() { powers.collect() } else { powers.take(1).collect() }
}

fn fresh(field: &Field) -> Vec<Box<dyn Case + '_>> {
    let folio = field.folio;
    let sequential =
        |frames| Config::sequential("one_way_sequential", folio, Order::Frozen, frames);
    let mut configs = vec![sequential(Frames::Fresh)];
    let mut kinds = vec![Frames::Fresh];
    if folio == FolioSize::Base {
        // The kernel's copy places small pages only.
        kinds.push(Frames::KernelCopy);
        configs.push(sequential(Frames::KernelCopy));
    }
    for frames in kinds {
        for division in DIVISIONS {
            let (order, division) = (Some(Order::Frozen), Some(division));
            configs.push(Config { order, division, frames, ..Config::new("one_way") });
        }
    }
    boxed(configs, field)
}

fn boxed(configs: Vec<Config>, field: &Field) -> Vec<Box<dyn Case + '_>> {
    configs.into_iter().map(|config| MoveCase::boxed(config, field, Extent::Timed)).collect()
}

/// The scenario `first-folio`.
pub(super) fn run_first_folio(lab: &Lab<'_>, results: &mut Results) -> anyhow::Result<bool> {
    let fields = fields(lab, results)?;
    let mut cases = Vec::new();
    for field in &fields {
        let times = lab.plan.singles.div_ceil(10);
        for &batch in &lab.plan.curve {
            if batch < field.folio.bytes() {
                continue;
            }
            for order in ORDERS {
                let (order, batch) = (Some(order), Some(batch));
                let config = Config { order, batch, ..Config::new("first_folio") };
                let extent = Extent::Repeat { bytes: FIRST_FOLIO_BYTES, times };
                cases.push(MoveCase::boxed(config, field, extent));
            }
        }
    }
    Ok(lab.interleave(Scenario::FirstFolio, lab.plan.rounds.min(5), cases, results))
}

/// The kernel's move_pages(2) on memory of the same kind, from node to node.
struct KernelMoves {
    folio: FolioSize,
    buffer: Buffer,
    nodes: Vec<i32>,
    to: usize,
    rates: Vec<f64>,
    bytes: u64,
    counted: Counted,
    note: Option<String>,
}

fn kernel_moves<'a>(lab: &Lab<'_>, field: &Field) -> anyhow::Result<Option<Box<dyn Case + 'a>>> {
    let machine = lab.engine.machine();
    let ids = machine.memory_nodes().map(|node| i32::try_from(node.id.get()));
    let nodes: Vec<i32> = ids.collect::<Result<_, _>>().context("node numbers")?;
    if nodes.len() < 2 {
        return Ok(None);
    }
    // A quarter: the kernel moves 4K pages several times slower.
    let buffer = Buffer::new(lab.plan.region / 4, field.folio == FolioSize::Huge)
        .context("cannot map memory for move_pages(2)")?;
    Ok(Some(Box::new(KernelMoves {
        folio: field.folio,
        buffer,
        nodes: nodes[..2].to_vec(),
        to: 1,
        rates: Vec::new(),
        bytes: 0,
        counted: Counted::default(),
        note: None,
    })))
}

impl Case for KernelMoves {
    fn name(&self) -> String {
        format!("move_pages(2) {}", super::config::folio_name(self.folio))
    }

    fn measure(&mut self, _: &Lab<'_>, warm_up: bool) -> Result<(), Trouble> {
        let (start, step) = (self.buffer.addr(), self.folio.bytes());
        let pages: Vec<usize> = (start..start + self.buffer.len()).step_by(step).collect();
        let nodes = vec![self.nodes[self.to]; pages.len()];
        let mut status = vec![0; pages.len()];
        let reading = Reading::now();
        let began = Instant::now();
        let left = usage::move_pages(&pages, &nodes, &mut status);
        let wall = began.elapsed();
        let counted = reading.elapsed();
        left.map_err(|errno| Trouble::Skip(errno.to_string()))?;
        let moved = status.iter().filter(|&&node| node == self.nodes[self.to]).count();
        if moved < pages.len() {
            self.note = Some(format!("{} of {} folios stayed", pages.len() - moved, pages.len()));
        }
        self.to = 1 - self.to;
        if !warm_up && moved > 0 && wall > Duration::ZERO {
            let bytes = (moved * step) as u64;
            self.rates.push(stats::gb_per_s(bytes, wall));
            self.bytes += bytes;
            self.counted.add(&counted);
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Option<Run> {
        let per_gib = self.counted.per_gib(self.bytes);
        Some(Run {
            folio_bytes: Some(self.folio.bytes() as u64),
            order: Some("frozen".to_owned()),
            frames: Some("fresh".to_owned()),
            engine: "move_pages(2)".to_owned(),
            threads: 1,
            gb_per_s: Some(stats::spread(&self.rates)?),
            cpu_s_per_gib: per_gib.map(|c| c.rusage_cpu_s),
            per_gib,
            rounds: self.rates.len(),
            note: self.note,
            ..Run::new("move_pages")
        })
    }
}
