//! `pageferry doctor`: what this system offers to page migration, and what to change.
//!
//! A check looks at one right, kernel feature or setting. It says `ok`, `warn`
//! (things work, but less well or with a restriction) or `missing` (pageferry
//! cannot work), what it found, and unless it is ok a remedy. Kernel features
//! are found by using them, not by the kernel's version: distributions port
//! features back, and sandboxes deny them.
//!
//! Nothing is changed on the system. The kernel checks work on a few pages of
//! this process.

mod cpu;
mod kernel;
mod limits;
mod memory;
mod process;
mod seccomp;

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use pageferry_sys::affinity;
use serde::Serialize;

use crate::cli::JsonArg;
use crate::exit::Exit;
use crate::host::Host;
use crate::output::{BOLD, Context, DIM, GREEN, RED, YELLOW};

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    json: JsonArg,

    /// Read settings in sys/ and proc/ below this directory; the kernel is still tried itself
    #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
    root: PathBuf,
}

/// How a check ended; ordered from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    Ok,
    Warn,
    Missing,
}

/// One check and its result.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    /// Stable name, for programs.
    id: &'static str,
    status: Status,
    /// What was found.
    found: String,
    /// What to do; always there unless the status is ok.
    remedy: Option<String>,
}

impl Check {
    fn ok(id: &'static str, found: impl Into<String>) -> Self {
        Self { id, status: Status::Ok, found: found.into(), remedy: None }
    }

    fn warn(id: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        let (found, remedy) = (found.into(), Some(remedy.into()));
        Self { id, status: Status::Warn, found, remedy }
    }

    fn missing(id: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        let (found, remedy) = (found.into(), Some(remedy.into()));
        Self { id, status: Status::Missing, found, remedy }
    }
}

/// The JSON form; the number changes when a field changes its meaning or goes.
#[derive(Serialize)]
struct Report {
    schema_version: u32,
    /// The worst of all checks.
    status: Status,
    checks: Vec<Check>,
}

pub(crate) fn run(args: &DoctorArgs, context: &Context) -> anyhow::Result<Exit> {
    let host = Host::new(&args.root);
    let mut checks = kernel::checks(&host);
    checks.push(seccomp::check(&host));
    let (of_memory, nodes) = memory::checks(&host);
    checks.extend(of_memory);
    checks.extend(process::checks(&host, nodes));
    checks.extend(limits::checks(&host, nodes, affinity::allowed_cpus().len()));
    checks.extend(cpu::checks(&host));
    let status = checks.iter().map(|check| check.status).max().unwrap_or(Status::Ok);
    let report = Report { schema_version: 1, status, checks };
    if args.json.json {
        context.print_json(&report)?;
    } else {
        context.print(text(&report))?;
    }
    Ok(if status == Status::Missing { Exit::Missing } else { Exit::Ok })
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    let width = report.checks.iter().map(|check| check.id.len()).max().unwrap_or(0);
    for check in &report.checks {
        let (style, mark) = match check.status {
            Status::Ok => (GREEN, "ok"),
            Status::Warn => (YELLOW, "warn"),
            Status::Missing => (RED, "missing"),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{style}{mark:<7}{style:#} {BOLD}{:<width$}{BOLD:#}  {}",
            check.id, check.found
        );
        if let Some(remedy) = &check.remedy {
            let _ = writeln!(out, "        {:width$}  {DIM}remedy:{DIM:#} {remedy}", "");
        }
    }
    let count = |status| report.checks.iter().filter(|check| check.status == status).count();
    let verdict = match report.status {
        Status::Ok => "pageferry can do all it knows here".to_owned(),
        Status::Warn => format!("pageferry works here; {} to improve", count(Status::Warn)),
        Status::Missing => {
            format!("pageferry cannot work here: {} missing", count(Status::Missing))
        }
    };
    let _ = writeln!(out, "\n{verdict}");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_check_decides_and_remedies_stand_below_their_check() {
        let checks = vec![Check::ok("a", "fine"), Check::missing("long-name", "absent", "add it")];
        let report = Report { schema_version: 1, status: Status::Missing, checks };
        let plain = anstream::adapter::strip_str(&text(&report)).to_string();
        assert_eq!(
            plain,
            "ok      a          fine\n\
             missing long-name  absent\n\
             \u{20}                  remedy: add it\n\
             \n\
             pageferry cannot work here: 1 missing\n"
        );
        assert!(Status::Missing > Status::Warn && Status::Warn > Status::Ok);
    }
}
