//! Pages that the kernel moves are copied by DMA engines, with every byte right: by one that nobody
//! here wrote (the board's, and Linux's driver for it), and by one that misbehaves.

mod kernel_common;

use kernel_common::{
    BOARD, DMA, Kind, Memory, Module, come_and_go, here, interrupts, migrator, race,
    there_and_back, vmstat,
};
use pageferry_sys::page_size;
use std::time::Duration;

const MIB: usize = 1 << 20;

/// Whether the board's engine is there; says why not.
fn board() -> bool {
    if !here() {
        return false;
    }
    let is_there = interrupts().len() == 16;
    if !is_there {
        eprintln!("skipped: this machine has no DMA engine (the arm64 machine has)");
    }
    is_there
}

fn load(parameters: &[&str]) -> Module {
    Module::load(DMA, &[&[BOARD, "least_kib=4"], parameters].concat())
}

#[test]
fn pages_of_each_kind_are_copied_by_the_engine_and_are_right() {
    if !board() {
        return;
    }
    let module = load(&[]);
    for kind in [Kind::Base, Kind::Huge, Kind::Shared, Kind::File] {
        let memory = Memory::new(kind, 8 * MIB);
        memory.must_move_to(0);
        let (pages, batches) = ((8 * MIB / page_size()) as u64, vmstat("migrate_offload_batch"));
        let before: u64 = interrupts().iter().sum();
        let copied = there_and_back(&memory);
        assert!(copied >= 2 * pages * 9 / 10, "{kind:?}: {copied} of {} pages", 2 * pages);
        let batches = vmstat("migrate_offload_batch") - batches;
        assert!(batches >= 2 && batches <= copied, "{kind:?}: {batches} batches");
        let interrupts = interrupts().iter().sum::<u64>() - before;
        assert!(interrupts >= batches, "{kind:?}: {interrupts} interrupts, {batches} batches");
    }
    assert!(module.number("bytes") > 0);
    assert_eq!((module.number("failed_folios"), module.number("timeouts")), (0, 0));
}

#[test]
fn batches_have_up_to_512_folios() {
    if !board() {
        return;
    }
    let module = load(&[]);
    let memory = Memory::new(Kind::Base, 8 * MIB);
    memory.must_move_to(0);
    let (batches, bytes) = (module.number("batches"), module.number("bytes"));
    memory.must_move_to(1);
    let folios = (module.number("bytes") - bytes) / page_size() as u64;
    let batches = module.number("batches") - batches;
    // NR_MAX_BATCHED_MIGRATION (mm/migrate.c) is 512; pages that were not on its lists yet, or are
    // held by somebody, make a batch more.
    assert!(folios >= 2000 && batches <= 6, "{folios} folios in {batches} batches");
    memory.verify();
}

#[test]
fn as_many_channels_as_told_copy_a_batch() {
    if !board() {
        return;
    }
    let module = load(&[]);
    let memory = Memory::new(Kind::Huge, 8 * MIB);
    memory.must_move_to(0);
    for (round, channels) in [1_usize, 2, 4, 8, 16, 32, 3].into_iter().enumerate() {
        module.set("channels", &channels.to_string()).expect("in range");
        let before = interrupts();
        memory.must_move_to(1 - i32::try_from(round % 2).expect("0 or 1"));
        let now = interrupts();
        let busy = now.iter().zip(&before).filter(|(now, before)| now > before).count();
        assert_eq!(busy, channels.min(16), "channels={channels}");
        memory.verify();
    }
}

#[test]
fn small_batches_are_left_to_the_cpu() {
    if !board() {
        return;
    }
    let module = load(&[]);
    module.set("least_kib", "1024").expect("in range");
    let small = Memory::new(Kind::Base, MIB / 2);
    assert_eq!(there_and_back(&small), 0);
    let large = Memory::new(Kind::Huge, 4 * MIB);
    assert!(there_and_back(&large) > 0);
}

#[test]
fn a_comparison_of_each_copy_finds_nothing_wrong_while_writers_race() {
    if !board() {
        return;
    }
    for poll in ["poll=0", "poll=1"] {
        let module = load(&["verify=1", "channels=8", poll]);
        race(&[Kind::Base, Kind::Huge, Kind::Shared], Duration::from_secs(3));
        assert_eq!(module.number("lies"), 0, "{poll}");
    }
}

#[test]
fn movers_that_run_at_once_do_not_disturb_each_other() {
    if !board() {
        return;
    }
    // Fewer channels than movers could use, and enough for all.
    for channels in ["channels=16", "channels=2"] {
        let module = load(&[channels, "verify=1"]);
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
        assert!(module.number("batches") > 0);
        assert_eq!(module.number("lies"), 0);
    }
}

#[test]
fn the_end_is_looked_for_or_told() {
    if !board() {
        return;
    }
    let module = load(&["poll=1"]);
    for poll in ["1", "0", "1"] {
        module.set("poll", poll).expect("in range");
        for kind in [Kind::Base, Kind::Huge] {
            assert!(there_and_back(&Memory::new(kind, 4 * MIB)) > 0, "poll={poll}");
        }
    }
    assert_eq!((module.number("failed_folios"), module.number("timeouts")), (0, 0));
}

#[test]
fn the_module_comes_and_goes_while_pages_move() {
    if !board() {
        return;
    }
    come_and_go(|| load(&["channels=16"]));
}

#[test]
fn without_a_channel_the_module_is_not_loaded() {
    if !here() {
        return;
    }
    let refused = Module::try_load(DMA, &["devices=nobody,nothing"]).err();
    let refused = refused.expect("there is no such device");
    assert!(refused.contains("No such device"), "{refused}");
    assert_eq!(migrator(), "none");
}

#[test]
fn bad_parameters_are_refused_at_load_and_later() {
    if !board() {
        return;
    }
    let bad = [
        ("channels", ["0", "33", "-1", "all", ""]),
        ("least_kib", ["0", "1048577", "9999999999", "64k", "-64"]),
        ("timeout_ms", ["0", "600001", "-1", "1s", " "]),
        ("poll", ["2x", "perhaps", "", "-1", "9"]),
        ("verify", ["2x", "perhaps", "", "-1", "9"]),
        ("enabled", ["2x", "perhaps", "", "-1", "9"]),
        ("reasons", ["weather", "all,weather", "compaction,,demotion", "1", ","]),
    ];
    for (name, values) in bad {
        let parameter = format!("{name}={}", values[1]);
        assert!(Module::try_load(DMA, &[BOARD, &parameter]).is_err(), "{parameter} was taken");
    }
    let module = load(&[]);
    let memory = Memory::new(Kind::Base, MIB);
    for (name, values) in bad {
        let before = module.get(name);
        for value in values {
            let error = module.set(name, value).err();
            let error = error.and_then(|error| error.raw_os_error());
            // Nothing is written where there is nothing to write.
            let expected = if value.is_empty() { None } else { Some(libc::EINVAL) };
            assert_eq!(error, expected, "{name}={value:?}");
        }
        assert_eq!(module.get(name), before, "{name}");
        assert!(there_and_back(&memory) > 0, "after bad values of {name}");
    }
    for name in ["batches", "bytes", "lies", "devices"] {
        assert!(module.set(name, "1").is_err(), "{name} is to be read only");
    }
}
