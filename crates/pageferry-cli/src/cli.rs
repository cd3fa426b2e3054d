//! The command line. Help, completions and man pages are all made from these types.

use clap::{ArgAction, Args, ColorChoice, Parser, Subcommand};

use crate::bench::BenchArgs;
use crate::completions::CompletionsArgs;
use crate::demo::DemoArgs;
use crate::doctor::DoctorArgs;
use crate::engines::EnginesArgs;
use crate::exit::Exit;
use crate::man::ManArgs;
use crate::process::{MigratepagesArgs, MoveArgs, WhereArgs};
use crate::topology::TopologyArgs;

/// Moves the memory of running programs between NUMA nodes and memory tiers.
#[derive(Debug, Parser)]
#[command(
    name = "pageferry",
    version,
    after_help = exit_codes(),
    max_term_width = 100,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
pub(crate) struct Cli {
    /// When to use colours (NO_COLOR is honoured too)
    #[arg(long, value_name = "WHEN", global = true, default_value_t = ColorChoice::Auto)]
    pub(crate) color: ColorChoice,

    /// Show no progress (there is none when stderr is not a terminal)
    #[arg(short, long, global = true, action = ArgAction::SetTrue)]
    pub(crate) quiet: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Index text in memory that moves while it answers queries
    Demo(DemoArgs),
    /// Measure copying and moving on this machine
    Bench(BenchArgs),
    /// Show what memory programs have, and on which nodes
    Where(WhereArgs),
    /// Move memory of running programs to other nodes
    Move(MoveArgs),
    /// Move a program's pages as migratepages(8) of numactl does
    Migratepages(MigratepagesArgs),
    /// Show nodes, tiers, CPUs, caches and distances
    Topology(TopologyArgs),
    /// Show who copies pages here: CPUs, the kernel's modules, DMA channels
    Engines(EnginesArgs),
    /// Check rights, kernel features and settings, with remedies
    Doctor(DoctorArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Print the manual page, or write one for each subcommand
    Man(ManArgs),
}

/// For subcommands whose result programs can read.
#[derive(Debug, Args)]
pub(crate) struct JsonArg {
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn exit_codes() -> String {
    let lines = Exit::ALL.map(|(exit, meaning)| format!("\n  {:>3}  {meaning}", exit.code()));
    format!("Exit codes:{}", lines.concat())
}
