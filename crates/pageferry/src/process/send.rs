//! Where the pages of a piece that are to be moved find room, and in which portions they go there.
//!
//! What always holds: a page is sent only where its process may have memory, and only on room that
//! was granted. A dry run takes the same room, and keeps it, so that it tells what would fit.
//!
//! What can go wrong: a cpuset changes after its process was opened. The kernel says so then
//! (`EACCES`), or pages stay that could have gone.

use super::mover::{Item, Mover};
use super::notes::Note;
use super::select::Kind;
use super::targets::Process;
use crate::report::{Outcome, Shortage};
use pageferry_sys::page_size;
use pageferry_topology::NodeId;
use std::cmp::Reverse;
use std::sync::atomic::Ordering;

impl Mover<'_> {
    /// Moves pages to the node of this index, or to later ones where that is full.
    pub(super) fn send(&mut self, process: &Process, index: usize, items: &mut [Item], tries: u32) {
        let mut rest = items;
        if !rest.is_empty() && self.choices(process, index).next().is_none() {
            let node = self.job.placement.nodes[index];
            return self.forbid(process, rest, node);
        }
        while let Some(first) = rest.first() {
            if self.job.control.is_cancelled() {
                return self.settle(process, rest, Outcome::Cancelled);
            }
            if process.has_ended() {
                return self.settle(process, rest, Outcome::Exited);
            }
            let page_bytes = first.page_bytes;
            let chunk = if page_bytes > page_size() { &self.huge } else { &self.base };
            let most = self.job.most_at_once(page_bytes).min(chunk.pages());
            let most = if self.job.dry_run { rest.len() } else { most };
            // Hugetlb pages come from a pool of their own.
            let pooled = first.kind == Kind::Hugetlb;
            let is_alike =
                |i: &&Item| i.page_bytes == page_bytes && (i.kind == Kind::Hugetlb) == pooled;
            let alike = rest.iter().take(most).take_while(is_alike).count();
            let want = (alike * page_bytes) as u64;
            let set_aside = if pooled { self.set_aside(process, index, page_bytes) } else { None };
            let given = match set_aside {
                Some((to, bytes)) => Some((to, bytes.min(want))),
                None => self.room(process, index, want, page_bytes as u64),
            };
            let Some((to, granted)) = given else {
                let node = self.job.placement.nodes[index];
                self.tally.notes.add(Note::NodeFull { node });
                let (here, more) = rest.split_at_mut(alike);
                self.settle(process, here, Outcome::NoFrame(Shortage::Reserve));
                rest = more;
                continue;
            };
            let count = usize::try_from(granted / page_bytes as u64).unwrap_or(alike).min(alike);
            if self.job.dry_run {
                if set_aside.is_some() {
                    self.job.room.promise(to, page_bytes, (count * page_bytes) as u64);
                }
                let (here, more) = rest.split_at_mut(count);
                self.settle(process, here, Outcome::WouldMove);
                rest = more;
                continue;
            }
            self.job.pace((count * page_bytes) as u64);
            if self.folios > 0 && page_bytes == page_size() {
                folios_apart(&mut rest[..count]);
            }
            let (done, moved) = self.call(process, to, &rest[..count], tries);
            if set_aside.is_none() {
                self.job.room.settle(to, granted, moved);
            }
            self.job.control.moved.fetch_add(moved, Ordering::Relaxed);
            rest = &mut rest[done..];
        }
    }

    /// The destinations of pages that go to the node of this index: those that the process may
    /// have memory on.
    fn choices(&self, process: &Process, index: usize) -> impl Iterator<Item = usize> {
        let nodes = &self.job.placement.nodes;
        let last = if self.job.placement.spills { nodes.len() } else { index + 1 };
        (index..last).filter(move |to| process.may_have(nodes[*to]))
    }

    /// The cpuset of the process does not allow the destination.
    pub(super) fn forbid(&mut self, process: &Process, items: &[Item], node: NodeId) {
        self.tally.notes.add(Note::Forbidden { pid: process.pid, node });
        self.settle(process, items, Outcome::NoFrame(Shortage::Forbidden));
    }

    /// Hugetlb pages that are set aside and free: on which node, and how many bytes. Taking them
    /// takes no free memory from the node.
    fn set_aside(
        &self,
        process: &Process,
        index: usize,
        page_bytes: usize,
    ) -> Option<(usize, u64)> {
        self.choices(process, index).find_map(|to| {
            let free = self.job.room.set_aside(to, page_bytes);
            (free >= page_bytes as u64).then_some((to, free))
        })
    }

    /// Free memory for at least one page: on which node, and how much.
    fn room(&self, process: &Process, index: usize, want: u64, page: u64) -> Option<(usize, u64)> {
        self.choices(process, index).find_map(|to| {
            let granted = self.job.room.take(to, want);
            if granted >= page {
                return Some((to, granted));
            }
            self.job.room.settle(to, granted, 0);
            None
        })
    }
}

/// Orders base pages so that those of one folio are far apart, whatever its size: a folio's pages
/// are a block that is aligned to its size, so the one whose number has the most factors of two is
/// alone in that among the folio's, and comes before all others, of its own and of all folios of
/// this size. By the time that a second page of a folio comes, all are queued.
fn folios_apart(items: &mut [Item]) {
    items.sort_unstable_by_key(|item| {
        let number = item.address / page_size();
        (Reverse(number.trailing_zeros()), number)
    });
}
