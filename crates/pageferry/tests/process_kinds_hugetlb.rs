//! The kernel path against hugetlb pages, from node to node: where pages are set aside on the other
//! node, where none is, where none may be had. In guests only: the pool is the machine's, and others
//! may take from it between a look at it and the next call.

#[path = "support/child.rs"]
mod child;
#[path = "support/kinds.rs"]
mod kinds;

use kinds::{Group, Setting, Ward, bytes, in_guest, pool, read_number, two_nodes};
use pageferry::process::{Kind, ProcessError, Reserve};
use pageferry::topology::{Machine, NodeId};
use pageferry::{HUGE, Outcome, Shortage};

/// A child with four hugetlb pages on the first node, if each node has so many to spare.
fn with_hugetlb(nodes: [NodeId; 2]) -> Option<Ward> {
    if !in_guest() {
        return None;
    }
    for node in nodes {
        if read_number(pool(node, "free_hugepages")) < 4 {
            eprintln!("skipped: node {node} has no four hugetlb pages set aside");
            return None;
        }
    }
    let ward = Ward::filled(|| kinds::hugetlb(4 * HUGE));
    ward.goes_to(nodes[0], 4 * HUGE);
    Some(ward)
}

#[test]
fn hugetlb_pages_take_places_in_the_pool_of_the_other_node() {
    let Some((from, to)) = two_nodes() else { return };
    let Some(ward) = with_hugetlb([from, to]) else { return };
    for to in [to, from, to] {
        let free = read_number(pool(to, "free_hugepages"));
        let report = ward.goes_to(to, 4 * HUGE);
        let [line] = report.lines[..] else { panic!("one kind of pages: {report:?}") };
        assert_eq!((line.outcome, line.kind), (Outcome::Moved, Kind::Hugetlb));
        assert_eq!((line.pages, line.page_bytes), (4, HUGE as u64));
        assert_eq!(read_number(pool(to, "free_hugepages")), free - 4);
        ward.is_on(to);
        ward.is_intact();
    }
}

#[test]
fn hugetlb_pages_that_are_set_aside_need_no_free_memory() {
    let Some((from, to)) = two_nodes() else { return };
    let Some(ward) = with_hugetlb([from, to]) else { return };
    // As on a node that the pool has nearly all memory of: none is free above the reserve.
    let report = ward.to(to).reserve(Reserve::Bytes(1 << 50)).run().expect("our child");
    assert_eq!(bytes(&report, Outcome::Moved), 4 * HUGE as u64, "{report:?}");
    ward.is_on(to);
    ward.is_intact();
    // Beyond the pool they would take free memory.
    let Some(_none) = Setting::new(pool(from, "nr_hugepages"), "0") else { return };
    let report = ward.to(from).reserve(Reserve::Bytes(1 << 50)).run().expect("our child");
    let stayed = bytes(&report, Outcome::NoFrame(Shortage::Reserve));
    assert_eq!(stayed, 4 * HUGE as u64, "{report:?}");
    ward.is_on(to);
}

#[test]
fn hugetlb_pages_take_their_place_along_where_none_is_set_aside() {
    let Some((from, to)) = two_nodes() else { return };
    let Some(ward) = with_hugetlb([from, to]) else { return };
    let Some(_none) = Setting::new(pool(to, "nr_hugepages"), "0") else { return };
    let there = read_number(pool(from, "nr_hugepages"));
    let report = ward.goes_to(to, 4 * HUGE);
    assert_eq!(bytes(&report, Outcome::Moved), 4 * HUGE as u64, "{report:?}");
    ward.is_on(to);
    ward.is_intact();
    let after = [from, to].map(|node| read_number(pool(node, "nr_hugepages")));
    assert_eq!(after, [there - 4, 4], "pages set aside");
    ward.goes_to(from, 4 * HUGE);
    ward.is_on(from);
}

#[test]
fn a_mover_that_may_not_have_memory_on_the_node_is_refused_before_a_page_is_touched() {
    let Some((from, to)) = two_nodes() else { return };
    let Some(ward) = with_hugetlb([from, to]) else { return };
    let machine = Machine::read().expect("this machine");
    let Some(group) = Group::new("no-huge-page") else { return };
    group.set("cpuset.mems", &from.to_string());
    group.join(std::process::id());
    let refused = ward.to(to).machine(machine).run();
    Group::leave(std::process::id());
    assert!(
        matches!(refused, Err(ProcessError::OwnCpuset { node, .. }) if node == to),
        "{refused:?}"
    );
    ward.is_on(from);
    ward.is_intact();
}
