//! NUMA nodes: memory, CPUs, distances, and what the firmware says of their speed.
//!
//! From `sys/devices/system/node` (Documentation/ABI/stable/sysfs-devices-node).
//! A kernel built without CONFIG_NUMA has no such directory: then the machine is
//! one node, 0, with all the memory and all the CPUs. A directory that is there
//! and may not be read is an error: nothing else says how many nodes there are.
//!
//! A node is online a moment before it has its directory, and loses it a moment
//! after it went offline (`__try_online_node`, `try_offline_node` in
//! mm/memory_hotplug.c): without a directory it is not there. Older kernels
//! list offline CPUs of a node, too.

use std::collections::BTreeMap;
use std::io::ErrorKind;

use serde::Serialize;

use crate::error::ReadError;
use crate::ids::{NodeId, TierId};
use crate::list::{CpuList, NodeList};
use crate::tree::Tree;

const NODES: &str = "sys/devices/system/node";

/// Distance of a node to itself, by the ACPI SLIT (`LOCAL_DISTANCE` in
/// include/linux/topology.h). 255 in a SLIT means: cannot be reached.
pub(crate) const LOCAL_DISTANCE: u32 = 10;

/// An online NUMA node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// Memory that the kernel manages on it, in bytes.
    pub memory_bytes: u64,
    /// Of that, free at the time of reading, in bytes; caches are not counted as free.
    pub free_bytes: u64,
    /// Its online CPUs; empty for memory behind CXL, on a GPU, and the like. Where nodes are
    /// emulated (`numa=fake`) a CPU belongs to several.
    pub cpus: CpuList,
    /// Distance from this node to every online node, in the firmware's relative
    /// units: 10 is local, 20 twice as far, 255 out of reach. Emulated nodes of one real node
    /// are at 10 from each other, too.
    pub distances: BTreeMap<NodeId, u32>,
    /// The tier of its memory; `None` if it has none.
    pub tier: Option<TierId>,
    /// What the firmware (ACPI HMAT or CXL CDAT) says of reaching it, if anything.
    pub access: Option<Access>,
}

/// What the firmware says of reaching a node's memory from its best initiators; at least one
/// value is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Access {
    /// The nodes from which these values hold.
    pub initiators: NodeList,
    /// MiB per second.
    pub read_mib_per_s: Option<u64>,
    /// MiB per second.
    pub write_mib_per_s: Option<u64>,
    /// Nanoseconds.
    pub read_latency_ns: Option<u64>,
    /// Nanoseconds.
    pub write_latency_ns: Option<u64>,
}

impl Node {
    /// Whether pages can live here.
    #[must_use]
    pub fn has_memory(&self) -> bool {
        self.memory_bytes > 0
    }

    /// Whether it has no CPUs.
    #[must_use]
    pub fn is_cpuless(&self) -> bool {
        self.cpus.is_empty()
    }
}

/// The numbers of the online nodes, never none; `None` for a kernel without NUMA.
pub(crate) fn online(tree: &Tree) -> Result<Option<NodeList>, ReadError> {
    let path = format!("{NODES}/online");
    let online = match tree.list::<NodeId>(&path) {
        Err(ReadError::Io { source, .. })
            if source.kind() == ErrorKind::NotFound && !tree.is_there(NODES) =>
        {
            return Ok(None);
        }
        other => other?,
    };
    if online.is_empty() {
        return Err(tree.malformed(&path, "", "expected at least one node".into()));
    }
    Ok(Some(online))
}

/// The online nodes, ascending, without their tiers; and the offline ones.
pub(crate) fn read(
    tree: &Tree,
    online: Option<&NodeList>,
    cpus: &CpuList,
) -> Result<(Vec<Node>, NodeList), ReadError> {
    let Some(online) = online else {
        return Ok((vec![whole_machine(tree, cpus)?], NodeList::new()));
    };
    let mut nodes = Vec::new();
    let mut gone = None;
    for id in online.iter() {
        let directory = format!("{NODES}/node{id}");
        match read_one(tree, &directory, id, online, cpus) {
            Ok(node) => nodes.push(node),
            Err(error) if !tree.is_there(&directory) => gone = gone.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    if let (true, Some(error)) = (nodes.is_empty(), gone) {
        return Err(error);
    }
    let there: NodeList = nodes.iter().map(|node| node.id).collect();
    for node in &mut nodes {
        node.distances.retain(|&id, _| there.contains(id));
        if let Some(access) = &mut node.access {
            access.initiators = access.initiators.intersection(&there);
        }
    }
    let possible = tree.optional_list::<NodeId>(&format!("{NODES}/possible"))?;
    Ok((nodes, possible.unwrap_or_default().difference(&there)))
}

fn whole_machine(tree: &Tree, cpus: &CpuList) -> Result<Node, ReadError> {
    let id = NodeId::new(0);
    let path = "proc/meminfo";
    let text = tree.text(path)?;
    Ok(Node {
        id,
        memory_bytes: meminfo(tree, path, &text, "MemTotal")?,
        free_bytes: meminfo(tree, path, &text, "MemFree")?,
        cpus: cpus.clone(),
        distances: BTreeMap::from([(id, LOCAL_DISTANCE)]),
        tier: None,
        access: None,
    })
}

fn read_one(
    tree: &Tree,
    directory: &str,
    id: NodeId,
    online: &NodeList,
    cpus: &CpuList,
) -> Result<Node, ReadError> {
    let meminfo_path = format!("{directory}/meminfo");
    let text = tree.text(&meminfo_path)?;
    let own = tree.cpus(&format!("{directory}/cpulist"), &format!("{directory}/cpumap"))?;
    Ok(Node {
        id,
        memory_bytes: meminfo(tree, &meminfo_path, &text, "MemTotal")?,
        free_bytes: meminfo(tree, &meminfo_path, &text, "MemFree")?,
        cpus: own.intersection(cpus),
        distances: distances(tree, &format!("{directory}/distance"), online)?,
        tier: None,
        access: access(tree, directory)?,
    })
}

/// A line `MemTotal:  16384 kB`, in a node's file preceded by `Node 0`; in bytes.
/// The kernel's kB are KiB.
fn meminfo(tree: &Tree, path: &str, text: &str, key: &str) -> Result<u64, ReadError> {
    let found = text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let is_ours = words.any(|word| word.strip_suffix(':') == Some(key));
        is_ours.then(|| (line, words.next(), words.next()))
    });
    let Some((line, number, unit)) = found else {
        return Err(tree.malformed(path, text, format!("expected a line {key}")));
    };
    number
        .filter(|_| unit == Some("kB"))
        .and_then(|n| n.parse::<u64>().ok())
        .and_then(|kib| kib.checked_mul(1024))
        .ok_or_else(|| tree.malformed(path, line, format!("expected `{key}: <number> kB`")))
}

/// One value for each online node, in ascending order (`node_read_distance` in
/// drivers/base/node.c): the place in the line is not the node's number.
fn distances(
    tree: &Tree,
    path: &str,
    online: &NodeList,
) -> Result<BTreeMap<NodeId, u32>, ReadError> {
    let text = tree.text(path)?;
    let values: Result<Vec<u32>, _> = text.split_ascii_whitespace().map(str::parse).collect();
    match values {
        Ok(values) if values.len() == online.len() => Ok(online.iter().zip(values).collect()),
        _ => {
            let reason = format!("expected {} distances, one per online node", online.len());
            Err(tree.malformed(path, &text, reason))
        }
    }
}

/// Units and meaning: Documentation/admin-guide/mm/numaperf.rst. Class `access1`
/// counts CPUs as the only initiators, `access0` also devices that start memory
/// traffic themselves. Here CPUs copy, so `access1` comes first, unless it tells
/// nothing. 0 stands for what the firmware left out, marked invalid, or gave too
/// large (`hmat_normalize` in drivers/acpi/numa/hmat.c).
fn access(tree: &Tree, directory: &str) -> Result<Option<Access>, ReadError> {
    for class in ["access1", "access0"] {
        let at = |file: &str| format!("{directory}/{class}/initiators/{file}");
        let number = |file: &str| -> Result<Option<u64>, ReadError> {
            Ok(tree.optional::<u64>(&at(file), "a number")?.filter(|&value| value > 0))
        };
        let access = Access {
            initiators: tree.ids::<NodeId>(&at(""), "node")?.into_iter().collect(),
            read_mib_per_s: number("read_bandwidth")?,
            write_mib_per_s: number("write_bandwidth")?,
            read_latency_ns: number("read_latency")?,
            write_latency_ns: number("write_latency")?,
        };
        let bandwidths = [access.read_mib_per_s, access.write_mib_per_s];
        let latencies = [access.read_latency_ns, access.write_latency_ns];
        if bandwidths.iter().chain(&latencies).any(Option::is_some) {
            return Ok(Some(access));
        }
    }
    Ok(None)
}
