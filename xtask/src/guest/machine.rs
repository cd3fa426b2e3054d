//! The machines that are emulated: a table, and QEMU's words for it.

use std::fmt;

/// A node of a machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Node {
    pub(crate) mib: u32,
    pub(crate) cpus: u32,
}

/// A machine.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) name: &'static str,
    pub(crate) nodes: &'static [Node],
    /// Distances between different nodes, as ACPI's SLIT has them (10: local).
    pub(crate) distances: &'static [(usize, usize, u8)],
    /// The test binaries that run there: beginnings of their names.
    pub(crate) suites: &'static [&'static str],
    /// Huge pages of 2 MiB set aside for hugetlb on each node.
    pub(crate) hugetlb: u32,
    pub(crate) clock: Clock,
}

/// What a machine's clock counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clock {
    /// The host's time.
    Time,
    /// Instructions executed, as a nanosecond each; idle time passes at once. What is measured by
    /// it is the same again, whatever else the host does. Always emulated.
    Instructions,
}

/// Test binaries that no machine runs: they look at a kernel that is made up, or at no kernel, and
/// would say in a guest what they say everywhere.
const ELSEWHERE: &[&str] = &[
    "bad_input",
    "process_age",
    "process_fake",
    "process_faults",
    "process_missing",
    "process_planner",
];

/// Test binaries that need a kernel of our own: `cargo xtask kernel test` runs them.
const OF_KERNELS: &str = "kernel_";

/// The machine for comparisons, of no use for tests: most of what goes wrong there needs two CPUs.
pub(crate) const COUNTED: &str = "counted";

/// Distance of a node to itself (ACPI, SLIT).
const LOCAL: u8 = 10;
/// Distance of two sockets, and of memory behind a link (CXL), as usual in firmware.
const SOCKET: u8 = 20;
const LINK: u8 = 31;

/// All machines, in the order in which they run. None has more than two CPUs: an emulated CPU that
/// waits its turn for one of the host's, while the others spin for it, makes minutes of seconds.
pub(crate) const MACHINES: &[Machine] = &[
    Machine {
        name: "two",
        nodes: &[Node { mib: 3072, cpus: 1 }, Node { mib: 3072, cpus: 1 }],
        distances: &[(0, 1, SOCKET)],
        suites: &[""],
        hugetlb: 32,
        clock: Clock::Time,
    },
    Machine {
        name: "tier",
        nodes: &[
            Node { mib: 768, cpus: 1 },
            Node { mib: 512, cpus: 1 },
            Node { mib: 1024, cpus: 0 },
        ],
        distances: &[(0, 1, SOCKET), (0, 2, LINK), (1, 2, LINK)],
        suites: &["node_", "process_kinds", "process_nodes"],
        hugetlb: 8,
        clock: Clock::Time,
    },
    Machine {
        name: "four",
        nodes: &[
            Node { mib: 512, cpus: 1 },
            Node { mib: 512, cpus: 1 },
            Node { mib: 512, cpus: 0 },
            Node { mib: 512, cpus: 0 },
        ],
        distances: &[
            (0, 1, SOCKET),
            (0, 2, SOCKET),
            (0, 3, SOCKET),
            (1, 2, SOCKET),
            (1, 3, SOCKET),
            (2, 3, SOCKET),
        ],
        suites: &["node_", "moves"],
        hugetlb: 8,
        clock: Clock::Time,
    },
    Machine {
        name: "small",
        nodes: &[Node { mib: 1024, cpus: 2 }, Node { mib: 160, cpus: 0 }],
        distances: &[(0, 1, SOCKET)],
        suites: &["node_"],
        hugetlb: 0,
        clock: Clock::Time,
    },
    Machine {
        name: "one",
        nodes: &[Node { mib: 1536, cpus: 2 }],
        distances: &[],
        suites: &["moves", "properties"],
        hugetlb: 8,
        clock: Clock::Time,
    },
    // One CPU: with two, which of them runs when is QEMU's choice, and one spins for the other.
    Machine {
        name: COUNTED,
        nodes: &[Node { mib: 3072, cpus: 1 }, Node { mib: 3072, cpus: 0 }],
        distances: &[(0, 1, SOCKET)],
        suites: &[],
        hugetlb: 0,
        clock: Clock::Instructions,
    },
];

impl Machine {
    /// The machine of that name; the error lists all names.
    pub(crate) fn named(name: &str) -> Result<&'static Self, String> {
        MACHINES.iter().find(|m| m.name == name).ok_or_else(|| {
            let names: Vec<_> = MACHINES.iter().map(|m| m.name).collect();
            format!("there is no machine of that name; there are {}", names.join(", "))
        })
    }

    /// Whether a test binary runs there.
    pub(crate) fn runs(&self, binary: &str) -> bool {
        self.names(binary) && !ELSEWHERE.contains(&binary) && !binary.starts_with(OF_KERNELS)
    }

    /// Whether its suites name a test binary.
    pub(crate) fn names(&self, binary: &str) -> bool {
        self.suites.iter().any(|start| binary.starts_with(start))
    }

    /// Words of QEMU's command line: processors, memory, nodes and distances.
    pub(crate) fn words(&self) -> Vec<String> {
        let sum = |of: fn(&Node) -> u32| self.nodes.iter().map(of).sum::<u32>();
        let cpus = sum(|n| n.cpus);
        let mut words = vec!["-smp".into(), format!("{cpus},sockets={cpus}")];
        words.extend(["-m".into(), format!("{}M", sum(|n| n.mib))]);
        let mut next = 0;
        for (id, node) in self.nodes.iter().enumerate() {
            let backend = format!("memory-backend-ram,id=m{id},size={}M", node.mib);
            let mut numa = format!("node,nodeid={id},memdev=m{id}");
            for cpu in next..next + node.cpus {
                numa += &format!(",cpus={cpu}");
            }
            next += node.cpus;
            if self.has_tiers() {
                // Who reaches memory without CPUs fastest: the first node that has any.
                numa += &format!(",initiator={}", if node.cpus > 0 { id } else { 0 });
            }
            words.extend(["-object".into(), backend, "-numa".into(), numa]);
        }
        for (from, to, distance) in self.distances {
            words.push("-numa".into());
            words.push(format!("dist,src={from},dst={to},val={distance}"));
        }
        if self.has_tiers() {
            words.extend(self.hmat());
        }
        words
    }

    /// Whether memory lies behind a link: Linux is told how slow it is, and makes it a lower tier.
    fn has_tiers(&self) -> bool {
        self.distances.iter().any(|(_, _, distance)| *distance == LINK)
    }

    /// Latencies and bandwidths from each node with CPUs to each node, as in ACPI's HMAT: in
    /// proportion to the distances.
    fn hmat(&self) -> Vec<String> {
        let distance = |from: usize, to: usize| {
            let pair = (from.min(to), from.max(to));
            let found = self.distances.iter().find(|(a, b, _)| (*a, *b) == pair);
            found.map_or(LOCAL, |(_, _, distance)| *distance)
        };
        let mut words = vec!["-machine".into(), "hmat=on".into()];
        let initiators = (0..self.nodes.len()).filter(|node| self.nodes[*node].cpus > 0);
        for from in initiators {
            for to in 0..self.nodes.len() {
                let far = u32::from(distance(from, to));
                let pair = format!("hmat-lb,initiator={from},target={to},hierarchy=memory");
                let (ns, mib) = (10 * far, 200_000 / far);
                words.extend([
                    "-numa".into(),
                    format!("{pair},data-type=access-latency,latency={ns}"),
                    "-numa".into(),
                    format!("{pair},data-type=access-bandwidth,bandwidth={mib}M"),
                ]);
            }
        }
        words
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.name)?;
        for (id, Node { mib, cpus }) in self.nodes.iter().enumerate() {
            let comma = if id == 0 { "" } else { "," };
            match cpus {
                0 => write!(f, "{comma} node {id} with {mib} MiB and no CPU")?,
                1 => write!(f, "{comma} node {id} with {mib} MiB and a CPU")?,
                _ => write!(f, "{comma} node {id} with {mib} MiB and {cpus} CPUs")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_told_to_qemu_node_by_node() {
        let words = |name| Machine::named(name).expect("in the table").words().join(" ");
        assert_eq!(
            words("small"),
            "-smp 2,sockets=2 -m 1184M \
             -object memory-backend-ram,id=m0,size=1024M -numa node,nodeid=0,memdev=m0,cpus=0,cpus=1 \
             -object memory-backend-ram,id=m1,size=160M -numa node,nodeid=1,memdev=m1 \
             -numa dist,src=0,dst=1,val=20"
        );
        let tier = words("tier");
        for part in [
            "-numa node,nodeid=2,memdev=m2,initiator=0",
            "-numa dist,src=1,dst=2,val=31 -machine hmat=on",
            "initiator=1,target=2,hierarchy=memory,data-type=access-latency,latency=310",
            "initiator=0,target=0,hierarchy=memory,data-type=access-bandwidth,bandwidth=20000M",
        ] {
            assert!(tier.contains(part), "{part} in {tier}");
        }
        assert_eq!(tier.matches("hmat-lb").count(), 2 * 2 * 3);
    }

    #[test]
    fn no_machine_runs_what_looks_at_no_real_kernel() {
        let two = Machine::named("two").expect("in the table");
        assert!(two.runs("process_real") && two.runs("process_kinds") && two.runs("moves"));
        for machine in MACHINES {
            assert!(!ELSEWHERE.iter().any(|binary| machine.runs(binary)), "{machine}");
        }
        assert!(!Machine::named(COUNTED).expect("in the table").runs("moves"));
    }

    #[test]
    fn every_pair_of_nodes_has_a_distance_once() {
        for machine in MACHINES {
            let nodes = machine.nodes.len();
            let mut pairs: Vec<_> = machine.distances.iter().map(|(a, b, _)| (*a, *b)).collect();
            pairs.sort_unstable();
            let wanted: Vec<_> =
                (0..nodes).flat_map(|a| (a + 1..nodes).map(move |b| (a, b))).collect();
            assert_eq!(pairs, wanted, "{machine}");
        }
    }

    #[test]
    fn a_machine_that_is_not_there_is_refused_with_those_that_are() {
        let error = Machine::named("eight").expect_err("not in the table");
        assert!(error.ends_with("there are two, tier, four, small, one, counted"), "{error}");
    }
}
