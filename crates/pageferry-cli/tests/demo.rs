//! The demo as its users run it, with small corpora.

use assert_cmd::assert::{Assert, OutputAssertExt as _};
use serde_json::Value;
use std::error::Error;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

mod support;

use support::{
    PAGEFERRY, TERM, code, command, pageferry, send, signals, stderr, stdout, stop_signals,
};

type Result = std::result::Result<(), Box<dyn Error>>;

/// Whether this kernel lets this user watch page faults at all; says so if not.
fn can_move() -> bool {
    let offered = pageferry_sys::uffd::Uffd::offered(pageferry::Rights::UserModeOnly);
    if let Err(errno) = &offered {
        eprintln!("skipped: no userfaultfd here: {errno}");
    }
    offered.is_ok()
}

fn demo(args: &[&str]) -> Assert {
    pageferry(&[&["demo"], args].concat())
}

/// A demo under way.
fn start(args: &[&str]) -> std::io::Result<Child> {
    let mut command = command(&[&["demo"], args].concat());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
}

/// The report of a demo that was asked to stop, when it has.
fn cancelled_report(demo: Child) -> std::result::Result<(Value, Assert), Box<dyn Error>> {
    let ended = demo.wait_with_output()?.assert().code(130);
    let report: Value = serde_json::from_str(&stdout(&ended))?;
    assert_eq!(report["cancelled"], true);
    Ok((report, ended))
}

/// A folder with a little text and something that is none.
fn folder() -> std::io::Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    for i in 0..40 {
        let text: String = (0..400)
            .map(|j| format!("page {} of folio {} on node {}\n", j, i * j, i % 4))
            .collect();
        std::fs::write(folder.path().join(format!("{i}.txt")), text)?;
    }
    std::fs::write(folder.path().join("picture"), [0u8, 1, 2, 3])?;
    Ok(folder)
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap_or_default()
}

/// Runs it for a second and checks what must be true of every report.
fn report(extra: &[&str]) -> std::result::Result<Value, Box<dyn Error>> {
    let folder = folder()?;
    let mut args = vec![path(folder.path()), "--size", "6M", "--seconds", "1", "--json"];
    args.extend(extra);
    let done = demo(&args).success();
    let report: Value = serde_json::from_str(&stdout(&done))?;
    assert_eq!(report["schema_version"], 1);
    assert_eq!(report["text"]["files"], 40);
    assert_eq!(report["text"]["not_text"], 1);
    assert!(report["index"]["editions"].as_f64() > Some(1.0), "a small text goes in often");
    assert!(report["index"]["bytes"].as_u64() >= Some(6 << 20), "{report}");
    for way in ["moved", "one_folio_at_a_time"] {
        assert!(report[way]["bytes"].as_u64() > Some(0), "{way}: {report}");
        let holes = &report[way]["holes"];
        let at = |quantile: &str| holes[quantile].as_f64();
        assert!(at("p50_us") > Some(0.0), "{way}: {report}");
        assert!(at("p50_us") <= at("p99_us") && at("p99_us") <= at("max_us"), "{way}: {report}");
        assert!(holes["within_budget"].as_u64() <= holes["count"].as_u64(), "{way}: {report}");
    }
    assert!(report["stall_budget_us"].as_f64() > Some(0.0));
    for phase in ["not_moving", "burnt_cpu", "moving", "one_folio_at_a_time"] {
        let operations = report["queries"][phase]["operations"].as_u64();
        assert!(operations > Some(0), "{phase}: {report}");
    }
    work_is_equal(&report);
    for cpus in ["cpus_moving", "cpus_burnt"] {
        assert!(report["burnt_cpu"][cpus].as_f64() > Some(0.0), "{cpus}: {report}");
    }
    assert!(report["moved"]["bytes"].as_u64() >= report["index"]["bytes"].as_u64());
    assert!(report["answers"]["compared"].as_u64() > Some(0));
    assert_eq!(report["answers"]["differing"], 0, "{report}");
    assert!(report["scan"]["positions"].as_u64() > Some(100_000));
    assert_eq!(report["scan"]["differing"], 0, "{report}");
    let pages = &report["physical_pages"];
    if pages["hidden"] == false {
        assert!(pages["changed"].as_u64() > Some(0), "{pages}");
    }
    for size in ["base", "huge"] {
        let (there, moved) = (&pages[size]["present_bytes"], &pages[size]["moved_bytes"]);
        assert!(moved.as_u64() <= there.as_u64(), "{pages}");
        assert_eq!(moved == 0, there == 0, "what is there moves: {pages}");
    }
    assert_eq!(report["cancelled"], false);
    Ok(report)
}

/// Rows whose latencies are compared did the same work: counted, not timed.
fn work_is_equal(report: &Value) {
    let work = &report["equal_work"];
    let count = |value: &Value| value.as_u64().unwrap_or_default();
    let rounds = count(&work["rounds"]);
    assert!(rounds >= 2 && rounds.is_multiple_of(2), "there and back: {work}");
    for (kind, per_round) in [("queries", "queries_per_round"), ("updates", "updates_per_round")] {
        let each = count(&work[per_round]);
        assert!(each > 0, "{work}");
        for phase in ["not_moving", "burnt_cpu", "moving", "one_folio_at_a_time"] {
            let row = &report[kind][phase];
            assert_eq!(count(&row["operations"]), each * rounds, "{kind}, {phase}: {row}");
            assert_eq!(row["rounds"].as_array().map(|r| r.len() as u64), Some(rounds), "{row}");
            let spread = &row["p99_spread_us"];
            let at = |name: &str| spread[name].as_f64();
            assert!(at("min") <= at("median") && at("median") <= at("max"), "{spread}");
        }
    }
    let bytes = count(&work["bytes_per_round"]);
    assert!(bytes > 0 && count(&work["steps_per_round"]) > 0, "{work}");
    for way in ["moving", "one_folio_at_a_time"] {
        let paced = &work[way];
        let all = paced["bytes"].as_array().cloned().unwrap_or_default();
        assert_eq!(all, vec![Value::from(bytes); all.len()], "{way}: {work}");
        assert_eq!(all.len() as u64, rounds, "{way}: {work}");
        assert_eq!(count(&paced["steps"]), rounds * count(&work["steps_per_round"]), "{work}");
    }
}

#[test]
fn an_index_that_moves_answers_like_one_that_does_not() -> Result {
    if can_move() {
        report(&[])?;
    }
    Ok(())
}

#[test]
fn in_user_mode_only_form_it_does_the_same() -> Result {
    if can_move() {
        let report = report(&["--user-mode-only"])?;
        assert_eq!(report["user_mode_only"], true);
    }
    Ok(())
}

#[test]
fn huge_and_base_folios_in_one_region_move_together() -> Result {
    if can_move() {
        let report = report(&["--folios", "mixed"])?;
        let pages = &report["physical_pages"];
        assert!(pages["base"]["moved_bytes"].as_u64() > Some(0), "{pages}");
        if pages["huge"]["present_bytes"] == 0 {
            eprintln!("skipped: the kernel gave no huge page, so that only base pages moved");
        }
    }
    Ok(())
}

#[test]
fn a_tiny_text_goes_in_a_limited_number_of_times_and_the_report_says_so() -> Result {
    if !can_move() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("tiny.txt"), "a page of a folio on a node")?;
    let args = [path(folder.path()), "--size", "32M", "--seconds", "1"];
    let done = demo(&[&args[..], &["--json"]].concat()).success();
    let report: Value = serde_json::from_str(&stdout(&done))?;
    let index = &report["index"];
    assert_eq!(index["editions"], 1000.0, "{index}");
    assert_eq!(index["text_used_up"], true);
    assert!(index["bytes"].as_u64() < index["wanted_bytes"].as_u64(), "{index}");
    assert!(report["moved"]["bytes"].as_u64() > Some(0));
    assert_eq!(report["scan"]["positions"].as_u64().map(|n| n > 0), Some(true));
    assert_eq!(report["scan"]["differing"], 0);
    let text = stdout(&demo(&args));
    let said = text.lines().filter(|line| line.contains("there is too little for 32 MiB"));
    assert_eq!(said.count(), 1, "{text}");
    Ok(())
}

#[test]
fn people_get_a_report_on_stdout_and_no_progress_in_a_pipe() -> Result {
    if !can_move() {
        return Ok(());
    }
    let folder = folder()?;
    let done = demo(&[path(folder.path()), "--size", "4M", "--seconds", "1"]).success();
    let text = stdout(&done);
    for line in [
        "text  ",
        "index  ",
        "region  ",
        "route  ",
        "How long queries took",
        "How long updates took",
        "In short",
    ] {
        assert!(text.lines().any(|l| l.starts_with(line)), "{line} in {text}");
    }
    assert_eq!(text.matches("none differs").count(), 2, "{text}");
    assert!(!text.contains('\u{1b}'), "no escape sequences in a pipe");
    let notices = stderr(&done);
    assert!(notices.lines().all(|l| l.starts_with("notice:")), "{notices}");
    Ok(())
}

#[test]
fn each_signal_that_asks_it_to_stop_ends_it_with_a_report() -> Result {
    if !can_move() {
        return Ok(());
    }
    let folder = folder()?;
    for signal in stop_signals() {
        let demo = start(&[path(folder.path()), "--size", "4M", "--seconds", "600", "--json"])?;
        let (pid, limit) = (demo.id(), Instant::now() + Duration::from_secs(60));
        while !has_thread(pid, "demo-update") && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(20));
        }
        send(signal, &demo);
        let (report, _) = cancelled_report(demo)?;
        assert_eq!(report["scan"]["differing"], 0, "SIG{signal}");
    }
    Ok(())
}

#[test]
fn sigint_while_text_is_read_ends_it_with_a_report_too() -> Result {
    if !can_move() {
        return Ok(());
    }
    // Files that are looked at and not taken: they take far longer than sending a signal.
    let folder = tempfile::tempdir()?;
    let binary = folder.path().join("binary");
    std::fs::write(&binary, [0u8; 64])?;
    for i in 0..20_000 {
        std::fs::hard_link(&binary, folder.path().join(i.to_string()))?;
    }
    let demo = start(&[path(folder.path()), "--size", "4M", "--seconds", "600", "--json"])?;
    let (pid, limit) = (demo.id(), Instant::now() + Duration::from_secs(60));
    // The last signal for which the program installs a handler.
    while signals(pid, "SigCgt") & TERM == 0 && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(1));
    }
    send("INT", &demo);
    let (report, ended) = cancelled_report(demo)?;
    assert_eq!(report["schema_version"], 1);
    assert_eq!(report["index"]["documents"], 0);
    assert_eq!(report["moved"]["bytes"], 0);
    assert!(stderr(&ended).contains("cancelled while reading"), "{}", stderr(&ended));
    Ok(())
}

fn has_thread(pid: u32, name: &str) -> bool {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let mut names = tasks.flatten().map(|t| std::fs::read_to_string(t.path().join("comm")));
    names.any(|n| n.is_ok_and(|n| n.trim() == name))
}

/// Bad input is refused with what, why and what to do, and exit code 2.
fn refused(args: &[&str], what: &str, because: &str) -> Result {
    let refused = demo(args);
    let said = stderr(&refused);
    assert_eq!(code(&refused), Some(2), "{args:?}: {said}");
    assert_eq!(stdout(&refused), "", "{args:?}");
    assert!(said.contains(what), "{args:?}: {what} in {said}");
    assert!(said.contains(because), "{args:?}: {because} in {said}");
    assert!(said.contains("remedy:"), "{args:?}: {said}");
    Ok(())
}

#[test]
fn a_folder_that_cannot_be_indexed_is_refused() -> Result {
    let folder = folder()?;
    let missing = folder.path().join("missing");
    refused(&[path(&missing)], path(&missing), "No such file or directory")?;
    let file = folder.path().join("1.txt");
    refused(&[path(&file)], path(&file), "not a folder")?;
    refused(&["--folios", "giant"], "giant", "base, huge, mixed")
}

#[test]
fn a_folder_without_text_is_refused() -> Result {
    if !can_move() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    refused(&[path(folder.path())], "no text", "0 files are not text")?;
    std::fs::write(folder.path().join("picture"), [0u8, 1, 2, 3])?;
    std::fs::write(folder.path().join("dots"), "... --- ...")?;
    refused(&[path(folder.path())], path(folder.path()), "1 files are not text")
}

#[test]
fn nonsense_numbers_are_refused() -> Result {
    for size in ["0", "1K", "lots", "12Q", "-1", "100G", "99999999999999999999"] {
        refused(&[&format!("--size={size}")], "--size", size)?;
    }
    for seconds in ["0", "-1", "soon", "1000000000"] {
        refused(&[&format!("--seconds={seconds}")], "--seconds", seconds)?;
    }
    refused(&["--threads=0"], "--threads", "0")?;
    refused(&["/etc", "/usr"], "/usr", "unexpected")
}

#[test]
fn more_memory_than_there_is_is_refused_with_a_size_that_fits() -> Result {
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let total = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib: Option<u64> = total.and_then(|t| t.trim().strip_suffix("kB")?.trim().parse().ok());
    if kib.is_none_or(|kib| kib > 128 << 20) {
        eprintln!("skipped: this machine may have memory for the largest index");
        return Ok(());
    }
    refused(&["--size=64G"], "not enough memory for an index of 64 GiB", "available")
}

#[test]
fn a_limit_of_address_space_is_named_before_anything_is_tried() -> Result {
    for (flag, what) in [("-v", "address space"), ("-d", "data memory")] {
        // In KiB: from hardly more than the program itself to far more than a small index.
        for limit in ["60000", "200000", "600000"] {
            let script = "ulimit \"$1\" \"$2\" && exec \"$0\" demo --size 4M --json";
            let arguments = [script, PAGEFERRY.as_str(), flag, limit];
            let refused = Command::new("sh").arg("-c").args(arguments).output()?.assert();
            let said = stderr(&refused);
            assert_eq!(code(&refused), Some(2), "{flag} {limit}: {said}");
            assert_eq!(stdout(&refused), "", "{flag} {limit}");
            let what = format!("not enough {what} for an index of 4 MiB");
            for part in [what, format!("ulimit {flag}"), "remedy: raise the limit".to_owned()] {
                assert!(said.contains(&part), "{flag} {limit}: {part} in {said}");
            }
        }
    }
    Ok(())
}
