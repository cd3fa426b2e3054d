//! What the tests of the kernel's copiers share: modules, counters, and memory that is moved by
//! system calls while writers verify every word.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use pageferry_sys::usage::move_pages;
use pageferry_sys::{Errno, page_size};
use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::{null_mut, with_exposed_provenance_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where guests have the modules.
const MODULES: &str = "/copiers";
/// Linux with our patches has this.
const OFFLOAD: &str = "/sys/kernel/mm/migrate_offload";

pub const MT: &str = "pageferry_copy_mt";
/// What copies with a DMA engine.
pub const DMA: &str = "pageferry_copy_dma";
/// The parameter that has it take the board's engine alone: the name of its driver.
pub const BOARD: &str = "devices=xilinx-zynqmp-dma";
/// The test part that misbehaves.
pub const TEST: &str = "pageferry_copy_test";
pub const HUGE: usize = 2 << 20;

/// Whether this is a guest with our kernel and two nodes; says why not.
pub fn here() -> bool {
    let why = if std::env::var_os("PAGEFERRY_GUEST").is_none() {
        "modules are loaded in guests only (`cargo xtask kernel test`)"
    } else if !Path::new(OFFLOAD).exists() {
        "this kernel has no batched copies"
    } else if !Path::new("/sys/devices/system/node/node1").exists() {
        "this machine has one node"
    } else {
        return true;
    };
    eprintln!("skipped: {why}");
    false
}

/// A counter of `/proc/vmstat`.
pub fn vmstat(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/vmstat").expect("procfs");
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// How often each channel of the board's engine has interrupted.
pub fn interrupts() -> Vec<u64> {
    let text = fs::read_to_string("/proc/interrupts").expect("procfs");
    let lines = text.lines().filter(|line| line.contains("zynqmp-dma"));
    // After the interrupt's number, a count of each CPU.
    let counts = |line: &str| {
        line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()).sum()
    };
    lines.map(counts).collect()
}

/// The files that say whether blocks of a node's memory are online.
pub fn blocks(node: i32) -> Vec<PathBuf> {
    let folder = format!("/sys/devices/system/node/node{node}");
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut all: Vec<_> = (entries.flatten())
        .filter(|e| e.file_name().to_string_lossy().starts_with("memory"))
        .map(|e| e.path().join("state"))
        .filter(|state| state.exists())
        .collect();
    all.sort();
    all
}

/// Adds the memory that the device tree tells of and Linux did not take at boot, for pages that can
/// be moved; its node. None where the machine has none: then firmware says which can be taken away.
pub fn added_memory() -> Option<i32> {
    let nodes = fs::read_dir("/proc/device-tree").ok()?.flatten().map(|entry| entry.path());
    let kept = nodes.filter(|node| {
        let is = |name: &str, value: &[u8]| fs::read(node.join(name)).is_ok_and(|v| v == value);
        is("device_type", b"memory\0") && is("status", b"disabled\0")
    });
    let kept = kept.last()?;
    let cells = |name: &str| -> Vec<u64> {
        let bytes = fs::read(kept.join(name)).expect("a property");
        let cell = |c: &[u8]| c.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        bytes.chunks(4).map(cell).collect()
    };
    let (reg, node) = (cells("reg"), cells("numa-node-id")[0]);
    if !fs::exists("/sys/module/pageferry_memory_test").expect("sysfs") {
        let out = Command::new("insmod")
            .arg(format!("{MODULES}/pageferry_memory_test.ko"))
            .arg(format!("start={:#x}", reg[0] << 32 | reg[1]))
            .arg(format!("size={:#x}", reg[2] << 32 | reg[3]))
            .arg(format!("node={node}"))
            .output()
            .expect("busybox");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    let node = i32::try_from(node).expect("a node");
    for block in blocks(node) {
        if fs::read_to_string(&block).expect("sysfs").trim() == "offline" {
            fs::write(&block, "online_movable").expect("memory that was added");
        }
    }
    Some(node)
}

/// Who copies now.
pub fn migrator() -> String {
    fs::read_to_string(format!("{OFFLOAD}/migrator")).expect("sysfs").trim().to_owned()
}

/// A module that is loaded, and unloaded when dropped.
pub struct Module {
    name: &'static str,
    /// The parameter by which it begins and ends to copy.
    switch: &'static str,
}

impl Module {
    /// Loads it with these parameters, and has it copy.
    pub fn load(name: &'static str, parameters: &[&str]) -> Self {
        let module = Self::try_load(name, parameters).expect("the module can be loaded");
        module.set(module.switch, "1").expect("it can begin");
        assert_eq!(migrator(), name);
        module
    }

    /// The one that this machine's pages are copied with: by the board's DMA engine where there is
    /// one, else by several CPUs.
    pub fn best() -> Self {
        match interrupts().len() {
            0 => Self::load(MT, &["least_kib=4"]),
            _ => Self::load(DMA, &["least_kib=4", BOARD]),
        }
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Loads it; what insmod said if it could not.
    pub fn try_load(name: &'static str, parameters: &[&str]) -> Result<Self, String> {
        let switch = if name == TEST { "registered" } else { "enabled" };
        let file = format!("{MODULES}/{name}.ko");
        let out = Command::new("insmod").arg(file).args(parameters).output().expect("busybox");
        if out.status.success() {
            Ok(Self { name, switch })
        } else {
            Err(String::from_utf8_lossy(&out.stderr).into_owned())
        }
    }

    fn parameter(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/sys/module/{}/parameters/{name}", self.name))
    }

    pub fn set(&self, parameter: &str, value: &str) -> io::Result<()> {
        fs::write(self.parameter(parameter), value)
    }

    pub fn get(&self, parameter: &str) -> String {
        fs::read_to_string(self.parameter(parameter)).expect("readable").trim().to_owned()
    }

    pub fn number(&self, parameter: &str) -> u64 {
        self.get(parameter).parse().expect("a number")
    }

    /// All its parameters.
    pub fn parameters(&self) -> Vec<String> {
        let folder = format!("/sys/module/{}/parameters", self.name);
        let entries = fs::read_dir(folder).expect("parameters");
        entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // A test that has failed is to say so, not that this did not work either.
        let ended = self.set(self.switch, "0");
        let out = Command::new("rmmod").arg(self.name).output();
        if !std::thread::panicking() {
            ended.expect("it can end");
            let out = out.expect("busybox");
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        }
    }
}

/// Kinds of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Base,
    Huge,
    Shared,
    /// A file of a tmpfs.
    File,
    /// Of hugetlb's own.
    HugeTlb,
}

impl Kind {
    fn is_huge(self) -> bool {
        matches!(self, Self::Huge | Self::HugeTlb)
    }
}

/// Memory of this process, each word of which is known.
pub struct Memory {
    start: usize,
    pub bytes: usize,
    kind: Kind,
}

// Word `i` of the memory holds `i` mixed with how often it was written.
fn word(index: usize, version: u64) -> u64 {
    (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version
}

impl Memory {
    /// Filled memory; for huge pages a multiple of them.
    pub fn new(kind: Kind, bytes: usize) -> Self {
        let (flags, file) = match kind {
            Kind::Base | Kind::Huge => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None),
            Kind::HugeTlb => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB, None),
            Kind::Shared => (libc::MAP_SHARED | libc::MAP_ANONYMOUS, None),
            Kind::File => {
                let file = tempfile::tempfile_in("/tmp").expect("a file");
                file.set_len(bytes as u64).expect("a length");
                (libc::MAP_SHARED, Some(file))
            }
        };
        let descriptor = file.as_ref().map_or(-1, |f| f.as_raw_fd());
        let spare = if kind == Kind::Huge { HUGE } else { 0 };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(null_mut(), bytes + spare, prot, flags, descriptor, 0)
        };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        let mut start = at.expose_provenance();
        if kind == Kind::Huge {
            start = start.next_multiple_of(HUGE);
        }
        let advice = if kind == Kind::Huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: advice about the mapping just made, which gives nothing up.
        let advised = unsafe { libc::madvise(with_exposed_provenance_mut(start), bytes, advice) };
        assert!(
            advised == 0 || matches!(kind, Kind::File | Kind::HugeTlb),
            "{}",
            io::Error::last_os_error()
        );
        let memory = Self { start, bytes, kind };
        memory.fill();
        memory
    }

    pub fn range(&self) -> Range<usize> {
        self.start..self.start + self.bytes
    }

    /// All its words, which other threads write too: hence atomics.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped for good, writable, aligned, and touched through atomics only.
        unsafe {
            std::slice::from_raw_parts(with_exposed_provenance_mut(self.start), self.bytes / 8)
        }
    }

    fn fill(&self) {
        for (index, place) in self.words().iter().enumerate() {
            place.store(word(index, 0), Ordering::Relaxed);
        }
    }

    /// Panics if a word is not what was last written to it.
    pub fn verify(&self) {
        for (index, place) in self.words().iter().enumerate() {
            let found = place.load(Ordering::Relaxed);
            assert_eq!(found, word(index, 0), "word {index} of {:?}", self.kind);
        }
    }

    /// How many words are not what they should be.
    pub fn wrong(&self) -> usize {
        let words = self.words().iter().enumerate();
        words.filter(|(i, place)| place.load(Ordering::Relaxed) != word(*i, 0)).count()
    }

    /// Addresses of its folios.
    pub fn folios(&self) -> Vec<usize> {
        let step = if self.kind.is_huge() { HUGE } else { page_size() };
        self.range().step_by(step).collect()
    }

    /// `move_pages(2)` of all of it; the status of each folio.
    pub fn move_to(&self, node: i32) -> Vec<i32> {
        self.try_move_to(node).expect("move_pages")
    }

    /// As above; the error if it ended early.
    pub fn try_move_to(&self, node: i32) -> Result<Vec<i32>, Errno> {
        let pages = self.folios();
        let mut status = vec![i32::MIN; pages.len()];
        move_pages(&pages, &vec![node; pages.len()], &mut status)?;
        Ok(status)
    }

    /// As above; panics if a folio did not move.
    pub fn must_move_to(&self, node: i32) {
        self.move_to(node);
        self.must_be_on(node);
    }

    /// The node of each page.
    pub fn nodes(&self) -> Vec<i32> {
        let pages: Vec<usize> = self.range().step_by(page_size()).collect();
        let mut status = vec![i32::MIN; pages.len()];
        pageferry_sys::Sys::page_nodes(&pageferry_sys::Linux, &pages, &mut status).expect("query");
        status
    }

    pub fn must_be_on(&self, node: i32) {
        let elsewhere = self.nodes().iter().filter(|on| **on != node).count();
        assert_eq!(elsewhere, 0, "pages of {:?} are not on node {node}", self.kind);
    }
}

/// Threads that write every word of a memory again and again, each its own, and look whether what
/// they wrote is still there.
pub struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
}

impl Writers {
    /// `memory` is leaked: the threads may outlive a test that fails.
    pub fn start(memory: &'static Memory, count: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..count).map(|own| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut rounds = 0;
                while !stop.load(Ordering::Relaxed) {
                    write_round(memory.words(), own, count, rounds);
                    rounds += 1;
                }
                // As it was, for `verify`.
                for (index, place) in memory.words().iter().enumerate() {
                    if index / 512 % count == own {
                        place.store(word(index, 0), Ordering::Relaxed);
                    }
                }
                rounds
            })
        });
        Self { stop: Arc::clone(&stop), threads: threads.collect() }
    }

    /// Ends them; how many rounds the slowest made.
    pub fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let rounds =
            self.threads.into_iter().map(|t| t.join().expect("a writer saw what it wrote"));
        rounds.min().unwrap_or(0)
    }
}

/// One word in 64 of each page that is this thread's: enough to meet a page that lost a write.
fn write_round(words: &[AtomicU64], own: usize, count: usize, rounds: u64) {
    for (index, place) in words.iter().enumerate().step_by(64) {
        if index / 512 % count != own {
            continue;
        }
        let found = place.load(Ordering::Relaxed);
        let before = if rounds == 0 { word(index, 0) } else { word(index, rounds) };
        assert_eq!(found, before, "word {index} lost what was written to it");
        place.store(word(index, rounds + 1), Ordering::Relaxed);
    }
}

/// Moves memory there and back; how many of its pages a module copied.
pub fn there_and_back(memory: &Memory) -> u64 {
    let before = vmstat("pgmigrate_offload_success");
    memory.must_move_to(0);
    memory.must_move_to(1);
    memory.verify();
    memory.must_move_to(0);
    memory.verify();
    vmstat("pgmigrate_offload_success") - before
}

/// Moves memory of each of these kinds to and fro for so long, while writers verify every word.
pub fn race(kinds: &[Kind], time: Duration) {
    for &kind in kinds {
        let memory: &Memory = Box::leak(Box::new(Memory::new(kind, 4 << 20)));
        let writers = Writers::start(memory, 2);
        let before = vmstat("pgmigrate_offload_success");
        let until = Instant::now() + time;
        let mut moves = 0;
        while Instant::now() < until {
            memory.move_to(1 - moves % 2);
            moves += 1;
        }
        let rounds = writers.finish();
        assert!(rounds > 0 && moves > 1, "{rounds} rounds beside {moves} moves");
        assert!(vmstat("pgmigrate_offload_success") > before, "{kind:?}: nothing was copied so");
        memory.verify();
    }
}

/// Has a module come and go 20 times while pages move.
pub fn come_and_go(load: impl Fn() -> Module) {
    let memory: &Memory = Box::leak(Box::new(Memory::new(Kind::Base, 2 << 20)));
    let huge: &Memory = Box::leak(Box::new(Memory::new(Kind::Huge, 4 << 20)));
    let writers = Writers::start(memory, 1);
    let stop = AtomicBool::new(false);
    let before = vmstat("pgmigrate_offload_success");
    std::thread::scope(|scope| {
        for memory in [memory, huge] {
            let stop = &stop;
            scope.spawn(move || {
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    memory.move_to(round % 2);
                    round += 1;
                }
            });
        }
        for round in 0..20 {
            let module = load();
            // At least a batch each, but do not wait for ever if none comes.
            let until = Instant::now() + Duration::from_secs(5);
            while module.number("batches") == 0 && Instant::now() < until {
                std::thread::yield_now();
            }
            drop(module);
            assert_eq!(migrator(), "none", "after round {round}");
        }
        stop.store(true, Ordering::Relaxed);
    });
    writers.finish();
    assert!(vmstat("pgmigrate_offload_success") > before, "no batch met the module");
    memory.verify();
    huge.verify();
}
