//! Machines that change while they are read. A named pipe in the tree says when the reader is
//! there: it waits at the pipe until the tree has been altered.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use pageferry_topology::{CpuId, Id, IdList, Machine, NodeId, ReadError};

mod support;

/// Reads the small machine, altered by `before`; once the reader is at the file `at`, the tree is
/// altered by `meanwhile`, and only then the reader gets the `content` of that file, once.
fn read_while(
    before: &str,
    at: &str,
    content: &str,
    meanwhile: &'static str,
) -> Result<Machine, ReadError> {
    let root = support::unpack("small");
    support::lay(root.path(), before);
    let pipe = root.path().join(at);
    let _ = fs::remove_file(&pipe);
    make_pipe(&pipe);
    let reached = Arc::new(AtomicBool::new(false));
    let (path, content, flag) = (root.path().to_owned(), content.to_owned(), Arc::clone(&reached));
    // Waits for ever if nobody reads the pipe; then the test fails below and the thread ends with
    // the process.
    thread::spawn(move || {
        let mut writer = OpenOptions::new().write(true).open(&pipe).expect("the pipe is there");
        let _ = fs::remove_file(&pipe);
        support::lay(&path, meanwhile);
        flag.store(true, Ordering::SeqCst);
        writer.write_all(content.as_bytes()).expect("the reader waits");
    });
    let machine = Machine::read_from(root.path());
    assert!(reached.load(Ordering::SeqCst), "{at} was not read");
    machine
}

fn make_pipe(path: &Path) {
    let path = CString::new(path.as_os_str().as_bytes()).expect("no NUL in a path");
    // SAFETY: mkfifo(3) reads a string that ends with NUL, which a CString is.
    let made = unsafe { libc::mkfifo(path.as_ptr(), 0o600) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
}

fn list<I: Id>(ids: impl IntoIterator<Item = I>) -> String {
    ids.into_iter().collect::<IdList<I>>().to_string()
}

#[test]
fn a_node_that_goes_while_the_machine_is_read_is_left_out() {
    let meminfo = "Node 1 MemTotal: 8192 kB\nNode 1 MemFree: 2048 kB\n";
    let machine = read_while(
        "",
        "sys/devices/system/node/node1/meminfo",
        meminfo,
        "\
sys/devices/system/node/online\t0
sys/devices/system/node/node0/distance\t10
-sys/devices/system/node/node1
",
    );
    let machine = machine.expect("what is left is a machine");
    assert_eq!(list(machine.nodes().iter().map(|node| node.id)), "0");
    assert_eq!(machine.offline_nodes().to_string(), "1");
    assert_eq!(machine.nodes()[0].distances.len(), 1);
}

#[test]
fn a_node_that_comes_while_the_machine_is_read_is_there() {
    // The first reading has two nodes, and three distances for them.
    let machine = read_while(
        "",
        "sys/devices/system/node/node0/meminfo",
        "Node 0 MemTotal: 4096 kB\nNode 0 MemFree: 1024 kB\n",
        "\
sys/devices/system/node/online\t0-2
sys/devices/system/node/node0/meminfo\tMemTotal: 4096 kB\\nMemFree: 1024 kB
sys/devices/system/node/node0/distance\t10 20 30
sys/devices/system/node/node1/distance\t20 10 30
sys/devices/system/node/node2/distance\t30 30 10
sys/devices/system/node/node2/cpulist\t
sys/devices/system/node/node2/meminfo\tMemTotal: 64 kB\\nMemFree: 64 kB
",
    );
    let machine = machine.expect("a machine of three nodes");
    assert_eq!(list(machine.nodes().iter().map(|node| node.id)), "0-2");
    assert_eq!(machine.distance(NodeId::new(1), NodeId::new(2)), Ok(30));
}

#[test]
fn a_cpu_that_goes_while_the_machine_is_read_is_handed_out_by_nobody() {
    let machine = read_while(
        "",
        "sys/devices/system/cpu/cpu2/topology/core_id",
        "2\n",
        "\
sys/devices/system/cpu/online\t0-2
sys/devices/system/node/node1/cpulist\t2
-sys/devices/system/cpu/cpu3
sys/devices/system/cpu/cpu2/topology/core_id\t2
sys/devices/system/cpu/cpu2/cache/index3/shared_cpu_list\t2
",
    );
    let machine = machine.expect("a machine of three CPUs");
    assert!(machine.cpu(CpuId::new(3)).is_none());
    assert_eq!(list(machine.nearest_cpus(NodeId::new(1)).expect("online").iter()), "2");
    assert_eq!(list(machine.cpus()[2].caches[1].shared_by.iter()), "2");
}

#[test]
fn a_tier_and_a_cache_that_go_while_they_are_read_are_not_told_of() {
    let tier = "sys/devices/virtual/memory_tiering/memory_tier4";
    let machine = read_while(
        &format!("{tier}/nodelist\t0-1\n"),
        "sys/devices/system/node/node1/meminfo",
        "MemTotal: 8192 kB\nMemFree: 2048 kB\n",
        "\
-sys/devices/virtual/memory_tiering/memory_tier4/nodelist
sys/devices/system/node/node1/meminfo\tMemTotal: 8192 kB\\nMemFree: 2048 kB
-sys/devices/system/cpu/cpu1/cache/index3/level
-sys/devices/system/cpu/cpu1/cache/index0
",
    );
    let machine = machine.expect("neither is needed");
    assert_eq!(machine.tier_source(), pageferry_topology::TierSource::Derived);
    assert!(machine.cpus()[1].caches.is_empty());
}

#[test]
fn a_file_that_was_malformed_all_along_is_refused_after_a_change_too() {
    let error = read_while(
        "sys/devices/system/node/node1/distance\tfar\n",
        "sys/devices/system/node/node0/meminfo",
        "MemTotal: 4096 kB\nMemFree: 1024 kB\n",
        "\
sys/devices/system/node/node0/meminfo\tMemTotal: 4096 kB\\nMemFree: 1024 kB
sys/devices/system/cpu/online\t0-2
",
    );
    let error = error.expect_err("no change explains it");
    assert!(error.to_string().contains("node1/distance"), "{error}");
}
