//! Memory settings: huge pages, nodes, balancing, overcommit, control group, KSM.

use pageferry_topology::Machine;

use super::Check;
use crate::host::Host;
use crate::output::Problem;
use crate::size::size;
use crate::topology::unreadable;

const THP: &str = "sys/kernel/mm/transparent_hugepage";

/// Frames for a few batches; a pool that gets less cannot work ahead.
const LITTLE_MEMORY: u64 = 256 << 20;

/// The checks, and how many nodes have memory; 0 where that cannot be told.
pub(super) fn checks(host: &Host) -> (Vec<Check>, usize) {
    let mut checks = vec![huge_pages(host), defrag(host), khugepaged(host)];
    let nodes = match Machine::read_from(host.root()) {
        Ok(machine) => {
            checks.extend(nodes(&machine));
            machine.memory_nodes().count()
        }
        Err(error) => {
            let Problem { what, because, remedy, .. } = unreadable(&error);
            checks.push(Check::missing("nodes", format!("{what}: {because}"), remedy));
            0
        }
    };
    checks.push(balancing(host, nodes));
    checks.push(overcommit(host));
    checks.push(cgroup_memory(host));
    checks.push(ksm(host));
    (checks, nodes)
}

fn huge_pages(host: &Host) -> Check {
    const ID: &str = "thp";
    const REMEDY: &str = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled";
    match host.choice(&format!("{THP}/enabled")).as_deref() {
        Some("never") => Check::warn(ID, "never: no huge folios", REMEDY),
        Some(choice) => Check::ok(ID, choice),
        None => Check::warn(
            ID,
            "no transparent huge pages: only base pages can be moved",
            "use a kernel built with CONFIG_TRANSPARENT_HUGEPAGE",
        ),
    }
}

fn defrag(host: &Host) -> Check {
    const ID: &str = "thp-defrag";
    match host.choice(&format!("{THP}/defrag")).as_deref() {
        Some(choice @ ("never" | "defer")) => Check::warn(
            ID,
            format!("{choice}: a huge frame is had only if one is free by chance"),
            "echo madvise > /sys/kernel/mm/transparent_hugepage/defrag",
        ),
        Some(choice) => Check::ok(ID, choice),
        None => Check::ok(ID, "no transparent huge pages, nothing to defragment"),
    }
}

fn khugepaged(host: &Host) -> Check {
    const ID: &str = "khugepaged";
    match host.number(&format!("{THP}/khugepaged/defrag")) {
        Some(0) => Check::warn(
            ID,
            "does not allocate: huge pages that were split stay split",
            "echo 1 > /sys/kernel/mm/transparent_hugepage/khugepaged/defrag",
        ),
        Some(_) => Check::ok(ID, "puts split huge pages together again"),
        None => Check::ok(ID, "not part of this kernel"),
    }
}

fn nodes(machine: &Machine) -> Vec<Check> {
    let with_memory = machine.memory_nodes().count();
    let mut checks = vec![if with_memory >= 2 {
        Check::ok("nodes", format!("{with_memory} nodes with memory"))
    } else {
        Check::warn(
            "nodes",
            "one node with memory: pages can move from frame to frame only",
            "use a machine with several nodes, or start a guest with them (QEMU: -numa node)",
        )
    }];
    let low: Vec<String> = machine
        .memory_nodes()
        .filter(|node| node.free_bytes < LITTLE_MEMORY)
        .map(|node| format!("node {} has {} free", node.id, size(node.free_bytes)))
        .collect();
    checks.push(if low.is_empty() {
        let free = machine.memory_nodes().map(|node| node.free_bytes).sum();
        Check::ok("free-memory", format!("{} free in all", size(free)))
    } else {
        Check::warn(
            "free-memory",
            low.join(", "),
            "end or move what uses it; cached files give way by themselves, but slowly",
        )
    });
    checks
}

fn balancing(host: &Host, nodes: usize) -> Check {
    const ID: &str = "numa-balancing";
    match host.number("proc/sys/kernel/numa_balancing") {
        Some(0) => Check::ok(ID, "off"),
        None => Check::ok(ID, "not part of this kernel"),
        Some(mode) if nodes == 1 => Check::ok(ID, format!("mode {mode}, idle with one node")),
        Some(mode) => Check::warn(
            ID,
            format!("mode {mode}: the kernel moves pages too, against what was asked"),
            "sysctl kernel.numa_balancing=0",
        ),
    }
}

fn overcommit(host: &Host) -> Check {
    const ID: &str = "overcommit";
    match host.number("proc/sys/vm/overcommit_memory") {
        Some(2) => Check::warn(
            ID,
            "strict (2): the address space of frame pools counts as used memory",
            "sysctl vm.overcommit_memory=0, or raise vm.overcommit_ratio",
        ),
        Some(mode) => Check::ok(ID, format!("mode {mode}")),
        None => Check::ok(ID, "cannot tell"),
    }
}

fn cgroup_memory(host: &Host) -> Check {
    const ID: &str = "cgroup-memory";
    let left = |group: &String| {
        let number = |file: &str| host.number(&format!("{group}/{file}"));
        let max = number("memory.max")?;
        let used = number("memory.current").unwrap_or(0);
        u64::try_from(max.saturating_sub(used).max(0)).ok()
    };
    let Some(groups) = host.cgroups() else {
        return Check::ok(ID, "cannot tell without cgroup v2");
    };
    match groups.iter().filter_map(left).min() {
        None => Check::ok(ID, "no limit"),
        Some(left) if left < LITTLE_MEMORY => Check::warn(
            ID,
            format!("{} left until the limit", size(left)),
            "raise memory.max of the group (MemoryMax= in the service, --memory of the container)",
        ),
        Some(left) => Check::ok(ID, format!("{} left until the limit", size(left))),
    }
}

fn ksm(host: &Host) -> Check {
    const ID: &str = "ksm";
    match host.number("sys/kernel/mm/ksm/run") {
        Some(1) => Check::warn(
            ID,
            "running: pages that it merged are busy and stay where they are",
            "echo 2 > /sys/kernel/mm/ksm/run, or do not mark managed memory MADV_MERGEABLE",
        ),
        Some(_) => Check::ok(ID, "not running"),
        None => Check::ok(ID, "not part of this kernel"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;
    use crate::host::tests::host;

    #[test]
    fn settings_that_hurt_are_warned_of_with_a_remedy() {
        let (_dir, host) = host(&[
            ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n"),
            ("sys/kernel/mm/transparent_hugepage/defrag", "always [defer] never\n"),
            ("sys/kernel/mm/transparent_hugepage/khugepaged/defrag", "0\n"),
            ("sys/kernel/mm/ksm/run", "1\n"),
            ("proc/sys/vm/overcommit_memory", "2\n"),
            ("proc/sys/kernel/numa_balancing", "2\n"),
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/memory.max", "104857600\n"),
            ("sys/fs/cgroup/a/memory.current", "52428800\n"),
        ]);
        let mut found = vec![huge_pages(&host), defrag(&host), khugepaged(&host), ksm(&host)];
        found.extend([overcommit(&host), balancing(&host, 2), cgroup_memory(&host)]);
        for check in &found {
            assert_eq!(check.status, Status::Warn, "{check:?}");
            assert!(check.remedy.is_some(), "{check:?}");
        }
        assert!(found[6].found.starts_with("50 MiB left"), "{:?}", found[6]);
    }

    #[test]
    fn numa_balancing_does_not_matter_with_one_node() {
        let (_dir, host) = host(&[("proc/sys/kernel/numa_balancing", "1\n")]);
        assert_eq!(balancing(&host, 1).status, Status::Ok);
    }

    #[test]
    fn usual_settings_are_ok() {
        let (_dir, host) = host(&[
            ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
            ("sys/kernel/mm/transparent_hugepage/defrag", "always defer defer+madvise [madvise]\n"),
            ("sys/kernel/mm/ksm/run", "0\n"),
            ("proc/sys/vm/overcommit_memory", "1\n"),
            ("proc/self/cgroup", "0::/\n"),
        ]);
        for check in [huge_pages(&host), defrag(&host), ksm(&host), overcommit(&host)] {
            assert_eq!(check.status, Status::Ok, "{check:?}");
        }
        assert_eq!(cgroup_memory(&host).found, "no limit");
    }
}
