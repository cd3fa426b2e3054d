//! Every system call of the transaction, failing with every errno that it can return, at its
//! first and at later calls, once, a few times and for ever, with part of a range done or nothing:
//! no byte is lost, nobody hangs, every page is accounted for, and once the kernel behaves again
//! everything moves.

mod support;
mod trial;

use pageferry::{BuildError, Engine, Folios, Frames, MigrateError, Outcome, RegionError};
use pageferry_sys::inject::{Fault, Faulty};
use pageferry_sys::mm::Advice;
use pageferry_sys::{Errno, SysOp, page_size};
use std::sync::Arc;
use support::{Racers, build, check, fill, first_node, thinned};
use trial::faults::*;
use trial::{Watchdog, accounted_whole, small};

struct Bench {
    faulty: Arc<Faulty>,
    engine: Engine,
}

fn bench() -> Option<Bench> {
    let faulty = Arc::new(Faulty::new());
    let engine = build(small().sys(faulty.clone()))?;
    Some(Bench { faulty, engine })
}

/// One fault in one move; returns how often it struck.
fn strike(way: Way, fault: Fault) -> u64 {
    let Some(Bench { faulty, engine }) = bench() else { return 0 };
    // For ever, each page costs all its tries: a few pages will do.
    let region = region(&engine, way, if fault.times > 100 { 4 } else { 64 });
    let racers = Racers::start(&region, 1, 1);
    // The pools exist before the fault in half of the cases.
    if fault.errno.0 % 2 == 0 {
        attempt(&engine, &region, way).expect("nothing fails yet");
    }
    let before = faulty.fired();
    faulty.fail(fault);
    let what = format!("{fault:?} {way:?}");
    match attempt(&engine, &region, way) {
        Ok(report) => accounted_whole(&report, &region),
        Err(MigrateError::Register { source, .. }) => {
            assert_eq!((fault.op, source), (SysOp::Register, fault.errno), "{what}");
        }
        Err(other) => panic!("{what}: {other}"),
    }
    let fired = faulty.fired() - before;
    faulty.heal();
    racers.finish();
    fill(&region, 0..region.len());
    let report = attempt(&engine, &region, way).expect("nothing fails any more");
    accounted_whole(&report, &region);
    assert_eq!(
        report.by_outcome(),
        [(Outcome::Moved, region.len() as u64)],
        "after {what}: {report:?}"
    );
    check(&region, 0..region.len());
    fired
}

/// All errnos of one call; each strikes somewhere in every way for which `meets` holds.
fn strikes(op: SysOp, errnos: &[i32], partial: bool, meets: impl Fn(Way) -> bool) {
    let _watchdog = Watchdog::seconds(60, &format!("{op:?} failing"));
    let ways: Vec<_> = WAYS.into_iter().filter(|w| meets(*w)).collect();
    let mut fired = vec![0; errnos.len()];
    let mut turn = 0;
    for (count, &errno) in fired.iter_mut().zip(errnos) {
        let mut cases = Vec::new();
        for (after, times) in [(0, 1), (1, 1), (2, 3), (5, 20)] {
            for partial in if partial { &[0, 3][..] } else { &[0] } {
                cases.push((after, times, partial * page_size()));
            }
        }
        for (after, times, partial) in thinned(cases) {
            // Another way each time.
            let way = ways[turn % ways.len()];
            turn += 1;
            *count += strike(way, Fault { op, after, times, errno: Errno(errno), partial });
        }
    }
    if bench().is_some() {
        assert!(fired.iter().all(|&n| n > 0), "{op:?} with {errnos:?} struck {fired:?} times");
    }
}

/// For ever: the move ends, and says so; what it could not move stays.
fn for_ever(op: SysOp, errnos: &[i32], after: u64, meets: impl Fn(Way) -> bool) {
    let _watchdog = Watchdog::seconds(60, &format!("{op:?} failing for ever"));
    let ways = WAYS.into_iter().filter(|w| meets(*w)).take(4);
    for (errno, way) in thinned(crossed(errnos, ways)) {
        strike(way, Fault { op, after, times: u64::MAX, errno: Errno(errno), partial: 0 });
    }
}

#[test]
fn a_move_ioctl_that_fails_or_stops_half_way_loses_nothing() {
    strikes(SysOp::Move, MOVE, true, any);
}

#[test]
fn a_move_ioctl_that_always_fails_leaves_every_page_in_place() {
    for_ever(SysOp::Move, MOVE, 0, base);
    // For huge folios the ones that are not tried again and again.
    for_ever(SysOp::Move, &[libc::EBUSY, libc::EPERM, libc::EFAULT], 0, any);
}

#[test]
fn a_kernel_copy_that_fails_loses_nothing() {
    strikes(SysOp::CopyIn, COPY, true, |w| w.frames == Frames::KernelCopy);
}

#[test]
fn protection_that_fails_falls_back_to_frozen_order() {
    strikes(SysOp::Protect, PROTECT, false, live);
    for_ever(SysOp::Protect, PROTECT, 0, live);
    let Some(Bench { faulty, engine }) = bench() else { return };
    let region = region(&engine, WAYS[1], 64);
    let fault = Fault {
        op: SysOp::Protect,
        after: 0,
        times: u64::MAX,
        errno: Errno(libc::EINVAL),
        partial: 0,
    };
    faulty.fail(fault);
    let report = attempt(&engine, &region, WAYS[1]).expect("a move");
    assert_eq!(report.by_outcome(), [(Outcome::Moved, region.len() as u64)]);
    assert_eq!((report.batches_live, report.batches_frozen > 0), (0, true));
}

#[test]
fn lifting_protection_may_fail_for_ever_and_writers_still_go_on() {
    let _watchdog = Watchdog::seconds(60, "lifting protection");
    // Whether a writer meets a protected page is chance, so only the outcome is asked for.
    let ways = WAYS.into_iter().filter(|w| live(*w));
    for (after, times) in [(0, 1), (1, 3), (0, u64::MAX)] {
        for (errno, way) in thinned(crossed(PROTECT, ways.clone())) {
            let op = SysOp::Unprotect;
            strike(way, Fault { op, after, times, errno: Errno(errno), partial: 0 });
        }
    }
}

#[test]
fn waking_and_filling_that_fail_leave_nobody_asleep() {
    let _watchdog = Watchdog::seconds(60, "waking and filling");
    for (op, errnos) in [(SysOp::Wake, WAKE), (SysOp::ZeroIn, ZERO)] {
        for (i, &errno) in errnos.iter().enumerate() {
            let faults = crossed(&[(0, 1), (1, 3), (0, 20)], [WAYS[i], WAYS[i + 5]]);
            for ((after, times), way) in thinned(faults) {
                strike(way, Fault { op, after, times, errno: Errno(errno), partial: 0 });
            }
        }
    }
    // A wake that never works: the end of the move wakes everybody.
    for_ever(SysOp::Wake, WAKE, 0, any);
}

#[test]
fn messages_that_cannot_be_read_at_once_are_read_later() {
    let _watchdog = Watchdog::seconds(60, "reading messages");
    for (after, times) in [(0, 1), (0, 50), (2, 3)] {
        for (errno, way) in thinned(crossed(READ, WAYS)) {
            let op = SysOp::ReadEvents;
            strike(way, Fault { op, after, times, errno: Errno(errno), partial: 0 });
        }
    }
}

#[test]
fn registration_that_fails_is_an_error_before_any_page_is_touched() {
    strikes(SysOp::Register, REGISTER, false, any);
    let _watchdog = Watchdog::seconds(60, "registration");
    let Some(Bench { faulty, engine }) = bench() else { return };
    let region = region(&engine, WAYS[0], 64);
    for errno in REGISTER.iter().map(|&e| Errno(e)) {
        let op = SysOp::Register;
        faulty.fail(Fault { op, after: 0, times: u64::MAX, errno, partial: 0 });
        let moves = faulty.calls(SysOp::Move);
        match attempt(&engine, &region, WAYS[0]) {
            Err(MigrateError::Register { range, source }) => {
                assert_eq!((range, source), (region.addresses(), errno));
            }
            other => panic!("{errno:?}: {other:?}"),
        }
        assert_eq!(faulty.calls(SysOp::Move), moves, "no page was touched");
        faulty.heal();
    }
    check(&region, 0..region.len());
}

#[test]
fn unregistration_that_fails_leaves_the_region_in_working_order() {
    strikes(SysOp::Unregister, UNREGISTER, false, any);
    for_ever(SysOp::Unregister, UNREGISTER, 0, any);
}

#[test]
fn looking_at_the_page_table_may_fail() {
    strikes(SysOp::Scan, SCAN, false, any);
    for_ever(SysOp::Scan, SCAN, 0, any);
    for_ever(SysOp::Scan, SCAN, 1, any);
}

#[test]
fn memory_for_frames_may_be_refused() {
    // Recycled frames may all be there already, and the kernel populates for its own copies.
    let fresh = |w: Way| w.frames == Frames::Fresh;
    strikes(SysOp::Advise(Advice::PopulateWrite), POPULATE, false, fresh);
    for_ever(SysOp::Advise(Advice::PopulateWrite), POPULATE, 0, any);
    for_ever(SysOp::Map, MAP, 0, any);
    for_ever(SysOp::Advise(Advice::DontFork), ADVISE, 0, base);
    let huge = |w: Way| w.folios == Folios::Huge;
    // With EINVAL the kernel says that it has no huge pages, and is believed.
    for_ever(SysOp::Advise(Advice::HugePage), &[libc::EAGAIN, libc::ENOMEM], 0, huge);
    for_ever(SysOp::Advise(Advice::NoHugePage), ADVISE, 0, base);
    for_ever(SysOp::Advise(Advice::DontDump), ADVISE, 0, base);
}

#[test]
fn memory_that_cannot_be_given_back_is_no_obstacle_later() {
    let _watchdog = Watchdog::seconds(60, "giving memory back");
    let partly = |w: &Way| w.frames != Frames::Recycled;
    let ways = WAYS.into_iter().filter(partly);
    for (op, errnos) in [(SysOp::Advise(Advice::DontNeed), ADVISE), (SysOp::MapOver, MAP)] {
        for times in [1, 5, 40] {
            for (errno, way) in thinned(crossed(errnos, ways.clone())) {
                strike(way, Fault { op, after: 0, times, errno: Errno(errno), partial: 0 });
            }
        }
    }
}

#[test]
fn unmapping_that_fails_is_survived() {
    let _watchdog = Watchdog::seconds(60, "unmapping");
    for &errno in UNMAP {
        let Some(Bench { faulty, engine }) = bench() else { return };
        let region = region(&engine, WAYS[0], 64);
        attempt(&engine, &region, WAYS[0]).expect("a move");
        let (op, errno) = (SysOp::Unmap, Errno(errno));
        faulty.fail(Fault { op, after: 0, times: u64::MAX, errno, partial: 0 });
        drop(region);
        drop(engine);
        assert!(faulty.fired() > 0);
    }
}

#[test]
fn an_engine_that_cannot_open_its_descriptors_says_what_is_missing() {
    for after in [0, 1] {
        for errno in [
            libc::EPERM,
            libc::EACCES,
            libc::EINVAL,
            libc::ENOSYS,
            libc::EMFILE,
            libc::ENFILE,
            libc::ENOMEM,
        ] {
            let faulty = Arc::new(Faulty::new());
            let op = SysOp::OpenUffd;
            faulty.fail(Fault { op, after, times: 1, errno: Errno(errno), partial: 0 });
            let built = small().sys(faulty.clone()).build();
            if faulty.fired() == 0 {
                match built {
                    Err(why) => eprintln!("skipped: {why}"),
                    Ok(_) => assert!(after > 0, "an engine opens a descriptor"),
                }
                continue;
            }
            let (words, source) = match built.expect_err("a descriptor is missing") {
                BuildError::NotPermitted(e) => ("CAP_SYS_PTRACE", e),
                BuildError::KernelTooOld(e) => ("6.8", e),
                BuildError::Resource { source, .. } => ("ulimit -n", source),
                other => panic!("{errno}: {other}"),
            };
            assert_eq!(source, Errno(errno));
            let expected = match errno {
                libc::EPERM | libc::EACCES => "CAP_SYS_PTRACE",
                libc::EINVAL | libc::ENOSYS => "6.8",
                _ => "ulimit -n",
            };
            assert_eq!(words, expected);
        }
    }
}

#[test]
fn every_call_of_the_build_may_fail_and_a_second_try_succeeds() {
    for op in [SysOp::Map, SysOp::Register, SysOp::Protect, SysOp::Move] {
        for errno in [libc::ENOMEM, libc::EINVAL, libc::EPERM] {
            let faulty = Arc::new(Faulty::new());
            faulty.fail(Fault { op, after: 0, times: 1, errno: Errno(errno), partial: 0 });
            let built = small().sys(faulty.clone()).build();
            if faulty.fired() == 0 {
                eprintln!("skipped: {}", built.expect_err("the real call failed first"));
                return;
            }
            let why = built.expect_err("the engine tries what it needs").to_string();
            assert!(why.contains(Errno(errno).name()), "{op:?}: {why}");
            assert!(small().sys(faulty).build().is_ok());
        }
    }
}

#[test]
fn a_region_that_cannot_be_made_names_the_step() {
    let Some(Bench { faulty, engine }) = bench() else { return };
    let node = first_node(&engine);
    for (op, words) in [
        (SysOp::Map, "mapping"),
        (SysOp::PreferNode, "policy"),
        (SysOp::Advise(Advice::HugePage), "madvise"),
    ] {
        let errno = Errno(libc::ENOMEM);
        faulty.fail(Fault { op, after: 0, times: 1, errno, partial: 0 });
        match engine.map(4 << 20).folios(Folios::Huge).prefer(node).build() {
            Err(RegionError::Kernel { what, source }) => {
                assert!(what.contains(words), "{what}");
                assert_eq!(source, errno);
            }
            other => panic!("{op:?}: {other:?}"),
        }
        faulty.heal();
    }
}
