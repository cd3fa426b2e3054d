//! The seam: every call that a migration makes, as one trait.

use crate::Errno;
use crate::in_use::{self, InUse};
use crate::maps::Maps;
use crate::mm::{self, Advice};
use crate::pagemap::{Categories, Pagemap, Run};
use crate::uffd::{Features, Modes, Progress, RawMsg, Rights, Uffd};
use std::ops::Range;

/// Names of the calls behind [`Sys`], for fault injection and reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the method of the same name")]
pub enum SysOp {
    OpenUffd,
    Register,
    Unregister,
    Protect,
    Unprotect,
    Wake,
    Move,
    CopyIn,
    ZeroIn,
    Poison,
    ReadEvents,
    Map,
    MapOver,
    Unmap,
    Advise(Advice),
    IsRegistered,
    Mappings,
    InUse,
    PreferNode,
    PageNodes,
    InCore,
    Scan,
}

/// The system calls of the engine. [`Linux`] makes them; [`crate::inject::Faulty`] fails them.
///
/// Methods neither retry nor interpret: they say what the kernel said.
#[allow(clippy::missing_errors_doc, reason = "each error is the errno of the call named")]
pub trait Sys: Send + Sync + std::fmt::Debug {
    /// `userfaultfd(2)` and `UFFDIO_API`.
    fn open_uffd(&self, rights: Rights, features: Features) -> Result<Uffd, Errno> {
        Uffd::open(rights, features)
    }
    /// `UFFDIO_REGISTER`.
    fn register(&self, fd: &Uffd, start: usize, len: usize, modes: Modes) -> Result<(), Errno> {
        fd.register(start, len, modes)
    }
    /// `UFFDIO_UNREGISTER`; wakes who waits in the range and lifts its write protection.
    fn unregister(&self, fd: &Uffd, start: usize, len: usize) -> Result<(), Errno> {
        fd.unregister(start, len)
    }
    /// `UFFDIO_WRITEPROTECT` with `MODE_WP`: writes to the pages wait from when this returns.
    fn protect(&self, fd: &Uffd, start: usize, len: usize) -> Result<(), Errno> {
        fd.write_protect(start, len, true)
    }
    /// `UFFDIO_WRITEPROTECT` without `MODE_WP`: lifts the protection and wakes the waiters.
    fn unprotect(&self, fd: &Uffd, start: usize, len: usize) -> Result<(), Errno> {
        fd.write_protect(start, len, false)
    }
    /// `UFFDIO_WAKE`.
    fn wake(&self, fd: &Uffd, start: usize, len: usize) -> Result<(), Errno> {
        fd.wake(start, len)
    }
    /// `UFFDIO_MOVE` of `len` bytes from `src` to `dst`, which is registered with `fd`.
    ///
    /// # Safety
    /// Both ranges are under the caller's control: whoever else uses `src` waits at a registered
    /// hole or has given its content up.
    unsafe fn move_range(&self, fd: &Uffd, dst: usize, src: usize, len: usize) -> Progress {
        fd.move_range(dst, src, len)
    }
    /// `UFFDIO_COPY`: the kernel allocates pages at `dst` and copies `src` into them.
    ///
    /// # Safety
    /// As [`Sys::move_range`].
    unsafe fn copy_in(&self, fd: &Uffd, dst: usize, src: usize, len: usize) -> Progress {
        fd.copy_range(dst, src, len)
    }
    /// `UFFDIO_ZEROPAGE`.
    fn zero_in(&self, fd: &Uffd, start: usize, len: usize) -> Progress {
        fd.zero_range(start, len)
    }
    /// `UFFDIO_POISON` (6.6): an access raises SIGBUS, as after a memory error.
    fn poison(&self, fd: &Uffd, start: usize, len: usize) -> Progress {
        fd.poison_range(start, len)
    }
    /// Reads messages; `EAGAIN` when there is none.
    fn read_events(&self, fd: &Uffd, buffer: &mut [RawMsg]) -> Result<usize, Errno> {
        fd.read(buffer)
    }
    /// A new private anonymous mapping, writable, not populated, aligned to `align`.
    fn map(&self, len: usize, align: usize) -> Result<usize, Errno> {
        mm::map(len, align)
    }
    /// Replaces the mapping at `start` by a new, empty one (`MAP_FIXED`).
    ///
    /// # Safety
    /// The range belongs to the caller, and its content is given up.
    unsafe fn map_over(&self, start: usize, len: usize) -> Result<(), Errno> {
        // SAFETY: promised by the caller.
        unsafe { mm::map_over(start, len) }
    }
    /// `munmap(2)`.
    ///
    /// # Safety
    /// Nothing may use the range any more.
    unsafe fn unmap(&self, start: usize, len: usize) -> Result<(), Errno> {
        // SAFETY: promised by the caller.
        unsafe { mm::unmap(start, len) }
    }
    /// `madvise(2)`.
    ///
    /// # Safety
    /// The range belongs to the caller; with [`Advice::DontNeed`] its content is given up.
    unsafe fn advise(&self, start: usize, len: usize, advice: Advice) -> Result<(), Errno> {
        // SAFETY: promised by the caller.
        unsafe { mm::advise(start, len, advice) }
    }
    /// Whether one registered mapping covers the range at this moment (`UFFDIO_CONTINUE`).
    /// `EAGAIN`: an event waits to be read, ask again.
    fn is_registered(&self, fd: &Uffd, start: usize, len: usize) -> Result<bool, Errno> {
        fd.is_registered(start, len)
    }
    /// The mappings that overlap a range, whole (`PROCMAP_QUERY`).
    fn mappings(&self, maps: &Maps, range: Range<usize>) -> Result<Vec<Range<usize>>, Errno> {
        maps.within(range)
    }
    /// What of this process's memory is no data, as far as it can be seen ([`in_use`]).
    fn in_use(&self, maps: &Maps) -> Result<Vec<InUse>, Errno> {
        in_use::look(maps)
    }
    /// `mbind(2)` with `MPOL_PREFERRED`.
    fn prefer_node(&self, start: usize, len: usize, node: u32) -> Result<(), Errno> {
        mm::prefer_node(start, len, node)
    }
    /// `move_pages(2)` as a query.
    fn page_nodes(&self, pages: &[usize], status: &mut [i32]) -> Result<(), Errno> {
        mm::page_nodes(pages, status)
    }
    /// `mincore(2)`: bit 0 of a page's byte is clear if it is in swap (and set, among others, for
    /// what is under migration, a memory error or a marker).
    fn in_core(&self, start: usize, pages: &mut [u8]) -> Result<(), Errno> {
        mm::in_core(start, pages)
    }
    /// `PAGEMAP_SCAN`; see [`Pagemap`].
    fn scan(
        &self,
        map: &Pagemap,
        start: usize,
        end: usize,
        wanted: Categories,
        returned: Categories,
        out: &mut [Run],
    ) -> Result<(usize, usize), Errno> {
        map.scan(start, end, wanted, returned, out)
    }
}

/// The kernel itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Linux;

impl Sys for Linux {}
