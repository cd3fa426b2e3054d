//! What the user sees: results on stdout, errors on stderr, colours, JSON.
//!
//! A reader that closes the pipe early (`pageferry topology | head`) has had what
//! it wanted: a broken pipe on stdout is success. Errors have three parts, what
//! failed, because of what, and what to do; [`Problem`] carries them.

use pageferry::BuildError;
use std::fmt;
use std::io::{self, ErrorKind, IsTerminal, Write};

use anstream::AutoStream;
use anstyle::{AnsiColor, Style};
use anyhow::Context as _;
use clap::ColorChoice;
use clap::error::{ContextKind, ContextValue, ErrorKind as ClapKind};
use serde::Serialize;

use crate::exit::Exit;

pub(crate) const BOLD: Style = Style::new().bold();
pub(crate) const DIM: Style = Style::new().dimmed();
pub(crate) const GREEN: Style = AnsiColor::Green.on_default();
pub(crate) const YELLOW: Style = AnsiColor::Yellow.on_default().bold();
pub(crate) const RED: Style = AnsiColor::Red.on_default().bold();

/// How a subcommand may talk to the user.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context {
    /// Progress may be shown: stderr is a terminal and nobody asked for quiet.
    #[allow(dead_code, reason = "read by the subcommands that take long")]
    pub(crate) progress: bool,
}

impl Context {
    /// Settles colours for the whole program: `--color`, else NO_COLOR and the
    /// like, else whether the stream is a terminal.
    pub(crate) fn new(color: ColorChoice, quiet: bool) -> Self {
        match color {
            ColorChoice::Auto => {}
            ColorChoice::Always => anstream::ColorChoice::Always.write_global(),
            ColorChoice::Never => anstream::ColorChoice::Never.write_global(),
        }
        Self { progress: !quiet && io::stderr().is_terminal() }
    }

    /// Writes a result to stdout. Escape sequences in it are dropped where colours are off.
    pub(crate) fn print(&self, text: impl fmt::Display) -> anyhow::Result<()> {
        let mut out = AutoStream::auto(io::stdout().lock());
        let written = write!(out, "{text}").and_then(|()| out.flush());
        match written {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            other => other.context("cannot write to stdout"),
        }
    }

    /// Writes a result to stdout as indented JSON.
    pub(crate) fn print_json(&self, value: &impl Serialize) -> anyhow::Result<()> {
        let json = serde_json::to_string_pretty(value).context("cannot write JSON")?;
        self.print(json + "\n")
    }
}

/// An error with its reason and its remedy, and the exit code it deserves.
#[derive(Debug)]
pub(crate) struct Problem {
    /// What was tried, on what.
    pub(crate) what: String,
    /// Why it failed.
    pub(crate) because: String,
    /// What the user can do.
    pub(crate) remedy: String,
    /// How the program ends.
    pub(crate) exit: Exit,
}

impl Problem {
    /// An input that cannot be used.
    pub(crate) fn bad_input(
        what: impl Into<String>,
        because: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let (what, because, remedy) = (what.into(), because.into(), remedy.into());
        Self { what, because, remedy, exit: Exit::Usage }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Problem {}

/// Prints an error that ends the program.
pub(crate) fn error(error: &anyhow::Error) -> Exit {
    if let Some(problem) = error.downcast_ref::<Problem>() {
        report(&problem.what, Some(&problem.because), Some(&problem.remedy));
        return problem.exit;
    }
    let what = error.to_string();
    // A message that quotes its cause need not be followed by it.
    let causes: Vec<String> = error.chain().skip(1).map(ToString::to_string).collect();
    let causes: Vec<String> = causes.into_iter().filter(|c| !what.contains(c.as_str())).collect();
    let because = (!causes.is_empty()).then(|| causes.join(": "));
    match error.chain().find_map(|cause| cause.downcast_ref::<BuildError>()) {
        Some(BuildError::Kernel(_)) => {
            let remedy = "unset the variable, or name one of these";
            report(&what, because.as_deref(), Some(remedy));
            Exit::Usage
        }
        Some(_) => {
            let remedy = "`pageferry doctor` says what is missing and how to get it";
            report(&what, because.as_deref(), Some(remedy));
            Exit::Failed
        }
        None => {
            report(&what, because.as_deref(), None);
            Exit::Failed
        }
    }
}

/// Prints what clap has to say: help and version on stdout, errors in our form.
pub(crate) fn usage_error(error: &clap::Error) -> Exit {
    match error.kind() {
        ClapKind::DisplayHelp | ClapKind::DisplayVersion => {
            // Nothing is left to do if stdout is gone.
            let _ = error.print();
            return Exit::Ok;
        }
        ClapKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            return Exit::Usage;
        }
        _ => {}
    }
    let text = error.render().to_string();
    let mut lines = text.lines();
    let what = lines.next().unwrap_or_default();
    let what = what.strip_prefix("error: ").unwrap_or(what);
    // clap's further paragraph: possible values, or the arguments that are missing.
    let because: Vec<&str> = lines
        .take_while(|line| !line.starts_with("Usage:"))
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("tip:") && !line.starts_with("For "))
        .map(|line| line.trim_start_matches('[').trim_end_matches(']'))
        .collect();
    let because = because.join(", ");
    // "the following arguments were not provided:" continues in the paragraph.
    let (what, because) = if what.ends_with(':') {
        (format!("{what} {because}"), None)
    } else {
        (what.to_owned(), (!because.is_empty()).then_some(because))
    };
    let remedy = suggestion(error).map_or_else(
        || "see `pageferry --help`".to_owned(),
        |name| format!("did you mean `{name}`?"),
    );
    report(&what, because.as_deref(), Some(&remedy));
    Exit::Usage
}

fn suggestion(error: &clap::Error) -> Option<&str> {
    [ContextKind::SuggestedSubcommand, ContextKind::SuggestedArg, ContextKind::SuggestedValue]
        .into_iter()
        .find_map(|kind| match error.get(kind)? {
            ContextValue::String(name) => Some(name.as_str()),
            ContextValue::Strings(names) => names.first().map(String::as_str),
            _ => None,
        })
}

fn report(what: &str, because: Option<&str>, remedy: Option<&str>) {
    let mut text = format!("{RED}error:{RED:#} {what}\n");
    if let Some(because) = because {
        text += &format!("  {BOLD}because:{BOLD:#} {because}\n");
    }
    if let Some(remedy) = remedy {
        text += &format!("  {BOLD}remedy:{BOLD:#} {remedy}\n");
    }
    // If stderr is gone too, the exit code is all that is left to say.
    let _ = AutoStream::auto(io::stderr().lock()).write_all(text.as_bytes());
}
