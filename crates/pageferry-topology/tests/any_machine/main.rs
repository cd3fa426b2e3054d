//! Machines made of valid pieces at random: with pieces left out, emulated nodes, nodes without
//! memory, CPUs or a directory, offline CPUs, gaps in the numbers, masks or lists.

use std::collections::BTreeMap;

use pageferry_topology::{Cache, CpuList, Id, IdList, Machine, NodeId, TierSource};
use proptest::prelude::*;

use self::model::{Model, Set, Shown, Told};

mod model;

fn numbers<I: Id>(ids: impl IntoIterator<Item = I>) -> Set {
    ids.into_iter().map(Id::to_u32).collect()
}

fn set<I: Id>(list: &IdList<I>) -> Set {
    numbers(list.iter())
}

fn shown<T>((value, shown): (T, Shown)) -> Option<T> {
    (shown == Shown::Value).then_some(value)
}

/// The nodes that have a directory.
fn there(model: &Model) -> Set {
    model.nodes.iter().filter(|(_, node)| node.has_directory).map(|(&id, _)| id).collect()
}

fn read(model: &Model) -> Result<Machine, TestCaseError> {
    // Many small files: in memory where that is possible.
    let root = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a temporary directory");
    model.write(root.path());
    Machine::read_from(root.path()).map_err(|error| TestCaseError::fail(error.to_string()))
}

fn check_nodes(model: &Model, machine: &Machine) -> Result<(), TestCaseError> {
    let (online_cpus, there) = (model.online_cpus(), there(model));
    prop_assert_eq!(numbers(machine.nodes().iter().map(|node| node.id)), there.clone());
    for node in machine.nodes() {
        let built = &model.nodes[&node.id.get()];
        prop_assert_eq!(node.memory_bytes, built.memory_kib << 10);
        prop_assert_eq!(node.free_bytes, built.free_kib << 10);
        prop_assert_eq!(set(&node.cpus), &model.cpus_of(built) & &online_cpus);
        let distances: BTreeMap<u32, u32> =
            model.nodes.keys().copied().zip(built.distances.iter().copied()).collect();
        for (to, distance) in &node.distances {
            prop_assert_eq!(distances[&to.get()], *distance);
        }
        prop_assert_eq!(numbers(node.distances.keys().copied()), there.clone());
        // CPUs as the only initiators first, unless that says nothing.
        let classes = built.classes.iter().rev().flatten();
        let told = |speed: &Option<u64>| speed.is_some_and(|speed| speed > 0);
        let expected = classes.into_iter().find(|class| class.speeds.iter().any(told));
        prop_assert_eq!(node.access.is_some(), expected.is_some());
        if let (Some(access), Some(class)) = (&node.access, expected) {
            let read = [
                access.read_mib_per_s,
                access.write_mib_per_s,
                access.read_latency_ns,
                access.write_latency_ns,
            ];
            let expected: Vec<_> = class.speeds.iter().map(|s| s.filter(|&s| s > 0)).collect();
            prop_assert_eq!(&read[..], &expected);
            let initiators = &model.nodes_of(class.initiators) & &there;
            prop_assert_eq!(set(&access.initiators), initiators);
        }
    }
    let online: Set = model.nodes.keys().copied().collect();
    let possible = if model.tells_possible { &online | &model.offline_nodes } else { Set::new() };
    prop_assert_eq!(set(machine.offline_nodes()), &possible - &there);
    Ok(())
}

fn check_cpus(model: &Model, machine: &Machine) -> Result<(), TestCaseError> {
    let online = model.online_cpus();
    prop_assert_eq!(numbers(machine.cpus().iter().map(|cpu| cpu.id)), online.clone());
    for cpu in machine.cpus() {
        let id = cpu.id.get();
        let built = &model.cpus[&id];
        let lowest = machine.nodes().iter().find(|node| node.cpus.contains(cpu.id));
        prop_assert_eq!(cpu.node, lowest.map(|node| node.id));
        prop_assert_eq!(cpu.package, shown(built.package));
        prop_assert_eq!(cpu.core, shown(built.core));
        let visible = |group| &model.beside(id, group) & &online;
        let tells = built.core_cpus.tells() || built.thread_siblings.tells();
        let siblings = if tells { visible(model.threads_per_core) } else { Set::from([id]) };
        prop_assert_eq!(set(&cpu.siblings), siblings);
        let mut expected: Vec<_> = built.caches.iter().flatten().collect();
        expected.retain(|cache| shown(cache.level).is_some() && shown(cache.kind).is_some());
        expected.sort_by_key(|cache| cache.level.0);
        prop_assert_eq!(cpu.caches.len(), expected.len());
        for (Cache { level, kind, size_bytes, shared_by, .. }, cache) in
            cpu.caches.iter().zip(expected)
        {
            prop_assert_eq!(*level, cache.level.0);
            prop_assert_eq!(format!("{kind:?}"), cache.kind.0);
            prop_assert_eq!(*size_bytes, shown(cache.kib).map(|kib| kib << 10));
            let sharing = cache.sharing.tells();
            let expected = if sharing { visible(cache.shared_by) } else { Set::new() };
            prop_assert_eq!(set(shared_by), expected);
        }
    }
    Ok(())
}

fn check_tiers(model: &Model, machine: &Machine) -> Result<(), TestCaseError> {
    let with_memory = numbers(machine.memory_nodes().map(|node| node.id));
    let mut left = with_memory.clone();
    let mut published = Vec::new();
    for (&id, &bits) in &model.tiers {
        let nodes = &model.nodes_of(bits) & &left;
        left = &left - &nodes;
        if !nodes.is_empty() {
            published.push((id, nodes));
        }
    }
    let tiers: Vec<(u32, Set)> =
        machine.tiers().iter().map(|tier| (tier.id.get(), set(&tier.nodes))).collect();
    if left.is_empty() && !published.is_empty() {
        prop_assert_eq!(machine.tier_source(), TierSource::Kernel);
        prop_assert_eq!(tiers, published);
    } else {
        prop_assert_eq!(machine.tier_source(), TierSource::Derived);
        let all: Vec<u32> = tiers.iter().flat_map(|(_, nodes)| nodes).copied().collect();
        prop_assert_eq!(all.len(), with_memory.len());
        prop_assert_eq!(all.into_iter().collect::<Set>(), with_memory);
    }
    for node in machine.nodes() {
        let tier = machine.tiers().iter().find(|tier| tier.nodes.contains(node.id));
        prop_assert_eq!(node.tier, tier.map(|tier| tier.id));
    }
    Ok(())
}

/// What moving memory asks.
fn check_answers(machine: &Machine) -> Result<(), TestCaseError> {
    let online = numbers(machine.cpus().iter().map(|cpu| cpu.id));
    for node in machine.nodes() {
        let nearest = set(&machine.nearest_cpus(node.id).expect("online"));
        prop_assert!(!nearest.is_empty() && nearest.is_subset(&online));
        prop_assert!(node.is_cpuless() || nearest == set(&node.cpus));
        prop_assert_eq!(machine.memory_node(node.id).is_ok(), node.has_memory());
        prop_assert_eq!(machine.demotion_targets(node.id).is_ok(), node.has_memory());
        for to in machine.nodes() {
            prop_assert!(machine.distance(node.id, to.id).expect("both online") <= 255);
        }
    }
    let groups = machine.cache_groups();
    let grouped: usize = groups.iter().map(CpuList::len).sum();
    prop_assert_eq!(grouped, online.len());
    prop_assert_eq!(groups.iter().flat_map(set).collect::<Set>(), online);
    prop_assert!(machine.pages().base_bytes.is_power_of_two());
    prop_assert!(serde_json::to_string(machine).is_ok());
    Ok(())
}

proptest! {
    #[test]
    fn no_machine_of_valid_pieces_is_refused_and_what_is_read_is_what_was_built(
        model in model::model()
    ) {
        let machine = read(&model)?;
        if model.nodes.is_empty() {
            prop_assert_eq!(numbers(machine.nodes().iter().map(|n| n.id)), Set::from([0]));
            prop_assert_eq!(machine.nodes()[0].memory_bytes, 4 << 20);
            prop_assert_eq!(set(&machine.nodes()[0].cpus), model.online_cpus());
            prop_assert_eq!(machine.distance(NodeId::new(0), NodeId::new(0)), Ok(10));
        } else {
            check_nodes(&model, &machine)?;
            check_tiers(&model, &machine)?;
        }
        check_cpus(&model, &machine)?;
        check_answers(&machine)?;
    }
}

/// The pieces are worth trying: what is odd does turn up.
#[test]
fn the_random_machines_have_every_oddity() {
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for _ in 0..256 {
        let model = model::model().new_tree(&mut runner).expect("a machine").current();
        let online = model.online_cpus();
        let nodes = || model.nodes.values();
        let sets: Vec<Set> = nodes().map(|node| model.cpus_of(node)).collect();
        let shared = |a: &Set| sets.iter().filter(|b| !a.is_disjoint(b)).count() > 1;
        for (oddity, is_there) in [
            ("no NUMA", model.nodes.is_empty()),
            ("emulated nodes", sets.iter().any(shared)),
            ("no memory", nodes().any(|node| node.memory_kib == 0)),
            ("no CPUs", sets.iter().any(Set::is_empty)),
            ("no directory", nodes().any(|node| !node.has_directory)),
            ("offline CPUs of a node", sets.iter().any(|set| !set.is_subset(&online))),
            ("a mask alone", nodes().any(|node| node.told == Told::Mask)),
            ("kernel's tiers", !model.tiers.is_empty()),
        ] {
            *seen.entry(oddity).or_default() += usize::from(is_there);
        }
    }
    assert!(seen.values().all(|&times| times > 5), "{seen:?}");
}
