//! What stands in page tables and is no page: swapped out, or a marker. On a made-up kernel, and on this
//! machine's.

#[path = "support/child.rs"]
mod child;
#[path = "support/made_up.rs"]
mod made_up;
#[path = "support/rights.rs"]
mod rights;

use child::{Child, must};
use made_up::{BASE, PID, bytes, kernel_with, pages, to_node};
use pageferry::process::{Filter, Kind, Note, ProcessResidency, Selection, Where};
use pageferry::{Busy, Outcome};
use pageferry_sys::process::fake::{FakeKernel, FakeProcess, FakeVma, Hindrance, Trace};
use pageferry_sys::process::{LinuxProcesses, ProcessKernel};
use pageferry_sys::uffd::{Features, Modes, Rights};
use pageferry_sys::{Linux, Sys, page_size};
use rights::{sees_frames, without_sys_admin};
use std::ptr::with_exposed_provenance_mut;
use std::sync::Arc;

/// Ten pages each that are swapped out, guard markers, other markers; and twenty pages.
fn traces(kind: Option<&str>, start: usize) -> FakeVma {
    let mut vma = FakeVma::anonymous(start, page_size(), 50, 0);
    vma.vma.name = kind.unwrap_or_default().into();
    for (index, trace) in [Trace::Swapped, Trace::Guard, Trace::Marker].into_iter().enumerate() {
        let stands = Some(Hindrance::Stands(trace));
        (index * 10..index * 10 + 10).for_each(|i| vma.pages[i].hindrance = stands);
    }
    vma
}

fn look(kernel: &FakeKernel) -> ProcessResidency {
    Where::new(Selection::new().pid(PID)).kernel(Arc::new(kernel.clone())).look().expect("valid")
}

fn of_kinds(swapped: u64, hidden: bool, no_scan: bool) -> ProcessResidency {
    let vmas = vec![traces(None, BASE), traces(Some("[heap]"), BASE * 2)];
    let mut process = FakeProcess::new(PID, vmas);
    process.status.swapped = swapped;
    let kernel = FakeKernel::new(&[1 << 40]);
    kernel.add(process);
    if hidden {
        kernel.hide_frames();
    }
    if no_scan {
        kernel.without_scan();
    }
    look(&kernel)
}

#[test]
fn markers_are_told_from_what_was_swapped_out() {
    for no_scan in [false, true] {
        // What the kernel counts may lag behind what it tells of each page.
        for counted in [0, pages(20)] {
            let found = of_kinds(counted, false, no_scan);
            let each = pages(10);
            assert_eq!(found.swapped, [(Kind::Anonymous, each), (Kind::Heap, each)]);
            assert_eq!((found.markers, found.bytes()), (pages(40), pages(40)), "{found:?}");
        }
    }
}

#[test]
fn what_is_not_told_is_swapped_out_up_to_what_the_kernel_counts() {
    for no_scan in [false, true] {
        // Guard markers are told all the same.
        let sums = |counted: u64| {
            let found = of_kinds(counted, true, no_scan);
            let swapped: u64 = found.swapped.iter().map(|(_, bytes)| bytes).sum();
            assert_eq!(swapped + found.markers, pages(60), "{found:?}");
            assert_eq!(found.bytes(), pages(40));
            found.swapped
        };
        assert_eq!(sums(0), [], "a host without swap");
        assert_eq!(sums(pages(20)), [(Kind::Anonymous, pages(20))]);
        let both = [(Kind::Anonymous, pages(20)), (Kind::Heap, pages(5))];
        assert_eq!(sums(pages(25)), both);
        assert_eq!(sums(1 << 40).iter().map(|(_, bytes)| bytes).sum::<u64>(), pages(40));
    }
}

#[test]
fn of_each_process_no_more_is_swapped_out_than_the_kernel_counts_of_it() {
    let kernel = FakeKernel::new(&[1 << 40]);
    kernel.hide_frames();
    for (pid, counted) in [(1, pages(3)), (2, 0), (3, pages(50))] {
        let mut process = FakeProcess::new(pid, vec![traces(None, BASE)]);
        process.status.swapped = counted;
        kernel.add(process);
    }
    let all = Selection::new().pid(1).pid(2).pid(3);
    let found = Where::new(all).kernel(Arc::new(kernel)).look().expect("valid");
    assert_eq!(found.swapped, [(Kind::Anonymous, pages(3 + 20))]);
    assert_eq!(found.markers, pages(17 + 20 + 30));
}

#[test]
fn pages_that_give_way_to_markers_while_they_are_asked_for_are_gone_not_swapped_out() {
    for (trace, hidden, counted, outcome, noted) in [
        (Trace::Guard, false, 0, Outcome::Gone, false),
        (Trace::Guard, true, pages(50), Outcome::Gone, false),
        (Trace::Marker, false, pages(50), Outcome::Gone, false),
        // What it is nobody tells: it is not called gone, nor swapped out where nothing is.
        (Trace::Marker, true, 0, Outcome::Busy(Busy::Contended), false),
        (Trace::Marker, true, pages(50), Outcome::NotPresent, true),
        (Trace::Swapped, true, pages(50), Outcome::NotPresent, true),
        // What the kernel counts may lag behind.
        (Trace::Swapped, false, 0, Outcome::NotPresent, true),
    ] {
        for no_scan in [false, true] {
            let mut vma = FakeVma::anonymous(BASE, page_size(), 100, 0);
            let gives_way = Some(Hindrance::GivesWay(trace));
            (10..20).for_each(|i| vma.pages[i].hindrance = gives_way);
            let kernel = kernel_with(2, vec![]);
            let mut process = FakeProcess::new(PID, vec![vma]);
            process.status.swapped = counted;
            kernel.add(process);
            if hidden {
                kernel.hide_frames();
            }
            if no_scan {
                kernel.without_scan();
            }
            let report = to_node(&kernel, 1).run().expect("valid");
            let case = format!("{trace:?}, hidden: {hidden}, no scan: {no_scan}: {report:?}");
            assert_eq!(bytes(&report, outcome), pages(10), "{case}");
            assert_eq!(bytes(&report, Outcome::Moved), pages(90), "{case}");
            let said = report.notes.list.contains(&Note::SwappedOut { bytes: pages(10) });
            assert_eq!(said, noted, "{case}");
        }
    }
}

/// What a look with and one without the right to see frames finds in these addresses; on this kernel,
/// and as on one without scans.
fn real(pid: u32, range: std::ops::Range<usize>) -> Vec<ProcessResidency> {
    let look = |kernel: LinuxProcesses| {
        let selection = Selection::new().pid(pid).filter(Filter::new().range(range.clone()));
        Where::new(selection).kernel(Arc::new(kernel)).look().expect("ours")
    };
    let scan = || look(LinuxProcesses::default());
    let entries = || look(LinuxProcesses::default().without_scan());
    let mut found = vec![scan(), entries()];
    if sees_frames() {
        found.extend(without_sys_admin(|| {
            assert!(!sees_frames());
            [scan(), entries()]
        }));
    } else {
        eprintln!("skipped in part: frames are not told here (CAP_SYS_ADMIN)");
    }
    found
}

/// Markers are not told as swapped out, and never is more than the kernel counts.
fn no_more_than_counted(pid: u32, found: &[ProcessResidency], markers: u64, present: u64) {
    let view = LinuxProcesses::default().open(pid).expect("ours");
    for found in found {
        let counted = view.status().expect("ours").swapped;
        let swapped: u64 = found.swapped.iter().map(|(_, bytes)| bytes).sum();
        if counted == 0 {
            assert_eq!((swapped, found.markers), (0, markers), "{found:?}");
            assert_eq!(found.bytes(), present, "{found:?}");
        } else {
            eprintln!("skipped in part: this machine swaps, so sums are only bounded");
            assert!(swapped <= counted && swapped + found.markers >= markers, "{found:?}");
        }
    }
}

/// `MADV_GUARD_INSTALL` (6.13), include/uapi/asm-generic/mman-common.h.
const GUARD_INSTALL: i32 = 102;

#[test]
fn guard_regions_are_not_told_as_swapped_out() {
    let guard = |start: usize, len: usize| {
        // SAFETY: the caller's own mapping, whose content it does not use.
        unsafe { libc::madvise(with_exposed_provenance_mut(start), len, GUARD_INSTALL) }
    };
    let page = page_size();
    let own = child::anonymous(page, false);
    if guard(own.0, page) != 0 {
        return eprintln!("skipped: this kernel has no guard regions (Linux 6.13)");
    }
    let child = Child::with(|| {
        let memory = child::anonymous(4 << 20, false);
        must(guard(memory.0, 1 << 20) == 0 && guard(memory.0 + (2 << 20), page) == 0);
        memory
    });
    let markers = (1 << 20) + page as u64;
    let found = real(child.pid, child.range());
    no_more_than_counted(child.pid, &found, markers, (4 << 20) - markers);
}

#[test]
fn write_protection_of_pages_that_are_not_there_is_not_told_as_swapped_out() {
    // UFFD_FEATURE_WP_UNPOPULATED (6.4), include/uapi/linux/userfaultfd.h.
    let features = Features::PAGEFAULT_FLAG_WP | Features::from_bits_retain(1 << 13);
    let opened = [Rights::Full, Rights::UserModeOnly]
        .into_iter()
        .find_map(|rights| Linux.open_uffd(rights, features).ok());
    let Some(fd) = opened else {
        return eprintln!("skipped: no userfaultfd with WP_UNPOPULATED (Linux 6.4) is to be had");
    };
    let len = 1 << 20;
    let start = child::map(len, child::RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    Linux.register(&fd, start, len, Modes::WP).expect("our own mapping");
    Linux.protect(&fd, start, len).expect("registered");
    let pid = std::process::id();
    no_more_than_counted(pid, &real(pid, start..start + len), len as u64, 0);
    child::unmap((start, len));
}
