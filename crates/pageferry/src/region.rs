//! Memory under management.
//!
//! Between moves a region is ordinary memory: nothing is registered, first touches, `madvise`,
//! `munmap` and `fork` cost what they always cost. Only while a move runs are the 2 MiB blocks
//! that it touches watched by the engine's userfaultfd.

use crate::alloc::HeapLock;
use crate::engine::Engine;
use crate::error::RegionError;
use crate::request::Part;
use crate::units::{FolioSize, HUGE, overlap};
use pageferry_sys::mm::Advice;
use pageferry_sys::pagemap::{Categories, Run};
use pageferry_sys::{Errno, page_size};
use pageferry_topology::NodeId;
use serde::Serialize;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Which folios a region is to have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Folios {
    /// Base pages only.
    Base,
    /// Huge pages where the kernel has them, base pages elsewhere.
    Huge,
    /// What the system's setting gives; parts can be advised differently.
    #[default]
    Mixed,
}

/// Whether the kernel, or a device, may hold on to pages of a region while the program does
/// something else.
///
/// A reference of this kind outlives the system call that took it, or is taken by a device. The
/// kernel tells of *pins* (`FOLL_PIN`) when a page is to be moved, and the page stays. It does not
/// tell of *plain references* (`FOLL_GET`): the page moves away, and whoever holds it goes on
/// reading, or writing, the page that the program no longer has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum References {
    /// They may. A page that was moved away is freed, never used again by the engine, so that a
    /// reader that still holds it reads what was there. And live order compares every copy with its
    /// original before it is used, because a device may have written to the page meanwhile.
    ///
    /// A *writer* with a plain reference loses what it writes after the page has moved away,
    /// whatever the engine does: `O_DIRECT` reads from NFS, 9p and Ceph (`iov_iter_get_pages_alloc2`
    /// on most kernels in use; on local file systems it pins), and `vmsplice` gifts that are
    /// written to afterwards. A program must not have such a read under way in a region that
    /// moves.
    #[default]
    Possible,
    /// Never, while the region moves or a second after that: the program promises it. Old pages
    /// become frames for later moves of the region, which is about twice as fast for base pages,
    /// and live order needs no comparison.
    ///
    /// What breaks the promise: `vmsplice(2)`, `splice` and `tee` of what was spliced so;
    /// `MSG_ZEROCOPY` sends, io_uring `SEND_ZC`; `O_DIRECT`, io_uring fixed buffers, RDMA, VFIO,
    /// AF_XDP (pins); and anything in [`References::Possible`] that is a breach even there. A reader
    /// whose page was recycled gets other data of the same region; what a device writes during
    /// a live move can be lost.
    Never,
}

/// Bytes of a region on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Residency {
    /// The node.
    pub node: NodeId,
    /// The folio size.
    pub folio: FolioSize,
    /// Bytes.
    pub bytes: u64,
}

/// Options of a new region.
#[derive(Debug)]
#[must_use]
pub struct RegionBuilder {
    engine: Engine,
    bytes: usize,
    folios: Folios,
    prefer: Option<NodeId>,
    references: References,
}

impl RegionBuilder {
    pub(crate) fn new(engine: Engine, bytes: usize) -> Self {
        Self {
            engine,
            bytes,
            folios: Folios::default(),
            prefer: None,
            references: References::default(),
        }
    }

    /// Which folios it is to have.
    pub fn folios(mut self, folios: Folios) -> Self {
        self.folios = folios;
        self
    }

    /// The node on which first touches are placed while it has memory.
    pub fn prefer(mut self, node: NodeId) -> Self {
        self.prefer = Some(node);
        self
    }

    /// Old pages may be used again: see [`References::Never`].
    ///
    /// # Safety
    /// The promise told there is kept: nothing holds a reference to a page of the region past the
    /// system call that it was given to, as `vmsplice`, `MSG_ZEROCOPY` and `O_DIRECT` do.
    pub unsafe fn no_references(mut self) -> Self {
        self.references = References::Never;
        self
    }

    /// Maps the region. It begins at a multiple of 2 MiB and is all zeros.
    ///
    /// # Errors
    /// [`RegionError`].
    pub fn build(self) -> Result<Region, RegionError> {
        let len = self.bytes.checked_next_multiple_of(page_size()).unwrap_or(0);
        if len == 0 || len > 1 << 46 {
            return Err(RegionError::Size(self.bytes));
        }
        if let Some(node) = self.prefer {
            self.engine.machine().memory_node(node)?;
        }
        let sys = &self.engine.inner.ctx.sys;
        let kernel = |what| move |source: Errno| RegionError::Kernel { what, source };
        let start = sys.map(len, HUGE).map_err(kernel("mapping the region"))?;
        let region = Region {
            engine: self.engine.clone(),
            start,
            len,
            references: self.references,
            id: next_id(),
            own_policy: self.prefer.is_some(),
            owned: true,
            gone: Arc::default(),
            heap: HeapLock::new(),
        };
        if let Some(node) = self.prefer {
            sys.prefer_node(start, len, node.get()).map_err(kernel("setting its memory policy"))?;
        }
        region.advise(0..len, self.folios)?;
        region.enrol();
        Ok(region)
    }
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    // Relaxed: each number is given out once.
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Memory under management. Dropped, it ends the moves on it and is unmapped (an adopted one is
/// left as it is).
#[derive(Debug)]
pub struct Region {
    pub(crate) engine: Engine,
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) references: References,
    /// No other region of the process has it, or had.
    pub(crate) id: u64,
    /// It has (or may have) a memory policy of its own.
    pub(crate) own_policy: bool,
    owned: bool,
    /// Set when it is dropped: what is asked of it later finds somebody else's memory.
    pub(crate) gone: Arc<AtomicBool>,
    /// What `RegionAlloc` has given out of it.
    pub(crate) heap: Arc<HeapLock>,
}

impl Region {
    pub(crate) fn adopt(
        engine: Engine,
        start: usize,
        len: usize,
        references: References,
    ) -> Result<Self, RegionError> {
        if start == 0 {
            return Err(RegionError::Null);
        }
        let Some(end) = start.checked_add(len).filter(|_| len > 0) else {
            return Err(RegionError::Size(len));
        };
        if !start.is_multiple_of(page_size()) || !len.is_multiple_of(page_size()) {
            return Err(RegionError::Unaligned(start..end));
        }
        let managed = engine.inner.regions.lock().iter().any(|part| part.overlaps(&(start..end)));
        if managed {
            return Err(RegionError::Managed(start..end));
        }
        if engine.inner.is_used_by_movers(&(start..end)) {
            return Err(RegionError::OwnMemory(start..end));
        }
        let ctx = &engine.inner.ctx;
        let what = "looking for what the process's threads use";
        let in_use = ctx.sys.in_use(&ctx.maps);
        let in_use = in_use.map_err(|source| RegionError::Kernel { what, source })?;
        if let Some(used) = in_use.iter().find(|used| overlap(&used.addresses, &(start..end))) {
            let (range, at) = (start..end, used.addresses.start.max(start));
            return Err(RegionError::InUse { range, at, by: used.by });
        }
        let region = Self {
            engine,
            start,
            len,
            references,
            id: next_id(),
            own_policy: true,
            owned: false,
            gone: Arc::default(),
            heap: HeapLock::new(),
        };
        region.enrol();
        Ok(region)
    }

    /// The engine knows of it from now on, until it is dropped.
    fn enrol(&self) {
        let part = Part::new(self, NodeId::new(0));
        self.engine.inner.regions.lock().push(part);
    }

    /// Whether its memory was mapped by somebody else.
    pub(crate) fn is_adopted(&self) -> bool {
        !self.owned
    }

    /// Its first byte. What is behind it moves, the address does not.
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.start)
    }

    /// Its first address.
    pub fn addr(&self) -> usize {
        self.start
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Its addresses.
    pub fn addresses(&self) -> Range<usize> {
        self.start..self.start + self.len
    }

    /// All of it, to go to `node`.
    pub fn to(&self, node: NodeId) -> Part {
        Part::new(self, node)
    }

    fn within(&self, range: &Range<usize>) -> Result<(), RegionError> {
        if range.start > range.end || range.end > self.len {
            return Err(RegionError::Foreign { given: range.clone(), len: self.len });
        }
        Ok(())
    }

    /// Advises which folios a part of it (bytes from its start) is to have from now on.
    /// [`Folios::Mixed`] leaves it as it was advised before.
    ///
    /// # Errors
    /// [`RegionError::Foreign`], [`RegionError::Unaligned`], or what `madvise(2)` says.
    pub fn advise(&self, range: Range<usize>, folios: Folios) -> Result<(), RegionError> {
        self.within(&range)?;
        if !range.start.is_multiple_of(page_size()) || !range.end.is_multiple_of(page_size()) {
            return Err(RegionError::Unaligned(range));
        }
        let advice = match folios {
            Folios::Base => Advice::NoHugePage,
            Folios::Huge => Advice::HugePage,
            Folios::Mixed => return Ok(()),
        };
        let sys = &self.engine.inner.ctx.sys;
        // SAFETY: the range is the region's, and this advice drops nothing.
        let done = unsafe { sys.advise(self.start + range.start, range.len(), advice) };
        match done {
            // A kernel without huge pages knows neither advice, and gives base pages.
            Ok(()) | Err(Errno(libc::EINVAL)) => Ok(()),
            Err(source) => Err(RegionError::Kernel { what: "madvise", source }),
        }
    }

    /// Where its pages are now, by node and folio size. A look in passing: a move or the kernel
    /// may change it meanwhile.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn residency(&self) -> Result<Vec<Residency>, RegionError> {
        let mut found: Vec<Residency> = Vec::new();
        look(&self.engine, self.addresses(), |_, node, folio| {
            let bytes = folio.bytes() as u64;
            match found.iter_mut().find(|r| r.node == node && r.folio == folio) {
                Some(residency) => residency.bytes += bytes,
                None => found.push(Residency { node, folio, bytes }),
            }
        })?;
        found.sort_by_key(|r| (r.node, r.folio == FolioSize::Huge));
        Ok(found)
    }
}

/// Calls `f` with the address, node and size of each folio that is there.
pub(crate) fn look(
    engine: &Engine,
    addresses: Range<usize>,
    mut f: impl FnMut(usize, NodeId, FolioSize),
) -> Result<(), RegionError> {
    let ctx = &engine.inner.ctx;
    let kernel = |what| move |source: Errno| RegionError::Kernel { what, source };
    let mut runs = [Run::EMPTY; 256];
    let want = Categories::PRESENT;
    let keep = want | Categories::HUGE | Categories::PFN_ZERO;
    let (mut at, end) = (addresses.start, addresses.end);
    let (mut pages, mut nodes) = (Vec::new(), Vec::new());
    while at < end {
        let found = ctx.sys.scan(&ctx.pagemap, at, end, want, keep, &mut runs);
        let (count, ended) = found.map_err(kernel("scanning the page table"))?;
        for run in &runs[..count] {
            if run.categories().contains(Categories::PFN_ZERO) {
                continue;
            }
            let is_huge = run.categories().contains(Categories::HUGE);
            let folio = if is_huge { FolioSize::Huge } else { FolioSize::Base };
            let address = |v: u64| usize::try_from(v).unwrap_or(end).min(end);
            pages.clear();
            pages.extend((address(run.start)..address(run.end)).step_by(folio.bytes()));
            nodes.clear();
            nodes.resize(pages.len(), -1);
            if let Some(only) = engine.only_node() {
                nodes.fill(i32::try_from(only.get()).unwrap_or(-1));
            } else {
                ctx.sys.page_nodes(&pages, &mut nodes).map_err(kernel("asking for nodes"))?;
            }
            for (&page, &node) in pages.iter().zip(&nodes) {
                if let Ok(node) = u32::try_from(node) {
                    f(page, NodeId::new(node), folio);
                }
            }
        }
        if ended <= at {
            break;
        }
        at = ended;
    }
    Ok(())
}

impl Drop for Region {
    fn drop(&mut self) {
        let inner = &self.engine.inner;
        if inner.is_at_home() {
            inner.regions.lock().retain(|part| !part.is_of(&self.gone));
            inner.clear_range(&self.addresses(), &self.gone);
        }
        if self.owned {
            // SAFETY: the region is the only one that hands out this memory, nobody moves it any
            // more, and its user gives it up by dropping it.
            let unmapped = unsafe { inner.ctx.sys.unmap(self.start, self.len) };
            if let Err(errno) = unmapped {
                tracing::warn!(%errno, start = self.start, "a region could not be unmapped");
            }
        }
    }
}
