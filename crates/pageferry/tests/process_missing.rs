//! Pages of made-up processes that are missing when they are asked for: given back, swapped out, or
//! being migrated by somebody else.

#[path = "support/made_up.rs"]
mod made_up;

use made_up::{BASE, PID, bytes, kernel_with, pages, to_node};
use pageferry::process::Note;
use pageferry::{Busy, HUGE, Outcome};
use pageferry_sys::process::ProcessKernel;
use pageferry_sys::process::fake::{FakeKernel, FakeProcess, FakeVma, Hindrance, ProcessOp};
use pageferry_sys::{Errno, page_size};
use std::time::Duration;

#[test]
fn pages_that_somebody_else_is_migrating_are_tried_again_until_they_are_over() {
    let first = |hindrance, count: usize| {
        let mut vma = FakeVma::anonymous(BASE, page_size(), 1000, 0);
        // Scattered, and some beside each other.
        (0..count).for_each(|i| vma.pages[i * 3 / 2].hindrance = Some(hindrance));
        vma
    };
    for no_scan in [false, true] {
        for hindrance in [
            Hindrance::Migrates(1),
            Hindrance::Migrates(3),
            // They are there when asked for, and missing when they are to be moved.
            Hindrance::Unqueued(libc::ENOENT, 2),
        ] {
            let mut huge = FakeVma::anonymous(BASE * 2, HUGE, 20, 0);
            huge.pages[7].hindrance = Some(hindrance);
            // Entries do not tell huge pages, whose parts would be asked for one by one.
            let huge = (!no_scan).then_some(huge);
            let vmas = [first(hindrance, 300)].into_iter().chain(huge).collect();
            let kernel = kernel_with(2, vmas);
            if no_scan {
                kernel.without_scan();
            }
            let report = to_node(&kernel, 1).run().expect("valid");
            assert!(kernel.nodes_of(PID).iter().flatten().all(|n| *n == Some(1)), "{hindrance:?}");
            assert_eq!(bytes(&report, Outcome::Moved), report.bytes_looked_at(), "{report:?}");
            assert!(report.retried_bytes >= pages(300) && report.is_complete());
            // A dry run tries them again too, and calls nothing moved.
            let kernel = kernel_with(2, vec![first(hindrance, 300)]);
            let report = to_node(&kernel, 1).dry_run(true).run().expect("valid");
            assert_eq!(bytes(&report, Outcome::WouldMove), pages(1000), "{report:?}");
        }
    }
}

/// A process of which something is swapped out.
fn swapping(vma: &FakeVma) -> FakeKernel {
    let kernel = kernel_with(2, vec![]);
    let mut process = FakeProcess::new(PID, vec![vma.clone()]);
    process.status.swapped = pages(1);
    kernel.add(process);
    kernel
}

#[test]
fn a_page_that_never_comes_back_is_not_called_gone() {
    let swapped = Some(Hindrance::Migrates(u32::MAX));
    let mut vma = FakeVma::anonymous(BASE, page_size(), 100, 0);
    (10..20).for_each(|i| vma.pages[i].hindrance = swapped);
    // It is there, and missing all the same.
    vma.pages[30].hindrance = Some(Hindrance::Unqueued(libc::ENOENT, u32::MAX));
    let kernel = swapping(&vma);
    let report = to_node(&kernel, 1).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::NotPresent), pages(10), "{report:?}");
    assert_eq!(bytes(&report, Outcome::Busy(Busy::Contended)), pages(1));
    assert_eq!(bytes(&report, Outcome::Gone), 0);
    assert!(report.notes.list.contains(&Note::SwappedOut { bytes: pages(10) }), "{report:?}");
    assert!(!report.is_complete());
    // Asked for once only, they may as well be on their way.
    let kernel = swapping(&vma);
    let report = to_node(&kernel, 1).retries(0).run().expect("valid");
    assert_eq!(bytes(&report, Outcome::Busy(Busy::Contended)), pages(11), "{report:?}");
}

#[test]
fn pages_that_are_given_back_are_gone_at_once_and_cost_no_retry() {
    for (no_scan, unreadable) in [(false, false), (true, false), (false, true)] {
        let mut vma = FakeVma::anonymous(BASE, page_size(), 40_000, 0);
        (0..40_000).step_by(2).for_each(|i| vma.pages[i].hindrance = Some(Hindrance::Vanishes));
        let kernel = kernel_with(2, vec![vma]);
        if no_scan {
            kernel.without_scan();
        }
        if unreadable {
            // After the walk's own: what cannot be looked up stays in doubt, and is asked again.
            kernel.fail(ProcessOp::Scan, Errno(libc::EIO), 80, 1);
        }
        let report = to_node(&kernel, 1).run().expect("valid");
        assert_eq!(bytes(&report, Outcome::Gone), pages(20_000), "{report:?}");
        assert_eq!(bytes(&report, Outcome::Moved), pages(20_000));
        let bytes = pages(20_000);
        assert!(report.notes.list.contains(&Note::Changing { pid: PID, bytes }), "{report:?}");
        if !unreadable {
            assert_eq!((report.retried_bytes, kernel.now()), (0, Duration::ZERO));
        }
    }
}
