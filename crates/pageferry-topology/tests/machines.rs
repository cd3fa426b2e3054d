//! Machines as their kernels describe them, read from the trees in `tests/machines`.

use pageferry_topology::{CpuId, CpuList, Id, IdList, Machine, NodeError, NodeId, TierSource};

mod support;

fn machine(name: &str) -> Machine {
    let root = support::unpack(name);
    Machine::read_from(root.path()).expect("the fixture is readable")
}

fn node(number: u32) -> NodeId {
    NodeId::new(number)
}

fn cpus(text: &str) -> CpuList {
    text.parse().expect("a list")
}

fn list<I: Id>(ids: impl IntoIterator<Item = I>) -> String {
    ids.into_iter().collect::<IdList<I>>().to_string()
}

#[test]
fn every_fixture_keeps_the_invariants_of_a_machine() {
    for name in ["two-sockets", "epyc-nps4", "cxl", "gh200", "one-node", "no-numa"] {
        let machine = machine(name);
        assert!(!machine.nodes().is_empty() && !machine.cpus().is_empty(), "{name}");
        let tiered: usize = machine.tiers().iter().map(|tier| tier.nodes.len()).sum();
        assert_eq!(tiered, machine.memory_nodes().count(), "{name}");
        for a in machine.nodes() {
            assert_eq!(a.tier.is_some(), a.has_memory(), "{name}: node {}", a.id);
            assert!(!machine.nearest_cpus(a.id).expect("online").is_empty());
            for b in machine.nodes() {
                let distance = machine.distance(a.id, b.id).expect("both are online");
                assert_eq!(distance == 10, a.id == b.id, "{name}: {} to {}", a.id, b.id);
            }
        }
        for cpu in machine.cpus() {
            assert!(cpu.siblings.contains(cpu.id), "{name}: CPU {}", cpu.id);
            let owner = cpu.node.expect("every CPU has a node");
            let owner = machine.node(owner).expect("and it is online");
            assert!(owner.cpus.contains(cpu.id), "{name}: CPU {}", cpu.id);
        }
        let grouped: usize = machine.cache_groups().iter().map(CpuList::len).sum();
        assert_eq!(grouped, machine.cpus().len(), "{name}");
    }
}

#[test]
fn two_sockets_with_alternating_cpu_numbers() {
    let machine = machine("two-sockets");
    assert_eq!(list(machine.nodes().iter().map(|n| n.id)), "0-1");
    assert_eq!(machine.distance(node(0), node(1)), Ok(21));
    let first = machine.node(node(0)).expect("online");
    assert!(first.cpus.contains(CpuId::new(30)) && !first.cpus.contains(CpuId::new(31)));
    assert_eq!(first.memory_bytes, 97_533_200 * 1024);
    let cpu = machine.cpu(CpuId::new(17)).expect("online");
    assert_eq!((cpu.package, cpu.core), (Some(1), Some(0)));
    assert_eq!(cpu.siblings, cpus("1,17"));
    assert_eq!(machine.cache_groups().len(), 2);
    assert_eq!(machine.demotion_targets(node(0)), Ok(IdList::new()));
    assert_eq!(machine.pages().base_bytes, 4096);
    assert_eq!(machine.pages().thp_bytes, Some(2 << 20));
    assert_eq!(machine.pages().hugetlb_bytes, [2 << 20, 1 << 30]);
}

#[test]
fn a_ccx_rich_machine_has_a_cache_group_per_ccx() {
    let machine = machine("epyc-nps4");
    let groups = machine.cache_groups();
    assert_eq!(groups.len(), 16);
    assert_eq!(groups[1], cpus("8-15,136-143"));
    let cache = machine.cpus()[0].last_level_cache().expect("an L3");
    assert_eq!((cache.level, cache.size_bytes), (3, Some(32 << 20)));
    assert_eq!(machine.distance(node(0), node(3)), Ok(12));
    assert_eq!(machine.distance(node(0), node(4)), Ok(32));
}

#[test]
fn cxl_nodes_without_cpus_are_a_slower_tier_reached_from_their_socket() {
    let machine = machine("cxl");
    let expander = machine.memory_node(node(3)).expect("it has memory");
    assert!(expander.is_cpuless());
    assert_eq!(machine.tier_source(), TierSource::Kernel);
    assert_eq!(list(machine.demotion_targets(node(0)).expect("memory").iter()), "2");
    assert_eq!(list(machine.demotion_targets(node(1)).expect("memory").iter()), "3");
    assert_eq!(list(machine.demotion_targets(node(2)).expect("memory").iter()), "");
    assert_eq!(machine.nearest_cpus(node(3)), Ok(cpus("52-103,156-207")));
    let access = expander.access.as_ref().expect("the firmware tells");
    assert_eq!(access.initiators.to_string(), "1");
    assert_eq!(access.read_mib_per_s, Some(26_000));
    assert_eq!(access.write_latency_ns, Some(260));
}

#[test]
fn grace_with_gpu_nodes_has_memory_without_cpus_and_nodes_with_neither() {
    let machine = machine("gh200");
    assert_eq!(list(machine.memory_nodes().map(|n| n.id)), "0-1");
    assert_eq!(machine.nearest_cpus(node(1)), Ok(cpus("0-71")));
    assert_eq!(machine.distance(node(1), node(2)), Ok(255));
    assert_eq!(machine.pages().base_bytes, 64 << 10);
    assert_eq!(machine.pages().thp_bytes, Some(512 << 20));
    assert_eq!(machine.cpu_model(), Some("Arm implementer 0x41 part 0xd4f"));
    let error = machine.memory_node(node(5)).expect_err("it has no memory");
    assert!(matches!(error, NodeError::NoMemory { .. }));
    assert_eq!(error.to_string(), "node 5 has no memory: the node(s) with memory are 0-1");
}

#[test]
fn one_node_has_itself_alone() {
    let machine = machine("one-node");
    assert_eq!(machine.nodes().len(), 1);
    assert_eq!(machine.nearest_cpus(node(0)), Ok(cpus("0-1")));
    assert!(machine.offline_nodes().is_empty());
}

#[test]
fn a_kernel_without_numa_is_one_node_with_everything() {
    let machine = machine("no-numa");
    let only = machine.memory_node(node(0)).expect("node 0");
    assert_eq!(only.memory_bytes, 3_884_360 * 1024);
    assert_eq!(only.free_bytes, 2_911_776 * 1024);
    assert_eq!(only.cpus, cpus("0-3"));
    assert_eq!(machine.tier_source(), TierSource::Derived);
    assert_eq!(machine.cpus()[0].package, None, "-1 is not a package");
    assert_eq!(machine.pages().thp_bytes, None);
    assert_eq!(machine.cache_groups(), [cpus("0-3")], "no cache is told of");
}

#[test]
fn an_unknown_and_an_offline_node_are_told_apart() {
    let machine = machine("cxl");
    let unknown = machine.node(node(9)).expect_err("there is none");
    assert_eq!(unknown.to_string(), "node 9 does not exist: this machine has node(s) 0-3");
    let offline = machine.node(node(4)).expect_err("it is offline");
    assert!(matches!(offline, NodeError::Offline { .. }), "{offline}");
    assert!(offline.to_string().contains("daxctl"), "{offline}");
}

#[test]
fn without_the_kernels_tiers_they_follow_from_cpus_and_distances() {
    let root = support::unpack("cxl");
    let tiering = root.path().join("sys/devices/virtual/memory_tiering");
    std::fs::remove_dir_all(tiering).expect("it was there");
    let machine = Machine::read_from(root.path()).expect("readable");
    assert_eq!(machine.tier_source(), TierSource::Derived);
    let tiers: Vec<String> = machine.tiers().iter().map(|t| t.nodes.to_string()).collect();
    assert_eq!(tiers, ["0-1", "2-3"]);
    assert_eq!(list(machine.demotion_targets(node(1)).expect("memory").iter()), "3");
}

#[test]
fn a_node_that_no_tier_lists_makes_the_tiers_derived() {
    let root = support::unpack("cxl");
    support::write(root.path(), "sys/devices/virtual/memory_tiering/memory_tier20/nodelist", "2\n");
    let machine = Machine::read_from(root.path()).expect("readable");
    assert_eq!(machine.tier_source(), TierSource::Derived);
    assert!(machine.node(node(3)).expect("online").tier.is_some());
}

#[test]
fn a_cpu_bound_access_class_is_preferred_to_the_one_that_counts_devices() {
    let root = support::unpack("cxl");
    let access0 = "sys/devices/system/node/node2/access0/initiators/read_bandwidth";
    support::write(root.path(), access0, "400000\n");
    let machine = Machine::read_from(root.path()).expect("readable");
    let access = machine.nodes()[2].access.as_ref().expect("told");
    assert_eq!(access.read_mib_per_s, Some(26_000));
}

#[test]
fn malformed_files_are_named_with_their_content() {
    let cases = [
        ("sys/devices/system/node/online", "0-x\n", "neither a number nor a range"),
        ("sys/devices/system/node/online", "\n", "at least one node"),
        ("sys/devices/system/cpu/online", "0-99999999\n", "65535"),
        ("sys/devices/system/node/node1/distance", "21\n", "expected 2 distances"),
        ("sys/devices/system/node/node1/distance", "21 ten\n", "expected 2 distances"),
        ("sys/devices/system/node/node0/meminfo", "Node 0 MemFree: 5 kB\n", "MemTotal"),
        ("sys/devices/system/node/node0/meminfo", "Node 0 MemTotal: 5 MB\n", "kB"),
        ("sys/devices/system/node/node0/cpulist", "0-x\n", "neither a number nor a range"),
        ("sys/devices/system/cpu/cpu3/topology/core_id", "three\n", "a number"),
        ("sys/devices/system/cpu/cpu3/cache/index3/size", "11M\n", "32768K"),
        ("sys/devices/system/cpu/cpu3/cache/index3/type", "Trace\n", "Unified"),
        ("sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "big\n", "bytes"),
    ];
    let root = support::unpack("two-sockets");
    for (path, content, reason) in cases {
        let good = std::fs::read_to_string(root.path().join(path)).expect("it is there");
        support::write(root.path(), path, content);
        let error = Machine::read_from(root.path()).expect_err("it must be refused").to_string();
        support::write(root.path(), path, &good);
        assert!(error.contains(path), "{error}");
        assert!(error.contains(reason), "{error}");
        let quoted = format!("{:?}", content.trim_end());
        assert!(error.contains(&quoted), "{error}");
    }
}

#[test]
fn a_missing_file_is_named() {
    let root = support::unpack("two-sockets");
    let missing = "sys/devices/system/node/node1/meminfo";
    std::fs::remove_file(root.path().join(missing)).expect("it was there");
    let error = Machine::read_from(root.path()).expect_err("it is needed");
    assert!(error.to_string().contains(missing), "{error}");
    assert!(std::error::Error::source(&error).is_some());
}

#[test]
fn the_machine_that_runs_this_test_is_readable() {
    let machine = Machine::read().expect("this machine");
    assert!(machine.memory_nodes().count() >= 1);
    assert!(machine.pages().base_bytes.is_power_of_two());
}

#[test]
fn json_gives_sets_as_arrays_and_distances_by_node() {
    let json = serde_json::to_value(machine("cxl")).expect("serializable");
    assert_eq!(json["nodes"][2]["distances"]["0"], 14);
    assert_eq!(json["tiers"][1]["nodes"], serde_json::json!([2, 3]));
    assert_eq!(json["tier_source"], "kernel");
}
