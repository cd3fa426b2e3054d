//! Pages of a special kind while they move: merged, guarded, zero, never touched, split, and those
//! of the neighbours. Each behaves as ordinary memory does.

mod support;

use pageferry::{Busy, Folios, Order, Outcome, References};
use pageferry_sys::page_size;
use pageferry_sys::pagemap::{Entry, Pagemap};
use std::ops::Range;
use std::os::unix::process::ExitStatusExt;
use std::slice::from_ref;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use support::siege::{
    ALL, Mover, Watchdog, advise, again, errno, far_address, map_at, protect, ptr, readable, role,
    siege,
};
use support::{Racers, engine, fill, sized, value, word};

/// `MADV_GUARD_INSTALL` and `MADV_GUARD_REMOVE` (6.13), include/uapi/asm-generic/mman-common.h.
const GUARD_INSTALL: i32 = 102;
const GUARD_REMOVE: i32 = 103;

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
    /// Pages of a range that are merged: mapped more than once. (What the kernel counts for a process
    /// has those that were merged before its last look, too.)
    fn merged(pagemap: &Pagemap, range: &Range<usize>) -> usize {
        let mut entries = vec![Entry(0); range.len() / page_size()];
        pagemap.entries(range.start, &mut entries).expect("the page map");
        entries.iter().filter(|entry| entry.present() && !entry.exclusive()).count()
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
    let pagemap = Pagemap::open().expect("the page map");
    let _watchdog = Watchdog::new("KSM");
    let len = 8 << 20;
    for order in [Order::Frozen, Order::Live] {
        let region = engine.map(len).folios(Folios::Base).build().expect("memory");
        let region = Arc::new(region);
        fill(&region, 0..len);
        // The second half: pages that are all alike.
        let words = page_size() / 8;
        let alike = |i: usize| value(i % words, 7);
        let half = len / 16..len / 8;
        for i in half.clone() {
            word(&region, i).store(alike(i), Ordering::Relaxed);
        }
        let racers = Racers::start_on(&region, from_ref(&(0..len / 2)), 1, 1);
        let same = region.addr() + len / 2..region.addr() + len;
        if !advise(same.clone(), libc::MADV_MERGEABLE) {
            racers.finish();
            return eprintln!("skipped: this kernel has no KSM");
        }
        let until = Instant::now() + Duration::from_secs(10);
        let merged = || Ksm::merged(&pagemap, &same);
        while merged() < 512 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        // ksmd may have gigabytes of others' memory (virtual machines') to look at first.
        let any = merged() > 0;
        if !any {
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
        let stayed = moved.bytes(Outcome::Busy(Busy::Shared));
        assert!(!any || stayed > 0, "nothing was merged: {moved:?}");
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
    let len = sized(24 << 20);
    for (huge, order) in ALL {
        let folios = if huge { Folios::Huge } else { Folios::Base };
        let region = Arc::new(engine.map(len).folios(folios).build().expect("memory"));
        // First third: racers. Second: zero pages, read only. Third: never touched before.
        fill(&region, 0..len / 3);
        let words = page_size() / 8;
        for i in (len / 24..len / 12).step_by(words) {
            assert_eq!(word(&region, i).load(Ordering::Relaxed), 0);
        }
        let racers = Racers::start_on(&region, from_ref(&(0..len / 3)), 1, 1);
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
    let inner =
        unsafe { engine.adopt(ptr(start + page).cast(), len - 3 * page, References::Never) };
    let inner = Arc::new(inner.expect("aligned"));
    fill(&inner, 0..inner.len());
    let outside: Vec<usize> = vec![start, start + len - page];
    let frames = |at: &[usize]| -> Vec<Option<u64>> {
        let map = Pagemap::open().expect("procfs");
        let pfn = |&addr: &usize| {
            let mut entry = [Entry(0)];
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
