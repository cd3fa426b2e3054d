//! The list format: what the kernel prints is read, and written back the same.

use std::collections::BTreeSet;

use pageferry_topology::{CpuId, CpuList, Id, ListError};
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
