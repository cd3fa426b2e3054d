//! `pageferry man`: manual pages, made from the same definitions as `--help`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::cli::Cli;
use crate::exit::Exit;
use crate::output::Context;

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Write a page for the command and each subcommand into this directory
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(crate) fn run(args: &ManArgs, context: &Context) -> anyhow::Result<Exit> {
    match &args.out {
        None => context.print(String::from_utf8_lossy(&page(Cli::command())?))?,
        Some(directory) => write_all(directory)?,
    }
    Ok(Exit::Ok)
}

fn write_all(directory: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot create the directory {}", directory.display()))?;
    let mut command = Cli::command();
    // Gives the subcommands their global options and their full names.
    command.build();
    let subcommands = command.get_subcommands().map(|sub| {
        (format!("pageferry-{}", sub.get_name()), sub.clone().version(env!("CARGO_PKG_VERSION")))
    });
    let pages = std::iter::once(("pageferry".to_owned(), Cli::command())).chain(subcommands);
    for (name, command) in pages {
        let file = directory.join(format!("{name}.1"));
        fs::write(&file, page(command)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

fn page(command: clap::Command) -> anyhow::Result<Vec<u8>> {
    let has_subcommands = command.has_subcommands();
    let man = Man::new(command).manual("pageferry manual");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if has_subcommands {
        man.render_subcommands_section(&mut page)?;
    }
    exit_status().to_writer(&mut page)?;
    man.render_version_section(&mut page)?;
    Ok(page)
}

fn exit_status() -> Roff {
    let mut section = Roff::new();
    section.control("SH", ["EXIT STATUS"]);
    for (exit, meaning) in Exit::ALL {
        section.control("TP", []);
        section.text([bold(exit.code().to_string())]);
        section.text([roman(meaning)]);
    }
    section
}
