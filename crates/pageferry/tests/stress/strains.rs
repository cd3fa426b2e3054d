//! What the program does to memory that moves, beside what the movers do.

#![allow(unreachable_pub, reason = "a test binary exports nothing")]

use crate::ground::Plot;
use crate::hearing::{self, take_again};
use crate::outside::Beat;
use crate::support::siege::{Model, advise, errno, far_address, map_at, protect, ptr};
use crate::support::{patient, word};
use crate::trial::Numbers;
use pageferry::Region;
use pageferry_sys::page_size;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Accesses of a faulting thread until it naps.
const BURST: usize = 16;
/// Pages that a faulting thread touches for the first time, again and again.
pub const OWN_PAGES: usize = 128;

/// What all the others did.
#[derive(Debug, Default)]
pub struct Did {
    pub accesses: AtomicU64,
    pub first_touches: AtomicU64,
    pub given_up: AtomicU64,
    pub forks: AtomicU64,
    pub mapped: AtomicU64,
    pub remapped: AtomicU64,
    pub protected: AtomicU64,
}

fn add(to: &AtomicU64, n: u64) {
    to.fetch_add(n, Ordering::Relaxed);
}

/// Faulting thread number `me` of `all`: verifies and writes words in all plots, touches pages of its own
/// in `fresh` for the first time, and gives them up.
pub fn fault(
    plots: &[Plot],
    fresh: &Region,
    (me, all): (usize, usize),
    did: &Did,
    beat: &Beat,
    is_over: impl Fn() -> bool,
) {
    let mut numbers = Numbers::new(me as u64 + 1000);
    let own = me * OWN_PAGES..(me + 1) * OWN_PAGES;
    let first = |page: usize| word(fresh, (page * page_size() + me % 4000 / 8 * 8) / 8);
    let mut touched = 0;
    while !is_over() {
        // Seldom, so that the movers get most of the signals.
        if numbers.below(256) == 0 {
            take_again();
        }
        for _ in 0..BURST {
            let plot = &plots[numbers.below(plots.len())];
            let line = numbers.below(plot.lines());
            let mine = line - line % all + me;
            match numbers.below(3) {
                0 if mine < plot.lines() => plot.write(mine),
                1 => plot.glance(line),
                _ => plot.read(line, numbers.below(64)),
            }
        }
        add(&did.accesses, BURST as u64);
        let page = own.start + touched;
        let found = first(page).fetch_add(page as u64 + 1, Ordering::Relaxed);
        assert_eq!(found, 0, "page {page} at the first touch");
        touched += 1;
        if touched == OWN_PAGES {
            for page in own.clone() {
                let found = first(page).load(Ordering::Relaxed);
                assert_eq!(found, page as u64 + 1, "page {page} some time after the first touch");
            }
            let at = |page: usize| fresh.addr() + page * page_size();
            assert!(advise(at(own.start)..at(own.end), libc::MADV_DONTNEED), "errno {}", errno());
            touched = 0;
        }
        add(&did.first_touches, 1);
        beat.beat();
        match numbers.below(4) {
            0 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(numbers.next() % 30_000)),
        }
    }
}

/// Gives up a page at a time, so many times a second, and touches it again: it is zero, and what is
/// written then stays until the next time.
pub fn give_up(
    plots: &[Plot],
    per_second: u32,
    did: &Did,
    beat: &Beat,
    is_over: impl Fn() -> bool,
) {
    let page = page_size();
    let pages: Vec<_> = plots
        .iter()
        .flat_map(|plot| plot.given.clone().step_by(page).map(move |at| (plot, at)))
        .collect();
    let mut held = vec![0; pages.len()];
    let (mut numbers, pause) = (Numbers::new(7), Duration::from_secs(1) / per_second);
    let (began, mut next) = (Instant::now(), Instant::now());
    while !is_over() {
        // Whoever is late hurries, but does not make up for a second.
        next = next.max(Instant::now() - 1000 * pause);
        let turn = Instant::now();
        while next < Instant::now() && turn.elapsed().as_millis() < 100 && !is_over() {
            next += pause;
            let n = numbers.below(pages.len());
            let (plot, at) = pages[n];
            let first = word(&plot.region, at / 8 + n % 512);
            let found = first.load(Ordering::Relaxed);
            assert_eq!(found, held[n], "{}: page {at:#x} before it is given up", plot.name);
            let start = plot.region.addr() + at;
            assert!(advise(start..start + page, libc::MADV_DONTNEED), "errno {}", errno());
            let found = first.load(Ordering::Relaxed);
            assert_eq!(found, 0, "{}: page {at:#x} after it was given up", plot.name);
            held[n] = numbers.next();
            first.store(held[n], Ordering::Relaxed);
            add(&did.given_up, 1);
            beat.beat();
        }
        take_again();
        // While an event is under way nothing moves: where these follow upon one another, on a busy
        // machine, only the breaks let moves go on.
        let is_break = began.elapsed().as_millis() / 200 % 2 == 1;
        std::thread::sleep(if is_break { Duration::from_millis(200) } else { pause });
        beat.beat();
    }
    for ((plot, at), (n, held)) in pages.iter().zip(held.into_iter().enumerate()) {
        let found = word(&plot.region, at / 8 + n % 512).load(Ordering::Relaxed);
        assert_eq!(found, held, "{}: page {at:#x} at the end", plot.name);
    }
}

fn remap(from: usize, len: usize, to: usize, flags: i32) {
    let flags = flags | libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: both places are the test's own.
    let got = unsafe { libc::mremap(ptr(from), len, len, flags, ptr(to)) };
    assert_eq!(got.expose_provenance(), to, "mremap: errno {}", errno());
}

/// Unmaps and maps anew, takes elsewhere and back, protects and locks the victim of a plot.
pub fn change(plot: &Plot, did: &Did, beat: &Beat, is_over: impl Fn() -> bool) {
    /// Pages of a run: always the same, because what mremap takes must be one mapping.
    const RUN: usize = 24;
    let mut model = Model::new(Arc::clone(&plot.region), plot.victim.clone());
    let elsewhere = far_address();
    while !is_over() {
        let first = RUN * model.random(model.pages() / RUN);
        let pages = first..first + RUN;
        let range = model.range(&pages);
        let kind = model.random(6);
        let what = ["mapping", "mremap", "away", "dontunmap", "protect", "lock"][kind];
        match kind {
            0 => map_anew(&mut model, &pages),
            1 => {
                remap(range.start, range.len(), elsewhere, 0);
                remap(elsewhere, range.len(), range.start, 0);
            }
            2 | 3 => {
                let flags = if kind == 3 { libc::MREMAP_DONTUNMAP } else { 0 };
                remap(range.start, range.len(), elsewhere, flags);
                there(&model, &pages, elsewhere);
                beat.beat();
                remap(elsewhere, range.len(), range.start, 0);
            }
            4 => {
                protect(range.clone(), libc::PROT_READ);
                model.check(pages.clone(), "under PROT_READ");
                protect(range.clone(), libc::PROT_NONE);
                protect(range, libc::PROT_READ | libc::PROT_WRITE);
            }
            _ => {
                // SAFETY: memory of the test. Refused where the limit is low.
                unsafe { libc::mlock(ptr(range.start), range.len()) };
                model.check(pages.clone(), "locked");
                // SAFETY: as above.
                unsafe { libc::munlock(ptr(range.start), range.len()) };
            }
        }
        add([&did.mapped, &did.remapped, &did.protected][[0, 1, 1, 1, 2, 2][kind]], 1);
        beat.beat();
        model.check(pages.clone(), what);
        model.write(pages);
        let pages = model.some_pages(64);
        model.check(pages, "some time afterwards");
        take_again();
        beat.beat();
        std::thread::sleep(Duration::from_micros(model.random(20_000) as u64));
    }
    model.check(0..model.pages(), plot.name);
}

fn map_anew(model: &mut Model, pages: &Range<usize>) {
    let range = model.range(pages);
    if model.random(2) == 0 {
        // SAFETY: memory of the test, mapped anew at once.
        unsafe { libc::munmap(ptr(range.start), range.len()) };
    }
    map_at(range.start, range.len());
    model.zeroed(pages.clone());
}

/// Verifies pages, and writes them, where `mremap` has taken them.
fn there(model: &Model, pages: &Range<usize>, elsewhere: usize) {
    let shift = elsewhere.wrapping_sub(model.addr(pages.start));
    for page in pages.clone() {
        for i in model.words(page) {
            let at = (model.region.addr() + i * 8).wrapping_add(shift);
            // SAFETY: mapped there by mremap; only this thread uses it.
            let word = unsafe { AtomicU64::from_ptr(ptr(at).cast()) };
            let found = word.load(Ordering::Relaxed);
            assert_eq!(found, model.expect(page, i), "word {i} where mremap took it");
            word.store(found, Ordering::Relaxed);
        }
    }
}

/// Forks again and again; each child finds the memory of one moment.
pub fn fork(plots: &[Plot], did: &Did, beat: &Beat, is_over: impl Fn() -> bool) {
    let mut numbers = Numbers::new(5);
    while !is_over() {
        take_again();
        // SAFETY: the child reads memory and ends by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            hearing::forget_in_child();
            // SAFETY: plain system calls of a child that nobody else shares.
            unsafe { libc::alarm(u32::try_from(patient(100)).unwrap_or(u32::MAX)) };
            let late = hearing::RUNNING.load(Ordering::SeqCst);
            let wrong = plots.iter().find_map(|plot| plot.is_snapshot(late).err());
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(wrong.unwrap_or(0)) };
        }
        assert!(child > 0, "fork: {}", std::io::Error::last_os_error());
        let mut status = 0;
        // SAFETY: waits for our child; the kernel writes the status.
        while unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
            assert_eq!(errno(), libc::EINTR);
        }
        let said = (libc::WIFEXITED(status), libc::WEXITSTATUS(status), libc::WTERMSIG(status));
        assert_eq!(status, 0, "a child: 10 to 12: no snapshot; signal 14: it hung; {said:?}");
        add(&did.forks, 1);
        beat.beat();
        std::thread::sleep(Duration::from_micros(20_000 + numbers.next() % 200_000));
    }
}
