//! What the stages need beyond cargo: looked for, and installed where that is possible.

use crate::stage::{finish, say};
use anyhow::{Context as _, bail};
use std::process::{Command, Stdio};

/// Whether `program args` runs and succeeds.
pub(crate) fn works(program: &str, args: &[&str]) -> bool {
    let mut command = Command::new(program);
    let quiet = command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// A component of the Rust toolchain (`rustfmt`, `clippy`), behind the subcommand `cargo {name}`.
pub(crate) fn component(component: &str, subcommand: &str) -> anyhow::Result<()> {
    if works("cargo", &[subcommand, "--version"]) {
        return Ok(());
    }
    if !works("rustup", &["--version"]) {
        bail!("{component} is missing, and there is no rustup to add it: install {component}");
    }
    say(format_args!("installing the toolchain's component {component}"));
    finish(Command::new("rustup").args(["component", "add", component]))
        .with_context(|| format!("{component} is missing and could not be added"))?;
    Ok(())
}
