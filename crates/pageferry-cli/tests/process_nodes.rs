//! `move`, `where` and `migratepages` between nodes; skipped where there is one only. The program
//! that is moved is the test itself.

use std::hint::black_box;
use std::io::{BufRead, BufReader, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use assert_cmd::cargo::cargo_bin;
use io_uring::IoUring;
use pageferry::Engine;
use pageferry_sys::{Linux, Sys as _, page_size};
use pageferry_topology::Machine;
use serde_json::Value;

const MIB: usize = 1 << 20;
/// What is moved at most, and as much again for what comes with it.
const ROOM: u64 = 96 << 20;

/// The tests share a process, of which each wants to know where its memory is.
static ALONE: Mutex<()> = Mutex::new(());

/// Memory of this process, and two nodes to move it between.
struct Stage {
    memory: Vec<u8>,
    nodes: [String; 2],
    _alone: MutexGuard<'static, ()>,
}

impl Stage {
    /// `None`: there are no two nodes with room; says so.
    fn new(bytes: usize) -> Option<Self> {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let machine = Machine::read().expect("a machine");
        let roomy = machine.memory_nodes().filter(|node| node.free_bytes > ROOM);
        let nodes: Vec<String> = roomy.map(|node| node.id.to_string()).collect();
        let [first, .., last] = &nodes[..] else {
            eprintln!("skipped: there are no two nodes with {ROOM} bytes free");
            return None;
        };
        let nodes = [first.clone(), last.clone()];
        let memory = black_box((0..bytes).map(pattern).collect());
        let stage = Self { memory, nodes, _alone: alone };
        // To where each test begins.
        stage.mv(&["--to", &stage.nodes[0]]);
        assert!(stage.on(0) >= bytes, "the memory did not go to where a test begins");
        Some(stage)
    }

    fn range(&self) -> Range<usize> {
        let start = self.memory.as_ptr().addr();
        start..start + self.memory.len()
    }

    fn args(&self, more: &[&str]) -> Vec<String> {
        let range = self.range();
        let mut args = vec!["move".to_owned(), "--json".to_owned()];
        args.extend(["--pid".to_owned(), std::process::id().to_string()]);
        args.push(format!("--range={:x}-{:x}", range.start, range.end));
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        args
    }

    /// Moves the memory, and what shares pages with it.
    fn mv(&self, more: &[&str]) -> (Option<i32>, Value) {
        let output = pageferry(&self.args(more));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        let told = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{error}"));
        (output.status.code(), told)
    }

    /// How much of the memory is on one of the two nodes, as a dry run of a move to it tells.
    fn on(&self, node: usize) -> usize {
        let (_, told) = self.mv(&["--dry-run", "--to", &self.nodes[node]]);
        usize::try_from(bytes(&told, "already_there")).expect("it fits")
    }

    /// Whether one page at least of the memory is on one of the two nodes: asked of the kernel,
    /// which takes less time than another command would.
    fn has_page_on(&self, node: usize) -> bool {
        let pages: Vec<usize> = self.range().step_by(page_size()).collect();
        let mut status = vec![-1; pages.len()];
        Linux.page_nodes(&pages, &mut status).expect("move_pages works where there are two nodes");
        let node = self.nodes[node].parse().expect("a number");
        status.contains(&node)
    }

    fn is_intact(&self) -> bool {
        self.memory.iter().enumerate().all(|(i, &byte)| byte == pattern(i))
    }
}

/// What each byte of the memory is: pages differ.
fn pattern(i: usize) -> u8 {
    u8::try_from(i / 4096 % 251).unwrap_or(0)
}

fn pageferry(args: &[String]) -> Output {
    Command::new(cargo_bin("pageferry")).args(args).output().expect("the command")
}

/// Bytes with an outcome.
fn bytes(told: &Value, outcome: &str) -> u64 {
    let all = told["outcomes"].as_array().expect("a list").iter();
    all.filter(|o| o["outcome"] == outcome).filter_map(|o| o["bytes"].as_u64()).sum()
}

#[test]
fn a_programs_memory_goes_over_and_where_finds_it_there() {
    let Some(stage) = Stage::new(16 * MIB) else { return };
    let [from, to] = &stage.nodes;
    let (code, told) = stage.mv(&["--from", from, "--to", to]);
    assert_eq!(code, Some(0), "{told}");
    assert!(bytes(&told, "moved") >= 16 << 20 && told["complete"] == true, "{told}");
    assert!(told["calls"]["count"].as_u64() > Some(0), "{told}");
    assert!(stage.on(1) >= 16 * MIB && stage.is_intact());
    let pid = std::process::id().to_string();
    let shown =
        pageferry(&["where", "--json", "--only", "anonymous,heap", &pid].map(str::to_owned));
    let shown: Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    let nodes = shown["nodes"].as_array().expect("a list").iter();
    let there: u64 = nodes
        .filter(|node| node["node"].as_u64() == to.parse().ok())
        .filter_map(|node| node["bytes"].as_u64())
        .sum();
    assert!(there >= 16 << 20, "{shown}");
}

#[test]
fn pages_take_turns_and_stay_when_asked_again() {
    let Some(stage) = Stage::new(8 * MIB) else { return };
    let to = stage.nodes.join(",");
    let (code, told) = stage.mv(&["--to", &to, "--weights", "1,3"]);
    assert_eq!(code, Some(0), "{told}");
    let there = stage.on(1);
    assert!((5 * MIB..7 * MIB).contains(&there), "{there} of 8 MiB");
    let (code, again) = stage.mv(&["--to", &to, "--weights", "1,3"]);
    assert_eq!((code, bytes(&again, "moved")), (Some(0), 0), "{again}");
    assert!(stage.is_intact());
}

#[test]
fn a_dry_run_reckons_from_a_measurement_and_moves_nothing() {
    let Some(stage) = Stage::new(8 * MIB) else { return };
    let (code, told) = stage.mv(&["--dry-run", "--to", &stage.nodes[1]]);
    assert_eq!(code, Some(0), "{told}");
    let estimate = &told["estimate"];
    assert!(estimate["bytes"].as_u64() >= Some(8 << 20), "{told}");
    assert!(estimate["calls"].as_u64() > Some(0) && estimate["seconds"].as_f64() > Some(0.0));
    assert!(estimate["basis"].as_str().is_some_and(|b| b.contains("measured here")), "{told}");
    assert!(stage.on(0) >= 8 * MIB && stage.on(1) == 0);
}

#[test]
fn what_a_reserve_keeps_from_moving_is_told_with_a_remedy() {
    let Some(stage) = Stage::new(4 * MIB) else { return };
    let to = ["--reserve", "1024T", "--to", &stage.nodes[1]];
    let (code, told) = stage.mv(&to);
    assert_eq!((code, bytes(&told, "moved")), (Some(4), 0), "{told}");
    let stayed = &told["outcomes"][0];
    assert_eq!(stayed["outcome"]["no_frame"], "reserve", "{told}");
    let mut args = stage.args(&to);
    args.retain(|arg| arg != "--json");
    let text = String::from_utf8_lossy(&pageferry(&args).stdout).into_owned();
    assert!(text.contains(" stayed") && text.contains("or lower --reserve"), "{text}");
}

#[test]
fn a_move_that_is_interrupted_reports_what_it_did() {
    let Some(stage) = Stage::new(32 * MIB) else { return };
    // All of it would take more than a minute.
    let mut child = Command::new(cargo_bin("pageferry"))
        .args(stage.args(&["--rate", "512K", "--to", &stage.nodes[1]]))
        .stdout(Stdio::piped())
        .spawn()
        .expect("the command starts");
    while !stage.has_page_on(1) {
        assert!(child.try_wait().expect("our child").is_none(), "it ended before it moved");
        std::thread::yield_now();
    }
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(sent.expect("kill").success());
    let output = child.wait_with_output().expect("it ends");
    let told: Value = serde_json::from_slice(&output.stdout).expect("it reports");
    assert_eq!(output.status.code(), Some(130), "{told}");
    assert!(told["cancelled"] == true && told["complete"] == false, "{told}");
    assert!(bytes(&told, "moved") > 0 && bytes(&told, "moved") < 32 << 20, "{told}");
    assert!(stage.is_intact());
}

#[test]
fn migratepages_moves_and_says_nothing() {
    let Some(stage) = Stage::new(8 * MIB) else { return };
    let [from, to] = &stage.nodes;
    let pid = std::process::id().to_string();
    let done = pageferry(&["migratepages", &pid, from, to].map(str::to_owned));
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert!(done.stdout.is_empty() && done.stderr.is_empty(), "{done:?}");
    assert!(stage.on(1) >= 8 * MIB && stage.is_intact());
}

#[test]
fn a_program_that_listens_moves_its_regions_itself() {
    let Some(stage) = Stage::new(MIB) else { return };
    let engine = match Engine::new() {
        Ok(engine) => engine,
        Err(error) => return eprintln!("skipped: no engine here: {error}"),
    };
    let listener = match engine.listen() {
        Ok(listener) => listener,
        Err(error) => return eprintln!("skipped: no control socket here: {error}"),
    };
    let region = engine.map(8 * MIB).build().expect("a region");
    // SAFETY: the region is mapped, writable, and ours.
    unsafe { region.as_ptr().write_bytes(7, region.len()) };
    let pid = std::process::id().to_string();
    for to in &stage.nodes {
        let args = ["move", "--json", "--pid", &pid, "--to", to, "--only", "anonymous"];
        let done = pageferry(&args.map(str::to_owned));
        let told: Value = serde_json::from_slice(&done.stdout).expect("JSON");
        assert_eq!(done.status.code(), Some(0), "{told}");
        assert_eq!(told["asked"][0]["pid"].to_string(), pid, "{told}");
        // Nothing but the program itself has touched its anonymous memory.
        assert_eq!(told["bytes_looked_at"], 0, "{told}");
        let on: Vec<String> = region
            .residency()
            .expect("it is ours")
            .iter()
            .map(|part| part.node.to_string())
            .collect();
        assert_eq!(on.join(","), *to, "{told}");
    }
    drop(listener);
}

#[test]
fn pages_pinned_for_a_device_stay_with_the_reason_and_move_when_let_go() {
    let Some(stage) = Stage::new(8 * MIB) else { return };
    let ring = match IoUring::new(2) {
        Ok(ring) => ring,
        Err(error) => return eprintln!("skipped: no io_uring here: {error}"),
    };
    let pinned = 64 << 10;
    let buffer = stage.memory[MIB..].as_ptr().cast_mut().cast();
    let buffer = libc::iovec { iov_base: buffer, iov_len: pinned };
    // SAFETY: the memory lives until the buffer is unregistered.
    if let Err(error) = unsafe { ring.submitter().register_buffers(&[buffer]) } {
        return eprintln!("skipped: io_uring registers no buffer here (ulimit -l?): {error}");
    }
    let to = ["--to", &stage.nodes[1]];
    let (code, told) = stage.mv(&to);
    assert_eq!((code, &told["complete"]), (Some(4), &Value::Bool(false)), "{told}");
    let outcomes = told["outcomes"].as_array().expect("a list").iter();
    let busy: u64 = outcomes
        .filter(|o| o["outcome"].get("busy").is_some())
        .filter_map(|o| o["bytes"].as_u64())
        .sum();
    assert!(busy >= pinned as u64 && bytes(&told, "moved") > 0, "{told}");
    assert!(told["examples"][0]["range"]["start"].is_u64(), "{told}");
    let mut args = stage.args(&to);
    args.retain(|arg| arg != "--json");
    let output = pageferry(&args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(4), "{text}");
    for part in [" stayed", "busy: in use by the kernel", "such as", "pinned for a device"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    ring.submitter().unregister_buffers().expect("registered above");
    drop(ring);
    // The kernel lets go of them a moment later.
    let tries = (0..1000).any(|_| stage.mv(&to).0 == Some(0));
    assert!(tries, "pages stayed though nothing pins them");
    assert!(stage.on(1) >= 8 * MIB && stage.is_intact());
}

/// A control group (version 2) of a guest with programs in it; both are gone when it is dropped.
struct Group {
    path: PathBuf,
    /// With the rest of what each says.
    programs: Vec<(Child, BufReader<ChildStdout>)>,
}

const ROLE: &str = "PAGEFERRY_TEST_PROGRAM";

impl Group {
    /// `None`: this is no guest with control groups; says so.
    fn new() -> Option<Self> {
        if std::env::var_os("PAGEFERRY_GUEST").is_none() {
            eprintln!("skipped: this makes control groups, so it runs in guests only");
            return None;
        }
        let path = format!("/sys/fs/cgroup/pageferry-test-{}", std::process::id());
        let path = PathBuf::from(path);
        if let Err(error) = std::fs::create_dir_all(path.join("below")) {
            eprintln!("skipped: no cgroup can be made here: {error}");
            return None;
        }
        Some(Self { path, programs: Vec::new() })
    }

    /// This test once more in a group below, in the role of a program.
    fn start(&mut self, below: &str, test: &str) {
        let mut program = Command::new(std::env::current_exe().expect("procfs"))
            .args(["--exact", test, "--nocapture"])
            .env(ROLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this test runs again");
        let mut output = BufReader::new(program.stdout.take().expect("piped"));
        let ready =
            output.by_ref().lines().map_while(Result::ok).any(|line| line.contains("ready"));
        assert!(ready, "it ended before it was ready");
        let procs = self.path.join(below).join("cgroup.procs");
        std::fs::write(procs, program.id().to_string()).expect("a group of ours");
        self.programs.push((program, output));
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::write(self.path.join("cgroup.kill"), "1");
        for (program, _) in &mut self.programs {
            let _ = program.wait();
        }
        for path in [&self.path.join("below"), &self.path] {
            while Path::exists(path) && std::fs::remove_dir(path).is_err() {
                std::thread::yield_now();
            }
        }
    }
}

/// What such a program does: it fills memory, waits for the end of its input, and looks.
#[allow(clippy::print_stdout, reason = "a pipe to the test that started it")]
fn be_a_program(bytes: usize) {
    let memory: Vec<u8> = black_box((0..bytes).map(pattern).collect());
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new()).expect("a pipe");
    assert!(memory.iter().enumerate().all(|(i, &byte)| byte == pattern(i)));
}

#[test]
fn the_programs_of_a_live_cgroup_go_over_and_where_finds_them_there() {
    const EACH: usize = 8 * MIB;
    if std::env::var_os(ROLE).is_some() {
        return be_a_program(EACH);
    }
    let Some(stage) = Stage::new(MIB) else { return };
    let Some(mut group) = Group::new() else { return };
    let test = "the_programs_of_a_live_cgroup_go_over_and_where_finds_them_there";
    for below in ["", "below"] {
        group.start(below, test);
    }
    let path = group.path.display().to_string();
    // A path below where control groups are mounted names it too.
    let name = path.strip_prefix("/sys/fs/cgroup/").expect("made there");
    let ask = |args: &[&str]| {
        let mut all = vec![args[0], "--json", "--only", "anonymous,heap", "--cgroup"];
        all.extend(&args[1..]);
        let done = pageferry(&all.into_iter().map(str::to_owned).collect::<Vec<_>>());
        let error = String::from_utf8_lossy(&done.stderr).into_owned();
        let told = serde_json::from_slice::<Value>(&done.stdout);
        (done.status.code(), told.unwrap_or_else(|_| panic!("{error}")))
    };
    for (group, to) in
        [(&*path, &stage.nodes[0]), (name, &stage.nodes[1]), (&path, &stage.nodes[0])]
    {
        let (code, told) = ask(&["move", group, "--to", to]);
        assert_eq!((code, told["processes"].as_u64()), (Some(0), Some(2)), "{told}");
        let there = bytes(&told, "moved") + bytes(&told, "already_there");
        assert!(there >= 2 * EACH as u64 && told["complete"] == true, "{told}");
        let (code, found) = ask(&["where", group]);
        assert_eq!((code, found["processes"].as_u64()), (Some(0), Some(2)), "{found}");
        let [only] = &found["nodes"].as_array().expect("a list")[..] else { panic!("{found}") };
        assert_eq!(only["node"].to_string(), **to, "{found}");
        assert!(only["bytes"].as_u64() >= Some(2 * EACH as u64), "{found}");
    }
    for (program, _) in &mut group.programs {
        drop(program.stdin.take());
        assert!(program.wait().expect("our child").success(), "its memory is not what it wrote");
    }
    // Nobody is left.
    let empty = pageferry(&["where", "--cgroup", &path].map(str::to_owned));
    let error = String::from_utf8_lossy(&empty.stderr).into_owned();
    assert!(empty.status.code() == Some(2) && error.contains("hold no process"), "{error}");
}
