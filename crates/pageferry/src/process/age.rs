//! A minimum age: only pages that were not used for a while, by the kernel's idle page tracking.
//!
//! How: before the move all pages that it would move are marked idle. Then it waits. The walk that
//! follows finds them again, and those that are not idle any more, or never could be marked, stay:
//! [`Outcome::Young`].
//!
//! What always holds:
//! - Nothing is remembered for a page: the kernel holds the marks, and memory does not grow with
//!   the processes.
//! - A page without idle information (hugetlb, just faulted in, on its way into the kernel's lists)
//!   counts as young: in doubt it stays.
//! - A folio of several frames is as old as its youngest page; its first frame has the mark.
//!
//! What can go wrong: between look and move a page may be used. The marks are the machine's, not
//! ours; see [`pageferry_sys::idle`]. If they cannot be set or read for some pages, these stay, and
//! a [`Note::AgeUnknown`] says so.

use super::control::Stage;
use super::job::{Job, Telling};
use super::mover::{Item, Mover};
use super::notes::{Note, Notes};
use super::piece::Piece;
use super::targets::Process;
use super::walk::Walk;
use crate::report::Outcome;
use crate::sync::Mutex;
use pageferry_sys::idle::{FRAMES_OF_WORD, FrameFlags, IdlePages};
use pageferry_sys::pagemap::Entry;
use pageferry_sys::process::ProcessView;
use pageferry_sys::{Errno, page_size};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Entries, flags or words read with one call: a page of each.
const AT_ONCE: u64 = 512;
/// Up to so many that are not wanted are read along, rather than call twice: a call costs what some
/// tens of entries cost.
const GAP: u64 = 32;
/// The largest folio, 1 GiB of 4 KiB pages, is of this order.
const MAX_ORDER: u32 = 18;
/// The longest sleep before a look at whether the move was cancelled.
const NAP: Duration = Duration::from_millis(50);

/// What a move with a minimum age needs besides.
#[derive(Debug)]
pub(super) struct Age {
    pub(super) pages: Arc<dyn IdlePages>,
    pub(super) least: Duration,
    /// The walk that marks; none once it has.
    pub(super) walk: Mutex<Option<Walk>>,
}

impl Job {
    /// Marks the pages that would move, and waits until those that stay idle are old enough.
    pub(super) fn let_age(&self) -> Notes {
        let mut notes = Notes::default();
        let Some(age) = &self.age else { return notes };
        let mut telling = Telling::new();
        if let Some(mut walk) = age.walk.lock().take() {
            *self.control.stage.lock() = Stage::Marking;
            let mut mover = Mover::new(self);
            while !self.control.is_cancelled() && walk.find() {
                // Relaxed: numbers for display.
                self.control.total.store(walk.resident, Ordering::Relaxed);
                while !self.control.is_cancelled()
                    && let Some(piece) = walk.next_piece()
                {
                    self.control.looked_at.fetch_add(piece.bytes as u64, Ordering::Relaxed);
                    if let Err(note) = mover.mark(&*age.pages, &piece) {
                        notes.add(note);
                    }
                    telling.tell(self);
                }
            }
            self.control.looked_at.store(0, Ordering::Relaxed);
            // The move finds out everything else by itself.
            notes.all(walk.notes.list.into_iter().filter(|n| matches!(n, Note::Exited { .. })));
        }
        // From the last mark on.
        let until = self.kernel.now() + age.least;
        while !self.control.is_cancelled() {
            let left = until.saturating_sub(self.kernel.now());
            if left.is_zero() {
                break;
            }
            *self.control.stage.lock() = Stage::Waiting { left, of: age.least };
            telling.tell(self);
            self.kernel.sleep(left.min(NAP));
        }
        notes
    }
}

impl Mover<'_> {
    /// Marks the pages of a piece that would move. What cannot be looked at now is found out about
    /// by the move, and so is what becomes of all the others.
    fn mark(&mut self, pages: &dyn IdlePages, piece: &Piece) -> Result<(), Note> {
        let process = &piece.process;
        if process.is_gone() || self.ask(piece).is_err() {
            return Ok(());
        }
        self.pick(piece);
        self.missing.clear();
        let mut result = Ok(());
        for items in &mut self.picked {
            if let Err(errno) = self.look.mark(pages, &*process.view, items)
                && !process.ended_by(errno)
            {
                result = Err(Note::AgeUnknown { pid: process.pid, errno: errno.0 });
            }
            items.clear();
        }
        result
    }

    /// Settles those of the pages that are too young, and takes them out.
    pub(super) fn leave_young(&mut self, process: &Process, items: &mut Vec<Item>) {
        let Some(age) = &self.job.age else { return };
        let looked = self.look.find_idle(&*age.pages, &*process.view, items);
        if let Err(errno) = looked {
            if process.ended_by(errno) {
                self.settle(process, items, Outcome::Exited);
                return items.clear();
            }
            let pid = process.pid;
            self.tally.notes.add(Note::AgeUnknown { pid, errno: errno.0 });
        }
        let mut idle = self.look.idle.iter();
        items.retain(|item| {
            let is_old = idle.next().is_some_and(|idle| *idle);
            if !is_old {
                let Item { address, page_bytes, kind, .. } = *item;
                self.tally.page(process.pid, kind, address, page_bytes, Outcome::Young);
            }
            is_old
        });
    }
}

/// A look at the idleness of pages; its buffers.
#[derive(Debug, Default)]
pub(super) struct Look {
    entries: Vec<Entry>,
    /// First frames of the pages' folios, ascending, each with the index of its page.
    frames: Vec<(u64, usize)>,
    words: Vec<u64>,
    /// Whether each page is idle.
    idle: Vec<bool>,
}

impl Look {
    fn mark(
        &mut self,
        pages: &dyn IdlePages,
        view: &dyn ProcessView,
        items: &[Item],
    ) -> Result<(), Errno> {
        self.find_frames(view, items)?;
        self.find_heads(pages)?;
        let mut done = 0;
        while let Some(stretch) = self.next_words(done) {
            done = stretch.end;
            let first = self.take_words(&stretch, |frame| frame / FRAMES_OF_WORD);
            self.words.fill(0);
            for (frame, _) in &self.frames[stretch] {
                let word = usize::try_from(frame / FRAMES_OF_WORD - first).unwrap_or(usize::MAX);
                self.words[word] |= 1 << (frame % FRAMES_OF_WORD);
            }
            match pages.mark(first, &self.words) {
                // Beyond all memory, as a device's is: it has no idle information.
                Ok(()) | Err(Errno(libc::ENXIO)) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Finds out which of the pages are idle; after an error, which are known to be.
    fn find_idle(
        &mut self,
        pages: &dyn IdlePages,
        view: &dyn ProcessView,
        items: &[Item],
    ) -> Result<(), Errno> {
        self.idle.clear();
        self.idle.resize(items.len(), false);
        self.find_frames(view, items)?;
        self.find_heads(pages)?;
        let mut done = 0;
        while let Some(stretch) = self.next_words(done) {
            done = stretch.end;
            let first = self.take_words(&stretch, |frame| frame / FRAMES_OF_WORD);
            pages.read(first, &mut self.words)?;
            for &(frame, index) in &self.frames[stretch] {
                let word = usize::try_from(frame / FRAMES_OF_WORD - first).unwrap_or(usize::MAX);
                self.idle[index] = self.words[word] >> (frame % FRAMES_OF_WORD) & 1 != 0;
            }
        }
        Ok(())
    }

    /// The frames from this index on whose words of the bitmap are neighbours.
    fn next_words(&self, from: usize) -> Option<Range<usize>> {
        stretch(from..self.frames.len(), |index| self.frames[index].0 / FRAMES_OF_WORD, 1)
    }

    /// Makes room for a word for each number of a stretch; returns the first number.
    fn take_words(&mut self, stretch: &Range<usize>, number: impl Fn(u64) -> u64) -> u64 {
        let (first, last) = (self.frames[stretch.start].0, self.frames[stretch.end - 1].0);
        let count = number(last) - number(first) + 1;
        self.words.resize(usize::try_from(count).unwrap_or(usize::MAX), 0);
        number(first)
    }

    /// The frames of the pages, as far as they are told. Addresses ascend.
    fn find_frames(&mut self, view: &dyn ProcessView, items: &[Item]) -> Result<(), Errno> {
        self.frames.clear();
        let page = |index: usize| (items[index].address / page_size()) as u64;
        let mut done = 0;
        while let Some(stretch) = stretch(done..items.len(), page, GAP) {
            done = stretch.end;
            let start = items[stretch.start].address;
            let count = (items[stretch.end - 1].address - start) / page_size() + 1;
            self.entries.resize(count, Entry(0));
            view.entries(start, &mut self.entries)?;
            for index in stretch {
                let entry = self.entries[(items[index].address - start) / page_size()];
                self.frames.extend(entry.pfn().map(|frame| (frame, index)));
            }
        }
        self.frames.sort_unstable();
        Ok(())
    }

    /// Replaces frames by the first ones of their folios. They still ascend then.
    fn find_heads(&mut self, pages: &dyn IdlePages) -> Result<(), Errno> {
        let mut done = 0;
        while let Some(stretch) =
            stretch(done..self.frames.len(), |index| self.frames[index].0, GAP)
        {
            done = stretch.end;
            let first = self.take_words(&stretch, |frame| frame);
            pages.flags(first, &mut self.words)?;
            let mut head = None;
            let mut wanted = self.frames[stretch].iter_mut().peekable();
            for (frame, flags) in (first..).zip(&self.words) {
                let is = FrameFlags::from_bits_truncate(*flags);
                let is_tail = is.contains(FrameFlags::COMPOUND_TAIL);
                if !is_tail {
                    head = is.contains(FrameFlags::COMPOUND_HEAD).then_some(frame);
                }
                while let Some((found, _)) = wanted.next_if(|(wanted, _)| *wanted == frame) {
                    if is_tail && head.is_none() {
                        head = head_of(pages, frame)?;
                    }
                    // Without a head it is left as it is, and its bit is never set.
                    *found = head.unwrap_or(frame);
                }
            }
        }
        Ok(())
    }
}

/// The first frame of the folio that this one, which is not it, belongs to: the nearest one below
/// that begins a folio and is aligned well enough.
fn head_of(pages: &dyn IdlePages, frame: u64) -> Result<Option<u64>, Errno> {
    let mut last = frame;
    for order in 1..=MAX_ORDER {
        let below = frame >> order << order;
        if below == last {
            continue;
        }
        last = below;
        let mut flags = [0];
        pages.flags(below, &mut flags)?;
        let is = FrameFlags::from_bits_truncate(flags[0]);
        if !is.contains(FrameFlags::COMPOUND_TAIL) {
            return Ok(is.contains(FrameFlags::COMPOUND_HEAD).then_some(below));
        }
    }
    Ok(None)
}

/// The longest stretch at the beginning of a range of indices whose numbers, which ascend, are at
/// most `gap` apart from one to the next, and less than [`AT_ONCE`] from first to last. `None`: the
/// range is empty.
fn stretch(range: Range<usize>, number: impl Fn(usize) -> u64, gap: u64) -> Option<Range<usize>> {
    let start = range.start;
    let first = number(range.clone().next()?);
    let (mut end, mut last) = (start + 1, first);
    while end < range.end {
        let next = number(end);
        if next - last > gap || next - first >= AT_ONCE {
            break;
        }
        (end, last) = (end + 1, next);
    }
    Some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_sys::process::ProcessKernel;
    use pageferry_sys::process::fake::{FakeKernel, FakeProcess, FakeVma, ProcessOp};

    #[test]
    fn frames_are_cut_where_gaps_are_wide_and_stretches_long() {
        let all = |numbers: &[u64], gap| {
            let mut found = Vec::new();
            let mut done = 0;
            while let Some(next) = stretch(done..numbers.len(), |i| numbers[i], gap) {
                done = next.end;
                found.push(next);
            }
            found
        };
        assert_eq!(all(&[5, 5, 9, 42, 100, 101], 33), [0..4, 4..6]);
        assert_eq!(all(&[], 1), []);
        assert_eq!(all(&(0..1000).collect::<Vec<_>>(), 1), [0..512, 512..1000]);
    }

    #[test]
    fn the_head_of_a_folio_is_found_from_wherever_in_it_one_begins() {
        let page = page_size();
        let kernel = FakeKernel::new(&[0]);
        kernel.with_idle_pages();
        let start = 1 << 30;
        let folios = FakeVma::anonymous(start, page, 512, 0).in_folios(64 * page);
        kernel.add(FakeProcess::new(0, vec![folios]));
        let pages = kernel.idle_pages().expect("it tracks them");
        let first = (start / page) as u64;
        for at in (0..512).filter(|at| at % 64 != 0) {
            assert_eq!(head_of(&*pages, first + at), Ok(Some(first + at / 64 * 64)), "{at}");
        }
        // At most a look for each order up to the folio's.
        assert!(kernel.calls(ProcessOp::FrameFlags) <= 512 * 6);
        kernel.fail(ProcessOp::FrameFlags, Errno(libc::EIO), 0, 1);
        assert_eq!(head_of(&*pages, first + 1), Err(Errno(libc::EIO)));
    }
}
