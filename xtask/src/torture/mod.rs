//! Moves the memory of real programs, unmodified, while they compute; and checks what they compute.
//!
//! What always holds: a program fails if its own checks do, if a thread of the library panicked,
//! if it hangs, and if nothing of it was moved. The last makes sure that this test can fail.

mod java;
mod log;
mod postgres;
mod redis;
mod run;
mod sqlite;
mod stress;

use crate::stage::{Ran, Stages, cargo, finish, say, target_dir};
use anyhow::{Context as _, bail};
use clap::Args;
use run::Run;
use std::path::PathBuf;
use std::time::Duration;

/// For the help: where the programs come from.
pub(crate) const PACKAGES: &str = "A program that is absent is skipped. All of them, on Debian:\n  \
    sudo apt-get install redis-server sqlite3 postgresql openjdk-17-jdk-headless stress-ng\n\
    A userfaultfd that sees faults inside system calls is needed: be root, or see `pageferry doctor`.";

#[derive(Debug, Args)]
pub(crate) struct Torture {
    /// Seconds to run, all programs together, about
    #[arg(long, value_name = "N", default_value_t = 60,
          value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// The seed of what is moved and how
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Only these programs
    #[arg(value_name = "PROGRAM", value_parser = PROGRAMS.map(|program| program.name))]
    programs: Vec<String>,
}

/// A program to torture.
struct Program {
    name: &'static str,
    /// The files whose memory is moved, as the library is told: names separated by colons.
    moved: &'static str,
    /// What must be there, and Debian's package that has it.
    needs: &'static [(&'static str, &'static str)],
    run: fn(&Run) -> anyhow::Result<()>,
}

const PROGRAMS: [Program; 5] = [
    Program {
        name: "redis",
        moved: "redis-server:redis-check-rdb",
        needs: &[("redis-server", "redis-server")],
        run: redis::run,
    },
    Program {
        name: "sqlite",
        moved: "sqlite3",
        needs: &[("sqlite3", "sqlite3")],
        run: sqlite::run,
    },
    Program {
        name: "postgres",
        moved: "postgres",
        needs: &[
            ("initdb", "postgresql"),
            ("pgbench", "postgresql"),
            ("pg_amcheck", "postgresql"),
            ("setpriv", "util-linux"),
        ],
        run: postgres::run,
    },
    Program {
        name: "java",
        moved: "java",
        needs: &[("java", "openjdk-17-jdk-headless"), ("javac", "openjdk-17-jdk-headless")],
        run: java::run,
    },
    Program {
        name: "stress-ng",
        moved: "stress-ng",
        needs: &[("stress-ng", "stress-ng")],
        run: stress::run,
    },
];

pub(crate) fn torture(args: &Torture) -> Stages {
    let mut stages = Stages::default();
    let chosen = |program: &&Program| {
        args.programs.is_empty() || args.programs.iter().any(|name| name == program.name)
    };
    let chosen: Vec<_> = PROGRAMS.iter().filter(chosen).collect();
    let each = Duration::from_secs(args.seconds) / u32::try_from(chosen.len()).unwrap_or(1);
    let mut library = None;
    stages.run("The library", || {
        library = Some(build()?);
        Ok(Ran::Done)
    });
    for program in chosen {
        stages.run(program.name, || {
            let library = library.clone().context("there is no library to preload")?;
            one(program, library, each, args.seed)
        });
    }
    stages
}

/// Builds the library. Not optimized: the engine's own assertions are in it.
fn build() -> anyhow::Result<PathBuf> {
    finish(&mut cargo(["build", "-p", "pageferry-torture"]))?;
    let library = target_dir().join("debug/libpageferry_torture.so");
    // A thread-local that is reached through the C library is in memory that moves.
    let symbols = std::process::Command::new("nm").arg("-D").arg(&library).output();
    match symbols {
        Ok(out) if out.status.success() => {
            let symbols = String::from_utf8_lossy(&out.stdout).into_owned();
            for function in ["__tls_get_addr", "__cxa_thread_atexit_impl"] {
                if symbols.contains(function) {
                    bail!("{}: {function} is not its own", library.display());
                }
            }
        }
        _ => say("whose thread-locals it uses is not checked: there is no nm (binutils)"),
    }
    Ok(library)
}

fn one(program: &Program, library: PathBuf, share: Duration, seed: u64) -> anyhow::Result<Ran> {
    if let Some((file, package)) = program.needs.iter().find(|(file, _)| run::find(file).is_none())
    {
        return Ok(Ran::Skip(format!("there is no {file}: apt-get install {package}")));
    }
    let run = Run::new(program.name, program.moved, library, share, seed)?;
    let result = (program.run)(&run);
    let moved = log::read(&run.log)?;
    say(format_args!("{moved}"));
    if let Some(why) = moved.cannot() {
        return Ok(Ran::Skip(why.to_owned()));
    }
    let result = result.and_then(|()| moved.judge());
    match result {
        Ok(()) => {
            run.clean();
            Ok(Ran::Done)
        }
        Err(error) => Err(error.context(format!("see {}", run.folder.display()))),
    }
}
