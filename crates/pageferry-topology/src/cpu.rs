//! CPUs: where each sits, and which caches it shares with whom.
//!
//! From `sys/devices/system/cpu/cpu<N>/{topology,cache}`
//! (Documentation/ABI/stable/sysfs-devices-system-cpu). Virtual machines and
//! some Arm boards publish no caches, and -1 for a package nobody described;
//! drivers/base/cacheinfo.c hides each attribute of a cache that has no value,
//! other kernels print it empty, 0 or `Unknown`. All are left out, not guessed.
//!
//! A CPU goes through being online without its caches, and its place in other
//! CPUs' sets, when it comes and goes: sets hold online CPUs alone, and a CPU's
//! own sets that CPU.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::error::ReadError;
use crate::ids::{CpuId, NodeId};
use crate::list::CpuList;
use crate::tree::Tree;

const CPUS: &str = "sys/devices/system/cpu";

/// An online logical CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Cpu {
    /// Its number.
    pub id: CpuId,
    /// The node it belongs to; `None` for a CPU that no node lists. Where nodes are emulated
    /// (`numa=fake`) several may list a CPU ([`Node::cpus`](crate::Node::cpus)), and this is the
    /// lowest of them, from which the kernel serves the CPU's own allocations
    /// (mm/numa_emulation.c).
    pub node: Option<NodeId>,
    /// The physical package (socket), where the firmware tells.
    pub package: Option<u32>,
    /// The core's number; unique only within a package, and not dense.
    pub core: Option<u32>,
    /// The CPUs of the same core, this one included.
    pub siblings: CpuList,
    /// Its caches, from the innermost level outwards. A cache of which the firmware does not tell
    /// the level and the kind is left out.
    pub caches: Vec<Cache>,
}

/// A cache as one CPU sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Cache {
    /// 1 is the innermost.
    pub level: u32,
    /// What it holds.
    pub kind: CacheKind,
    /// Its size in bytes, where the firmware tells.
    pub size_bytes: Option<u64>,
    /// The CPUs that share it. For level 3 of an AMD processor this is the CCX. Empty where the
    /// firmware does not tell.
    pub shared_by: CpuList,
}

/// What a cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheKind {
    /// Data only.
    Data,
    /// Instructions only.
    Instruction,
    /// Both.
    Unified,
}

impl Cpu {
    /// The outermost cache that holds data, through which this CPU reaches memory.
    #[must_use]
    pub fn last_level_cache(&self) -> Option<&Cache> {
        self.caches
            .iter()
            .filter(|cache| cache.kind != CacheKind::Instruction)
            .max_by_key(|cache| cache.level)
    }
}

/// The CPUs that are online, ascending; `node_of` tells where each belongs.
pub(crate) fn read(
    tree: &Tree,
    online: &CpuList,
    node_of: &BTreeMap<CpuId, NodeId>,
) -> Result<Vec<Cpu>, ReadError> {
    online.iter().map(|id| read_one(tree, id, node_of.get(&id).copied(), online)).collect()
}

/// The set of online CPUs; never empty, since a CPU is reading it.
pub(crate) fn online(tree: &Tree) -> Result<CpuList, ReadError> {
    let path = format!("{CPUS}/online");
    let online = tree.list::<CpuId>(&path)?;
    if online.is_empty() {
        return Err(tree.malformed(&path, "", "expected at least one CPU".into()));
    }
    Ok(online)
}

fn read_one(
    tree: &Tree,
    id: CpuId,
    node: Option<NodeId>,
    online: &CpuList,
) -> Result<Cpu, ReadError> {
    let topology = format!("{CPUS}/cpu{id}/topology");
    let number = |file: &str| -> Result<Option<u32>, ReadError> {
        let value = tree.optional::<i64>(&format!("{topology}/{file}"), "a number")?;
        // -1: the firmware does not tell.
        Ok(value.and_then(|v| u32::try_from(v).ok()))
    };
    let set = |name: &str| {
        let mask = format!("{topology}/{name}");
        tree.optional_cpus(&format!("{mask}_list"), &mask)
    };
    // core_cpus is the newer name (5.3) of thread_siblings; both are kept.
    let siblings = match set("core_cpus")? {
        Some(cpus) => Some(cpus),
        None => set("thread_siblings")?,
    };
    Ok(Cpu {
        id,
        node,
        package: number("physical_package_id")?,
        core: number("core_id")?,
        siblings: with_itself(&siblings.unwrap_or_default(), id, online),
        caches: caches(tree, id, online)?,
    })
}

/// The online CPUs of a set that this online CPU published, and itself.
fn with_itself(published: &CpuList, id: CpuId, online: &CpuList) -> CpuList {
    published.intersection(online).iter().chain([id]).collect()
}

fn caches(tree: &Tree, id: CpuId, online: &CpuList) -> Result<Vec<Cache>, ReadError> {
    let directory = format!("{CPUS}/cpu{id}/cache");
    let mut caches = Vec::new();
    for index in tree.numbered(&directory, "index", "")? {
        let at = |file: &str| format!("{directory}/index{index}/{file}");
        let level = tree.optional::<u32>(&at("level"), "a cache level")?.filter(|&level| level > 0);
        let (Some(kind), Some(level)) = (kind(tree, &at("type"))?, level) else {
            continue;
        };
        let shared = tree.optional_cpus(&at("shared_cpu_list"), &at("shared_cpu_map"))?;
        caches.push(Cache {
            level,
            kind,
            size_bytes: size(tree, &at("size"))?,
            shared_by: shared.map_or_else(CpuList::new, |set| with_itself(&set, id, online)),
        });
    }
    caches.sort_by_key(|cache| cache.level);
    Ok(caches)
}

fn kind(tree: &Tree, path: &str) -> Result<Option<CacheKind>, ReadError> {
    let Some(text) = tree.optional_text(path)? else {
        return Ok(None);
    };
    match text.trim() {
        "Data" => Ok(Some(CacheKind::Data)),
        "Instruction" => Ok(Some(CacheKind::Instruction)),
        "Unified" => Ok(Some(CacheKind::Unified)),
        // x86 before 4.1, arch/x86/kernel/cpu/intel_cacheinfo.c.
        "Unknown" => Ok(None),
        _ => Err(tree.malformed(path, &text, "expected Data, Instruction or Unified".into())),
    }
}

/// `32768K`: drivers/base/cacheinfo.c prints KiB with a K. 0 means unknown.
fn size(tree: &Tree, path: &str) -> Result<Option<u64>, ReadError> {
    let Some(text) = tree.optional_text(path)? else {
        return Ok(None);
    };
    let bytes = text
        .trim()
        .strip_suffix('K')
        .and_then(|kib| kib.parse::<u64>().ok())
        .and_then(|kib| kib.checked_mul(1024));
    match bytes {
        Some(0) => Ok(None),
        Some(bytes) => Ok(Some(bytes)),
        None => Err(tree.malformed(path, &text, "expected a size like 32768K".into())),
    }
}
