//! `pageferry move`: memory of running programs, moved to other nodes.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use clap::{ArgGroup, Args};
use indicatif::ProgressBar;
use pageferry::control::{Request, VERSION};
use pageferry::process::{
    DEFAULT_CALL_LATENCY, Destination, Filter, Kind, Note, Priority, ProcessMove, Reserve,
    Selection, Target,
};
use pageferry_topology::{Machine, NodeId, NodeList};

use super::args::{self, FilterArgs, GroupArgs};
use super::ask::{self, Crowd};
use super::report::Moved;
use super::{bar, estimate, report_text, trouble};
use crate::cancel;
use crate::cli::{JsonArg, exit_codes};
use crate::exit::Exit;
use crate::output::{Context, Problem};
use crate::size::parse_size;

/// Looks for processes that have joined, where some are asked.
const ROUNDS: u32 = 256;
/// What is asked of programs themselves, and when.
const AFTER_HELP: &str = "\
Nodes are written as numbers, as in numactl: 0,2-3, all, !1 (all but 1), +0 (the first); not as \
those of devices (netdev:, pci: and the like). Sizes take K, M, G and \
T, powers of 1024.

A program that uses the pageferry library and listens is asked to move its regions itself, with \
the library's own copies, if --to is one node and neither --dry-run, --file, --min-age, --range, \
--rate nor --reserve is given; its other memory then goes the kernel's way, but for its anonymous memory, \
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

    /// Only pages that were not used for so long, such as 30s or 5m: waits for that long first;
    /// root only, and by the kernel also where a program listens
    #[arg(long, value_name = "TIME", value_parser = args::age)]
    min_age: Option<Duration>,

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

    /// Keep this much free on each destination [default: where the kernel begins to reclaim]; with
    /// less, such as 0, the kernel makes room there: it reclaims and swaps out pages of other
    /// programs, and those of the program itself
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
        if args.weights.contains(&0) {
            return Err(Problem::bad_input(
                "--weights with a 0",
                "a node without a turn gets no page",
                "give weights of 1 or more, and leave the node out of --to",
            ));
        }
        if args.range.is_some() && args.pid.len() != 1 {
            return Err(Problem::bad_input(
                "--range with several processes",
                "addresses are those of one process",
                "name one process with --pid",
            ));
        }
        let targets = args::targets(&args.pid, &args.groups)?;
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

    /// All that was asked for.
    fn selection(&self) -> Selection {
        args::selection(self.targets.clone())
            .children(self.args.groups.children)
            .filter(self.filter())
    }

    fn request(&self, selection: Selection) -> ProcessMove {
        let args = self.args;
        let mut request = ProcessMove::new(selection, self.destination())
            .call_latency(args.latency.unwrap_or(DEFAULT_CALL_LATENCY))
            .dry_run(args.dry_run)
            .cancelled_by(cancel::requested_flag().clone());
        if let Some(from) = &self.from {
            request = request.from(from.clone());
        }
        if let Some(age) = args.min_age {
            request = request.min_age(age);
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
        request.priority(match args.nice {
            _ if args.idle => Priority::Idle,
            Some(nice) => Priority::Nice(nice),
            None => Priority::Normal,
        })
    }

    /// Finds what is wrong before anybody is asked: a move that ends before its first page.
    fn check(&self) -> Result<(), Problem> {
        let ended = Arc::new(AtomicBool::new(true));
        let checked = self.request(self.selection()).dry_run(true).cancelled_by(ended).run();
        checked.map(drop).map_err(|error| trouble::of_move(&error))
    }

    /// What can be asked of a program itself.
    fn wish(&self) -> Option<Request> {
        let args = self.args;
        let [to] = self.nodes[..] else { return None };
        let bounded = args.rate.is_some() || args.reserve.is_some() || args.dry_run;
        // Of its pages' age the library knows nothing.
        let chosen = args.range.is_some() || args.filter.file.is_some() || args.min_age.is_some();
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
        match self.wish() {
            Some(wish) => self.ask_and_move(&wish, bar, &mut moved)?,
            None => self.by_kernel(bar, &mut moved)?,
        }
        if self.args.dry_run && !cancel::requested() {
            let (first, rate) = (self.nodes.first().copied(), self.args.rate);
            let latency = self.args.latency.unwrap_or(DEFAULT_CALL_LATENCY);
            moved.estimate = estimate::estimate(&moved.lines, first, &self.machine, latency, rate);
        }
        moved.cancelled |= cancel::requested();
        moved.elapsed = began.elapsed();
        Ok(moved)
    }

    /// Everything the kernel's way, who joins meanwhile included.
    fn by_kernel(&self, bar: &ProgressBar, moved: &mut Moved) -> Result<(), Problem> {
        let report = watched(self.request(self.selection()), bar).run();
        moved.add(report.map_err(|error| trouble::of_move(&error))?);
        Ok(())
    }

    /// Asks who listens, and moves everybody else, and what of the listeners is not theirs to
    /// move, from outside. Then looks who has joined meanwhile, until nobody has.
    fn ask_and_move(
        &self,
        wish: &Request,
        bar: &ProgressBar,
        moved: &mut Moved,
    ) -> Result<(), Problem> {
        let only = &self.args.filter.only;
        let rest = Kind::ALL.into_iter().filter(|kind| *kind != Kind::Anonymous);
        let rest: Vec<Kind> = rest.filter(|kind| only.is_empty() || only.contains(kind)).collect();
        let mut crowd = Crowd::new(&self.targets, self.args.groups.children);
        let mut answers = ask::all(crowd.look(), wish, bar);
        moved.remarks.append(&mut answers.remarks);
        if answers.asked.is_empty() {
            return self.by_kernel(bar, moved);
        }
        // By number from here on, so that those that were asked can be told from the others.
        let mut joined = 0;
        for round in 1..=ROUNDS {
            self.outside(answers.others, None, bar, moved)?;
            let listeners = answers.asked.iter().map(|asked| asked.pid).collect();
            moved.asked.append(&mut answers.asked);
            self.outside(listeners, Some(&rest), bar, moved)?;
            let new = crowd.look();
            if new.is_empty() || cancel::requested() {
                break;
            }
            if round == ROUNDS {
                moved.remarks.push(Note::StillJoining.to_string());
                break;
            }
            joined += new.len() as u64;
            answers = ask::all(new, wish, bar);
            moved.remarks.append(&mut answers.remarks);
        }
        if joined > 0 {
            moved.remarks.push(Note::MoreJoined { processes: joined }.to_string());
        }
        Ok(())
    }

    /// Moves these processes' memory, of these kinds if any are said, the kernel's way. They were
    /// found, not named: what is wrong with one is a note.
    fn outside(
        &self,
        pids: Vec<u32>,
        kinds: Option<&[Kind]>,
        bar: &ProgressBar,
        moved: &mut Moved,
    ) -> Result<(), Problem> {
        if pids.is_empty() || kinds.is_some_and(<[Kind]>::is_empty) {
            return Ok(());
        }
        let filter = match kinds {
            Some(kinds) => Filter::new().kinds(kinds.iter().copied()),
            None => self.filter(),
        };
        let found = args::selection(pids.into_iter().map(Target::Found)).filter(filter);
        let report = watched(self.request(found), bar).run();
        moved.add(report.map_err(|error| trouble::of_move(&error))?);
        Ok(())
    }
}

fn watched(request: ProcessMove, bar: &ProgressBar) -> ProcessMove {
    let bar = bar.clone();
    request.on_progress(bar::EVERY, move |progress| bar::show(&bar, progress))
}
