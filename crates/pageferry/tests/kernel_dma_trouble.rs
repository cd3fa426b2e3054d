//! Whatever a DMA engine does - fail, lie, write elsewhere, hang, be late - no page is lost, and no
//! page that it may still write to is used; what cannot be seen by the kernel is seen by the
//! comparison that it can be told to make, and by these tests.

mod kernel_common;
mod kernel_engine;

use kernel_common::{DMA, Kind, Memory, Module, Writers, here, there_and_back, vmstat};
use kernel_engine::{Engine, Mode};
use pageferry_sys::page_size;
use std::fs;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

/// The engine, honest; says why there is none.
fn engine() -> Option<Engine> {
    here().then(Engine::get)?
}

fn load(parameters: &[&str]) -> Module {
    Module::load(DMA, &[&[Engine::DEVICES, "least_kib=4"], parameters].concat())
}

/// Waits until something is so; panics if it is not in 30 s.
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_engine_with_few_descriptors_is_asked_again_and_again() {
    let Some(engine) = engine() else { return };
    let module = load(&["channels=3", "timeout_ms=20000"]);
    for descriptors in [1, 2, 7, 600] {
        engine.set("descriptors", descriptors);
        for kind in [Kind::Base, Kind::Huge] {
            assert!(there_and_back(&Memory::new(kind, 4 * MIB)) > 0);
        }
    }
    assert_eq!((module.number("failed_folios"), module.number("timeouts")), (0, 0));
}

#[test]
fn an_engine_that_keeps_no_order_is_waited_for_copy_by_copy() {
    let Some(engine) = engine() else { return };
    engine.set("unordered", 1);
    for poll in ["poll=0", "poll=1"] {
        let module = load(&["channels=2", "timeout_ms=20000", "verify=1", poll]);
        for kind in [Kind::Base, Kind::Huge] {
            assert!(there_and_back(&Memory::new(kind, 4 * MIB)) > 0, "{poll}");
        }
        assert_eq!((module.number("timeouts"), module.number("lies")), (0, 0), "{poll}");
    }
}

#[test]
fn what_an_engine_does_not_copy_the_kernel_copies() {
    let Some(engine) = engine() else { return };
    for poll in ["poll=0", "poll=1"] {
        let module = load(&["timeout_ms=20000", poll]);
        for mode in [Mode::Fails, Mode::Refuses, Mode::Rejects] {
            engine.be(mode);
            let failed = module.number("failed_folios");
            for kind in [Kind::Base, Kind::Huge, Kind::Shared] {
                let memory = Memory::new(kind, 2 * MIB);
                assert_eq!(there_and_back(&memory), 0, "{mode:?}, {poll}");
            }
            assert!(module.number("failed_folios") > failed, "{mode:?}, {poll}");
        }
        engine.be(Mode::Honest);
        assert!(there_and_back(&Memory::new(Kind::Base, 2 * MIB)) > 0, "{poll}: as before");
        assert_eq!((module.number("timeouts"), module.number("kept_folios")), (0, 0));
    }
}

#[test]
fn an_engine_that_takes_no_more_half_way_is_waited_for_with_what_it_took() {
    let Some(engine) = engine() else { return };
    engine.set("delay_ms", 200);
    engine.set("descriptors", 600);
    for poll in ["poll=0", "poll=1"] {
        let module = load(&["channels=2", "timeout_ms=20000", poll]);
        let memory = Memory::new(Kind::Base, 2 * MIB);
        // Now the channels are known to take all at once, with one interrupt for all.
        there_and_back(&memory);
        engine.be(Mode::Tires);
        memory.move_to(1);
        // What was believed too early would be overwritten now.
        std::thread::sleep(Duration::from_millis(500));
        memory.verify();
        engine.be(Mode::Honest);
        memory.must_be_on(1);
        assert_eq!((module.number("timeouts"), module.number("kept_folios")), (0, 0), "{poll}");
        assert!(there_and_back(&memory) > 0, "{poll}: as before");
    }
}

#[test]
fn fewer_descriptors_than_the_time_before_cost_no_time_out() {
    let Some(engine) = engine() else { return };
    engine.set("descriptors", 600);
    let module = load(&["channels=1", "timeout_ms=20000"]);
    let memory = Memory::new(Kind::Base, 2 * MIB);
    there_and_back(&memory);
    engine.set("descriptors", 20);
    let began = Instant::now();
    assert!(there_and_back(&memory) > 0);
    assert!(began.elapsed() < Duration::from_secs(15), "an interrupt was waited for");
    assert_eq!((module.number("timeouts"), module.number("failed_folios")), (0, 0));
}

/// Where the highest zone of a node begins.
fn highest_start(node: u32) -> u64 {
    let text = fs::read_to_string("/proc/zoneinfo").expect("procfs");
    let (mut ours, mut highest) = (false, 0);
    for line in text.lines() {
        if line.starts_with("Node ") {
            ours = line.starts_with(&format!("Node {node},"));
        }
        let start = line.trim().strip_prefix("start_pfn:").filter(|_| ours);
        let start = start.and_then(|pfn| pfn.trim().parse::<u64>().ok());
        highest = highest.max(start.unwrap_or(0) * page_size() as u64);
    }
    highest
}

#[test]
fn a_mapping_that_fails_leaves_its_part_to_the_kernel() {
    let Some(engine) = engine() else { return };
    if highest_start(1) < 1 << 32 {
        eprintln!("skipped: a device with 32 address bits reaches all of this machine's memory");
        return;
    }
    let module = load(&["channels=2", "timeout_ms=20000"]);
    // It does not reach node 1. Where the kernel has bounce buffers, base pages go through them, and
    // a half of a huge page is more than they take.
    engine.set("mask_bits", 32);
    let failed = vmstat("pgmigrate_offload_fail");
    let huge = Memory::new(Kind::Huge, 4 * MIB);
    assert_eq!(there_and_back(&huge), 0, "mapped for a device that cannot reach it");
    assert!(vmstat("pgmigrate_offload_fail") > failed);
    assert!(module.number("failed_folios") > 0);
    there_and_back(&Memory::new(Kind::Base, 4 * MIB));
    engine.set("mask_bits", 64);
    assert!(there_and_back(&huge) > 0, "as before");
}

#[test]
fn a_copy_that_went_elsewhere_or_nowhere_is_seen_by_these_tests() {
    // The control: without it, the other tests could pass whatever the engine does.
    let Some(engine) = engine() else { return };
    let module = load(&["channels=1", "timeout_ms=20000"]);
    for mode in [Mode::Misdirects, Mode::Lies] {
        let memory = Memory::new(Kind::Base, MIB);
        memory.must_move_to(0);
        // Once: a second time would put back what was swapped.
        engine.be(mode);
        memory.move_to(1);
        engine.be(Mode::Honest);
        assert!(memory.wrong() > 0, "{mode:?} was not seen");
    }
    assert_eq!(module.number("lies"), 0, "nobody was told to look");
}

#[test]
fn a_copy_that_went_elsewhere_or_nowhere_is_found_by_comparing_and_mended() {
    let Some(engine) = engine() else { return };
    let module = load(&["channels=2", "timeout_ms=20000", "verify=1"]);
    for mode in [Mode::Misdirects, Mode::Lies] {
        for kind in [Kind::Base, Kind::Huge] {
            engine.be(mode);
            let lies = module.number("lies");
            let memory = Memory::new(kind, 4 * MIB);
            there_and_back(&memory);
            memory.verify();
            // Of a huge page each channel has one part: there is no neighbour to swap with.
            if kind == Kind::Base || matches!(mode, Mode::Lies) {
                assert!(module.number("lies") > lies, "{mode:?} of {kind:?} was not found");
            }
        }
    }
    engine.be(Mode::Honest);
    let lies = module.number("lies");
    assert!(there_and_back(&Memory::new(Kind::Base, 4 * MIB)) > 0);
    assert_eq!(module.number("lies"), lies);
}

#[test]
fn an_interrupt_that_is_lost_costs_the_time_out_and_nothing_else() {
    let Some(engine) = engine() else { return };
    let module = load(&["channels=2", "timeout_ms=100"]);
    engine.be(Mode::Quiet);
    let memory = Memory::new(Kind::Base, MIB);
    assert!(there_and_back(&memory) > 0);
    assert!(module.number("timeouts") > 0);
    assert_eq!((module.number("retired_channels"), module.number("kept_folios")), (0, 0));
}

/// Moves memory to node 1 while the engine does not copy in time, and looks whether everything is as
/// it must be then.
fn given_up(engine: &Engine, mode: Mode, module: &Module, memory: &Memory) {
    memory.must_move_to(0);
    let before = (module.number("timeouts"), module.number("kept_folios"));
    engine.be(mode);
    module.set("timeout_ms", "1").expect("in range");
    // Migration tries again, base pages one by one: on a slow machine those that are not kept any
    // more would cost a channel each.
    module.set("least_kib", "64").expect("in range");
    memory.move_to(1);
    engine.be(Mode::Honest);
    module.set("least_kib", "4").expect("in range");
    // An engine that is honest is slow in an emulated machine that waits for its turn.
    module.set("timeout_ms", "20000").expect("in range");
    assert!(module.number("timeouts") > before.0, "it was in time");
    assert!(module.number("retired_channels") > 0);
    assert!(module.number("kept_folios") > before.1, "nothing was kept");
    memory.verify();
}

#[test]
fn a_channel_that_hangs_is_given_up_and_its_pages_stay_where_they_were() {
    let Some(engine) = engine() else { return };
    for poll in ["poll=0", "poll=1"] {
        for kind in [Kind::Base, Kind::Huge] {
            let module = load(&["channels=1", "timeout_ms=20000", poll]);
            let memory = Memory::new(kind, 2 * MIB);
            given_up(&engine, Mode::Hangs, &module, &memory);
            // The sources were held for a moment; then they move like any other page.
            until("pages that were kept do not move again", || {
                memory.move_to(1);
                memory.nodes().iter().all(|node| *node == 1)
            });
            memory.verify();
            assert!(there_and_back(&memory) > 0, "the next channel copies");
        }
    }
}

#[test]
fn what_a_late_channel_writes_nobody_uses() {
    let Some(engine) = engine() else { return };
    engine.set("delay_ms", 1500);
    let module = load(&["channels=1", "timeout_ms=20000"]);
    let memory = Memory::new(Kind::Base, 2 * MIB);
    let late = engine.late_writes();
    given_up(&engine, Mode::Late, &module, &memory);
    // Memory of that node that is free now is taken and filled before the device writes.
    let other = Memory::new(Kind::Base, 64 * MIB);
    other.move_to(1);
    until("the device was never late", || engine.late_writes() > late);
    std::thread::sleep(Duration::from_millis(200));
    memory.verify();
    other.verify();
}

#[test]
fn the_module_may_go_before_a_late_channel_ends() {
    let Some(engine) = engine() else { return };
    engine.set("delay_ms", 1000);
    let memory = Memory::new(Kind::Base, MIB);
    let module = load(&["channels=1", "timeout_ms=20000"]);
    let late = engine.late_writes();
    given_up(&engine, Mode::Late, &module, &memory);
    assert_eq!(engine.late_writes(), late, "it was not that late");
    drop(module);
    until("the device was never late", || engine.late_writes() > late);
    memory.verify();
}

#[test]
fn a_channel_that_is_slow_but_in_time_delays_and_loses_nothing() {
    let Some(engine) = engine() else { return };
    engine.set("delay_ms", 50);
    engine.set("descriptors", 600);
    let module = load(&["channels=4", "timeout_ms=20000"]);
    engine.be(Mode::Late);
    let memory: &Memory = Box::leak(Box::new(Memory::new(Kind::Base, MIB)));
    let writers = Writers::start(memory, 2);
    for round in 0..6 {
        memory.move_to(round % 2);
    }
    writers.finish();
    engine.be(Mode::Honest);
    memory.verify();
    assert!(module.number("batches") > 0);
    assert_eq!((module.number("timeouts"), module.number("failed_folios")), (0, 0));
}

#[test]
fn without_a_free_channel_the_kernel_copies() {
    let Some(engine) = engine() else { return };
    engine.set("delay_ms", 400);
    engine.set("descriptors", 600);
    let module = load(&["channels=32", "timeout_ms=20000"]);
    let (first, second) = (Memory::new(Kind::Base, 2 * MIB), Memory::new(Kind::Base, MIB));
    first.must_move_to(0);
    second.must_move_to(0);
    let failed = vmstat("pgmigrate_offload_fail");
    // Until the first has all channels while the second moves: who comes first is chance.
    for round in 0..20 {
        engine.be(Mode::Late);
        std::thread::scope(|scope| {
            let mover = scope.spawn(|| first.move_to(1 - round % 2));
            while !mover.is_finished() {
                second.move_to(1);
                second.move_to(0);
            }
        });
        if vmstat("pgmigrate_offload_fail") > failed {
            break;
        }
    }
    engine.be(Mode::Honest);
    let failed = vmstat("pgmigrate_offload_fail") - failed;
    assert!(failed > 0, "{failed} pages found no channel");
    first.verify();
    second.verify();
    assert_eq!(module.number("timeouts"), 0);
}
