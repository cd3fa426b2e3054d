//! The whole machine, and the questions that moving memory asks of it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::cpu::{self, Cpu};
use crate::error::{NodeError, ReadError};
use crate::ids::{CpuId, NodeId, TierId};
use crate::list::{CpuList, NodeList};
use crate::model;
use crate::node::{self, Node};
use crate::pages::{self, PageSizes};
use crate::tier::{self, Tier, TierSource};
use crate::tree::Tree;

/// How often a machine is read whose nodes or CPUs come and go meanwhile. A reading takes
/// milliseconds; bringing a CPU or a node on line or off takes at least as long.
const READINGS: usize = 5;

/// A snapshot of a machine's nodes, CPUs, tiers and page sizes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    cpu_model: Option<String>,
    pages: PageSizes,
    nodes: Vec<Node>,
    offline_nodes: NodeList,
    tier_source: TierSource,
    tiers: Vec<Tier>,
    cpus: Vec<Cpu>,
}

impl Machine {
    /// Reads the machine this program runs on.
    ///
    /// # Errors
    /// [`ReadError`] if `/sys` or `/proc` cannot be read or makes no sense.
    pub fn read() -> Result<Self, ReadError> {
        Self::read_from(Path::new("/"))
    }

    /// Reads a machine from a tree that holds its `sys/` and `proc/`.
    ///
    /// # Errors
    /// [`ReadError`] names the file that is missing, unreadable or malformed.
    pub fn read_from(root: &Path) -> Result<Self, ReadError> {
        let tree = Tree::new(root);
        let mut online = online(&tree)?;
        for _ in 1..READINGS {
            let machine = Self::read_once(&tree, &online);
            let now = self::online(&tree)?;
            if now == online {
                return machine;
            }
            online = now;
        }
        Self::read_once(&tree, &online)
    }

    fn read_once(tree: &Tree, online: &(Option<NodeList>, CpuList)) -> Result<Self, ReadError> {
        let (online_nodes, online_cpus) = online;
        let (mut nodes, offline_nodes) = node::read(tree, online_nodes.as_ref(), online_cpus)?;
        // The lowest node of a CPU last, so that it stays.
        let by_cpu = nodes.iter().rev().flat_map(|n| n.cpus.iter().map(|cpu| (cpu, n.id)));
        let node_of: BTreeMap<CpuId, NodeId> = by_cpu.collect();
        let (tiers, tier_source) = tier::read(tree, &nodes)?;
        for node in &mut nodes {
            let tier = tiers.iter().find(|tier| tier.nodes.contains(node.id));
            node.tier = tier.map(|tier| tier.id);
        }
        Ok(Self {
            cpu_model: model::read(tree)?,
            pages: pages::read(tree)?,
            nodes,
            offline_nodes,
            tier_source,
            tiers,
            cpus: cpu::read(tree, online_cpus, &node_of)?,
        })
    }

    /// The CPU's name from `/proc/cpuinfo`; where that has none, what identifies it: on Arm the
    /// part number, on s390 the machine type, on RISC-V the base instruction set.
    #[must_use]
    pub fn cpu_model(&self) -> Option<&str> {
        self.cpu_model.as_deref()
    }

    /// Page sizes.
    #[must_use]
    pub fn pages(&self) -> &PageSizes {
        &self.pages
    }

    /// The online nodes, ascending; some may have no memory, some no CPUs.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The online nodes that have memory, ascending.
    pub fn memory_nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.has_memory())
    }

    /// Numbers that the kernel keeps for nodes that are not online.
    #[must_use]
    pub fn offline_nodes(&self) -> &NodeList {
        &self.offline_nodes
    }

    /// The online CPUs, ascending.
    #[must_use]
    pub fn cpus(&self) -> &[Cpu] {
        &self.cpus
    }

    /// The tiers, fastest first.
    #[must_use]
    pub fn tiers(&self) -> &[Tier] {
        &self.tiers
    }

    /// Whether the kernel says what the tiers are, or they are derived.
    #[must_use]
    pub fn tier_source(&self) -> TierSource {
        self.tier_source
    }

    /// An online node.
    ///
    /// # Errors
    /// [`NodeError::Unknown`] or [`NodeError::Offline`].
    pub fn node(&self, id: NodeId) -> Result<&Node, NodeError> {
        if let Some(node) = self.nodes.iter().find(|node| node.id == id) {
            return Ok(node);
        }
        let online = self.nodes.iter().map(|node| node.id).collect();
        Err(if self.offline_nodes.contains(id) {
            NodeError::Offline { node: id, online }
        } else {
            NodeError::Unknown { node: id, online }
        })
    }

    /// An online node that pages can be moved to.
    ///
    /// # Errors
    /// [`NodeError::Unknown`], [`NodeError::Offline`] or [`NodeError::NoMemory`].
    pub fn memory_node(&self, id: NodeId) -> Result<&Node, NodeError> {
        let node = self.node(id)?;
        if node.has_memory() {
            return Ok(node);
        }
        Err(NodeError::NoMemory {
            node: id,
            with_memory: self.memory_nodes().map(|node| node.id).collect(),
        })
    }

    /// An online CPU.
    #[must_use]
    pub fn cpu(&self, id: CpuId) -> Option<&Cpu> {
        self.cpus.iter().find(|cpu| cpu.id == id)
    }

    /// How far `to` is from `from`, in the firmware's relative units (10 is
    /// local, 255 out of reach).
    ///
    /// # Errors
    /// [`NodeError`] if either is not an online node.
    pub fn distance(&self, from: NodeId, to: NodeId) -> Result<u32, NodeError> {
        self.node(to)?;
        let from = self.node(from)?;
        // Every node has a distance to every online node; see the crate's invariants.
        Ok(from.distances.get(&to).copied().unwrap_or(u32::MAX))
    }

    /// Where memory of this node goes when it cools: the nearest nodes of the
    /// next slower tier, all that are equally near, as in the kernel's
    /// `establish_demotion_targets` (mm/memory-tiers.c). Empty in the last tier.
    ///
    /// # Errors
    /// [`NodeError`] if `id` is not an online node with memory.
    pub fn demotion_targets(&self, id: NodeId) -> Result<NodeList, NodeError> {
        let node = self.memory_node(id)?;
        let slower = self.tiers.iter().find(|tier| node.tier.is_some_and(|own| tier.id > own));
        let Some(slower) = slower else {
            return Ok(NodeList::new());
        };
        Ok(nearest(slower.nodes.iter(), |target| node.distances.get(&target).copied()))
    }

    /// The CPUs that reach this node's memory best: its own, or, for a node
    /// without CPUs, those of the node, or the equally near nodes, with the
    /// smallest distance to it. Never empty.
    ///
    /// # Errors
    /// [`NodeError`] if `id` is not an online node.
    pub fn nearest_cpus(&self, id: NodeId) -> Result<CpuList, NodeError> {
        let node = self.node(id)?;
        if !node.is_cpuless() {
            return Ok(node.cpus.clone());
        }
        let candidates = self.nodes.iter().filter(|node| !node.is_cpuless());
        let chosen = nearest(candidates.map(|node| node.id), |from| self.distance(from, id).ok());
        if chosen.is_empty() {
            return Ok(self.cpus.iter().map(|cpu| cpu.id).collect());
        }
        let nodes = self.nodes.iter().filter(|node| chosen.contains(node.id));
        Ok(nodes.flat_map(|node| node.cpus.iter()).collect())
    }

    /// The sets of CPUs that share a last-level cache (on AMD processors a
    /// CCX), by their first CPU; each CPU is in exactly one. CPUs whose caches, or the sharing
    /// of their caches, are not published are taken together by package, where that is known.
    #[must_use]
    pub fn cache_groups(&self) -> Vec<CpuList> {
        let sharing = |cpu: &Cpu| {
            let cpus = cpu.last_level_cache().map(|cache| cache.shared_by.clone())?;
            (!cpus.is_empty()).then_some(cpus)
        };
        let mut left: CpuList = self.cpus.iter().map(|cpu| cpu.id).collect();
        let mut groups = Vec::new();
        for cpu in &self.cpus {
            if !left.contains(cpu.id) {
                continue;
            }
            let sharing = match sharing(cpu) {
                Some(cpus) => cpus,
                None => {
                    let alike =
                        |other: &&Cpu| sharing(other).is_none() && other.package == cpu.package;
                    self.cpus.iter().filter(alike).map(|other| other.id).collect()
                }
            };
            let group = sharing.intersection(&left);
            left = left.difference(&group);
            groups.push(group);
        }
        groups
    }

    /// The tier with this number.
    #[must_use]
    pub fn tier(&self, id: TierId) -> Option<&Tier> {
        self.tiers.iter().find(|tier| tier.id == id)
    }
}

/// Those of `nodes` that have the smallest distance.
fn nearest(
    nodes: impl Iterator<Item = NodeId>,
    distance: impl Fn(NodeId) -> Option<u32>,
) -> NodeList {
    let known: Vec<(NodeId, u32)> = nodes.filter_map(|id| Some((id, distance(id)?))).collect();
    let best = known.iter().map(|&(_, distance)| distance).min();
    known.into_iter().filter(|&(_, distance)| Some(distance) == best).map(|(id, _)| id).collect()
}

/// What is online: nodes, where the kernel has NUMA, and CPUs. Both lists change before what they
/// name is torn down.
fn online(tree: &Tree) -> Result<(Option<NodeList>, CpuList), ReadError> {
    Ok((node::online(tree)?, cpu::online(tree)?))
}
