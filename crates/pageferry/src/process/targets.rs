//! Who is looked at: processes by pid, those of cgroups, their children; found anew until no new
//! one appears.

use super::error::TargetError;
use super::notes::{Note, Notes};
use super::select::Selection;
use pageferry_sys::Errno;
use pageferry_sys::process::{ProcessKernel, ProcessView};
use pageferry_sys::procfs::Status;
use pageferry_topology::{NodeId, NodeList};
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// A process that executes one program after the other is followed so many times.
const EXECS: u32 = 3;

/// Whose memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Target {
    /// A process, all of its threads. The number of one of its threads names it too.
    Pid(u32),
    /// All processes of a cgroup and the groups below it, those that join meanwhile too: a folder
    /// with `cgroup.procs`, or a path below `/sys/fs/cgroup` or `/sys/fs/cgroup/memory`.
    Cgroup(PathBuf),
    /// A process that was found, in a list of one's own, not named by anybody: what keeps it from
    /// being looked at is a [`Note`], not an error.
    Found(u32),
}

/// A process that is looked at.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) view: Arc<dyn ProcessView>,
    gone: AtomicBool,
    noted: AtomicBool,
    /// The program that was last begun with, and how many it has executed since the first.
    image: AtomicU64,
    execs: AtomicU32,
    /// The nodes that its cpuset allowed when it was opened.
    allowed: Option<NodeList>,
}

impl Process {
    /// Holds a process open, if it has memory that we may look at.
    pub(super) fn open(
        kernel: &dyn ProcessKernel,
        pid: u32,
    ) -> Result<(Arc<Self>, Status), TargetError> {
        let failed = |source| match source {
            Errno(libc::ESRCH) => TargetError::NoProcess(pid),
            source => TargetError::Open { pid, source },
        };
        let view = kernel.open(pid).map_err(failed)?;
        let status = view.status().map_err(failed)?;
        if status.kernel_thread {
            return Err(TargetError::KernelThread(pid));
        }
        if status.is_dead() {
            return Err(TargetError::Zombie(pid));
        }
        match view.maps() {
            Ok(_) => {}
            Err(source @ Errno(libc::EACCES | libc::EPERM)) => {
                return Err(TargetError::Denied { pid, uid: status.uid, source });
            }
            Err(source) => return Err(failed(source)),
        }
        let process = Self {
            pid: status.tgid,
            view,
            gone: AtomicBool::default(),
            noted: AtomicBool::default(),
            image: AtomicU64::default(),
            execs: AtomicU32::default(),
            allowed: allowed_nodes(&status),
        };
        Ok((Arc::new(process), status))
    }

    /// Whether its cpuset allows memory on this node, as far as is known.
    pub(super) fn may_have(&self, node: NodeId) -> bool {
        self.allowed.as_ref().is_none_or(|allowed| allowed.contains(node))
    }

    /// Whether it was found to have ended.
    pub(super) fn is_gone(&self) -> bool {
        // Relaxed: a hint that spares calls; each call finds out by itself.
        self.gone.load(Ordering::Relaxed)
    }

    /// Whether a call's errno, or a look, tells that it has ended. Memory goes first: for a
    /// moment calls say `ESRCH` of a process that still counts as alive.
    pub(super) fn ended_by(&self, errno: Errno) -> bool {
        // What belongs to memory that it left by exec says so too.
        if errno == Errno(libc::ESRCH) && self.view.image() == 0 {
            self.gone.store(true, Ordering::Relaxed);
        }
        self.has_ended()
    }

    /// From now on it is looked at as the program that it is now.
    pub(super) fn begin(&self) {
        // Relaxed, as below: read and written under the lock of the walk, or as a hint.
        self.image.store(self.view.image(), Ordering::Relaxed);
    }

    /// Whether it is another program than the one that it was begun with.
    pub(super) fn is_another(&self) -> bool {
        !self.is_gone() && self.view.image() != self.image.load(Ordering::Relaxed)
    }

    /// Whether it has executed another program and is to be looked at once more: a process that
    /// executes one after the other is followed [`EXECS`] times.
    pub(super) fn has_executed(&self) -> bool {
        !self.has_ended() && self.is_another() && self.execs.fetch_add(1, Ordering::Relaxed) < EXECS
    }

    /// That it has ended, for the first who asks: many may find that out.
    pub(super) fn note_of_end(&self) -> Option<Note> {
        // Relaxed: nothing else is published with it.
        let first = !self.noted.swap(true, Ordering::Relaxed);
        first.then_some(Note::Exited { pid: self.pid })
    }

    /// Looks whether it has ended.
    pub(super) fn has_ended(&self) -> bool {
        if !self.is_gone() && !self.view.is_alive() {
            self.gone.store(true, Ordering::Relaxed);
        }
        self.is_gone()
    }
}

/// The nodes that a process may have memory on. What cannot be read forbids nothing: the kernel
/// will say.
pub(super) fn allowed_nodes(status: &Status) -> Option<NodeList> {
    status.nodes_allowed.parse().ok().filter(|allowed: &NodeList| !allowed.is_empty())
}

/// The refusal of a process that was not named itself.
pub(super) fn note_of(error: &TargetError) -> Option<Note> {
    match error {
        TargetError::Zombie(_) => Some(Note::Zombies { processes: 1 }),
        TargetError::KernelThread(_) => Some(Note::KernelThreads { processes: 1 }),
        TargetError::Denied { pid, uid, .. } => Some(Note::Denied { pid: *pid, uid: *uid }),
        TargetError::Open { pid, source } => Some(Note::Unreadable { pid: *pid, errno: source.0 }),
        // It came and went.
        _ => None,
    }
}

/// Everything that was named, checked.
#[derive(Clone, Debug)]
pub(super) struct Targets {
    /// Those named by pid, held open from the check on: their numbers cannot come to mean others.
    named: Vec<(Arc<Process>, Status)>,
    pids: BTreeSet<u32>,
    listed: BTreeSet<u32>,
    groups: Vec<PathBuf>,
    children: bool,
    /// Those found otherwise so far, and when they began.
    known: HashMap<u32, u64>,
    first: bool,
}

/// A process to be looked at.
#[derive(Debug)]
pub(super) enum Found {
    /// Named by its pid, and held open.
    Named(Arc<Process>, Status),
    /// Found in a cgroup, a list, or among children.
    Listed(u32, Status),
    /// Looked at before, and another program since.
    Again(Arc<Process>),
}

impl Targets {
    /// Checks what was named. The statuses are those of the processes named by pid.
    pub(super) fn check(
        kernel: &dyn ProcessKernel,
        selection: &Selection,
        notes: &mut Notes,
    ) -> Result<(Self, Vec<Status>), TargetError> {
        if selection.targets.is_empty() {
            return Err(TargetError::Empty);
        }
        if !kernel.has_own_procfs() {
            return Err(TargetError::ForeignProcfs);
        }
        match kernel.may_ask() {
            // Nobody has to be asked where everything is on one node.
            Err(Errno(libc::ENOSYS)) if kernel.lacks_numa() => {}
            asked => asked.map_err(TargetError::Refused)?,
        }
        let (mut pids, mut groups) = (BTreeSet::new(), Vec::new());
        let (mut named, mut statuses, mut listed) = (Vec::new(), Vec::new(), BTreeSet::new());
        for target in &selection.targets {
            match target {
                Target::Pid(given) => {
                    let (process, status) = Process::open(kernel, *given)?;
                    if process.pid != *given {
                        notes.add(Note::Thread { tid: *given, pid: process.pid });
                    }
                    if process.pid == std::process::id() {
                        notes.add(Note::Own { pid: process.pid });
                    }
                    if pids.insert(process.pid) {
                        statuses.push(status.clone());
                        named.push((process, status));
                    }
                }
                Target::Found(pid) => {
                    listed.insert(*pid);
                }
                Target::Cgroup(path) => {
                    let group = kernel.find_group(path);
                    let group = group.ok_or_else(|| TargetError::NoGroup(path.clone()))?;
                    kernel
                        .members(&group)
                        .map_err(|source| TargetError::Group { path: group.clone(), source })?;
                    groups.push(group);
                }
            }
        }
        let (known, children) = (HashMap::new(), selection.children);
        Ok((Self { named, pids, listed, groups, children, known, first: true }, statuses))
    }

    /// Whether more than one process may be found.
    pub(super) fn may_be_several(&self) -> bool {
        self.named.len() + self.listed.len() > 1 || !self.groups.is_empty() || self.children
    }

    /// Processes that were not found before.
    pub(super) fn find(&mut self, kernel: &dyn ProcessKernel, notes: &mut Notes) -> Vec<Found> {
        let mut pids: BTreeSet<u32> = self.pids.union(&self.listed).copied().collect();
        self.groups.retain(|group| match kernel.members(group) {
            Ok(members) => {
                pids.extend(members);
                true
            }
            Err(_) => {
                notes.add(Note::GroupLost { path: group.display().to_string() });
                false
            }
        });
        if self.children {
            // Who cannot be listed is not a child.
            add_descendants(&mut pids, &kernel.parents().unwrap_or_default());
        }
        let mut new: Vec<Found> = self.named.drain(..).map(|(p, s)| Found::Named(p, s)).collect();
        for pid in pids {
            // Who has the number of a named one after it was not meant.
            if self.pids.contains(&pid) {
                continue;
            }
            let known = self.known.get(&pid).copied();
            let status = match kernel.open(pid).and_then(|view| view.status()) {
                Ok(status) => status,
                // It came and went.
                Err(Errno(libc::ESRCH)) => continue,
                // Once; whoever opens it will find out why it cannot be.
                Err(_) => Status { started: known.unwrap_or(u64::MAX), ..Status::default() },
            };
            if known == Some(status.started) {
                continue;
            }
            self.known.insert(pid, status.started);
            if !self.first {
                notes.add(Note::Joined { pid });
            }
            new.push(Found::Listed(pid, status));
        }
        self.first = false;
        new
    }
}

/// Adds the children of `pids`, and theirs.
fn add_descendants(pids: &mut BTreeSet<u32>, parents: &[(u32, u32)]) {
    let mut of: HashMap<u32, Vec<u32>> = HashMap::new();
    for (child, parent) in parents {
        of.entry(*parent).or_default().push(*child);
    }
    let mut open: Vec<u32> = pids.iter().copied().collect();
    while let Some(pid) = open.pop() {
        for &child in of.get(&pid).map_or(&[][..], Vec::as_slice) {
            if pids.insert(child) {
                open.push(child);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descendants_are_found_at_any_depth_even_in_a_circle() {
        let mut pids = BTreeSet::from([10]);
        add_descendants(&mut pids, &[(11, 10), (12, 11), (13, 12), (20, 1), (10, 13)]);
        assert_eq!(pids.into_iter().collect::<Vec<_>>(), [10, 11, 12, 13]);
    }
}
