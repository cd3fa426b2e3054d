//! The stages of `cargo xtask test`, and the soak test.

use crate::guest;
use crate::kernel;
use crate::needs;
use crate::stage::{Ran, Stages, cargo, finish, finish_tests, root, say, target_dir};
use anyhow::{Context as _, bail};
use std::process::Command;

/// `doctor` exits with this when something needed is missing (`pageferry --help`).
const MISSING: i32 = 3;
/// What the demo's smoke run indexes: text that every clone has.
const TEXT: &str = "crates";

/// All tests; without model checking and guests if `fast`.
pub(crate) fn test(fast: bool) -> Stages {
    let mut stages = Stages::default();
    stages.run("Format", || {
        needs::component("rustfmt", "fmt")?;
        finish(&mut cargo(["fmt", "--all", "--check"]))
    });
    stages.run("Lints", || {
        needs::component("clippy", "clippy")?;
        finish(&mut cargo(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
    });
    // `--show-output`: a test that is skipped for want of a capability says so and passes.
    stages.run("Unit, property and integration tests", || {
        let what = ["test", "--workspace", "--lib", "--bins", "--tests", "--no-fail-fast"];
        let mut tests = cargo(what);
        // Engines that panic because they are told to would bury the rest under backtraces.
        tests.args(["--", "--show-output"]).env("RUST_BACKTRACE", "0");
        finish_tests(&mut tests)
    });
    stages.run("Documentation's examples", || finish(&mut cargo(["test", "--workspace", "--doc"])));
    stages.run("Model checking: copy batches", || {
        model_check(fast, &["-p", "pageferry-copy", "--test", "loom"], "loom")
    });
    stages.run("Model checking: flights", || {
        model_check(fast, &["-p", "pageferry", "--lib"], "flight_model")
    });
    stages.run("Model checking: forks", || {
        model_check(fast, &["-p", "pageferry", "--lib"], "quiesce::model")
    });
    stages.run("Model checking: pools", || {
        model_check(fast, &["-p", "pageferry", "--lib"], "pool::model")
    });
    stages.run("Licences, sources and advisories", deny);
    stages.run("Documentation", || {
        // `--lib`: the command's crate and the library have one name, and so one page.
        let mut doc = cargo(["doc", "--workspace", "--lib", "--no-deps"]);
        finish(doc.env("RUSTDOCFLAGS", "-D warnings"))
    });
    stages.run("Bench, smoke run", || with_engine(&["bench", "--smoke"]));
    stages
        .run("Demo, smoke run", || with_engine(&["demo", TEXT, "--size", "32M", "--seconds", "3"]));
    stages.run("Guests", || guest::stage(fast));
    stages.run("Kernel", || kernel::stage(fast));
    stages
}

/// Moves and exchanges under verifying readers and writers, and with everything else that a program
/// may do at once, for `seconds` together.
pub(crate) fn soak(seconds: u64) -> Stages {
    let mut stages = Stages::default();
    let half = seconds.div_ceil(2);
    for (name, test, seconds) in [("Soak", "soak", half), ("Stress", "stress", half)] {
        stages.run(name, || {
            let mut run = cargo(["test", "--release", "-p", "pageferry", "--test", test]);
            run.args(["--", "--nocapture"]).env("PAGEFERRY_SOAK_SECONDS", seconds.to_string());
            finish(&mut run)
        });
    }
    stages
}

/// Runs the tests of `target` named `filter` with loom's primitives, in a target folder of their
/// own: the flag rebuilds everything.
fn model_check(fast: bool, target: &[&str], filter: &str) -> anyhow::Result<Ran> {
    if fast {
        return Ok(Ran::Skip("--fast".into()));
    }
    let flags = match std::env::var("RUSTFLAGS") {
        Ok(flags) => format!("{flags} --cfg loom"),
        Err(_) => "--cfg loom".to_owned(),
    };
    let test = || {
        let mut test = cargo(["test", "--release"]);
        test.args(target).arg("--target-dir").arg(target_dir().join("loom")).arg(filter);
        test.env("RUSTFLAGS", &flags);
        test
    };
    finish(test().arg("--no-run"))?;
    // A filter that matches nothing would pass.
    let listed = test().args(["--", "--list"]).output().context("cannot list the models")?;
    let models = String::from_utf8_lossy(&listed.stdout).matches(": test").count();
    if models == 0 {
        bail!("no test is named {filter}: nothing was checked");
    }
    say(format_args!("{models} models"));
    finish(&mut test())
}

fn deny() -> anyhow::Result<Ran> {
    if !needs::works("cargo", &["deny", "--version"]) {
        let why = "cargo-deny is not installed, and building it takes minutes: \
                   cargo install --locked cargo-deny";
        return Ok(Ran::Skip(why.into()));
    }
    finish(&mut cargo(["deny", "--workspace", "check", "bans", "licenses", "sources"]))?;
    if !needs::works("cargo", &["deny", "fetch", "db"]) {
        say("advisories are not checked: their database cannot be fetched from here");
        return Ok(Ran::Done);
    }
    finish(&mut cargo(["deny", "--workspace", "check", "advisories"]))
}

/// Runs a subcommand that moves memory, unless `doctor` says that nothing can be moved here.
fn with_engine(args: &[&str]) -> anyhow::Result<Ran> {
    finish(&mut cargo(["build", "--release", "-p", "pageferry-cli"]))?;
    let pageferry = target_dir().join("release/pageferry");
    let command = || {
        let mut command = Command::new(&pageferry);
        command.current_dir(root());
        command
    };
    let doctor = command().args(["doctor", "--json"]).output().context("cannot run doctor")?;
    if doctor.status.code() == Some(MISSING) {
        return Ok(Ran::Skip(
            "nothing can be moved on this machine; see `pageferry doctor`".into(),
        ));
    }
    finish(command().args(args))
}
