//! `pageferry bench --kernel-matrix`: the kernel's own migration between two nodes, by folio size
//! and by who copies.
//!
//! # What must always hold
//! - Every cell of a row is measured in the same rounds, in turn, and every word is read back after
//!   each move. A wrong word ends the run as a failure.
//! - Where the machine is emulated, no rate is given: what is shown is that all moved and was right.
//! - The machine's settings that are changed are put back, also when the run is cancelled or fails;
//!   only SIGKILL leaves them.
//!
//! # What can go wrong
//! A module that is not loaded, a folio size that the kernel does not have, more threads than CPUs:
//! those cells are left out, and why is said.

mod folios;
mod settings;
mod table;

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, bail};
use pageferry_sys::page_size;
use pageferry_topology::{Machine, NodeId};

use self::folios::Folios;
use self::settings::{Copier, Settings, is_loaded};
use self::table::{Cell, Matrix, Row};
use super::plan::BenchArgs;
use super::stats::{gb_per_s, spread};
use crate::cancel;
use crate::copiers::{Channel, MT, Migrator, Module, OURS};
use crate::exit::Exit;
use crate::host::Host;
use crate::output::{Context, Problem};
use crate::size::size;
use crate::topology::unreadable;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// What the field's tables have.
const FOLIOS: [usize; 6] = [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 2 * MIB];
const BYTES: u64 = 1 << 30;
const ROUNDS: u32 = 3;
/// Each node must have this much more than what is moved.
const SPARE: u64 = 64 << 20;

/// What is to be done, checked against the machine.
#[derive(Debug)]
struct Plan {
    bytes: usize,
    rounds: u32,
    from: u32,
    to: u32,
    /// CPUs of the node that has more.
    cpus: usize,
    /// Channels that somebody has; with the module loaded, those that it has are among them.
    channels: usize,
    emulated: Option<String>,
    cpu_model: String,
}

impl Plan {
    fn new(args: &BenchArgs) -> Result<Self, Problem> {
        let bytes = args.size.unwrap_or(BYTES);
        if bytes == 0 || !bytes.is_multiple_of(FOLIOS[5] as u64) {
            return Err(Problem::bad_input(
                format!("--size {bytes} cannot be used"),
                "the largest folios are of 2 MiB, and all of them are moved",
                "give a multiple of 2 MiB, such as 1G",
            ));
        }
        let machine = Machine::read().map_err(|error| unreadable(&error))?;
        let (from, to) = nodes(&machine, args)?;
        for id in [from, to] {
            let node = machine.memory_node(NodeId::new(id)).map_err(|error| {
                let remedy = "name nodes that `pageferry topology` shows with memory";
                Problem::bad_input(format!("node {id} cannot be used"), error.to_string(), remedy)
            })?;
            let needed = bytes + SPARE;
            if node.free_bytes < needed {
                return Err(Problem::bad_input(
                    format!("{} do not fit node {id}", size(bytes)),
                    format!(
                        "{} are free there, {} are needed",
                        size(node.free_bytes),
                        size(needed)
                    ),
                    "give a smaller --size, or free memory of that node",
                ));
            }
        }
        match Migrator::of(&Host::new("/".as_ref())) {
            Migrator::Module { name, .. } if !OURS.iter().any(|ours| ours.name == name) => {
                return Err(Problem::bad_input(
                    format!("{name} copies the kernel's batches"),
                    "the kernel as it is cannot be measured beside it",
                    format!("unload it: rmmod {name}"),
                ));
            }
            _ => {}
        }
        let too_large = || {
            Problem::bad_input(
                format!("--size {bytes} cannot be used"),
                "it is larger than an address space",
                "give less",
            )
        };
        Ok(Self {
            bytes: usize::try_from(bytes).map_err(|_| too_large())?,
            rounds: args.rounds.unwrap_or(ROUNDS),
            from,
            to,
            cpus: [from, to]
                .map(|id| machine.node(NodeId::new(id)).map_or(0, |node| node.cpus.len()))
                .into_iter()
                .max()
                .unwrap_or(0),
            channels: Channel::all(&Host::new("/".as_ref()))
                .iter()
                .filter(|channel| channel.in_use)
                .count(),
            emulated: emulated(),
            cpu_model: machine.cpu_model().unwrap_or("unknown").to_owned(),
        })
    }
}

/// The nodes to move between: those asked for, else the first two with memory.
fn nodes(machine: &Machine, args: &BenchArgs) -> Result<(u32, u32), Problem> {
    let all: Vec<u32> = machine.memory_nodes().map(|node| node.id.get()).collect();
    let other = |than: Option<u32>| all.iter().copied().find(|node| Some(*node) != than);
    let from = args.from.or_else(|| other(args.to));
    let to = args.to.or_else(|| other(from));
    match (from, to) {
        (Some(from), Some(to)) if from == to => Err(Problem::bad_input(
            format!("--from {from} and --to {to} are one node"),
            "memory is moved from one node to another",
            "name two nodes",
        )),
        (Some(from), Some(to)) => Ok((from, to)),
        _ => Err(Problem::bad_input(
            "the kernel's migration cannot be measured here",
            "this machine has one node with memory",
            "run it on a machine with two; what the library does on one: pageferry bench",
        )),
    }
}

/// Why rates would mean nothing here; `None` on a machine that is not emulated, as far as it says.
fn emulated() -> Option<String> {
    // Set in this project's own guests, also of architectures whose CPUs do not tell.
    if std::env::var_os("PAGEFERRY_GUEST").is_some() {
        return Some("a guest of `cargo xtask`".into());
    }
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    cpus.contains("QEMU TCG").then(|| "QEMU's emulated CPU".into())
}

pub(super) fn run(args: &BenchArgs, context: &Context) -> anyhow::Result<Exit> {
    let plan = Plan::new(args)?;
    if let Some(file) = &args.json {
        super::plan::check_writable(file)?;
    }
    context.print("")?;
    let mut settings = Settings::new(context);
    let mut matrix = Matrix::new(&plan);
    settings.still()?;
    for folio in FOLIOS {
        if cancel::requested() {
            matrix.complete = false;
            break;
        }
        context.note(format!("folios of {}", size(folio as u64)));
        let row = measure(&plan, &mut settings, folio)?;
        matrix.complete &= row.complete;
        matrix.rows.push(row);
    }
    drop(settings);
    match &args.json {
        Some(file) if file.as_os_str() == "-" => context.print_json(&matrix)?,
        Some(file) => {
            super::write(file, &(serde_json::to_string_pretty(&matrix)? + "\n"))?;
            context.print(table::text(&matrix))?;
        }
        None => context.print(table::text(&matrix))?,
    }
    Ok(if matrix.complete { Exit::Ok } else { Exit::Cancelled })
}

/// Why a cell cannot be measured.
fn left_out(plan: &Plan, copier: Copier) -> Option<String> {
    let module = copier.module()?;
    if !is_loaded(module) {
        return Some(format!("{} is not loaded", module.name));
    }
    match copier {
        // Helpers are of one node, which the module chooses.
        Copier::Threads(n) if n as usize > plan.cpus => {
            Some(format!("neither node has more than {} CPUs", plan.cpus))
        }
        Copier::Channels(n) if n as usize > plan.channels => {
            Some(format!("of DMA engines {} channels are in use", plan.channels))
        }
        _ => None,
    }
}

/// All cells of a row.
fn measure(plan: &Plan, settings: &mut Settings, folio: usize) -> anyhow::Result<Row> {
    settings.copier(Copier::Kernel)?;
    let skipped = |why: String| Row {
        folio_bytes: folio,
        cells: Vec::new(),
        skipped: Some(why),
        complete: true,
    };
    if folio > page_size() && !settings.folios_of(folio)? {
        return Ok(skipped(format!("this kernel has no folios of {}", size(folio as u64))));
    }
    if let Err(error) = Folios::new(plan.bytes, folio, plan.from) {
        return Ok(skipped(format!("{error:#}")));
    }
    let mut cells: Vec<Cell> =
        Copier::all().into_iter().map(|copier| Cell::new(copier, left_out(plan, copier))).collect();
    let mut rates = vec![Vec::new(); cells.len()];
    let mut complete = true;
    // The first round is to warm up.
    'rounds: for round in 0..=plan.rounds {
        for (cell, rates) in cells.iter_mut().zip(&mut rates) {
            if cell.skipped.is_some() {
                continue;
            }
            if cancel::requested() {
                complete = false;
                break 'rounds;
            }
            settings.copier(cell.copier)?;
            let (wall, seen) = once(plan, folio, cell.copier)
                .with_context(|| format!("{} by {}", size(folio as u64), cell.copier))?;
            if round > 0 {
                rates.push(gb_per_s(seen.moved_bytes, wall));
                cell.count(&seen);
            }
        }
    }
    for (cell, rates) in cells.iter_mut().zip(&rates) {
        cell.gb_per_s = if plan.emulated.is_some() { None } else { spread(rates) };
    }
    Ok(Row { folio_bytes: folio, cells, skipped: None, complete })
}

/// What happened in a move.
#[derive(Debug)]
struct Seen {
    moved_bytes: u64,
    stayed_bytes: u64,
    /// Copied by the module.
    offloaded_bytes: u64,
    /// By its helpers.
    helped_bytes: u64,
}

/// One move. Of new folios: Linux 6.12 takes those that it has moved once, and that it unmapped page
/// by page, for partially mapped ones, and splits them when they are moved again.
fn once(plan: &Plan, folio: usize, copier: Copier) -> anyhow::Result<(Duration, Seen)> {
    let memory = Folios::new(plan.bytes, folio, plan.from)?;
    let pages = plan.bytes / page_size();
    if memory.pages_on(plan.from)? < pages {
        bail!("node {} has not enough free memory any more", plan.from);
    }
    let (before, helped_before) = (offloaded(), helped());
    let moved = memory.move_to(plan.to)?;
    let (offloaded, helped) = (offloaded() - before, helped() - helped_before);
    memory.check()?;
    let moved_bytes = (moved.folios * folio) as u64;
    // A folio that was split on the way counts as moved by its first page.
    let there = (memory.pages_on(plan.to)? * page_size()) as u64;
    if there < moved_bytes {
        bail!("folios were split on the way: {there} of {moved_bytes} bytes moved");
    }
    if copier == Copier::Kernel && offloaded > 0 {
        bail!("somebody registered a module meanwhile");
    }
    let seen = Seen {
        moved_bytes,
        stayed_bytes: plan.bytes as u64 - moved_bytes,
        offloaded_bytes: offloaded * page_size() as u64,
        helped_bytes: if copier.module() == Some(MT) { helped } else { 0 },
    };
    Ok((moved.wall, seen))
}

/// Base pages that a module has copied since boot.
fn offloaded() -> u64 {
    let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("pgmigrate_offload_success "));
    line.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Bytes that helpers have copied since their module was loaded.
fn helped() -> u64 {
    let modules = Module::loaded(&Host::new("/".as_ref()));
    modules.iter().find(|module| module.name == MT.name).map_or(0, |mt| mt.sum("helped_bytes"))
}
