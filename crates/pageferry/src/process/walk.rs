//! The walk over what is there: process by process, mapping by mapping, run by run of present
//! pages, cut into pieces of work.
//!
//! What always holds:
//! - Memory does not grow with what is walked over: one mapping and one buffer of runs at a time.
//! - Pieces are disjoint, and each holds pages of one process.
//! - Addresses ascend within a process, so that the walk ends however fast it maps new memory.

use super::absent::Absents;
use super::common::{Attention, Commons};
use super::notes::{Note, Notes};
use super::piece::{PIECE_PAGES, Piece, Span};
use super::seen::Seen;
use super::select::{Filter, Kind};
use super::targets::{Found, Process, Targets, note_of};
use crate::units::HUGE;
use pageferry_sys::pagemap::{Categories, Entry, Run};
use pageferry_sys::process::{Backings, ProcessKernel};
use pageferry_sys::procfs::{ReadMaps, Vma};
use pageferry_sys::{Errno, page_size};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// One scan covers this much at most, or one page if that is larger: a window aligned to its size, so
/// that no page lies across two. The scan holds `mmap_lock`, and who maps or unmaps waits for it.
const WINDOW: usize = 64 << 20;
/// Runs of one scan.
const RUNS: usize = 512;
/// How the pools of an engine are named.
const POOL: &str = "[anon:pageferry pool]";
/// Looks for new processes.
const ROUNDS: u32 = 256;

/// The process that the walk is in.
#[derive(Debug)]
struct Current {
    process: Arc<Process>,
    maps: Box<dyn ReadMaps>,
    backings: Backings,
    vma: Vma,
    kind: Kind,
    page_bytes: usize,
    /// What is still to be scanned of the mapping.
    left: Range<usize>,
    /// What was scanned and is still to be given out, in reverse.
    found: Vec<Span>,
}

/// What a walk needs besides its targets.
#[derive(Debug)]
pub(super) struct Walk {
    kernel: Arc<dyn ProcessKernel>,
    targets: Targets,
    filter: Filter,
    keep_mappings: bool,
    queue: VecDeque<Found>,
    current: Option<Current>,
    seen: Seen,
    runs: Vec<Run>,
    entries: Vec<Entry>,
    no_scan: bool,
    rounds: u32,
    pub(super) notes: Notes,
    pub(super) processes: u64,
    /// What the kernel counts as resident of the processes found so far, in bytes.
    pub(super) resident: u64,
    pub(super) mappings: u64,
    /// What is not present, where mappings are kept.
    pub(super) absents: Absents,
    pub(super) commons: Commons,
}

impl Walk {
    pub(super) fn new(
        kernel: Arc<dyn ProcessKernel>,
        targets: Targets,
        filter: Filter,
        keep_mappings: bool,
        attention: Attention,
    ) -> Self {
        Self {
            kernel,
            targets,
            filter,
            keep_mappings,
            queue: VecDeque::new(),
            current: None,
            seen: Seen::default(),
            runs: vec![Run::EMPTY; RUNS],
            entries: Vec::new(),
            no_scan: false,
            rounds: 0,
            notes: Notes::default(),
            processes: 0,
            resident: 0,
            mappings: 0,
            absents: Absents::default(),
            commons: Commons::new(attention),
        }
    }

    /// Looks for processes that were not there before; `false`: there is no new one.
    pub(super) fn find(&mut self) -> bool {
        self.rounds += 1;
        let new = self.targets.find(&*self.kernel, &mut self.notes);
        if !new.is_empty() && self.rounds > ROUNDS {
            self.notes.add(Note::StillJoining);
            return false;
        }
        self.resident += new
            .iter()
            .map(|found| match found {
                Found::Named(_, status) | Found::Listed(_, status) => self.filter.resident(status),
                Found::Again(_) => 0,
            })
            .sum::<u64>();
        self.queue.extend(new);
        !self.queue.is_empty()
    }

    /// Bytes that are resident, if the walk has not come to the end of them; 0 if it has.
    pub(super) fn ahead(&mut self) -> u64 {
        // Cancelled before it began, nobody has been looked for.
        if self.rounds == 0 {
            self.find();
        }
        let over = self.current.is_none() && self.queue.is_empty();
        if over { 0 } else { self.resident }
    }

    /// Says how so many bytes were counted that others map too.
    pub(super) fn note_commons(&mut self, bytes: u64) {
        let left_out = self.commons.left_out;
        if left_out > 0 {
            self.notes.add(Note::CommonOnce { bytes: left_out });
        }
        if bytes == 0 || self.processes < 2 {
            return;
        }
        if self.commons.untold {
            self.notes.add(Note::CommonUntold { bytes });
        } else if self.commons.attention == Attention::Told {
            self.notes.add(Note::CommonMoved { bytes });
        }
    }

    /// The next piece; `None`: everything found so far has been walked over.
    pub(super) fn next_piece(&mut self) -> Option<Piece> {
        let mut piece: Option<Piece> = None;
        loop {
            let Some(current) = &mut self.current else {
                if piece.as_ref().is_some_and(|p| p.pages > 0) {
                    return piece;
                }
                piece = None;
                self.open_next()?;
                continue;
            };
            let piece = piece.get_or_insert_with(|| Piece::new(Arc::clone(&current.process)));
            while let Some(span) = current.found.last_mut() {
                let room = piece.room(span.page_bytes);
                if room == 0 {
                    return Some(std::mem::replace(
                        piece,
                        Piece::new(Arc::clone(&current.process)),
                    ));
                }
                let cut = span.end.min(span.start + room * span.page_bytes);
                let mut taken = Span { end: cut, ..span.clone() };
                if self.keep_mappings {
                    if piece.mappings.last().is_none_or(|(vma, _)| vma.start != current.vma.start) {
                        piece.mappings.push((current.vma.clone(), current.kind));
                    }
                    taken.mapping = u32::try_from(piece.mappings.len() - 1).unwrap_or(u32::MAX);
                }
                piece.push(taken);
                span.start = cut;
                if span.start == span.end {
                    current.found.pop();
                }
            }
            if current.left.is_empty() {
                if !self.next_mapping() {
                    self.close();
                }
            } else if let Err(errno) = self.scan() {
                self.give_up(errno);
            }
        }
    }

    /// Begins with the next process. `None`: there is none in the queue.
    fn open_next(&mut self) -> Option<()> {
        loop {
            let (process, first) = match self.queue.pop_front()? {
                Found::Again(process) => (process, false),
                Found::Named(process, _) => (process, true),
                Found::Listed(pid, _) => match Process::open(&*self.kernel, pid) {
                    Ok((process, _)) => (process, true),
                    Err(error) => {
                        if let Some(note) = note_of(&error) {
                            self.notes.add(note);
                        }
                        continue;
                    }
                },
            };
            let pid = process.pid;
            match Current::begin(Arc::clone(&process)) {
                Ok(current) => {
                    self.processes += u64::from(first);
                    self.current = Some(current);
                    return Some(());
                }
                Err(errno) if process.ended_by(errno) => self.notes.all(process.note_of_end()),
                Err(errno) => self.notes.add(Note::Unreadable { pid, errno: errno.0 }),
            }
        }
    }

    /// Goes to the next mapping that is asked for; `false`: there is none.
    fn next_mapping(&mut self) -> bool {
        let Some(current) = &mut self.current else { return false };
        loop {
            match current.maps.next(&mut current.vma) {
                Ok(true) => {}
                Ok(false) => return false,
                Err(errno) => {
                    self.give_up(errno);
                    return true;
                }
            }
            if self.filter.addresses().is_some_and(|wanted| current.vma.start >= wanted.end) {
                return false;
            }
            let Some((kind, page_bytes)) = Kind::of(&current.vma, &current.backings) else {
                continue;
            };
            // Frames of an engine in that process: it relies on their nodes, and they hold nothing.
            if !self.keep_mappings && current.vma.name == POOL {
                continue;
            }
            let Some(range) = self.filter.select(&current.vma, kind) else { continue };
            self.mappings += 1;
            (current.kind, current.page_bytes, current.left) = (kind, page_bytes, range);
            return true;
        }
    }

    /// The process has been walked over: it is left, or begun anew if it is another program now.
    fn close(&mut self) {
        let Some(current) = self.current.take() else { return };
        let pid = current.process.pid;
        self.absents.close(&*current.process.view);
        if current.process.has_ended() {
            self.notes.all(current.process.note_of_end());
        } else if current.process.has_executed() {
            self.notes.add(Note::Executed { pid });
            match Current::begin(current.process) {
                Ok(current) => self.current = Some(current),
                Err(errno) => self.notes.add(Note::Unreadable { pid, errno: errno.0 }),
            }
        }
    }

    /// Pages of a process were not there any more. If it has executed another program, it is
    /// looked at once more.
    pub(super) fn look_again(&mut self, process: &Arc<Process>) {
        // Whom the walk is in, or comes to, it looks at itself.
        let is_it = |other: &Arc<Process>| Arc::ptr_eq(other, process);
        let queued = |found: &Found| matches!(found, Found::Again(other) if is_it(other));
        let current = self.current.as_ref().is_some_and(|c| is_it(&c.process));
        if !current && !self.queue.iter().any(queued) && process.has_executed() {
            self.notes.add(Note::Executed { pid: process.pid });
            self.queue.push_back(Found::Again(Arc::clone(process)));
        }
    }

    /// The process cannot be read any more.
    fn give_up(&mut self, errno: Errno) {
        let Some(current) = &mut self.current else { return };
        let pid = current.process.pid;
        if current.process.ended_by(errno) || current.process.is_another() {
            self.close();
        } else {
            self.notes.add(Note::Unreadable { pid, errno: errno.0 });
            self.absents.close(&*current.process.view);
            self.current = None;
        }
    }

    /// Finds the present pages of the next window of the mapping.
    fn scan(&mut self) -> Result<(), Errno> {
        let Some(current) = &mut self.current else { return Ok(()) };
        let start = current.left.start;
        let window = WINDOW.max(current.page_bytes);
        let end = current.left.end.min((start | (window - 1)).saturating_add(1));
        let told = if self.no_scan {
            read_entries(current, &mut self.entries, &mut self.runs, start..end)
        } else {
            let mut wanted = Categories::PRESENT;
            wanted.set(Categories::SWAPPED, self.keep_mappings);
            let returned = wanted | Categories::HUGE | Categories::PFN_ZERO | Categories::FILE;
            current.process.view.scan(start, end, wanted, returned, &mut self.runs)
        };
        let (count, reached) = match told {
            Err(Errno(libc::ENOTTY)) if !self.no_scan => {
                self.no_scan = true;
                self.commons.cannot_tell();
                return Ok(());
            }
            Err(Errno(libc::EAGAIN | libc::EINTR)) => return Ok(()),
            told => told?,
        };
        // Never stand still.
        current.left.start = reached.clamp(start + page_size(), end.max(start + page_size()));
        for run in &self.runs[..count] {
            let is = run.categories();
            if is.contains(Categories::SWAPPED) && !is.contains(Categories::PRESENT) {
                let (view, range) = (&*current.process.view, address(run.start)..address(run.end));
                self.absents.look(view, current.kind, range)?;
            } else if !is.contains(Categories::PFN_ZERO) {
                current.take(run, &mut self.seen, &mut self.commons)?;
            }
        }
        current.found.reverse();
        if self.seen.is_full() {
            self.notes.add(Note::CountedTwice);
        }
        Ok(())
    }
}

impl Current {
    fn begin(process: Arc<Process>) -> Result<Self, Errno> {
        // The image first: if it changes before the maps are opened, the walk is done once more.
        process.begin();
        let maps = process.view.maps()?;
        let backings = process.view.backings();
        Ok(Self {
            process,
            maps,
            backings,
            vma: Vma::default(),
            kind: Kind::Anonymous,
            page_bytes: page_size(),
            left: 0..0,
            found: Vec::new(),
        })
    }

    /// Takes a run over, without what other mappings of the same object had.
    fn take(&mut self, run: &Run, seen: &mut Seen, commons: &mut Commons) -> Result<(), Errno> {
        let is_huge = run.categories().contains(Categories::HUGE);
        let page_bytes = if is_huge { self.page_bytes.max(HUGE) } else { self.page_bytes };
        // A huge page that is asked for in part is taken whole.
        let start = address(run.start) & !(page_bytes - 1);
        let end = address(run.end).next_multiple_of(page_bytes);
        let span = Span { start, end, page_bytes, kind: self.kind, common: false, mapping: 0 };
        if self.vma.inode == 0 || !run.categories().contains(Categories::FILE) {
            if commons.attention == Attention::None {
                self.found.push(span);
                return Ok(());
            }
            return commons.part(&*self.process.view, &span, |part| self.found.push(part));
        }
        let origin = self.vma.offset.wrapping_sub(self.vma.start as u64);
        let part = origin.wrapping_add(start as u64)..origin.wrapping_add(end as u64);
        let found = &mut self.found;
        seen.add((self.vma.device, self.vma.inode), part, |new| {
            let start = address(new.start.wrapping_sub(origin));
            let end = address(new.end.wrapping_sub(origin));
            let whole = start.is_multiple_of(page_bytes) && end.is_multiple_of(page_bytes);
            let page_bytes = if whole { page_bytes } else { page_size() };
            found.push(Span { start, end, page_bytes, ..span.clone() });
        });
        Ok(())
    }
}

fn address(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// What `PAGEMAP_SCAN` would tell, from the entries, for kernels that do not have it. They tell
/// neither huge pages nor the zero page: those are found out page by page.
fn read_entries(
    current: &Current,
    entries: &mut Vec<Entry>,
    runs: &mut [Run],
    range: Range<usize>,
) -> Result<(usize, usize), Errno> {
    let page = page_size();
    let (mut at, mut count) = (range.start, 0);
    while at < range.end {
        let pages = ((range.end - at) / page).clamp(1, PIECE_PAGES);
        entries.resize(pages, Entry(0));
        current.process.view.entries(at, entries)?;
        for entry in entries.iter() {
            // What was never touched costs no more than this.
            if entry.0 == 0 {
                at += page;
                continue;
            }
            let mut is = Categories::empty();
            is.set(Categories::PRESENT, entry.present());
            is.set(Categories::SWAPPED, entry.swapped());
            is.set(Categories::FILE, entry.file() && entry.present());
            let run = Run::new(at, at + page, is);
            if is.is_empty() {
            } else if let Some(last) = runs[..count].last_mut().filter(|last| last.joins(&run)) {
                last.end = run.end;
            } else if let Some(slot) = runs.get_mut(count) {
                *slot = run;
                count += 1;
            } else {
                return Ok((count, at));
            }
            at += page;
        }
    }
    Ok((count, at))
}
