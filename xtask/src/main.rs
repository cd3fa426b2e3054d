//! The project's own chores: `cargo xtask test`, `guest`, `kernel`, `soak` and `torture`.
//!
//! What always holds: a stage that does not run says why, the last line counts what passed,
//! failed and was skipped, and the exit code is 0 only if nothing failed.

mod cache;
mod guest;
mod kernel;
mod needs;
mod stage;
mod test;
mod torture;

use clap::{Args, Parser, Subcommand};
use std::process::ExitCode;

/// Chores of the pageferry workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Run all tests: format, lints, tests, model checking, documentation, smoke runs
    Test(TestArgs),
    /// Boot machines with several nodes under QEMU, for tests or a look around
    #[command(subcommand)]
    Guest(guest::Guest),
    /// Build Linux with the patches and modules of `kernel/`, and test them in guests
    #[command(subcommand)]
    Kernel(kernel::Kernel),
    /// Move memory back and forth under verifying readers and writers, for as long as told
    Soak(SoakArgs),
    /// Move the memory of real, unmodified programs while they compute, and check what they compute
    #[command(after_help = torture::PACKAGES)]
    Torture(torture::Torture),
}

#[derive(Debug, Args)]
struct TestArgs {
    /// Leave out model checking and the guests, which take the longest
    #[arg(long)]
    fast: bool,
}

#[derive(Debug, Args)]
struct SoakArgs {
    /// Seconds to run
    #[arg(long, value_name = "N", default_value_t = 600,
          value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
}

fn main() -> ExitCode {
    let stages = match Cli::parse().chore {
        Chore::Test(args) => test::test(args.fast),
        Chore::Guest(what) => guest::guest(&what),
        Chore::Kernel(what) => kernel::kernel(&what),
        Chore::Soak(args) => test::soak(args.seconds),
        Chore::Torture(args) => torture::torture(&args),
    };
    stages.conclude()
}
