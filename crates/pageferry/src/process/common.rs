//! Anonymous memory that processes have in common: since a fork, until one of them writes, or because
//! the kernel has merged equal pages (KSM). It is there once, and each of them maps it.
//!
//! That a page is mapped by others too the page map tells everybody (bit 56); which page it is, by its
//! frame, only who has `CAP_SYS_ADMIN`. Then what was seen in one process is known again in another.
//!
//! What always holds: a frame is remembered by a bit, so that memory is bounded by the machine's, 32 MiB
//! for a tebibyte.
//!
//! What can go wrong: a page is freed, and its frame is that of another common page by the time that
//! this is looked at: it is taken for the same. That is why moves, which free frames, do not go by it.

use super::piece::{PIECE_PAGES, Span};
use pageferry_sys::pagemap::Entry;
use pageferry_sys::process::ProcessView;
use pageferry_sys::{Errno, page_size};
use std::collections::HashMap;

const WORDS: usize = 64;
const FRAMES: u64 = WORDS as u64 * 64;

/// How a page is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mapped {
    /// Once.
    Alone,
    /// By others too.
    Common,
    /// By others too, and it was seen there.
    Again,
}

/// Frames that were seen, as bits.
#[derive(Debug, Default)]
struct Frames(HashMap<u64, Box<[u64; WORDS]>>);

impl Frames {
    /// Adds frames; whether any was not there before.
    fn add(&mut self, first: u64, count: u64) -> bool {
        let mut new = false;
        for frame in first..first + count {
            let part = self.0.entry(frame / FRAMES).or_insert_with(|| Box::new([0; WORDS]));
            let place = usize::try_from(frame % FRAMES).unwrap_or(0);
            let (word, bit) = (&mut part[place / 64], 1 << (place % 64));
            new |= *word & bit == 0;
            *word |= bit;
        }
        new
    }
}

/// What is looked at of common memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attention {
    /// Nothing.
    None,
    /// Which it is.
    Told,
    /// Which it is, and it is given out for the first process that maps it, as far as frames are
    /// told.
    Once,
}

/// A look at what processes have in common.
#[derive(Debug)]
pub(super) struct Commons {
    pub(super) attention: Attention,
    frames: Frames,
    entries: Vec<Entry>,
    /// Bytes that were left out, since they were seen in another process or another place.
    pub(super) left_out: u64,
    /// Some of what others map too has no frame that is told: it may have been seen before.
    pub(super) untold: bool,
}

impl Commons {
    pub(super) fn new(attention: Attention) -> Self {
        let (frames, entries) = (Frames::default(), Vec::new());
        Self { attention, frames, entries, left_out: 0, untold: false }
    }

    /// The kernel does not tell the shared zero page from others (before 6.7): frames say nothing.
    pub(super) fn cannot_tell(&mut self) {
        if self.attention == Attention::Once {
            (self.attention, self.untold) = (Attention::Told, true);
        }
    }

    /// Gives out a span of anonymous pages in parts, by how they are mapped.
    pub(super) fn part(
        &mut self,
        view: &dyn ProcessView,
        span: &Span,
        mut give: impl FnMut(Span),
    ) -> Result<(), Errno> {
        let (page, pages) = (span.page_bytes, span.pages());
        // Of a huge page the first entry tells.
        let at_once = if page > page_size() { 1 } else { PIECE_PAGES };
        let mut open: Option<(Mapped, Span)> = None;
        let mut close = |open: Option<(Mapped, Span)>, left_out: &mut u64| match open {
            None => {}
            Some((Mapped::Again, part)) => *left_out += part.bytes() as u64,
            Some((mapped, part)) => give(Span { common: mapped == Mapped::Common, ..part }),
        };
        let mut done = 0;
        while done < pages {
            let first = span.start + done * page;
            self.entries.resize((pages - done).min(at_once), Entry(0));
            view.entries(first, &mut self.entries)?;
            done += self.entries.len();
            for (index, entry) in self.entries.iter().enumerate() {
                let (start, end) = (first + index * page, first + (index + 1) * page);
                let mapped = match entry.pfn() {
                    _ if !entry.present() || entry.exclusive() => Mapped::Alone,
                    Some(frame) if self.attention == Attention::Once => {
                        let new = self.frames.add(frame, (page / page_size()) as u64);
                        if new { Mapped::Common } else { Mapped::Again }
                    }
                    frame => {
                        self.untold |= frame.is_none() && self.attention == Attention::Once;
                        Mapped::Common
                    }
                };
                match &mut open {
                    Some((last, part)) if *last == mapped => part.end = end,
                    _ => close(
                        open.replace((mapped, Span { start, end, ..span.clone() })),
                        &mut self.left_out,
                    ),
                }
            }
        }
        close(open, &mut self.left_out);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_frame_is_new_once(
            parts in proptest::collection::vec((0u64..3 * FRAMES, 1u64..600), 1..40)
        ) {
            let (mut frames, mut plain) = (Frames::default(), std::collections::HashSet::new());
            for (first, count) in parts {
                let before = plain.len();
                plain.extend(first..first + count);
                prop_assert_eq!(frames.add(first, count), plain.len() > before);
            }
        }
    }
}
