//! Between tiers: what reclaim demotes and what is promoted again is copied by a module, with every
//! byte right.

mod kernel_common;

use kernel_common::{HUGE, Kind, Memory, Module, added_memory, here, vmstat};
use pageferry_sys::affinity::CpuSet;
use pageferry_sys::page_size;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
const DEMOTION: &str = "/sys/kernel/mm/numa/demotion_enabled";
const BALANCING: &str = "/proc/sys/kernel/numa_balancing";
/// Documentation/admin-guide/sysctl/kernel.rst, numa_balancing: promotion between tiers.
const MEMORY_TIERING: &str = "2";

fn write(path: impl AsRef<Path>, text: &str) {
    let path = path.as_ref();
    fs::write(path, text).unwrap_or_else(|error| panic!("{text} to {}: {error}", path.display()));
}

/// The node without CPUs, if Linux takes it for a tier below the others; says why not.
fn lower_tier() -> Option<i32> {
    if !here() {
        return None;
    }
    added_memory();
    let folder = "/sys/devices/virtual/memory_tiering";
    let tiers = fs::read_dir(folder).expect("memory tiers").flatten();
    let mut lists: Vec<(u32, String)> = tiers
        .filter_map(|tier| {
            let name = tier.file_name().to_string_lossy().into_owned();
            let rank = name.strip_prefix("memory_tier")?.parse().ok()?;
            Some((rank, fs::read_to_string(tier.path().join("nodelist")).ok()?.trim().to_owned()))
        })
        .collect();
    lists.sort();
    let cpuless = fs::read_to_string("/sys/devices/system/node/node2/cpulist");
    if cpuless.is_ok_and(|cpus| cpus.trim().is_empty()) {
        assert!(lists.len() == 2 && lists[1].1 == "2", "tiers of this machine: {lists:?}");
        return Some(2);
    }
    eprintln!("skipped: this machine has one tier");
    None
}

/// A cgroup that this process is in; it goes back when this is dropped.
struct Group(&'static Path);

impl Group {
    fn enter(path: &'static str) -> Self {
        let group = Path::new(path);
        fs::create_dir(group).expect("a cgroup");
        write(group.join("cgroup.procs"), &std::process::id().to_string());
        Self(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        write("/sys/fs/cgroup/cgroup.procs", &std::process::id().to_string());
        fs::remove_dir(self.0).expect("empty");
    }
}

/// How many pages of a memory are on a node.
fn pages_on(memory: &Memory, node: i32) -> usize {
    memory.nodes().iter().filter(|on| **on == node).count()
}

/// Pages that reclaim has demoted, by itself or for somebody.
fn demoted_pages() -> u64 {
    ["pgdemote_kswapd", "pgdemote_direct", "pgdemote_khugepaged"].map(vmstat).iter().sum()
}

/// Asks for memory of the group to be given up, until so much of `memory` was demoted to `node`.
fn demote(group: &Group, memory: &Memory, node: i32, pages: usize) {
    write(DEMOTION, "1");
    let until = Instant::now() + PATIENCE;
    while pages_on(memory, node) < pages {
        assert!(Instant::now() < until, "{} pages demoted", pages_on(memory, node));
        // EAGAIN: less was given up than asked for.
        let _ = fs::write(group.0.join("memory.reclaim"), "4M");
    }
    write(DEMOTION, "0");
}

#[test]
fn what_reclaim_demotes_is_copied_in_batches_and_is_right() {
    let Some(lower) = lower_tier() else { return };
    let group = Group::enter("/sys/fs/cgroup/pageferry-demoted");
    for kind in [Kind::Base, Kind::Huge] {
        let module = Module::best();
        let memory = Memory::new(kind, 16 * MIB);
        memory.must_move_to(0);
        let copied = vmstat("pgmigrate_offload_success");
        let demoted = demoted_pages();
        demote(&group, &memory, lower, 1024);
        let copied = vmstat("pgmigrate_offload_success") - copied;
        assert!(copied >= 1024, "{kind:?}: {copied} pages were copied by the module");
        assert!(demoted_pages() >= demoted + 1024);
        let batches = module.number("batches");
        assert!(module.number("bytes") > batches * page_size() as u64, "one by one");
        memory.verify();
    }
}

#[test]
fn what_is_promoted_is_copied_and_is_right() {
    let Some(lower) = lower_tier() else { return };
    let _module = Module::best();
    let periods = Path::new("/sys/kernel/debug/sched/numa_balancing");
    for (name, value) in [
        ("scan_delay_ms", "1"),
        ("scan_period_min_ms", "10"),
        ("scan_period_max_ms", "20"),
        ("scan_size_mb", "64"),
        ("hot_threshold_ms", "10000"),
    ] {
        write(periods.join(name), value);
    }
    // One by one: a base page is not worth several CPUs.
    let memory = Memory::new(Kind::Huge, HUGE);
    memory.must_move_to(lower);
    let mut cpus = CpuSet::default();
    cpus.insert(0);
    cpus.apply(0).expect("CPU 0 is of node 0");
    let (copied, promoted) = (vmstat("pgmigrate_offload_success"), vmstat("pgpromote_success"));
    write(BALANCING, MEMORY_TIERING);
    let until = Instant::now() + PATIENCE;
    while vmstat("pgmigrate_offload_success") == copied && Instant::now() < until {
        memory.verify();
    }
    write(BALANCING, "0");
    assert!(vmstat("pgpromote_success") > promoted, "nothing was promoted");
    assert!(vmstat("pgmigrate_offload_success") > copied, "the module copied nothing");
    assert!(pages_on(&memory, lower) < memory.nodes().len());
    memory.verify();
}
