//! A program that changes its mappings while they move: what it unmaps, protects, locks, gives up
//! or replaces behaves as ordinary memory does, and nothing else is touched.

mod support;

use pageferry_sys::page_size;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use support::siege::{
    ALL, Model, advise, errno, far_address, map_at, protect, ptr, readable, siege,
};
use support::{engine, word};

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
            if unmapped.len() >= 12 || unmapped.iter().any(|o| overlap(o, &range)) {
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

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
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
            if model.random(2) == 0 {
                // And back at once, perhaps while pages are in the air.
                remap(elsewhere, range.len(), range.start);
                return model.check(pages, "after mremap there and back");
            }
            let shift = elsewhere.wrapping_sub(range.start);
            let there = |model: &Model, i: usize| {
                let at = (model.region.addr() + i * 8).wrapping_add(shift);
                // SAFETY: mapped there by mremap; only the test uses it.
                unsafe { &*ptr(at).cast::<AtomicU64>() }
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
            assert!(resident.iter().all(|byte| byte & 1 != 0), "a locked page is not in memory");
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
fn advice_that_splits_mappings_costs_no_content() {
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
