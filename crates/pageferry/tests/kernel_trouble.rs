//! Whatever a module that copies does - fail, lie, linger, go away - and whatever is written to its
//! parameters: no page is lost, and what cannot be seen by the kernel is seen by these tests.

mod kernel_common;

use kernel_common::{Kind, MT, Memory, Module, TEST, Writers, come_and_go, here, migrator, vmstat};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

fn move_around(memory: &Memory) {
    memory.must_move_to(0);
    memory.must_move_to(1);
    memory.must_move_to(0);
}

#[test]
fn what_a_module_fails_to_copy_the_kernel_copies() {
    if !here() {
        return;
    }
    let module = Module::load(TEST, &[]);
    for (mode, name) in [("1", "fails"), ("4", "copies every other folio"), ("5", "declines")] {
        module.set("mode", mode).expect("a mode");
        let (copied, failed) =
            (vmstat("pgmigrate_offload_success"), vmstat("pgmigrate_offload_fail"));
        for kind in [Kind::Base, Kind::Huge, Kind::Shared] {
            let memory = Memory::new(kind, 4 * MIB);
            move_around(&memory);
            memory.verify();
        }
        let copied = vmstat("pgmigrate_offload_success") - copied;
        let failed = vmstat("pgmigrate_offload_fail") - failed;
        assert_eq!(copied > 0, mode == "4", "{name}: {copied} copied");
        assert_eq!(failed > 0, mode != "5", "{name}: {failed} not copied");
    }
}

#[test]
fn a_module_that_says_it_copied_and_did_not_is_seen_by_these_tests() {
    if !here() {
        return;
    }
    // The control: without it, the other tests could pass whatever the modules do.
    let module = Module::load(TEST, &["mode=2"]);
    let memory = Memory::new(Kind::Base, MIB);
    memory.move_to(0);
    memory.move_to(1);
    assert!(memory.wrong() > 0, "a lie was not seen");
    drop(module);
}

#[test]
fn a_slow_module_delays_and_loses_nothing() {
    if !here() {
        return;
    }
    let _module = Module::load(TEST, &["mode=3"]);
    let memory: &Memory = Box::leak(Box::new(Memory::new(Kind::Base, MIB)));
    let writers = Writers::start(memory, 2);
    for round in 0..4 {
        memory.move_to(round % 2);
    }
    writers.finish();
    memory.verify();
}

#[test]
fn a_module_that_is_unregistered_in_flight_is_waited_for() {
    if !here() {
        return;
    }
    let module = Module::load(TEST, &["mode=3"]);
    let memory = Memory::new(Kind::Base, 2 * MIB);
    memory.move_to(0);
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| memory.move_to(1));
        let until = Instant::now() + Duration::from_secs(20);
        while module.number("under_way") == 0 {
            assert!(Instant::now() < until, "no batch came");
        }
        module.set("registered", "0").expect("it can end");
        assert_eq!(module.number("under_way"), 0, "a batch was still being copied");
        assert_eq!(migrator(), "none");
        mover.join().expect("the move");
    });
    memory.must_be_on(1);
    memory.verify();
}

#[test]
fn modules_come_and_go_while_pages_move() {
    if !here() {
        return;
    }
    come_and_go(|| Module::load(MT, &["least_kib=4"]));
}

#[test]
fn one_module_copies_at_a_time_and_it_cannot_be_unloaded_meanwhile() {
    if !here() {
        return;
    }
    let test = Module::load(TEST, &["mode=0"]);
    let refused = Module::try_load(MT, &[]).err().expect("a second one must be refused");
    assert!(refused.contains("busy"), "{refused}");
    assert_eq!(migrator(), TEST);
    let out = std::process::Command::new("rmmod").arg(TEST).output().expect("busybox");
    assert!(!out.status.success(), "unloaded while it was registered");
    let idle = Module::try_load(MT, &["enabled=0"]).expect("it waits for its turn");
    assert!(idle.set("enabled", "1").is_err(), "two at a time");
    assert_eq!(idle.get("enabled"), "N");
    test.set("registered", "0").expect("it can end");
    idle.set("enabled", "1").expect("its turn");
    assert_eq!(migrator(), MT);
}

#[test]
fn bad_parameters_are_refused_at_load_and_later() {
    if !here() {
        return;
    }
    for bad in [
        "helpers=32",
        "helpers=-1",
        "least_kib=0",
        "least_kib=9999999999",
        "node=here",
        "reasons=weather",
        "enabled=perhaps",
        "non_temporal=2x",
    ] {
        assert!(Module::try_load(MT, &[bad]).is_err(), "{bad} was taken");
    }
    // At load no parameter takes that, sums least of all.
    for name in [MT, TEST] {
        let names = Module::try_load(name, &[]).expect("loads").parameters();
        for parameter in names {
            let bad = format!("{parameter}=x");
            assert!(Module::try_load(name, &[&bad]).is_err(), "{name} took {bad}");
        }
    }
    let module = Module::load(MT, &[]);
    let memory = Memory::new(Kind::Base, MIB);
    let names: Vec<_> = ["helpers", "least_kib", "node", "reasons", "non_temporal", "enabled"]
        .into_iter()
        .filter(|name| module.parameters().iter().any(|have| have == name))
        .collect();
    assert_eq!(names.len(), 6);
    let long = "9".repeat(4000);
    let values = [
        "",
        "\n",
        "0",
        "1",
        "7",
        "31",
        "32",
        "-1",
        "4294967296",
        "auto",
        "source",
        "destination",
        "all",
        "none",
        "compaction,,demotion",
        ",",
        "\0",
        "\u{ff}\u{fe}",
        "1 2",
        long.as_str(),
        "all\nnone",
    ];
    // xorshift64, Marsaglia 2003: the same values in each run.
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut draw = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random >> 16).unwrap_or(0) % below
    };
    let (mut taken, mut refused) = (0, 0);
    for round in 0..400 {
        let (name, value) = (names[draw(names.len())], values[draw(values.len())]);
        match module.set(name, value) {
            Ok(()) => taken += 1,
            Err(error) => {
                let busy = error.raw_os_error() == Some(libc::EINVAL);
                assert!(busy, "{name}={value:?}: {error}");
                refused += 1;
            }
        }
        if round % 20 == 0 {
            memory.must_move_to(i32::from(round % 40 == 0));
            memory.verify();
        }
    }
    assert!(taken > 20 && refused > 20, "{taken} taken, {refused} refused");
    for (name, good) in [
        ("helpers", "3"),
        ("least_kib", "64"),
        ("node", "source"),
        ("reasons", "all"),
        ("non_temporal", "0"),
        ("enabled", "1"),
    ] {
        module.set(name, good).expect("in range");
        let told = module.get(name);
        assert!(told == good || told == if good == "0" { "N" } else { "Y" }, "{name}: {told}");
    }
}
