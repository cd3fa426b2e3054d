//! `pageferry migratepages`: in the place of migratepages(8) of numactl.
//!
//! What always holds: as the original, it says nothing where it succeeds, succeeds where pages
//! stayed behind, and ends with 1 where anything at all is wrong. Where it differs: pages that
//! are busy are tried again, a destination that fills up is left alone at the kernel's watermark,
//! and what is wrong is said in this command's form, on stderr.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;
use pageferry::process::{Destination, ProcessMove, Selection, TargetError};
use pageferry::{Busy, Outcome};
use pageferry_sys::Errno;
use pageferry_sys::procfs::ProcDir;
use pageferry_topology::{Machine, NodeList};

use super::{args, trouble};
use crate::cancel;
use crate::exit::Exit;
use crate::output::Problem;

#[derive(Debug, Args)]
#[command(
    after_help = "Nodes are written as numbers, as in numactl; its forms for the nodes of devices \
                        (netdev:, file:, ip:, pci:, block:) are not taken. Where FROM is !N and \
                        there is no other node, there is nothing to do.\n\n\
                        Says nothing and ends with 0 also where pages stayed behind, with 1 where \
                        anything is wrong, as migratepages(8) does. `pageferry move` reports.\n\n\
                        FROM and TO are sets, whose order as written is not kept: the lowest node \
                        of FROM goes to the lowest of TO. `0,1 1,0` therefore takes 0 to 0 and 1 \
                        to 1, and moves nothing. Where TO has fewer nodes, they are taken in turn, \
                        and where their numbers differ, pages that are on a node of TO stay."
)]
pub(crate) struct MigratepagesArgs {
    /// The process
    #[arg(value_name = "PID")]
    pid: String,

    /// Nodes that pages are taken from: 0,2-3, all, !1 (all but 1), +0 (the first allowed)
    #[arg(value_name = "FROM")]
    from: String,

    /// Nodes that they go to: the lowest of FROM goes to the lowest of TO, and so on upwards
    #[arg(value_name = "TO")]
    to: String,
}

pub(crate) fn run(args: &MigratepagesArgs) -> anyhow::Result<Exit> {
    migrate(args).map_err(|problem| Problem { exit: Exit::Failed, ..problem })?;
    Ok(if cancel::requested() { Exit::Cancelled } else { Exit::Ok })
}

fn migrate(args: &MigratepagesArgs) -> Result<(), Problem> {
    let pid = pid(&args.pid).map_err(|because| {
        Problem::bad_input(
            format!("PID {}", args.pid),
            because,
            "name a running process; `ps -e` lists them",
        )
    })?;
    let machine = args::machine()?;
    let with_memory: NodeList = machine.memory_nodes().map(|node| node.id).collect();
    // numa_parse_nodestring(3): the nodes of the caller's cpuset.
    let own = ProcDir::open(std::process::id()).and_then(|own| own.status());
    let own: Option<NodeList> = own.ok().and_then(|own| own.nodes_allowed.parse().ok());
    let own = own.filter(|nodes| !nodes.is_empty());
    let allowed = own.map_or_else(|| with_memory.clone(), |own| with_memory.intersection(&own));
    let from = from(&args.from, &machine, &allowed)?;
    let to = args::with_memory_only("TO", &args.to, &machine, &allowed)?;
    // With nothing to take pages from only the process is checked, as the original does.
    let stop = match from.is_empty() {
        true => Arc::new(AtomicBool::new(true)),
        false => cancel::requested_flag().clone(),
    };
    let report = ProcessMove::new(Selection::new().pid(pid), Destination::paired(&from, &to))
        .cancelled_by(stop)
        .run()
        .map_err(|error| trouble::of_move(&error))?;
    let errnos = report.lines.iter().filter_map(|line| match line.outcome {
        Outcome::Busy(Busy::Other(errno)) => Some(Errno(errno)),
        _ => None,
    });
    let refused = errnos.into_iter().find(|errno| matches!(errno.name(), "EPERM" | "ENOSYS"));
    // The original's one call would have ended with it.
    match refused {
        Some(errno) => Err(trouble::of_target(&TargetError::Refused(errno))),
        None => Ok(()),
    }
}

/// The nodes that pages are taken from; none, where all but some are named and there are no others:
/// scripts say `!N N`, on any machine.
fn from(text: &str, machine: &Machine, allowed: &NodeList) -> Result<NodeList, Problem> {
    let named = text.trim().strip_prefix('!').map(|rest| NodeList::parse(rest, allowed));
    if named.is_some_and(|named| named.is_ok_and(|named| allowed.difference(&named).is_empty())) {
        return Ok(NodeList::new());
    }
    args::with_memory_only("FROM", text, machine, allowed)
}

/// A number as `strtoul(3)` reads it with base 0: decimal, 0x hexadecimal, 0 octal.
fn pid(text: &str) -> Result<u32, String> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text, 10),
    };
    match u32::from_str_radix(digits, radix) {
        Ok(0) => Err("0 stands for this command itself, whose memory ends with it".into()),
        Ok(pid) if !digits.starts_with('+') => Ok(pid),
        _ => Err("it is not the number of a process".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_is_read_as_the_original_reads_it() {
        assert_eq!(pid("4711"), Ok(4711));
        assert_eq!(pid("0x10"), Ok(16));
        assert_eq!(pid("010"), Ok(8));
        for bad in ["0", "", "x", "-1", "+1", "0x", "08", "1.5", "99999999999"] {
            assert!(pid(bad).is_err(), "{bad}");
        }
    }
}
