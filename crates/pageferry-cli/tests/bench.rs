//! `pageferry bench` as a user meets it: what it writes, and what it refuses before it begins.

use std::io::Read as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use assert_cmd::assert::Assert;
use serde_json::Value;

mod support;

use support::{code, command, pageferry, send, stderr, stdout};

fn bench(args: &[&str]) -> Assert {
    pageferry(&[&["bench"], args].concat())
}

/// Whether this machine lets an engine be built at all; says so if not.
fn can_move() -> bool {
    let probe = bench(&["--smoke", "--only", "memory"]);
    let ran = code(&probe) == Some(0);
    if !ran {
        eprintln!("skipped: no engine can be built here: {}", stderr(&probe));
    }
    ran
}

fn runs<'a>(results: &'a Value, scenario: &str) -> Vec<&'a Value> {
    let runs = results["runs"].as_array().expect("runs");
    runs.iter().filter(|run| run["scenario"] == scenario).collect()
}

#[test]
fn a_smoke_run_verifies_every_move_and_writes_json_and_a_page() {
    if !can_move() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let (json, html) = (dir.path().join("bench.json"), dir.path().join("bench.html"));
    let (json, html) = (json.to_str().expect("a path"), html.to_str().expect("a path"));
    let done = bench(&["--smoke", "--json", json, "--html", html]).success();
    let text = stdout(&done);
    assert!(text.contains("where this loses"), "{text}");
    assert!(text.contains("every word was read back and was right"), "{text}");

    let results = std::fs::read_to_string(json).expect("results");
    let results: Value = serde_json::from_str(&results).expect("JSON");
    assert_eq!(results["schema_version"], 1);
    assert_eq!(results["complete"], true);
    assert_eq!(results["failures"], serde_json::json!([]));
    assert!(results["machine"]["cpus"].as_u64() >= Some(1));
    for scenario in [
        "memory",
        "roofline",
        "copy",
        "sequential",
        "move",
        "move_default",
        "move_unpromised",
        "exchange",
        "exchange_sequential",
        "one_way",
        "first_folio",
        "single",
        "busy",
        "one_cpu",
        "feel",
        "feel_idle",
        "feel_burn",
    ] {
        assert!(!runs(&results, scenario).is_empty(), "no run of {scenario}");
    }
    for run in results["runs"].as_array().expect("runs") {
        let moves = run["frames"].is_string() && run["scenario"] != "move_pages";
        assert!(!moves || run["verified"] == true, "{run}");
    }
    let spread = &runs(&results, "move")[0]["gb_per_s"];
    let at = |key: &str| spread[key].as_f64().expect("a number");
    assert!(0.0 < at("min") && at("min") <= at("median") && at("median") <= at("max"));
    for ratio in [
        "move_4k_over_roofline",
        "move_4k_over_sequential",
        "unpromised_4k_over_roofline",
        "one_way_4k_over_sequential",
        "exchange_4k_over_sequential",
        "exchange_4k_over_roofline",
        "single_4k_over_sequential",
        "engine_metadata_over_managed",
    ] {
        assert!(results["ratios"][ratio].as_f64().is_some(), "no {ratio}");
    }
    let feel = runs(&results, "feel")[0];
    assert!(feel["readers"]["latency_us"]["p999"].as_f64().is_some(), "{feel}");
    assert!(feel["stall_us"]["count"].as_u64() > Some(0), "{feel}");
    for who in ["readers", "writers"] {
        let share = |key: &str| feel[who][key].as_f64().expect("a share");
        assert!((0.0..=share("stalled_share")).contains(&share("preempted_share")), "{feel}");
    }
    let explained = "no CPU: the part of it in which another thread had the CPU";
    assert!(text.contains("> 20 us: share of the time") && text.contains(explained), "{text}");

    let page = std::fs::read_to_string(html).expect("a page");
    assert!(page.contains("<svg") && page.contains("prefers-color-scheme"));
    assert!(page.contains("time in &gt; 20 us") && page.contains("exchange:"));
    assert!(!page.contains("<script") && !page.contains("src=") && !page.contains("href="));
    assert!(!page.contains("NaN"));
}

#[test]
fn an_exchange_moves_both_sets_of_each_folio_size() {
    if !can_move() {
        return;
    }
    let done = bench(&["--smoke", "--only", "moves", "--json"]).success();
    let results: Value = serde_json::from_str(&stdout(&done)).expect("nothing but JSON");
    let nodes = results["machine"]["nodes"].as_u64().expect("a number");
    let how = if nodes > 1 { "between nodes" } else { "frame to frame" };
    let mut sizes = vec![4096];
    if results["machine"]["thp"] == "never" || results["machine"]["thp"] == "none" {
        eprintln!("skipped: exchanges of 2M folios: transparent huge pages are off");
    } else {
        sizes.push(2 << 20);
    }
    for size in sizes {
        let of_size = |run: &&&Value| run["folio_bytes"] == size;
        let exchanges = runs(&results, "exchange");
        let run = exchanges.iter().find(of_size).expect("an exchange");
        assert_eq!(run["verified"], true, "{run}");
        assert_eq!(run["frames"], "recycled", "{run}");
        let note = run["note"].as_str().expect("a note");
        // "not moved" would follow if pages had stayed.
        assert!(note.contains(how) && !note.contains("not moved"), "{run}");
        assert!(run["gb_per_s"]["median"].as_f64() > Some(0.0), "{run}");
    }
}

#[test]
fn json_without_a_file_goes_to_stdout_alone() {
    if !can_move() {
        return;
    }
    let done = bench(&["--smoke", "--only", "roofline", "--json"]).success();
    let results: Value = serde_json::from_str(&stdout(&done)).expect("nothing but JSON");
    assert!(!runs(&results, "roofline").is_empty());
    assert!(runs(&results, "move").is_empty());
    assert_eq!(results["settings"]["scenarios"], serde_json::json!(["roofline"]));
}

#[test]
fn the_schema_is_printed_and_names_the_fields_of_the_results() {
    let done = bench(&["--schema"]).success();
    let schema: Value = serde_json::from_str(&stdout(&done)).expect("JSON");
    for field in ["machine", "runs", "ratios", "targets", "losses"] {
        assert!(schema["properties"][field].is_object(), "{field}");
    }
}

#[test]
fn an_interrupted_run_reports_what_it_has_and_says_that_it_is_not_all() {
    if !can_move() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let json = dir.path().join("bench.json");
    let run = ["bench", "--smoke", "--rounds", "1000", "--only", "memory,copy", "--json"];
    let mut child = command(&run)
        .arg(&json)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    // Once it has threads, it has long installed its handler of signals.
    let tasks = format!("/proc/{}/task", child.id());
    while std::fs::read_dir(&tasks).is_ok_and(|tasks| tasks.count() < 2) {
        std::thread::sleep(Duration::from_millis(5));
    }
    send("INT", &child);
    let patience = Instant::now() + Duration::from_secs(60);
    let status = loop {
        match child.try_wait().expect("a child") {
            Some(status) => break status,
            None if Instant::now() > patience => {
                child.kill().expect("a child");
                panic!("it did not stop");
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let mut text = String::new();
    child.stdout.take().expect("a pipe").read_to_string(&mut text).expect("text");
    assert_eq!(status.code(), Some(130), "{text}");
    assert!(text.contains("cut short"), "{text}");
    let results = std::fs::read_to_string(&json).expect("results");
    let results: Value = serde_json::from_str(&results).expect("JSON");
    assert_eq!(results["complete"], false);
}

#[test]
fn bad_options_are_refused_with_a_remedy_before_anything_runs() {
    for (args, part) in [
        (&["--size", "4K"][..], "too small"),
        (&["--size", "900T"], "does not fit"),
        (&["--seconds", "0"], "--seconds 0"),
        (&["--html", "/nonexistent/page.html"], "cannot write"),
        (&["--only", "speed"], "speed"),
        (&["--size", "12Q"], "12Q"),
        (&["--rounds", "0"], "0"),
    ] {
        let refused = bench(args).code(2);
        let text = stderr(&refused);
        assert!(text.contains(part) && text.contains("remedy:"), "{args:?}: {text}");
        assert_eq!(stdout(&refused), "");
    }
}
