//! The planner alone, behind a kernel that answers at once: how fast it is, for the reader, and
//! that its memory does not grow with the process.

#[path = "support/endless.rs"]
mod endless;

use endless::Endless;
use pageferry::process::{Destination, ProcessMove, Selection};
use pageferry::topology::{Machine, NodeId};
use pageferry_sys::usage::resident_bytes;
use std::sync::Arc;
use std::time::Duration;

#[test]
fn memory_does_not_grow_with_the_process() {
    let root = tempfile::tempdir().expect("temporary folder");
    endless::two_nodes(root.path()).expect("files");
    let plan = |gib: usize, gap: usize, aged: bool| {
        let kernel = Arc::new(Endless::new(gib, gap));
        let movement = ProcessMove::new(Selection::new().pid(1), Destination::node(NodeId::new(1)))
            .kernel(kernel.clone())
            .machine(Machine::read_from(root.path()).expect("a whole machine"))
            .workers(1);
        let movement = if aged { movement.min_age(Duration::from_millis(1)) } else { movement };
        let report = movement.run().expect("valid");
        assert_eq!(report.bytes_moved(), kernel.present());
        let rate = report.rate() / (1u64 << 30) as f64;
        let how = if aged { ", of a minimum age" } else { "" };
        eprintln!("{gib} GiB with a gap every {gap} pages{how}: {rate:.0} GiB/s");
        resident_bytes()
    };
    let Some(small) = plan(1, 0, false) else {
        eprintln!("skipped: the kernel does not tell how much memory is resident");
        return;
    };
    plan(1, 3, false);
    plan(1, 0, true);
    for (gib, gap, aged) in [(128, 0, false), (16, 3, false), (32, 0, true)] {
        let large = plan(gib, gap, aged).expect("told before");
        let grown = large.saturating_sub(small);
        assert!(grown < 16 << 20, "{grown} bytes more for {gib} GiB than for 1");
    }
}
