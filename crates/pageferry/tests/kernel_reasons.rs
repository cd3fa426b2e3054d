//! Whoever moves pages has them copied in batches, without knowing: system calls, cpusets,
//! compaction, memory that is taken offline, NUMA balancing, and the command.

mod kernel_common;

use kernel_common::{
    BOARD, DMA, HUGE, Kind, MT, Memory, Module, Writers, added_memory, blocks, here, interrupts,
    vmstat,
};
use pageferry_sys::affinity::CpuSet;
use pageferry_sys::usage::migrate_pages;
use pageferry_sys::{Errno, page_size};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::ptr::with_exposed_provenance_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
/// include/uapi/linux/mempolicy.h: also pages that are there already, if only we map them.
const MPOL_MF_MOVE: libc::c_uint = 1 << 1;
const PATIENCE: Duration = Duration::from_secs(60);

/// Pages that a module has copied.
fn copied() -> u64 {
    vmstat("pgmigrate_offload_success")
}

/// Waits until this is so.
fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn write(path: impl AsRef<Path>, text: &str) {
    let path = path.as_ref();
    fs::write(path, text).unwrap_or_else(|error| panic!("{text} to {}: {error}", path.display()));
}

#[test]
fn mbind_and_migrate_pages_have_pages_copied_in_batches() {
    if !here() {
        return;
    }
    let _module = Module::best();
    for kind in [Kind::Base, Kind::Huge] {
        let memory = Memory::new(kind, 4 * MIB);
        memory.must_move_to(0);
        let before = copied();
        let nodes: u64 = 1 << 1;
        // SAFETY: sets a policy for our own mapping; its pages move and keep their content.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                with_exposed_provenance_mut::<u8>(memory.range().start),
                memory.bytes,
                libc::MPOL_BIND,
                &raw const nodes,
                64,
                MPOL_MF_MOVE,
            )
        };
        assert_eq!(ret, 0, "{}", std::io::Error::last_os_error());
        memory.must_be_on(1);
        memory.verify();
        assert!(copied() > before, "mbind of {kind:?}");
        let before = copied();
        migrate_pages(0, 1, 0).expect("migrate_pages");
        assert!(copied() > before, "migrate_pages of {kind:?}");
        memory.verify();
    }
}

#[test]
fn a_cpuset_that_is_given_another_node_takes_its_memory_along_in_batches() {
    if !here() {
        return;
    }
    let root = Path::new("/sys/fs/cgroup");
    let group = root.join("pageferry-kernel");
    fs::create_dir(&group).expect("a cgroup");
    write(group.join("cpuset.mems"), "0");
    write(group.join("cgroup.procs"), &std::process::id().to_string());
    let _module = Module::best();
    let memory = Memory::new(Kind::Base, 4 * MIB);
    memory.must_be_on(0);
    let before = copied();
    write(group.join("cpuset.mems"), "1");
    // It is done by a worker.
    eventually("memory follows", || memory.nodes().iter().all(|on| *on == 1));
    memory.verify();
    assert!(copied() > before);
    write(root.join("cgroup.procs"), &std::process::id().to_string());
    fs::remove_dir(group).expect("empty");
}

#[test]
fn helpers_time_is_shown_in_the_cgroup_of_who_asked() {
    if !here() {
        return;
    }
    let group = Path::new("/sys/fs/cgroup/pageferry-payer");
    fs::create_dir(group).expect("a cgroup");
    write(group.join("cgroup.procs"), &std::process::id().to_string());
    let module = Module::load(MT, &["least_kib=4", "helpers=4"]);
    let memory = Memory::new(Kind::Huge, 4 * MIB);
    let trace = Path::new("/sys/kernel/tracing");
    if !trace.join("events").exists() {
        let mounted = Command::new("mount").args(["-t", "tracefs", "t"]).arg(trace).status();
        assert!(mounted.expect("busybox").success());
    }
    write(trace.join("events/migrate/mm_migrate_offload/enable"), "1");
    write(trace.join("events/migrate/mm_migrate_offload_charge/enable"), "1");
    let until = Instant::now() + PATIENCE;
    while module.number("helper_ns") < 10_000 && Instant::now() < until {
        memory.must_move_to(1);
        memory.must_move_to(0);
    }
    let charged = || {
        let stat = fs::read_to_string(group.join("memory.stat")).expect("memory.stat");
        let line = stat.lines().find_map(|l| l.strip_prefix("migrate_offload_helper_us "));
        line.expect("the counter").parse::<u64>().expect("a number")
    };
    eventually("the time is shown", || charged() > 0);
    let text = fs::read_to_string(trace.join("trace")).expect("tracefs");
    let line = text.lines().find(|l| l.contains("mm_migrate_offload:")).expect("a batch");
    assert!(line.contains("migrator=pageferry_copy_mt reason=syscall_or_cpuset"), "{line}");
    assert!(line.contains("failed=0") && line.contains("error=0"), "{line}");
    assert!(text.contains("mm_migrate_offload_charge:"), "{text}");
    write("/sys/fs/cgroup/cgroup.procs", &std::process::id().to_string());
    fs::remove_dir(group).expect("empty");
}

#[test]
fn compaction_has_pages_copied_in_batches() {
    if !here() {
        return;
    }
    let _module = Module::best();
    // Every second page is given back: what is left is to be moved together.
    let memory = Memory::new(Kind::Base, 64 * MIB);
    for page in memory.range().step_by(2 * page_size()) {
        // SAFETY: a page of ours that nobody reads again; `verify` is not called on this memory.
        let ret = unsafe {
            libc::madvise(with_exposed_provenance_mut(page), page_size(), libc::MADV_DONTNEED)
        };
        assert_eq!(ret, 0);
    }
    let kept: Vec<(usize, u64)> = (memory.range().step_by(page_size()))
        .skip(1)
        .step_by(2)
        .map(|page| {
            let index = (page - memory.range().start) / 8;
            (index, memory.words()[index].load(Ordering::Relaxed))
        })
        .collect();
    let before = copied();
    write("/proc/sys/vm/compact_memory", "1");
    assert!(copied() > before, "compaction moved nothing by the module");
    for (index, value) in kept {
        assert_eq!(memory.words()[index].load(Ordering::Relaxed), value, "word {index}");
    }
}

#[test]
fn memory_that_is_taken_offline_is_emptied_in_batches() {
    if !here() {
        return;
    }
    let node = added_memory().unwrap_or(1);
    let module = Module::best();
    // More than a block (128 MiB) that also has memory of the kernel's own, and so cannot go.
    let memory = Memory::new(Kind::Huge, 320 * MIB);
    memory.must_move_to(node);
    let before = copied();
    let mut taken = Vec::new();
    // Those with the kernel's own memory cannot go, and say so.
    for block in blocks(node) {
        if fs::write(&block, "offline").is_ok() {
            taken.push(block);
        }
        if copied() > before {
            break;
        }
    }
    memory.verify();
    let emptied = copied() > before;
    for block in &taken {
        write(block, "online");
    }
    drop(module);
    assert!(!taken.is_empty(), "no block of node {node} could be taken offline");
    assert!(emptied, "{} blocks went, none with our pages", taken.len());
}

#[test]
fn pages_that_numa_balancing_moves_are_copied_too() {
    if !here() {
        return;
    }
    let _module = Module::best();
    let periods = Path::new("/sys/kernel/debug/sched/numa_balancing");
    if !periods.exists() {
        eprintln!("skipped: this kernel does not balance");
        return;
    }
    for (name, ms) in [
        ("scan_delay_ms", "1"),
        ("scan_period_min_ms", "10"),
        ("scan_period_max_ms", "20"),
        ("scan_size_mb", "64"),
    ] {
        write(periods.join(name), ms);
    }
    // One by one: a base page is not worth several CPUs.
    let memory = Memory::new(Kind::Huge, HUGE);
    memory.must_move_to(1);
    let mut cpus = CpuSet::default();
    cpus.insert(0);
    cpus.apply(0).expect("CPU 0 is of node 0");
    write("/proc/sys/kernel/numa_balancing", "1");
    let before = copied();
    let until = Instant::now() + PATIENCE;
    while copied() == before && Instant::now() < until {
        memory.verify();
    }
    write("/proc/sys/kernel/numa_balancing", "0");
    assert!(copied() > before, "balancing moved nothing by the module");
    memory.verify();
}

#[test]
fn cpus_that_come_and_go_lose_nothing() {
    if !here() {
        return;
    }
    let module = Module::load(MT, &["least_kib=4", "helpers=8"]);
    let memory: &Memory = Box::leak(Box::new(Memory::new(Kind::Huge, 4 * MIB)));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                memory.move_to(round % 2);
                memory.verify();
                round += 1;
            }
        });
        for _ in 0..5 {
            for state in ["0", "1"] {
                write("/sys/devices/system/cpu/cpu1/online", state);
                std::thread::sleep(Duration::from_millis(200));
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(module.number("batches") > 0);
    memory.verify();
}

#[test]
fn under_memory_pressure_every_page_stays_right() {
    if !here() {
        return;
    }
    let _module = Module::best();
    let memory: &Memory = Box::leak(Box::new(Memory::new(Kind::Base, 16 * MIB)));
    let writers = Writers::start(memory, 1);
    // Nearly all that is free is filled; then the moves must make room, or say that there is none.
    let free = free_bytes();
    let file = "/tmp/pressure";
    let filler = vec![1_u8; MIB];
    {
        use std::io::Write as _;
        let mut out = fs::File::create(file).expect("a tmpfs");
        for _ in 0..free.saturating_sub(48 * MIB) / MIB {
            if out.write_all(&filler).is_err() {
                break;
            }
        }
    }
    for round in 0..6 {
        let moved = memory.try_move_to(round % 2);
        assert!(matches!(moved, Ok(_) | Err(Errno(libc::ENOMEM))), "{moved:?}");
    }
    fs::remove_file(file).expect("there");
    writers.finish();
    memory.verify();
}

/// Free memory of the whole machine.
fn free_bytes() -> usize {
    let text = fs::read_to_string("/proc/meminfo").expect("procfs");
    let line = text.lines().find_map(|l| l.strip_prefix("MemFree:")).expect("MemFree");
    let kib: usize = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib << 10
}

#[test]
fn a_page_with_a_memory_error_costs_nothing_else() {
    if !here() {
        return;
    }
    let _module = Module::best();
    let memory = Memory::new(Kind::Base, 2 * MIB);
    memory.must_move_to(0);
    let bad = memory.range().start + 77 * page_size();
    // SAFETY: the page is ours; it is not read any more.
    let ret = unsafe {
        libc::madvise(with_exposed_provenance_mut(bad), page_size(), libc::MADV_HWPOISON)
    };
    assert_eq!(ret, 0, "{}", std::io::Error::last_os_error());
    let status = memory.move_to(1);
    let moved = status.iter().filter(|on| **on == 1).count();
    assert_eq!(moved, status.len() - 1, "the others move");
    for (index, page) in memory.words().chunks(page_size() / 8).enumerate() {
        if index != 77 {
            let first = page[0].load(Ordering::Relaxed);
            let known = (index * page_size() / 8) as u64;
            assert_eq!(first, known.wrapping_mul(0x9e37_79b9_7f4a_7c15), "page {index}");
        }
    }
}

#[test]
fn the_command_moves_programs_by_the_module() {
    if !here() {
        return;
    }
    let module = Module::best();
    let memory = Memory::new(Kind::Huge, 2 * HUGE);
    memory.must_move_to(0);
    let before = module.number("bytes");
    let range = memory.range();
    let out = Command::new("/bin/pageferry")
        .args(["move", "--pid", &std::process::id().to_string(), "--to", "1"])
        .arg(format!("--range={:x}-{:x}", range.start, range.end))
        .output()
        .expect("the command");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    memory.must_be_on(1);
    memory.verify();
    assert!(module.number("bytes") >= before + memory.bytes as u64);
    let doctor = Command::new("/bin/pageferry").arg("doctor").output().expect("the command");
    let told = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(told.contains(&format!("in batches by {}", module.name())), "{told}");
}

#[test]
fn the_command_measures_who_copies_and_puts_the_settings_back() {
    if !here() {
        return;
    }
    let module = Module::load(MT, &["helpers=3", "least_kib=64"]);
    let with_channels = !interrupts().is_empty();
    let _other =
        with_channels.then(|| Module::try_load(DMA, &["enabled=0", BOARD]).expect("waits"));
    let thp = "/sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled";
    let before = fs::read_to_string(thp).expect("folios of 64 KiB");
    let out = Command::new("/bin/pageferry")
        .args(["bench", "--kernel-matrix", "--size", "8M", "--rounds", "1", "--json"])
        .output()
        .expect("the command");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let matrix: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert!(matrix["emulated"].is_string(), "{matrix}");
    let rows = matrix["rows"].as_array().expect("rows");
    let sizes: Vec<u64> = rows.iter().filter_map(|row| row["folio_bytes"].as_u64()).collect();
    assert_eq!(sizes, [4, 16, 64, 256, 1024, 2048].map(|kib| kib << 10));
    for row in rows {
        assert!(row["skipped"].is_null(), "{row}");
        let cells = row["cells"].as_array().expect("cells");
        assert_eq!(cells.len(), 11);
        for cell in cells {
            assert!(cell["gb_per_s"].is_null(), "no rate is given where CPUs are emulated: {cell}");
            let bytes = |name: &str| cell[name].as_u64().expect("bytes");
            match (cell["copier"].as_str(), cell["count"].as_u64()) {
                (Some("kernel"), None) => assert_eq!(bytes("offloaded_bytes"), 0),
                // Each node has one CPU.
                (Some("threads"), Some(1)) => assert!(bytes("offloaded_bytes") > 0, "{cell}"),
                // The board has sixteen.
                (Some("channels"), Some(_)) if with_channels => {
                    assert!(bytes("offloaded_bytes") > 0, "{cell}");
                }
                _ => {
                    assert!(cell["skipped"].is_string(), "{cell}");
                    continue;
                }
            }
            assert_eq!(bytes("moved_bytes"), 8 << 20, "{cell}");
        }
    }
    assert_eq!(fs::read_to_string(thp).expect("folios of 64 KiB"), before);
    let now = [module.get("helpers"), module.get("least_kib"), module.get("enabled")];
    assert_eq!(now, ["3", "64", "Y"]);
    let engines = Command::new("/bin/pageferry").arg("engines").output().expect("the command");
    let told = String::from_utf8_lossy(&engines.stdout).into_owned();
    assert!(told.contains("batches are copied by pageferry_copy_mt"), "{told}");
    assert!(told.contains("helpers 3"), "{told}");
}
