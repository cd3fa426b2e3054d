//! Which parts of files and shared memory have been looked at, so that what several mappings
//! have in common is moved once and counted once.
//!
//! Bounded: where the parts are too many and too scattered, new ones are not remembered any
//! more, and [`Seen::is_full`] says so.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Parts that are remembered, about 3 MiB.
const MOST: usize = 1 << 16;

/// A mapped object: its device and inode.
pub(super) type Object = ((u32, u32), u64);

/// Parts of objects, in bytes from their beginnings.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Disjoint parts that do not touch: start and end.
    parts: HashMap<Object, BTreeMap<u64, u64>>,
    count: usize,
    full: bool,
}

impl Seen {
    /// Whether parts had to be forgotten.
    pub(super) fn is_full(&self) -> bool {
        self.full
    }

    /// Adds a part; gives those of it to `new` that were not there, ascending.
    pub(super) fn add(
        &mut self,
        object: Object,
        part: Range<u64>,
        mut new: impl FnMut(Range<u64>),
    ) {
        let parts = self.parts.entry(object).or_default();
        let mut joined = part.clone();
        let mut at = part.start;
        // Those that overlap or touch it; they are disjoint, so their ends ascend too.
        let first = parts.range(..=part.start).next_back().map_or(part.start, |(s, _)| *s);
        let near = parts.range(first..=part.end).filter(|(_, e)| **e >= part.start);
        let near: Vec<(u64, u64)> = near.map(|(s, e)| (*s, *e)).collect();
        for &(start, end) in &near {
            if start > at {
                new(at..start.min(part.end));
            }
            at = at.max(end);
            joined = joined.start.min(start)..joined.end.max(end);
        }
        if at < part.end {
            new(at..part.end);
        }
        if near.is_empty() && self.count >= MOST {
            self.full = true;
            return;
        }
        for (start, _) in &near {
            parts.remove(start);
        }
        parts.insert(joined.start, joined.end);
        self.count = self.count + 1 - near.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_byte_is_new_exactly_once(
            parts in proptest::collection::vec((0u64..100, 1u64..30, 0u64..2), 1..60)
        ) {
            let mut seen = Seen::default();
            let mut plain = std::collections::HashSet::new();
            for (start, len, inode) in parts {
                let mut new = Vec::new();
                seen.add(((0, 1), inode), start..start + len, |r| new.extend(r));
                let expected: Vec<u64> =
                    (start..start + len).filter(|b| plain.insert((inode, *b))).collect();
                prop_assert_eq!(new, expected);
            }
            let kept: usize = seen.parts.values().map(BTreeMap::len).sum();
            prop_assert_eq!(kept, seen.count);
        }
    }

    #[test]
    fn what_is_too_scattered_is_forgotten_and_said() {
        let mut seen = Seen::default();
        let mut news = 0;
        for _ in 0..2 {
            for i in 0..MOST as u64 + 10 {
                seen.add(((0, 1), 1), i * 2..i * 2 + 1, |_| news += 1);
            }
        }
        assert!(seen.is_full() && seen.count == MOST);
        assert_eq!(news, MOST + 20);
    }
}
