//! Looking at a move from outside: which pages are there, in which folios, in which frames.
//!
//! The engine's own report is not asked alone: `PAGEMAP_SCAN` says before and after a move which
//! pages are huge, and `/proc/self/pagemap`, to those who may see them, the frames behind some of
//! them. Both are read between moves, by number: no system call here reads or writes the region.

use anyhow::Context as _;
use pageferry::{FolioSize, Outcome, Region, Report};
use pageferry_sys::pagemap::{Categories, Entry, Pagemap, Run};
use pageferry_sys::{Linux, Sys};
use serde::Serialize;
use std::ops::Range;

/// Pages whose physical addresses are looked at, evenly over the region.
const SAMPLES: usize = 1024;

/// What was seen of moves, summed over those that were looked at.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Frames {
    /// Moves looked at.
    pub(super) moves: u64,
    /// Pages looked at before and after a move.
    pub(super) sampled: u64,
    /// Of those, pages with another physical address afterwards.
    pub(super) changed: u64,
    /// The kernel does not show physical addresses to this user.
    pub(super) hidden: bool,
    /// Base pages.
    pub(super) base: Seen,
    /// Huge pages.
    pub(super) huge: Seen,
}

/// What was seen of the folios of one size.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Seen {
    /// Bytes that were there before a move.
    pub(super) present_bytes: u64,
    /// Of those, bytes that were moved and are in folios of this size afterwards too.
    pub(super) moved_bytes: u64,
    /// Pages whose physical addresses were looked at before and after a move.
    pub(super) sampled: u64,
    /// Of those, pages with another physical address afterwards.
    pub(super) changed: u64,
}

/// The region at one moment.
#[derive(Debug)]
pub(super) struct Look {
    base: Vec<Range<usize>>,
    huge: Vec<Range<usize>>,
    /// Frame numbers by address; `None` where the kernel hides them.
    frames: Option<Vec<(usize, Option<u64>)>>,
}

impl Look {
    pub(super) fn at(region: &Region) -> anyhow::Result<Self> {
        let pagemap = Pagemap::open().context("cannot open /proc/self/pagemap")?;
        let mut look = Self { base: Vec::new(), huge: Vec::new(), frames: None };
        look.folios(region, &pagemap).context("cannot scan /proc/self/pagemap")?;
        look.frames = frames(region, &pagemap);
        Ok(look)
    }

    fn folios(&mut self, region: &Region, map: &Pagemap) -> Result<(), pageferry_sys::Errno> {
        let Range { start: mut at, end } = region.addresses();
        let mut runs = [Run::EMPTY; 256];
        let want = Categories::PRESENT;
        let tell = want | Categories::HUGE | Categories::PFN_ZERO;
        while at < end {
            let (count, ended) = Linux.scan(map, at, end, want, tell, &mut runs)?;
            for run in &runs[..count] {
                let address = |v: u64| usize::try_from(v).unwrap_or(end).min(end);
                let range = address(run.start)..address(run.end);
                match run.categories() {
                    // The shared zero page is nothing that could move.
                    c if c.contains(Categories::PFN_ZERO) => {}
                    c if c.contains(Categories::HUGE) => self.huge.push(range),
                    _ => self.base.push(range),
                }
            }
            if ended <= at {
                break;
            }
            at = ended;
        }
        Ok(())
    }

    /// Where folios of a size are, ascending.
    pub(super) fn of(&self, size: FolioSize) -> &[Range<usize>] {
        match size {
            FolioSize::Base => &self.base,
            FolioSize::Huge => &self.huge,
        }
    }
}

impl Frames {
    /// Adds a move, of which `report` tells, with the looks before and after it.
    pub(super) fn add(&mut self, before: &Look, after: &Look, report: &Report) {
        self.moves += 1;
        let moved = report.pages.iter().filter(|(_, outcome)| *outcome == Outcome::Moved);
        let moved: Vec<_> = moved.map(|(range, _)| range.clone()).collect();
        for (size, seen) in [(FolioSize::Base, &mut self.base), (FolioSize::Huge, &mut self.huge)] {
            seen.present_bytes += bytes(before.of(size));
            seen.moved_bytes += bytes(&common(&common(before.of(size), &moved), after.of(size)));
        }
        let (Some(old), Some(new)) = (&before.frames, &after.frames) else {
            self.hidden = true;
            return;
        };
        for ((address, old), (_, new)) in old.iter().zip(new) {
            let (Some(old), Some(new)) = (old, new) else { continue };
            let changed = u64::from(old != new);
            self.sampled += 1;
            self.changed += changed;
            let is_huge = before.huge.binary_search_by(|range| order(range, *address)).is_ok();
            let seen = if is_huge { &mut self.huge } else { &mut self.base };
            seen.sampled += 1;
            seen.changed += changed;
        }
    }
}

/// Where a range lies, seen from an address.
fn order(range: &Range<usize>, address: usize) -> std::cmp::Ordering {
    if range.contains(&address) { std::cmp::Ordering::Equal } else { range.start.cmp(&address) }
}

fn bytes(ranges: &[Range<usize>]) -> u64 {
    ranges.iter().map(|range| range.len() as u64).sum()
}

/// What lies in both; each is ascending and without overlaps.
fn common(a: &[Range<usize>], b: &[Range<usize>]) -> Vec<Range<usize>> {
    let (mut i, mut j, mut out) = (0, 0, Vec::new());
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let both = x.start.max(y.start)..x.end.min(y.end);
        if !both.is_empty() {
            out.push(both);
        }
        if x.end <= y.end { i += 1 } else { j += 1 }
    }
    out
}

/// Frame numbers of pages spread over the region, by address; `None` where the kernel hides them.
fn frames(region: &Region, pagemap: &Pagemap) -> Option<Vec<(usize, Option<u64>)>> {
    let page = pageferry_sys::page_size();
    let pages = region.len() / page;
    let step = (pages / SAMPLES).max(1);
    let mut present = false;
    let mut frames = Vec::with_capacity(SAMPLES + 1);
    for index in (0..pages).step_by(step) {
        let mut entry = [Entry(0)];
        let address = region.addr() + index * page;
        pagemap.entries(address, &mut entry).ok()?;
        present |= entry[0].present();
        frames.push((address, entry[0].pfn()));
    }
    // Hidden numbers read as zero, for all pages that are there.
    (!present || frames.iter().any(|(_, frame)| frame.is_some())).then_some(frames)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_common_to_two_lists_is_found_wherever_they_overlap() {
        let a = [0..10, 20..30, 40..50];
        let b = [5..25, 28..29, 50..60];
        assert_eq!(common(&a, &b), [5..10, 20..25, 28..29]);
        assert_eq!(common(&b, &a), common(&a, &b));
        assert!(common(&a, &[]).is_empty());
        assert_eq!(bytes(&common(&a, &a)), 30);
    }

    #[test]
    fn an_address_is_found_in_its_range() {
        let ranges = [10..20, 30..40];
        let find = |address| ranges.binary_search_by(|r| order(r, address)).ok();
        assert_eq!(
            [9, 10, 19, 20, 39, 40].map(find),
            [None, Some(0), Some(0), None, Some(1), None]
        );
    }
}
