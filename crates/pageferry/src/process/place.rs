//! Where pages go: one node or several, in proportion, in order, or by where they are.
//!
//! What always holds: with proportions the node of a page depends on its address alone, so that
//! a second run finds every page in its place and moves nothing.

use super::error::OptionError;
use pageferry_sys::mm::MAX_NODES;
use pageferry_sys::page_size;
use pageferry_topology::{NodeId, NodeList};

/// Largest sum of weights, after what they have in common is divided out.
const MAX_WEIGHT: u64 = 4096;

/// Where pages go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination(Rule);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Rule {
    /// To the first that has room.
    Fill(Vec<NodeId>),
    /// Page by page; as many turns in a round as the weights say.
    Spread(Vec<(NodeId, u32)>),
    /// From one node to another.
    Remap(Vec<(NodeId, NodeId)>),
}

impl Destination {
    /// To one node.
    pub fn node(node: NodeId) -> Self {
        Self(Rule::Fill(vec![node]))
    }

    /// To the first of these nodes that has room. A page that is on any of them stays.
    pub fn fill(nodes: impl IntoIterator<Item = NodeId>) -> Self {
        Self(Rule::Fill(nodes.into_iter().collect()))
    }

    /// Page after page to the next node, by address. Pages of a full node stay where they are.
    pub fn interleave(nodes: impl IntoIterator<Item = NodeId>) -> Self {
        Self::weighted(nodes.into_iter().map(|node| (node, 1)))
    }

    /// As [`Destination::interleave`], with this many turns for each node in a round.
    pub fn weighted(nodes: impl IntoIterator<Item = (NodeId, u32)>) -> Self {
        Self(Rule::Spread(nodes.into_iter().collect()))
    }

    /// As `migrate_pages(2)` has it: from the first node of `from` to the first of `to`, from the
    /// second to the second, and over again where `to` has fewer. Where they are not equally
    /// many, pages that are on one of `to` stay.
    pub fn paired(from: &NodeList, to: &NodeList) -> Self {
        let same = from.len() == to.len();
        let pairs = from.iter().zip(to.iter().collect::<Vec<_>>().into_iter().cycle());
        let pairs = pairs.filter(|&(f, _)| same || !to.contains(f));
        Self(Rule::Remap(pairs.collect()))
    }

    /// The nodes that pages go to.
    pub fn nodes(&self) -> NodeList {
        match &self.0 {
            Rule::Fill(nodes) => nodes.iter().copied().collect(),
            Rule::Spread(nodes) => nodes.iter().map(|(node, _)| *node).collect(),
            Rule::Remap(pairs) => pairs.iter().map(|(_, to)| *to).collect(),
        }
    }
}

/// A set of nodes that is quick to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
struct NodeSet([u64; MAX_NODES / 64]);

impl NodeSet {
    fn new(nodes: impl Iterator<Item = NodeId>) -> Self {
        let mut set = [0; MAX_NODES / 64];
        for node in nodes {
            if let Some(word) = set.get_mut(node.get() as usize / 64) {
                *word |= 1 << (node.get() % 64);
            }
        }
        Self(set)
    }

    fn contains(&self, node: u32) -> bool {
        self.0.get(node as usize / 64).is_some_and(|word| word >> (node % 64) & 1 != 0)
    }
}

/// What is to be done with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// It is in its place.
    There,
    /// It is on a node that nothing is taken from.
    NotAsked,
    /// It goes to the node of this index among the placement's.
    To(usize),
}

/// A destination made ready to be asked for every page.
#[derive(Clone, Debug)]
pub(super) struct Placement {
    /// The nodes that pages go to.
    pub(super) nodes: Vec<NodeId>,
    /// A node that is full gives way to the next.
    pub(super) spills: bool,
    from: Option<NodeSet>,
    way: Way,
}

#[derive(Clone, Debug)]
enum Way {
    Fill(NodeSet),
    /// Indices of nodes; a round of turns.
    Spread(Vec<usize>),
    /// Index of the node by where the page is.
    Remap(Vec<Option<usize>>),
}

impl Placement {
    pub(super) fn new(to: &Destination, from: Option<&NodeList>) -> Result<Self, OptionError> {
        let bad = |value: String, reason| OptionError { option: "to", value, reason };
        let nodes: Vec<NodeId> = match &to.0 {
            // In the order given.
            Rule::Fill(nodes) => nodes.clone(),
            _ => to.nodes().iter().collect(),
        };
        if nodes.is_empty() && !matches!(to.0, Rule::Remap(_)) {
            return Err(bad("no node".into(), "name at least one node with memory"));
        }
        let index = |node: NodeId| nodes.iter().position(|n| *n == node).unwrap_or(0);
        let way = match &to.0 {
            Rule::Fill(list) => Way::Fill(NodeSet::new(list.iter().copied())),
            Rule::Spread(weights) => Way::Spread(
                round(weights)
                    .map_err(|v| {
                        bad(v, "weights are 1 or more, each node once, and their sum at most 4096")
                    })?
                    .into_iter()
                    .map(index)
                    .collect(),
            ),
            Rule::Remap(pairs) => {
                let mut table = vec![None; MAX_NODES];
                for (from, to) in pairs.iter().filter(|(from, to)| from != to) {
                    if let Some(slot) = table.get_mut(from.get() as usize) {
                        *slot = Some(index(*to));
                    }
                }
                Way::Remap(table)
            }
        };
        let spills = matches!(way, Way::Fill(_));
        Ok(Self { nodes, spills, from: from.map(|f| NodeSet::new(f.iter())), way })
    }

    /// What is to be done with a page that is on node `on`.
    pub(super) fn decide(&self, address: usize, page_bytes: usize, on: u32) -> Decision {
        let to = match &self.way {
            Way::Fill(set) if set.contains(on) => return Decision::There,
            Way::Fill(_) => 0,
            Way::Spread(turns) => {
                let size = page_bytes.max(page_size());
                let to = turns[address / size % turns.len()];
                if self.nodes[to].get() == on {
                    return Decision::There;
                }
                to
            }
            Way::Remap(table) => match table.get(on as usize) {
                Some(Some(to)) => *to,
                _ if self.nodes.iter().any(|n| n.get() == on) => return Decision::There,
                _ => return Decision::NotAsked,
            },
        };
        match &self.from {
            Some(from) if !from.contains(on) => Decision::NotAsked,
            _ => Decision::To(to),
        }
    }
}

/// A round of turns in which each node has its weight, spread out evenly. `Err`: the weights.
fn round(weights: &[(NodeId, u32)]) -> Result<Vec<NodeId>, String> {
    let text = || {
        let parts: Vec<_> = weights.iter().map(|(node, w)| format!("{node}:{w}")).collect();
        parts.join(",")
    };
    let twice =
        weights.iter().enumerate().any(|(i, (n, _))| weights[..i].iter().any(|w| w.0 == *n));
    if twice || weights.iter().any(|(_, w)| *w == 0) {
        return Err(text());
    }
    let common = weights.iter().fold(0, |a, (_, b)| gcd(a, *b)).max(1);
    let weights: Vec<_> = weights.iter().map(|(n, w)| (*n, i64::from(w / common))).collect();
    let total: i64 = weights.iter().map(|(_, w)| w).sum();
    if u64::try_from(total).unwrap_or(u64::MAX) > MAX_WEIGHT {
        return Err(text());
    }
    // Smooth weighted round-robin: the one that is furthest behind its share has its turn.
    let mut behind = vec![0i64; weights.len()];
    let turns = (0..total).map(|_| {
        behind.iter_mut().zip(&weights).for_each(|(b, (_, w))| *b += w);
        let next = (0..weights.len()).max_by_key(|&i| (behind[i], std::cmp::Reverse(i)));
        let next = next.unwrap_or(0);
        behind[next] -= total;
        weights[next].0
    });
    Ok(turns.collect())
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn list(nodes: &[u32]) -> NodeList {
        nodes.iter().copied().map(NodeId::new).collect()
    }

    #[test]
    fn pairs_are_those_of_migrate_pages() {
        let pairs = |from: &[u32], to: &[u32]| {
            let Destination(Rule::Remap(pairs)) = Destination::paired(&list(from), &list(to))
            else {
                unreachable!("paired makes a remap")
            };
            pairs.into_iter().map(|(f, t)| (f.get(), t.get())).collect::<Vec<_>>()
        };
        assert_eq!(pairs(&[0, 1], &[2, 3]), [(0, 2), (1, 3)]);
        assert_eq!(pairs(&[0, 1], &[1, 2]), [(0, 1), (1, 2)]);
        // mm/mempolicy.c: "[0-7] - > [3,4,5] moves only 0,1,2,6,7".
        let moved = pairs(&[0, 1, 2, 3, 4, 5, 6, 7], &[3, 4, 5]);
        assert_eq!(moved, [(0, 3), (1, 4), (2, 5), (6, 3), (7, 4)]);
    }

    #[test]
    fn weights_that_make_no_sense_are_refused() {
        for weights in [vec![(0, 0)], vec![(0, 1), (0, 2)], vec![(0, 4096), (1, 1)], vec![]] {
            let to = Destination::weighted(weights.iter().map(|&(n, w)| (NodeId::new(n), w)));
            assert!(Placement::new(&to, None).is_err(), "{weights:?}");
        }
        assert!(Placement::new(&Destination::fill([]), None).is_err());
    }

    proptest! {
        #[test]
        fn every_round_has_the_weights_and_a_page_in_its_place_stays(
            weights in proptest::collection::vec(1u32..40, 1..6), first in 0usize..1000
        ) {
            let nodes = weights.iter().zip(0..).map(|(&w, n)| (NodeId::new(n), w));
            let placement = Placement::new(&Destination::weighted(nodes), None).expect("valid");
            let Way::Spread(turns) = &placement.way else { unreachable!("weighted spreads") };
            let common = weights.iter().fold(0, |a, &b| gcd(a, b));
            let mut got = vec![0; weights.len()];
            for i in first..first + turns.len() {
                let address = i * page_size();
                let to = turns[i % turns.len()];
                got[to] += common;
                let on = placement.nodes[to].get();
                prop_assert_eq!(placement.decide(address, page_size(), on), Decision::There);
                if weights.len() > 1 {
                    let other = (on + 1) % u32::try_from(weights.len()).expect("few");
                    let decided = placement.decide(address, page_size(), other);
                    prop_assert_eq!(decided, Decision::To(to));
                }
            }
            prop_assert_eq!(got, weights);
        }
    }
}
