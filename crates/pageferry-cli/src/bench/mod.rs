//! `pageferry bench`.

use clap::Args;

use crate::exit::Exit;
use crate::output::{Context, Problem};

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {}

pub(crate) fn run(_args: BenchArgs, _context: &Context) -> anyhow::Result<Exit> {
    Err(Problem {
        what: "bench is not built yet".into(),
        because: "this build holds the other subcommands only".into(),
        remedy: "build a later version".into(),
        exit: Exit::Failed,
    }
    .into())
}
