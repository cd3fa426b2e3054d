//! `pageferry move`: memory of running programs, moved to other nodes.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use clap::{ArgGroup, Args};
use indicatif::ProgressBar;
use pageferry::control::{Request, VERSION};
use pageferry::process::{
    DEFAULT_CALL_LATENCY, Destination, Filter, Kind, Priority, ProcessError, ProcessMove, Reserve,
    Target, TargetError,
};
use pageferry_topology::{Machine, NodeId, NodeList};

use super::args::{self, FilterArgs, GroupArgs};
use super::report::Moved;
use super::{ask, bar, estimate, report_text, trouble};
use crate::bench::parse_size;
use crate::cancel;
use crate::cli::{JsonArg, exit_codes};
use crate::exit::Exit;
use crate::output::{Context, Problem};

/// What is asked of programs themselves, and when.
const AFTER_HELP: &str = "\
Nodes are written as in numactl: 0,2-3, all, !1 (all but 1), +0 (the first). Sizes take K, M, G and \
T, powers of 1024.

A program that uses the pageferry library and listens is asked to move its regions itself, with \
the library's own copies, if --to is one node and neither --dry-run, --file, --range, --rate nor \
--reserve is given; its other memory then goes the kernel's way, but for its anonymous memory, \
which is its own to place.

Where pages stayed that were to go, the exit code is 4, and the report says why.";

#[derive(Debug, Args)]
#[command(
    after_help = after_help(),
    group(ArgGroup::new("who").required(true).multiple(true).args(["pid", "cgroup"])),
    group(ArgGroup::new("spread").args(["weights", "fill", "interleave"])),
    group(ArgGroup::new("priority").args(["nice", "idle"]))
)]
pub(crate) struct MoveArgs {
    /// Processes, all their threads
    #[arg(long, value_name = "PID", value_delimiter = ',', num_args = 1..,
          value_parser = args::pid)]
    pid: Vec<u32>,

    #[command(flatten)]
    groups: GroupArgs,

    /// Take pages that are on these nodes [default: all others]
    #[arg(long, value_name = "NODES")]
    from: Option<String>,

    /// Move them to these nodes
    #[arg(long, value_name = "NODES")]
    to: String,

    /// Page by page to the nodes of --to in turn, so many turns each
    #[arg(long, value_name = "N", value_delimiter = ',', num_args = 1..)]
    weights: Vec<u32>,

    /// To the first node of --to that has room [the default]
    #[arg(long)]
    fill: bool,

    /// Page by page to the nodes of --to in turn
    #[arg(long)]
    interleave: bool,

    #[command(flatten)]
    filter: FilterArgs,

    /// Only pages at these addresses of the one process, as in /proc/PID/maps
    #[arg(long, value_name = "A-B", value_parser = args::addresses,
          conflicts_with_all = ["cgroup", "children"])]
    range: Option<std::ops::Range<usize>>,

    /// Have a program wait no longer than this for one call (100us to 10s) [default: 20ms]
    #[arg(long, value_name = "TIME", value_parser = args::latency)]
    latency: Option<Duration>,

    /// Move no more than this per second, such as 2G
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    rate: Option<u64>,

    /// Use up to so many threads, as long as each helps [default: the CPUs, at most 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,

    /// Give way to other programs by this nice value
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = clap::value_parser!(i8).range(-20..=19))]
    nice: Option<i8>,

    /// Use only CPU time that nobody else wants
    #[arg(long)]
    idle: bool,

    /// Keep this much free on each destination [default: where the kernel begins to reclaim]
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    reserve: Option<u64>,

    /// Say what would move and what it would cost; move nothing
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    json: JsonArg,
}

fn after_help() -> String {
    format!("{AFTER_HELP}\n\n{}", exit_codes())
}

pub(crate) fn run(args: &MoveArgs, context: &Context) -> anyhow::Result<Exit> {
    let plan = Plan::new(args)?;
    plan.check()?;
    let bar = bar::new(context)?;
    let moved = plan.go(&bar);
    bar.finish_and_clear();
    let moved = moved?;
    if moved.is_nobody() {
        return Err(trouble::nobody(&moved.notes).into());
    }
    match args.json.json {
        true => context.print_json(&moved.document())?,
        false => context.print(report_text::text(&moved))?,
    }
    Ok(if moved.cancelled {
        Exit::Cancelled
    } else if moved.dry_run || moved.is_complete() {
        Exit::Ok
    } else {
        Exit::Partial
    })
}

/// The options, understood.
#[derive(Debug)]
struct Plan<'a> {
    args: &'a MoveArgs,
    machine: Machine,
    targets: Vec<Target>,
    from: Option<NodeList>,
    nodes: Vec<NodeId>,
}

impl<'a> Plan<'a> {
    fn new(args: &'a MoveArgs) -> Result<Self, Problem> {
        let machine = args::machine()?;
        let from = args.from.as_deref().map(|text| args::from(text, &machine)).transpose()?;
        let nodes = args::to(&args.to, &machine)?;
        if !args.weights.is_empty() && args.weights.len() != nodes.len() {
            return Err(Problem::bad_input(
                format!("--weights for {} nodes", args.weights.len()),
                format!("--to {} names {}", args.to, nodes.len()),
                "give one weight for each node, in the same order",
            ));
        }
        if args.range.is_some() && args.pid.len() != 1 {
            return Err(Problem::bad_input(
                "--range with several processes",
                "addresses are those of one process",
                "name one process with --pid",
            ));
        }
        let targets = args::targets(&args.pid, &args.groups);
        Ok(Self { args, machine, targets, from, nodes })
    }

    fn destination(&self) -> Destination {
        let nodes = self.nodes.iter().copied();
        if !self.args.weights.is_empty() {
            Destination::weighted(nodes.zip(self.args.weights.iter().copied()))
        } else if self.args.interleave {
            Destination::interleave(nodes)
        } else {
            Destination::fill(nodes)
        }
    }

    fn filter(&self) -> Filter {
        let filter = self.args.filter.filter();
        match &self.args.range {
            Some(range) => filter.range(range.clone()),
            None => filter,
        }
    }

    fn request(&self, targets: impl IntoIterator<Item = Target>) -> ProcessMove {
        let args = self.args;
        let mut request = ProcessMove::new(self.destination())
            .filter(self.filter())
            .call_latency(args.latency.unwrap_or(DEFAULT_CALL_LATENCY))
            .dry_run(args.dry_run)
            .cancelled_by(cancel::requested_flag().clone());
        if let Some(from) = &self.from {
            request = request.from(from.clone());
        }
        if let Some(rate) = args.rate {
            request = request.rate(rate);
        }
        if let Some(threads) = args.threads {
            request = request.workers(threads.into());
        }
        if let Some(reserve) = args.reserve {
            request = request.reserve(Reserve::Bytes(reserve));
        }
        request = request.priority(match args.nice {
            _ if args.idle => Priority::Idle,
            Some(nice) => Priority::Nice(nice),
            None => Priority::Normal,
        });
        targets.into_iter().fold(request, ProcessMove::target)
    }

    /// Finds what is wrong before anybody is asked: a move that ends before its first page.
    fn check(&self) -> Result<(), Problem> {
        let ended = Arc::new(AtomicBool::new(true));
        let request = self.request(self.targets.clone()).children(self.args.groups.children);
        let checked = request.dry_run(true).cancelled_by(ended).run();
        checked.map(drop).map_err(|error| trouble::of_move(&error))
    }

    /// What can be asked of a program itself.
    fn wish(&self) -> Option<Request> {
        let args = self.args;
        let [to] = self.nodes[..] else { return None };
        let bounded = args.rate.is_some() || args.reserve.is_some() || args.dry_run;
        let chosen = args.range.is_some() || args.filter.file.is_some();
        let only = &args.filter.only;
        if bounded || chosen || !(only.is_empty() || only.contains(&Kind::Anonymous)) {
            return None;
        }
        let from = self.from.iter().flat_map(NodeList::iter).map(NodeId::get).collect();
        let budget = args.latency.and_then(|latency| u64::try_from(latency.as_micros()).ok());
        Some(Request { version: VERSION, from, to: to.get(), stall_budget_us: budget })
    }

    fn go(&self, bar: &ProgressBar) -> Result<Moved, Problem> {
        let began = Instant::now();
        let mut moved = Moved::new(self.args.dry_run, self.nodes.iter().copied().collect());
        let children = self.args.groups.children;
        let answers = match self.wish() {
            Some(wish) => ask::all(&self.targets, children, &wish, bar),
            None => ask::Answers::default(),
        };
        moved.remarks.extend(answers.remarks);
        if answers.asked.is_empty() {
            let request = self.request(self.targets.clone()).children(children);
            moved.add(watched(request, bar).run().map_err(|e| trouble::of_move(&e))?);
        } else {
            // By number from here on, so that those that were asked can be told from the others.
            self.outside(answers.others, None, bar, &mut moved)?;
            let listeners = answers.asked.iter().map(|asked| asked.pid).collect();
            let only = &self.args.filter.only;
            let rest = Kind::ALL.into_iter().filter(|kind| *kind != Kind::Anonymous);
            let rest = rest.filter(|kind| only.is_empty() || only.contains(kind)).collect();
            self.outside(listeners, Some(rest), bar, &mut moved)?;
            moved.asked = answers.asked;
        }
        moved.cancelled |= cancel::requested();
        moved.elapsed = began.elapsed();
        if self.args.dry_run {
            let (first, rate) = (self.nodes.first().copied(), self.args.rate);
            let latency = self.args.latency.unwrap_or(DEFAULT_CALL_LATENCY);
            let estimate = estimate::estimate(&moved.lines, first, &self.machine, latency, rate);
            moved.estimate = Some(estimate);
        }
        Ok(moved)
    }

    /// Moves these processes' memory, of these kinds, the kernel's way. They were found, not
    /// named: who has ended meanwhile is left out.
    fn outside(
        &self,
        mut pids: Vec<u32>,
        kinds: Option<Vec<Kind>>,
        bar: &ProgressBar,
        moved: &mut Moved,
    ) -> Result<(), Problem> {
        if kinds.as_ref().is_some_and(Vec::is_empty) {
            return Ok(());
        }
        while !pids.is_empty() {
            let mut request = self.request(pids.iter().map(|pid| Target::Pid(*pid)));
            if let Some(kinds) = &kinds {
                request = request.filter(Filter::new().kinds(kinds.iter().copied()));
            }
            match watched(request, bar).run() {
                Ok(report) => {
                    moved.add(report);
                    break;
                }
                Err(error) => match about(&error) {
                    Some(pid) if pids.contains(&pid) => {
                        pids.retain(|other| *other != pid);
                        moved.remarks.push(error.to_string());
                    }
                    _ => return Err(trouble::of_move(&error)),
                },
            }
        }
        Ok(())
    }
}

fn watched(request: ProcessMove, bar: &ProgressBar) -> ProcessMove {
    let bar = bar.clone();
    request.on_progress(bar::EVERY, move |progress| bar::show(&bar, progress))
}

/// The process that an error is about.
fn about(error: &ProcessError) -> Option<u32> {
    match error {
        ProcessError::Forbidden { pid, .. } => Some(*pid),
        ProcessError::Target(
            TargetError::NoProcess(pid)
            | TargetError::Zombie(pid)
            | TargetError::KernelThread(pid)
            | TargetError::Denied { pid, .. }
            | TargetError::Open { pid, .. },
        ) => Some(*pid),
        _ => None,
    }
}
