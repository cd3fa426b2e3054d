//! A kernel that a test makes up: processes, nodes, and what goes wrong. A test part; nothing
//! else uses it.
//!
//! It answers as `do_pages_move` in mm/migrate.c does, gaps in the statuses included: pages are
//! queued and moved together; a page that cannot be queued has its errno stored and the queue
//! moved; when pages of a queue fail, the call ends there and the statuses of that queue and of
//! all later pages stay untouched. A page of a folio of several that is queued already says `EBUSY`,
//! and the folio moves as one. Its clock stands still except for what calls are said to cost, and
//! for sleep.
//!
//! The frame of a page has the number of its address's page, so that folios are aligned as the
//! kernel's are, and keeps it when it moves: what was marked idle is idle on the other node too.

mod calls;
mod idle;
mod moving;

use idle::Idle;

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
    IdlePages,
    FrameFlags,
    ReadIdle,
    MarkIdle,
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
    /// A process uses what lies in a range.
    Touch(u32, Range<usize>),
    /// What is missing in a range of a process comes to be there, on this node.
    Fault(u32, Range<usize>, u32),
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
    /// Something else begins to migrate it when it is first asked for: so many times it is missing
    /// (`ENOENT`), and the page map shows a migration entry, which it calls swapped.
    Migrates(u32),
    /// It is being migrated: so many more times it is missing.
    Migrating(u32),
    /// It is given back just before it is first asked for.
    Vanishes,
    /// It is given back just before it is first asked for, and this stands there from then on.
    GivesWay(Trace),
    /// There is no page, but this.
    Stands(Trace),
    /// It is the page at this address of the process of this pid too, since a fork: one frame. The
    /// page of that process says so as well.
    Forked(u32),
}

/// What stands in a page table where there is no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trace {
    /// A page that was swapped out.
    Swapped,
    /// A marker of a guard region, which the page map tells by a bit of its own.
    Guard,
    /// A marker of a userfaultfd, or of a guard region on a kernel without that bit.
    Marker,
}

/// A page: the node it is on, if it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FakePage {
    /// Its node; `None`: not present.
    pub node: Option<u32>,
    /// What keeps it there.
    pub hindrance: Option<Hindrance>,
}

impl FakePage {
    /// Whether it is mapped, and whether something else than a page stands there.
    fn mapped(&self) -> (bool, bool) {
        if let Some(Hindrance::Stands(_)) = self.hindrance {
            return (false, true);
        }
        let migrating = matches!(self.hindrance, Some(Hindrance::Migrating(_)));
        (self.node.is_some() && !migrating, self.node.is_some() && migrating)
    }

    /// Its entry in the page map; `frame` is that of the page if it is there, and 0 where hidden.
    fn entry(&self, frame: u64) -> u64 {
        let (present, swapped) = self.mapped();
        let alone = !matches!(
            self.hindrance,
            Some(Hindrance::Shared | Hindrance::Zero | Hindrance::Forked(_))
        );
        let hidden = frame == 0;
        let absent = match self.hindrance {
            // SWP_PTE_MARKER and what it marks; PM_GUARD_REGION.
            Some(Hindrance::Stands(Trace::Guard)) => (31 | 4 << 5, 1 << 58),
            Some(Hindrance::Stands(Trace::Marker)) => (31 | 1 << 5, 0),
            Some(Hindrance::Stands(Trace::Swapped)) => (7 << 5, 0),
            // SWP_MIGRATION_WRITE of a common configuration.
            _ => (27 | frame << 5 & ((1 << 55) - 1), 0),
        };
        match (present, swapped) {
            (true, _) => 1 << 63 | u64::from(alone) << 56 | frame,
            (_, true) => 1 << 62 | if hidden { absent.1 } else { absent.0 | absent.1 },
            _ => 0,
        }
    }

    /// Whether it is missing for who asks now.
    fn is_missing(&mut self) -> bool {
        match self.hindrance {
            Some(Hindrance::Migrates(times @ 1..) | Hindrance::Migrating(times @ 1..)) => {
                self.hindrance = (times > 1).then_some(Hindrance::Migrating(times - 1));
                true
            }
            Some(Hindrance::Vanishes) => {
                (self.node, self.hindrance) = (None, None);
                true
            }
            Some(Hindrance::GivesWay(trace)) => {
                (self.node, self.hindrance) = (None, Some(Hindrance::Stands(trace)));
                true
            }
            Some(Hindrance::Stands(_)) => true,
            _ => self.node.is_none(),
        }
    }
}

/// A mapping and its pages.
#[derive(Clone, Debug)]
pub struct FakeVma {
    /// The mapping.
    pub vma: Vma,
    /// Bytes of each page: the base size, or that of huge pages.
    pub page_bytes: usize,
    /// Bytes of each folio: as many as of a page, or of several that the page table maps one by
    /// one. Folios are aligned to their size.
    pub folio_bytes: usize,
    /// Its pages.
    pub pages: Vec<FakePage>,
}

impl FakeVma {
    /// Private anonymous memory from `start` on, all of its pages on `node`.
    pub fn anonymous(start: usize, page_bytes: usize, pages: usize, node: u32) -> Self {
        let vma = Vma { start, end: start + pages * page_bytes, ..Vma::default() };
        let page = FakePage { node: Some(node), hindrance: None };
        Self { vma, page_bytes, folio_bytes: page_bytes, pages: vec![page; pages] }
    }

    /// The same in folios of this size, mapped page by page.
    #[must_use]
    pub fn in_folios(mut self, folio_bytes: usize) -> Self {
        self.folio_bytes = folio_bytes;
        self
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
    batches: usize,
    later: Vec<(Duration, Event)>,
    idle: Idle,
    no_scan: bool,
    refused: Option<Errno>,
    no_numa: bool,
    foreign_procfs: bool,
    only_own: bool,
    own_nodes: String,
    pools: BTreeMap<(u32, usize), u64>,
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

    /// Once the clock shows this time, at the next sleep, this happens.
    pub fn at(&self, time: Duration, event: Event) {
        self.lock().later.push((time, event));
    }

    /// The kernel has no `PAGEMAP_SCAN`.
    pub fn without_scan(&self) {
        self.lock().no_scan = true;
    }

    /// `move_pages(2)` is refused, whatever it is asked.
    pub fn refuse(&self, errno: Errno) {
        self.lock().refused = Some(errno);
    }

    /// The kernel has no NUMA.
    pub fn without_numa(&self) {
        self.refuse(Errno(libc::ENOSYS));
        self.lock().no_numa = true;
    }

    /// `/proc` is that of another pid namespace.
    pub fn with_foreign_procfs(&self) {
        self.lock().foreign_procfs = true;
    }

    /// The caller has no `CAP_SYS_NICE`.
    pub fn without_rights(&self) {
        self.lock().only_own = true;
    }

    /// The cpuset of the caller allows these nodes, as a list.
    pub fn own_cpuset(&self, nodes: &str) {
        self.lock().own_nodes = nodes.into();
    }

    /// So many bytes in hugetlb pages of a size are set aside on a node, and free.
    pub fn pool(&self, node: u32, page_bytes: usize, bytes: u64) {
        self.lock().pools.insert((node, page_bytes), bytes);
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

    /// How many times the kernel moved what was queued: a migration each, with its TLB flushes.
    pub fn batches(&self) -> usize {
        self.lock().batches
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
            Event::Exit(pid) => {
                self.forget(pid, &(0..usize::MAX));
                drop(self.processes.remove(&pid));
            }
            Event::Exec(pid, vmas) => {
                self.forget(pid, &(0..usize::MAX));
                if let Some((process, image)) = self.processes.get_mut(&pid) {
                    (process.vmas, *image) = (vmas, *image + 1);
                }
            }
            Event::Unmap(pid, range) => {
                self.forget(pid, &range);
                if let Some((process, _)) = self.processes.get_mut(&pid) {
                    process.vmas.retain(|v| v.vma.end <= range.start || v.vma.start >= range.end);
                }
            }
            Event::Join(group, process) => {
                self.groups.entry(group).or_default().push(process.status.tgid);
                self.processes.insert(process.status.tgid, (process, 1));
            }
            Event::Free(node, bytes) => self.nodes[node as usize].0 = bytes,
            Event::Touch(pid, range) => self.touch(pid, range),
            Event::Fault(pid, range, node) => {
                let Some((process, _)) = self.processes.get_mut(&pid) else { return };
                for address in range.step_by(page_size()) {
                    if let Some((page, _)) = page_at(process, address) {
                        page.node = page.node.or(Some(node));
                    }
                }
            }
        }
    }
}

/// The page at an address, and its size.
fn page_at(process: &mut FakeProcess, address: usize) -> Option<(&mut FakePage, usize)> {
    let vma = process.vmas.iter_mut().find(|v| v.vma.range().contains(&address))?;
    let bytes = vma.page_bytes;
    let index = (address - vma.vma.start) / bytes;
    Some((vma.pages.get_mut(index)?, bytes))
}
