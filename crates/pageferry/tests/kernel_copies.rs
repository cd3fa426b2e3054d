//! Pages that the kernel moves are copied by a module, in batches, with every byte right: whoever
//! asks for the move, and whatever kind of page it is.

mod kernel_common;

use kernel_common::{HUGE, Kind, MT, Memory, Module, TEST, here, race, there_and_back, vmstat};
use pageferry_sys::page_size;
use pageferry_sys::usage::move_pages;
use std::fs;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
const THP: &str = "/sys/kernel/mm/transparent_hugepage";

#[test]
fn pages_of_each_kind_are_copied_in_batches_and_are_right() {
    if !here() {
        return;
    }
    let module = Module::load(MT, &["least_kib=4"]);
    for kind in [Kind::Base, Kind::Huge, Kind::Shared, Kind::File] {
        let memory = Memory::new(kind, 8 * MIB);
        memory.must_move_to(0);
        let (pages, batches) = ((8 * MIB / page_size()) as u64, vmstat("migrate_offload_batch"));
        let copied = there_and_back(&memory);
        assert!(copied >= 2 * pages * 9 / 10, "{kind:?}: {copied} of {} pages", 2 * pages);
        let batches = vmstat("migrate_offload_batch") - batches;
        assert!(batches >= 2 && batches <= copied, "{kind:?}: {batches} batches");
    }
    assert_eq!(module.number("failed_folios"), 0);
}

#[test]
fn without_a_module_the_kernel_copies_as_ever() {
    if !here() {
        return;
    }
    assert_eq!(kernel_common::migrator(), "none");
    for kind in [Kind::Base, Kind::Huge] {
        assert_eq!(there_and_back(&Memory::new(kind, 4 * MIB)), 0);
    }
}

#[test]
fn batches_have_up_to_512_folios() {
    if !here() {
        return;
    }
    let module = Module::load(TEST, &["mode=0"]);
    let memory = Memory::new(Kind::Base, 8 * MIB);
    there_and_back(&memory);
    let most = module.number("most_folios");
    // NR_MAX_BATCHED_MIGRATION, mm/migrate.c.
    assert!((500..=512).contains(&most), "{most} folios at most");
}

#[test]
fn helpers_copy_a_part_where_cpus_are_idle() {
    if !here() {
        return;
    }
    let module = Module::load(MT, &["least_kib=4", "helpers=4"]);
    let memory = Memory::new(Kind::Huge, 8 * MIB);
    memory.must_move_to(0);
    let charged = vmstat("migrate_offload_helper_us");
    // Whether the other CPU is idle when a batch comes is its own affair: often enough it is. What a
    // helper did in less than a microsecond is not counted.
    let until = Instant::now() + Duration::from_secs(60);
    let counted = || vmstat("migrate_offload_helper_us") > charged;
    while (module.number("helped_bytes") == 0 || !counted()) && Instant::now() < until {
        memory.must_move_to(1);
        memory.must_move_to(0);
    }
    assert!(module.number("helped_bytes") > 0, "nobody helped");
    assert!(module.number("helper_ns") > 0);
    assert!(counted(), "helpers' time is counted");
    memory.verify();
    module.set("helpers", "0").expect("in range");
    let helped = module.number("helped_bytes");
    there_and_back(&memory);
    assert_eq!(module.number("helped_bytes"), helped, "helpers that were not to be");
}

#[test]
fn writers_that_race_with_moves_find_every_word_as_they_left_it() {
    if !here() {
        return;
    }
    let _module = Module::load(MT, &["least_kib=4"]);
    race(&[Kind::Base, Kind::Huge, Kind::Shared], Duration::from_secs(4));
}

#[test]
fn movers_that_run_at_once_do_not_disturb_each_other() {
    if !here() {
        return;
    }
    let _module = Module::load(MT, &["least_kib=4"]);
    std::thread::scope(|scope| {
        for kind in [Kind::Base, Kind::Huge, Kind::Shared, Kind::Base] {
            scope.spawn(move || {
                let memory = Memory::new(kind, 4 * MIB);
                for round in 0..6 {
                    memory.move_to(round % 2);
                    memory.verify();
                }
            });
        }
    });
}

#[test]
fn every_reason_to_migrate_may_be_left_out() {
    if !here() {
        return;
    }
    let module = Module::load(MT, &["least_kib=4", "reasons=compaction,demotion"]);
    assert_eq!(module.get("reasons"), "compaction,demotion");
    let memory = Memory::new(Kind::Base, 4 * MIB);
    assert_eq!(there_and_back(&memory), 0, "move_pages(2) was left out");
    module.set("reasons", "syscall_or_cpuset").expect("a reason");
    assert!(there_and_back(&memory) > 0);
    module.set("reasons", "none").expect("none");
    assert_eq!(there_and_back(&memory), 0);
    module.set("reasons", "all").expect("all");
    assert!(there_and_back(&memory) > 0);
}

/// A setting of the machine; put back when this is dropped.
struct Setting {
    file: String,
    before: String,
}

impl Setting {
    /// For transparent huge pages of one size.
    fn thp(bytes: usize, value: &str, before: &str) -> Self {
        let file = format!("{THP}/hugepages-{}kB/enabled", bytes >> 10);
        fs::write(&file, value).unwrap_or_else(|error| panic!("{file}: {error}"));
        Self { file, before: before.to_owned() }
    }

    /// The number of huge pages that a node has for hugetlb.
    fn hugetlb(node: u32, pages: &str) -> Self {
        let file =
            format!("/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/nr_hugepages");
        let before = fs::read_to_string(&file).expect("sysfs").trim().to_owned();
        fs::write(&file, pages).expect("sysfs");
        assert_eq!(fs::read_to_string(&file).expect("sysfs").trim(), pages);
        Self { file, before }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        fs::write(&self.file, &self.before).expect("as before");
    }
}

/// Folios of a size that were split so far.
fn splits(bytes: usize) -> u64 {
    let file = format!("{THP}/hugepages-{}kB/stats/split", bytes >> 10);
    fs::read_to_string(file).expect("counted since Linux 6.10").trim().parse().expect("a number")
}

#[test]
fn folios_of_every_size_are_copied_whole() {
    if !here() {
        return;
    }
    let _module = Module::load(MT, &["least_kib=4"]);
    // The default of the largest, Documentation/admin-guide/mm/transhuge.rst.
    let _none = Setting::thp(HUGE, "never", "inherit");
    for folio in [16 << 10, 64 << 10, 256 << 10, MIB] {
        let _size = Setting::thp(folio, "madvise", "never");
        let before = vmstat("pgmigrate_offload_success");
        // New folios each time: migration unmaps them page by page, for which Linux 6.12 (with "mm:
        // migrate: requeue destination folio on deferred split queue") takes them for partially
        // mapped, and splits them when they migrate again.
        for node in [1, 0, 1] {
            let memory = Memory::new(Kind::Huge, 8 * MIB);
            let split = splits(folio);
            let pages: Vec<usize> = memory.range().step_by(folio).collect();
            let mut status = vec![i32::MIN; pages.len()];
            let left = move_pages(&pages, &vec![node; pages.len()], &mut status);
            left.expect("move_pages");
            memory.verify();
            memory.must_be_on(node);
            assert_eq!(splits(folio), split, "{} KiB", folio >> 10);
        }
        let copied = vmstat("pgmigrate_offload_success") - before;
        assert!(copied >= (8 * MIB / page_size()) as u64, "{folio}: {copied} pages");
    }
}

#[test]
fn pages_of_hugetlb_move_as_ever() {
    if !here() {
        return;
    }
    let _module = Module::best();
    // They are moved one by one by a path of their own, and offered to nobody.
    assert_eq!(there_and_back(&Memory::new(Kind::HugeTlb, 2 * HUGE)), 0);
}

#[test]
fn pages_of_hugetlb_for_which_the_other_node_has_none_ready_keep_their_content() {
    if !here() {
        return;
    }
    // Linux then makes a page for the move, and marks it as such where others have our mark.
    let _here = Setting::hugetlb(0, "4");
    let _there = Setting::hugetlb(1, "0");
    for with_module in [false, true] {
        let _module = with_module.then(Module::best);
        let memory = Memory::new(Kind::HugeTlb, 2 * HUGE);
        memory.must_be_on(0);
        memory.must_move_to(1);
        memory.verify();
    }
}
