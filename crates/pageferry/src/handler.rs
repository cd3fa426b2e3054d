//! The thread that answers faults and events while something moves.
//!
//! It touches no managed memory and raises no event itself: its stack, its buffers and the flight
//! table lie outside every region, and it neither maps nor unmaps anything.
//!
//! While an event (unmap, remap, remove) waits to be read, the kernel answers resolutions with
//! `EAGAIN`. The handler then wakes the faulting thread instead, which faults again and is served
//! after the event: nothing here waits for what only this thread can do.

use crate::context::Context;
use crate::flight::Verdict;
use pageferry_sys::page_size;
use pageferry_sys::pagemap::{Categories, Run};
use pageferry_sys::uffd::{RawMsg, Signal, wait_readable};
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Messages read in one go.
const MESSAGES: usize = 32;

/// Serves until `stop` is raised.
pub(crate) fn serve(ctx: &Context, stop: &Signal) {
    // Every fault at a hole wakes this thread. It must not take the CPU of the mover that is about
    // to close the hole; the faulting thread's CPU is free. (Refused, it only wakes louder.)
    let _ = pageferry_sys::sched::wake_quietly();
    let mut messages = [RawMsg::EMPTY; MESSAGES];
    loop {
        match wait_readable(&ctx.uffd, stop.as_raw_fd()) {
            Ok(true) => {}
            Ok(false) => return,
            Err(errno) => {
                tracing::error!(%errno, "waiting for page faults failed; trying again");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        let handling = ctx.flights.handler();
        // EAGAIN: whoever waited was woken by an attach. Anything else is tried again at the next
        // turn: the messages are still there.
        let Ok(count) = ctx.sys.read_events(&ctx.uffd, &mut messages) else { continue };
        for message in &messages[..count] {
            let Some(event) = message.decode() else { continue };
            if let Some((page, verdict)) = handling.on(event, |range| last_present(ctx, range)) {
                resolve(ctx, page, verdict);
            }
        }
    }
}

fn resolve(ctx: &Context, page: usize, verdict: Verdict) {
    let (sys, fd) = (&ctx.sys, &ctx.uffd);
    let resolved = match verdict {
        Verdict::Wait => return,
        Verdict::Unprotect => sys.unprotect(fd, page, page_size()).is_ok(),
        // The zero page, as for any first touch; a write then gets a page of its own from the
        // kernel, on the node that its thread's and the mapping's policy say.
        Verdict::FirstTouch => sys.zero_in(fd, page, page_size()).error.is_none(),
    };
    // The page is there by now, an event waits, or the mapping has changed: the thread looks
    // again. A lost wake-up is impossible: without one the thread would sleep for ever, so it is
    // repeated until the kernel took it.
    if !resolved {
        for _ in 0..1000 {
            if sys.wake(fd, page, page_size()).is_ok() {
                return;
            }
            std::thread::yield_now();
        }
    }
}

/// The last mapped page of a range.
fn last_present(ctx: &Context, range: Range<usize>) -> Option<usize> {
    let want = Categories::PRESENT;
    let mut runs = [Run::EMPTY; 64];
    let mut at = range.start;
    let mut last = None;
    while at < range.end {
        let found = ctx.sys.scan(&ctx.pagemap, at, range.end, want, want, &mut runs);
        // Without an answer the range counts as present, up to its end.
        let Ok((count, ended)) = found else { return Some(range.end - page_size()) };
        if let Some(run) = runs[..count].last() {
            last = usize::try_from(run.end).ok().map(|end| end - page_size());
        }
        if ended <= at {
            break;
        }
        at = ended;
    }
    last
}
