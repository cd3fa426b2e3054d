//! Pieces of work: present pages of one process, as runs.

use super::select::Kind;
use super::targets::Process;
use pageferry_sys::procfs::Vma;
use std::sync::Arc;
use std::time::Duration;

/// Pages of a piece at most.
pub(super) const PIECE_PAGES: usize = 16_384;
/// Bytes of a piece at most, unless a single page has more.
const PIECE_BYTES: usize = 256 << 20;
/// Present pages of one size and kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) page_bytes: usize,
    pub(super) kind: Kind,
    /// Anonymous, and other processes map them too, as far as that was looked at.
    pub(super) common: bool,
    /// Index among the piece's mappings, where these are kept.
    pub(super) mapping: u32,
}

impl Span {
    pub(super) fn bytes(&self) -> usize {
        self.end - self.start
    }
    pub(super) fn pages(&self) -> usize {
        self.bytes() / self.page_bytes
    }
    pub(super) fn addresses(&self) -> impl Iterator<Item = usize> + use<> {
        (self.start..self.end).step_by(self.page_bytes)
    }
}

/// Work: pages of a process.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) process: Arc<Process>,
    pub(super) spans: Vec<Span>,
    pub(super) pages: usize,
    pub(super) bytes: usize,
    /// Mappings that the spans are of, where they are kept.
    pub(super) mappings: Vec<(Vma, Kind)>,
    /// How often these pages were tried before.
    pub(super) tries: u32,
    /// They were found on nodes before, not on their destinations.
    pub(super) seen: bool,
    /// When they are to be tried.
    pub(super) due: Duration,
}

impl Piece {
    pub(super) fn new(process: Arc<Process>) -> Self {
        Self {
            process,
            spans: Vec::new(),
            pages: 0,
            bytes: 0,
            mappings: Vec::new(),
            tries: 0,
            seen: false,
            due: Duration::ZERO,
        }
    }

    /// Adds pages, joined to the last ones where they continue them.
    pub(super) fn push(&mut self, span: Span) {
        self.pages += span.pages();
        self.bytes += span.bytes();
        match self.spans.last_mut() {
            Some(last)
                if last.end == span.start
                    && (last.page_bytes, last.kind, last.common, last.mapping)
                        == (span.page_bytes, span.kind, span.common, span.mapping) =>
            {
                last.end = span.end;
            }
            _ => self.spans.push(span),
        }
    }

    /// How many more pages of this size it may have.
    pub(super) fn room(&self, page_bytes: usize) -> usize {
        if self.pages == 0 {
            return (PIECE_BYTES / page_bytes).clamp(1, PIECE_PAGES);
        }
        let bytes = PIECE_BYTES.saturating_sub(self.bytes);
        (bytes / page_bytes).min(PIECE_PAGES.saturating_sub(self.pages))
    }
}
