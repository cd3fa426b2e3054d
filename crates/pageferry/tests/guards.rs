//! Guard markers (`MADV_GUARD_INSTALL`) that a program installs on pages that are in the air: no
//! event tells of them, and where the kernel copies, its copy would replace them.

mod support;
mod trial;

use pageferry::{Engine, Frames, Outcome, Region, Report};
use pageferry_sys::mm::Advice;
use pageferry_sys::uffd::{Progress, Uffd};
use pageferry_sys::{Errno, Linux, Sys, page_size};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use support::siege::{errno, ptr};
use support::{build, check, fill, first_node};
use trial::{Watchdog, accounted_whole, small};

const PAGES: usize = 512;
/// include/uapi/asm-generic/mman-common.h.
const GUARD_REMOVE: i32 = 103;

/// A kernel under which markers are installed as soon as pages have been taken out.
#[derive(Debug, Default)]
struct Guardian {
    /// The region's addresses; none at first, so that an engine can be built.
    start: AtomicUsize,
    end: AtomicUsize,
    armed: AtomicBool,
    /// Pages of the region.
    guarded: Vec<Range<usize>>,
    /// Moving pages in fails from now on, as if the mapping were locked.
    refuses: AtomicBool,
    /// Calls of the kernel's copy into the region.
    copies: AtomicU64,
}

impl Guardian {
    fn is_within(&self, addr: usize) -> bool {
        (self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed)).contains(&addr)
    }

    fn watch(&self, region: &Region) {
        self.start.store(region.addr(), Ordering::Relaxed);
        self.end.store(region.addr() + region.len(), Ordering::Relaxed);
        self.armed.store(true, Ordering::Relaxed);
    }

    fn is_guarded(&self, page: usize) -> bool {
        self.guarded.iter().any(|pages| pages.contains(&page))
    }

    /// Installs the markers that lie on these bytes.
    fn install(&self, out: &Range<usize>) {
        let page = page_size();
        let start = self.start.load(Ordering::Relaxed);
        for at in out.clone().step_by(page).filter(|at| self.is_guarded((at - start) / page)) {
            // SAFETY: a page of the test's region, whose content it gives up.
            let done = unsafe { Linux.advise(at, page, Advice::GuardInstall) };
            assert_eq!(done, Ok(()));
        }
    }
}

impl Sys for Guardian {
    unsafe fn move_range(&self, fd: &Uffd, dst: usize, src: usize, len: usize) -> Progress {
        if self.refuses.load(Ordering::Relaxed) && self.is_within(dst) {
            return Progress { done: 0, error: Some(Errno(libc::EINVAL)) };
        }
        // SAFETY: the same promise.
        let moved = unsafe { Linux.move_range(fd, dst, src, len) };
        if self.armed.load(Ordering::Relaxed) && self.is_within(src) {
            self.install(&(src..src + moved.done));
        }
        moved
    }
    unsafe fn copy_in(&self, fd: &Uffd, dst: usize, src: usize, len: usize) -> Progress {
        self.copies.fetch_add(u64::from(self.is_within(dst)), Ordering::Relaxed);
        // SAFETY: the same promise.
        unsafe { Linux.copy_in(fd, dst, src, len) }
    }
}

fn region(engine: &Engine) -> Region {
    let region = engine.map(PAGES * page_size()).folios(pageferry::Folios::Base);
    let region = region.build().expect("memory");
    fill(&region, 0..region.len());
    region
}

fn moved(engine: &Engine, region: &Region, frames: Frames) -> Report {
    let part = region.to(first_node(engine));
    engine.migrate(part).even_if_there().frames(frames).run().expect("a move")
}

/// Whether the program can read a page; the kernel cannot where a marker stands.
fn readable(at: usize) -> bool {
    let mut byte = 0u8;
    let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: ptr(at), iov_len: 1 };
    // SAFETY: the kernel writes one byte.
    unsafe {
        libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) == 1
    }
}

/// The markers stand, their pages are reported as given up, and all others moved and are right.
fn stand(guardian: &Guardian, region: &Region, report: &Report) {
    let page = page_size();
    accounted_whole(report, region);
    for (range, outcome) in &report.pages {
        for at in range.clone().step_by(page) {
            let number = (at - region.addr()) / page;
            let guarded = guardian.is_guarded(number);
            let expected = if guarded { Outcome::Gone } else { Outcome::Moved };
            assert_eq!(*outcome, expected, "page {number}");
            assert_eq!(readable(at), !guarded, "page {number}");
            if !guarded {
                check(region, number * page..(number + 1) * page);
                continue;
            }
            // SAFETY: removes the markers of one page of the test's own.
            let removed = unsafe { libc::madvise(ptr(at), page, GUARD_REMOVE) };
            assert_eq!(removed, 0, "errno {}", errno());
            // SAFETY: as above; it is there, and zeros.
            assert_eq!(unsafe { ptr(at).cast::<u64>().read_volatile() }, 0, "page {number}");
        }
    }
}

/// Whether this kernel has guard markers (Linux 6.13).
fn has_guards() -> bool {
    let page = page_size();
    let start = Linux.map(page, page).expect("a page");
    // SAFETY: mapped above, used by nobody.
    let known = unsafe {
        let known = Linux.advise(start, page, Advice::GuardInstall);
        Linux.unmap(start, page).expect("ours");
        known
    };
    if known.is_err() {
        eprintln!("skipped: MADV_GUARD_INSTALL is unknown here (Linux 6.13)");
    }
    known.is_ok()
}

/// Where markers stand: at the edges of what moves, and in between.
#[expect(clippy::single_range_in_vec_init, reason = "one range is a list of ranges")]
fn places() -> [Vec<Range<usize>>; 3] {
    [
        vec![0..1, 100..103, 128..129, PAGES - 1..PAGES],
        vec![0..PAGES / 2],
        vec![1..2, 3..4, 5..6, 7..8, 127..129, 300..400],
    ]
}

#[test]
fn the_kernels_copy_leaves_markers_that_were_installed_before_it_began() {
    if !has_guards() {
        return;
    }
    for frames in [Frames::KernelCopy, Frames::Recycled] {
        for guarded in places() {
            let _watchdog = Watchdog::seconds(60, "guard markers beneath the kernel's copy");
            let guardian = Arc::new(Guardian { guarded, ..Guardian::default() });
            let Some(engine) = build(small().sys(guardian.clone())) else { return };
            let region = region(&engine);
            guardian.watch(&region);
            let report = moved(&engine, &region, frames);
            assert!(guardian.copies.load(Ordering::Relaxed) > 0, "the kernel copied nothing");
            stand(&guardian, &region, &report);
        }
    }
}

#[test]
fn a_page_that_the_kernel_copies_where_moving_is_refused_leaves_them_too() {
    if !has_guards() {
        return;
    }
    let _watchdog = Watchdog::seconds(60, "guard markers where moving is refused");
    let guarded = vec![0..1, 200..201];
    let guardian = Arc::new(Guardian { guarded, ..Guardian::default() });
    let Some(engine) = build(small().sys(guardian.clone())) else { return };
    let region = region(&engine);
    guardian.watch(&region);
    guardian.refuses.store(true, Ordering::Relaxed);
    let report = moved(&engine, &region, Frames::Fresh);
    assert!(guardian.copies.load(Ordering::Relaxed) > 0, "the kernel copied nothing");
    stand(&guardian, &region, &report);
}

/// Whether `UFFDIO_COPY` replaces markers here.
fn copy_replaces_them(engine: &Engine) -> bool {
    use pageferry_sys::uffd::{Features, Modes};
    let page = page_size();
    let start = Linux.map(2 * page, page).expect("pages");
    let fd = Linux.open_uffd(engine.rights(), Features::MOVE).expect("the engine got one too");
    Linux.register(&fd, start, page, Modes::MISSING).expect("ours");
    // SAFETY: mapped above, used by nobody.
    unsafe {
        Linux.advise(start + page, page, Advice::PopulateWrite).expect("a page");
        Linux.advise(start, page, Advice::GuardInstall).expect("known here");
        let copied = Linux.copy_in(&fd, start, start + page, page);
        Linux.unmap(start, 2 * page).expect("ours");
        copied.error != Some(Errno(libc::EEXIST))
    }
}

#[test]
fn a_program_that_uses_markers_has_its_pages_moved_in_never_copied() {
    if !has_guards() {
        return;
    }
    let guardian = Arc::new(Guardian::default());
    let Some(engine) = build(small().sys(guardian.clone())) else { return };
    if !copy_replaces_them(&engine) {
        return eprintln!("skipped: the kernel's copy refuses to replace markers here");
    }
    let region = region(&engine);
    guardian.watch(&region);
    let all = region.len() as u64;
    for frames in [Frames::KernelCopy, Frames::Recycled] {
        let report = moved(&engine, &region, frames);
        assert_eq!(report.by_outcome(), [(Outcome::Moved, all)]);
        assert!(guardian.copies.swap(0, Ordering::Relaxed) > 0, "the kernel copied nothing");
    }
    // One that stands there, and is seen while the move is planned.
    let page = page_size();
    // SAFETY: a page of the region, whose content is given up.
    unsafe { Linux.advise(region.addr() + 5 * page, page, Advice::GuardInstall) }.expect("known");
    for frames in [Frames::KernelCopy, Frames::Recycled] {
        let report = moved(&engine, &region, frames);
        assert_eq!(report.bytes_moved, all - page as u64, "{report:?}");
        assert_eq!(guardian.copies.load(Ordering::Relaxed), 0, "{frames:?}");
        assert!(!readable(region.addr() + 5 * page));
        check(&region, 6 * page..region.len());
    }
}
