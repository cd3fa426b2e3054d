//! What the tests on several nodes share: the nodes, and memory that lies on one of them.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use crate::support::{fill, nodes_of, promised};
use pageferry::{Engine, Folios, Region};
use pageferry_sys::mm::PreferringNode;
use pageferry_sys::page_size;
use pageferry_topology::NodeId;
use std::ops::Range;
use std::sync::Arc;

/// All nodes with memory; prints why the test is skipped where there is only one.
pub fn several(engine: &Engine) -> Option<Vec<NodeId>> {
    let nodes: Vec<_> = engine.machine().memory_nodes().map(|n| n.id).collect();
    if nodes.len() < 2 {
        eprintln!("skipped: this machine has one node (`cargo xtask guest test` boots others)");
        return None;
    }
    Some(nodes)
}

/// A node as `move_pages(2)` gives it.
pub fn number(node: NodeId) -> i32 {
    i32::try_from(node.get()).expect("a small number")
}

/// Fills a part of a region from a thread that prefers `node`, and looks that it lies there.
pub fn fill_on(region: &Region, bytes: Range<usize>, node: NodeId) {
    {
        let _preferring = PreferringNode::new(node.get()).expect("a node with memory");
        fill(region, bytes.clone());
    }
    let pages = bytes.start / page_size()..bytes.end / page_size();
    let nodes = nodes_of(region);
    assert!(nodes[pages].iter().all(|&n| n == number(node)), "not placed on {node:?}: {nodes:?}");
}

/// A region without a policy of its own whose pages lie on `node`.
pub fn region_on(engine: &Engine, node: NodeId, bytes: usize, folios: Folios) -> Arc<Region> {
    let region = promised(engine.map(bytes).folios(folios)).build().expect("memory for the test");
    fill_on(&region, 0..bytes, node);
    Arc::new(region)
}

/// A counter of `/proc/vmstat`.
pub fn vmstat(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").expect("procfs");
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|number| number.parse().ok()).unwrap_or(0)
}
