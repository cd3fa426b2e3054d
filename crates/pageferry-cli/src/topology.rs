//! `pageferry topology`: the machine as a tree, or as JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use pageferry_topology::{Cache, CpuList, Machine, Node, NodeList, ReadError, TierSource};
use serde::Serialize;

use crate::cli::JsonArg;
use crate::exit::Exit;
use crate::output::{BOLD, Context, DIM, Problem};
use crate::size::size;

#[derive(Debug, Args)]
pub(crate) struct TopologyArgs {
    #[command(flatten)]
    json: JsonArg,

    /// Read sys/ and proc/ below this directory
    #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
    root: PathBuf,
}

/// The JSON form; the number changes when a field changes its meaning or goes.
#[derive(Serialize)]
struct Document<'a> {
    schema_version: u32,
    machine: &'a Machine,
}

pub(crate) fn run(args: &TopologyArgs, context: &Context) -> anyhow::Result<Exit> {
    if !args.root.is_dir() {
        return Err(Problem::bad_input(
            format!("--root {}", args.root.display()),
            "it is not a directory",
            "name a directory that holds sys/ and proc/",
        )
        .into());
    }
    let machine = Machine::read_from(&args.root).map_err(|error| unreadable(&error))?;
    if args.json.json {
        context.print_json(&Document { schema_version: 1, machine: &machine })?;
    } else {
        context.print(text(&machine))?;
    }
    Ok(Exit::Ok)
}

/// A machine that cannot be read.
pub(crate) fn unreadable(error: &ReadError) -> Problem {
    let (what, because) = match error {
        ReadError::Io { path, source } => {
            (format!("cannot read {}", path.display()), source.to_string())
        }
        other => (
            other.to_string(),
            "the kernel's description of the machine does not have the documented form".into(),
        ),
    };
    Problem { what, because, remedy: error.remedy().into(), exit: Exit::Failed }
}

fn text(machine: &Machine) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_text(machine, &mut out);
    out
}

fn write_text(machine: &Machine, out: &mut String) -> std::fmt::Result {
    let model = machine.cpu_model().unwrap_or("unknown CPU");
    writeln!(out, "{BOLD}{model}{BOLD:#}, {} CPUs", machine.cpus().len())?;
    let pages = machine.pages();
    write!(out, "pages of {}", size(pages.base_bytes))?;
    match pages.thp_bytes {
        Some(bytes) => writeln!(out, ", transparent huge pages of {}", size(bytes))?,
        None => writeln!(out, ", no transparent huge pages")?,
    }
    writeln!(out)?;
    write_packages(machine, out)?;
    writeln!(out)?;
    write_nodes(machine, out)?;
    write_tiers(machine, out)?;
    write_distances(machine, out)
}

/// Packages, within them the groups of CPUs that share a last-level cache.
fn write_packages(machine: &Machine, out: &mut String) -> std::fmt::Result {
    let mut packages: BTreeMap<Option<u32>, Vec<CpuList>> = BTreeMap::new();
    for group in machine.cache_groups() {
        let package = group.first().and_then(|cpu| machine.cpu(cpu)?.package);
        packages.entry(package).or_default().push(group);
    }
    for (package, groups) in packages {
        match package {
            Some(number) => writeln!(out, "{BOLD}package {number}{BOLD:#}")?,
            None => writeln!(out, "{BOLD}package unknown{BOLD:#}")?,
        }
        let last = groups.len().saturating_sub(1);
        for (index, group) in groups.iter().enumerate() {
            let branch = if index == last { "└─" } else { "├─" };
            let first = group.first().and_then(|cpu| machine.cpu(cpu));
            let cache = first.and_then(|cpu| cpu.last_level_cache());
            let label = cache.map_or_else(|| "no cache told".to_owned(), cache_label);
            let siblings = |cpu| machine.cpu(cpu).map(|known| &known.siblings);
            let cores: BTreeSet<&CpuList> = group.iter().filter_map(siblings).collect();
            // Emulated nodes share their CPUs.
            let own = machine.nodes().iter().filter(|n| !n.cpus.intersection(group).is_empty());
            let nodes: NodeList = own.map(|node| node.id).collect();
            writeln!(
                out,
                "{branch} {label:<14} {:>3} cores  CPUs {group}  {DIM}node {nodes}{DIM:#}",
                cores.len()
            )?;
        }
    }
    Ok(())
}

fn cache_label(cache: &Cache) -> String {
    let bytes = cache.size_bytes.map_or_else(|| "size unknown".to_owned(), size);
    format!("L{} {bytes}", cache.level)
}

fn write_nodes(machine: &Machine, out: &mut String) -> std::fmt::Result {
    for node in machine.nodes() {
        write!(out, "{BOLD}node {}{BOLD:#}  ", node.id)?;
        if node.has_memory() {
            write!(out, "{}, {} free", size(node.memory_bytes), size(node.free_bytes))?;
        } else {
            write!(out, "no memory")?;
        }
        if node.is_cpuless() {
            write!(out, "; no CPUs")?;
            if node.has_memory() {
                let nearest = machine.nearest_cpus(node.id).unwrap_or_default();
                write!(out, ", nearest {nearest}")?;
            }
        } else {
            write!(out, "; CPUs {}", node.cpus)?;
        }
        writeln!(out, "{}", access(node))?;
    }
    if !machine.offline_nodes().is_empty() {
        writeln!(out, "{DIM}possible, but offline: node {}{DIM:#}", machine.offline_nodes())?;
    }
    Ok(())
}

fn access(node: &Node) -> String {
    let Some(access) = &node.access else {
        return String::new();
    };
    // HMAT gives MiB/s; people compare GB/s.
    let gb = |mib: u64| format!("{:.1} GB/s", mib as f64 * 1_048_576.0 / 1e9);
    let bandwidth = access.read_mib_per_s.map(|mib| format!("reads {}", gb(mib)));
    let latency = access.read_latency_ns.map(|ns| format!("{ns} ns"));
    let told: Vec<String> = bandwidth.into_iter().chain(latency).collect();
    if told.is_empty() {
        return String::new();
    }
    format!("; {} by the firmware", told.join(" in "))
}

fn write_tiers(machine: &Machine, out: &mut String) -> std::fmt::Result {
    if machine.tiers().len() < 2 {
        return Ok(());
    }
    let source = match machine.tier_source() {
        TierSource::Kernel => "as the kernel ranks them",
        TierSource::Derived => "derived from distances: the kernel does not rank them",
    };
    writeln!(out, "\n{BOLD}tiers{BOLD:#}, fastest first, {source}")?;
    for tier in machine.tiers() {
        write!(out, "  {:>3}: node {}", tier.id, tier.nodes)?;
        let mut targets = Vec::new();
        for node in tier.nodes.iter() {
            match machine.demotion_targets(node) {
                Ok(to) if !to.is_empty() => targets.push(format!("{node} to {to}")),
                _ => {}
            }
        }
        if !targets.is_empty() {
            write!(out, "  {DIM}demotes {}{DIM:#}", targets.join(", "))?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn write_distances(machine: &Machine, out: &mut String) -> std::fmt::Result {
    if machine.nodes().len() < 2 {
        return Ok(());
    }
    writeln!(out, "\n{BOLD}distances{BOLD:#} (10 is local)")?;
    write!(out, "     ")?;
    for to in machine.nodes() {
        write!(out, "{:>5}", to.id.get())?;
    }
    writeln!(out)?;
    for from in machine.nodes() {
        write!(out, "{:>5}", from.id.get())?;
        for distance in from.distances.values() {
            write!(out, "{distance:>5}")?;
        }
        writeln!(out)?;
    }
    Ok(())
}
