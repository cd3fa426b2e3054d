//! The kernel path against pages of every kind, from node to node: pinned, merged, parts of larger
//! folios, swapped out, shared. The kernel itself is asked where each page is, and the program finds
//! what it has written.

#[path = "support/child.rs"]
mod child;
#[path = "support/kinds.rs"]
mod kinds;

use child::{Memory, must};
use kinds::{Setting, Ward, bytes, fill, number, read_number, two_nodes, until, wrong};
use pageferry::process::{Destination, Filter, Kind, ProcessMove, ProcessReport, Selection, Where};
use pageferry::{HUGE, Outcome};
use pageferry_sys::page_size;
use pageferry_sys::process::{LinuxProcesses, ProcessKernel};
use std::cell::Cell;
use std::ptr::{null, with_exposed_provenance_mut};

const MIB: usize = 1 << 20;

fn ptr(at: usize) -> *mut libc::c_void {
    with_exposed_provenance_mut(at)
}

/// `madvise` on the child's own memory; 0, or what it fails with.
fn advise(memory: Memory, advice: i32) -> u64 {
    // SAFETY: advice that keeps the content of the child's own mapping.
    let done = unsafe { libc::madvise(ptr(memory.0), memory.1, advice) };
    u64::from(done != 0)
}

/// `IORING_REGISTER_BUFFERS` and `IORING_UNREGISTER_BUFFERS`, include/uapi/linux/io_uring.h.
const REGISTER: u32 = 0;
const UNREGISTER: u32 = 1;
/// Bytes of a `struct io_uring_params`.
const PARAMS: usize = 120;

const PIN: u32 = 1;
const UNPIN: u32 = 2;

/// A buffer within one page, one over several, one across the border of two huge pages.
const BUFFERS: [(usize, usize); 3] = [(0x3008, 0x200), (0x10000, 0x5000), (HUGE - 0x2000, 0x3000)];

/// Makes a ring and registers the buffers: they are pinned. 0: refused.
fn pin(memory: Memory) -> i32 {
    let params = [0u64; PARAMS / 8];
    let vectors =
        BUFFERS.map(|(start, len)| libc::iovec { iov_base: ptr(memory.0 + start), iov_len: len });
    // SAFETY: the kernel writes to `params`, of its size, and reads three iovecs of memory that
    // stays mapped.
    unsafe {
        let ring = libc::syscall(libc::SYS_io_uring_setup, 2, params.as_ptr());
        let register = libc::SYS_io_uring_register;
        let count = vectors.len();
        let done = libc::syscall(register, ring, REGISTER, vectors.as_ptr(), count);
        if ring > 0 && done == 0 { i32::try_from(ring).unwrap_or(0) } else { 0 }
    }
}

fn unpin(ring: i32) {
    // SAFETY: the child's own ring.
    unsafe {
        let none = null::<libc::iovec>();
        must(libc::syscall(libc::SYS_io_uring_register, ring, UNREGISTER, none, 0) == 0);
        libc::close(ring);
    }
}

#[test]
fn pinned_pages_are_busy_and_move_when_they_are_let_go() {
    let Some((from, to)) = two_nodes() else { return };
    let len = 8 * MIB;
    for huge in [false, true] {
        let ring = Cell::new(0);
        let ward = Ward::new(
            |_| fill(child::anonymous(len, huge)),
            |_, memory, order| match order {
                PIN => {
                    ring.set(pin(memory));
                    u64::from(ring.get() > 0)
                }
                UNPIN => {
                    unpin(ring.get());
                    0
                }
                _ => wrong(memory),
            },
        );
        let size = if huge { HUGE } else { page_size() };
        ward.goes_to(from, len);
        if ward.ask(PIN) == 0 {
            return eprintln!("skipped: io_uring registers no buffers here");
        }
        let is_pinned = |page: usize| {
            let folio = page * page_size() / size * size;
            BUFFERS.iter().any(|&(start, len)| start < folio + size && folio < start + len)
        };
        let pages = len / page_size();
        let pinned = (0..pages).filter(|&p| is_pinned(p)).count() * page_size();
        let before = ward.entries();
        let report = ward.to(to).retries(2).run().expect("our child");
        assert_eq!(kinds::adds_up(&report), len as u64, "{report:?}");
        let busy = report.bytes(|o| matches!(o, Outcome::Busy(_)));
        assert_eq!(busy, pinned as u64, "huge: {huge}: {report:?}");
        assert_eq!(bytes(&report, Outcome::Moved), (len - pinned) as u64, "{report:?}");
        // Those that are pinned twice, and perhaps others once or twice.
        let retried = report.retried_bytes;
        assert!((2 * busy..=2 * len as u64).contains(&retried), "{retried} of {busy}");
        assert!(report.examples.iter().any(|e| matches!(e.outcome, Outcome::Busy(_))));
        let after = ward.entries();
        for (page, node) in ward.nodes(page_size()).into_iter().enumerate() {
            let wanted = if is_pinned(page) { from } else { to };
            assert_eq!(node, number(wanted), "page {page}, huge: {huge}");
            assert!(!is_pinned(page) || before[page].pfn() == after[page].pfn(), "page {page}");
        }
        ward.is_intact();
        ward.ask(UNPIN);
        // The kernel lets go of them a moment later.
        until("the pages are let go", || ward.to(to).run().expect("our child").is_complete());
        ward.is_on(to);
        ward.is_intact();
    }
}

const MERGE: u32 = 1;
const PART: u32 = 2;

/// What each word of a page holds in a range whose pages are all alike.
fn alike(at: usize) -> u64 {
    (at % page_size()) as u64 | 1 << 63
}

fn words(memory: Memory, step: usize) -> impl Iterator<Item = *mut u64> {
    (memory.0..memory.0 + memory.1).step_by(step).map(with_exposed_provenance_mut)
}

#[test]
fn pages_merged_by_ksm_move_and_part_when_written() {
    let Some((from, to)) = two_nodes() else { return };
    let len = 4 * MIB;
    let write = |memory| {
        for word in words(memory, 8) {
            // SAFETY: the child's own memory.
            unsafe { word.write_volatile(alike(word.addr())) };
        }
        memory
    };
    let ward = Ward::new(
        |_| write(child::anonymous(len, false)),
        |_, memory, order| match order {
            MERGE => advise(memory, libc::MADV_MERGEABLE),
            PART => {
                for word in words(memory, page_size()) {
                    // SAFETY: the child's own memory; the same word, written.
                    unsafe { word.write_volatile(word.read_volatile()) };
                }
                0
            }
            // SAFETY: the child's own memory.
            _ => words(memory, 8)
                .filter(|w| unsafe { w.read_volatile() } != alike(w.addr()))
                .count() as u64,
        },
    );
    ward.goes_to(from, len);
    let ksm = |file: &str| format!("/sys/kernel/mm/ksm/{file}");
    let Some(_much) = Setting::new(ksm("pages_to_scan"), "20000") else { return };
    let Some(_often) = Setting::new(ksm("sleep_millisecs"), "1") else { return };
    if ward.ask(MERGE) != 0 {
        return eprintln!("skipped: this kernel has no KSM");
    }
    let Some(on) = Setting::new(ksm("run"), "1") else { return };
    let merged = format!("/proc/{}/ksm_merging_pages", ward.child.pid);
    let pages = (len / page_size()) as u64;
    until("all pages are merged", || read_number(&merged) >= pages - 8);
    // It stops, and merged pages stay merged.
    drop(on);
    let frames = |ward: &Ward| {
        let pfns = ward.entries().iter().filter_map(|e| e.pfn()).collect::<Vec<_>>();
        assert_eq!(pfns.len() as u64, pages, "all present");
        pfns.into_iter().collect::<std::collections::BTreeSet<_>>().len()
    };
    let few = frames(&ward);
    assert!(few < 64, "{few} frames for {pages} pages");
    for to in [to, from, to] {
        let report = ward.goes_to(to, len);
        let settled = bytes(&report, Outcome::Moved) + bytes(&report, Outcome::AlreadyThere);
        assert_eq!(settled, len as u64, "{report:?}");
        ward.is_on(to);
        assert_eq!(frames(&ward), few, "they stay merged");
        ward.is_intact();
    }
    ward.ask(PART);
    assert_eq!(frames(&ward) as u64, pages, "each is its own again");
    for to in [from, to] {
        ward.goes_to(to, len);
        ward.is_on(to);
        ward.is_intact();
    }
}

const SPLIT: u32 = 1;
const PUNCH: u32 = 2;

/// The pages moved, by the size that the report has them in.
fn moved_pages(report: &ProcessReport, page_bytes: usize) -> u64 {
    let lines = report.lines.iter().filter(|l| l.outcome == Outcome::Moved);
    lines.filter(|l| l.page_bytes == page_bytes as u64).map(|l| l.pages).sum()
}

#[test]
fn huge_pages_mapped_in_parts_move_each_page_once() {
    let Some((from, to)) = two_nodes() else { return };
    let len = 8 * MIB;
    // In each huge page the second base page is read-only, and the third is no longer there.
    let each = |memory: Memory, page: usize, call: fn(*mut libc::c_void, usize) -> i32| {
        for huge in (memory.0..memory.0 + memory.1).step_by(HUGE) {
            must(call(ptr(huge + page * page_size()), page_size()) == 0);
        }
        0
    };
    let ward = Ward::new(
        |_| fill(child::anonymous(len, true)),
        |board, memory, order| match order {
            // SAFETY: the child's own memory, which it only reads from now on.
            SPLIT => each(memory, 1, |at, len| unsafe { libc::mprotect(at, len, libc::PROT_READ) }),
            PUNCH => {
                board.counts[0].store(1, std::sync::atomic::Ordering::Relaxed);
                // SAFETY: the child's own memory, which it does not use any more.
                each(memory, 2, |at, len| unsafe { libc::munmap(at, len) })
            }
            _ => (memory.0..memory.0 + memory.1)
                .step_by(page_size())
                .filter(|at| {
                    let punched = board.counts[0].load(std::sync::atomic::Ordering::Relaxed) == 1;
                    !(punched && at % HUGE == 2 * page_size())
                })
                .map(|at| wrong((at, page_size())))
                .sum(),
        },
    );
    let report = ward.goes_to(from, len);
    if report.lines.iter().any(|l| l.page_bytes != HUGE as u64) {
        return eprintln!("skipped: this kernel gave no huge pages");
    }
    for (order, pages) in [(SPLIT, len / page_size()), (PUNCH, len / page_size() - len / HUGE)] {
        assert_eq!(ward.ask(order), 0);
        for to in [to, from] {
            let report = ward.goes_to(to, pages * page_size());
            assert_eq!(moved_pages(&report, page_size()), pages as u64, "{report:?}");
            let there = ward.nodes(page_size()).iter().filter(|&&n| n == number(to)).count();
            assert_eq!(there, pages);
            ward.is_intact();
        }
    }
}

#[test]
fn folios_between_the_base_size_and_a_huge_page_move_each_page_once() {
    let Some((from, to)) = two_nodes() else { return };
    let thp = |size: &str, file: &str| {
        format!("/sys/kernel/mm/transparent_hugepage/hugepages-{size}/{file}")
    };
    let Some(_none) = Setting::new(thp("2048kB", "enabled"), "never") else { return };
    let Some(_some) = Setting::new(thp("64kB", "enabled"), "always") else { return };
    let count = || read_number(thp("64kB", "stats/anon_fault_alloc"));
    let before = count();
    let len = 8 * MIB;
    let ward = Ward::filled(|| child::anonymous(len, true));
    let folios = count() - before;
    if folios < (len >> 16) as u64 / 2 {
        eprintln!("skipped in part: only {folios} folios of 64 KiB were to be had");
    }
    ward.goes_to(from, len);
    for to in [to, from] {
        let report = ward.goes_to(to, len);
        assert_eq!(moved_pages(&report, page_size()), (len / page_size()) as u64, "{report:?}");
        assert_eq!(bytes(&report, Outcome::Moved), len as u64, "{report:?}");
        eprintln!("{} calls, {} bytes tried again", report.calls.count(), report.retried_bytes);
        ward.is_on(to);
        ward.is_intact();
    }
}

const PAGE_OUT: u32 = 1;

#[test]
fn pages_that_are_swapped_out_are_not_asked_for_and_stay_intact() {
    let Some((from, to)) = two_nodes() else { return };
    let len = 8 * MIB;
    let ward = Ward::new(
        |_| fill(child::anonymous(len, false)),
        |_, memory, order| match order {
            PAGE_OUT => advise((memory.0, memory.1 / 2), libc::MADV_PAGEOUT),
            _ => wrong(memory),
        },
    );
    ward.goes_to(from, len);
    assert_eq!(ward.ask(PAGE_OUT), 0);
    let entries = ward.entries();
    let swapped = entries.iter().filter(|e| e.swapped()).count() * page_size();
    if swapped == 0 {
        return eprintln!("skipped: there is no swap here");
    }
    let present = entries.iter().filter(|e| e.present()).count() * page_size();
    assert_eq!(present + swapped, len);
    let filter = Filter::new().range(ward.child.range());
    let look = || Where::new(Selection::new().pid(ward.child.pid).filter(filter.clone())).look();
    let found = look().expect("our child");
    assert_eq!(found.swapped, [(Kind::Anonymous, swapped as u64)]);
    let report = ward.goes_to(to, present);
    assert_eq!(bytes(&report, Outcome::Moved), present as u64, "{report:?}");
    let still = ward.entries().iter().filter(|e| e.swapped()).count() * page_size();
    assert_eq!(still, swapped, "a move fetches nothing from swap");
    ward.is_intact();
    ward.goes_to(to, len);
    ward.is_on(to);
    ward.is_intact();
    assert_eq!(look().expect("our child").swapped, []);
}

#[test]
fn memory_of_three_processes_changes_nodes_once_for_all_of_them() {
    let Some((from, to)) = two_nodes() else { return };
    if !LinuxProcesses::default().may_move_shared() {
        return eprintln!("skipped: moving what several processes map needs CAP_SYS_NICE");
    }
    let len = 8 * MIB;
    let memory = fill(child::memfd(len));
    let wards: Vec<_> = (0..3).map(|_| Ward::filled(|| memory)).collect();
    let filter = Filter::new().range(memory.0..memory.0 + memory.1);
    let all = wards.iter().fold(Selection::new().filter(filter), |all, w| all.pid(w.child.pid));
    let go = |to| ProcessMove::new(all.clone(), Destination::node(to)).run().expect("our children");
    go(from);
    for to in [to, from] {
        let report = go(to);
        let [line] = report.lines[..] else { panic!("one kind of pages: {report:?}") };
        assert_eq!((line.outcome, line.kind), (Outcome::Moved, Kind::SharedMemory));
        assert_eq!((line.pages, report.processes), ((len / page_size()) as u64, 3), "{report:?}");
        for ward in &wards {
            ward.is_on(to);
            ward.is_intact();
        }
    }
    drop(wards);
    child::unmap(memory);
}
