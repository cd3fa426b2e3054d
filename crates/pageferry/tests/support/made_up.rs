//! Moves of made-up processes on made-up machines.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use pageferry::Outcome;
use pageferry::process::{Destination, ProcessMove, ProcessReport, Selection};
use pageferry::topology::{Machine, NodeId};
use pageferry_sys::page_size;
use pageferry_sys::process::ProcessKernel;
use pageferry_sys::process::fake::{FakeKernel, FakeProcess, FakeVma};
use std::sync::Arc;

pub const PID: u32 = 100;
pub const BASE: usize = 0x10_0000_0000;
pub const PLENTY: u64 = 1 << 40;

pub fn node(number: u32) -> NodeId {
    NodeId::new(number)
}

/// A machine with so many nodes, each with a CPU and 64 GiB.
pub fn machine(nodes: u32) -> Machine {
    let root = tempfile::tempdir().expect("temporary folder");
    let write = |path: String, text: String| {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().expect("has one")).expect("folder");
        std::fs::write(path, text).expect("file");
    };
    let list = |n: u32| if n == 1 { "0".to_owned() } else { format!("0-{}", n - 1) };
    let sys = "sys/devices/system";
    write(format!("{sys}/node/online"), list(nodes));
    write(format!("{sys}/node/possible"), list(nodes));
    write(format!("{sys}/cpu/online"), list(nodes));
    write(format!("{sys}/cpu/possible"), list(nodes));
    write(format!("{sys}/cpu/present"), list(nodes));
    write("sys/kernel/mm/transparent_hugepage/hpage_pmd_size".into(), "2097152".into());
    for n in 0..nodes {
        let at = format!("{sys}/node/node{n}");
        let lines = format!("Node {n} MemTotal: 67108864 kB\nNode {n} MemFree: 67108864 kB\n");
        write(format!("{at}/meminfo"), lines);
        write(format!("{at}/cpulist"), n.to_string());
        let distances: Vec<_> = (0..nodes).map(|m| if m == n { "10" } else { "20" }).collect();
        write(format!("{at}/distance"), distances.join(" "));
    }
    Machine::read_from(root.path()).expect("a whole machine")
}

/// A move of the one process.
pub fn to_node(kernel: &FakeKernel, to: u32) -> ProcessMove {
    to_destination(kernel, Destination::node(node(to)))
}

pub fn to_destination(kernel: &FakeKernel, to: Destination) -> ProcessMove {
    of(kernel, Selection::new().pid(PID), to)
}

/// A move on a machine with as many nodes as the kernel has.
pub fn of(kernel: &FakeKernel, selection: Selection, to: Destination) -> ProcessMove {
    let nodes = u32::try_from((0..).take_while(|n| kernel.node_free(*n).is_ok()).count());
    ProcessMove::new(selection, to)
        .kernel(Arc::new(kernel.clone()))
        .machine(machine(nodes.expect("few")))
        .workers(1)
}

pub fn kernel_with(nodes: usize, vmas: Vec<FakeVma>) -> FakeKernel {
    let kernel = FakeKernel::new(&vec![PLENTY; nodes]);
    kernel.add(FakeProcess::new(PID, vmas));
    kernel
}

pub fn bytes(report: &ProcessReport, outcome: Outcome) -> u64 {
    report.bytes(|o| o == outcome)
}

pub fn pages(count: usize) -> u64 {
    (count * page_size()) as u64
}
