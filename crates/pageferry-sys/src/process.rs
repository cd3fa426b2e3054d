//! Other processes' memory: the seam of the kernel path, and the kernel behind it.
//!
//! [`ProcessKernel`] is what a move of another process's pages asks of the kernel,
//! [`ProcessView`] one process held open. [`LinuxProcesses`] is the kernel itself;
//! [`fake::FakeKernel`] is a test part with as many nodes as a test needs.
//!
//! What always holds:
//! - As elsewhere in this crate a call does what it says, without retry or policy.
//! - The clock is behind the seam too, so that what adapts to time can be tested without any.
//!
//! What can go wrong: `move_pages(2)` takes a number, not a descriptor. A pid is reused only
//! after its process has been waited for, so a view that [is alive](ProcessView::is_alive) after
//! a call tells that the call reached its process.
//!
//! Source: `move_pages(2)`, mm/migrate.c (`do_pages_move`), `include/uapi/linux/mempolicy.h`,
//! `Documentation/filesystems/proc.rst` (zoneinfo).

mod backing;
pub mod fake;

pub use backing::{Backing, Backings};

use crate::pagemap::{Categories, Entry, Pagemap, Run};
use crate::pidfd::PidFd;
use crate::procfs::{self, Maps, ProcDir, ReadMaps, Status, errno_of};
use crate::{Errno, page_size};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// What [`ProcessView::move_pages`] finds in `status` before the call: the kernel leaves the
/// status of pages alone that it gave up on, or never came to.
pub const UNTOLD: i32 = i32::MIN;

/// `MPOL_MF_MOVE`, include/uapi/linux/mempolicy.h: pages that only this process maps.
const MPOL_MF_MOVE: i32 = 1 << 1;
/// `MPOL_MF_MOVE_ALL`: also pages that others map; needs `CAP_SYS_NICE`.
const MPOL_MF_MOVE_ALL: i32 = 1 << 2;

/// One process, held open.
#[allow(clippy::missing_errors_doc, reason = "each error is the errno of the call named")]
pub trait ProcessView: Send + Sync + std::fmt::Debug {
    /// What it is now.
    fn status(&self) -> Result<Status, Errno>;
    /// Whether it has not ended.
    fn is_alive(&self) -> bool;
    /// A number that changes when it executes another program; 0 where not told.
    fn image(&self) -> u64;
    /// Its mappings. `EACCES`: not ours to see.
    fn maps(&self) -> Result<Box<dyn ReadMaps>, Errno>;
    /// What the devices of its mappings are.
    fn backings(&self) -> Backings;
    /// `PAGEMAP_SCAN`; see [`Pagemap`]. `ENOTTY`: the kernel has none (before 6.7).
    fn scan(
        &self,
        start: usize,
        end: usize,
        wanted: Categories,
        returned: Categories,
        out: &mut [Run],
    ) -> Result<(usize, usize), Errno>;
    /// The pagemap entries of the pages from `start` on.
    fn entries(&self, start: usize, out: &mut [Entry]) -> Result<(), Errno>;
    /// `move_pages(2)` as a query: the node of each page, or a negative errno. `ESRCH`: the process
    /// has ended, or has given its memory up on the way there.
    fn nodes(&self, pages: &[usize], status: &mut [i32]) -> Result<(), Errno>;
    /// `move_pages(2)`: moves each page to the node of the same index, those that others map too
    /// if `shared` (which needs `CAP_SYS_NICE`). `Ok(0)`: `status` tells of each page its node or
    /// a negative errno. Otherwise the kernel gave up in the middle, and leaves alone the status
    /// of what it gave up on and never came to.
    fn move_pages(
        &self,
        pages: &[usize],
        nodes: &[i32],
        status: &mut [i32],
        shared: bool,
    ) -> Result<usize, Errno>;
}

/// What moving processes asks of the kernel.
#[allow(clippy::missing_errors_doc, reason = "each error is the errno of the call named")]
pub trait ProcessKernel: Send + Sync + std::fmt::Debug {
    /// Holds a process open; the number of one of its threads does too.
    fn open(&self, pid: u32) -> Result<Arc<dyn ProcessView>, Errno>;
    /// Finds a cgroup; see [`procfs::find_group`].
    fn find_group(&self, path: &Path) -> Option<PathBuf>;
    /// The pids in a cgroup and below it.
    fn members(&self, group: &Path) -> Result<Vec<u32>, Errno>;
    /// Pairs of a pid and its parent's.
    fn parents(&self) -> Result<Vec<(u32, u32)>, Errno>;
    /// Whether pages that several processes map may be moved (`CAP_SYS_NICE`).
    fn may_move_shared(&self) -> bool;
    /// Free memory of a node, in bytes.
    fn node_free(&self, node: u32) -> Result<u64, Errno>;
    /// What a node keeps free, in bytes: below it the kernel reclaims (the sum of its zones'
    /// high watermarks, where reclaim ends once it has begun).
    fn node_watermark(&self, node: u32) -> Result<u64, Errno>;
    /// Time since some beginning; never goes back.
    fn now(&self) -> Duration;
    /// Lets time pass.
    fn sleep(&self, time: Duration);
}

/// The kernel itself.
#[derive(Debug)]
pub struct LinuxProcesses {
    began: Instant,
}

impl Default for LinuxProcesses {
    fn default() -> Self {
        Self { began: Instant::now() }
    }
}

impl ProcessKernel for LinuxProcesses {
    fn open(&self, pid: u32) -> Result<Arc<dyn ProcessView>, Errno> {
        let dir = ProcDir::open(pid)?;
        // Before Linux 5.3 there is none: then the folder alone tells whether it is alive.
        let pidfd = match PidFd::open(pid) {
            Ok(fd) => Some(fd),
            Err(Errno(libc::ENOSYS)) => None,
            // The number of another thread than the first: before 6.9 and since.
            Err(e @ Errno(libc::EINVAL | libc::ENOENT)) => {
                let process = dir.status()?.tgid;
                return if process == pid { Err(e) } else { self.open(process) };
            }
            Err(e) => return Err(e),
        };
        let tid = living_thread(pid, &dir);
        let dir = if tid == pid { dir } else { ProcDir::open(tid)? };
        let tid = AtomicU32::new(tid);
        Ok(Arc::new(LinuxView { pid, tid, dir, pidfd, pagemap: OnceLock::new() }))
    }

    fn find_group(&self, path: &Path) -> Option<PathBuf> {
        procfs::find_group(path)
    }

    fn members(&self, group: &Path) -> Result<Vec<u32>, Errno> {
        let mut pids = Vec::new();
        procfs::members(group, &mut pids).map(|()| pids)
    }

    fn parents(&self) -> Result<Vec<(u32, u32)>, Errno> {
        procfs::parents()
    }

    fn may_move_shared(&self) -> bool {
        // The kernel checks the right before it looks at the pages, of which there are none.
        move_pages(0, &[], Some(&[]), &mut [], MPOL_MF_MOVE_ALL).is_ok()
    }

    fn node_free(&self, node: u32) -> Result<u64, Errno> {
        let text = fs::read_to_string(format!("/sys/devices/system/node/node{node}/meminfo"))
            .or_else(|e| if node == 0 { fs::read_to_string("/proc/meminfo") } else { Err(e) })
            .map_err(|e| errno_of(&e))?;
        let line = text.lines().find_map(|l| l.split_once("MemFree:").map(|(_, rest)| rest));
        let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
        kib.map(|kib| kib.saturating_mul(1024)).ok_or(Errno(libc::EIO))
    }

    fn node_watermark(&self, node: u32) -> Result<u64, Errno> {
        let text = fs::read_to_string("/proc/zoneinfo").map_err(|e| errno_of(&e))?;
        Ok(high_watermark(&text, node).saturating_mul(page_size() as u64))
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// Pages of a node's high watermarks, in the text of `/proc/zoneinfo`.
fn high_watermark(zoneinfo: &str, node: u32) -> u64 {
    let (mut ours, mut pages) = (false, 0u64);
    for line in zoneinfo.lines() {
        if let Some(rest) = line.strip_prefix("Node ") {
            ours = rest.split(',').next().and_then(|n| n.parse().ok()) == Some(node);
        } else if ours {
            let mut words = line.split_ascii_whitespace();
            if words.next() == Some("high") {
                // Lines of per-CPU lists say `high:`.
                pages += words.next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            }
        }
    }
    pages
}

/// A thread that still has the address space: the first may have ended before the others.
fn living_thread(pid: u32, dir: &ProcDir) -> u32 {
    match dir.status() {
        Ok(status) if status.is_dead() && status.threads > 1 => other_thread(pid, pid),
        _ => pid,
    }
}

/// A living thread of the process other than `not`; `not` itself if there is none.
fn other_thread(pid: u32, not: u32) -> u32 {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return not };
    let living = tasks.flatten().find_map(|task| {
        let tid = task.file_name().to_str()?.parse().ok().filter(|tid| *tid != not)?;
        // Threads have a folder of their own, which is not listed.
        let status = ProcDir::open(tid).ok()?.status().ok()?;
        (!status.is_dead() && status.tgid == pid).then_some(tid)
    });
    living.unwrap_or(not)
}

/// A process behind its descriptors.
#[derive(Debug)]
struct LinuxView {
    pid: u32,
    /// The pid, or a thread of the process if its first has ended.
    tid: AtomicU32,
    dir: ProcDir,
    pidfd: Option<PidFd>,
    pagemap: OnceLock<Pagemap>,
}

impl LinuxView {
    fn pagemap(&self) -> Result<&Pagemap, Errno> {
        if let Some(map) = self.pagemap.get() {
            return Ok(map);
        }
        let opened = Pagemap::of(self.dir.file("pagemap")?);
        Ok(self.pagemap.get_or_init(|| opened))
    }

    /// `move_pages(2)` by the number of a thread that has the address space.
    fn move_pages(
        &self,
        pages: &[usize],
        nodes: Option<&[i32]>,
        status: &mut [i32],
        flags: i32,
    ) -> Result<usize, Errno> {
        // Relaxed: any thread's number will do, and nothing is published with it.
        let tid = self.tid.load(Ordering::Relaxed);
        let mut result = move_pages(tid, pages, nodes, status, flags);
        if matches!(result, Err(Errno(libc::EINVAL | libc::ESRCH))) {
            // The thread has ended, or has no memory any more (EINVAL): perhaps not the last.
            let other = other_thread(self.pid, tid);
            if other != tid {
                self.tid.store(other, Ordering::Relaxed);
                result = move_pages(other, pages, nodes, status, flags);
            }
        }
        match result {
            Err(Errno(libc::EINVAL)) => Err(Errno(libc::ESRCH)),
            result => result,
        }
    }
}

impl ProcessView for LinuxView {
    fn status(&self) -> Result<Status, Errno> {
        self.dir.status()
    }

    fn is_alive(&self) -> bool {
        match &self.pidfd {
            Some(fd) => fd.is_alive(),
            None => self.status().is_ok_and(|s| !s.is_dead()),
        }
    }

    fn image(&self) -> u64 {
        // The auxiliary vector holds addresses that differ with every exec (AT_RANDOM, AT_PHDR).
        let bytes = self.dir.read("auxv").unwrap_or_default();
        // FNV-1a.
        bytes.iter().fold(if bytes.is_empty() { 0 } else { 0xcbf2_9ce4_8422_2325 }, |hash, &b| {
            (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        })
    }

    fn maps(&self) -> Result<Box<dyn ReadMaps>, Errno> {
        Ok(Box::new(Maps::new(self.dir.file("maps")?)))
    }

    fn backings(&self) -> Backings {
        let mounts = self.dir.read("mountinfo").unwrap_or_default();
        backing::all(&String::from_utf8_lossy(&mounts))
    }

    fn scan(
        &self,
        start: usize,
        end: usize,
        wanted: Categories,
        returned: Categories,
        out: &mut [Run],
    ) -> Result<(usize, usize), Errno> {
        self.pagemap()?.scan(start, end, wanted, returned, out)
    }

    fn entries(&self, start: usize, out: &mut [Entry]) -> Result<(), Errno> {
        self.pagemap()?.entries(start, out)
    }

    fn nodes(&self, pages: &[usize], status: &mut [i32]) -> Result<(), Errno> {
        self.move_pages(pages, None, status, 0).map(drop)
    }

    fn move_pages(
        &self,
        pages: &[usize],
        nodes: &[i32],
        status: &mut [i32],
        shared: bool,
    ) -> Result<usize, Errno> {
        let flags = if shared { MPOL_MF_MOVE_ALL } else { MPOL_MF_MOVE };
        self.move_pages(pages, Some(nodes), status, flags)
    }
}

fn move_pages(
    pid: u32,
    pages: &[usize],
    nodes: Option<&[i32]>,
    status: &mut [i32],
    flags: i32,
) -> Result<usize, Errno> {
    assert!(pages.len() == status.len() && nodes.is_none_or(|n| n.len() == pages.len()));
    // SAFETY: the kernel reads `pages` and `nodes` and writes `status`, all of the length given.
    // Moving a page changes neither its address nor its content.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            pid,
            pages.len(),
            pages.as_ptr(),
            nodes.map_or(std::ptr::null(), <[i32]>::as_ptr),
            status.as_mut_ptr(),
            flags,
        )
    };
    Errno::result(ret)
}

/// From now on the calling thread has this nice value (-20 to 19, `setpriority(2)`).
///
/// # Errors
/// `EACCES`, `EPERM`: lowering it needs `CAP_SYS_NICE`.
pub fn be_nice(nice: i32) -> Result<(), Errno> {
    // SAFETY: takes numbers; 0 is the calling thread.
    let ret = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
    Errno::result(ret.into()).map(drop)
}

/// From now on the calling thread runs only where no other wants to (`SCHED_IDLE`, sched(7)).
///
/// # Errors
/// What `sched_setscheduler(2)` says.
pub fn be_idle() -> Result<(), Errno> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: reads the parameter; pid 0 is the calling thread.
    let ret = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &param) };
    Errno::result(ret.into()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_watermark_is_the_sum_over_its_zones_alone() {
        let text = "Node 0, zone DMA\n  pages free 1\n        high     7\n  pagesets\n    cpu: 0\n\
            \x20             high:  99\nNode 1, zone Normal\n        high     5\n\
            Node 0, zone Normal\n        high     30\n";
        assert_eq!(high_watermark(text, 0), 37);
        assert_eq!(high_watermark(text, 1), 5);
        assert_eq!(high_watermark(text, 2), 0);
    }
}
