//! Pages that were there and of which the kernel now says that they are not (`ENOENT`).
//!
//! That has several reasons, and `move_pages(2)` does not tell them apart (mm/migrate.c: whatever
//! `folio_walk_start` finds no folio for): the program gave the page back; it was swapped out; or
//! somebody else (compaction, another mover) is migrating it at this moment, and a migration entry
//! stands in the page table. The last comes back, and is on its old node perhaps.
//!
//! The page map tells more. Nothing there, or a marker (of a guard region, of a userfaultfd): the page
//! is gone. Swapped: swapped out or migrating, as both are no present entries (fs/proc/task_mmu.c:
//! `pte_to_pagemap_entry`, `pagemap_page_category`); who may not see which is told so of markers, too.
//! So what is swapped is tried again as busy pages are; what is still so after the last try, some
//! hundred milliseconds later, is swapped out, if anything of the process is (`VmSwap`).
//!
//! What always holds: what is not known to be gone is not called so.
//!
//! What can go wrong: a page that somebody migrates each time that it is asked for counts as
//! swapped out where others are; [`Note::SwappedOut`] says both.

use super::mover::{Item, Mover};
use super::notes::Note;
use super::select::Kind;
use super::targets::Process;
use crate::report::{Busy, Outcome};
use pageferry_sys::pagemap::{Absent, Categories, Entry, Run};
use pageferry_sys::process::ProcessView;
use pageferry_sys::{Errno, page_size};

/// One scan covers this much at most, as those of the walk do, or one page if that is larger.
const WINDOW: usize = 64 << 20;
/// Runs of one scan.
const RUNS: usize = 256;

/// What the page map says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// Swapped out.
    SwappedOut,
    /// That, or migrating, or a marker.
    Swapped,
    /// A page, or nobody knows.
    Present,
}

/// A look at the page map; its buffers.
#[derive(Debug, Default)]
pub(super) struct PageMap {
    runs: Vec<Run>,
    /// Of each page.
    found: Vec<Found>,
    entries: Vec<Entry>,
}

impl Mover<'_> {
    /// Settles what is gone of the pages that are missing, and keeps the others to be tried again.
    pub(super) fn clear_missing(&mut self, process: &Process, tries: u32) {
        if self.missing.is_empty() {
            return;
        }
        let mut missing = std::mem::take(&mut self.missing);
        missing.sort_unstable_by_key(|item| item.address);
        // If it fails they count as present.
        let view = &*process.view;
        let looked = self.page_map.look(view, &missing);
        let ended = looked.is_err_and(|errno| process.ended_by(errno));
        // The page map is that of the program that was there before.
        let left_behind = !ended && process.is_another();
        let last = tries >= self.job.retries;
        // Asked for once only, it may as well be migrating.
        let any_swapped = last && tries > 0 && view.status().is_ok_and(|status| status.swapped > 0);
        for index in 0..missing.len() {
            let item = missing[index];
            let outcome = match self.page_map.found[index] {
                _ if ended => Outcome::Exited,
                _ if left_behind => Outcome::Gone,
                Found::Nothing => Outcome::Gone,
                _ if !last => {
                    self.failed.push((item, Errno(libc::ENOENT)));
                    continue;
                }
                found if found == Found::SwappedOut || found == Found::Swapped && any_swapped => {
                    self.tally.notes.add(Note::SwappedOut { bytes: item.page_bytes as u64 });
                    Outcome::NotPresent
                }
                _ => Outcome::Busy(Busy::Contended),
            };
            self.lost |= outcome == Outcome::Gone;
            self.settle(process, &missing[index..=index], outcome);
        }
        missing.clear();
        self.missing = missing;
    }
}

impl PageMap {
    /// Looks up pages, whose addresses ascend.
    fn look(&mut self, view: &dyn ProcessView, items: &[Item]) -> Result<(), Errno> {
        self.found.clear();
        self.found.resize(items.len(), Found::Present);
        self.runs.resize(RUNS, Run::EMPTY);
        let wanted = Categories::PRESENT | Categories::SWAPPED;
        let mut at = 0;
        while let Some(first) = items.get(at) {
            let start = first.address;
            let near = |item: &Item| item.address + item.page_bytes - start <= WINDOW;
            let count = items[at..].partition_point(near).max(1);
            let last = items[at + count - 1];
            let end = last.address + last.page_bytes;
            let (told, reached) = match view.scan(start, end, wanted, wanted, &mut self.runs) {
                Err(Errno(libc::ENOTTY)) => return self.look_at_entries(view, items),
                told => told?,
            };
            let mut runs = &self.runs[..told];
            for item in &items[at..at + count] {
                let (from, to) = (item.address as u64, (item.address + item.page_bytes) as u64);
                // What was scanned in part only is scanned again; never stand still.
                if item.address + item.page_bytes > reached && item.address > start {
                    break;
                }
                while let [run, rest @ ..] = runs
                    && run.end <= from
                {
                    runs = rest;
                }
                // Of a huge page that was split meanwhile parts may be there.
                let here = runs.iter().take_while(|run| run.start < to);
                let all = here.fold(Categories::empty(), |all, run| all | run.categories());
                self.found[at] = match all {
                    all if all.contains(Categories::PRESENT) => Found::Present,
                    all if all.contains(Categories::SWAPPED) => {
                        swapped(view, item, &mut self.entries)?
                    }
                    _ => Found::Nothing,
                };
                at += 1;
            }
        }
        Ok(())
    }

    /// The same for kernels that do not have `PAGEMAP_SCAN`.
    fn look_at_entries(&mut self, view: &dyn ProcessView, items: &[Item]) -> Result<(), Errno> {
        for (item, found) in items.iter().zip(&mut self.found) {
            let mut entry = [Entry(0)];
            view.entries(item.address, &mut entry)?;
            *found = match entry[0] {
                entry if entry.present() => Found::Present,
                entry if entry.swapped() => of_absent(entry.absent()),
                // A hugetlb page that is migrating has an empty entry (`pagemap_hugetlb_range`).
                _ if item.kind == Kind::Hugetlb => Found::Swapped,
                _ => Found::Nothing,
            };
        }
        Ok(())
    }
}

/// What stands there, as far as it is told.
fn of_absent(absent: Option<Absent>) -> Found {
    match absent {
        Some(Absent::Marker) => Found::Nothing,
        Some(Absent::Swapped) => Found::SwappedOut,
        // None by now: it is on its way.
        Some(Absent::Untold) | None => Found::Swapped,
    }
}

/// What a scan calls swapped of a page's range: a marker only if there is nothing else.
fn swapped(view: &dyn ProcessView, item: &Item, entries: &mut Vec<Entry>) -> Result<Found, Errno> {
    // Of hugetlb pages entries tell less than scans do.
    if item.kind == Kind::Hugetlb {
        return Ok(Found::Swapped);
    }
    entries.resize(item.page_bytes / page_size(), Entry(0));
    view.entries(item.address, entries)?;
    let absents = || entries.iter().filter_map(|entry| entry.absent());
    let other = absents().find(|absent| *absent != Absent::Marker);
    Ok(of_absent(other.or_else(|| absents().next())))
}
