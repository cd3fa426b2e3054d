//! A minimum age on this machine's kernel: of a process that uses half of its memory all the time
//! the other half moves. Takes `CONFIG_IDLE_PAGE_TRACKING`, root, and two nodes.

#[path = "support/child.rs"]
mod child;

use child::Child;
use pageferry::Outcome;
use pageferry::process::{Destination, Filter, ProcessError, ProcessMove, Selection};
use pageferry::topology::{Machine, NodeId};
use pageferry_sys::page_size;
use std::time::Duration;

/// Half of it has more pages than any TLB: only what is translated anew is seen to be used.
const BYTES: usize = 64 << 20;

/// A child that writes to the first half of its memory again and again.
fn half_busy() -> Child {
    Child::with_work(
        || child::anonymous(BYTES, false),
        |(start, len)| {
            child::touch((start, len / 2));
        },
    )
}

fn aged(child: &Child, to: NodeId) -> ProcessMove {
    let memory = Selection::new().pid(child.pid).filter(Filter::new().range(child.range()));
    ProcessMove::new(memory, Destination::node(to)).min_age(Duration::from_secs(1))
}

#[test]
fn of_a_process_that_uses_half_of_its_memory_the_other_half_moves() {
    let machine = Machine::read().expect("this machine");
    let nodes: Vec<NodeId> = machine.memory_nodes().map(|n| n.id).collect();
    let [first, second, ..] = nodes[..] else {
        return eprintln!("skipped: one node, so nothing would move");
    };
    let child = half_busy();
    let memory = Selection::new().pid(child.pid).filter(Filter::new().range(child.range()));
    ProcessMove::new(memory, Destination::node(first)).run().expect("our child");
    let report = match aged(&child, second).run() {
        Err(error @ (ProcessError::NoIdlePages(_) | ProcessError::IdlePagesDenied(_))) => {
            return eprintln!("skipped: {error}");
        }
        report => report.expect("our child"),
    };
    let bytes = |outcome| report.bytes(|o| o == outcome);
    let (young, moved) = (bytes(Outcome::Young), bytes(Outcome::Moved));
    assert_eq!(report.bytes_looked_at(), BYTES as u64, "{report:?}");
    assert!(report.is_complete(), "{report:?}");
    // Pages that were on their way into the kernel's lists could not be marked: a batch of each CPU.
    let slack = (64 * page_size() * machine.cpus().len()) as u64;
    assert!(young >= BYTES as u64 / 2 && young <= BYTES as u64 / 2 + slack, "{report:?}");
    assert_eq!(young + moved, BYTES as u64, "{report:?}");
}

#[test]
fn without_idle_information_a_real_kernel_is_not_asked_to_move_anything() {
    let machine = Machine::read().expect("this machine");
    let node = machine.memory_nodes().next().expect("a machine has memory").id;
    let child = half_busy();
    match aged(&child, node).run() {
        Ok(report) => {
            // On one node everything is there already.
            let moved = report.bytes(|o| o == Outcome::Moved);
            assert_eq!(report.bytes_looked_at(), BYTES as u64, "{report:?}");
            assert!(report.is_complete() && moved < BYTES as u64, "{report:?}");
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.starts_with("min_age: ") && text.contains("root"), "{text}");
        }
    }
}
