//! A machine as it is, and the tree that some kernel might write for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

pub(crate) type Set = BTreeSet<u32>;

const MOST_CPUS: usize = 10;
const MOST_NODES: usize = 6;
pub(crate) const SPEEDS: [&str; 4] =
    ["read_bandwidth", "write_bandwidth", "read_latency", "write_latency"];

/// How a set of CPUs is published.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Told {
    List,
    Mask,
    Both,
    EmptyListAndMask,
    EmptyList,
    Nothing,
}

impl Told {
    pub(crate) fn tells(self) -> bool {
        !matches!(self, Self::EmptyList | Self::Nothing)
    }
}

/// How a value is published.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Shown {
    Value,
    Zero,
    Empty,
    Absent,
}

#[derive(Debug, Clone)]
pub(crate) struct Cache {
    pub(crate) level: (u32, Shown),
    pub(crate) kind: (&'static str, Shown),
    pub(crate) kib: (u64, Shown),
    /// How many CPUs, in the order of their numbers, share it.
    pub(crate) shared_by: usize,
    pub(crate) sharing: Told,
}

#[derive(Debug, Clone)]
pub(crate) struct Cpu {
    pub(crate) is_online: bool,
    pub(crate) package: (u32, Shown),
    pub(crate) core: (u32, Shown),
    pub(crate) core_cpus: Told,
    pub(crate) thread_siblings: Told,
    /// The first is `index0`; `None` is a number that is left out.
    pub(crate) caches: Vec<Option<Cache>>,
}

/// What the firmware says of reaching a node, with the nodes by a bit each.
#[derive(Debug, Clone)]
pub(crate) struct Class {
    pub(crate) speeds: Vec<Option<u64>>,
    pub(crate) initiators: u8,
}

#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) memory_kib: u64,
    pub(crate) free_kib: u64,
    /// By a bit each, offline ones too, and those of other nodes.
    pub(crate) cpus: u16,
    pub(crate) told: Told,
    pub(crate) has_directory: bool,
    pub(crate) distances: Vec<u32>,
    pub(crate) classes: [Option<Class>; 2],
}

#[derive(Debug, Clone)]
pub(crate) struct Model {
    pub(crate) cpus: BTreeMap<u32, Cpu>,
    /// Empty for a kernel without NUMA.
    pub(crate) nodes: BTreeMap<u32, Node>,
    pub(crate) offline_nodes: Set,
    pub(crate) tells_possible: bool,
    pub(crate) threads_per_core: usize,
    /// Nodes by a bit each.
    pub(crate) tiers: BTreeMap<u32, u8>,
    pub(crate) thp: Option<&'static str>,
}

fn shown() -> impl Strategy<Value = Shown> {
    prop_oneof![
        6 => Just(Shown::Value),
        1 => Just(Shown::Zero),
        1 => Just(Shown::Empty),
        1 => Just(Shown::Absent),
    ]
}

fn told() -> impl Strategy<Value = Told> {
    let rest = [Told::Mask, Told::Both, Told::EmptyListAndMask, Told::EmptyList, Told::Nothing];
    prop_oneof![Just(Told::List), select(rest.to_vec())]
}

fn cache() -> impl Strategy<Value = Cache> {
    let kind = select(&["Data", "Instruction", "Unified"][..]);
    ((1..=4u32, shown()), (kind, shown()), (1..1u64 << 20, shown()), 1..=MOST_CPUS, told())
        .prop_map(|(level, kind, kib, shared_by, sharing)| Cache {
            level,
            kind,
            kib,
            shared_by,
            sharing,
        })
}

fn cpu() -> impl Strategy<Value = Cpu> {
    let caches = vec(option::weighted(0.9, cache()), 0..4);
    let is_online = prop::bool::weighted(0.8);
    (is_online, (0..4u32, shown()), (0..99u32, shown()), told(), told(), caches).prop_map(
        |(is_online, package, core, core_cpus, thread_siblings, caches)| Cpu {
            is_online,
            package,
            core,
            core_cpus,
            thread_siblings,
            caches,
        },
    )
}

fn class() -> impl Strategy<Value = Class> {
    let speed = prop_oneof![Just(None), Just(Some(0)), (1..1_000_000u64).prop_map(Some)];
    (vec(speed, SPEEDS.len()), any::<u8>())
        .prop_map(|(speeds, initiators)| Class { speeds, initiators })
}

fn node() -> impl Strategy<Value = Node> {
    let memory = prop_oneof![1 => Just(0), 3 => 1..1u64 << 40];
    let cpus = prop_oneof![1 => Just(0), 3 => any::<u16>()];
    let told = select(&[Told::List, Told::Mask, Told::Both, Told::EmptyListAndMask][..]);
    let classes = [option::of(class()), option::of(class())];
    let has_directory = prop::bool::weighted(0.9);
    (memory, any::<u32>(), cpus, told, has_directory, vec(10..=255u32, MOST_NODES), classes)
        .prop_map(|(memory_kib, free, cpus, told, has_directory, distances, classes)| Node {
            memory_kib,
            free_kib: memory_kib.min(free.into()),
            cpus,
            told,
            has_directory,
            distances,
            classes,
        })
}

pub(crate) fn model() -> impl Strategy<Value = Model> {
    let cpus = btree_map(0..300u32, cpu(), 1..=MOST_CPUS);
    let nodes =
        prop_oneof![9 => btree_map(0..99u32, node(), 1..=MOST_NODES), 1 => Just(BTreeMap::new())];
    let thp = select(&[None, Some(""), Some("0"), Some("1048576"), Some("2097152")][..]);
    let tiers = btree_map(0..300u32, any::<u8>(), 0..4);
    (cpus, nodes, btree_set(0..99u32, 0..3), any::<bool>(), 1..=4usize, tiers, thp).prop_map(
        |(mut cpus, mut nodes, mut offline, tells_possible, threads_per_core, tiers, thp)| {
            offline.retain(|id| !nodes.contains_key(id));
            // A CPU and a node read the tree.
            if let Some(first) = cpus.values_mut().next() {
                first.is_online = true;
            }
            if let Some(first) = nodes.values_mut().next() {
                first.has_directory = true;
            }
            let offline_nodes = if nodes.is_empty() { Set::new() } else { offline };
            Model { cpus, nodes, offline_nodes, tells_possible, threads_per_core, tiers, thp }
        },
    )
}

impl Model {
    pub(crate) fn online_cpus(&self) -> Set {
        self.cpus.iter().filter(|(_, cpu)| cpu.is_online).map(|(&id, _)| id).collect()
    }

    /// The CPUs, online or not, that are in the same group of so many as this one.
    pub(crate) fn beside(&self, id: u32, group: usize) -> Set {
        let place = self.cpus.keys().position(|&cpu| cpu == id).expect("a CPU of the model");
        self.cpus.keys().skip(place / group * group).take(group).copied().collect()
    }

    pub(crate) fn cpus_of(&self, node: &Node) -> Set {
        self.cpus
            .keys()
            .zip(0..)
            .filter(|(_, bit)| node.cpus >> bit & 1 == 1)
            .map(|p| *p.0)
            .collect()
    }

    pub(crate) fn nodes_of(&self, bits: u8) -> Set {
        self.nodes.keys().zip(0..).filter(|(_, bit)| bits >> bit & 1 == 1).map(|p| *p.0).collect()
    }

    /// Writes the tree.
    pub(crate) fn write(&self, root: &Path) {
        let cpus = "sys/devices/system/cpu";
        write(root, &format!("{cpus}/online"), &list(&self.online_cpus()));
        for (&id, cpu) in &self.cpus {
            self.write_cpu(&root.join(format!("{cpus}/cpu{id}")), id, cpu);
        }
        for (id, bits) in &self.tiers {
            let path = format!("sys/devices/virtual/memory_tiering/memory_tier{id}/nodelist");
            write(root, &path, &list(&self.nodes_of(*bits)));
        }
        if let Some(thp) = self.thp {
            write(root, "sys/kernel/mm/transparent_hugepage/hpage_pmd_size", thp);
        }
        if self.nodes.is_empty() {
            write(root, "proc/meminfo", "MemTotal:  4096 kB\nMemFree:  1024 kB");
            return;
        }
        let nodes = root.join("sys/devices/system/node");
        let online: Set = self.nodes.keys().copied().collect();
        write(&nodes, "online", &list(&online));
        if self.tells_possible {
            write(&nodes, "possible", &list(&(&online | &self.offline_nodes)));
        }
        for (id, node) in self.nodes.iter().filter(|(_, node)| node.has_directory) {
            self.write_node(&nodes.join(format!("node{id}")), *id, node);
        }
    }

    fn write_cpu(&self, directory: &Path, id: u32, cpu: &Cpu) {
        fs::create_dir_all(directory).expect("a directory");
        let topology = directory.join("topology");
        let siblings = self.beside(id, self.threads_per_core);
        write_set(&topology, ("core_cpus_list", "core_cpus"), &siblings, cpu.core_cpus);
        let threads = ("thread_siblings_list", "thread_siblings");
        write_set(&topology, threads, &siblings, cpu.thread_siblings);
        // Not told is -1 here.
        write_value(&topology, "physical_package_id", cpu.package, &cpu.package.0, "-1");
        write_value(&topology, "core_id", cpu.core, &cpu.core.0, "-1");
        for (index, cache) in cpu.caches.iter().enumerate() {
            let Some(cache) = cache else { continue };
            let at = directory.join(format!("cache/index{index}"));
            write_value(&at, "type", cache.kind, &cache.kind.0, "Unknown");
            write_value(&at, "level", cache.level, &cache.level.0, "0");
            write_value(&at, "size", cache.kib, &format!("{}K", cache.kib.0), "0K");
            let shared_by = self.beside(id, cache.shared_by);
            write_set(&at, ("shared_cpu_list", "shared_cpu_map"), &shared_by, cache.sharing);
        }
    }

    fn write_node(&self, directory: &Path, id: u32, node: &Node) {
        write_set(directory, ("cpulist", "cpumap"), &self.cpus_of(node), node.told);
        let distances: Vec<String> =
            node.distances.iter().take(self.nodes.len()).map(u32::to_string).collect();
        write(directory, "distance", &distances.join(" "));
        let (total, free) = (node.memory_kib, node.free_kib);
        let meminfo = format!("Node {id} MemTotal: {total:8} kB\nNode {id} MemFree: {free:8} kB");
        write(directory, "meminfo", &meminfo);
        for (number, class) in node.classes.iter().enumerate() {
            let Some(class) = class else { continue };
            let at = directory.join(format!("access{number}/initiators"));
            for (name, speed) in SPEEDS.iter().zip(&class.speeds) {
                if let Some(speed) = speed {
                    write(&at, name, &speed.to_string());
                }
            }
            for initiator in self.nodes_of(class.initiators) {
                fs::create_dir_all(at.join(format!("node{initiator}"))).expect("a directory");
            }
        }
    }
}

fn write(root: &Path, path: &str, content: &str) {
    let file = root.join(path);
    fs::create_dir_all(file.parent().expect("a parent")).expect("a directory");
    fs::write(file, format!("{content}\n")).expect("a file");
}

fn write_value<T>(at: &Path, name: &str, (_, shown): (T, Shown), value: &dyn ToString, zero: &str) {
    match shown {
        Shown::Value => write(at, name, &value.to_string()),
        Shown::Zero => write(at, name, zero),
        Shown::Empty => write(at, name, ""),
        Shown::Absent => {}
    }
}

fn write_set(at: &Path, (list_name, mask_name): (&str, &str), set: &Set, told: Told) {
    match told {
        Told::List | Told::Both => write(at, list_name, &list(set)),
        Told::EmptyList | Told::EmptyListAndMask => write(at, list_name, ""),
        Told::Mask | Told::Nothing => {}
    }
    if matches!(told, Told::Mask | Told::Both | Told::EmptyListAndMask) {
        write(at, mask_name, &mask(set));
    }
}

/// The kernel's list format, without ranges: they have tests of their own.
pub(crate) fn list(set: &Set) -> String {
    set.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// The kernel's mask format for 320 CPUs.
fn mask(set: &Set) -> String {
    let word =
        |n: u32| set.iter().filter(|&id| id / 32 == n).fold(0u32, |w, id| w | 1 << (id % 32));
    (0..10).rev().map(|n| format!("{:08x}", word(n))).collect::<Vec<_>>().join(",")
}
