//! Fault injection: a [`Sys`] that fails chosen calls. A test part; nothing else uses it.

use crate::in_use::InUse;
use crate::maps::Maps;
use crate::mm::Advice;
use crate::pagemap::{Categories, Pagemap, Run};
use crate::uffd::{Features, Modes, Progress, RawMsg, Rights, Uffd};
use crate::{Errno, Linux, Sys, SysOp};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Which calls of one kind fail, and how.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// The call.
    pub op: SysOp,
    /// How many calls of this kind succeed first.
    pub after: u64,
    /// How many then fail; `u64::MAX` for all.
    pub times: u64,
    /// What they fail with.
    pub errno: Errno,
    /// For calls over a range: bytes that are really done before the failure.
    pub partial: usize,
}

#[derive(Debug, Default)]
struct State {
    faults: Vec<(Fault, u64)>,
    fired: u64,
    calls: Vec<(SysOp, u64)>,
}

/// The kernel, except for the faults that were asked for.
#[derive(Debug, Default)]
pub struct Faulty {
    state: Mutex<State>,
}

impl Faulty {
    /// A kernel without faults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a fault; its count of calls starts now.
    pub fn fail(&self, fault: Fault) {
        self.lock().faults.push((fault, 0));
    }

    /// Forgets all faults.
    pub fn heal(&self) {
        self.lock().faults.clear();
    }

    /// How many calls were failed so far.
    pub fn fired(&self) -> u64 {
        self.lock().fired
    }

    /// How many calls of this kind were made so far.
    pub fn calls(&self, op: SysOp) -> u64 {
        self.lock().calls.iter().find(|(o, _)| *o == op).map_or(0, |(_, n)| *n)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, op: SysOp) -> Option<Fault> {
        let mut state = self.lock();
        match state.calls.iter_mut().find(|(o, _)| *o == op) {
            Some((_, n)) => *n += 1,
            None => state.calls.push((op, 1)),
        }
        let mut hit = None;
        for (fault, seen) in state.faults.iter_mut().filter(|(f, _)| f.op == op) {
            *seen += 1;
            if *seen > fault.after && *seen - fault.after <= fault.times {
                hit = Some(*fault);
            }
        }
        state.fired += u64::from(hit.is_some());
        hit
    }

    fn plain(&self, op: SysOp) -> Result<(), Errno> {
        self.check(op).map_or(Ok(()), |f| Err(f.errno))
    }

    fn ranged(&self, op: SysOp, len: usize, real: impl Fn(usize) -> Progress) -> Progress {
        match self.check(op) {
            None => real(len),
            Some(fault) if fault.partial == 0 || fault.partial >= len => {
                Progress { done: 0, error: Some(fault.errno) }
            }
            Some(fault) => {
                let progress = real(fault.partial);
                Progress { done: progress.done, error: Some(progress.error.unwrap_or(fault.errno)) }
            }
        }
    }
}

impl Sys for Faulty {
    fn open_uffd(&self, rights: Rights, features: Features) -> Result<Uffd, Errno> {
        self.plain(SysOp::OpenUffd)?;
        Linux.open_uffd(rights, features)
    }
    fn register(&self, fd: &Uffd, start: usize, len: usize, modes: Modes) -> Result<(), Errno> {
        self.plain(SysOp::Register)?;
        Linux.register(fd, start, len, modes)
    }
    fn unregister(&self, fd: &Uffd, start: usize, len: usize) -> Result<(), Errno> {
        self.plain(SysOp::Unregister)?;
        Linux.unregister(fd, start, len)
    }
    fn protect(&self, fd: &Uffd, start: usize, len: usize) -> Result<(), Errno> {
        self.plain(SysOp::Protect)?;
        Linux.protect(fd, start, len)
    }
    fn unprotect(&self, fd: &Uffd, start: usize, len: usize) -> Result<(), Errno> {
        self.plain(SysOp::Unprotect)?;
        Linux.unprotect(fd, start, len)
    }
    fn wake(&self, fd: &Uffd, start: usize, len: usize) -> Result<(), Errno> {
        self.plain(SysOp::Wake)?;
        Linux.wake(fd, start, len)
    }
    unsafe fn move_range(&self, fd: &Uffd, dst: usize, src: usize, len: usize) -> Progress {
        // SAFETY: the same promise, for a part of the same range.
        self.ranged(SysOp::Move, len, |n| unsafe { Linux.move_range(fd, dst, src, n) })
    }
    unsafe fn copy_in(&self, fd: &Uffd, dst: usize, src: usize, len: usize) -> Progress {
        // SAFETY: the same promise, for a part of the same range.
        self.ranged(SysOp::CopyIn, len, |n| unsafe { Linux.copy_in(fd, dst, src, n) })
    }
    fn zero_in(&self, fd: &Uffd, start: usize, len: usize) -> Progress {
        self.ranged(SysOp::ZeroIn, len, |n| Linux.zero_in(fd, start, n))
    }
    fn poison(&self, fd: &Uffd, start: usize, len: usize) -> Progress {
        self.ranged(SysOp::Poison, len, |n| Linux.poison(fd, start, n))
    }
    fn read_events(&self, fd: &Uffd, buffer: &mut [RawMsg]) -> Result<usize, Errno> {
        self.plain(SysOp::ReadEvents)?;
        Linux.read_events(fd, buffer)
    }
    fn map(&self, len: usize, align: usize) -> Result<usize, Errno> {
        self.plain(SysOp::Map)?;
        Linux.map(len, align)
    }
    unsafe fn map_over(&self, start: usize, len: usize) -> Result<(), Errno> {
        self.plain(SysOp::MapOver)?;
        // SAFETY: the same promise.
        unsafe { Linux.map_over(start, len) }
    }
    unsafe fn unmap(&self, start: usize, len: usize) -> Result<(), Errno> {
        self.plain(SysOp::Unmap)?;
        // SAFETY: the same promise.
        unsafe { Linux.unmap(start, len) }
    }
    unsafe fn advise(&self, start: usize, len: usize, advice: Advice) -> Result<(), Errno> {
        self.plain(SysOp::Advise(advice))?;
        // SAFETY: the same promise.
        unsafe { Linux.advise(start, len, advice) }
    }
    fn is_registered(&self, fd: &Uffd, start: usize, len: usize) -> Result<bool, Errno> {
        self.plain(SysOp::IsRegistered)?;
        Linux.is_registered(fd, start, len)
    }
    fn mappings(&self, maps: &Maps, range: Range<usize>) -> Result<Vec<Range<usize>>, Errno> {
        self.plain(SysOp::Mappings)?;
        Linux.mappings(maps, range)
    }
    fn in_use(&self, maps: &Maps) -> Result<Vec<InUse>, Errno> {
        self.plain(SysOp::InUse)?;
        Linux.in_use(maps)
    }
    fn prefer_node(&self, start: usize, len: usize, node: u32) -> Result<(), Errno> {
        self.plain(SysOp::PreferNode)?;
        Linux.prefer_node(start, len, node)
    }
    fn in_core(&self, start: usize, pages: &mut [u8]) -> Result<(), Errno> {
        self.plain(SysOp::InCore)?;
        Linux.in_core(start, pages)
    }
    fn page_nodes(&self, pages: &[usize], status: &mut [i32]) -> Result<(), Errno> {
        self.plain(SysOp::PageNodes)?;
        Linux.page_nodes(pages, status)
    }
    fn scan(
        &self,
        map: &Pagemap,
        start: usize,
        end: usize,
        wanted: Categories,
        returned: Categories,
        out: &mut [Run],
    ) -> Result<(usize, usize), Errno> {
        self.plain(SysOp::Scan)?;
        Linux.scan(map, start, end, wanted, returned, out)
    }
}
