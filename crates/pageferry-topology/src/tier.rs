//! Memory tiers: which nodes are equally fast, and where memory goes when it cools.
//!
//! The kernel (since 6.1) publishes its own tiers in
//! `sys/devices/virtual/memory_tiering/memory_tier<N>/nodelist`
//! (Documentation/ABI/testing/sysfs-kernel-mm-memory-tiers). Where that is
//! absent they are derived: nodes with CPUs first, then nodes without, by how
//! far they are from the nearest CPU. That guess is wrong for fast memory
//! without CPUs (HBM in flat mode), so [`TierSource`] says which it is.

use serde::Serialize;

use crate::error::ReadError;
use crate::ids::{NodeId, TierId};
use crate::list::NodeList;
use crate::node::Node;
use crate::tree::Tree;

const TIERS: &str = "sys/devices/virtual/memory_tiering";

/// The tier of a CPU's own DRAM: `MEMTIER_ADISTANCE_DRAM >> MEMTIER_CHUNK_BITS`
/// in include/linux/memory-tiers.h. Derived tiers count from here.
const DRAM_TIER: u32 = 4;

/// Nodes whose memory is about equally fast.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Tier {
    /// Its number; smaller is faster.
    pub id: TierId,
    /// Its nodes; never empty, and all with memory.
    pub nodes: NodeList,
}

/// Who says what the tiers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TierSource {
    /// The kernel publishes them.
    Kernel,
    /// Guessed from CPUs and distances.
    Derived,
}

/// The tiers, fastest first; between them every node that has memory, once.
pub(crate) fn read(tree: &Tree, nodes: &[Node]) -> Result<(Vec<Tier>, TierSource), ReadError> {
    let with_memory: NodeList =
        nodes.iter().filter(|node| node.has_memory()).map(|node| node.id).collect();
    let mut tiers: Vec<Tier> = Vec::new();
    let mut left = with_memory.clone();
    for id in tree.ids::<TierId>(TIERS, "memory_tier")? {
        let listed = tree.optional_list::<NodeId>(&format!("{TIERS}/memory_tier{id}/nodelist"))?;
        // A tier goes with its last node, perhaps since the directory was listed.
        let nodes = listed.unwrap_or_default().intersection(&left);
        left = left.difference(&nodes);
        if !nodes.is_empty() {
            tiers.push(Tier { id, nodes });
        }
    }
    if !tiers.is_empty() && left.is_empty() {
        return Ok((tiers, TierSource::Kernel));
    }
    // None published, or a node came online between the two readings.
    Ok((derive(nodes), TierSource::Derived))
}

fn derive(nodes: &[Node]) -> Vec<Tier> {
    let from_cpus = |target: &Node| {
        nodes
            .iter()
            .filter(|node| !node.is_cpuless())
            .filter_map(|node| node.distances.get(&target.id).copied())
            .min()
    };
    // 0 for a node with CPUs: whatever its distances say, it is the first tier.
    let rank = |node: &Node| {
        if node.is_cpuless() { from_cpus(node).unwrap_or(u32::MAX) } else { 0 }
    };
    let with_memory = || nodes.iter().filter(|node| node.has_memory());
    let mut ranks: Vec<u32> = with_memory().map(rank).collect();
    ranks.sort_unstable();
    ranks.dedup();
    ranks
        .into_iter()
        .zip(DRAM_TIER..)
        .map(|(this, id)| Tier {
            id: TierId::new(id),
            nodes: with_memory().filter(|node| rank(node) == this).map(|node| node.id).collect(),
        })
        .collect()
}
