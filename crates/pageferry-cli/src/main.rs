//! The command `pageferry`.
//!
//! Each subcommand lives in a module of its own, with its arguments and a `run`
//! that gets them and a [`Context`]. What a subcommand says goes
//! to stdout through [`output`], what it is doing and what went wrong to stderr.
//! An error that reaches [`main`] is printed as what, because, remedy, and ends
//! the program with the code that [`exit`] documents.
//!
//! SIGINT, SIGTERM and SIGHUP set a flag that long subcommands look at between
//! steps ([`cancel`]); a second SIGINT or SIGTERM ends the program at once.

mod bench;
mod cancel;
mod cli;
mod completions;
mod copiers;
mod demo;
mod doctor;
mod engines;
mod exit;
mod host;
mod man;
mod output;
mod process;
mod size;
mod table;
mod topology;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::exit::Exit;
use crate::output::Context;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return output::usage_error(&error, std::env::args_os()).into(),
    };
    let context = Context::new(cli.color, cli.quiet);
    match run(cli.command, &context) {
        Ok(exit) => exit.into(),
        Err(error) => output::error(&error).into(),
    }
}

fn run(command: Command, context: &Context) -> anyhow::Result<Exit> {
    cancel::install()?;
    match command {
        Command::Demo(args) => demo::run(args, context),
        Command::Bench(args) => bench::run(args, context),
        Command::Where(args) => process::residency(&args, context),
        Command::Move(args) => process::moving(&args, context),
        Command::Migratepages(args) => process::migratepages(&args),
        Command::Topology(args) => topology::run(&args, context),
        Command::Doctor(args) => doctor::run(&args, context),
        Command::Engines(args) => engines::run(&args, context),
        Command::Completions(args) => completions::run(&args, context),
        Command::Man(args) => man::run(&args, context),
    }
}
