//! What is registered with the userfaultfd while a move runs, and that nothing stays so.
//!
//! # What always holds
//! - A page is taken out only where a registered mapping was *seen* after `UFFDIO_REGISTER`: from
//!   that moment on every change of the mapping raises an event, which the flight table knows how
//!   to treat. What was unmapped and mapped anew around the call to register, and so may be
//!   somebody else's, was not seen, and no flight opens over it.
//! - Two moves may have the same memory registered. It is unregistered by the last of them.
//! - What the program has enlarged, or taken elsewhere by `mremap`, stays registered past the
//!   ranges that were asked for: it is looked for at the end of a move, and by the housekeeper
//!   where an event comes later still.

use crate::berth::back_off;
use crate::context::Context;
use crate::units::{normalize, overlap};
use pageferry_sys::uffd::Modes;
use pageferry_sys::{Errno, page_size};
use std::ops::Range;

/// Tries of a call that fails for a passing reason, at least half of them 1 ms apart.
const TRIES: u32 = 64;
/// Tries of the question what is registered, 1 ms apart: it has no answer as long as a thread that
/// changes a mapping has not had its turn on a CPU.
const ASKS: u32 = 10_000;
/// Looks at the end for what is still registered.
const LOOKS: u32 = 8;

/// The ranges of a move, registered while this lives.
#[derive(Debug)]
pub(crate) struct Registered<'c> {
    ctx: &'c Context,
    ranges: Vec<Range<usize>>,
}

impl<'c> Registered<'c> {
    /// Registers `blocks`. Where they lie within one of `wholes`, the mappings there are registered
    /// whole, so that the program finds no border within them (`mremap` over one fails). Of
    /// `blocks`, what was not seen to be registered is noted as unmapped.
    ///
    /// # Errors
    /// What `UFFDIO_REGISTER` says, or what keeps the question from being answered. Nothing is
    /// registered then.
    pub(crate) fn new(
        ctx: &'c Context,
        blocks: &[Range<usize>],
        wholes: &[Range<usize>],
        modes: Modes,
        is_cancelled: impl Fn() -> bool,
    ) -> Result<Self, Errno> {
        let mut this = Self { ctx, ranges: Vec::new() };
        {
            let _one = ctx.registering.lock();
            // Watched before they are registered, which may come half-way before it fails; and
            // also where nothing is mapped, so that this is noted.
            let mut watch = |range: &Range<usize>| {
                ctx.flights.watch(range.clone());
                this.ranges.push(range.clone());
            };
            blocks.iter().for_each(&mut watch);
            let mut done: Vec<Range<usize>> = Vec::new();
            // What the program joins to a mapping between the look and the call would be split.
            for _ in 0..LOOKS {
                let before = done.len();
                for range in widened(ctx, blocks, wholes)? {
                    if done.iter().any(|r| r.start <= range.start && range.end <= r.end) {
                        continue;
                    }
                    watch(&range);
                    register(ctx, &range, modes)?;
                    done.push(range);
                }
                if done.len() == before {
                    break;
                }
            }
        }
        for block in blocks {
            prove(ctx, block, &is_cancelled)?;
        }
        Ok(this)
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        let _one = self.ctx.registering.lock();
        for range in &self.ranges {
            for part in self.ctx.flights.unwatch(range) {
                unregister_around(self.ctx, &part);
            }
        }
        unregister_strays(self.ctx);
    }
}

/// Unregisters what `mremap` took elsewhere, as far as no page in the air is at home there.
pub(crate) fn tidy(ctx: &Context) {
    let _one = ctx.registering.lock();
    unregister_strays(ctx);
}

fn unregister_strays(ctx: &Context) {
    for stray in ctx.flights.take_strays() {
        for part in ctx.flights.unwatched(stray) {
            unregister_around(ctx, &part);
        }
    }
}

/// Blocks, and the rest of the mappings that they are part of, within `wholes`.
fn widened(
    ctx: &Context,
    blocks: &[Range<usize>],
    wholes: &[Range<usize>],
) -> Result<Vec<Range<usize>>, Errno> {
    let mut ranges = Vec::with_capacity(blocks.len());
    for block in blocks {
        let home = wholes.iter().find(|w| w.start <= block.start && block.end <= w.end);
        let mappings = match home {
            Some(_) => ctx.sys.mappings(&ctx.maps, block.clone())?,
            None => Vec::new(),
        };
        match home {
            // What is not mapped now is left out: mapped meanwhile, it may be a part of more.
            Some(home) if !mappings.is_empty() => {
                let clipped = |m: &Range<usize>| m.start.max(home.start)..m.end.min(home.end);
                ranges.extend(mappings.iter().map(clipped));
            }
            _ => ranges.push(block.clone()),
        }
    }
    Ok(normalize(ranges))
}

fn register(ctx: &Context, range: &Range<usize>, modes: Modes) -> Result<(), Errno> {
    let mut tries = 0;
    loop {
        match ctx.sys.register(&ctx.uffd, range.start, range.len(), modes) {
            Err(Errno(libc::EAGAIN | libc::EINTR)) if tries < TRIES => {
                back_off(tries);
                tries += 1;
            }
            result => return result,
        }
    }
}

/// Whether one registered mapping covers a range; waits until that can be told.
fn is_registered(
    ctx: &Context,
    range: &Range<usize>,
    asks: u32,
    is_cancelled: impl Fn() -> bool,
) -> Result<bool, Errno> {
    let mut tries = 0;
    loop {
        match ctx.sys.is_registered(&ctx.uffd, range.start, range.len()) {
            Err(Errno(libc::EAGAIN | libc::EINTR | libc::ENOMEM))
                if tries < asks && !is_cancelled() =>
            {
                back_off(tries);
                tries += 1;
            }
            result => return result,
        }
    }
}

/// Finds out what of a block is registered; the rest is not ours.
fn prove(
    ctx: &Context,
    block: &Range<usize>,
    is_cancelled: &impl Fn() -> bool,
) -> Result<(), Errno> {
    let flights = &ctx.flights;
    let ask = |range: &Range<usize>| {
        // What was told before the question is older than the answer.
        let until = flights.events();
        let registered = match is_registered(ctx, range, ASKS, is_cancelled) {
            Err(_) if is_cancelled() => false,
            told => told?,
        };
        if registered {
            flights.note_registered(range, until);
        }
        Ok(registered)
    };
    if ask(block)? {
        return Ok(());
    }
    let mut at = block.start;
    for mapping in ctx.sys.mappings(&ctx.maps, block.clone())? {
        let part = mapping.start.max(at)..mapping.end.min(block.end);
        if part.is_empty() {
            continue;
        }
        flights.note_unmapped(&(at..part.start));
        if !ask(&part)? {
            flights.note_unmapped(&part);
        }
        at = part.end;
    }
    flights.note_unmapped(&(at..block.end));
    Ok(())
}

/// Unregisters a range, and what its mappings have grown by while they were registered.
///
/// Mapping by mapping: a call over a part of one splits it, and the program may be using `mremap` on
/// it right now.
fn unregister_around(ctx: &Context, range: &Range<usize>) {
    // What grew or came in between is next to it, or within.
    let around = range.start.saturating_sub(page_size())..range.end.saturating_add(page_size());
    // Asked in vain once, an event is under way that may go on for long: then what is asked is
    // whether it has ended by now.
    let mut asks = TRIES;
    for look in 0..LOOKS {
        let Ok(mappings) = ctx.sys.mappings(&ctx.maps, around.clone()) else {
            return unregister(ctx, range);
        };
        let mut quiet = true;
        for mapping in mappings {
            // At first all that was registered, without a question, which has no answer while an
            // event is under way.
            let ours = look == 0 && overlap(&mapping, range);
            // A pool may be next to the range: its extents stay registered.
            if ctx.pools.own(&mapping) {
                continue;
            }
            if !ours {
                match is_registered(ctx, &mapping, asks, || false) {
                    Ok(true) => {}
                    Ok(false) => continue,
                    Err(_) => {
                        asks = 0;
                        continue;
                    }
                }
            }
            for part in ctx.flights.unwatched(mapping) {
                unregister(ctx, &part);
                quiet = false;
            }
        }
        if quiet {
            return;
        }
    }
}

/// Unregisters a range. What stays registered for a lasting failure still works: the handler
/// serves it as long as the engine lives.
fn unregister(ctx: &Context, range: &Range<usize>) {
    for tries in 0..TRIES {
        match ctx.sys.unregister(&ctx.uffd, range.start, range.len()) {
            // EINVAL: nothing is mapped there any more.
            Ok(()) | Err(Errno(libc::EINVAL)) => return,
            Err(_) => back_off(tries),
        }
    }
}
