//! How fast the planner of the kernel path is by itself: it plans, asks for nodes and accounts for
//! every base page of a made-up process, behind a kernel that answers at once.
//!
//! `cargo run --release -p pageferry --example plan_rate [GIB] [GAP]`: a process of `GIB` GiB
//! (default 1024), in which every `GAP`-th page is missing (default 0: none).

#[path = "../tests/support/endless.rs"]
mod endless;

use endless::Endless;
use pageferry::process::{Destination, ProcessMove, Selection};
use pageferry::topology::{Machine, NodeId};
use pageferry_sys::usage::resident_bytes;
use std::io::Write;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut numbers = std::env::args().skip(1).map(|a| a.parse::<usize>());
    let gib = numbers.next().transpose()?.unwrap_or(1024);
    let gap = numbers.next().transpose()?.unwrap_or(0);
    let root = tempfile::tempdir()?;
    endless::two_nodes(root.path())?;
    let kernel = Arc::new(Endless::new(gib, gap));
    let before = resident_bytes().unwrap_or(0);
    let report = ProcessMove::new(Selection::new().pid(1), Destination::node(NodeId::new(1)))
        .kernel(kernel.clone())
        .machine(Machine::read_from(root.path())?)
        .workers(1)
        .run()?;
    let after = resident_bytes().unwrap_or(0);
    let (bytes, seconds) = (report.bytes_moved(), report.elapsed.as_secs_f64());
    assert_eq!(bytes, kernel.present(), "every page must be planned");
    let gib_per_s = bytes as f64 / seconds / (1u64 << 30) as f64;
    let mib = after.saturating_sub(before) as f64 / (1u64 << 20) as f64;
    let ns = seconds * 1e9 / (bytes / 4096) as f64;
    writeln!(
        std::io::stdout(),
        "{gib} GiB of base pages planned in {seconds:.2} s: {gib_per_s:.0} GiB/s, {ns:.1} ns a \
         page; {mib:.1} MiB of memory"
    )?;
    Ok(())
}
