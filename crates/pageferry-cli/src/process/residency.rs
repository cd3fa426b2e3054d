//! `pageferry where`: what memory programs have, and on which nodes.

use std::io::IsTerminal as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::{ArgGroup, Args};
use pageferry::process::{
    BigMapping, Holding, Kind, Note, Notes, ProcessResidency, Target, TargetError, Where,
};
use pageferry_topology::{Machine, NodeId};
use serde::Serialize;

use super::args::{self, FilterArgs, GroupArgs};
use super::{residency_text, trouble};
use crate::cancel;
use crate::cli::JsonArg;
use crate::exit::Exit;
use crate::output::{self, Context};

/// Ends a wait early enough for a signal to seem answered at once.
const NAP: Duration = Duration::from_millis(50);
/// Clears a terminal and goes to its first line (ECMA-48, ED and CUP).
const CLEAR: &str = "\x1b[2J\x1b[H";

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("who").required(true).multiple(true).args(["pid", "cgroup"])))]
pub(crate) struct WhereArgs {
    /// Processes, all their threads
    #[arg(value_name = "PID", value_parser = args::pid)]
    pid: Vec<u32>,

    #[command(flatten)]
    groups: GroupArgs,

    #[command(flatten)]
    filter: FilterArgs,

    /// Show so many of the largest mappings
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = clap::value_parser!(u16).range(0..=10_000))]
    top: u16,

    /// Look again every so many seconds, until it is ended, nobody reads, or they have ended; a cgroup
    /// that is empty from the start is waited for
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true,
          default_missing_value = "2", value_parser = seconds)]
    watch: Option<Duration>,

    #[command(flatten)]
    json: JsonArg,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| "expected seconds, such as 2 or 0.5".to_owned())?;
    if (0.1..=86_400.0).contains(&number) {
        Ok(Duration::from_secs_f64(number))
    } else {
        Err("0.1 to 86400 seconds".to_owned())
    }
}

pub(crate) fn run(args: &WhereArgs, context: &Context) -> anyhow::Result<Exit> {
    let targets = args::targets(&args.pid, &args.groups)?;
    let Some(every) = args.watch else {
        let found = look(args, &targets).map_err(|error| trouble::of_target(&error))?;
        show(args, context, &found, "")?;
        // Of nothing the node could be told: the notes say why.
        let in_vain = found.unknown > 0 && found.holdings.is_empty();
        return Ok(match cancel::requested() {
            true => Exit::Cancelled,
            false if in_vain => Exit::Failed,
            false => Exit::Ok,
        });
    };
    let clear = if std::io::stdout().is_terminal() { CLEAR } else { "" };
    let (mut looked, mut had_some) = (false, false);
    while !cancel::requested() {
        let began = Instant::now();
        match look(args, &targets) {
            // Nobody is left of what was not named by number.
            Ok(found) if had_some && found.processes == 0 && !cancel::requested() => {
                context.note("no process is left");
                return Ok(Exit::Ok);
            }
            Ok(found) => {
                had_some |= found.processes > 0;
                show(args, context, &found, clear)?;
                if output::is_reader_gone() {
                    return Ok(Exit::Ok);
                }
            }
            Err(TargetError::NoProcess(pid) | TargetError::Zombie(pid)) if looked => {
                context.note(format_args!("process {pid} has ended"));
                return Ok(Exit::Ok);
            }
            Err(TargetError::NoGroup(path)) if looked => {
                context.note(format_args!("cgroup {} was removed", path.display()));
                return Ok(Exit::Ok);
            }
            Err(error) => return Err(trouble::of_target(&error).into()),
        }
        looked = true;
        while began.elapsed() < every && !cancel::requested() {
            sleep(NAP.min(every.saturating_sub(began.elapsed())));
        }
    }
    Ok(Exit::Cancelled)
}

fn look(args: &WhereArgs, targets: &[Target]) -> Result<ProcessResidency, TargetError> {
    let selection = args::selection(targets.iter().cloned())
        .children(args.groups.children)
        .filter(args.filter.filter());
    Where::new(selection).top(args.top.into()).cancelled_by(cancel::requested_flag().clone()).look()
}

fn show(
    args: &WhereArgs,
    context: &Context,
    found: &ProcessResidency,
    clear: &str,
) -> anyhow::Result<()> {
    if found.processes == 0 && args.watch.is_none() && !cancel::requested() {
        return Err(trouble::nobody(&found.notes).into());
    }
    if args.json.json {
        let document = Document::new(found);
        return match args.watch {
            // A line each, so that a program can read them one after the other.
            Some(_) => context.print(serde_json::to_string(&document)? + "\n"),
            None => context.print_json(&document),
        };
    }
    // Nodes without any of it are worth a line too; which there are is no secret of this command.
    let nodes = Machine::read().map(|m| m.memory_nodes().map(|n| n.id).collect());
    context.print(clear.to_owned() + &residency_text::text(found, nodes.unwrap_or_default()))
}

/// The JSON form; the number changes when a field changes its meaning or goes.
#[derive(Serialize)]
struct Document<'a> {
    schema_version: u32,
    elapsed_s: f64,
    processes: u64,
    mappings: u64,
    present_bytes: u64,
    /// Of these, anonymous memory that other processes map too; notes say how it was counted.
    shared_anonymous_bytes: u64,
    /// Present, but on a node that could not be told.
    unknown_bytes: u64,
    /// Present at first, and given back before their node was asked for.
    gone_bytes: u64,
    nodes: Vec<NodeBytes>,
    holdings: &'a [Holding],
    swapped: Vec<KindBytes>,
    /// Neither present nor swapped out: markers, and pages that somebody is migrating.
    marker_bytes: u64,
    top: Vec<Mapping<'a>>,
    notes: Vec<Told<'a>>,
    notes_left_out: u64,
}

#[derive(Serialize)]
struct NodeBytes {
    node: NodeId,
    bytes: u64,
}

#[derive(Serialize)]
struct KindBytes {
    kind: Kind,
    bytes: u64,
}

#[derive(Serialize)]
struct Mapping<'a> {
    pid: u32,
    start: usize,
    end: usize,
    kind: Kind,
    name: &'a str,
    bytes: u64,
    nodes: Vec<NodeBytes>,
}

impl<'a> From<&'a BigMapping> for Mapping<'a> {
    fn from(mapping: &'a BigMapping) -> Self {
        let nodes = mapping.nodes.iter().map(|&(node, bytes)| NodeBytes { node, bytes });
        Self {
            pid: mapping.pid,
            start: mapping.range.start,
            end: mapping.range.end,
            kind: mapping.kind,
            name: &mapping.name,
            bytes: mapping.bytes,
            nodes: nodes.collect(),
        }
    }
}

/// A note for programs, and in words.
#[derive(Serialize)]
pub(super) struct Told<'a> {
    #[serde(flatten)]
    note: &'a Note,
    text: String,
}

pub(super) fn told(notes: &Notes) -> Vec<Told<'_>> {
    notes.list.iter().map(|note| Told { note, text: note.to_string() }).collect()
}

impl<'a> Document<'a> {
    fn new(found: &'a ProcessResidency) -> Self {
        let nodes = found.by_node().into_iter();
        let swapped = found.swapped.iter().map(|&(kind, bytes)| KindBytes { kind, bytes });
        Self {
            schema_version: 1,
            elapsed_s: found.elapsed.as_secs_f64(),
            processes: found.processes,
            mappings: found.mappings,
            present_bytes: found.bytes(),
            shared_anonymous_bytes: found.shared_anonymous,
            unknown_bytes: found.unknown,
            gone_bytes: found.gone,
            nodes: nodes.map(|(node, bytes)| NodeBytes { node, bytes }).collect(),
            holdings: &found.holdings,
            swapped: swapped.collect(),
            marker_bytes: found.markers,
            top: found.top.iter().map(Mapping::from).collect(),
            notes: told(&found.notes),
            notes_left_out: found.notes.left_out,
        }
    }
}
