//! A process of this machine's kernel, held open by its descriptors.
//!
//! What always holds: whatever is asked is about the process that was opened, or fails; which of its
//! threads is asked through does not matter, as long as it lives.
//!
//! What can go wrong: an open pagemap stays with the address space that the process had when it was
//! opened. So it is opened anew whenever the mappings are.

use super::{Backings, ProcessView, backing};
use crate::Errno;
use crate::pagemap::{Categories, Entry, Pagemap, Run};
use crate::pidfd::PidFd;
use crate::procfs::{Maps, ProcDir, ReadMaps, Status};
use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// `MPOL_MF_MOVE`, include/uapi/linux/mempolicy.h: pages that only this process maps.
const MPOL_MF_MOVE: i32 = 1 << 1;
/// `MPOL_MF_MOVE_ALL`: also pages that others map; needs `CAP_SYS_NICE`.
pub(super) const MPOL_MF_MOVE_ALL: i32 = 1 << 2;

/// A thread that still has the address space: the first may have ended before the others.
pub(super) fn living_thread(pid: u32, dir: &ProcDir) -> u32 {
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
pub(super) struct LinuxView {
    pid: u32,
    /// The pid, or a thread of the process if its first has ended.
    tid: AtomicU32,
    dir: ProcDir,
    pidfd: Option<PidFd>,
    pagemap: Mutex<Option<Arc<Pagemap>>>,
    no_scan: bool,
}

impl LinuxView {
    /// A process, the number of a thread of it that lives, that thread's folder.
    pub(super) fn new(
        pid: u32,
        tid: u32,
        dir: ProcDir,
        pidfd: Option<PidFd>,
        no_scan: bool,
    ) -> Self {
        Self { pid, tid: AtomicU32::new(tid), dir, pidfd, pagemap: Mutex::new(None), no_scan }
    }

    /// The pagemap of the address space that its mappings were opened of last.
    fn pagemap(&self) -> Result<Arc<Pagemap>, Errno> {
        let mut held = self.held();
        if let Some(map) = &*held {
            return Ok(Arc::clone(map));
        }
        let opened = Arc::new(Pagemap::of(self.dir.file("pagemap")?));
        *held = Some(Arc::clone(&opened));
        Ok(opened)
    }

    fn held(&self) -> MutexGuard<'_, Option<Arc<Pagemap>>> {
        self.pagemap.lock().unwrap_or_else(PoisonError::into_inner)
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
        let maps = Maps::new(self.dir.file("maps")?);
        // An open pagemap stays with the program that was there when it was opened.
        *self.held() = None;
        Ok(Box::new(maps))
    }

    fn backings(&self) -> Backings {
        let mounts = self.dir.read("mountinfo").unwrap_or_default();
        let mut backings = backing::all(&String::from_utf8_lossy(&mounts));
        // Its own, and ours for one that has changed its root since it mapped it.
        let own = format!("/proc/{}/root/dev/zero", self.pid);
        backings.extend([&*own, "/dev/zero"].into_iter().filter_map(backing::zero));
        backings
    }

    fn scan(
        &self,
        start: usize,
        end: usize,
        wanted: Categories,
        returned: Categories,
        out: &mut [Run],
    ) -> Result<(usize, usize), Errno> {
        if self.no_scan {
            return Err(Errno(libc::ENOTTY));
        }
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

pub(super) fn move_pages(
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_size;
    use crate::process::{LinuxProcesses, ProcessKernel as _};
    use crate::procfs::Vma;

    #[test]
    fn after_exec_the_pages_are_those_of_the_new_program() {
        use std::io::Write as _;
        use std::process::{Command, Stdio};
        let program = "read x; exec sleep 60";
        let mut shell = Command::new("sh");
        let mut child =
            shell.args(["-c", program]).stdin(Stdio::piped()).spawn().expect("sh is everywhere");
        let (pid, mut pipe) = (child.id(), child.stdin.take().expect("piped"));
        let view = LinuxProcesses::default().open(pid).expect("our child");
        let stack = || {
            let (mut maps, mut vma) = (view.maps().expect("our child"), Vma::default());
            while maps.next(&mut vma).expect("our child") && vma.name != "[stack]" {}
            vma
        };
        let present = || {
            let mut last = [Entry(0)];
            let read = view.entries(stack().end - page_size(), &mut last);
            read.is_ok() && last[0].present()
        };
        let name = || fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        // The last page of a stack holds the program's name and its environment.
        while name() != "sh\n" {
            std::thread::yield_now();
        }
        assert!(present());
        let image = view.image();
        pipe.write_all(b"\n").expect("it reads");
        while name() != "sleep\n" || view.image() == image {
            std::thread::yield_now();
        }
        let is_there = present();
        child.kill().expect("ours");
        child.wait().expect("ours");
        assert!(is_there);
    }
}
