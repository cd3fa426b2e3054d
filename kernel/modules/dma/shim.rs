// SPDX-License-Identifier: GPL-2.0

//! The C half (`shim.c`), as Rust sees it.

use super::items::{Item, Items};
use core::ffi::{c_int, c_uint, c_void};
use core::ptr::NonNull;
use core::sync::atomic::Ordering;
use kernel::alloc::flags::GFP_KERNEL;
use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;

/// Parameters as of one moment, as `struct pf_settings`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Settings {
    pub(crate) channels: c_uint,
    pub(crate) least_kib: c_uint,
    timeout_ms: c_uint,
    poll: bool,
    pub(crate) verify: bool,
}

/// `struct pf_channel`.
type Raw = *mut c_void;

// Structures of the kernel are passed by pointer alone.
#[allow(improper_ctypes, reason = "bindgen has empty structures within them")]
extern "C" {
    fn pf_settings(now: *mut Settings);
    fn pf_count(bytes: usize, failed: usize);
    fn pf_now() -> u64;
    fn pf_lap(part: Part, since: u64) -> u64;
    fn pf_count_lie(channel: Raw, dst: *mut bindings::folio);
    fn pf_open(out: *mut Raw, most: usize) -> usize;
    fn pf_close(channel: Raw);
    fn pf_distance(channel: Raw, src: *mut bindings::folio, dst: *mut bindings::folio) -> c_int;
    fn pf_take(channel: Raw) -> bool;
    fn pf_give(channel: Raw);
    fn pf_add(
        channel: Raw,
        dst: *mut bindings::folio,
        src: *mut bindings::folio,
        offset: usize,
        len: usize,
        at: usize,
    ) -> c_int;
    fn pf_map(channel: Raw) -> c_int;
    fn pf_submit(channel: Raw, polled: bool) -> usize;
    fn pf_wait(channel: Raw, polled: bool, timeout_ms: c_uint) -> c_int;
    fn pf_next_failed(
        channel: Raw,
        index: *mut usize,
        at: *mut usize,
        end: *mut usize,
    ) -> bool;
    fn pf_unmap(channel: Raw);
    fn pf_retire(channel: Raw);
    fn pf_keep(dst: *mut bindings::folio, src: *mut bindings::folio);
    fn pf_compare(
        channel: Raw,
        dst: *mut bindings::folio,
        src: *mut bindings::folio,
        offset: usize,
        len: usize,
    ) -> c_int;
    fn pf_register() -> c_int;
    fn pf_unregister();
    fn pf_release_kept();
}

/// The parameters now.
pub(crate) fn settings() -> Settings {
    let mut now = Settings::default();
    // SAFETY: fills a structure of that layout.
    unsafe { pf_settings(&mut now) };
    now
}

/// Counts a batch.
pub(crate) fn count(bytes: usize, failed: usize) {
    // SAFETY: takes numbers.
    unsafe { pf_count(bytes, failed) };
}

/// Parts of a batch, in the order that `pf_lap` has them in.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) enum Part {
    Gather,
    Map,
    Submit,
    Wait,
    Unmap,
    Finish,
}

/// Tells where the time of a batch goes.
pub(crate) struct Laps(u64);

impl Laps {
    pub(crate) fn start() -> Self {
        // SAFETY: reads a clock.
        Self(unsafe { pf_now() })
    }

    /// What has passed since the last lap goes to `part`.
    pub(crate) fn end(&mut self, part: Part) {
        // SAFETY: adds to a counter.
        self.0 = unsafe { pf_lap(part, self.0) };
    }
}

/// A DMA channel that this module has. Between `take` and `give` one batch has it.
pub(crate) struct Channel(NonNull<c_void>);

// SAFETY: what belongs to a batch is used by who took the channel, which is atomic.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

/// All channels that copy memory and that nobody has, up to `most`.
pub(crate) fn open(most: usize) -> Result<KVec<Channel>> {
    let mut raw = KVec::<Raw>::with_capacity(most, GFP_KERNEL)?;
    let mut channels = KVec::with_capacity(most, GFP_KERNEL)?;
    // SAFETY: the vector has room for so many, of which the call fills as many as it says.
    unsafe {
        let count = pf_open(raw.as_mut_ptr(), most);
        raw.set_len(count);
    }
    for channel in raw.iter().filter_map(|raw| NonNull::new(*raw)) {
        // There is room: it does not fail.
        channels.push(Channel(channel), GFP_KERNEL)?;
    }
    Ok(channels)
}

// SAFETY, for all calls below: the channel is open as long as `self` is, and who calls them has
// taken it, but for `take` and `distance`, which anybody may call.
impl Channel {
    /// How far a folio's copy goes by this channel.
    pub(crate) fn distance(&self, item: &Item) -> c_int {
        // SAFETY: reads what does not change.
        unsafe { pf_distance(self.0.as_ptr(), item.src, item.dst) }
    }

    /// Takes it for a batch; `false`: it is not free.
    pub(crate) fn take(&self) -> bool {
        // SAFETY: atomic.
        unsafe { pf_take(self.0.as_ptr()) }
    }

    /// Gives it back.
    pub(crate) fn give(&self) {
        // SAFETY: taken by the caller.
        unsafe { pf_give(self.0.as_ptr()) };
    }

    /// Maps bytes `start .. end` of a batch for the device.
    pub(crate) fn map(&self, items: &Items, start: usize, end: usize) -> Result {
        let mut told = Ok(());
        items.each(start, end, |item, from, bytes| {
            if told.is_ok() {
                let at = item.start + from;
                // SAFETY: taken by the caller; folios of the migration under way.
                let added =
                    unsafe { pf_add(self.0.as_ptr(), item.dst, item.src, from, bytes, at) };
                told = to_result(added);
            }
        });
        told?;
        if start == end {
            return Err(EINVAL);
        }
        // SAFETY: taken by the caller, with something added.
        to_result(unsafe { pf_map(self.0.as_ptr()) })
    }

    /// Asks for as much as it takes at once; the bytes left.
    pub(crate) fn submit(&self, settings: &Settings) -> usize {
        // SAFETY: taken by the caller, and mapped.
        unsafe { pf_submit(self.0.as_ptr(), settings.poll) }
    }

    /// Waits for it. An error: the device may still be at work.
    pub(crate) fn wait(&self, settings: &Settings) -> Result {
        // SAFETY: taken by the caller, and submitted.
        to_result(unsafe { pf_wait(self.0.as_ptr(), settings.poll, settings.timeout_ms) })
    }

    /// Calls `told` with bytes of the batch that were not copied.
    pub(crate) fn failures(&self, mut told: impl FnMut(usize, usize)) {
        let (mut index, mut at, mut end) = (0, 0, 0);
        // SAFETY: taken by the caller, and waited for.
        while unsafe { pf_next_failed(self.0.as_ptr(), &mut index, &mut at, &mut end) } {
            told(at, end);
        }
    }

    /// Ends the mapping: of a channel whose device is not at work.
    pub(crate) fn unmap(&self) {
        // SAFETY: taken by the caller.
        unsafe { pf_unmap(self.0.as_ptr()) };
    }

    /// Gives it up for good.
    pub(crate) fn retire(&self) {
        // SAFETY: taken by the caller.
        unsafe { pf_retire(self.0.as_ptr()) };
    }

    /// Compares a part of a folio, unless it has failed anyway.
    pub(crate) fn verify(&self, item: &Item, from: usize, bytes: usize) {
        if item.failed.load(Ordering::Relaxed) {
            return;
        }
        let channel = self.0.as_ptr();
        // SAFETY: taken by the caller; folios of the migration under way, which no device is at
        // work on.
        let found = unsafe { pf_compare(channel, item.dst, item.src, from, bytes) };
        if found > 0 {
            // SAFETY: as above.
            unsafe { pf_count_lie(channel, item.dst) };
        }
        if found != 0 {
            item.failed.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: no batch has it any more.
        unsafe { pf_close(self.0.as_ptr()) };
    }
}

/// Keeps a folio's destination for good, and makes its migration fail.
///
/// # Safety
/// The folio's migration is under way.
pub(crate) unsafe fn keep(item: &Item) {
    // SAFETY: as promised.
    unsafe { pf_keep(item.dst, item.src) };
}

/// Begins to be asked for copies.
pub(crate) fn register() -> Result {
    // SAFETY: the channels that the calls use are there.
    to_result(unsafe { pf_register() })
}

/// Ends it: waits for the batches under way, and for what was kept of their sources.
pub(crate) fn unregister() {
    // SAFETY: after `register`.
    unsafe {
        pf_unregister();
        pf_release_kept();
    }
}
