//! The calls of the made-up kernel.

use super::idle::frame_of;
use super::{FakeKernel, Hindrance, ProcessOp, page_at};
use crate::idle::IdlePages;
use crate::pagemap::{Categories, Entry, Run};
use crate::process::{Backings, ProcessKernel, ProcessView};
use crate::procfs::{ReadMaps, Status, Vma};
use crate::{Errno, page_size};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

impl ProcessKernel for FakeKernel {
    fn open(&self, pid: u32) -> Result<Arc<dyn ProcessView>, Errno> {
        let mut state = self.lock();
        state.check(ProcessOp::Open)?;
        let found = state.processes.contains_key(&pid);
        found.then_some(()).ok_or(Errno(libc::ESRCH))?;
        Ok(Arc::new(FakeView { kernel: self.clone(), pid }))
    }
    fn may_ask(&self) -> Result<(), Errno> {
        self.lock().refused.map_or(Ok(()), Err)
    }
    fn lacks_numa(&self) -> bool {
        self.lock().no_numa
    }
    fn has_own_procfs(&self) -> bool {
        !self.lock().foreign_procfs
    }
    fn own_status(&self) -> Result<Status, Errno> {
        let nodes_allowed = self.lock().own_nodes.clone();
        Ok(Status { tgid: std::process::id(), nodes_allowed, ..Status::default() })
    }
    fn find_group(&self, path: &Path) -> Option<PathBuf> {
        self.lock().groups.contains_key(path).then(|| path.to_path_buf())
    }
    fn members(&self, group: &Path) -> Result<Vec<u32>, Errno> {
        let mut state = self.lock();
        state.check(ProcessOp::Members)?;
        state.groups.get(group).cloned().ok_or(Errno(libc::ENOENT))
    }
    fn parents(&self) -> Result<Vec<(u32, u32)>, Errno> {
        let mut state = self.lock();
        state.check(ProcessOp::Parents)?;
        Ok(state.processes.iter().map(|(&pid, (p, _))| (pid, p.status.parent)).collect())
    }
    fn may_move_shared(&self) -> bool {
        !self.lock().only_own
    }
    fn node_free(&self, node: u32) -> Result<u64, Errno> {
        let mut state = self.lock();
        state.check(ProcessOp::NodeFree)?;
        state.nodes.get(node as usize).map(|n| n.0).ok_or(Errno(libc::ENOENT))
    }
    fn node_watermark(&self, node: u32) -> Result<u64, Errno> {
        let mut state = self.lock();
        state.check(ProcessOp::NodeWatermark)?;
        state.nodes.get(node as usize).map(|n| n.1).ok_or(Errno(libc::ENOENT))
    }
    fn idle_pages(&self) -> Result<Arc<dyn IdlePages>, Errno> {
        let mut state = self.lock();
        state.check(ProcessOp::IdlePages)?;
        state.idle.tracked.then(|| Arc::new(self.clone()) as _).ok_or(Errno(libc::ENOENT))
    }
    fn hugetlb_free(&self, node: u32, page_bytes: usize) -> Result<u64, Errno> {
        Ok(self.lock().pools.get(&(node, page_bytes)).copied().unwrap_or(0))
    }
    fn now(&self) -> Duration {
        self.lock().now
    }
    fn sleep(&self, time: Duration) {
        let mut state = self.lock();
        state.now += time;
        state.events_by_clock();
        drop(state);
        std::thread::yield_now();
    }
}

#[derive(Debug)]
struct FakeView {
    kernel: FakeKernel,
    pid: u32,
}

/// The mappings as they are when each is read.
#[derive(Debug)]
struct FakeMaps {
    kernel: FakeKernel,
    pid: u32,
    image: u64,
    at: usize,
}

impl ReadMaps for FakeMaps {
    fn next(&mut self, vma: &mut Vma) -> Result<bool, Errno> {
        let mut state = self.kernel.lock();
        state.check(ProcessOp::NextMap)?;
        let process = state.processes.get(&self.pid).filter(|(_, image)| *image == self.image);
        let next = process.and_then(|(p, _)| p.vmas.iter().find(|v| v.vma.start >= self.at));
        let Some(next) = next else { return Ok(false) };
        vma.clone_from(&next.vma);
        self.at = vma.end;
        Ok(true)
    }
}

impl ProcessView for FakeView {
    fn status(&self) -> Result<Status, Errno> {
        let mut state = self.kernel.lock();
        state.check(ProcessOp::Status)?;
        state.processes.get(&self.pid).map(|(p, _)| p.status.clone()).ok_or(Errno(libc::ESRCH))
    }
    fn is_alive(&self) -> bool {
        self.kernel.lock().living(self.pid).is_ok()
    }
    fn image(&self) -> u64 {
        self.kernel.lock().processes.get(&self.pid).map_or(0, |(_, image)| *image)
    }
    fn maps(&self) -> Result<Box<dyn ReadMaps>, Errno> {
        self.kernel.lock().check(ProcessOp::Maps)?;
        let image = self.image();
        Ok(Box::new(FakeMaps { kernel: self.kernel.clone(), pid: self.pid, image, at: 0 }))
    }
    fn backings(&self) -> Backings {
        self.kernel.lock().backings.clone()
    }
    fn scan(
        &self,
        start: usize,
        end: usize,
        wanted: Categories,
        returned: Categories,
        out: &mut [Run],
    ) -> Result<(usize, usize), Errno> {
        let mut state = self.kernel.lock();
        state.check(ProcessOp::Scan)?;
        if state.no_scan {
            return Err(Errno(libc::ENOTTY));
        }
        let process = state.living(self.pid)?;
        let mut count = 0;
        for vma in process.vmas.iter().filter(|v| v.vma.start < end && v.vma.end > start) {
            for (index, page) in vma.pages.iter().enumerate() {
                let from = (vma.vma.start + index * vma.page_bytes).max(start);
                let to = (vma.vma.start + (index + 1) * vma.page_bytes).min(end);
                let mut is = Categories::empty();
                let (present, swapped) = page.mapped();
                is.set(Categories::PRESENT, present);
                is.set(Categories::SWAPPED, swapped);
                is.set(Categories::PFN_ZERO, page.hindrance == Some(Hindrance::Zero));
                is.set(Categories::HUGE, vma.page_bytes > page_size());
                is.set(Categories::FILE, vma.vma.inode != 0);
                if from >= to || !is.intersects(wanted) {
                    continue;
                }
                let run = Run::new(from, to, is & returned);
                if let Some(last) = out[..count].last_mut().filter(|last| last.joins(&run)) {
                    last.end = run.end;
                } else if let Some(slot) = out.get_mut(count) {
                    *slot = run;
                    count += 1;
                } else {
                    return Ok((count, from));
                }
            }
        }
        Ok((count, end))
    }
    fn entries(&self, start: usize, out: &mut [Entry]) -> Result<(), Errno> {
        let mut state = self.kernel.lock();
        state.check(ProcessOp::Entries)?;
        let hidden = state.idle.hidden;
        let process = state.living(self.pid)?;
        for (index, entry) in out.iter_mut().enumerate() {
            let address = start + index * page_size();
            let Some((page, _)) = page_at(process, address) else {
                *entry = Entry(0);
                continue;
            };
            let owner = match page.hindrance {
                Some(Hindrance::Forked(owner)) => owner,
                _ => self.pid,
            };
            let frame = if hidden { 0 } else { frame_of(owner, address) };
            *entry = Entry(page.entry(frame));
        }
        Ok(())
    }
    fn nodes(&self, pages: &[usize], status: &mut [i32]) -> Result<(), Errno> {
        let mut state = self.kernel.lock();
        state.check(ProcessOp::Nodes)?;
        state.refused.map_or(Ok(()), Err)?;
        let process = state.living(self.pid)?;
        for (&address, told) in pages.iter().zip(status) {
            *told = match page_at(process, address) {
                None => -libc::EFAULT,
                Some((page, _)) if page.hindrance == Some(Hindrance::Zero) => -libc::EFAULT,
                Some((page, _)) => match (page.is_missing(), page.node) {
                    (false, Some(node)) => i32::try_from(node).unwrap_or(-1),
                    _ => -libc::ENOENT,
                },
            };
        }
        Ok(())
    }
    fn move_pages(
        &self,
        pages: &[usize],
        nodes: &[i32],
        status: &mut [i32],
        shared: bool,
    ) -> Result<usize, Errno> {
        let mut state = self.kernel.lock();
        let began = state.now;
        let nth = state.calls.iter().filter(|o| **o == ProcessOp::MovePages).count() as u64;
        let due = state.events.extract_if(.., |(at, _)| *at <= nth).collect::<Vec<_>>();
        due.into_iter().for_each(|(_, event)| state.happen(event));
        state.check(ProcessOp::MovePages)?;
        state.refused.map_or(Ok(()), Err)?;
        let result = state.move_all(self.pid, pages, nodes, status, shared);
        let took = state.now - began;
        state.moves.push((pages.len(), took));
        result
    }
}
