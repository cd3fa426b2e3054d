//! What the stages need beyond cargo: looked for, and installed where that is possible.

use crate::stage::{finish, say};
use anyhow::{Context as _, bail};
use std::path::Path;
use std::process::{Command, Stdio};

/// The emulator, and Debian's package that has it.
pub(crate) const QEMU: &str = "qemu-system-x86_64";
const QEMU_PACKAGE: &str = "qemu-system-x86";

/// What links programs for arm64.
pub(crate) const CLANG: &str = "clang-19";
/// What the arm64 machine and programs for it need: what is there if it is, and Debian's package.
const AARCH64: [(&str, &str); 5] = [
    ("/usr/bin/qemu-system-aarch64", "qemu-system-arm"),
    ("/usr/bin/clang-19", CLANG),
    ("/usr/bin/ld.lld-19", "lld-19"),
    ("/usr/aarch64-linux-gnu/lib/libc.a", "libc6-dev-arm64-cross"),
    ("/usr/lib/gcc-cross/aarch64-linux-gnu", "libgcc-12-dev-arm64-cross"),
];
const AARCH64_TARGET: &str = "aarch64-unknown-linux-gnu";

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
    if works(QEMU, &["--version"]) { Ok(()) } else { install(&[QEMU_PACKAGE]) }
}

/// QEMU for arm64, and what links programs for it, installed if that is possible.
pub(crate) fn aarch64() -> anyhow::Result<()> {
    let is_missing = |(file, _): &&(&str, &str)| !Path::new(file).exists();
    let missing: Vec<_> = AARCH64.iter().filter(is_missing).map(|(_, package)| *package).collect();
    if !missing.is_empty() {
        install(&missing)?;
    }
    if works("rustup", &["--version"]) {
        // Says so and does nothing if it is there.
        finish(Command::new("rustup").args(["target", "add", AARCH64_TARGET]))
            .with_context(|| format!("Rust's library for {AARCH64_TARGET} could not be added"))?;
    }
    Ok(())
}

fn install(packages: &[&str]) -> anyhow::Result<()> {
    let list = packages.join(" ");
    if !is_root() || !works("apt-get", &["--version"]) {
        bail!("not all that guests need is there: sudo apt-get install {list}");
    }
    say(format_args!("installing {list}"));
    let install = || {
        let mut apt = Command::new("apt-get");
        apt.args(["install", "-q", "-y", "--no-install-recommends"]).args(packages);
        finish(apt.env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()))
    };
    install().or_else(|_| apt_update().and_then(|()| install())).with_context(|| {
        format!("not all that guests need could be installed: apt-get install {list}")
    })?;
    Ok(())
}
