//! Sizes and ranges.

use serde::Serialize;
use std::ops::Range;

/// Size of a huge folio, in bytes: what a page-middle entry maps with 4 KiB pages.
pub const HUGE: usize = 2 << 20;

/// The two kinds of folio that are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FolioSize {
    /// One base page (4 KiB).
    Base,
    /// One huge page (2 MiB).
    Huge,
}

impl FolioSize {
    /// Bytes of one folio.
    pub fn bytes(self) -> usize {
        match self {
            Self::Base => pageferry_sys::page_size(),
            Self::Huge => HUGE,
        }
    }
}

/// The 2 MiB blocks that `range` touches.
pub(crate) fn blocks_around(range: &Range<usize>) -> Range<usize> {
    (range.start & !(HUGE - 1))..range.end.next_multiple_of(HUGE)
}

pub(crate) fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Sorts ranges and joins those that touch or overlap.
pub(crate) fn normalize(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_by_key(|r| r.start);
    let mut out: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn normalized_ranges_cover_the_same_pages_once(
            raw in proptest::collection::vec((0usize..200, 1usize..20), 0..30)
        ) {
            let ranges: Vec<_> = raw.iter().map(|&(s, n)| s..s + n).collect();
            let joined = normalize(ranges.clone());
            for page in 0..240 {
                let before = ranges.iter().any(|r| r.contains(&page));
                let after = joined.iter().filter(|r| r.contains(&page)).count();
                prop_assert_eq!(usize::from(before), after);
            }
            prop_assert!(joined.windows(2).all(|w| w[0].end < w[1].start));
        }
    }
}
