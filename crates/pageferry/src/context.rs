//! What every part of a move works with: the kernel, the userfaultfd, pools and flights.

use crate::flight::{Flights, MAX_PAGES};
use crate::policy::Policy;
use crate::pool::Pools;
use crate::sync::Mutex;
use pageferry_copy::CopyBatch;
use pageferry_sys::Sys;
use pageferry_sys::fork::Quiesce;
use pageferry_sys::maps::Maps;
use pageferry_sys::pagemap::{Entry, Pagemap};
use pageferry_sys::uffd::{Progress, Uffd};
use pageferry_sys::{Errno, page_size};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

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
    pub(crate) maps: Maps,
    /// Held while something is registered or unregistered, so that what one move unregisters is
    /// not what another registers. Taken before the gate and every other lock of a move.
    pub(crate) registering: Mutex<()>,
    /// What `PAGEMAP_SCAN` can tell here about a page (guard markers: since 6.15).
    pub(crate) tells: AtomicU64,
    /// There was swap space when the last move began. Without it, what the page table calls swapped
    /// is a page that the kernel is migrating.
    pub(crate) swap: AtomicBool,
    /// Lists of copies that no batch uses now.
    pub(crate) spare_batches: Mutex<Vec<Arc<CopyBatch>>>,
    pub(crate) policy: Policy,
    pub(crate) forks: crate::quiesce::ForkGate,
    /// This kernel keeps a page's write protection across `UFFDIO_MOVE` (found by trying it).
    pub(crate) move_keeps_protection: AtomicBool,
    /// Here `UFFDIO_COPY` replaces guard markers (found by trying it; until Linux 6.18). `UFFDIO_MOVE`
    /// never does.
    pub(crate) copy_replaces_guards: AtomicBool,
    /// A guard marker was seen in managed memory: the program makes use of them.
    pub(crate) guards: AtomicBool,
}

impl Quiesce for Context {
    fn before(&self) {
        self.forks.close();
    }
    fn after_in_parent(&self) {
        self.forks.open();
    }
}

impl Context {
    /// Whether pages may go in by `UFFDIO_COPY`. Where that would replace the markers that a program
    /// installs meanwhile, not once the program is known to use such.
    pub(crate) fn kernel_may_copy(&self) -> bool {
        // Relaxed: nothing else is published by it.
        !(self.copy_replaces_guards.load(Ordering::Relaxed) && self.guards.load(Ordering::Relaxed))
    }

    /// A guard marker was seen.
    pub(crate) fn note_guard(&self) {
        self.guards.store(true, Ordering::Relaxed);
    }

    /// `UFFDIO_MOVE`, its result put right.
    ///
    /// From Linux 6.18 on (`move_pages` in mm/userfaultfd.c, since pages are moved in batches) the
    /// kernel forgets to clear an `EAGAIN` that made it try again inside the call. Pages that the
    /// second try moved are then not counted; the loop comes to them once more, finds their
    /// destination taken and says `EEXIST`. They have left their place all the same, and nobody
    /// was woken. A page that is gone from its source and is there at its destination has moved.
    ///
    /// # Safety
    /// As [`Sys::move_range`]; and whoever touches a source page that has moved waits, so that
    /// it stays missing.
    pub(crate) unsafe fn move_range(&self, dst: usize, src: usize, len: usize) -> Progress {
        // SAFETY: promised by the caller.
        let progress = unsafe { self.sys.move_range(&self.uffd, dst, src, len) };
        if progress.done > 0 || progress.error != Some(Errno(libc::EEXIST)) {
            return progress;
        }
        let mut entries = [[Entry(0); MAX_PAGES]; 2];
        let count = (len / page_size()).min(MAX_PAGES);
        for (from, entries) in [src, dst].into_iter().zip(&mut entries) {
            if self.pagemap.entries(from, &mut entries[..count]).is_err() {
                return progress;
            }
        }
        let there = |e: &Entry| e.present() || e.swapped();
        let [left, taken] = &entries;
        let moved = left[..count].iter().zip(taken).take_while(|(s, d)| !there(s) && there(d));
        let done = moved.count() * page_size();
        if done == 0 {
            return progress;
        }
        // EINVAL, ENOENT: the mapping is gone, and whoever waited with it.
        let mut tries = 0;
        while let Err(Errno(libc::EAGAIN)) = self.sys.wake(&self.uffd, dst, done) {
            crate::berth::back_off(tries);
            tries += 1;
        }
        Progress { done, error: (done < len).then_some(Errno(libc::EAGAIN)) }
    }
}
