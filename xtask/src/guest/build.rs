//! Tests and the command as programs that need nothing but a kernel: linked statically.

use super::record::Test;
use crate::needs;
use crate::stage::{cargo, say, target_dir};
use anyhow::{Context as _, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the programs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// On x86-64, as this machine is.
    Here,
    /// On arm64: linked by clang with Debian's libraries for that (see [`needs::aarch64`]).
    Aarch64,
}

impl Target {
    fn triple(self) -> &'static str {
        match self {
            Self::Here => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }
}

/// Packages whose integration tests run in guests; of the second, those that begin so.
const LIBRARY: &str = "pageferry";
const COMMAND: &str = "pageferry-cli";
const COMMAND_TESTS: [&str; 2] = ["node_", "process_"];

/// One of them.
const COMMAND_TEST: &str = "process_nodes";

/// What was built.
#[derive(Debug, Default)]
pub(crate) struct Built {
    pub(crate) command: PathBuf,
    pub(crate) binaries: Vec<Binary>,
    /// The scratch folder that is compiled into the tests.
    pub(crate) scratch: PathBuf,
}

/// A test binary and its tests.
#[derive(Debug)]
pub(crate) struct Binary {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) tests: Vec<String>,
}

impl Built {
    /// The tests that run on a machine, if `filter` is part of their names.
    pub(crate) fn plan(&self, runs: impl Fn(&str) -> bool, filter: Option<&str>) -> Vec<Test> {
        let binaries = self.binaries.iter().filter(|b| runs(&b.name));
        let tests = binaries.flat_map(|b| {
            let binary = b.name.clone();
            b.tests.iter().map(move |name| Test { binary: binary.clone(), name: name.clone() })
        });
        tests.filter(|t| filter.is_none_or(|f| t.to_string().contains(f))).collect()
    }
}

/// Builds, with debug assertions and optimized (emulation is slow), in a target folder of its own
/// because the flags differ.
pub(crate) fn build(target: Target) -> anyhow::Result<Built> {
    let mut cargo = cargo(["test", "--no-run", "--message-format", "json-render-diagnostics"]);
    match target {
        Target::Here => cargo.args(["-p", LIBRARY, "-p", COMMAND, "--test", "*"]),
        // A test of the command, whichever: cargo builds the command for it.
        Target::Aarch64 => cargo
            .args(["-p", LIBRARY, "-p", COMMAND, "--test", "kernel_*"])
            .args(["--test", COMMAND_TEST]),
    };
    let (triple, target_dir) = (target.triple(), statically(&mut cargo, target));
    say("building statically linked tests");
    let out = cargo.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !out.status.success() {
        bail!("the tests cannot be built for the guests: cargo: {}", out.status);
    }
    let mut built = Built {
        command: PathBuf::new(),
        binaries: Vec::new(),
        scratch: target_dir.join(triple).join("tmp"),
    };
    for line in String::from_utf8_lossy(&out.stdout).lines() {
        let Some(artifact) = artifact(line) else { continue };
        let wanted = match artifact.package.as_str() {
            COMMAND => COMMAND_TESTS.iter().any(|start| artifact.name.starts_with(start)),
            package => package == LIBRARY,
        };
        if artifact.is_command {
            built.command = artifact.path;
        } else if wanted {
            let tests = match target {
                Target::Here => list(Command::new(&artifact.path))?,
                Target::Aarch64 if artifact.package == COMMAND => continue,
                Target::Aarch64 => list_here(&artifact.name)?,
            };
            built.binaries.push(Binary { name: artifact.name, path: artifact.path, tests });
        }
    }
    built.binaries.sort_by(|a, b| a.name.cmp(&b.name));
    if built.binaries.is_empty() || built.command.as_os_str().is_empty() {
        bail!("cargo named no test or no command that it built");
    }
    Ok(built)
}

/// Builds an example of the library, in the same way.
pub(crate) fn example(name: &str, target: Target) -> anyhow::Result<Binary> {
    let mut cargo = cargo(["build", "--quiet", "-p", LIBRARY, "--example", name]);
    let folder = statically(&mut cargo, target).join(target.triple());
    let path = folder.join("debug/examples").join(name);
    let status = cargo.status().context("cannot run cargo")?;
    if !status.success() {
        bail!("the example {name} cannot be built for the guests: cargo: {status}");
    }
    Ok(Binary { name: name.to_owned(), path, tests: Vec::new() })
}

/// How everything for the guests is built; returns the target folder.
fn statically(cargo: &mut Command, target: Target) -> PathBuf {
    let folder = target_dir().join("guest");
    cargo.args(["--target", target.triple(), "--target-dir"]).arg(&folder);
    let mut flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    flags += " -C target-feature=+crt-static";
    if target == Target::Aarch64 {
        cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", needs::CLANG);
        flags += " -C link-arg=--target=aarch64-linux-gnu -C link-arg=-fuse-ld=lld";
    }
    cargo.env("RUSTFLAGS", flags.trim());
    for profile in ["DEV", "TEST"] {
        cargo.env(format!("CARGO_PROFILE_{profile}_OPT_LEVEL"), "2");
        // Names of functions remain, for backtraces.
        cargo.env(format!("CARGO_PROFILE_{profile}_DEBUG"), "0");
        cargo.env(format!("CARGO_PROFILE_{profile}_STRIP"), "debuginfo");
    }
    folder
}

struct Artifact {
    package: String,
    name: String,
    is_command: bool,
    path: PathBuf,
}

/// An executable in a message of cargo (`cargo help build`, `--message-format`).
fn artifact(line: &str) -> Option<Artifact> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let path = PathBuf::from(message["executable"].as_str()?);
    let kind = message["target"]["kind"][0].as_str()?;
    let manifest = Path::new(message["manifest_path"].as_str()?);
    Some(Artifact {
        package: manifest.parent()?.file_name()?.to_str()?.to_owned(),
        name: message["target"]["name"].as_str()?.to_owned(),
        is_command: kind == "bin",
        path,
    })
}

/// The tests of a binary for another architecture: those that it has when built for this machine.
fn list_here(name: &str) -> anyhow::Result<Vec<String>> {
    let mut cargo = cargo(["test", "--quiet", "-p", LIBRARY, "--test", name, "--"]);
    cargo.stderr(Stdio::inherit());
    list(cargo)
}

/// The tests of a binary: it is asked here, since it runs on this machine too.
fn list(mut binary: Command) -> anyhow::Result<Vec<String>> {
    let name = binary.get_program().to_string_lossy().into_owned();
    let asked = binary.args(["--list", "--format", "terse"]).output();
    let out = asked.with_context(|| format!("cannot run {name}"))?;
    if !out.status.success() {
        bail!("{name} does not list its tests: {}", out.status);
    }
    let text = String::from_utf8_lossy(&out.stdout);
    let tests = text.lines().filter_map(|line| line.strip_suffix(": test"));
    Ok(tests.map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_among_cargos_messages() {
        let line = r#"{"reason":"compiler-artifact","manifest_path":"/w/crates/pageferry/Cargo.toml",
            "target":{"kind":["test"],"name":"moves"},"executable":"/t/moves-1"}"#;
        let found = artifact(line).expect("an executable");
        assert_eq!((found.package.as_str(), found.name.as_str()), ("pageferry", "moves"));
        assert!(!found.is_command && found.path == Path::new("/t/moves-1"));
        let library = line.replace(r#""/t/moves-1""#, "null");
        assert!(artifact(&library).is_none());
        assert!(artifact("not json").is_none());
    }

    #[test]
    fn a_filter_takes_binaries_and_tests_by_part_of_their_name() {
        let binary = |name: &str| Binary {
            name: name.into(),
            path: PathBuf::new(),
            tests: vec!["one_way".into(), "back".into()],
        };
        let built = Built {
            command: PathBuf::new(),
            binaries: vec![binary("moves"), binary("node_a")],
            scratch: PathBuf::new(),
        };
        let count = |runs: fn(&str) -> bool, filter| built.plan(runs, filter).len();
        assert_eq!(count(|_| true, None), 4);
        assert_eq!(count(|b| b == "moves", None), 2);
        assert_eq!(count(|_| true, Some("one")), 2);
        assert_eq!(count(|_| true, Some("node_a: back")), 1);
        assert_eq!(count(|_| true, Some("nothing")), 0);
    }
}
