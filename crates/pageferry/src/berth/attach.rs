//! Putting pages in.
//!
//! From detach on there is no giving up: every page that is out comes in, as its copy or as its
//! original, by `UFFDIO_MOVE` or, where the mapping was locked or protected meanwhile, by
//! `UFFDIO_COPY`; unless the program has discarded or unmapped it.

use super::{Berth, back_off, clear, set};
use crate::flight::{MAX_PAGES, bit};
use crate::report::{Outcome, Shortage};
use crate::tally::Tally;
use pageferry_sys::uffd::Progress;
use pageferry_sys::{Errno, page_size};
use std::ops::Range;
use std::time::{Duration, Instant};

impl Berth<'_> {
    /// Step 6: puts the new pages in (the originals where copying failed). When this returns, no
    /// page of the piece is out.
    /// Returns how long the hole lasted.
    pub(crate) fn attach(&mut self, piece: Range<usize>, tally: &mut Tally) -> Duration {
        // Where the kernel allocates, this thread's policy decides on which node.
        let one_node = self.ctx.pools.has_one_node();
        let _policy = (self.kernel_copy && !one_node)
            .then(|| pageferry_sys::mm::PreferringNode::new(self.seg().to));
        let mut page = piece.start;
        while page < piece.end {
            if !bit(&self.out, page) {
                page += 1;
                continue;
            }
            let keep = bit(&self.failed, page);
            let mut end = page + 1;
            while end < piece.end && bit(&self.out, end) && bit(&self.failed, end) == keep {
                end += 1;
            }
            self.place(page..end, keep, tally);
            page = end;
        }
        let hole = self.hole_since.take().map_or(Duration::ZERO, |since| since.elapsed());
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

    /// Moves frames (or the originals, if `keep`) into the holes of `run`.
    fn place(&mut self, run: Range<usize>, keep: bool, tally: &mut Tally) {
        let mut page = run.start;
        let mut tries = 0;
        while page < run.end {
            let detours = self.ctx.flights.has_detours();
            let (step, gone) = {
                let flight = self.flight.as_ref().expect("opened before attach");
                self.ctx.flights.with_gone(flight, |gone| {
                    let is_gone = |i: usize| gone.is_some_and(|g| bit(g, i));
                    let first = is_gone(page);
                    let mut end = page + 1;
                    // Pages that `mremap` took elsewhere are followed one by one.
                    while !detours && end < run.end && is_gone(end) == first {
                        end += 1;
                    }
                    if first {
                        return (Progress { done: (end - page) * page_size(), error: None }, true);
                    }
                    let dst = self.ctx.flights.home_of(self.addr(page));
                    let len = (end - page) * page_size();
                    if self.kernel_copy && !keep {
                        let (sys, src) = (&self.ctx.sys, self.slot(page));
                        // SAFETY: the destination is the hole that these pages left, the source
                        // their slots.
                        return (unsafe { sys.copy_in(&self.ctx.uffd, dst, src, len) }, false);
                    }
                    let src = if keep { self.slot(page) } else { self.frame(page) };
                    // SAFETY: the destination is the hole that these pages left; the source is
                    // ours.
                    let moved = unsafe { self.ctx.sys.move_range(&self.ctx.uffd, dst, src, len) };
                    (moved, false)
                })
            };
            let done = step.done / page_size();
            if done > 0 {
                let outcome = match (gone, keep) {
                    (true, _) => Outcome::Gone,
                    (false, true) => Outcome::CopyFailed,
                    (false, false) => Outcome::Moved,
                };
                let stays = keep || gone || self.kernel_copy;
                self.settle(page..page + done, outcome, stays, keep && !gone);
                page += done;
                tries = 0;
            }
            match step.error {
                None => {}
                Some(Errno(libc::EAGAIN)) if done > 0 => {}
                Some(Errno(libc::EAGAIN | libc::EINTR | libc::ENOMEM)) => {
                    // The page must come back: there is no giving up here.
                    back_off(tries);
                    tries += 1;
                }
                Some(errno) => {
                    if self.place_otherwise(page, errno, keep) {
                        tally.fallbacks += 1;
                        page += 1;
                        tries = 0;
                    } else {
                        back_off(tries);
                        tries += 1;
                    }
                }
            }
        }
    }

    /// The kernel would not move the page in (its mapping was locked or protected meanwhile, or
    /// is gone). A copy by the kernel works where moving does not. False: try again.
    fn place_otherwise(&mut self, page: usize, why: Errno, keep: bool) -> bool {
        let home = self.ctx.flights.home_of(self.addr(page));
        if why == Errno(libc::EEXIST) {
            // Something stands there that the program put there after it gave this page up.
            self.settle(page..page + 1, Outcome::Gone, true, false);
            return true;
        }
        let original = keep || self.kernel_copy;
        let src = if original { self.slot(page) } else { self.frame(page) };
        // SAFETY: the destination is the hole that this page left; the source is ours.
        let copied = unsafe { self.ctx.sys.copy_in(&self.ctx.uffd, home, src, page_size()) };
        match copied.error {
            None => {
                self.placed_otherwise = true;
                let outcome = if keep { Outcome::CopyFailed } else { Outcome::Moved };
                // The frame is still in the pool, and so is the original.
                self.settle(page..page + 1, outcome, true, false);
                true
            }
            // No mapping of ours there any more: the program has unmapped it.
            Some(Errno(libc::ENOENT | libc::EINVAL | libc::EEXIST | libc::ESRCH)) => {
                self.settle(page..page + 1, Outcome::Gone, true, false);
                true
            }
            // The source cannot be read: a memory error. What the program must feel is SIGBUS,
            // not a page of zeros.
            Some(Errno(libc::EFAULT | libc::EHWPOISON)) if keep => {
                let marked = self.ctx.sys.poison(&self.ctx.uffd, home, page_size());
                let settled = marked.error.is_none();
                if settled {
                    self.settle(page..page + 1, Outcome::CopyFailed, true, false);
                }
                settled
            }
            Some(_) => {
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
