//! Every system call of the transaction, failing with every errno that it can return, at its
//! first and at later calls, once, a few times and for ever, with part of a range done or nothing:
//! no byte is lost, nobody hangs, every page is accounted for, and once the kernel behaves again
//! everything moves.

mod support;
mod trial;

use pageferry::{
    BuildError, Division, Engine, Folios, Frames, MigrateError, Order, Outcome, Region, RegionError,
};
use pageferry_sys::inject::{Fault, Faulty};
use pageferry_sys::mm::Advice;
use pageferry_sys::uffd::{Progress, Uffd};
use pageferry_sys::{Errno, Linux, Sys, SysOp, page_size};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;
use support::{Racers, build, check, fill, first_node};
use trial::{Watchdog, accounted, small};

/// How a move is done.
#[derive(Clone, Copy, Debug)]
struct Way {
    order: Order,
    division: Division,
    folios: Folios,
    frames: Frames,
}

const fn way(order: Order, division: Division, folios: Folios, frames: Frames) -> Way {
    Way { order, division, folios, frames }
}

const WAYS: [Way; 10] = [
    way(Order::Frozen, Division::Conducted, Folios::Base, Frames::Recycled),
    way(Order::Live, Division::Conducted, Folios::Base, Frames::Recycled),
    way(Order::Frozen, Division::Shared, Folios::Base, Frames::Recycled),
    way(Order::Live, Division::Shared, Folios::Base, Frames::Recycled),
    way(Order::Frozen, Division::Conducted, Folios::Huge, Frames::Recycled),
    way(Order::Live, Division::Conducted, Folios::Huge, Frames::Recycled),
    way(Order::Frozen, Division::Shared, Folios::Huge, Frames::Fresh),
    way(Order::Live, Division::Shared, Folios::Huge, Frames::Recycled),
    way(Order::Frozen, Division::Conducted, Folios::Base, Frames::KernelCopy),
    way(Order::Live, Division::Shared, Folios::Base, Frames::Fresh),
];

/// ioctl_userfaultfd(2), UFFDIO_MOVE; EFAULT: a guard page; EINTR: a fatal signal.
const MOVE: &[i32] = &[
    libc::EAGAIN,
    libc::EBUSY,
    libc::EEXIST,
    libc::EINVAL,
    libc::ENOENT,
    libc::ENOMEM,
    libc::EPERM,
    libc::ESRCH,
    libc::EFAULT,
    libc::EINTR,
];
/// UFFDIO_COPY.
const COPY: &[i32] = &[
    libc::EAGAIN,
    libc::EEXIST,
    libc::EFAULT,
    libc::EINVAL,
    libc::ENOENT,
    libc::ENOMEM,
    libc::ENOSPC,
    libc::ESRCH,
];
/// UFFDIO_WRITEPROTECT.
const PROTECT: &[i32] = &[libc::EAGAIN, libc::EFAULT, libc::EINVAL, libc::ENOENT, libc::ENOMEM];
/// UFFDIO_REGISTER.
const REGISTER: &[i32] = &[
    libc::EBUSY,
    libc::EFAULT,
    libc::EINVAL,
    libc::ENOMEM,
    libc::EPERM,
    libc::EAGAIN,
    libc::EINTR,
];
/// UFFDIO_UNREGISTER.
const UNREGISTER: &[i32] = &[libc::EINVAL, libc::ENOMEM, libc::EFAULT];
/// UFFDIO_WAKE.
const WAKE: &[i32] = &[libc::EAGAIN, libc::EFAULT, libc::EINVAL];
/// UFFDIO_ZEROPAGE.
const ZERO: &[i32] = &[libc::EAGAIN, libc::EEXIST, libc::EINVAL, libc::ENOENT, libc::ESRCH];
/// read(2) of a userfaultfd.
const READ: &[i32] = &[libc::EAGAIN, libc::EFAULT, libc::EINTR, libc::EINVAL];
/// mmap(2).
const MAP: &[i32] = &[libc::EAGAIN, libc::EINVAL, libc::ENOMEM, libc::EPERM];
/// munmap(2).
const UNMAP: &[i32] = &[libc::EINVAL, libc::ENOMEM];
/// madvise(2), MADV_POPULATE_WRITE.
const POPULATE: &[i32] =
    &[libc::EAGAIN, libc::EFAULT, libc::EHWPOISON, libc::EINTR, libc::EINVAL, libc::ENOMEM];
/// madvise(2), other advice.
const ADVISE: &[i32] = &[libc::EAGAIN, libc::EINVAL, libc::ENOMEM];
/// PAGEMAP_SCAN.
const SCAN: &[i32] = &[libc::EFAULT, libc::EINTR, libc::EINVAL, libc::ENOMEM, libc::ENOTTY];

struct Bench {
    faulty: Arc<Faulty>,
    engine: Engine,
}

fn bench() -> Option<Bench> {
    let faulty = Arc::new(Faulty::new());
    let engine = build(small().sys(faulty.clone()))?;
    Some(Bench { faulty, engine })
}

fn region(engine: &Engine, way: Way, pages: usize) -> Arc<Region> {
    let bytes = match way.folios {
        Folios::Huge => 4 << 20,
        _ => pages * page_size(),
    };
    let region = engine.map(bytes).folios(way.folios).build().expect("memory for the test");
    fill(&region, 0..bytes);
    Arc::new(region)
}

fn attempt(engine: &Engine, region: &Region, way: Way) -> Result<pageferry::Report, MigrateError> {
    engine
        .migrate(region.to(first_node(engine)))
        .even_if_there()
        .order(way.order)
        .division(way.division)
        .frames(way.frames)
        .batch_bytes(16 * page_size())
        .run()
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
        Ok(report) => accounted(&report, &region, &[0..region.len()]),
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
    accounted(&report, &region, &[0..region.len()]);
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
        for (after, times) in [(0, 1), (1, 1), (2, 3), (5, 20)] {
            for partial in if partial { &[0, 3][..] } else { &[0] } {
                // Another way each time.
                let way = ways[turn % ways.len()];
                turn += 1;
                let partial = partial * page_size();
                let fault = Fault { op, after, times, errno: Errno(errno), partial };
                *count += strike(way, fault);
            }
        }
    }
    if bench().is_some() {
        assert!(fired.iter().all(|&n| n > 0), "{op:?} with {errnos:?} struck {fired:?} times");
    }
}

/// For ever: the move ends, and says so; what it could not move stays.
fn for_ever(op: SysOp, errnos: &[i32], after: u64, meets: impl Fn(Way) -> bool) {
    let _watchdog = Watchdog::seconds(60, &format!("{op:?} failing for ever"));
    for &errno in errnos {
        for way in WAYS.into_iter().filter(|w| meets(*w)).take(4) {
            let fault = Fault { op, after, times: u64::MAX, errno: Errno(errno), partial: 0 };
            strike(way, fault);
        }
    }
}

fn any(_: Way) -> bool {
    true
}
fn live(way: Way) -> bool {
    way.order == Order::Live
}
fn base(way: Way) -> bool {
    way.folios == Folios::Base
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
    for &errno in PROTECT {
        for way in WAYS.into_iter().filter(|w| live(*w)) {
            for (after, times) in [(0, 1), (1, 3), (0, u64::MAX)] {
                let op = SysOp::Unprotect;
                strike(way, Fault { op, after, times, errno: Errno(errno), partial: 0 });
            }
        }
    }
}

#[test]
fn waking_and_filling_that_fail_leave_nobody_asleep() {
    let _watchdog = Watchdog::seconds(60, "waking and filling");
    for (op, errnos) in [(SysOp::Wake, WAKE), (SysOp::ZeroIn, ZERO)] {
        for (i, &errno) in errnos.iter().enumerate() {
            for (after, times) in [(0, 1), (1, 3), (0, 20)] {
                for way in [WAYS[i % 10], WAYS[(i + 5) % 10]] {
                    strike(way, Fault { op, after, times, errno: Errno(errno), partial: 0 });
                }
            }
        }
    }
    // A wake that never works: the end of the move wakes everybody.
    for_ever(SysOp::Wake, WAKE, 0, any);
}

#[test]
fn messages_that_cannot_be_read_at_once_are_read_later() {
    let _watchdog = Watchdog::seconds(60, "reading messages");
    for &errno in READ {
        for (after, times) in [(0, 1), (0, 50), (2, 3)] {
            for way in WAYS {
                let op = SysOp::ReadEvents;
                strike(way, Fault { op, after, times, errno: Errno(errno), partial: 0 });
            }
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
    strikes(SysOp::Advise(Advice::PopulateWrite), POPULATE, false, any);
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
    let partly = |w: Way| w.frames != Frames::Recycled;
    for (op, errnos) in [(SysOp::Advise(Advice::DontNeed), ADVISE), (SysOp::MapOver, MAP)] {
        for &errno in errnos {
            for way in WAYS.into_iter().filter(|w| partly(*w)) {
                for times in [1, 5, 40] {
                    strike(way, Fault { op, after: 0, times, errno: Errno(errno), partial: 0 });
                }
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

/// The kernel, except that moving pages into a region, or protecting them, fails as told.
#[derive(Debug)]
struct Inward {
    /// The region's addresses; none at first, so that an engine can be built.
    start: AtomicUsize,
    end: AtomicUsize,
    attach: i32,
    /// Attaches that fail; `u32::MAX` for all.
    times: AtomicU32,
    copy: i32,
    copies: AtomicU32,
    /// Protects half of what it should, and fails.
    protect: i32,
    /// Attaches that were failed.
    struck: AtomicU32,
}

impl Inward {
    fn new() -> Self {
        Self {
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            attach: 0,
            times: AtomicU32::new(u32::MAX),
            copy: 0,
            copies: AtomicU32::new(0),
            protect: 0,
            struck: AtomicU32::new(0),
        }
    }

    fn watch(&self, region: &Region) {
        self.start.store(region.addr(), Ordering::Relaxed);
        self.end.store(region.addr() + region.len(), Ordering::Relaxed);
    }

    fn is_inward(&self, dst: usize) -> bool {
        (self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed)).contains(&dst)
    }
}

/// Counts one down; false once at zero. For ever from `u32::MAX`.
fn strikes_left(counter: &AtomicU32) -> bool {
    let less = |n: u32| if n == u32::MAX { Some(n) } else { n.checked_sub(1) };
    counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
}

impl Sys for Inward {
    unsafe fn move_range(&self, fd: &Uffd, dst: usize, src: usize, len: usize) -> Progress {
        if self.attach != 0 && self.is_inward(dst) && strikes_left(&self.times) {
            self.struck.fetch_add(1, Ordering::Relaxed);
            return Progress { done: 0, error: Some(Errno(self.attach)) };
        }
        // SAFETY: the same promise.
        unsafe { Linux.move_range(fd, dst, src, len) }
    }
    unsafe fn copy_in(&self, fd: &Uffd, dst: usize, src: usize, len: usize) -> Progress {
        if self.copy != 0 && self.is_inward(dst) && strikes_left(&self.copies) {
            return Progress { done: 0, error: Some(Errno(self.copy)) };
        }
        // SAFETY: the same promise.
        unsafe { Linux.copy_in(fd, dst, src, len) }
    }
    fn protect(&self, fd: &Uffd, start: usize, len: usize) -> Result<(), Errno> {
        if self.protect != 0 && self.is_inward(start) {
            Linux.protect(fd, start, (len / 2).next_multiple_of(page_size()))?;
            return Err(Errno(self.protect));
        }
        Linux.protect(fd, start, len)
    }
}

#[test]
fn pages_that_can_never_be_moved_in_are_copied_in_by_the_kernel() {
    let mut struck = 0;
    for &attach in MOVE {
        for way in WAYS.into_iter().filter(|w| w.frames != Frames::KernelCopy) {
            let what = format!("attach failing with {} for ever, {way:?}", Errno(attach).name());
            let _watchdog = Watchdog::seconds(60, &what);
            let sys = Arc::new(Inward { attach, ..Inward::new() });
            let Some(engine) = build(small().frame_grace(Duration::ZERO).sys(sys.clone())) else {
                return;
            };
            let region = region(&engine, way, 32);
            // Its old pages are the frames of the next move, if that takes used ones.
            attempt(&engine, &region, way).expect("nothing fails yet");
            sys.watch(&region);
            let racers = Racers::start(&region, 1, 1);
            let report = attempt(&engine, &region, way).expect("a move");
            racers.finish();
            accounted(&report, &region, &[0..region.len()]);
            let moved = [(Outcome::Moved, region.len() as u64)];
            assert_eq!(report.by_outcome(), moved, "{what}: {report:?}");
            let refused = sys.struck.load(Ordering::Relaxed);
            assert_eq!(report.fallbacks > 0, refused > 0, "{what}: {report:?}");
            struck += refused;
        }
    }
    assert!(struck > 0, "no page was ever moved in");
}

#[test]
fn pages_that_can_go_in_neither_way_for_a_while_come_back_all_the_same() {
    for &copy in COPY {
        for attach in [libc::EINVAL, libc::EEXIST, libc::ENOENT, libc::EPERM] {
            let (attach_name, copy_name) = (Errno(attach).name(), Errno(copy).name());
            for way in [WAYS[0], WAYS[3], WAYS[5]] {
                let what = format!("attach {attach_name}, copy {copy_name}, {way:?}");
                let _watchdog = Watchdog::seconds(60, &what);
                let (times, copies) = (AtomicU32::new(3), AtomicU32::new(3));
                let sys = Arc::new(Inward { attach, times, copy, copies, ..Inward::new() });
                let Some(engine) = build(small().frame_grace(Duration::ZERO).sys(sys.clone()))
                else {
                    return;
                };
                let region = region(&engine, way, 32);
                attempt(&engine, &region, way).expect("nothing fails yet");
                sys.watch(&region);
                let racers = Racers::start(&region, 1, 1);
                let report = attempt(&engine, &region, way).expect("a move");
                racers.finish();
                accounted(&report, &region, &[0..region.len()]);
            }
        }
    }
}

#[test]
fn a_range_that_was_protected_in_part_only_moves_whole_and_its_old_pages_serve_again() {
    let sys = Arc::new(Inward { protect: libc::ENOENT, ..Inward::new() });
    let _watchdog = Watchdog::seconds(60, "moves after partial protection");
    let Some(engine) = build(small().frame_grace(Duration::ZERO).sys(sys.clone())) else { return };
    for way in WAYS.into_iter().filter(|w| live(*w)) {
        let region = region(&engine, way, 64);
        sys.watch(&region);
        let racers = Racers::start(&region, 1, 1);
        // Often enough that each old page becomes a frame.
        for _ in 0..6 {
            let report = attempt(&engine, &region, way).expect("a move");
            assert_eq!(report.by_outcome(), [(Outcome::Moved, region.len() as u64)]);
        }
        racers.finish();
    }
}

#[test]
fn a_page_whose_content_cannot_be_read_any_more_is_poisoned_not_zeroed() {
    let _watchdog = Watchdog::seconds(60, "a page that cannot be read");
    let sys = Arc::new(Inward {
        attach: libc::EPERM,
        copy: libc::EFAULT,
        copies: AtomicU32::new(u32::MAX),
        ..Inward::new()
    });
    let Some(engine) = build(small().frame_grace(Duration::ZERO).sys(sys.clone())) else { return };
    let region = region(&engine, WAYS[0], 1);
    sys.watch(&region);
    let report = attempt(&engine, &region, WAYS[0]).expect("a move");
    assert_eq!(report.by_outcome(), [(Outcome::CopyFailed, page_size() as u64)]);
    // Read by the kernel, so that the program lives: as after a memory error it is refused.
    let mut pipe = [0; 2];
    // SAFETY: two new descriptors; write(2) reads eight bytes of a mapped range or fails.
    let written = unsafe {
        assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
        libc::write(pipe[1], region.as_ptr().cast(), 8)
    };
    let error = std::io::Error::last_os_error().raw_os_error();
    assert_eq!(written, -1, "the page gave content");
    assert!(matches!(error, Some(libc::EFAULT | libc::EHWPOISON)), "{error:?}");
    // SAFETY: both descriptors were opened above and are used no more.
    unsafe { (libc::close(pipe[0]), libc::close(pipe[1])) };
}
