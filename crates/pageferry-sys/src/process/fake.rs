//! A kernel that a test makes up: processes, nodes, and what goes wrong. A test part; nothing
//! else uses it.
//!
//! It answers as `do_pages_move` in mm/migrate.c does, gaps in the statuses included: pages are
//! queued and moved together; a page that cannot be queued has its errno stored and the queue
//! moved; when pages of a queue fail, the call ends there and the statuses of that queue and of
//! all later pages stay untouched. Its clock stands still except for what calls are said to cost.

mod calls;

use super::{Backing, Backings};
use crate::procfs::{Status, Vma};
use crate::{Errno, page_size};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The call to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the method of the same name")]
pub enum ProcessOp {
    Open,
    Status,
    Maps,
    NextMap,
    Scan,
    Entries,
    Nodes,
    MovePages,
    Members,
    Parents,
    NodeFree,
    NodeWatermark,
}

/// What happens in the middle of a move.
#[derive(Clone, Debug)]
pub enum Event {
    /// A process ends.
    Exit(u32),
    /// A process executes another program, whose mappings are these.
    Exec(u32, Vec<FakeVma>),
    /// A process unmaps what lies in a range.
    Unmap(u32, Range<usize>),
    /// A process appears, in a cgroup.
    Join(PathBuf, FakeProcess),
    /// A node's free memory becomes this many bytes.
    Free(u32, u64),
}

/// What keeps a page where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hindrance {
    /// It cannot be queued, so many times: its status is this errno.
    Unqueued(i32, u32),
    /// Its migration fails, so many times: the call ends there.
    Fails(u32),
    /// Another process maps it too.
    Shared,
    /// It is the shared zero page.
    Zero,
}

/// A page: the node it is on, if it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FakePage {
    /// Its node; `None`: not present.
    pub node: Option<u32>,
    /// What keeps it there.
    pub hindrance: Option<Hindrance>,
}

/// A mapping and its pages.
#[derive(Clone, Debug)]
pub struct FakeVma {
    /// The mapping.
    pub vma: Vma,
    /// Bytes of each page: the base size, or that of huge pages.
    pub page_bytes: usize,
    /// Its pages.
    pub pages: Vec<FakePage>,
}

impl FakeVma {
    /// Private anonymous memory from `start` on, all of its pages on `node`.
    pub fn anonymous(start: usize, page_bytes: usize, pages: usize, node: u32) -> Self {
        let vma = Vma { start, end: start + pages * page_bytes, ..Vma::default() };
        let page = FakePage { node: Some(node), hindrance: None };
        Self { vma, page_bytes, pages: vec![page; pages] }
    }
}

/// A process.
#[derive(Clone, Debug)]
pub struct FakeProcess {
    /// What it is; `tgid` is its pid.
    pub status: Status,
    /// Its mappings, ascending.
    pub vmas: Vec<FakeVma>,
}

impl FakeProcess {
    /// A process that sleeps.
    pub fn new(pid: u32, vmas: Vec<FakeVma>) -> Self {
        let status = Status { tgid: pid, state: 'S', threads: 1, ..Status::default() };
        Self { status, vmas }
    }
}

#[derive(Debug, Default)]
struct State {
    /// Free bytes and watermark of each node.
    nodes: Vec<(u64, u64)>,
    processes: BTreeMap<u32, (FakeProcess, u64)>,
    groups: BTreeMap<PathBuf, Vec<u32>>,
    backings: Backings,
    faults: Vec<(ProcessOp, Errno, u64, u64)>,
    events: Vec<(u64, Event)>,
    calls: Vec<ProcessOp>,
    moves: Vec<(usize, Duration)>,
    no_scan: bool,
    only_own: bool,
    per_page: Duration,
    now: Duration,
}

/// A made-up kernel; clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct FakeKernel(Arc<Mutex<State>>);

impl FakeKernel {
    /// A machine whose nodes have this much free memory each, in bytes.
    pub fn new(free: &[u64]) -> Self {
        let kernel = Self::default();
        kernel.lock().nodes = free.iter().map(|&free| (free, 0)).collect();
        kernel
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a process.
    pub fn add(&self, process: FakeProcess) {
        self.lock().processes.insert(process.status.tgid, (process, 1));
    }

    /// Puts a process into a cgroup.
    pub fn join(&self, group: &Path, pid: u32) {
        self.lock().groups.entry(group.into()).or_default().push(pid);
    }

    /// Calls of this kind fail from the `after`-th on, `times` times.
    pub fn fail(&self, op: ProcessOp, errno: Errno, after: u64, times: u64) {
        self.lock().faults.push((op, errno, after, times));
    }

    /// Before the `nth` call to move pages (from 0) this happens.
    pub fn before_move(&self, nth: u64, event: Event) {
        self.lock().events.push((nth, event));
    }

    /// The kernel has no `PAGEMAP_SCAN`.
    pub fn without_scan(&self) {
        self.lock().no_scan = true;
    }

    /// The caller has no `CAP_SYS_NICE`.
    pub fn without_rights(&self) {
        self.lock().only_own = true;
    }

    /// Moving a base page takes this long.
    pub fn page_takes(&self, time: Duration) {
        self.lock().per_page = time;
    }

    /// What a node keeps free, in bytes.
    pub fn watermark(&self, node: usize, bytes: u64) {
        self.lock().nodes[node].1 = bytes;
    }

    /// What mappings of a device are.
    pub fn device(&self, device: (u32, u32), backing: Backing) {
        self.lock().backings.push((device, backing));
    }

    /// How many calls of a kind there were.
    pub fn calls(&self, op: ProcessOp) -> usize {
        self.lock().calls.iter().filter(|o| **o == op).count()
    }

    /// The calls that moved pages: how many pages each was given, and how long it took.
    pub fn moves(&self) -> Vec<(usize, Duration)> {
        self.lock().moves.clone()
    }

    /// The nodes of a process's pages, mapping by mapping.
    pub fn nodes_of(&self, pid: u32) -> Vec<Vec<Option<u32>>> {
        let state = self.lock();
        let vmas = state.processes.get(&pid).map_or(&[][..], |(p, _)| &p.vmas);
        vmas.iter().map(|v| v.pages.iter().map(|p| p.node).collect()).collect()
    }
}

impl State {
    fn check(&mut self, op: ProcessOp) -> Result<(), Errno> {
        self.calls.push(op);
        let mut hit = Ok(());
        for (_, errno, after, times) in self.faults.iter_mut().filter(|f| f.0 == op) {
            if *after > 0 {
                *after -= 1;
            } else if *times > 0 {
                *times -= 1;
                hit = Err(*errno);
            }
        }
        hit
    }

    fn living(&mut self, pid: u32) -> Result<&mut FakeProcess, Errno> {
        let process = self.processes.get_mut(&pid).map(|(p, _)| p);
        process.filter(|p| p.status.state != 'Z').ok_or(Errno(libc::ESRCH))
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Exit(pid) => drop(self.processes.remove(&pid)),
            Event::Exec(pid, vmas) => {
                if let Some((process, image)) = self.processes.get_mut(&pid) {
                    (process.vmas, *image) = (vmas, *image + 1);
                }
            }
            Event::Unmap(pid, range) => {
                if let Some((process, _)) = self.processes.get_mut(&pid) {
                    process.vmas.retain(|v| v.vma.end <= range.start || v.vma.start >= range.end);
                }
            }
            Event::Join(group, process) => {
                self.groups.entry(group).or_default().push(process.status.tgid);
                self.processes.insert(process.status.tgid, (process, 1));
            }
            Event::Free(node, bytes) => self.nodes[node as usize].0 = bytes,
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
        for &(_, address) in &queue {
            let free = self.nodes[node as usize].0;
            let Ok(process) = self.living(pid) else { return Err(Err(Errno(libc::ESRCH))) };
            let Some((page, bytes)) = page_at(process, address) else { continue };
            if let Some(Hindrance::Fails(times @ 1..)) = &mut page.hindrance {
                *times -= 1;
                failed += 1;
                continue;
            }
            if free < bytes as u64 {
                return Err(Err(Errno(libc::ENOMEM)));
            }
            let from = page.node.replace(node);
            self.nodes[node as usize].0 -= bytes as u64;
            if let Some(from) = from {
                self.nodes[from as usize].0 += bytes as u64;
            }
            let cost = if bytes > page_size() { 64 } else { 1 };
            self.now += self.per_page * cost;
        }
        if failed > 0 {
            return Err(Ok(failed + left));
        }
        queue.iter().for_each(|&(index, _)| status[index] = told);
        Ok(())
    }
}

/// The page at an address, and its size.
fn page_at(process: &mut FakeProcess, address: usize) -> Option<(&mut FakePage, usize)> {
    let vma = process.vmas.iter_mut().find(|v| v.vma.range().contains(&address))?;
    let bytes = vma.page_bytes;
    let index = (address - vma.vma.start) / bytes;
    Some((vma.pages.get_mut(index)?, bytes))
}

impl State {
    fn move_all(
        &mut self,
        pid: u32,
        pages: &[usize],
        nodes: &[i32],
        status: &mut [i32],
        shared: bool,
    ) -> Result<usize, Errno> {
        let mut queue = Vec::new();
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
            let told = match page_at(process, address) {
                None => -libc::EFAULT,
                Some((FakePage { hindrance: Some(Hindrance::Zero), .. }, _)) => -libc::EFAULT,
                Some((FakePage { node: None, .. }, _)) => -libc::ENOENT,
                Some((page, _)) if page.node == Some(node) => i32::try_from(node).unwrap_or(-1),
                Some((page, _)) => match &mut page.hindrance {
                    Some(Hindrance::Shared) if !shared => -libc::EACCES,
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
            let left = pages.len() - index - 1;
            if let Err(ends) = self.flush(pid, &mut queue, node, status, left) {
                return ends;
            }
        }
        let node = nodes.first().and_then(|n| u32::try_from(*n).ok()).unwrap_or(0);
        self.flush(pid, &mut queue, node, status, 0).map_or_else(|ends| ends, |()| Ok(0))
    }
}
