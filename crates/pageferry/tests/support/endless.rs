//! A process of any size, made up so that it takes no memory: for measuring the planner alone. A
//! test part.

#![allow(dead_code, unreachable_pub, reason = "each user takes its own part")]

use pageferry_sys::idle::IdlePages;
use pageferry_sys::pagemap::{Categories, Entry, Run};
use pageferry_sys::process::{Backings, ProcessKernel, ProcessView};
use pageferry_sys::procfs::{ReadMaps, Status, Vma};
use pageferry_sys::{Errno, page_size};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

const START: usize = 1 << 40;
/// Bytes of a mapping.
const MAPPING: usize = 1 << 30;

/// One process, 1, with so many mappings of 1 GiB, all of it present on node 0. Everything moves
/// at once, to wherever it is asked to.
#[derive(Debug)]
pub struct Endless {
    pub mappings: usize,
    /// Every so many pages one is missing, so that runs are short; 0: none.
    pub gap: usize,
    pub began: Instant,
}

impl Endless {
    pub fn new(gib: usize, gap: usize) -> Self {
        Self { mappings: gib, gap, began: Instant::now() }
    }

    /// Bytes that are present.
    pub fn present(&self) -> u64 {
        let first = START / page_size();
        let last = first + self.mappings * (MAPPING / page_size());
        let missing =
            (last / self.gap.max(1) - first / self.gap.max(1)) * usize::from(self.gap > 0);
        ((last - first - missing) * page_size()) as u64
    }
}

#[derive(Debug)]
struct View {
    mappings: usize,
    gap: usize,
}

#[derive(Debug)]
struct Maps {
    left: usize,
    at: usize,
}

impl ReadMaps for Maps {
    fn next(&mut self, vma: &mut Vma) -> Result<bool, Errno> {
        if self.left == 0 {
            return Ok(false);
        }
        self.left -= 1;
        (vma.start, vma.end) = (self.at, self.at + MAPPING);
        self.at += MAPPING;
        Ok(true)
    }
}

impl ProcessView for View {
    fn status(&self) -> Result<Status, Errno> {
        Ok(Status { tgid: 1, state: 'S', threads: 1, ..Status::default() })
    }
    fn is_alive(&self) -> bool {
        true
    }
    fn image(&self) -> u64 {
        0
    }
    fn maps(&self) -> Result<Box<dyn ReadMaps>, Errno> {
        Ok(Box::new(Maps { left: self.mappings, at: START }))
    }
    fn backings(&self) -> Backings {
        Vec::new()
    }
    fn scan(
        &self,
        start: usize,
        end: usize,
        _: Categories,
        _: Categories,
        out: &mut [Run],
    ) -> Result<(usize, usize), Errno> {
        let page = page_size();
        if self.gap == 0 {
            out[0] = Run::new(start, end, Categories::PRESENT);
            return Ok((1, end));
        }
        let group = self.gap * page;
        let (mut at, mut count) = (start, 0);
        while at < end {
            // The last page of each group is missing.
            let missing = (at / group + 1) * group - page;
            if at == missing {
                at += page;
                continue;
            }
            if count == out.len() {
                return Ok((count, at));
            }
            out[count] = Run::new(at, missing.min(end), Categories::PRESENT);
            (count, at) = (count + 1, missing.min(end));
        }
        Ok((count, end))
    }
    fn entries(&self, start: usize, out: &mut [Entry]) -> Result<(), Errno> {
        // Frames like addresses, all present.
        let first = (start / page_size()) as u64;
        (first..).zip(out).for_each(|(frame, entry)| *entry = Entry(1 << 63 | frame));
        Ok(())
    }
    fn nodes(&self, _: &[usize], status: &mut [i32]) -> Result<(), Errno> {
        status.fill(0);
        Ok(())
    }
    fn move_pages(
        &self,
        _: &[usize],
        nodes: &[i32],
        status: &mut [i32],
        _: bool,
    ) -> Result<usize, Errno> {
        status.copy_from_slice(nodes);
        Ok(0)
    }
}

/// Frames none of which is ever used.
#[derive(Debug)]
struct NeverUsed;

impl IdlePages for NeverUsed {
    fn flags(&self, _: u64, out: &mut [u64]) -> Result<(), Errno> {
        out.fill(0);
        Ok(())
    }
    fn read(&self, _: u64, out: &mut [u64]) -> Result<(), Errno> {
        out.fill(u64::MAX);
        Ok(())
    }
    fn mark(&self, _: u64, _: &[u64]) -> Result<(), Errno> {
        Ok(())
    }
}

impl ProcessKernel for Endless {
    fn open(&self, pid: u32) -> Result<Arc<dyn ProcessView>, Errno> {
        match pid {
            1 => Ok(Arc::new(View { mappings: self.mappings, gap: self.gap })),
            _ => Err(Errno(libc::ESRCH)),
        }
    }
    fn find_group(&self, _: &Path) -> Option<PathBuf> {
        None
    }
    fn members(&self, _: &Path) -> Result<Vec<u32>, Errno> {
        Err(Errno(libc::ENOENT))
    }
    fn parents(&self) -> Result<Vec<(u32, u32)>, Errno> {
        Ok(Vec::new())
    }
    fn may_move_shared(&self) -> bool {
        true
    }
    fn node_free(&self, _: u32) -> Result<u64, Errno> {
        Ok(u64::MAX)
    }
    fn node_watermark(&self, _: u32) -> Result<u64, Errno> {
        Ok(0)
    }
    fn idle_pages(&self) -> Result<Arc<dyn IdlePages>, Errno> {
        Ok(Arc::new(NeverUsed))
    }
    fn now(&self) -> Duration {
        self.began.elapsed()
    }
    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// A machine with two nodes, written as a tree below `root`.
pub fn two_nodes(root: &Path) -> std::io::Result<()> {
    let mut files = vec![
        ("sys/devices/system/node/online".to_owned(), "0-1"),
        ("sys/devices/system/node/possible".to_owned(), "0-1"),
        ("sys/devices/system/cpu/online".to_owned(), "0-1"),
        ("sys/devices/system/cpu/possible".to_owned(), "0-1"),
        ("sys/devices/system/cpu/present".to_owned(), "0-1"),
    ];
    let meminfo = "Node 0 MemTotal: 67108864 kB\nNode 0 MemFree: 67108864 kB\n";
    for (node, distance) in ["10 20", "20 10"].into_iter().enumerate() {
        let at = format!("sys/devices/system/node/node{node}");
        files.push((format!("{at}/meminfo"), meminfo));
        files.push((format!("{at}/cpulist"), if node == 0 { "0" } else { "1" }));
        files.push((format!("{at}/distance"), distance));
    }
    for (path, text) in files {
        let path = root.join(path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(path, text)?;
    }
    Ok(())
}
