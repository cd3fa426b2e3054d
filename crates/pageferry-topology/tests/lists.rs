//! The list format: what the kernel prints is read, and written back the same.

use std::collections::BTreeSet;

use pageferry_topology::{CpuId, CpuList, Id, ListError, NodeId, NodeList};
use proptest::prelude::*;

fn list(numbers: impl IntoIterator<Item = u32>) -> CpuList {
    numbers.into_iter().map(CpuId::new).collect()
}

proptest! {
    #[test]
    fn any_set_survives_writing_and_reading(
        numbers in prop::collection::btree_set(0u32..=65535, 0..200)
    ) {
        let set = list(numbers.iter().copied());
        let back: CpuList = set.to_string().parse().expect("its own form");
        prop_assert_eq!(&back, &set);
        prop_assert!(back.iter().map(Id::to_u32).eq(numbers));
    }

    #[test]
    fn dense_sets_are_written_as_the_shortest_list(
        numbers in prop::collection::btree_set(0u32..40, 0..40)
    ) {
        let text = list(numbers.iter().copied()).to_string();
        let parts = text.split(',').filter(|part| !part.is_empty()).count();
        let starts = numbers.iter().filter(|&&n| n == 0 || !numbers.contains(&(n - 1)));
        prop_assert_eq!(parts, starts.count(), "{}", text);
    }

    #[test]
    fn any_text_is_read_or_refused_without_panic(text in "[0-9,:/ \n-]{0,40}") {
        if let Ok(set) = text.parse::<CpuList>() {
            prop_assert_eq!(set.to_string().parse::<CpuList>(), Ok(set));
        }
    }

    #[test]
    fn set_operations_agree_with_a_plain_set(
        a in prop::collection::btree_set(0u32..64, 0..64),
        b in prop::collection::btree_set(0u32..64, 0..64),
    ) {
        let both: BTreeSet<u32> = a.intersection(&b).copied().collect();
        let only: BTreeSet<u32> = a.difference(&b).copied().collect();
        let (a, b) = (list(a), list(b));
        prop_assert_eq!(a.intersection(&b), list(both));
        prop_assert_eq!(a.difference(&b), list(only));
    }
}

#[test]
fn the_kernels_forms_are_read() {
    for (text, expected) in [
        ("", vec![]),
        ("\n", vec![]),
        ("0\n", vec![0]),
        ("0-3,8,10-11\n", vec![0, 1, 2, 3, 8, 10, 11]),
        ("7,0-1", vec![0, 1, 7]),
    ] {
        assert_eq!(text.parse::<CpuList>(), Ok(list(expected)), "{text:?}");
    }
}

#[test]
fn what_is_not_a_list_is_refused_with_the_part_that_is_wrong() {
    let not_a_number = |part: &str| ListError::NotANumber { part: part.into() };
    for (text, error) in [
        ("0-3,,5", not_a_number("")),
        ("+1", not_a_number("+1")),
        ("-1", not_a_number("-1")),
        ("1 2", not_a_number("1 2")),
        ("0-31:1/2", not_a_number("0-31:1/2")),
        ("5-2", ListError::Reversed { part: "5-2".into() }),
        ("65536", ListError::TooLarge { part: "65536".into() }),
        ("0-99999999999", ListError::TooLarge { part: "0-99999999999".into() }),
    ] {
        assert_eq!(text.parse::<CpuList>(), Err(error), "{text:?}");
    }
}

fn nodes(numbers: impl IntoIterator<Item = u32>) -> NodeList {
    numbers.into_iter().map(NodeId::new).collect()
}

#[test]
fn nodes_are_read_as_numactl_writes_them() {
    let allowed = nodes([0, 2, 3, 7]);
    for (text, expected) in [
        ("0", vec![0]),
        ("0,2-3", vec![0, 2, 3]),
        ("0-7", vec![0, 2, 3, 7]),
        ("all", vec![0, 2, 3, 7]),
        ("!2", vec![0, 3, 7]),
        ("!0-3", vec![7]),
        ("+0", vec![0]),
        ("+1-2", vec![2, 3]),
        ("+0,3", vec![0, 7]),
        ("!+0", vec![2, 3, 7]),
        (" 3 ", vec![3]),
    ] {
        assert_eq!(NodeList::parse(text, &allowed), Ok(nodes(expected)), "{text:?}");
    }
}

#[test]
fn what_names_no_node_or_one_that_is_not_there_is_refused_with_the_choice() {
    let allowed = nodes([0, 2]);
    for text in ["", "!", "+", "!all", "!0-2", "1", "0-3", "+2", "+all", "all,", "a", "0;2", "2-0"]
    {
        let error = NodeList::parse(text, &allowed).expect_err(text);
        assert!(!error.to_string().is_empty());
    }
    // To numactl `010` is 8, `0x1` is 1, and `08` is no number.
    for part in ["010", "00", "08", "0x1", "0-010", "01-02"] {
        for text in [part.to_owned(), format!("!{part}"), format!("0,{part}"), format!("+{part}")] {
            let error = NodeList::parse(&text, &nodes(0..32)).expect_err(&text);
            assert_eq!(error, ListError::LeadingZero { part: part.into() }, "{text}");
        }
    }
    let error = NodeList::parse("010", &allowed).expect_err("octal?");
    assert!(error.to_string().contains("numactl reads as octal"), "{error}");
    // The kernel's own lists are decimal, zeros or not (lib/bitmap-str.c, `bitmap_getnum`).
    assert_eq!("010".parse::<NodeList>(), Ok(nodes([10])));
    let error = NodeList::parse("1", &allowed).expect_err("not there");
    assert_eq!(error.to_string(), "`1` names a node that is not there: choose from 0,2");
    let error = NodeList::parse("+2", &allowed).expect_err("only two");
    assert!(error.to_string().contains("beyond the 2 nodes 0,2"), "{error}");
}

proptest! {
    #[test]
    fn a_list_and_its_inverse_are_all_nodes_and_share_none(
        allowed in prop::collection::btree_set(0u32..64, 1..20),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 1..8),
        relative in any::<bool>(),
    ) {
        let numbers: Vec<u32> = allowed.iter().copied().collect();
        let chosen: BTreeSet<usize> = picks.iter().map(|p| p.index(numbers.len())).collect();
        let expected = nodes(chosen.iter().map(|&i| numbers[i]));
        let allowed = nodes(allowed);
        let parts: Vec<String> = chosen
            .iter()
            .map(|&i| if relative { i.to_string() } else { numbers[i].to_string() })
            .collect();
        let text = format!("{}{}", if relative { "+" } else { "" }, parts.join(","));
        let named = NodeList::parse(&text, &allowed);
        prop_assert_eq!(named.as_ref(), Ok(&expected), "{}", text);
        match NodeList::parse(&format!("!{text}"), &allowed) {
            Ok(others) => {
                prop_assert!(others.intersection(&expected).is_empty());
                prop_assert_eq!(others.len() + expected.len(), allowed.len());
            }
            Err(error) => {
                let is_empty = matches!(error, ListError::Empty { .. });
                prop_assert!(is_empty);
                prop_assert_eq!(&expected, &allowed);
            }
        }
        // What the kernel prints is a list of nodes too.
        prop_assert_eq!(NodeList::parse(&expected.to_string(), &expected), Ok(expected));
    }

    #[test]
    fn any_text_is_a_node_list_or_refused_without_panic(text in "[0-9,!+al -]{0,20}") {
        let allowed = nodes([0, 1, 5]);
        if let Ok(named) = NodeList::parse(&text, &allowed) {
            prop_assert!(!named.is_empty() && named.difference(&allowed).is_empty());
        }
    }
}
