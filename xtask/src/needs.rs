//! What the stages need beyond cargo: looked for, and installed where that is possible.

use crate::stage::{finish, say};
use anyhow::{Context as _, bail};
use std::process::{Command, Stdio};

/// The emulator, and Debian's package that has it.
pub(crate) const QEMU: &str = "qemu-system-x86_64";
const QEMU_PACKAGE: &str = "qemu-system-x86";

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

/// Whether this user may install packages: its effective user is root.
pub(crate) fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|out| out.stdout.trim_ascii() == b"0")
}

/// Renews apt's lists of packages.
pub(crate) fn apt_update() -> anyhow::Result<()> {
    finish(Command::new("apt-get").args(["update", "-q"])).map(drop)
}

/// QEMU for x86-64, installed if that is possible.
pub(crate) fn qemu() -> anyhow::Result<()> {
    if works(QEMU, &["--version"]) {
        return Ok(());
    }
    if !is_root() || !works("apt-get", &["--version"]) {
        bail!("{QEMU} is missing: sudo apt-get install {QEMU_PACKAGE}");
    }
    say(format_args!("installing {QEMU_PACKAGE}"));
    let install = || {
        let mut apt = Command::new("apt-get");
        apt.args(["install", "-q", "-y", "--no-install-recommends", QEMU_PACKAGE]);
        finish(apt.env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()))
    };
    install().or_else(|_| apt_update().and_then(|()| install())).with_context(|| {
        format!("{QEMU} is missing and could not be installed: apt-get install {QEMU_PACKAGE}")
    })?;
    Ok(())
}
