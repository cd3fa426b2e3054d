//! Putting pages in.
//!
//! From detach on there is no giving up: every page that is out comes in, as its copy or as its
//! original, by `UFFDIO_MOVE` or, where the mapping was locked or protected meanwhile, by
//! `UFFDIO_COPY`; unless the program has discarded or unmapped it.

use super::{Berth, back_off, clear, set};
use crate::flight::{MAX_PAGES, bit};
use crate::report::{Outcome, Shortage};
use crate::tally::Tally;
use pageferry_sys::pagemap::{Categories, Run};
use pageferry_sys::sched::Moment;
use pageferry_sys::uffd::Progress;
use pageferry_sys::{Errno, page_size};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// [`back_off`] for somebody else's turn: half a millisecond.
const BACK_OFF_LONG: u32 = 17;
/// Tries of a way to put a page in before another is taken.
const PLACE_TRIES: u32 = 64;

/// What became of a page that was put in by another way than moving it.
enum Tried {
    /// The program has given it up, or is about to say so.
    GivenUp,
    /// Something else stands there.
    Taken,
    /// A guard marker stands there.
    Guarded,
    /// It is marked as lost to a memory error.
    Poisoned,
    /// What `UFFDIO_COPY` said.
    Copied(Option<Errno>),
}

impl Berth<'_> {
    /// Step 6: puts the new pages in (the originals where copying failed). When this returns, no
    /// page of the piece is out. Returns how long the hole lasted, without what this thread was off
    /// its CPU in the call that closed it.
    pub(crate) fn attach(&mut self, piece: Range<usize>, tally: &mut Tally) -> Duration {
        // Where the kernel allocates, this thread's policy decides on which node.
        let one_node = self.ctx.pools.has_one_node();
        let _policy = (self.kernel_copy && !one_node)
            .then(|| pageferry_sys::mm::PreferringNode::new(self.seg().to));
        let mut page = piece.start;
        let mut last_call = None;
        while page < piece.end {
            if !bit(&self.out, page) {
                page += 1;
                continue;
            }
            last_call = Some(Moment::now());
            let end = page + (page..piece.end).take_while(|&i| bit(&self.out, i)).count();
            self.place(page..end, tally);
            page = end;
        }
        let hole = self.hole_since.take().map_or(Duration::ZERO, |since| since.elapsed());
        // The last call wakes who waits; whoever wakes may take this CPU on its way out. The hole
        // is closed then.
        let hole = hole.saturating_sub(last_call.map_or(Duration::ZERO, |m| m.preempted_for()));
        tally.holes.record(hole);
        self.fork_hold = None;
        if (self.kernel_copy || self.placed_otherwise) && !one_node {
            self.check_nodes(piece);
        }
        if tally.first_folio.is_none() {
            tally.first_folio = Some(Instant::now());
        }
        hole
    }

    /// Pages that the kernel allocated elsewhere, because the node was full or the mapping has
    /// another policy, did not get where they were to go.
    fn check_nodes(&mut self, piece: Range<usize>) {
        let mut pages = [0; MAX_PAGES];
        let mut nodes = [-1; MAX_PAGES];
        let count = piece.len();
        for (address, page) in pages.iter_mut().zip(piece.clone()) {
            *address = self.addr(page);
        }
        let asked = self.ctx.sys.page_nodes(&pages[..count], &mut nodes[..count]);
        let wanted = i32::try_from(self.seg().to).unwrap_or(-1);
        for (page, node) in piece.zip(nodes) {
            let there = asked.is_ok() && (node == wanted || node < 0);
            if self.outcome[page] == Outcome::Moved && !there {
                self.outcome[page] = Outcome::NoFrame(Shortage::Node);
            }
        }
    }

    /// Moves frames, or the originals of pages that could not be copied, into the holes of `run`.
    fn place(&mut self, run: Range<usize>, tally: &mut Tally) {
        let mut page = run.start;
        let mut limit = run.len();
        let mut tries = 0;
        // Once one page has used up its tries, the next ones go another way at once.
        let mut patience = PLACE_TRIES;
        while page < run.end {
            let keep = bit(&self.failed, page);
            let swapped = bit(&self.swapped, page);
            let same =
                |i: &usize| bit(&self.failed, *i) == keep && bit(&self.swapped, *i) == swapped;
            let end = page + (page..run.end).take(limit).take_while(same).count();
            let (step, gone) = self.put_in(page..end, keep);
            let done = step.done / page_size();
            if done > 0 {
                let outcome = match (gone, keep) {
                    (true, _) => Outcome::Gone,
                    (false, true) => self.kept(page),
                    (false, false) => Outcome::Moved,
                };
                let stays = keep || gone || self.kernel_copy;
                self.settle(page..page + done, outcome, stays, keep && !gone);
                page += done;
                tries = 0;
            }
            match step.error {
                None => limit = (limit * 2).min(run.len()),
                Some(Errno(libc::EAGAIN)) if done > 0 => {}
                Some(Errno(libc::EAGAIN | libc::EINTR | libc::ENOMEM)) if tries < patience => {
                    back_off(tries);
                    tries += 1;
                }
                // Another mapping begins within the range: approach it by halves.
                Some(Errno(libc::EINVAL)) if end - page > done + 1 => {
                    limit = ((end - page) / 2).max(1);
                }
                // An event that the handler has not acted on yet may be the reason.
                Some(_) if self.event_waits() => back_off(BACK_OFF_LONG),
                Some(errno) => {
                    let insists = tries >= patience;
                    if self.place_otherwise(page, errno, keep, insists) {
                        tally.fallbacks += 1;
                        page += 1;
                        tries = 0;
                        if insists {
                            patience = 1;
                        }
                    } else {
                        // The page must come back: there is no giving up here.
                        back_off(tries);
                        tries += 1;
                    }
                }
            }
        }
    }

    /// Whether the program has changed its mappings, and the handler has yet to act on it. Until
    /// then the kernel answers `EAGAIN` to what is asked of any registered range, as a slot is.
    fn event_waits(&self) -> bool {
        let Some(extent) = &self.empties else { return false };
        let asked = self.ctx.sys.unprotect(&self.ctx.uffd, extent.addr, page_size());
        asked == Err(Errno(libc::EAGAIN))
    }

    fn tells(&self) -> Categories {
        Categories::from_bits_truncate(self.ctx.tells.load(Ordering::Relaxed))
    }

    /// Whether anything is at an address: a page, a swap entry, a guard marker.
    fn is_taken(&self, addr: usize) -> bool {
        let any = (Categories::PRESENT | Categories::SWAPPED | Categories::GUARD) & self.tells();
        self.look(addr, any) == Some(true)
    }

    /// Whether a guard marker is at an address (false where the kernel does not tell it from a swap
    /// entry, before 6.15).
    fn is_guarded(&self, addr: usize) -> bool {
        let guard = Categories::GUARD & self.tells();
        let is = !guard.is_empty() && self.look(addr, guard) == Some(true);
        if is {
            self.ctx.note_guard();
        }
        is
    }

    /// `UFFDIO_COPY` into a hole. It replaces guard markers on many kernels, and nothing tells of them
    /// but a look right before: what is installed from then on until the page is copied is lost. (A
    /// look for each call costs 2 ns a page, of 1,250; for each 128 pages, with a call more, 30.)
    ///
    /// # Safety
    /// As [`Sys::copy_in`](pageferry_sys::Sys::copy_in).
    unsafe fn copy_beside_guards(&self, dst: usize, src: usize, len: usize) -> Progress {
        let (sys, fd) = (&self.ctx.sys, &self.ctx.uffd);
        if !self.ctx.copy_replaces_guards.load(Ordering::Relaxed) {
            // SAFETY: promised by the caller.
            return unsafe { sys.copy_in(fd, dst, src, len) };
        }
        let any = (Categories::SWAPPED | Categories::GUARD) & self.tells();
        let mut runs = [Run::EMPTY; 1];
        let found = sys.scan(&self.ctx.pagemap, dst, dst + len, any, any, &mut runs);
        let free = match found {
            Ok((1, _)) => {
                // Or, where the kernel does not tell, something else that nobody expects there.
                self.ctx.note_guard();
                usize::try_from(runs[0].start).unwrap_or(dst).saturating_sub(dst)
            }
            // Nothing, or no answer.
            _ => len,
        };
        if free == 0 {
            return Progress { done: 0, error: Some(Errno(libc::EEXIST)) };
        }
        // SAFETY: promised by the caller, for a part of the same range.
        unsafe { sys.copy_in(fd, dst, src, free.min(len)) }
    }

    /// One call that brings pages in, under the gate; true if there was nothing to bring, because
    /// the program has given them up.
    fn put_in(&self, run: Range<usize>, keep: bool) -> (Progress, bool) {
        let flight = self.flight.as_ref().expect("opened before attach");
        let flights = &self.ctx.flights;
        flights.with_gone(flight, |gone| {
            let is_gone = |i: usize| gone.is_some_and(|g| bit(g, i));
            let first = is_gone(run.start);
            // Pages that `mremap` took elsewhere are followed one by one. Asked under the gate: with
            // MREMAP_DONTUNMAP the place that they left would take them.
            let detours = flights.has_detours(flight);
            let most = if detours { 1 } else { run.len() };
            let count = run.clone().take(most).take_while(|&i| is_gone(i) == first).count();
            let len = count * page_size();
            if first {
                return (Progress { done: len, error: None }, true);
            }
            let dst = flights.home_of(flight, self.addr(run.start));
            let moved = if self.kernel_copy && !keep {
                let src = self.slot(run.start);
                // SAFETY: the destination is the hole that these pages left, the source their
                // slots.
                unsafe { self.copy_beside_guards(dst, src, len) }
            } else {
                let src = if keep { self.slot(run.start) } else { self.frame(run.start) };
                // SAFETY: the destination is the hole that these pages left; the source is ours.
                unsafe { self.ctx.move_range(dst, src, len) }
            };
            (moved, false)
        })
    }

    /// The outcome of a page whose original went back.
    fn kept(&self, page: usize) -> Outcome {
        if bit(&self.swapped, page) {
            return Outcome::Swapped;
        }
        if self.kernel_copy { Outcome::NoFrame(Shortage::Memory) } else { Outcome::CopyFailed }
    }

    /// The kernel would not move the page in (its mapping was locked or protected meanwhile, or
    /// is gone). A copy by the kernel works where moving does not. False: try again.
    ///
    /// What the program gives up is marked by the handler, and `put_in` passes it over. So an errno
    /// that says the same is believed only once the kernel `insists`: until then the mark is on its
    /// way, or the refusal passes.
    ///
    /// All of it is tried under the gate: an event is then either unread, and the kernel answers
    /// `EAGAIN`, or acted on, and the page's home and its mark are those of now. Between its being
    /// read and acted on, a page that `mremap` took elsewhere would be taken for unmapped, and lost.
    fn place_otherwise(&mut self, page: usize, why: Errno, keep: bool, insists: bool) -> bool {
        let flight = self.flight.as_ref().expect("opened before attach");
        let tried = self.ctx.flights.with_gone(flight, |gone| {
            if gone.is_some_and(|g| bit(g, page)) {
                // `put_in` passes it over the next time.
                return Tried::GivenUp;
            }
            let flights = &self.ctx.flights;
            let mut home = flights.home_of(flight, self.addr(page));
            if insists && matches!(why, Errno(libc::ENOENT | libc::EINVAL)) {
                home = flights.home_in_any_order(flight, self.addr(page));
            }
            if why == Errno(libc::EEXIST) && self.is_taken(home) {
                // Without an event under way the home is right, and a marker there the program's.
                return match self.is_guarded(home) {
                    _ if self.event_waits() => Tried::GivenUp,
                    true => Tried::Guarded,
                    false => Tried::Taken,
                };
            }
            let original = keep || self.kernel_copy;
            let src = if original { self.slot(page) } else { self.frame(page) };
            // The kernel allocates here: on the node that was asked for, or where the page was.
            let node = if keep { self.seg().from } else { Some(self.seg().to) };
            let node = node.filter(|_| !self.ctx.pools.has_one_node());
            let _preferring = node.map(pageferry_sys::mm::PreferringNode::new);
            let (sys, fd) = (&self.ctx.sys, &self.ctx.uffd);
            // SAFETY: the destination is the hole that this page left; the source is ours.
            let copied = unsafe { self.copy_beside_guards(home, src, page_size()) };
            let unreadable = matches!(copied.error, Some(Errno(libc::EFAULT | libc::EHWPOISON)));
            // The source cannot be read: a memory error. What the program must feel is SIGBUS,
            // not a page of zeros.
            if unreadable && keep && insists {
                match sys.poison(fd, home, page_size()).error {
                    None => return Tried::Poisoned,
                    Some(Errno(libc::EEXIST)) => return Tried::Taken,
                    Some(_) => {}
                }
            }
            Tried::Copied(copied.error)
        });
        match tried {
            Tried::GivenUp => false,
            Tried::Guarded => {
                self.settle(page..page + 1, Outcome::Gone, true, false);
                true
            }
            // The program has put something there since it gave this page up.
            Tried::Taken => {
                if insists {
                    self.settle(page..page + 1, Outcome::Gone, true, false);
                }
                insists
            }
            Tried::Poisoned => {
                self.settle(page..page + 1, Outcome::CopyFailed, true, false);
                true
            }
            Tried::Copied(None) => {
                self.placed_otherwise = true;
                let outcome = if keep { self.kept(page) } else { Outcome::Moved };
                // The frame is still in the pool, and so is the original.
                self.settle(page..page + 1, outcome, true, false);
                true
            }
            // No mapping of ours there any more, or something else stands there: the program has
            // unmapped or replaced it.
            Tried::Copied(Some(Errno(
                libc::ENOENT | libc::EINVAL | libc::EEXIST | libc::ESRCH,
            ))) => {
                if insists {
                    self.settle(page..page + 1, Outcome::Gone, true, false);
                }
                insists
            }
            Tried::Copied(Some(Errno(libc::EFAULT | libc::EHWPOISON))) if keep && insists => false,
            Tried::Copied(Some(errno)) => {
                self.starved |= errno == Errno(libc::ENOMEM);
                // Neither way for the frame: from now on try the original.
                if !keep && why != Errno(libc::EAGAIN) {
                    set(&mut self.failed, page..page + 1);
                }
                false
            }
        }
    }

    /// The pages are no longer out. `frame_stays`: the frame is still in the pool;
    /// `slot_left`: the original has left its slot.
    fn settle(&mut self, run: Range<usize>, outcome: Outcome, frame_stays: bool, slot_left: bool) {
        let n = run.len();
        if let Some(frames) = self.frames.as_mut().filter(|_| !self.kernel_copy) {
            if frame_stays {
                frames.mixed = true;
            } else {
                frames.populated -= n;
            }
        }
        if let Some(empties) = &mut self.empties {
            if slot_left {
                empties.mixed = true;
            } else {
                empties.populated += n;
            }
        }
        if frame_stays && !slot_left {
            // The old page is left over: its content went in by a copy of the kernel's, or the
            // program gave it up.
            self.ctx.pools.gained(n);
        }
        self.outcome[run.clone()].fill(outcome);
        clear(&mut self.out, run);
    }
}
