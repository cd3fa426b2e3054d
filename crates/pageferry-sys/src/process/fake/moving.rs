//! `do_pages_move` of the made-up kernel.

use super::{FakePage, FakeProcess, FakeVma, Hindrance, State, page_at};
use crate::{Errno, page_size};
use std::collections::HashSet;

/// The pages of the folio at an address, and their size.
pub(super) fn folio_at(
    process: &mut FakeProcess,
    address: usize,
) -> Option<(&mut [FakePage], usize)> {
    let vma = process.vmas.iter_mut().find(|v| v.vma.range().contains(&address))?;
    let bytes = vma.page_bytes;
    let start = folio_start(vma, address).max(vma.vma.start);
    let end = (folio_start(vma, address) + vma.folio_bytes.max(bytes)).min(vma.vma.end);
    let pages = (start - vma.vma.start) / bytes..(end - vma.vma.start) / bytes;
    Some((vma.pages.get_mut(pages)?, bytes))
}

fn folio_start(vma: &FakeVma, address: usize) -> usize {
    address & !(vma.folio_bytes.max(vma.page_bytes) - 1)
}

impl State {
    /// What processes have in common with this page since a fork is where it is.
    fn take_along(&mut self, pid: u32, address: usize, node: u32) {
        let common = |process: &mut FakeProcess| match page_at(process, address)?.0.hindrance {
            Some(Hindrance::Forked(owner)) => Some(owner),
            _ => None,
        };
        let owner = self.processes.get_mut(&pid).and_then(|(process, _)| common(process));
        for (process, _) in self.processes.values_mut().filter(|_| owner.is_some()) {
            if common(process) == owner
                && let Some((page, _)) = page_at(process, address)
            {
                page.node = page.node.and(Some(node));
            }
        }
    }

    /// Moves what is queued. `Err`: what the call returns.
    fn flush(
        &mut self,
        pid: u32,
        queue: &mut Vec<(usize, usize)>,
        node: u32,
        status: &mut [i32],
        left: usize,
    ) -> Result<(), Result<usize, Errno>> {
        let mut failed = 0;
        let told = i32::try_from(node).unwrap_or(-1);
        let queue = std::mem::take(queue);
        self.batches += usize::from(!queue.is_empty());
        for &(_, address) in &queue {
            let free = self.nodes[node as usize].0;
            let Ok(process) = self.living(pid) else { return Err(Err(Errno(libc::ESRCH))) };
            let Some((page, _)) = page_at(process, address) else { continue };
            if let Some(Hindrance::Fails(times @ 1..)) = &mut page.hindrance {
                *times -= 1;
                failed += 1;
                continue;
            }
            let Some((pages, page_bytes)) = folio_at(process, address) else { continue };
            let there = pages.iter().filter(|page| page.node.is_some()).count();
            if free < (there * page_bytes) as u64 {
                return Err(Err(Errno(libc::ENOMEM)));
            }
            let forked = pages.iter().any(|p| matches!(p.hindrance, Some(Hindrance::Forked(_))));
            let from: Vec<u32> = pages
                .iter_mut()
                .filter(|page| page.node.is_some())
                .filter_map(|page| page.node.replace(node))
                .collect();
            if forked {
                self.take_along(pid, address, node);
            }
            for from in from {
                self.nodes[node as usize].0 -= page_bytes as u64;
                self.nodes[from as usize].0 += page_bytes as u64;
                let cost = if page_bytes > page_size() { 64 } else { 1 };
                self.now += self.per_page * cost;
            }
        }
        if failed > 0 {
            return Err(Ok(failed + left));
        }
        queue.iter().for_each(|&(index, _)| status[index] = told);
        Ok(())
    }
    pub(super) fn move_all(
        &mut self,
        pid: u32,
        pages: &[usize],
        nodes: &[i32],
        status: &mut [i32],
        shared: bool,
    ) -> Result<usize, Errno> {
        let mut queue = Vec::new();
        // Where the folios of several pages begin that are queued.
        let mut queued = HashSet::new();
        for (index, (&address, &node)) in pages.iter().zip(nodes).enumerate() {
            let node = u32::try_from(node).map_err(|_| Errno(libc::ENODEV))?;
            if node as usize >= self.nodes.len() {
                return Err(Errno(libc::ENODEV));
            }
            let process = self.living(pid)?;
            let allowed = &process.status.nodes_allowed;
            if !allowed.is_empty() && !allowed.split(',').any(|n| n.parse() == Ok(node)) {
                return Err(Errno(libc::EACCES));
            }
            let vma = process.vmas.iter().find(|v| v.vma.range().contains(&address));
            let vma = vma.filter(|vma| vma.folio_bytes > vma.page_bytes);
            let folio = vma.map(|vma| folio_start(vma, address));
            let missing = page_at(process, address).is_some_and(|(page, _)| page.is_missing());
            let told = match page_at(process, address) {
                None => -libc::EFAULT,
                Some((FakePage { hindrance: Some(Hindrance::Zero), .. }, _)) => -libc::EFAULT,
                Some(_) if missing => -libc::ENOENT,
                Some((page, _)) if page.node == Some(node) => i32::try_from(node).unwrap_or(-1),
                Some(_) if folio.is_some_and(|folio| !queued.insert(folio)) => -libc::EBUSY,
                Some((page, _)) => match &mut page.hindrance {
                    Some(Hindrance::Shared | Hindrance::Forked(_)) if !shared => -libc::EACCES,
                    Some(Hindrance::Unqueued(errno, times)) if *times > 0 => {
                        *times -= 1;
                        -*errno
                    }
                    _ => {
                        queue.push((index, address));
                        continue;
                    }
                },
            };
            status[index] = told;
            queued.clear();
            let left = pages.len() - index - 1;
            if let Err(ends) = self.flush(pid, &mut queue, node, status, left) {
                return ends;
            }
        }
        let node = nodes.first().and_then(|n| u32::try_from(*n).ok()).unwrap_or(0);
        self.flush(pid, &mut queue, node, status, 0).map_or_else(|ends| ends, |()| Ok(0))
    }
}
