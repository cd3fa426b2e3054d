//! `pageferry man`: manual pages, made from the same definitions as `--help`.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::cli::Cli;
use crate::exit::Exit;
use crate::output::{Context, Problem};

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Write a page for the command and each subcommand into this directory, which is made if
    /// only its last part is missing
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(crate) fn run(args: &ManArgs, context: &Context) -> anyhow::Result<Exit> {
    match &args.out {
        None => context.print(String::from_utf8_lossy(&page(Cli::command())?))?,
        Some(directory) => {
            make(directory, context)?;
            write_all(directory)?;
        }
    }
    Ok(Exit::Ok)
}

/// Makes sure that the directory is there. A parent that is missing is more likely a slip of the
/// pen than a wish.
fn make(directory: &Path, context: &Context) -> Result<(), Problem> {
    if directory.is_dir() {
        return Ok(());
    }
    let refused = |because: String, remedy: String| {
        Problem::bad_input(
            format!("--out {}: no man pages can be written there", directory.display()),
            because,
            remedy,
        )
    };
    match fs::create_dir(directory) {
        Ok(()) => {
            context.note(format_args!("made the directory {}", directory.display()));
            Ok(())
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            // An empty parent is the current directory, which then has been removed.
            let parent = directory.parent().unwrap_or(directory).display();
            Err(refused(
                format!("its parent {parent} does not exist"),
                format!("make it first (mkdir -p {parent}), or name another directory"),
            ))
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            Err(refused("it is not a directory".to_owned(), "name a directory".to_owned()))
        }
        Err(error) => Err(refused(
            error.to_string(),
            "name a directory that you may write to, or that can be made".to_owned(),
        )),
    }
}

fn write_all(directory: &Path) -> anyhow::Result<()> {
    let mut command = Cli::command();
    // Gives the subcommands their global options and their full names.
    command.build();
    let subcommands = command.get_subcommands().map(|sub| {
        (format!("pageferry-{}", sub.get_name()), sub.clone().version(env!("CARGO_PKG_VERSION")))
    });
    let pages = std::iter::once(("pageferry".to_owned(), Cli::command())).chain(subcommands);
    for (name, command) in pages {
        let file = directory.join(format!("{name}.1"));
        fs::write(&file, page(command)?).map_err(|error| Problem {
            what: format!("cannot write {}", file.display()),
            because: error.to_string(),
            remedy: "name a directory that you may write to, on a file system with room".to_owned(),
            exit: Exit::Failed,
        })?;
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
