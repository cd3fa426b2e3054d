//! `pageferry completions`: a completion script on stdout.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::exit::Exit;
use crate::output::Context;

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell to complete for
    shell: Shell,
}

pub(crate) fn run(args: &CompletionsArgs, context: &Context) -> anyhow::Result<Exit> {
    // Into memory first: the generator panics when its writer fails.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "pageferry", &mut script);
    context.print(String::from_utf8_lossy(&script))?;
    Ok(Exit::Ok)
}
