// SPDX-License-Identifier: GPL-2.0

//! Copies the folios of a migration batch by DMA engines: any provider of dmaengine's memory-to-
//! memory copies.
//!
//! A batch's bytes are divided among a few channels, those nearest to its nodes first. Each maps its
//! share, is asked for it in as few descriptors as the mapping needs, and interrupts once. What a
//! channel does not copy, the kernel does.
//!
//! What always holds:
//! - The call returns when no folio of the batch is mapped for a device, or that folio is kept: its
//!   destination for good, and its migration made to fail. So a device that is late writes to
//!   memory that nobody uses.
//! - A channel that was late is given up, and never asked again.
//! - A folio is marked as copied only if every channel with a part of it said so (and, if asked to,
//!   it was compared).
//! - Nothing is allocated that waits for memory.

use core::ffi::{c_int, c_uint};
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};
use kernel::alloc::flags::GFP_KERNEL;
use kernel::bindings;
use kernel::page::PAGE_SIZE;
use kernel::prelude::*;

#[path = "../common/items.rs"]
mod items;
#[path = "../../../crates/pageferry-copy/src/share.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with userspace")]
mod share;
mod shim;

use items::Items;
use shim::{Channel, Laps, Part, Settings};

module! {
    type: CopyDma,
    name: "pageferry_copy_dma",
    author: "pageferry",
    description: "Copies page migration's batches by DMA engines",
    license: "GPL",
}

/// Channels of a batch at most; the parameter's range, too.
const MOST_CHANNELS: usize = 32;

/// The channels that this module has.
struct Channels(KVec<Channel>);

/// The channels; null before they are there and after they have gone.
static CHANNELS: AtomicPtr<Channels> = AtomicPtr::new(ptr::null_mut());

/// Channels that were taken for a batch, the first ones of the list.
type Taken<'a> = [Option<&'a Channel>; MOST_CHANNELS];

impl Channels {
    /// Takes up to `most` channels that are free, those nearest to the batch's folios first; how
    /// many.
    fn take<'a>(&'a self, items: &Items, most: usize, taken: &mut Taken<'a>) -> usize {
        let Some(item) = items.all().first() else { return 0 };
        let mut tried = [false; MOST_CHANNELS];
        let mut count = 0;
        while count < most {
            let untried = (0..self.0.len()).filter(|index| !tried[*index]);
            let nearest = untried.min_by_key(|index| self.0[*index].distance(item));
            let Some(nearest) = nearest else { break };
            tried[nearest] = true;
            if self.0[nearest].take() {
                taken[count] = Some(&self.0[nearest]);
                count += 1;
            }
        }
        count
    }

    /// Copies a batch.
    ///
    /// # Safety
    /// As `offload_copy` of `struct migrator` has its folios.
    unsafe fn copy(
        &self,
        dsts: *mut bindings::list_head,
        srcs: *mut bindings::list_head,
        folios: usize,
    ) -> Result {
        let mut laps = Laps::start();
        let settings = shim::settings();
        // SAFETY: passed on.
        let items = unsafe { Items::take(dsts, srcs, folios)? };
        let least = (settings.least_kib as usize) << 10;
        let (have, most) = (self.0.len(), settings.channels as usize);
        // The first channel, and those that help it.
        let most = 1 + share::helpers(items.bytes, have.saturating_sub(1), most - 1, least);
        let mut taken = [None; MOST_CHANNELS];
        let count = self.take(&items, most, &mut taken);
        if count == 0 {
            return Err(EBUSY);
        }
        let channels = &taken[..count];
        laps.end(Part::Gather);
        self.run(&items, channels, &settings, &mut laps);
        for channel in channels.iter().flatten() {
            channel.give();
        }
        // SAFETY: no folio that has not failed is mapped for a device.
        let failed = unsafe { items.mark() };
        laps.end(Part::Finish);
        shim::count(items.bytes, failed);
        Ok(())
    }

    /// Has the channels copy, each its share.
    fn run(
        &self,
        items: &Items,
        channels: &[Option<&Channel>],
        settings: &Settings,
        laps: &mut Laps,
    ) {
        let pages = items.bytes / PAGE_SIZE;
        let share_of = |index| {
            let (start, end) = share::part(pages, channels.len(), index);
            (start * PAGE_SIZE, end * PAGE_SIZE)
        };
        // What each has not been asked for yet; `None`: it is not at work.
        let mut left = [None; MOST_CHANNELS];
        let mut was_late = false;
        for (index, channel) in channels.iter().flatten().enumerate() {
            let (start, end) = share_of(index);
            let mapped = channel.map(items, start, end);
            laps.end(Part::Map);
            // A share that cannot be mapped is the kernel's to copy.
            match mapped {
                Ok(()) => left[index] = Some(channel.submit(settings)),
                Err(_) => items.fail(start, end),
            }
            laps.end(Part::Submit);
        }
        // In rounds: a channel is asked for more as soon as its turn comes, not when others end.
        while left.iter().any(Option::is_some) {
            for (index, channel) in channels.iter().flatten().enumerate() {
                let Some(rest) = left[index] else { continue };
                let late = channel.wait(settings).is_err();
                laps.end(Part::Wait);
                if rest > 0 && !late {
                    left[index] = Some(channel.submit(settings));
                    laps.end(Part::Submit);
                    continue;
                }
                left[index] = None;
                if late {
                    was_late = true;
                    // Its share stays mapped, and so is not ours to use, whatever of it was copied:
                    // caches and bounce buffers are put right when a mapping ends.
                    let (start, end) = share_of(index);
                    channel.retire();
                    items.fail(start, end);
                    items.each(start, end, |item, _, _| {
                        if !item.kept.swap(true, Ordering::Relaxed) {
                            // SAFETY: `offload_copy` has not returned.
                            unsafe { shim::keep(item) };
                        }
                    });
                } else {
                    channel.failures(|at, end| items.fail(at, end));
                    channel.unmap();
                }
                laps.end(Part::Unmap);
            }
        }
        if was_late {
            // So much later, copies are better made anew: the less can have happened to their sources.
            items.fail(0, items.bytes);
        } else if settings.verify {
            for (index, channel) in channels.iter().flatten().enumerate() {
                let (start, end) = share_of(index);
                items.each(start, end, |item, from, bytes| channel.verify(item, from, bytes));
            }
        }
    }
}

/// `offload_copy` of our `struct migrator`.
///
/// # Safety
/// Called by page migration alone, between registration and the end of its removal.
#[no_mangle]
unsafe extern "C" fn pageferry_dma_copy(
    dsts: *mut bindings::list_head,
    srcs: *mut bindings::list_head,
    folios: c_uint,
) -> c_int {
    // SAFETY: there from before registration until after its removal.
    let Some(channels) = (unsafe { CHANNELS.load(Ordering::Acquire).as_ref() }) else {
        return ENODEV.to_errno();
    };
    // SAFETY: the caller is page migration.
    match unsafe { channels.copy(dsts, srcs, folios as usize) } {
        Ok(()) => 0,
        Err(error) => error.to_errno(),
    }
}

/// The module. It keeps the channels, which are given back after the last batch.
struct CopyDma {
    _channels: KBox<Channels>,
}

impl kernel::Module for CopyDma {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let channels = KBox::new(Channels(shim::open(MOST_CHANNELS)?), GFP_KERNEL)?;
        if channels.0.is_empty() {
            pr_err!("no DMA channel copies memory to memory, or all are in use\n");
            return Err(ENODEV);
        }
        CHANNELS.store(ptr::from_ref(&*channels).cast_mut(), Ordering::Release);
        if let Err(error) = shim::register() {
            CHANNELS.store(ptr::null_mut(), Ordering::Release);
            return Err(error);
        }
        Ok(Self { _channels: channels })
    }
}

impl Drop for CopyDma {
    fn drop(&mut self) {
        shim::unregister();
        CHANNELS.store(ptr::null_mut(), Ordering::Release);
    }
}
