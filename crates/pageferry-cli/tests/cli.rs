//! The command as a user meets it: output, exit codes, errors with a remedy.

use std::io::Read;
use std::process::{Command, Output, Stdio};

#[path = "../../pageferry-topology/tests/support/mod.rs"]
mod machines;
mod support;

use support::{PAGEFERRY, code, command, pageferry, stderr, stdout};

fn tree(machine: &str) -> String {
    let root = machines::unpack(machine);
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
    let root = machines::unpack("cxl");
    let path = root.path().to_str().expect("a plain path");
    let out = stdout(&pageferry(&["topology", "--json", "--root", path]).success());
    let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(json["schema_version"], 1);
    assert_eq!(json["machine"]["nodes"].as_array().map(Vec::len), Some(4));
    assert_eq!(json["machine"]["nodes"][2]["tier"], 20);
    assert_eq!(json["machine"]["cpus"][0]["caches"][3]["size_bytes"], 110_100_480);
}

#[test]
fn topology_shows_emulated_nodes_at_every_cpu_that_they_share() {
    let root = machines::unpack("small");
    machines::lay(
        root.path(),
        "sys/devices/system/node/node{0-1}/cpulist\t0-3\n\
         sys/devices/system/node/node{0-1}/distance\t10 10\n",
    );
    let out =
        stdout(&pageferry(&["topology", "--root", root.path().to_str().expect("plain")]).success());
    assert_eq!(out.matches("  node 0-1\n").count(), 2, "both caches:\n{out}");
    assert!(out.contains("node 1  8 MiB, 2 MiB free; CPUs 0-3\n"), "{out}");
}

#[test]
fn topology_counts_cores_and_shows_speeds_only_where_they_are_told() {
    let root = machines::unpack("small");
    machines::lay(
        root.path(),
        "sys/devices/system/cpu/cpu{0-3}/topology/core_cpus_list\t\n\
         -sys/devices/system/cpu/cpu0/cache/index3/size\n\
         sys/devices/system/node/node0/access1/initiators/read_bandwidth\t0\n\
         sys/devices/system/node/node0/access1/initiators/write_bandwidth\t900\n\
         sys/devices/system/node/node1/access1/initiators/read_bandwidth\t0\n\
         sys/devices/system/node/node1/access1/initiators/read_latency\t120\n",
    );
    let out =
        stdout(&pageferry(&["topology", "--root", root.path().to_str().expect("plain")]).success());
    assert_eq!(out.matches("  2 cores  ").count(), 2, "{out}");
    assert!(out.contains("size unknown"), "{out}");
    assert!(!out.contains("0.0 GB/s"), "{out}");
    assert_eq!(out.matches("by the firmware").count(), 1, "{out}");
    assert!(out.contains("; 120 ns by the firmware"), "{out}");
}

#[test]
fn a_file_that_cannot_be_read_is_told_once_with_the_reason_and_its_own_remedy() {
    let root = machines::unpack("small");
    let path = root.path().to_str().expect("a plain path");
    let online = "sys/devices/system/node/online";
    machines::lay(root.path(), &format!("-{online}\n"));
    let error = stderr(&pageferry(&["topology", "--root", path]).code(1)).replace(path, "ROOT");
    assert_eq!(error.matches(online).count(), 1, "{error}");
    assert!(error.contains("No such file") && error.contains("mount the whole sysfs"), "{error}");
    machines::lay(root.path(), &format!("{online}/\t\n"));
    let error = stderr(&pageferry(&["topology", "--root", path]).code(1)).replace(path, "ROOT");
    assert!(error.contains("Is a directory") && !error.contains("mount"), "{error}");
    let result = pageferry(&["doctor", "--root", path]);
    let out = String::from_utf8_lossy(&result.get_output().stdout);
    assert!(out.contains("which nodes there are cannot be told"), "{out}");
    assert!(!out.contains("one node"), "{out}");
}

#[test]
fn a_malformed_tree_is_an_error_with_reason_and_remedy() {
    let root = machines::unpack("two-sockets");
    machines::write(root.path(), "sys/devices/system/node/node1/distance", "far\n");
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
    let cases: [&[&str]; 12] = [
        &["topologi"],
        &["--color", "always", "topologi", "--json"],
        &["frobnicate"],
        &["topology", "--jsn"],
        &["doctor", "all"],
        &["bench", "--size", "12Q"],
        &["bench", "--only", "speed"],
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
        let last = error.lines().last().unwrap_or_default();
        assert!(last.trim_start().starts_with("remedy: "), "{error}");
        all += &format!("$ pageferry {}\n{error}", args.join(" "));
    }
    insta::assert_snapshot!(all);
}

#[test]
fn a_usage_error_ends_with_the_help_of_its_subcommand() {
    for (args, help) in [
        (&["bench", "--rounds"][..], "pageferry bench --help"),
        (&["--quiet", "--color", "never", "man", "--nothing"], "pageferry man --help"),
        (&["--color", "topology"], "pageferry --help"),
        (&["--nothing"], "pageferry --help"),
        (&["demo", "one", "two", "three", "--nothing"], "pageferry demo --help"),
    ] {
        let error = stderr(&pageferry(args).code(2));
        let last = error.lines().last().unwrap_or_default();
        assert!(last.ends_with(&format!("see `{help}`")), "{args:?}: {error}");
    }
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
fn man_pages_go_to_a_directory_that_is_there_or_whose_parent_is() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("man1");
    let text = path.to_str().expect("a plain path");
    let made = pageferry(&["man", "--out", text]).success();
    assert_eq!(stderr(&made), format!("made the directory {text}\n"));
    let again = pageferry(&["man", "--out", text]).success();
    assert_eq!(stderr(&again), "");
}

#[test]
fn man_pages_that_cannot_be_written_are_an_error_with_reason_and_remedy() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("file");
    std::fs::write(&file, "").expect("a file");
    let cases = [
        ("missing/man1", "does not exist", "mkdir -p"),
        ("file", "not a directory", "name a directory"),
        ("file/man1", "Not a directory", "name a directory"),
    ];
    for (path, because, remedy) in cases {
        let path = dir.path().join(path);
        let error = stderr(&pageferry(&["man", "--out", path.to_str().expect("a path")]).code(2));
        assert!(error.contains(path.to_str().expect("a path")), "{error}");
        let has = |head: &str, part: &str| {
            error.lines().any(|line| line.trim().starts_with(head) && line.contains(part))
        };
        assert!(has("because: ", because) && has("remedy: ", remedy), "{error}");
    }
    assert!(!dir.path().join("missing").exists(), "no parent is made");
}

#[test]
fn colours_are_used_when_asked_for_and_otherwise_not_in_a_pipe() {
    let root = machines::unpack("one-node");
    let path = root.path().to_str().expect("a plain path");
    let plain = stdout(&pageferry(&["topology", "--root", path]).success());
    assert!(!plain.contains('\u{1b}'), "{plain}");
    let coloured = stdout(&pageferry(&["--color", "always", "topology", "--root", path]).success());
    assert!(coloured.contains("\u{1b}["), "{coloured}");
    assert_eq!(anstream::adapter::strip_str(&coloured).to_string(), plain);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let root = machines::unpack("epyc-nps4");
    // The JSON of 256 CPUs is larger than a pipe holds, so the write does meet the closed end.
    let mut child = command(&["topology", "--json", "--root"])
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

/// Everything that writes to stdout without moving memory.
const WRITERS: [&[&str]; 8] = [
    &["topology"],
    &["topology", "--json"],
    &["doctor"],
    &["completions", "bash"],
    &["man"],
    &["bench", "--schema"],
    &["--help"],
    &["--version"],
];

/// Runs the command with a redirection that only a shell can make.
fn in_shell(args: &[&str], setup: &str, redirection: &str) -> Output {
    let script = format!("{setup} exec \"$@\" {redirection}");
    Command::new("sh")
        .args(["-c", &script, "sh"])
        .arg(&*PAGEFERRY)
        .args(args)
        .output()
        .expect("a shell")
}

#[test]
fn a_stdout_that_cannot_be_written_to_is_an_error_of_every_subcommand() {
    for (redirection, because) in
        [(">&-", "Bad file descriptor"), ("> /dev/full", "No space left on device")]
    {
        for args in WRITERS {
            let output = in_shell(args, "", redirection);
            let error = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{args:?} {redirection}: {error}");
            let expected = format!("error: cannot write to stdout\n  because: {because}");
            assert!(error.contains(&expected), "{args:?} {redirection}: {error}");
            assert!(error.contains("remedy: "), "{args:?} {redirection}: {error}");
        }
    }
}

#[test]
fn a_stdout_that_is_thrown_away_is_none() {
    for redirection in ["> /dev/null", "<> /dev/null >&0", "2>&- > /dev/null"] {
        for args in [&["topology"][..], &["--help"]] {
            let output = in_shell(args, "", redirection);
            assert_eq!(output.status.code(), Some(0), "{args:?} {redirection}");
        }
    }
}

#[test]
fn doctor_says_which_limit_leaves_no_room_for_an_engine() {
    // The limits of the shell are in force for doctor alone.
    for (limit, id, remedy) in [
        ("ulimit -n 6;", "limit-nofile", "ulimit -n"),
        ("ulimit -v 300000;", "limit-address-space", "ulimit -v"),
        ("ulimit -d 200000;", "limit-data", "ulimit -d"),
    ] {
        let output = in_shell(&["doctor", "--json"], limit, "");
        let error = String::from_utf8_lossy(&output.stderr);
        let json: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{limit} {error}"));
        let checks = json["checks"].as_array().expect("checks");
        let check = checks.iter().find(|check| check["id"] == id).expect(id);
        assert_eq!(check["status"], "missing", "{check}");
        assert!(check["found"].as_str().is_some_and(|found| found.contains("left of")), "{check}");
        assert!(check["remedy"].as_str().is_some_and(|text| text.contains(remedy)), "{check}");
        assert_eq!(output.status.code(), Some(3), "{limit} {check}");
    }
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
    assert_eq!(code(&result), Some(if missing { 3 } else { 0 }));
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
    let root = machines::unpack("two-sockets");
    let thp = "sys/kernel/mm/transparent_hugepage/enabled";
    machines::write(root.path(), thp, "always madvise [never]\n");
    machines::write(root.path(), "proc/sys/kernel/numa_balancing", "1\n");
    let path = root.path().to_str().expect("a plain path");
    let out = stdout(&pageferry(&["doctor", "--root", path]));
    for expected in ["never: no huge folios", "sysctl kernel.numa_balancing=0"] {
        assert!(out.contains(expected), "{out}");
    }
}
