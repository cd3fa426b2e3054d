//! Idle page tracking of the made-up kernel: as mm/page_idle.c has it, of the first frames of
//! folios only, and not of hugetlb pages.

use super::moving::folio_at;
use super::{Event, FakeKernel, ProcessOp, State, page_at};
use crate::idle::{FRAMES_OF_WORD, FrameFlags, IdlePages};
use crate::process::Backing;
use crate::{Errno, page_size};
use std::collections::HashSet;
use std::ops::Range;

/// Bits of a frame's number that are those of its address; above them is the pid.
const ADDRESS_BITS: u32 = 36;

#[derive(Debug, Default)]
pub(super) struct Idle {
    pub(super) tracked: bool,
    pub(super) hidden: bool,
    marked: HashSet<u64>,
}

/// The frame of a process's page.
pub(super) fn frame_of(pid: u32, address: usize) -> u64 {
    u64::from(pid) << ADDRESS_BITS | (address / page_size()) as u64
}

fn page_of(frame: u64) -> (u32, usize) {
    let page = usize::try_from(frame & ((1 << ADDRESS_BITS) - 1)).unwrap_or(0);
    (u32::try_from(frame >> ADDRESS_BITS).unwrap_or(0), page * page_size())
}

impl FakeKernel {
    /// The kernel tracks idle pages.
    pub fn with_idle_pages(&self) {
        self.lock().idle.tracked = true;
    }

    /// The numbers of frames are not told.
    pub fn hide_frames(&self) {
        self.lock().idle.hidden = true;
    }
}

impl State {
    /// Frames of the folio that a frame belongs to, and whether it can be marked. `None`: no
    /// user's page is there.
    fn folio(&mut self, frame: u64) -> Option<(u64, u64, bool)> {
        let (pid, address) = page_of(frame);
        let (process, _) = self.processes.get_mut(&pid)?;
        // Of a folio that is there all frames are, mapped here or not.
        let (pages, _) = folio_at(process, address)?;
        pages.iter().find(|page| page.node.is_some())?;
        let vma = process.vmas.iter().find(|v| v.vma.range().contains(&address))?;
        let frames = (vma.page_bytes.max(vma.folio_bytes) / page_size()) as u64;
        let hugetlb = |(device, backing): &((u32, u32), Backing)| {
            *device == vma.vma.device && matches!(backing, Backing::Hugetlb(_))
        };
        let is_user = vma.vma.inode == 0 || !self.backings.iter().any(hugetlb);
        Some((frame & !(frames - 1), frames, is_user))
    }

    pub(super) fn touch(&mut self, pid: u32, range: Range<usize>) {
        for address in range.step_by(page_size()) {
            let process = self.processes.get_mut(&pid).map(|(process, _)| process);
            let page = process.and_then(|process| page_at(process, address));
            if page.is_some_and(|(page, _)| page.node.is_some())
                && let Some((head, ..)) = self.folio(frame_of(pid, address))
            {
                self.idle.marked.remove(&head);
            }
        }
    }

    /// What is unmapped is marked no more, nor is what comes there later.
    pub(super) fn forget(&mut self, pid: u32, range: &Range<usize>) {
        self.idle.marked.retain(|&frame| {
            let (owner, address) = page_of(frame);
            owner != pid || !range.contains(&address)
        });
    }

    pub(super) fn events_by_clock(&mut self) {
        let now = self.now;
        let due: Vec<(_, Event)> = self.later.extract_if(.., |(at, _)| *at <= now).collect();
        due.into_iter().for_each(|(_, event)| self.happen(event));
    }
}

impl IdlePages for FakeKernel {
    fn flags(&self, first: u64, out: &mut [u64]) -> Result<(), Errno> {
        let mut state = self.lock();
        state.check(ProcessOp::FrameFlags)?;
        for (frame, flags) in (first..).zip(out) {
            *flags = match state.folio(frame) {
                None | Some((_, 1, _)) => 0,
                Some((head, ..)) if head == frame => FrameFlags::COMPOUND_HEAD.bits(),
                Some(_) => FrameFlags::COMPOUND_TAIL.bits(),
            };
        }
        Ok(())
    }

    fn read(&self, first: u64, out: &mut [u64]) -> Result<(), Errno> {
        let mut state = self.lock();
        state.check(ProcessOp::ReadIdle)?;
        for (at, word) in (first..).zip(out) {
            let marked = |bit: &u64| state.idle.marked.contains(&(at * FRAMES_OF_WORD + bit));
            *word = (0..FRAMES_OF_WORD).filter(marked).fold(0, |word, bit| word | 1 << bit);
        }
        Ok(())
    }

    fn mark(&self, first: u64, words: &[u64]) -> Result<(), Errno> {
        let mut state = self.lock();
        state.check(ProcessOp::MarkIdle)?;
        for (at, word) in (first..).zip(words) {
            for frame in (0..FRAMES_OF_WORD).filter(|bit| word >> bit & 1 != 0) {
                let frame = at * FRAMES_OF_WORD + frame;
                if matches!(state.folio(frame), Some((head, _, true)) if head == frame) {
                    state.idle.marked.insert(frame);
                }
            }
        }
        Ok(())
    }
}
