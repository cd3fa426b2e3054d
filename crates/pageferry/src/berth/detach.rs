//! Taking pages out: write protection (live order) and detach.
//!
//! Up to here a page can be left where it is. What the kernel refuses to move gets its outcome
//! and stays.

use super::{Berth, DETACH_TRIES, back_off, is_empty, set};
use crate::flight::{MAX_PAGES, bit};
use crate::pool::pages_per_extent;
use crate::report::{Busy, Outcome};
use crate::units::FolioSize;
use pageferry_sys::pagemap::{Categories, Run};
use pageferry_sys::uffd::Progress;
use pageferry_sys::{Errno, page_size};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Instant;

impl Berth<'_> {
    /// Step 2, live: from when this returns, a write is noticed.
    pub(crate) fn protect(&mut self) -> Result<(), Errno> {
        // Writers of a huge folio under copy wait, as at a hole.
        if self.seg().size == FolioSize::Huge {
            self.hold_forks(self.nested);
        }
        let mut tries = 0;
        loop {
            let range = &self.seg().range;
            match self.ctx.sys.protect(&self.ctx.uffd, range.start, range.len()) {
                Ok(()) => return Ok(()),
                Err(Errno(libc::EAGAIN | libc::EINTR | libc::ENOMEM)) if tries < DETACH_TRIES => {
                    back_off(tries);
                    tries += 1;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Opens a hole over `piece` (pages of the segment) and takes the pages out.
    pub(crate) fn detach(&mut self, piece: Range<usize>, nested: bool) {
        if !nested {
            self.turn.offer();
        }
        self.hold_forks(nested);
        let flight = self.flight.as_ref().expect("opened before detach");
        let hole = self.addr(piece.start)..self.addr(piece.end);
        let given_up = self.ctx.flights.widen(flight, hole);
        let given_up = |page: usize| given_up.is_some_and(|bits| bit(&bits, page));
        self.hole_since = Some(Instant::now());
        let mut page = piece.start;
        let mut limit = piece.len();
        let mut tries = 0;
        // Once one page has used up its tries, the next ones get one each: the hole is open.
        let mut patience = DETACH_TRIES;
        while page < piece.end {
            if given_up(page) {
                if self.outcome[page] != Outcome::Gone {
                    self.outcome[page] = Outcome::Busy(Busy::Discarding);
                }
                page += 1;
                continue;
            }
            let most = limit.min(piece.end - page);
            let count = (1..most).find(|n| given_up(page + n)).unwrap_or(most);
            let Some(progress) = self.take_out(page, count) else {
                self.outcome[page] = Outcome::Gone;
                page += 1;
                continue;
            };
            let moved = progress.done / page_size();
            if moved > 0 {
                set(&mut self.out, page..page + moved);
                page += moved;
                tries = 0;
            }
            let Some(Errno(errno)) = progress.error else {
                limit = (limit * 2).min(piece.len());
                continue;
            };
            let refused = match errno {
                // Part was done: asking for the rest tells the reason.
                libc::EAGAIN if moved > 0 => continue,
                libc::EAGAIN | libc::EINTR | libc::ENOMEM if tries < patience => {
                    back_off(tries);
                    tries += 1;
                    if tries == DETACH_TRIES {
                        patience = 1;
                    }
                    continue;
                }
                libc::EAGAIN => Outcome::Busy(Busy::Contended),
                libc::ENOENT => Outcome::NotPresent,
                libc::EBUSY => self.why_busy(page),
                // Another mapping begins within the range: approach it by halves.
                libc::EINVAL if count > 1 => {
                    limit = count / 2;
                    continue;
                }
                libc::EINVAL => Outcome::Busy(Busy::Mapping),
                libc::EFAULT => {
                    self.ctx.note_guard();
                    Outcome::Busy(Busy::Guarded)
                }
                // Something is in the slot: the program has locked all its memory, and so
                // populated it. Another extent may be empty.
                libc::EEXIST => {
                    if let Some(empties) = &mut self.empties {
                        empties.split = true;
                    }
                    self.ctx.pools.note_populated();
                    self.outcome[page..piece.end].fill(Outcome::Busy(Busy::Contended));
                    break;
                }
                errno => Outcome::Busy(Busy::Other(errno)),
            };
            // Without a reason of its own, a huge folio stays as a whole; a run of shared pages
            // is passed over at once.
            let skip = match (self.seg().size, refused) {
                (FolioSize::Huge, Outcome::Busy(_)) if page.is_multiple_of(pages_per_extent()) => {
                    self.pages
                }
                (_, Outcome::Busy(Busy::Shared)) => self.shared_run(page, piece.end),
                _ => 1,
            };
            self.outcome[page..page + skip].fill(refused);
            page += skip;
            tries = 0;
            // Where one page's mapping is of the wrong kind, the next one's probably is, too.
            if errno != libc::EINVAL {
                limit = piece.len();
            }
        }
        if self.ctx.swap.load(Ordering::Relaxed) {
            self.leave_swapped(piece);
        }
        if self.seg().size == FolioSize::Huge && !is_empty(&self.out) {
            let slot = self.slot(0);
            if !self.ctx.pools.is_huge(slot) {
                // It was split on the way, or before: it moves as base pages.
                if let Some(empties) = &mut self.empties {
                    empties.split = true;
                }
            }
        }
    }

    /// What went to swap since it was planned is not read, which would take a disk's time with the
    /// hole open, but goes back.
    fn leave_swapped(&mut self, piece: Range<usize>) {
        let (start, end) =
            (self.slot(piece.start), self.slot(piece.start) + piece.len() * page_size());
        let want = Categories::SWAPPED;
        let mut runs = [Run::EMPTY; 16];
        let mut at = start;
        while at < end {
            let found = self.ctx.sys.scan(&self.ctx.pagemap, at, end, want, want, &mut runs);
            // Without an answer they are read.
            let Ok((count, ended)) = found else { return };
            for run in &runs[..count] {
                let page = |v: u64| {
                    let address = usize::try_from(v).unwrap_or(end).clamp(start, end);
                    piece.start + (address - start) / page_size()
                };
                set(&mut self.swapped, page(run.start)..page(run.end));
                set(&mut self.failed, page(run.start)..page(run.end));
            }
            if ended <= at {
                return;
            }
            at = ended;
        }
    }

    /// Moves pages to their slots, up to `count`. `None`: the program has given this page up, or
    /// moved it away.
    fn take_out(&self, page: usize, count: usize) -> Option<Progress> {
        let flight = self.flight.as_ref()?;
        self.ctx.flights.with_gone(flight, |gone| {
            let detours = self.ctx.flights.has_detours(flight);
            let is_gone = |i: usize| {
                gone.is_some_and(|g| bit(g, i))
                    || detours && self.ctx.flights.home_of(flight, self.addr(i)) != self.addr(i)
            };
            if is_gone(page) {
                return None;
            }
            let count = (page..page + count).take_while(|&i| !is_gone(i)).count();
            let (dst, src) = (self.slot(page), self.addr(page));
            // SAFETY: the slots are ours and empty; whoever uses the pages waits at the hole; and
            // the range is still the one that was registered (see `flight`, property 4).
            Some(unsafe { self.ctx.move_range(dst, src, count * page_size()) })
        })
    }

    fn why_busy(&self, page: usize) -> Outcome {
        let mut entry = [pageferry_sys::pagemap::Entry(0)];
        match self.ctx.pagemap.entries(self.addr(page), &mut entry) {
            Ok(()) if entry[0].present() && !entry[0].exclusive() => Outcome::Busy(Busy::Shared),
            _ => Outcome::Busy(Busy::Pinned),
        }
    }

    /// How many pages from `page` on are shared with someone.
    fn shared_run(&self, page: usize, end: usize) -> usize {
        let mut entries = [pageferry_sys::pagemap::Entry(0); MAX_PAGES];
        let entries = &mut entries[..end - page];
        if self.ctx.pagemap.entries(self.addr(page), entries).is_err() {
            return 1;
        }
        entries.iter().take_while(|e| e.present() && !e.exclusive()).count().max(1)
    }
}
