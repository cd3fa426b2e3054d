//! What the user sees: results on stdout, errors on stderr, colours, JSON.
//!
//! A reader that closes the pipe early (`pageferry topology | head`) has had what
//! it wanted: a broken pipe on stdout is success. Every other failed write to
//! stdout, also to one that was closed from the start, is an error. Errors have
//! three parts, what failed, because of what, and what to do; [`Problem`] carries
//! them. A usage error's remedy ends with the help to read.

use pageferry::BuildError;
use std::ffi::OsString;
use std::fmt;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};

use anstream::AutoStream;
use anstyle::{AnsiColor, Style};
use anyhow::Context as _;
use clap::error::{ContextKind, ContextValue, ErrorKind as ClapKind};
use clap::{ColorChoice, CommandFactory as _};
use serde::Serialize;

use crate::cli::Cli;
use crate::exit::Exit;

pub(crate) const BOLD: Style = Style::new().bold();
pub(crate) const DIM: Style = Style::new().dimmed();
pub(crate) const GREEN: Style = AnsiColor::Green.on_default();
pub(crate) const YELLOW: Style = AnsiColor::Yellow.on_default().bold();
pub(crate) const RED: Style = AnsiColor::Red.on_default().bold();

/// Whether the program was started without a stdout (`>&-`).
static NO_STDOUT: AtomicBool = AtomicBool::new(false);
/// Whether the reader of stdout has gone.
static READER_GONE: AtomicBool = AtomicBool::new(false);

/// Looks at stdout before the runtime of the standard library does: that opens `/dev/null` in the
/// place of a descriptor that is closed, and all output would be lost without an error.
#[used]
// SAFETY: `.init_array` holds pointers to functions that the C runtime calls before `main`
// (System V gABI, Initialization and Termination Functions), which may take no arguments.
#[unsafe(link_section = ".init_array")]
static LOOK_AT_STDOUT: extern "C" fn() = {
    extern "C" fn look() {
        // Duplicating a descriptor (fcntl(2), F_DUPFD_CLOEXEC) fails with EBADF if it is closed,
        // and with EMFILE at the limit on open files, which says nothing about it. The standard
        // library documents that the standard streams may be closed before main.
        let copy = io::stdout().as_fd().try_clone_to_owned();
        let closed = copy.is_err_and(|error| error.raw_os_error() == Some(EBADF));
        // Relaxed: there is one thread yet.
        NO_STDOUT.store(closed, Ordering::Relaxed);
    }
    look
};

/// include/uapi/asm-generic/errno-base.h.
const EBADF: i32 = 9;

/// Writes to stdout, without escape sequences where colours are off.
fn to_stdout(text: impl fmt::Display) -> anyhow::Result<()> {
    let mut out = AutoStream::auto(io::stdout().lock());
    let written = match NO_STDOUT.load(Ordering::Relaxed) {
        true => Err(io::Error::from_raw_os_error(EBADF)),
        false => write!(out, "{text}").and_then(|()| out.flush()),
    };
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {
            // Relaxed: it only has to be seen by who wrote.
            READER_GONE.store(true, Ordering::Relaxed);
            Ok(())
        }
        Err(error) => Err(Problem {
            what: "cannot write to stdout".to_owned(),
            because: error.to_string(),
            remedy: "give it an open stdout with room, such as > FILE".to_owned(),
            exit: Exit::Failed,
        }
        .into()),
        Ok(()) => Ok(()),
    }
}

/// Whether nobody reads what is written any longer, as the last write found: then more of it is of
/// no use.
pub(crate) fn is_reader_gone() -> bool {
    READER_GONE.load(Ordering::Relaxed)
}

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
        to_stdout(text)
    }

    /// Tells, on stderr, of something done that was not plainly asked for.
    pub(crate) fn note(&self, text: impl fmt::Display) {
        // It is no part of the result: without stderr there is nobody to tell.
        let _ = writeln!(AutoStream::auto(io::stderr().lock()), "{text}");
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

/// A negative number that clap took for an option that there is not (it tells the sign and the
/// first digit), and the option that it was meant for.
fn negative(unknown: &str, args: &[OsString]) -> Option<String> {
    let digits = unknown.strip_prefix('-')?;
    if !digits.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let words: Vec<_> = args.iter().map(|word| word.to_string_lossy()).collect();
    // --nice takes them.
    let mut pairs = words.windows(2).filter(|pair| pair[0] != "--nice");
    let pair = pairs.find(|pair| pair[1].starts_with(unknown))?;
    let option = match pair[0].starts_with("--") {
        true => format!(" for '{}'", pair[0]),
        false => String::new(),
    };
    Some(format!("negative number '{}'{option}", pair[1]))
}

/// Prints what clap has to say of the command line `args`: help and version on stdout, errors in
/// our form.
pub(crate) fn usage_error(clap: &clap::Error, args: impl Iterator<Item = OsString>) -> Exit {
    match clap.kind() {
        ClapKind::DisplayHelp | ClapKind::DisplayVersion => {
            return match to_stdout(clap.render().ansi()) {
                Ok(()) => Exit::Ok,
                Err(failed) => error(&failed),
            };
        }
        ClapKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // If stderr is gone, the exit code is all that is left to say.
            let _ = clap.print();
            return Exit::Usage;
        }
        _ => {}
    }
    let text = clap.render().to_string();
    let mut lines = text.lines();
    let what = lines.next().unwrap_or_default();
    let what = what.strip_prefix("error: ").unwrap_or(what);
    // clap's further paragraph: possible values, or the arguments that are missing.
    let more: Vec<&str> = lines
        .take_while(|line| !line.starts_with("Usage:"))
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("tip:") && !line.starts_with("For "))
        .map(|line| line.trim_start_matches('[').trim_end_matches(']'))
        .collect();
    let more = more.join(", ");
    let args: Vec<OsString> = args.collect();
    let negative = match clap.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(unknown)) => negative(unknown, &args),
        _ => None,
    };
    let subcommand = subcommand(args.into_iter());
    let program = subcommand
        .as_ref()
        .map_or_else(|| "pageferry".to_owned(), |name| format!("pageferry {name}"));
    let (what, because) = match (clap.kind(), what.split_once(": ")) {
        // "the following arguments were not provided:" continues in the paragraph.
        _ if what.ends_with(':') => (format!("{what} {more}"), format!("`{program}` needs them")),
        // Our own parsers say why.
        (ClapKind::ValueValidation, Some((what, why))) => (what.to_owned(), why.to_owned()),
        (ClapKind::UnknownArgument, _) if negative.is_some() => {
            (negative.unwrap_or_default(), "nothing below 0 is taken there".to_owned())
        }
        (ClapKind::UnknownArgument, _) => {
            (what.to_owned(), format!("`{program}` has no such argument"))
        }
        (ClapKind::InvalidSubcommand, _) => {
            let names = Cli::command();
            let names: Vec<&str> = names.get_subcommands().map(clap::Command::get_name).collect();
            (what.to_owned(), format!("the subcommands are {}", names.join(", ")))
        }
        _ => (what.to_owned(), more),
    };
    let help = format!("see `{program} --help`");
    let remedy = suggestion(clap)
        .map_or_else(|| help.clone(), |name| format!("did you mean `{name}`? Else {help}"));
    report(&what, (!because.is_empty()).then_some(&*because), Some(&remedy));
    // Scripts know one code from migratepages(8).
    if subcommand.as_deref() == Some("migratepages") { Exit::Failed } else { Exit::Usage }
}

/// The subcommand that a command line names; clap's errors do not tell.
fn subcommand(args: impl Iterator<Item = OsString>) -> Option<String> {
    let command = Cli::command();
    let mut words = args.skip(1);
    while let Some(word) = words.next() {
        let word = word.to_string_lossy();
        if word == "--color" {
            // Its value is no subcommand, whatever it says.
            words.next();
        } else if !word.starts_with('-') {
            return command.find_subcommand(&*word).map(|sub| sub.get_name().to_owned());
        }
    }
    None
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_number_is_named_with_the_option_that_it_was_meant_for() {
        let named = |unknown: &str, line: &str| {
            let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            negative(unknown, &args)
        };
        let is = |found: Option<String>, text: &str| assert_eq!(found.as_deref(), Some(text));
        is(named("-1", "move --nice -1 --rate -1M"), "negative number '-1M' for '--rate'");
        is(named("-7", "where 5 -7"), "negative number '-7'");
        assert_eq!(named("--foo", "move --nice -1 --foo"), None);
        assert_eq!(named("-x", "where -x"), None);
    }
}
