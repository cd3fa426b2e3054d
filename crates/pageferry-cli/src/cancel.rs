//! Cancelling: the first SIGINT, SIGTERM or SIGHUP asks; a SIGINT or SIGTERM after it ends the
//! program.
//!
//! The handler only sets a flag. Work that takes long looks at [`requested`]
//! between steps, stops where all pages are intact, reports what it has, and
//! returns [`Exit::Cancelled`].

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use crate::exit::Exit;

static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// The flag itself, for work that is given one to watch.
pub(crate) fn requested_flag() -> &'static Arc<AtomicBool> {
    FLAG.get_or_init(Arc::default)
}

/// Whether the user has asked to stop.
#[allow(dead_code, reason = "called by the long subcommands")]
pub(crate) fn requested() -> bool {
    // Relaxed: nothing is published with the flag; it only has to be seen soon.
    requested_flag().load(Ordering::Relaxed)
}

/// Installs the handlers.
pub(crate) fn install() -> anyhow::Result<()> {
    // A terminal that closes sends it twice, by its shell and by itself: the second is no second
    // wish. Whoever starts a program by nohup(1) wants it to go on.
    if !is_ignored(SIGHUP) {
        flag::register(SIGHUP, Arc::clone(requested_flag()))
            .context("cannot install a handler for SIGHUP")?;
    }
    for signal in [SIGINT, SIGTERM] {
        // In this order: a signal that finds the flag set ends the program, and
        // only then is the flag set, by the first.
        flag::register_conditional_shutdown(
            signal,
            Exit::Cancelled.code().into(),
            Arc::clone(requested_flag()),
        )
        .and_then(|_| flag::register(signal, Arc::clone(requested_flag())))
        .context("cannot install a handler for SIGINT and SIGTERM")?;
    }
    Ok(())
}

/// Whether this program was started so that it ignores a signal (`SigIgn`, proc(5)).
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 << (signal - 1) != 0)
}
