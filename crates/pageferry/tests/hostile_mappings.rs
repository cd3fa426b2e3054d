//! A program that changes its mappings while they move: what it unmaps, protects, locks, gives up
//! or replaces behaves as ordinary memory does, and nothing else is touched.

mod support;

use pageferry::{Busy, IoPins, Order, Outcome};
use pageferry_sys::page_size;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::siege::{
    ALL, Mover, Watchdog, advise, again, errno, far_address, map_at, protect, ptr, readable, role,
    siege,
};
use support::{Racers, engine, fill, value, word};

/// `MADV_GUARD_INSTALL` and `MADV_GUARD_REMOVE` (6.13), include/uapi/asm-generic/mman-common.h.
const GUARD_INSTALL: i32 = 102;
const GUARD_REMOVE: i32 = 103;

#[test]
fn what_is_given_up_by_dontneed_reads_as_zeros_and_what_is_written_then_stays() {
    let Some(engine) = engine() else { return };
    for (huge, order) in ALL {
        siege(&engine, huge, order, |model, _| {
            let pages = model.some_pages(48);
            assert!(advise(model.range(&pages), libc::MADV_DONTNEED), "errno {}", errno());
            model.zeroed(pages.clone());
            if model.random(2) == 0 {
                model.check(pages.clone(), "after DONTNEED");
            }
            let written = pages.start..pages.start + model.random(pages.len() + 1);
            model.write(written);
            let pages = model.some_pages(64);
            model.check(pages, "some time after DONTNEED and a write");
        });
    }
}

#[test]
fn what_is_written_after_madv_free_stays_and_the_rest_is_old_or_zero() {
    let Some(engine) = engine() else { return };
    for (huge, order) in ALL {
        siege(&engine, huge, order, |model, _| {
            let pages = model.some_pages(48);
            assert!(advise(model.range(&pages), libc::MADV_FREE), "errno {}", errno());
            for page in pages.clone() {
                let i = model.words(page).start;
                let found = word(&model.region, i).load(Ordering::Relaxed);
                let old = model.expect(page, i);
                assert!(found == 0 || found == old, "word {i}: {found:#x}, neither {old:#x} nor 0");
            }
            model.write(pages);
            let pages = model.some_pages(64);
            model.check(pages, "some time after FREE and a write");
        });
    }
}

#[test]
fn what_is_unmapped_stays_unmapped_and_all_else_is_right() {
    let Some(engine) = engine() else { return };
    for (huge, order) in ALL {
        let mut unmapped = Vec::new();
        siege(&engine, huge, order, |model, mover| {
            let pages = model.some_pages(24);
            let range = model.range(&pages);
            if unmapped.len() >= 12 || unmapped.iter().any(|o| pageferry_overlap(o, &range)) {
                return mover.wait(1);
            }
            // SAFETY: memory of the test, which it does not touch again.
            let done = unsafe { libc::munmap(ptr(range.start), range.len()) };
            assert_eq!(done, 0, "munmap: errno {}", errno());
            unmapped.push(range);
            for at in unmapped.iter().flat_map(|r| r.clone().step_by(page_size())) {
                assert!(!readable(at), "{at:#x} came back after munmap");
            }
        });
        assert!(!unmapped.is_empty());
    }
}

fn pageferry_overlap(a: &std::ops::Range<usize>, b: &std::ops::Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

#[test]
fn what_is_mapped_anew_in_the_place_of_old_memory_keeps_what_is_written_there() {
    let Some(engine) = engine() else { return };
    for (huge, order) in ALL {
        siege(&engine, huge, order, |model, _| {
            let pages = model.some_pages(24);
            let range = model.range(&pages);
            if model.random(2) == 0 {
                // SAFETY: memory of the test, mapped anew at once.
                unsafe { libc::munmap(ptr(range.start), range.len()) };
            }
            map_at(range.start, range.len());
            model.zeroed(pages.clone());
            if model.random(2) == 0 {
                model.check(pages.clone(), "after mapping anew");
            }
            model.write(pages);
            let pages = model.some_pages(64);
            model.check(pages, "some time after mapping anew");
        });
    }
}

fn remap(from: usize, len: usize, to: usize) {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: both places are the test's own.
    let got = unsafe { libc::mremap(ptr(from), len, len, flags, ptr(to)) };
    assert_eq!(got.expose_provenance(), to, "mremap: errno {}", errno());
}

#[test]
fn what_mremap_takes_elsewhere_and_back_comes_along_whole() {
    let Some(engine) = engine() else { return };
    for (huge, order) in ALL {
        let elsewhere = far_address();
        siege(&engine, huge, order, |model, mover| {
            // Always the same runs: what mremap takes must be one mapping, and each becomes one.
            let first = 24 * model.random(model.pages() / 24);
            let pages = first..first + 24;
            let range = model.range(&pages);
            remap(range.start, range.len(), elsewhere);
            let shift = elsewhere.wrapping_sub(range.start);
            let there = |model: &support::siege::Model, i: usize| {
                let at = (model.region.addr() + i * 8).wrapping_add(shift);
                // SAFETY: mapped there by mremap; only the test uses it.
                unsafe { &*ptr(at).cast::<std::sync::atomic::AtomicU64>() }
            };
            for page in pages.clone() {
                for i in model.words(page) {
                    let found = there(model, i).load(Ordering::Relaxed);
                    assert_eq!(found, model.expect(page, i), "word {i} after mremap");
                    // Write it there, too.
                    there(model, i).store(found, Ordering::Relaxed);
                }
            }
            if model.random(4) == 0 {
                mover.wait(1);
            }
            remap(elsewhere, range.len(), range.start);
            model.check(pages, "after mremap back");
            let pages = model.some_pages(64);
            model.check(pages, "some time after mremap");
        });
    }
}

#[test]
fn what_mremap_cuts_off_is_gone_and_the_rest_is_right() {
    let Some(engine) = engine() else { return };
    for (huge, order) in ALL {
        let mut cut = Vec::new();
        siege(&engine, huge, order, |model, mover| {
            let last = model.pages() - 1 - 32 * cut.len();
            if cut.len() >= 12 {
                return mover.wait(1);
            }
            // The last 8 of each 16 pages, beginning at the end of the victim.
            let pages = last - 16..last;
            let (range, page) = (model.range(&pages), page_size());
            // SAFETY: memory of the test; the end is not used again.
            let got = unsafe { libc::mremap(ptr(range.start), 16 * page, 8 * page, 0) };
            assert_eq!(got.addr(), range.start, "mremap: errno {}", errno());
            cut.push(range.start + 8 * page..range.end);
            model.check(pages.start..pages.start + 8, "after shrinking");
            for at in cut.iter().flat_map(|r| r.clone().step_by(page)) {
                assert!(!readable(at), "{at:#x} came back after mremap");
            }
            mover.wait(1);
        });
        assert!(!cut.is_empty());
    }
}

#[test]
fn what_is_protected_and_released_again_keeps_its_content() {
    let Some(engine) = engine() else { return };
    for (huge, order) in ALL {
        siege(&engine, huge, order, |model, mover| {
            let pages = model.some_pages(64);
            let range = model.range(&pages);
            protect(range.clone(), libc::PROT_READ);
            model.check(pages.clone(), "under PROT_READ");
            if model.random(4) == 0 {
                mover.wait(1);
            }
            protect(range.clone(), libc::PROT_NONE);
            assert!(!readable(range.start), "PROT_NONE is readable");
            if model.random(4) == 0 {
                mover.wait(1);
            }
            protect(range, libc::PROT_READ | libc::PROT_WRITE);
            model.check(pages.clone(), "after PROT_NONE");
            model.write(pages);
            let pages = model.some_pages(64);
            model.check(pages, "some time after mprotect");
        });
    }
}

#[test]
fn locked_pages_keep_their_content_stay_in_memory_and_move_again_when_unlocked() {
    let Some(engine) = engine() else { return };
    let refused = AtomicBool::new(false);
    for (huge, order) in ALL {
        siege(&engine, huge, order, |model, mover| {
            let pages = model.some_pages(64);
            let range = model.range(&pages);
            // SAFETY: memory of the test.
            if unsafe { libc::mlock(ptr(range.start), range.len()) } != 0 {
                refused.store(true, Ordering::Relaxed);
                return mover.wait(1);
            }
            model.check(pages.clone(), "locked");
            model.write(pages.clone());
            if model.random(4) == 0 {
                mover.wait(1);
            }
            let mut resident = vec![0u8; pages.len()];
            // SAFETY: the kernel writes one byte for each page.
            let asked =
                unsafe { libc::mincore(ptr(range.start), range.len(), resident.as_mut_ptr()) };
            assert_eq!(asked, 0);
            // SAFETY: memory of the test.
            unsafe { libc::munlock(ptr(range.start), range.len()) };
            model.check(pages, "after munlock");
        });
    }
    if refused.load(Ordering::Relaxed) {
        eprintln!("skipped in part: mlock is refused here (ulimit -l)");
    }
}

#[test]
fn advice_that_splits_mappings_costs_neither_content_nor_extra_copies() {
    let Some(engine) = engine() else { return };
    for (huge, order) in ALL {
        siege(&engine, huge, order, |model, _| {
            let pages = model.some_pages(200);
            let range = model.range(&pages);
            for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE, libc::MADV_DONTDUMP] {
                if !advise(range.clone(), advice) {
                    eprintln!("skipped in part: advice {advice} is unknown here");
                }
            }
            model.check(pages.clone(), "after advice");
            model.write(pages);
        });
    }
}

/// Kernel same-page merging, switched on while this lives.
struct Ksm(Vec<(&'static str, String)>);

impl Ksm {
    fn on() -> Option<Self> {
        let mut before = Vec::new();
        for (file, value) in [("pages_to_scan", "20000"), ("sleep_millisecs", "1"), ("run", "1")] {
            let path = format!("/sys/kernel/mm/ksm/{file}");
            let old = std::fs::read_to_string(&path).ok()?;
            if std::fs::write(&path, value).is_err() {
                drop(Self(before));
                return None;
            }
            before.push((file, old));
        }
        Some(Self(before))
    }
    fn sharing() -> u64 {
        let text = std::fs::read_to_string("/sys/kernel/mm/ksm/pages_sharing").unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        for (file, old) in self.0.iter().rev() {
            let _ = std::fs::write(format!("/sys/kernel/mm/ksm/{file}"), old.trim());
        }
    }
}

#[test]
fn pages_merged_by_ksm_are_busy_or_move_and_part_when_written() {
    let Some(engine) = engine() else { return };
    let Some(_ksm) = Ksm::on() else {
        return eprintln!("skipped: /sys/kernel/mm/ksm is not writable");
    };
    let _watchdog = Watchdog::new("KSM");
    let len = 8 << 20;
    for order in [Order::Frozen, Order::Live] {
        let region = engine.map(len).folios(pageferry::Folios::Base).build().expect("memory");
        let region = Arc::new(region);
        fill(&region, 0..len);
        // The second half: pages that are all alike.
        let words = page_size() / 8;
        let alike = |i: usize| value(i % words, 7);
        let half = len / 16..len / 8;
        for i in half.clone() {
            word(&region, i).store(alike(i), Ordering::Relaxed);
        }
        let racers = Racers::start_on(&region, &[0..len / 2], 1, 1);
        let same = region.addr() + len / 2..region.addr() + len;
        if !advise(same.clone(), libc::MADV_MERGEABLE) {
            racers.finish();
            return eprintln!("skipped: this kernel has no KSM");
        }
        let until = Instant::now() + Duration::from_secs(10);
        while Ksm::sharing() < 512 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        if Ksm::sharing() == 0 {
            eprintln!("skipped in part: KSM merged nothing within 10 s");
        }
        let mover = Mover::start(&engine, &region, order);
        mover.wait(4);
        let check = |when: &str| {
            for i in half.clone() {
                assert_eq!(word(&region, i).load(Ordering::Relaxed), alike(i), "{when}: word {i}");
            }
        };
        check("merged");
        // Each page becomes its own.
        for i in half.clone().step_by(words) {
            word(&region, i).store(value(i, 9), Ordering::Relaxed);
        }
        mover.wait(4);
        for i in half.clone().step_by(words) {
            assert_eq!(word(&region, i).swap(alike(i), Ordering::Relaxed), value(i, 9));
        }
        assert!(advise(same, libc::MADV_UNMERGEABLE), "errno {}", errno());
        mover.wait(2);
        check("parted");
        let moved = mover.finish();
        racers.finish();
        assert!(moved.bytes(Outcome::Busy(Busy::Shared)) > 0, "nothing was merged: {moved:?}");
    }
}

#[test]
fn guard_markers_stand_while_memory_around_them_moves() {
    let Some(engine) = engine() else { return };
    let probe = far_address();
    map_at(probe, page_size());
    if !advise(probe..probe + page_size(), GUARD_INSTALL) {
        return eprintln!("skipped: MADV_GUARD_INSTALL is unknown here (Linux 6.13)");
    }
    for (huge, order) in ALL {
        siege(&engine, huge, order, |model, mover| {
            let pages = model.some_pages(16);
            let range = model.range(&pages);
            assert!(advise(range.clone(), GUARD_INSTALL), "errno {}", errno());
            // The kernel tells nobody: pages in the air at this moment land beside the marker
            // first.
            mover.wait(2);
            for at in range.clone().step_by(page_size()) {
                assert!(!readable(at), "the guard at {at:#x} is gone");
            }
            assert!(advise(range, GUARD_REMOVE), "errno {}", errno());
            model.zeroed(pages.clone());
            model.check(pages.clone(), "after the guard was removed");
            model.write(pages);
            let pages = model.some_pages(64);
            model.check(pages, "some time after a guard");
        });
    }
}

#[test]
fn a_touch_of_a_guard_page_kills_as_usual_during_moves() {
    let test = "a_touch_of_a_guard_page_kills_as_usual_during_moves";
    let Some(engine) = engine() else { return };
    if role().is_none() {
        let output = again(test, "victim").output().expect("this binary runs again");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{:?}: {text}", output.status);
        return;
    }
    let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: setrlimit reads the limit that it is given.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core) };
    siege(&engine, false, Order::Live, |model, mover| {
        let range = model.range(&(8..9));
        protect(range.clone(), libc::PROT_NONE);
        mover.wait(3);
        // SAFETY: not safe, and that is the point: this process ends here.
        unsafe { ptr(range.start).cast::<u64>().write_volatile(1) };
    });
}

#[test]
fn memory_never_written_stays_zero_and_first_touches_during_moves_last() {
    let Some(engine) = engine() else { return };
    let _watchdog = Watchdog::new("first touches");
    let len = 24 << 20;
    for (huge, order) in ALL {
        let folios = if huge { pageferry::Folios::Huge } else { pageferry::Folios::Base };
        let region = Arc::new(engine.map(len).folios(folios).build().expect("memory"));
        // First third: racers. Second: zero pages, read only. Third: never touched before.
        fill(&region, 0..len / 3);
        let words = page_size() / 8;
        for i in (len / 24..len / 12).step_by(words) {
            assert_eq!(word(&region, i).load(Ordering::Relaxed), 0);
        }
        let racers = Racers::start_on(&region, &[0..len / 3], 1, 1);
        let mover = Mover::start(&engine, &region, order);
        mover.wait(1);
        std::thread::scope(|scope| {
            for id in 0..3 {
                let (region, mover) = (&region, &mover);
                scope.spawn(move || {
                    let ours = (len / 24..len / 8).step_by(words).enumerate();
                    for (n, page) in ours.filter(|(n, _)| n % 3 == id) {
                        for i in [page, page + 77, page + words - 1] {
                            assert_eq!(word(region, i).load(Ordering::Relaxed), 0, "word {i}");
                        }
                        word(region, page + 1).store(value(page, 1), Ordering::Relaxed);
                        if n % 96 == id {
                            mover.wait(1);
                        }
                    }
                });
            }
        });
        mover.finish();
        racers.finish();
        for i in len / 24..len / 8 {
            let wanted = if i % words == 1 { value(i - 1, 1) } else { 0 };
            assert_eq!(word(&region, i).load(Ordering::Relaxed), wanted, "word {i} at the end");
        }
    }
}

#[test]
fn huge_pages_split_half_way_move_on_as_base_pages() {
    let Some(engine) = engine() else { return };
    for order in [Order::Frozen, Order::Live] {
        siege(&engine, true, order, |model, mover| {
            // A part of one huge page, by each of the ways that split it.
            let huge = model.random(2) * 512 + 256;
            let first = huge + model.random(500);
            let pages = first..first + 1 + model.random(huge + 512 - first - 1).min(64);
            let range = model.range(&pages);
            match model.random(3) {
                0 => {
                    protect(range.clone(), libc::PROT_READ);
                    model.check(pages.clone(), "read only");
                    protect(range, libc::PROT_READ | libc::PROT_WRITE);
                }
                1 => {
                    assert!(advise(range, libc::MADV_DONTNEED));
                    model.zeroed(pages.clone());
                }
                _ => {
                    // SAFETY: memory of the test, mapped anew at once.
                    unsafe { libc::munmap(ptr(range.start), range.len()) };
                    map_at(range.start, range.len());
                    model.zeroed(pages.clone());
                }
            }
            model.check(pages.clone(), "after a split");
            model.write(pages);
            if model.random(4) == 0 {
                mover.wait(1);
            }
            if model.random(4) == 0 {
                // Whole again: given up, then touched as one.
                let all = model.range(&(huge..huge + 512));
                assert!(advise(all.clone(), libc::MADV_DONTNEED));
                advise(all, libc::MADV_HUGEPAGE);
                model.zeroed(huge..huge + 512);
                model.write(huge..huge + 512);
            }
            let all = 0..model.pages();
            model.check(all, "some time after a split");
        });
    }
}

#[test]
fn what_is_not_adopted_is_not_touched() {
    let Some(engine) = engine() else { return };
    let _watchdog = Watchdog::new("neighbours");
    let (start, len, page) = (far_address(), 4 << 20, page_size());
    map_at(start, len);
    // SAFETY: mapped above; neither end is at a block.
    let inner = unsafe { engine.adopt(ptr(start + page).cast(), len - 3 * page, IoPins::Never) };
    let inner = Arc::new(inner.expect("aligned"));
    fill(&inner, 0..inner.len());
    let outside: Vec<usize> = vec![start, start + len - page];
    let frames = |at: &[usize]| -> Vec<Option<u64>> {
        let map = pageferry_sys::pagemap::Pagemap::open().expect("procfs");
        let pfn = |&addr: &usize| {
            let mut entry = [pageferry_sys::pagemap::Entry(0)];
            map.entries(addr, &mut entry).expect("mapped");
            entry[0].pfn()
        };
        at.iter().map(pfn).collect()
    };
    for &at in &outside {
        // SAFETY: mapped above.
        unsafe { ptr(at).cast::<usize>().write_volatile(at) };
    }
    let before = frames(&outside);
    let racers = Racers::start(&inner, 1, 1);
    for order in [Order::Frozen, Order::Live] {
        let mover = Mover::start(&engine, &inner, order);
        mover.wait(2);
        let moved = mover.finish();
        assert_eq!(moved.outcomes.len(), 1, "all moved: {moved:?}");
    }
    racers.finish();
    assert_eq!(frames(&outside), before);
    for &at in &outside {
        // SAFETY: mapped above.
        assert_eq!(unsafe { ptr(at).cast::<usize>().read_volatile() }, at);
    }
}
