//! The thread that answers faults and events while something moves.
//!
//! It touches no managed memory and raises no event itself: its stack, its buffers and the flight
//! table lie outside every region, and it neither maps nor unmaps anything.
//!
//! While an event (unmap, remap, remove) is under way, the kernel answers resolutions with
//! `EAGAIN`, from before the event can be read until the thread that caused it has run again. And
//! it hands out all faults before any event. So a fault that cannot be resolved is kept, its thread
//! asleep, and judged anew later: woken, the thread would fault again at once, and where more
//! threads do that than messages are read in one go, the event would never be read.

use crate::context::Context;
use crate::flight::{Handling, Verdict};
use crate::units::HUGE;
use pageferry_sys::pagemap::{Categories, Run};
use pageferry_sys::uffd::{Event, RawMsg, Signal, Woken, wait_readable};
use pageferry_sys::{Errno, page_size};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// Messages read in one go.
const MESSAGES: usize = 32;
/// Faults that can be kept without allocating: one for each thread that faults.
const KEPT: usize = 4096;
/// Pauses before kept faults are looked at again: at first about what it takes the thread that
/// causes an event to wake up, then longer and longer.
const PAUSE: Range<Duration> = Duration::from_micros(20)..Duration::from_millis(1);

/// A fault whose thread sleeps until it is resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kept {
    page: usize,
    protected: bool,
}

/// Serves until `stop` is raised.
pub(crate) fn serve(ctx: &Context, stop: &Signal) {
    // Every fault at a hole wakes this thread. It must not take the CPU of the mover that is about
    // to close the hole; the faulting thread's CPU is free. (Refused, it only wakes louder.)
    let _ = pageferry_sys::sched::wake_quietly();
    let mut messages = [RawMsg::EMPTY; MESSAGES];
    let mut kept = Vec::with_capacity(KEPT);
    let mut pause = PAUSE.start;
    loop {
        let timeout = (!kept.is_empty()).then_some(pause);
        match wait_readable(&ctx.uffd, stop.as_raw_fd(), timeout) {
            Ok(Woken::Message | Woken::Timeout) => {}
            Ok(Woken::Stop) => return,
            Err(errno) => {
                tracing::error!(%errno, "waiting for page faults failed; trying again");
                std::thread::sleep(PAUSE.end);
            }
        }
        match turn(ctx, &mut messages, &mut kept) {
            Ok(()) => {
                pause = if kept.is_empty() { PAUSE.start } else { (pause * 2).min(PAUSE.end) }
            }
            Err(errno) => {
                // The messages are still there.
                tracing::error!(%errno, "reading page faults failed; trying again");
                std::thread::sleep(PAUSE.end);
            }
        }
    }
}

/// Reads messages and acts on them, then on the faults that were kept; all under the gate.
fn turn(ctx: &Context, messages: &mut [RawMsg], kept: &mut Vec<Kept>) -> Result<(), Errno> {
    let handling = ctx.flights.handler();
    let count = match ctx.sys.read_events(&ctx.uffd, messages) {
        Ok(count) => count,
        // Whoever waited was woken by an attach.
        Err(Errno(libc::EAGAIN | libc::EINTR)) => 0,
        Err(errno) => return Err(errno),
    };
    for message in &messages[..count] {
        let Some(event) = message.decode() else { continue };
        // A fault that was read is known to nobody else: even a panic must not lose it.
        let fault = match event {
            Event::Fault { addr, protected, .. } => {
                Some(Kept { page: addr & !(page_size() - 1), protected })
            }
            _ => None,
        };
        let acted = catch_unwind(AssertUnwindSafe(|| {
            let each = |range: Range<usize>, f: &mut dyn FnMut(Range<usize>, usize)| {
                last_present(ctx, range, f);
            };
            match handling.on(event, each) {
                Some((page, verdict)) => resolve(ctx, page, verdict),
                None => true,
            }
        }));
        if !acted.unwrap_or_else(|_| panicked()) {
            kept.extend(fault.filter(|fault| !kept.contains(fault)));
        }
    }
    // As long as there are more messages, the event is among them.
    if count < messages.len() {
        kept.retain(|fault| !again(ctx, &handling, *fault));
    }
    Ok(())
}

/// Judges a kept fault anew; true if it is resolved.
fn again(ctx: &Context, handling: &Handling<'_>, fault: Kept) -> bool {
    let judge = || resolve(ctx, fault.page, handling.judge(fault.page, fault.protected));
    catch_unwind(AssertUnwindSafe(judge)).unwrap_or_else(|_| panicked())
}

fn panicked() -> bool {
    tracing::error!("the fault handler panicked; the fault is looked at again");
    false
}

/// False: an event is in the way, or the wake-up failed; the thread waits still.
fn resolve(ctx: &Context, page: usize, verdict: Verdict) -> bool {
    let (sys, fd) = (&ctx.sys, &ctx.uffd);
    let error = match verdict {
        Verdict::Wait => return true,
        Verdict::Unprotect => sys.unprotect(fd, page, page_size()).err(),
        // The zero page, as for any first touch; a write then gets a page of its own from the
        // kernel, on the node that its thread's and the mapping's policy say. Whoever touches one
        // page for the first time probably touches the next ones, too.
        Verdict::FirstTouch(until) => {
            let filled = sys.zero_in(fd, page, until - page);
            match filled.error {
                // Another mapping begins within.
                Some(Errno(libc::ENOENT | libc::EINVAL)) if until - page > page_size() => {
                    sys.zero_in(fd, page, page_size()).error
                }
                error => error.filter(|_| filled.done == 0),
            }
        }
    };
    match error {
        None => true,
        Some(Errno(libc::EAGAIN)) => false,
        // The page is there by now, or the mapping has changed: the thread looks again.
        // Without a wake-up it would sleep for ever.
        Some(_) => sys.wake(fd, page, page_size()).is_ok(),
    }
}

/// Calls `each` with the parts of a range in each block, up to its end, in which a page is mapped,
/// and with the last such page.
fn last_present(ctx: &Context, range: Range<usize>, each: &mut dyn FnMut(Range<usize>, usize)) {
    let want = Categories::PRESENT | Categories::SWAPPED;
    let page = page_size();
    let mut runs = [Run::EMPTY; 64];
    // The block under way, and the last page found in it.
    let mut last: Option<usize> = None;
    let mut found = |address: usize| {
        let block = |address: usize| address & !(HUGE - 1);
        let mut tell = |page_of: usize| {
            let start = block(page_of).max(range.start);
            each(start..(block(page_of) + HUGE).min(range.end), page_of);
        };
        match last {
            Some(before) if address != usize::MAX && block(before) == block(address) => {}
            Some(before) => tell(before),
            None => {}
        }
        last = (address != usize::MAX).then_some(address);
    };
    let mut at = range.start;
    while at < range.end {
        let scan = ctx.sys.scan(&ctx.pagemap, at, range.end, want, want, &mut runs);
        let (count, ended) = match scan {
            Ok(scan) => scan,
            // Without an answer all of it counts as present.
            Err(_) => {
                runs[0] = Run::new(at, range.end, want);
                (1, range.end)
            }
        };
        for run in &runs[..count] {
            let clip = |v: u64| usize::try_from(v).unwrap_or(usize::MAX).clamp(at, range.end);
            let (start, end) = (clip(run.start), clip(run.end));
            // The last page of the run in each block.
            let mut from = start;
            while from < end {
                let to = ((from & !(HUGE - 1)) + HUGE).min(end);
                found(to - page);
                from = to;
            }
        }
        if ended <= at {
            break;
        }
        at = ended;
    }
    found(usize::MAX);
}
