//! The command as tests run it, and what it said.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use std::process::{Child, Command};
use std::sync::LazyLock;

use assert_cmd::assert::Assert;
use assert_cmd::cargo::cargo_bin;

/// The command, built for this test; in a guest, the one that is there.
pub static PAGEFERRY: LazyLock<String> =
    LazyLock::new(|| cargo_bin("pageferry").to_string_lossy().into_owned());

/// The command, uninfluenced by what the environment says of colours and widths.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(&*PAGEFERRY);
    command.args(args).env_remove("NO_COLOR").env_remove("COLUMNS");
    command
}

/// Runs it to its end.
pub fn pageferry(args: &[&str]) -> Assert {
    assert_cmd::Command::from_std(command(args)).assert()
}

pub fn code(assert: &Assert) -> Option<i32> {
    assert.get_output().status.code()
}

pub fn stdout(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stdout).into_owned()
}

pub fn stderr(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

/// Sends it a signal: `INT`, `TERM`, `HUP`.
pub fn send(signal: &str, to: &Child) {
    let sent = Command::new("kill").args([&format!("-{signal}"), &to.id().to_string()]).status();
    assert!(sent.expect("kill is everywhere").success(), "SIG{signal}");
}

/// SIGHUP, signal 1, as a bit of [`signals`].
pub const HUP: u64 = 1;
/// SIGTERM, signal 15, as a bit of [`signals`].
pub const TERM: u64 = 1 << 14;

/// Signals that a process handles (`SigCgt`, proc(5)) or ignores (`SigIgn`), as a mask.
pub fn signals(pid: u32, which: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix(which)?.strip_prefix(':'));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// The signals that ask it to stop, but for one that this test was started to ignore; says so.
pub fn stop_signals() -> Vec<&'static str> {
    let mut all = vec!["INT", "TERM", "HUP"];
    if signals(std::process::id(), "SigIgn") & HUP != 0 {
        eprintln!("skipped in part: SIGHUP is ignored here (nohup)");
        all.retain(|signal| *signal != "HUP");
    }
    all
}
