// SPDX-License-Identifier: GPL-2.0

//! The C half (`shim.c`), as Rust sees it.

use super::items::Item;
use core::ffi::{c_int, c_uint};
use kernel::bindings;
use kernel::prelude::*;

/// Parameters as of one moment, as `struct pf_settings`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Settings {
    pub(crate) helpers: c_uint,
    pub(crate) least_kib: c_uint,
    pub(crate) non_temporal: c_uint,
    side: c_uint,
}

/// `side`: the CPUs of the destination's node copy; else those of the source's.
const DESTINATION: c_uint = 2;

// Structures of the kernel are passed by pointer alone.
#[allow(improper_ctypes, reason = "bindgen has empty structures within them")]
extern "C" {
    fn pf_settings(now: *mut Settings);
    fn pf_count(helped: bool, bytes: usize, helped_bytes: usize, helper_ns: u64, failed: usize);
    /// Copies pages of a folio, as `folio_mc_copy` does.
    pub(crate) fn pf_copy(
        dst: *mut bindings::folio,
        src: *mut bindings::folio,
        first: usize,
        pages: usize,
        non_temporal: bool,
    ) -> c_int;
    fn pf_node(folio: *const bindings::folio) -> c_int;
    fn pf_has_cpus(node: c_int) -> bool;
    fn pf_nearest(node: c_int) -> c_int;
    fn pf_cpus(cpus: *mut u32, nodes: *mut u32, caches: *mut u32, most: usize) -> usize;
    fn pf_idle(cpu: c_uint) -> bool;
    /// `INIT_WORK`.
    pub(crate) fn pf_init_work(
        work: *mut bindings::work_struct,
        call: unsafe extern "C" fn(*mut bindings::work_struct),
    );
    /// `init_completion`.
    pub(crate) fn pf_init_completion(completion: *mut bindings::completion);
    fn pf_queue() -> *mut bindings::workqueue_struct;
    fn pf_thread_ns() -> u64;
    fn pf_register() -> c_int;
    fn pf_unregister();
    fn pf_watch_cpus() -> c_int;
    fn pf_ignore_cpus();
    fn pf_faster_side() -> c_uint;
    fn migrate_offload_charge(helper_ns: u64);
}

/// The parameters now.
pub(crate) fn settings() -> Settings {
    let mut now = Settings::default();
    // SAFETY: fills a structure of that layout.
    unsafe { pf_settings(&mut now) };
    now
}

impl Settings {
    /// The node whose CPUs copy this folio.
    pub(crate) fn node(&self, item: &Item) -> c_int {
        let (here, there) = match self.side {
            DESTINATION => (item.dst, item.src),
            _ => (item.src, item.dst),
        };
        // SAFETY: folios of the migration under way, held by it; nodes that they are on.
        unsafe {
            let (here, there) = (pf_node(here), pf_node(there));
            match (pf_has_cpus(here), pf_has_cpus(there)) {
                (true, _) => here,
                (false, true) => there,
                (false, false) => pf_nearest(here),
            }
        }
    }
}

/// The CPUs online, with their nodes and caches; the slices are of one length.
pub(crate) fn cpus(cpus: &mut [u32], nodes: &mut [u32], caches: &mut [u32]) -> usize {
    let most = cpus.len().min(nodes.len()).min(caches.len());
    // SAFETY: each has room for so many.
    unsafe { pf_cpus(cpus.as_mut_ptr(), nodes.as_mut_ptr(), caches.as_mut_ptr(), most) }
}

/// Whether a CPU is online and idle.
pub(crate) fn is_idle(cpu: u32) -> bool {
    // SAFETY: any number will do.
    unsafe { pf_idle(cpu) }
}

/// CPU time of this thread in nanoseconds.
pub(crate) fn thread_ns() -> u64 {
    // SAFETY: callable by any thread that may take a lock.
    unsafe { pf_thread_ns() }
}

/// Counts a batch, and tells for whom the helpers worked.
pub(crate) fn account(bytes: usize, helped: usize, ns: u64, failed: usize) {
    // SAFETY: take numbers; the current task is the one that migrates.
    unsafe {
        pf_count(helped > 0, bytes, helped, ns, failed);
        if ns > 0 {
            migrate_offload_charge(ns);
        }
    }
}

/// Finds out whose CPUs copy faster.
pub(crate) fn measure() {
    // SAFETY: at load, when nothing is copied yet.
    unsafe { pf_faster_side() };
}

/// The helpers' queue, until it is kept by the module.
pub(crate) struct Queue(*mut bindings::workqueue_struct);

impl Queue {
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: a new queue, or null.
        let queue = unsafe { pf_queue() };
        if queue.is_null() {
            return Err(ENOMEM);
        }
        Ok(Self(queue))
    }

    pub(crate) fn pointer(&self) -> *mut bindings::workqueue_struct {
        self.0
    }

    /// Leaves it to the module.
    pub(crate) fn keep(self) {
        core::mem::forget(self);
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: ours, with no work on it.
        unsafe { bindings::destroy_workqueue(self.0) };
    }
}

/// Begins to be called when CPUs come and go; the first call is made here.
pub(crate) fn watch_cpus() -> Result {
    // SAFETY: the state that the calls read is there.
    kernel::error::to_result(unsafe { pf_watch_cpus() })
}

/// Ends it.
pub(crate) fn ignore_cpus() {
    // SAFETY: after `watch_cpus`.
    unsafe { pf_ignore_cpus() };
}

/// Begins to be asked for copies.
pub(crate) fn register() -> Result {
    // SAFETY: the state that the calls read is there.
    kernel::error::to_result(unsafe { pf_register() })
}

/// Ends it, and waits for the batches under way.
pub(crate) fn unregister() {
    // SAFETY: after `register`.
    unsafe { pf_unregister() };
}
