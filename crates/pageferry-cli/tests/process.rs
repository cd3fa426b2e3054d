//! `where`, `move` and `migratepages` as a user meets them: what they print, how they end, what
//! they say of bad input. What takes two nodes is in `process_nodes.rs`.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use assert_cmd::assert::Assert;
use pageferry_topology::Machine;
use serde_json::Value;

mod support;

use support::{
    HUP, PAGEFERRY, TERM, command, pageferry, send, signals, stderr, stdout, stop_signals,
};

fn json(assert: &Assert) -> Value {
    serde_json::from_str(&stdout(assert)).expect("JSON")
}

fn sum(list: &Value, field: &str) -> u64 {
    list.as_array().expect("a list").iter().filter_map(|entry| entry[field].as_u64()).sum()
}

/// A program that sleeps, and ends with the test.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        let child = Self(Command::new("sleep").arg("600").spawn().expect("sleep"));
        // Until it sleeps it is still this program, or maps its libraries.
        while !child.is_asleep() {
            std::thread::yield_now();
        }
        child
    }

    fn is_asleep(&self) -> bool {
        let file = |name| fs::read_to_string(format!("/proc/{}/{name}", self.0.id()));
        file("comm").is_ok_and(|comm| comm == "sleep\n")
            && file("stat").is_ok_and(|stat| stat.contains(") S "))
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether pages can be asked for at all, and there is one node with memory, as in the snapshots;
/// says so if not.
fn is_one_node() -> bool {
    let machine = Machine::read().expect("a machine");
    let asked = pageferry(&["where", &std::process::id().to_string(), "--only", "stack"]);
    let works = asked.get_output().status.success();
    if !works {
        eprintln!("skipped: this kernel does not tell pages' nodes: {}", stderr(&asked));
    } else if machine.memory_nodes().count() > 1 {
        eprintln!("skipped: the snapshot is of a machine with one node");
    }
    works && machine.memory_nodes().count() == 1
}

/// The text with numbers, sizes and times left out, which differ from run to run, and blanks
/// joined, whose number depends on them.
fn redact(text: &str) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "us", "ms", "s"];
    let word = |word: &str| {
        let bare = word.trim_end_matches([';', ',', ':']);
        let end = &word[bare.len()..];
        let is_address = bare.split_once('-').is_some_and(|(start, stop)| {
            [start, stop].iter().all(|a| a.len() > 6 && u64::from_str_radix(a, 16).is_ok())
        });
        let digits = |c: char| c.is_ascii_digit() || c == '.' || c == '<';
        if is_address {
            format!("ADDRESSES{end}")
        } else if !bare.is_empty() && bare.chars().all(digits) {
            format!("N{end}")
        } else if units.contains(&bare) {
            format!("UNIT{end}")
        } else {
            word.chars().filter(|c| !('▁'..='█').contains(c) && !('▉'..='▏').contains(c)).collect()
        }
    };
    let line = |line: &str| line.split_whitespace().map(word).collect::<Vec<_>>().join(" ");
    text.lines().map(|l| line(l).trim_end().to_owned() + "\n").collect()
}

#[test]
fn where_shows_nodes_kinds_page_sizes_and_the_largest_mappings() {
    if !is_one_node() {
        return;
    }
    let sleeper = Sleeper::start();
    let shown = pageferry(&["where", &sleeper.pid(), "--only", "stack,heap"]).success();
    assert_eq!(stderr(&shown), "");
    insta::assert_snapshot!(redact(&stdout(&shown)));
}

#[test]
fn what_where_tells_adds_up() {
    if !is_one_node() {
        return;
    }
    let sleeper = Sleeper::start();
    let told = json(&pageferry(&["where", "--json", "--top", "3", &sleeper.pid()]).success());
    assert_eq!(told["schema_version"], 1);
    assert_eq!(told["processes"], 1);
    let present = told["present_bytes"].as_u64().expect("a number");
    assert!(present > 0, "{told}");
    let unknown = told["unknown_bytes"].as_u64().expect("a number");
    assert_eq!(sum(&told["holdings"], "bytes") + unknown, present, "{told}");
    assert_eq!(sum(&told["nodes"], "bytes") + unknown, present, "{told}");
    assert_eq!(told["top"].as_array().map(Vec::len), Some(3));
    for mapping in told["top"].as_array().expect("a list") {
        assert_eq!(sum(&mapping["nodes"], "bytes"), mapping["bytes"].as_u64().expect("a number"));
    }
}

#[test]
fn a_name_or_a_kind_chooses_mappings() {
    if !is_one_node() {
        return;
    }
    let sleeper = Sleeper::start();
    let told = json(&pageferry(&["where", "--json", "--file", "*/ld*", &sleeper.pid()]).success());
    for mapping in told["top"].as_array().expect("a list") {
        assert!(mapping["name"].as_str().is_some_and(|name| name.contains("/ld")), "{mapping}");
    }
    let told = json(&pageferry(&["where", "--json", "--only", "file", &sleeper.pid()]).success());
    let kinds: Vec<_> = told["holdings"].as_array().expect("a list").iter().collect();
    assert!(!kinds.is_empty() && kinds.iter().all(|h| h["kind"] == "file"), "{told}");
}

#[test]
fn watching_ends_with_the_process() {
    if !is_one_node() {
        return;
    }
    let sleeper = Sleeper::start();
    let mut watch = command(&["where", "--watch=0.1", "--json", &sleeper.pid()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let mut lines = BufReader::new(watch.stdout.take().expect("piped")).lines();
    for _ in 0..2 {
        let line = lines.next().expect("it looks again").expect("text");
        let told: Value = serde_json::from_str(&line).expect("one document on a line");
        assert!(told["present_bytes"].as_u64() > Some(0), "{told}");
    }
    let pid = sleeper.pid();
    drop(sleeper);
    // What it is writing must not wait for us.
    let rest = std::thread::spawn(move || lines.count());
    let output = watch.wait_with_output().expect("it ends");
    rest.join().expect("read to the end");
    assert_eq!(output.status.code(), Some(0));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(error, format!("process {pid} has ended\n"));
}

#[test]
fn watching_ends_quietly_when_its_reader_has_gone() {
    if !is_one_node() {
        return;
    }
    let sleeper = Sleeper::start();
    for json in [&[][..], &["--json"]] {
        let args = ["where", "--watch=0.1", "--only", "stack", &sleeper.pid()];
        let mut watch = command(&[&args[..], json].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let mut lines = BufReader::new(watch.stdout.take().expect("piped")).lines();
        lines.next().expect("it looks").expect("text");
        drop(lines);
        let output = watch.wait_with_output().expect("it ends");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), &*error), (Some(0), ""), "{json:?}");
    }
}

#[test]
fn watching_ends_with_the_last_process_of_a_cgroup() {
    if !is_one_node() {
        return;
    }
    let sleeper = Sleeper::start();
    let folder = tempfile::tempdir().expect("a folder");
    let procs = folder.path().join("cgroup.procs");
    fs::write(&procs, sleeper.pid() + "\n").expect("a file");
    // Seen from the current folder.
    let mut watch = command(&["where", "--watch=0.1", "--json", "--cgroup", "."])
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let mut lines = BufReader::new(watch.stdout.take().expect("piped")).lines();
    let line = lines.next().expect("it looks").expect("text");
    let told: Value = serde_json::from_str(&line).expect("one document on a line");
    assert_eq!(told["processes"], 1, "{told}");
    fs::write(&procs, "").expect("a file");
    // What it is writing must not wait for us.
    let rest = std::thread::spawn(move || lines.count());
    let output = watch.wait_with_output().expect("it ends");
    rest.join().expect("read to the end");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), &*error), (Some(0), "no process is left\n"));
}

#[test]
fn watching_stops_on_each_signal_that_asks_for_it() {
    if !is_one_node() {
        return;
    }
    let sleeper = Sleeper::start();
    for signal in stop_signals() {
        let mut watch = command(&["where", "--watch=3600", "--json", &sleeper.pid()])
            .stdout(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let mut lines = BufReader::new(watch.stdout.take().expect("piped")).lines();
        lines.next().expect("it looks").expect("text");
        send(signal, &watch);
        assert_eq!(watch.wait().expect("it ends").code(), Some(130), "SIG{signal}");
    }
}

#[test]
fn under_nohup_a_terminal_that_closes_stops_nothing() {
    if !is_one_node() {
        return;
    }
    let sleeper = Sleeper::start();
    let script = "trap '' HUP; exec \"$0\" where --watch=3600 --json \"$1\"";
    let mut watch = Command::new("sh")
        .args(["-c", script, PAGEFERRY.as_str(), &sleeper.pid()])
        .stdout(Stdio::piped())
        .spawn()
        .expect("a shell");
    let mut lines = BufReader::new(watch.stdout.take().expect("piped")).lines();
    lines.next().expect("it looks").expect("text");
    let [handled, ignored] = ["SigCgt", "SigIgn"].map(|which| signals(watch.id(), which));
    send("TERM", &watch);
    assert_eq!(watch.wait().expect("it ends").code(), Some(130));
    assert_eq!((handled & (HUP | TERM), ignored & HUP), (TERM, HUP));
}

#[test]
fn on_one_node_everything_is_already_there() {
    if !is_one_node() {
        return;
    }
    let sleeper = Sleeper::start();
    let node = Machine::read().expect("a machine").memory_nodes().next().expect("a node").id;
    let (pid, node) = (sleeper.pid(), node.to_string());
    let moved = pageferry(&["move", "--pid", &pid, "--to", &node, "--only", "stack"]).success();
    assert_eq!(stderr(&moved), "");
    insta::assert_snapshot!(redact(&stdout(&moved)));
    let told = json(&pageferry(&["move", "--pid", &pid, "--to", &node, "--json"]).success());
    let looked_at = told["bytes_looked_at"].as_u64().expect("a number");
    assert!(looked_at > 0 && told["complete"] == true, "{told}");
    assert_eq!(sum(&told["lines"], "bytes"), looked_at, "{told}");
    assert_eq!(told["outcomes"][0]["outcome"], "already_there", "{told}");
    assert_eq!((&told["bytes_moved"], &told["calls"]["count"]), (&0.into(), &0.into()), "{told}");
}

#[test]
fn a_dry_run_says_that_nothing_would_move_on_one_node() {
    if !is_one_node() {
        return;
    }
    let sleeper = Sleeper::start();
    let node = Machine::read().expect("a machine").memory_nodes().next().expect("a node").id;
    let args = ["move", "--pid", &sleeper.pid(), "--to", &node.to_string(), "--only", "stack"];
    let shown = pageferry(&[&args[..], &["--dry-run"]].concat()).success();
    insta::assert_snapshot!(redact(&stdout(&shown)));
    let told = json(&pageferry(&[&args[..], &["--dry-run", "--json"]].concat()).success());
    assert_eq!((&told["dry_run"], &told["estimate"]["bytes"]), (&true.into(), &0.into()), "{told}");
}

#[test]
fn children_are_looked_at_when_asked_for() {
    if !is_one_node() {
        return;
    }
    let sleeper = Sleeper::start();
    let me = std::process::id().to_string();
    let alone = json(&pageferry(&["where", "--json", &me]).success());
    let family = json(&pageferry(&["where", "--json", "--children", &me]).success());
    drop(sleeper);
    assert_eq!(alone["processes"], 1);
    assert!(family["processes"].as_u64() > Some(1), "{family}");
}

#[test]
fn migratepages_is_silent_and_reads_nodes_as_numactl_does() {
    if !is_one_node() {
        return;
    }
    let sleeper = Sleeper::start();
    let hexadecimal = format!("{:#x}", sleeper.0.id());
    for (pid, from, to) in [
        (sleeper.pid(), "all", "all"),
        (hexadecimal, "+0", "+0"),
        (sleeper.pid(), "all", "+0"),
        (sleeper.pid(), "!0", "0"),
        (sleeper.pid(), "!all", "all"),
    ] {
        let done = pageferry(&["migratepages", &pid, from, to]).success();
        assert_eq!((stdout(&done), stderr(&done)), (String::new(), String::new()), "{from} {to}");
    }
}

#[test]
fn migratepages_ends_with_1_whatever_is_wrong() {
    let sleeper = Sleeper::start();
    for args in [
        &["4194304", "all", "all"][..],
        &["0", "all", "all"],
        &["x", "all", "all"],
        &[&sleeper.pid(), "9999", "all"],
        &[&sleeper.pid(), "all", "!all"],
        &["4194304", "!all", "all"],
        &[&sleeper.pid(), "netdev:lo", "all"],
        &[&sleeper.pid(), "all", "pci:00:01.0"],
        &[&sleeper.pid(), "all"],
        &[],
        &[&sleeper.pid(), "all", "all", "all"],
        &["--json", &sleeper.pid(), "all", "all"],
    ] {
        let failed = pageferry(&[&["migratepages"], args].concat()).code(1);
        assert_eq!(stdout(&failed), "", "{args:?}");
        let error = stderr(&failed);
        assert!(error.starts_with("error: ") && error.contains("  remedy: "), "{args:?}: {error}");
    }
}

/// What the machine says of its nodes in an error, which differs from machine to machine.
fn without_nodes(error: &str) -> String {
    let machine = Machine::read().expect("a machine");
    let nodes: pageferry_topology::NodeList = machine.memory_nodes().map(|n| n.id).collect();
    error
        .replace(&format!("choose from {nodes}"), "choose from NODES")
        .replace(&format!("name some of {nodes}"), "name some of NODES")
        .replace(&format!("the {} nodes {nodes}", nodes.len()), "the N nodes NODES")
        .replace(&format!("this machine has node(s) {nodes}"), "this machine has node(s) NODES")
}

/// Command lines that make no sense; `PID` is a process, `FOLDER` no cgroup, `EMPTY` one without
/// a process, `''` an empty word.
const BAD_INPUT: &str = "\
where
where 0
where -1
where init
where 4194304
where --cgroup FOLDER
where --cgroup EMPTY
where --cgroup .
where --cgroup ..
where --cgroup ./system.slice
where --cgroup /system.slice/..
where --cgroup ''
where --file '' PID
where --watch=0 PID
where --only heap --top -1 PID
move --to all
move --pid PID
move --pid 0 --to all
move --pid 4194304 --to all
move --cgroup FOLDER --to all
move --cgroup EMPTY --to all
move --pid PID --to ''
move --pid PID --to x
move --pid PID --to 3-1
move --pid PID --to 9999
move --pid PID --to 99999
move --pid PID --to !all
move --pid PID --to netdev:lo
move --pid PID --to !block:sda
move --pid PID --to all --from ip:127.0.0.1
move --pid PID --to +99
move --pid PID --to 0,,1
move --pid PID --to -1
move --pid PID --to all --rate -1M
move --pid PID --to all --reserve=-1
move --pid PID --to all --min-age -1s
move --pid PID --to all --rate 0.1G
move --pid PID --to +0 --weights 0
move --pid PID --to all --file ''
move --pid PID --to all --from 9999
move --pid PID --to all --from x
move --pid PID --to all --fill --interleave
move --pid PID --to all --weights 1 --fill
move --pid PID --to all --nice 5 --idle
move --pid PID --to all --nice 20
move --pid PID --to +0 --weights 1,2
move --pid PID --to all --latency 20
move --pid PID --to all --latency 1us
move --pid PID --to all --rate 12Q
move --pid PID --to all --rate 1
move --pid PID --to all --threads 0
move --pid PID --to all --only heep
move --pid PID --to all --range 2000-1000
move --pid PID --to all --range 1000-2000 --children
move --pid PID,1 --to all --range 1000-2000";

#[test]
fn bad_input_is_refused_with_reason_and_remedy() {
    let sleeper = Sleeper::start();
    let folder = tempfile::tempdir().expect("a folder");
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).expect("a folder");
    fs::write(empty.join("cgroup.procs"), "").expect("a file");
    let path = |path: &Path| path.to_str().expect("a plain path").to_owned();
    let names = [
        ("EMPTY", path(&empty)),
        ("FOLDER", path(folder.path())),
        ("PID", sleeper.pid()),
        ("''", String::new()),
    ];
    let mut all = String::new();
    for line in BAD_INPUT.lines() {
        let word = |word: &str| {
            names.iter().fold(word.to_owned(), |word, (name, value)| word.replace(name, value))
        };
        let args: Vec<String> = line.split(' ').map(word).collect();
        let result = pageferry(&args.iter().map(String::as_str).collect::<Vec<_>>()).code(2);
        assert_eq!(stdout(&result), "", "{line}");
        let mut error = without_nodes(&stderr(&result));
        let last = error.lines().last().unwrap_or_default();
        assert!(last.trim_start().starts_with("remedy: "), "{line}: {error}");
        error = error.replace(env!("CARGO_MANIFEST_DIR"), "HERE");
        for (name, value) in names.iter().filter(|(_, value)| !value.is_empty()) {
            error = error.replace(value, name);
        }
        all += &format!("$ pageferry {line}\n{error}");
    }
    insta::assert_snapshot!(all);
}

#[test]
fn a_zombie_and_a_kernel_thread_have_no_memory() {
    let mut zombie = Command::new("true").spawn().expect("true");
    let pid = zombie.id().to_string();
    let state = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    while !state().contains(") Z ") {
        std::thread::yield_now();
    }
    let mut pids = vec![(pid.clone(), "a zombie")];
    match kernel_thread() {
        Some(pid) => pids.push((pid, "kernel thread")),
        None => eprintln!("skipped: no kernel thread is to be seen in this pid namespace"),
    }
    for (pid, why) in pids {
        for args in [&["where", &pid][..], &["move", "--to", "all", "--pid", &pid]] {
            let error = stderr(&pageferry(args).code(2));
            assert!(error.contains(&format!("process {pid}")), "{error}");
            assert!(error.contains(why) && error.contains("remedy: "), "{error}");
        }
    }
    zombie.wait().expect("it has ended");
}

/// The number of one of them.
fn kernel_thread() -> Option<String> {
    let entries = fs::read_dir("/proc").ok()?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.parse::<u32>().is_ok()).find(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
        // The seventh field after the name, proc(5); PF_KTHREAD in include/linux/sched.h.
        let flags = after.split_whitespace().nth(6).and_then(|flags| flags.parse::<u64>().ok());
        flags.is_some_and(|flags| flags & 0x0020_0000 != 0)
    })
}

#[test]
fn a_minimum_age_is_refused_with_a_remedy_where_nothing_is_known_of_ages() {
    let sleeper = Sleeper::start();
    let args = ["move", "--pid", &sleeper.pid(), "--to", "all", "--min-age"];
    for bad in ["1", "0s", "25h", "x"] {
        let error = stderr(&pageferry(&[&args[..], &[bad]].concat()).code(2));
        assert!(error.contains("--min-age") && error.contains("remedy: "), "{error}");
    }
    if Path::new("/sys/kernel/mm/page_idle/bitmap").exists() {
        return eprintln!("skipped in part: this kernel tracks idle pages");
    }
    let error = stderr(&pageferry(&[&args[..], &["1ms"]].concat()).code(2));
    assert!(
        error.contains("--min-age") && error.contains("CONFIG_IDLE_PAGE_TRACKING=y"),
        "{error}"
    );
}

/// Runs the command by way of a program, which may be missing or not allowed to do what it does.
fn by_way_of(program: &[&str], args: &[&str]) -> Option<std::process::Output> {
    let run = |args: &[&str]| Command::new(program[0]).args(&program[1..]).args(args).output();
    if !run(&["true"]).is_ok_and(|done| done.status.success()) {
        eprintln!("skipped: `{}` does not work here", program.join(" "));
        return None;
    }
    Some(run(&[&[PAGEFERRY.as_str()], args].concat()).expect("it did just now"))
}

#[test]
fn a_proc_of_another_pid_namespace_is_refused() {
    for args in [
        &["where", "1"][..],
        &["move", "--pid", "1", "--to", "all"],
        &["move", "--pid", "1", "--to", "all", "--dry-run"],
        &["migratepages", "1", "all", "all"],
    ] {
        let Some(done) = by_way_of(&["unshare", "--pid", "--fork"], args) else { return };
        let error = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!((done.status.code(), &*done.stdout), (Some(1), &b""[..]), "{args:?}: {error}");
        assert!(error.contains("another pid namespace") && error.contains("remedy: "), "{error}");
    }
}

#[test]
fn help_has_the_exit_codes_of_a_move() {
    let help = stdout(&pageferry(&["move", "--help"]).success());
    assert!(help.contains("exit code is 4") && help.contains("Exit codes:"), "{help}");
    let page = tempfile::tempdir().expect("a folder");
    let path = page.path().to_str().expect("a plain path");
    pageferry(&["man", "--out", path]).success();
    for name in ["where", "move", "migratepages"] {
        let page = page.path().join(format!("pageferry-{name}.1"));
        let text = fs::read_to_string(page).expect("a page");
        assert!(text.contains("EXIT STATUS") && text.contains("\\fB4\\fR"), "{text}");
    }
}
