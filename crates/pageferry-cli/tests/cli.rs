//! The command as a user meets it: output, exit codes, errors with a remedy.

use std::io::Read;
use std::process::{Command, Stdio};

use assert_cmd::assert::Assert;
use assert_cmd::cargo::cargo_bin;

#[path = "../../pageferry-topology/tests/support/mod.rs"]
mod support;

fn pageferry(args: &[&str]) -> Assert {
    assert_cmd::Command::new(cargo_bin("pageferry"))
        .args(args)
        .env_remove("NO_COLOR")
        .env_remove("COLUMNS")
        .assert()
}

fn stdout(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stdout).into_owned()
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

fn tree(machine: &str) -> String {
    let root = support::unpack(machine);
    let path = root.path().to_str().expect("a plain path");
    stdout(&pageferry(&["topology", "--root", path]).success())
}

#[test]
fn topology_shows_two_sockets() {
    insta::assert_snapshot!(tree("two-sockets"));
}

#[test]
fn topology_shows_every_ccx() {
    insta::assert_snapshot!(tree("epyc-nps4"));
}

#[test]
fn topology_shows_cxl_memory_as_a_slower_tier() {
    insta::assert_snapshot!(tree("cxl"));
}

#[test]
fn topology_shows_gpu_memory_and_nodes_without_memory() {
    insta::assert_snapshot!(tree("gh200"));
}

#[test]
fn topology_shows_one_node() {
    insta::assert_snapshot!(tree("one-node"));
}

#[test]
fn topology_shows_a_machine_without_numa() {
    insta::assert_snapshot!(tree("no-numa"));
}

#[test]
fn topology_json_is_versioned_and_complete() {
    let root = support::unpack("cxl");
    let path = root.path().to_str().expect("a plain path");
    let out = stdout(&pageferry(&["topology", "--json", "--root", path]).success());
    let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(json["schema_version"], 1);
    assert_eq!(json["machine"]["nodes"].as_array().map(Vec::len), Some(4));
    assert_eq!(json["machine"]["nodes"][2]["tier"], 20);
    assert_eq!(json["machine"]["cpus"][0]["caches"][3]["size_bytes"], 110_100_480);
}

#[test]
fn a_malformed_tree_is_an_error_with_reason_and_remedy() {
    let root = support::unpack("two-sockets");
    support::write(root.path(), "sys/devices/system/node/node1/distance", "far\n");
    let path = root.path().to_str().expect("a plain path");
    let result = pageferry(&["topology", "--root", path]).code(1);
    let error = stderr(&result).replace(path, "ROOT");
    insta::assert_snapshot!(error);
}

#[test]
fn help_names_the_subcommands_and_exit_codes() {
    insta::assert_snapshot!(stdout(&pageferry(&["--help"]).success()));
}

#[test]
fn bad_usage_exits_with_2_and_says_what_to_do() {
    let cases: [&[&str]; 7] = [
        &["topologi"],
        &["topology", "--jsn"],
        &["--color", "blue", "topology"],
        &["completions", "tcsh"],
        &["completions"],
        &["man", "--out"],
        &["topology", "--root", "/dev/null"],
    ];
    let mut all = String::new();
    for args in cases {
        let result = pageferry(args).code(2);
        assert_eq!(stdout(&result), "", "{args:?}");
        let error = stderr(&result);
        assert!(error.contains("remedy: "), "{error}");
        all += &format!("$ pageferry {}\n{error}", args.join(" "));
    }
    insta::assert_snapshot!(all);
}

#[test]
fn without_a_subcommand_help_goes_to_stderr_with_exit_code_2() {
    let result = pageferry(&[]).code(2);
    assert_eq!(stdout(&result), "");
    assert!(stderr(&result).contains("Usage: pageferry"));
}

#[test]
fn version_is_printed() {
    let expected = format!("pageferry {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(stdout(&pageferry(&["--version"]).success()), expected);
}

#[test]
fn completions_name_every_subcommand_for_every_shell() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = stdout(&pageferry(&["completions", shell]).success());
        for name in ["demo", "bench", "topology", "doctor", "man"] {
            assert!(script.contains(name), "{shell}: {name}");
        }
    }
}

#[test]
fn the_man_page_has_the_exit_codes() {
    let page = stdout(&pageferry(&["man"]).success());
    assert!(page.contains(".TH pageferry 1"), "{page}");
    assert!(page.contains("EXIT STATUS"), "{page}");
    for code in ["0", "1", "2", "3", "130"] {
        assert!(page.contains(&format!("\\fB{code}\\fR")), "{code}: {page}");
    }
}

#[test]
fn man_pages_are_written_for_every_subcommand() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("man1");
    pageferry(&["man", "--out", path.to_str().expect("a plain path")]).success();
    for name in ["pageferry", "pageferry-topology", "pageferry-doctor", "pageferry-bench"] {
        let page = std::fs::read_to_string(path.join(format!("{name}.1"))).expect("written");
        assert!(page.contains(&format!(".TH {name} 1")), "{page}");
    }
}

#[test]
fn man_pages_that_cannot_be_written_are_an_error_with_its_reason() {
    let error = stderr(&pageferry(&["man", "--out", "/dev/null/man"]).code(1));
    assert!(error.contains("/dev/null/man"), "{error}");
    assert!(error.contains("because: "), "{error}");
}

#[test]
fn colours_are_used_when_asked_for_and_otherwise_not_in_a_pipe() {
    let root = support::unpack("one-node");
    let path = root.path().to_str().expect("a plain path");
    let plain = stdout(&pageferry(&["topology", "--root", path]).success());
    assert!(!plain.contains('\u{1b}'), "{plain}");
    let coloured = stdout(&pageferry(&["--color", "always", "topology", "--root", path]).success());
    assert!(coloured.contains("\u{1b}["), "{coloured}");
    assert_eq!(anstream::adapter::strip_str(&coloured).to_string(), plain);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let root = support::unpack("epyc-nps4");
    // The JSON of 256 CPUs is larger than a pipe holds, so the write does meet the closed end.
    let mut child = Command::new(cargo_bin("pageferry"))
        .args(["topology", "--json", "--root"])
        .arg(root.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let mut pipe = child.stdout.take().expect("piped");
    pipe.read_exact(&mut [0; 1]).expect("it writes something");
    drop(pipe);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn doctor_agrees_with_its_exit_code_and_has_a_remedy_for_all_that_is_not_ok() {
    let result = pageferry(&["doctor", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&stdout(&result)).expect("JSON");
    let checks = json["checks"].as_array().expect("checks");
    for check in checks {
        let is_ok = check["status"] == "ok";
        assert_eq!(check["remedy"].is_null(), is_ok, "{check}");
        assert!(check["found"].as_str().is_some_and(|found| !found.is_empty()), "{check}");
    }
    let missing = checks.iter().any(|check| check["status"] == "missing");
    assert_eq!(result.get_output().status.code(), Some(if missing { 3 } else { 0 }));
    let mut ids: Vec<&str> = checks.iter().filter_map(|check| check["id"].as_str()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), checks.len(), "every check has a name of its own");
    for id in ["userfaultfd", "populate", "pagemap", "thp", "nodes", "cpus"] {
        assert!(ids.contains(&id), "{id} in {ids:?}");
    }
}

#[test]
fn doctor_warns_of_settings_in_a_replaced_tree() {
    let root = support::unpack("two-sockets");
    let thp = "sys/kernel/mm/transparent_hugepage/enabled";
    support::write(root.path(), thp, "always madvise [never]\n");
    support::write(root.path(), "proc/sys/kernel/numa_balancing", "1\n");
    let path = root.path().to_str().expect("a plain path");
    let out = stdout(&pageferry(&["doctor", "--root", path]));
    for expected in ["never: no huge folios", "sysctl kernel.numa_balancing=0"] {
        assert!(out.contains(expected), "{out}");
    }
}
