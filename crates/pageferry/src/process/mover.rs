//! A worker: asks for the nodes of a piece's pages, moves those that are to be moved in calls
//! that fit the latency target, and finds out what became of each.
//!
//! What always holds: each page of a piece gets exactly one outcome, or is kept to be tried again
//! a bounded number of times.
//!
//! What the kernel tells (mm/migrate.c, `do_pages_move`): pages are queued; one that cannot be
//! queued has its errno stored as its status, and what was queued before it is moved; when pages
//! of a queue cannot be moved, the call ends, and the statuses of that queue and of everything
//! after it are left alone. So what says `EBUSY`, or nothing, is asked for once more.
//!
//! A page of a larger folio that is queued already says `EBUSY` too, though it moves with the folio;
//! and because it has a status the queue is moved there and then. Of folios that the page table maps
//! page by page (64 KiB ones, huge pages that were split in the table) each would be a queue of its
//! own, with its own TLB flushes. So once some are met, a call names pages in another order
//! ([`folios_apart`](super::send)), and the queue ends once for all of them.

use super::age::Look;
use super::job::Job;
use super::missing::PageMap;
use super::notes::Note;
use super::pace::Chunk;
use super::piece::{Piece, Span};
use super::place::Decision;
use super::report::Tally;
use super::retry::{may_pass, outcome_of};
use super::select::Kind;
use super::targets::Process;
use crate::report::{Busy, Outcome};
use pageferry_sys::process::UNTOLD;
use pageferry_sys::{Errno, page_size};
use std::sync::atomic::Ordering;

/// Where a call has met folios that are mapped page by page, so many more calls expect them.
const FOLIOS_EXPECTED: u32 = 16;

/// A page that is to be moved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub(super) address: usize,
    pub(super) page_bytes: usize,
    pub(super) kind: Kind,
    /// It was found on a node before, not on its destination.
    pub(super) seen: bool,
}

#[derive(Debug)]
pub(super) struct Mover<'j> {
    pub(super) job: &'j Job,
    pub(super) tally: Tally,
    pub(super) base: Chunk,
    pub(super) huge: Chunk,
    addresses: Vec<usize>,
    nodes: Vec<i32>,
    status: Vec<i32>,
    /// Pages by destination.
    pub(super) picked: Vec<Vec<Item>>,
    /// Indices of what is asked for once more.
    unclear: Vec<usize>,
    pub(super) failed: Vec<(Item, Errno)>,
    /// What the kernel says is not there (`ENOENT`).
    pub(super) missing: Vec<Item>,
    /// Pages of the piece were not there any more.
    pub(super) lost: bool,
    /// For so many calls more, folios that are mapped page by page are expected.
    pub(super) folios: u32,
    pub(super) look: Look,
    pub(super) page_map: PageMap,
}

impl<'j> Mover<'j> {
    pub(super) fn new(job: &'j Job) -> Self {
        Self {
            job,
            tally: Tally::default(),
            base: Chunk::new(job.latency, false),
            huge: Chunk::new(job.latency, true),
            addresses: Vec::new(),
            nodes: Vec::new(),
            status: Vec::new(),
            picked: vec![Vec::new(); job.placement.nodes.len()],
            unclear: Vec::new(),
            failed: Vec::new(),
            missing: Vec::new(),
            lost: false,
            folios: 0,
            look: Look::default(),
            page_map: PageMap::default(),
        }
    }

    /// Settles every page of a piece, or keeps it for later.
    pub(super) fn piece(&mut self, piece: &Piece) {
        let process = &piece.process;
        if piece.tries == 0 {
            self.job.control.looked_at.fetch_add(piece.bytes as u64, Ordering::Relaxed);
        } else {
            self.tally.retried_bytes += piece.bytes as u64;
        }
        if process.is_gone() {
            return self.all(piece, Outcome::Exited);
        }
        if let Err(errno) = self.ask(piece) {
            let ended = process.ended_by(errno);
            let stayed = Outcome::Busy(Busy::Other(errno.0));
            return self.all(piece, if ended { Outcome::Exited } else { stayed });
        }
        self.pick(piece);
        for index in 0..self.picked.len() {
            let mut items = std::mem::take(&mut self.picked[index]);
            self.leave_young(process, &mut items);
            self.send(process, index, &mut items, piece.tries);
            items.clear();
            self.picked[index] = items;
        }
        self.clear_missing(process, piece.tries);
        self.keep_failed(process, piece.tries);
        if std::mem::take(&mut self.lost) {
            self.job.work.look_again(process);
        }
    }

    /// Asks for the nodes of a piece's pages.
    pub(super) fn ask(&mut self, piece: &Piece) -> Result<(), Errno> {
        self.addresses.clear();
        self.addresses.extend(piece.spans.iter().flat_map(Span::addresses));
        self.status.clear();
        self.status.resize(self.addresses.len(), UNTOLD);
        piece.process.view.nodes(&self.addresses, &mut self.status)
    }

    pub(super) fn all(&mut self, piece: &Piece, outcome: Outcome) {
        self.note_end(&piece.process, outcome);
        for span in &piece.spans {
            for address in span.addresses() {
                self.tally.page(piece.process.pid, span.kind, address, span.page_bytes, outcome);
            }
        }
    }

    /// Decides what is to be done with each page, by the node it is on.
    pub(super) fn pick(&mut self, piece: &Piece) {
        let (pid, mut index) = (piece.process.pid, 0);
        for span in &piece.spans {
            let (kind, page_bytes) = (span.kind, span.page_bytes);
            for address in span.addresses() {
                let told = self.status[index];
                index += 1;
                if span.common && told >= 0 {
                    self.tally.common += page_bytes as u64;
                }
                let outcome = match u32::try_from(told) {
                    Ok(on) => match self.job.placement.decide(address, page_bytes, on) {
                        // What failed before and is there now has moved.
                        Decision::There if piece.seen && !self.job.dry_run => Outcome::Moved,
                        Decision::There => Outcome::AlreadyThere,
                        Decision::NotAsked => Outcome::NotAsked,
                        Decision::To(to) => {
                            self.picked[to].push(Item { address, page_bytes, kind, seen: true });
                            continue;
                        }
                    },
                    Err(_) if told == -libc::ENOENT => {
                        self.missing.push(Item { address, page_bytes, kind, seen: piece.seen });
                        continue;
                    }
                    Err(_) => outcome_of(Errno(told.saturating_neg()), page_bytes, kind),
                };
                self.lost |= outcome == Outcome::Unmapped;
                self.tally.page(pid, kind, address, page_bytes, outcome);
            }
        }
    }

    /// Notes that a process has ended, if that is what became of its pages.
    fn note_end(&mut self, process: &Process, outcome: Outcome) {
        if outcome == Outcome::Exited {
            self.tally.notes.all(process.note_of_end());
        }
    }

    pub(super) fn settle(&mut self, process: &Process, items: &[Item], outcome: Outcome) {
        self.note_end(process, outcome);
        for item in items {
            self.tally.page(process.pid, item.kind, item.address, item.page_bytes, outcome);
        }
    }

    /// One call, for pages of one size. Returns how many of them it is done with, at least one,
    /// and how many bytes it moved.
    pub(super) fn call(
        &mut self,
        process: &Process,
        to: usize,
        items: &[Item],
        tries: u32,
    ) -> (usize, u64) {
        let node = self.job.placement.nodes[to];
        let told = i32::try_from(node.get()).unwrap_or(-1);
        self.addresses.clear();
        self.addresses.extend(items.iter().map(|i| i.address));
        self.nodes.clear();
        self.nodes.resize(items.len(), told);
        self.status.clear();
        self.status.resize(items.len(), UNTOLD);
        let shared = self.job.moves_shared.load(Ordering::Relaxed);
        let began = self.job.kernel.now();
        let result =
            process.view.move_pages(&self.addresses, &self.nodes, &mut self.status, shared);
        let took = self.job.kernel.now().saturating_sub(began);
        self.tally.calls.record(took);
        // Nothing that the call says counts if the process ended: the number may be another's.
        let ended = process.ended_by(result.err().unwrap_or(Errno(0)));
        let refused = match result {
            _ if ended => Some(Outcome::Exited),
            Err(Errno(libc::EACCES)) => {
                self.forbid(process, items, node);
                return (items.len(), 0);
            }
            Err(Errno(libc::EPERM)) if shared => {
                // The right was taken away meanwhile.
                self.job.moves_shared.store(false, Ordering::Relaxed);
                return self.call(process, to, items, tries);
            }
            Err(errno @ Errno(libc::EPERM | libc::EINVAL | libc::ENODEV | libc::ENOSYS)) => {
                Some(Outcome::Busy(Busy::Other(errno.0)))
            }
            _ => None,
        };
        if let Some(outcome) = refused {
            self.settle(process, items, outcome);
            return (items.len(), 0);
        }
        let done = self.clear_up(process, told, items.len());
        let given_up = result.err().unwrap_or(Errno(libc::EBUSY));
        if given_up == Errno(libc::ENOMEM) {
            self.job.room.exhausted(to);
        }
        let mut moved = 0;
        for (index, item) in items[..done].iter().enumerate() {
            let errno = match self.status[index] {
                UNTOLD => given_up,
                node if node >= 0 => {
                    moved += 1;
                    self.tally.page(
                        process.pid,
                        item.kind,
                        item.address,
                        item.page_bytes,
                        Outcome::Moved,
                    );
                    continue;
                }
                negative => Errno(negative.saturating_neg()),
            };
            if errno == Errno(libc::ENOENT) {
                self.missing.push(*item);
                continue;
            }
            if may_pass(errno) && tries < self.job.retries {
                self.failed.push((*item, errno));
                continue;
            }
            if errno == Errno(libc::EACCES) {
                self.tally.notes.add(Note::SharedLeft { bytes: item.page_bytes as u64 });
            }
            let outcome = outcome_of(errno, item.page_bytes, item.kind);
            self.lost |= outcome == Outcome::Unmapped;
            self.tally.page(process.pid, item.kind, item.address, item.page_bytes, outcome);
        }
        let page_bytes = items.first().map_or(0, |i| i.page_bytes);
        let chunk = if page_bytes > page_size() { &mut self.huge } else { &mut self.base };
        if took > self.job.latency && items.len() <= chunk.least() {
            self.tally.slow_calls += 1;
        }
        // A call that failed early says little of what its pages would have taken.
        if moved * 2 >= items.len() || took > self.job.latency {
            chunk.learn(items.len(), took);
        }
        (done, (moved * page_bytes) as u64)
    }

    /// Finds out what the statuses do not tell. Afterwards those of the pages that the call came
    /// to, how many is returned, are a node, an errno, or untold: given up on.
    fn clear_up(&mut self, process: &Process, to: i32, count: usize) -> usize {
        let busy = -libc::EBUSY;
        // The queue that was given up on lies before the last status that was told; if nothing
        // untold lies there, it was the last one, to the end.
        let last_told = self.status.iter().rposition(|&s| s != UNTOLD);
        let done = match last_told {
            Some(last) if self.status[..last].contains(&UNTOLD) => last + 1,
            _ => count,
        };
        let status = &self.status[..done];
        self.unclear.clear();
        self.folios = self.folios.saturating_sub(1);
        self.unclear.extend((0..done).filter(|&i| status[i] == UNTOLD || status[i] == busy));
        if self.unclear.is_empty() {
            return done;
        }
        // Both buffers are longer than what was moved: their tails serve.
        let from = self.addresses.len();
        for position in 0..self.unclear.len() {
            let address = self.addresses[self.unclear[position]];
            self.addresses.push(address);
        }
        self.nodes.clear();
        self.nodes.resize(self.unclear.len(), UNTOLD);
        // If this fails too they count as what they said.
        let asked = process.view.nodes(&self.addresses[from..], &mut self.nodes);
        self.addresses.truncate(from);
        if asked.is_ok() {
            for (&index, &node) in self.unclear.iter().zip(&self.nodes) {
                let gone = node == -libc::ENOENT || node == -libc::EFAULT;
                if node == to || gone {
                    if self.status[index] == busy && node == to {
                        self.folios = FOLIOS_EXPECTED;
                    }
                    self.status[index] = node;
                }
            }
        }
        done
    }
}
