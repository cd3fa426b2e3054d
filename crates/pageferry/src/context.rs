//! What every part of a move works with: the kernel, the two userfaultfds, pools and flights.

use crate::flight::Flights;
use crate::policy::Policy;
use crate::pool::Pools;
use pageferry_sys::Sys;
use pageferry_sys::fork::Quiesce;
use pageferry_sys::pagemap::Pagemap;
use pageferry_sys::uffd::Uffd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Shared by the engine's threads.
///
/// There are two userfaultfds. `UFFDIO_MOVE` wants only its *destination* registered with the
/// descriptor it is called on: pages go out through the pools' descriptor, which asks for no
/// events, and come in through the regions', which does. So freeing frames raises no event, and
/// an event that waits to be read (the kernel answers `EAGAIN` meanwhile) stops no detach.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) sys: Arc<dyn Sys>,
    /// Registered over the ranges of running moves.
    pub(crate) regions: Uffd,
    /// Registered over the pools (`pools.uffd`).
    pub(crate) pools: Pools,
    pub(crate) flights: Flights,
    pub(crate) pagemap: Pagemap,
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
