//! What every part of a move works with: the kernel, the userfaultfd, pools and flights.

use crate::flight::Flights;
use crate::policy::Policy;
use crate::pool::Pools;
use pageferry_copy::CopyBatch;
use pageferry_sys::Sys;
use pageferry_sys::fork::Quiesce;
use pageferry_sys::pagemap::Pagemap;
use pageferry_sys::uffd::Uffd;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// Shared by the engine's threads.
///
/// One userfaultfd serves regions and pools, because the kernel then stops every `UFFDIO_MOVE`
/// (`EAGAIN`) from the moment the program unmaps part of a region until the handler has read of
/// it. With a descriptor of its own, detach could take pages of whatever was mapped there next.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) sys: Arc<dyn Sys>,
    /// Registered over the ranges of running moves, and over the extents of the pools that pages
    /// are taken out to.
    pub(crate) uffd: Arc<Uffd>,
    pub(crate) pools: Pools,
    pub(crate) flights: Flights,
    pub(crate) pagemap: Pagemap,
    /// What `PAGEMAP_SCAN` can tell here about a page (guard markers: since 6.15).
    pub(crate) tells: AtomicU64,
    /// Lists of copies that no batch uses now.
    pub(crate) spare_batches: Mutex<Vec<Arc<CopyBatch>>>,
    pub(crate) policy: Policy,
    pub(crate) forks: crate::quiesce::ForkGate,
    /// This kernel keeps a page's write protection across `UFFDIO_MOVE` (found by trying it).
    pub(crate) move_keeps_protection: AtomicBool,
}

impl Quiesce for Context {
    fn before(&self) {
        self.forks.close();
    }
    fn after_in_parent(&self) {
        self.forks.open();
    }
}
