//! Pages that are out of their place must come back, whatever the kernel says when they are moved
//! in: by another call, or as the original, but never as zeros and never not at all.

mod support;
mod trial;

use pageferry::{Outcome, Region};
use pageferry_sys::uffd::{Progress, Uffd};
use pageferry_sys::{Errno, Linux, Sys, page_size};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;
use support::{Racers, build, thinned};
use trial::faults::*;
use trial::{Watchdog, accounted_whole, small};

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
    let ways = WAYS.into_iter().filter(|w| w.frames != pageferry::Frames::KernelCopy);
    for (attach, way) in thinned(crossed(MOVE, ways)) {
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
        accounted_whole(&report, &region);
        let moved = [(Outcome::Moved, region.len() as u64)];
        assert_eq!(report.by_outcome(), moved, "{what}: {report:?}");
        let refused = sys.struck.load(Ordering::Relaxed);
        assert_eq!(report.fallbacks > 0, refused > 0, "{what}: {report:?}");
        struck += refused;
    }
    assert!(struck > 0, "no page was ever moved in");
}

#[test]
fn pages_that_can_go_in_neither_way_for_a_while_come_back_all_the_same() {
    let attaches = [libc::EINVAL, libc::EEXIST, libc::ENOENT, libc::EPERM];
    let ways = [WAYS[0], WAYS[3], WAYS[5]];
    for (copy, (attach, way)) in
        thinned(crossed(COPY, crossed(&attaches, ways).collect::<Vec<_>>()))
    {
        let (attach_name, copy_name) = (Errno(attach).name(), Errno(copy).name());
        let what = format!("attach {attach_name}, copy {copy_name}, {way:?}");
        let _watchdog = Watchdog::seconds(60, &what);
        let (times, copies) = (AtomicU32::new(3), AtomicU32::new(3));
        let sys = Arc::new(Inward { attach, times, copy, copies, ..Inward::new() });
        let Some(engine) = build(small().frame_grace(Duration::ZERO).sys(sys.clone())) else {
            return;
        };
        let region = region(&engine, way, 32);
        attempt(&engine, &region, way).expect("nothing fails yet");
        sys.watch(&region);
        let racers = Racers::start(&region, 1, 1);
        let report = attempt(&engine, &region, way).expect("a move");
        racers.finish();
        accounted_whole(&report, &region);
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
