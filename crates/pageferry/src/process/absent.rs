//! What is neither present nor empty: which of it was swapped out, and which is a marker or on its way.
//!
//! The page map calls everything swapped that stands in a page table and is no page: markers of guard
//! regions and of a userfaultfd's write protection too, which there are without any swap. So entries
//! are looked at one by one ([`Absent`]). Of those whose kind the kernel does not tell (without
//! `CAP_SYS_ADMIN`) no more than what it counts as swapped of the process (`VmSwap`) is believed to be.
//!
//! What can go wrong: `VmSwap` is of the whole process. Where only a part of it is looked at, and the
//! kernel tells no kinds, markers there may pass for what is swapped elsewhere.

use super::piece::PIECE_PAGES;
use super::select::Kind;
use pageferry_sys::pagemap::{Absent, Entry};
use pageferry_sys::process::ProcessView;
use pageferry_sys::{Errno, page_size};
use std::ops::Range;

/// Bytes by kind.
pub(super) type ByKind = Vec<(Kind, u64)>;

fn add(sums: &mut ByKind, kind: Kind, bytes: u64) {
    match sums.iter_mut().find(|(known, _)| *known == kind) {
        Some((_, sum)) => *sum += bytes,
        None => sums.push((kind, bytes)),
    }
}

/// The sums of what was looked at.
#[derive(Debug, Default)]
pub(super) struct Absents {
    /// Bytes swapped out.
    pub(super) swapped: ByKind,
    /// Bytes that look so and are not: markers, pages on their way.
    pub(super) markers: u64,
    /// Of this process known to be swapped out, and what may be.
    known: u64,
    untold: ByKind,
    entries: Vec<Entry>,
}

impl Absents {
    /// Looks at a range of which the page map says swapped.
    pub(super) fn look(
        &mut self,
        view: &dyn ProcessView,
        kind: Kind,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        let page = page_size();
        let mut at = range.start;
        while at < range.end {
            self.entries.resize(((range.end - at) / page).clamp(1, PIECE_PAGES), Entry(0));
            view.entries(at, &mut self.entries)?;
            at += self.entries.len() * page;
            let count = |absent| {
                let alike = self.entries.iter().filter(|e| e.absent() == Some(absent)).count();
                (alike * page) as u64
            };
            let [swapped, markers, untold] =
                [Absent::Swapped, Absent::Marker, Absent::Untold].map(count);
            if swapped > 0 {
                add(&mut self.swapped, kind, swapped);
            }
            if untold > 0 {
                add(&mut self.untold, kind, untold);
            }
            self.known += swapped;
            self.markers += markers;
        }
        Ok(())
    }

    /// The process has been looked at.
    pub(super) fn close(&mut self, view: &dyn ProcessView) {
        let known = std::mem::take(&mut self.known);
        if self.untold.is_empty() {
            return;
        }
        // Of a process that has ended nothing is swapped out.
        let counted = view.status().map_or(0, |status| status.swapped);
        let mut left = counted.saturating_sub(known);
        // Private memory first: of other memory only private copies are in swap entries.
        self.untold.sort_unstable();
        for (kind, bytes) in std::mem::take(&mut self.untold) {
            let swapped = bytes.min(left);
            left -= swapped;
            self.markers += bytes - swapped;
            if swapped > 0 {
                add(&mut self.swapped, kind, swapped);
            }
        }
    }
}
