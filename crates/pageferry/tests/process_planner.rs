//! The planner alone, behind a kernel that answers at once: how fast it is, for the reader, and
//! that its memory does not grow with the process.

#[path = "support/endless.rs"]
mod endless;

use endless::Endless;
use pageferry::process::{Destination, ProcessMove};
use pageferry::topology::{Machine, NodeId};
use pageferry_sys::usage::resident_bytes;
use std::sync::Arc;

#[test]
fn memory_does_not_grow_with_the_process() {
    let root = tempfile::tempdir().expect("temporary folder");
    endless::two_nodes(root.path()).expect("files");
    let plan = |gib: usize, gap: usize| {
        let kernel = Arc::new(Endless::new(gib, gap));
        let report = ProcessMove::new(Destination::node(NodeId::new(1)))
            .kernel(kernel.clone())
            .machine(Machine::read_from(root.path()).expect("a whole machine"))
            .workers(1)
            .pid(1)
            .run()
            .expect("valid");
        assert_eq!(report.bytes_moved(), kernel.present());
        let rate = report.rate() / (1u64 << 30) as f64;
        eprintln!("{gib} GiB with a gap every {gap} pages: {rate:.0} GiB/s");
        resident_bytes()
    };
    let Some(small) = plan(1, 0) else {
        eprintln!("skipped: the kernel does not tell how much memory is resident");
        return;
    };
    plan(1, 3);
    for (gib, gap) in [(128, 0), (16, 3)] {
        let large = plan(gib, gap).expect("told before");
        let grown = large.saturating_sub(small);
        assert!(grown < 16 << 20, "{grown} bytes more for {gib} GiB than for 1");
    }
}
