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
mod view;
mod watermark;

pub use backing::{Backing, Backings};
use view::{LinuxView, MPOL_MF_MOVE_ALL, living_thread, move_pages};
use watermark::high_watermark;

use crate::idle::{self, IdlePages, LinuxIdle};
use crate::pagemap::{Categories, Entry, Run};
use crate::pidfd::PidFd;
use crate::procfs::{self, ProcDir, ReadMaps, Status, errno_of};
use crate::{Errno, page_size};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What [`ProcessView::move_pages`] finds in `status` before the call: the kernel leaves the
/// status of pages alone that it gave up on, or never came to.
pub const UNTOLD: i32 = i32::MIN;

/// One process, held open.
#[allow(clippy::missing_errors_doc, reason = "each error is the errno of the call named")]
pub trait ProcessView: Send + Sync + std::fmt::Debug {
    /// What it is now.
    fn status(&self) -> Result<Status, Errno>;
    /// Whether it has not ended.
    fn is_alive(&self) -> bool;
    /// A number that changes when it executes another program; 0 where not told.
    fn image(&self) -> u64;
    /// Its mappings, of the program that it is now; pages are looked up in that from here on.
    /// `EACCES`: not ours to see.
    fn maps(&self) -> Result<Box<dyn ReadMaps>, Errno>;
    /// What the devices of its mappings are.
    fn backings(&self) -> Backings;
    /// `PAGEMAP_SCAN`; see [`Pagemap`](crate::pagemap::Pagemap). `ENOTTY`: the kernel has none (before 6.7).
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
    /// Whether the caller may ask where pages are, of none: `EPERM`, `ENOSYS`: a sandbox refuses
    /// `move_pages(2)` (seccomp; which errno is the profile's choice), or the kernel has no NUMA.
    fn may_ask(&self) -> Result<(), Errno> {
        Ok(())
    }
    /// Whether the kernel knows no nodes (no `CONFIG_NUMA`): then all memory is on node 0.
    fn lacks_numa(&self) -> bool {
        false
    }
    /// Whether `/proc` has the numbers that system calls take: it may be that of another pid
    /// namespace (`nsenter -p` without `-m`), where a number is another process's.
    fn has_own_procfs(&self) -> bool {
        true
    }
    /// What the caller itself is: it moves pages, and what its cpuset forbids it cannot have moved.
    fn own_status(&self) -> Result<Status, Errno> {
        Err(Errno(libc::ENOSYS))
    }
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
    /// Which pages have not been used. `ENOENT`: the kernel does not track that
    /// (`CONFIG_IDLE_PAGE_TRACKING`). `EACCES`, `EPERM`, `EROFS`: not for this caller, who has to
    /// be root, with `CAP_SYS_ADMIN` in the first user namespace.
    fn idle_pages(&self) -> Result<Arc<dyn IdlePages>, Errno> {
        Err(Errno(libc::ENOENT))
    }
    /// Bytes in pages of this size that are set aside for hugetlb on a node and that nobody uses.
    /// They are not part of its free memory.
    fn hugetlb_free(&self, _node: u32, _page_bytes: usize) -> Result<u64, Errno> {
        Ok(0)
    }
    /// Time since some beginning; never goes back.
    fn now(&self) -> Duration;
    /// Lets time pass.
    fn sleep(&self, time: Duration);
}

/// The kernel itself.
#[derive(Debug)]
pub struct LinuxProcesses {
    began: Instant,
    no_scan: bool,
}

impl LinuxProcesses {
    /// As a kernel without `PAGEMAP_SCAN` (before 6.7) answers: for tests.
    #[must_use]
    pub fn without_scan(mut self) -> Self {
        self.no_scan = true;
        self
    }
}

impl Default for LinuxProcesses {
    fn default() -> Self {
        Self { began: Instant::now(), no_scan: false }
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
        Ok(Arc::new(LinuxView::new(pid, tid, dir, pidfd, self.no_scan)))
    }

    fn may_ask(&self) -> Result<(), Errno> {
        // Of no page of the caller's own: no right is needed, so nobody but a sandbox says no.
        move_pages(0, &[], None, &mut [], 0).map(drop)
    }
    fn lacks_numa(&self) -> bool {
        // drivers/base/node.c is built with CONFIG_NUMA only; without the other no sysfs is seen.
        let devices = Path::new("/sys/devices/system");
        devices.join("cpu").exists() && !devices.join("node").exists()
    }
    fn has_own_procfs(&self) -> bool {
        procfs::is_own()
    }
    fn own_status(&self) -> Result<Status, Errno> {
        // The number that this procfs knows us by: it may be that of another pid namespace.
        let own = fs::read_link("/proc/self").map_err(|e| errno_of(&e))?;
        let pid = own.to_str().and_then(|pid| pid.parse().ok()).ok_or(Errno(libc::EIO))?;
        ProcDir::open(pid)?.status()
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

    fn idle_pages(&self) -> Result<Arc<dyn IdlePages>, Errno> {
        let pages = LinuxIdle::open()?;
        // Who is not told where pages are cannot ask about them.
        if !idle::sees_frames()? {
            return Err(Errno(libc::EPERM));
        }
        Ok(Arc::new(pages))
    }

    fn hugetlb_free(&self, node: u32, page_bytes: usize) -> Result<u64, Errno> {
        let kib = page_bytes >> 10;
        let pool = format!("/sys/devices/system/node/node{node}/hugepages/hugepages-{kib}kB");
        let text = fs::read_to_string(pool + "/free_hugepages").map_err(|e| errno_of(&e))?;
        let pages = text.trim().parse::<u64>().map_err(|_| Errno(libc::EIO))?;
        Ok(pages.saturating_mul(page_bytes as u64))
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
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
