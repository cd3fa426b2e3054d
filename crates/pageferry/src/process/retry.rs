//! What an errno about a page means: what became of it, whether that may pass, and how long to leave
//! the page alone until it is tried again.

use super::mover::{Item, Mover};
use super::notes::Note;
use super::piece::{Piece, Span};
use super::select::Kind;
use super::targets::Process;
use crate::report::{Busy, Outcome, Shortage};
use pageferry_sys::{Errno, page_size};
use std::sync::Arc;
use std::time::Duration;

/// What an errno about a page means in the end. That of a page that is missing (`ENOENT`) counts as
/// busy: what has gone for good is told apart before (`missing`).
pub(super) fn outcome_of(errno: Errno, page_bytes: usize, kind: Kind) -> Outcome {
    match errno.0 {
        libc::EBUSY | libc::ENOENT => Outcome::Busy(Busy::Contended),
        libc::EAGAIN => Outcome::Busy(Busy::Again),
        libc::EACCES => Outcome::Busy(Busy::Shared),
        libc::ENOMEM if kind == Kind::Hugetlb || page_bytes > page_size() => {
            Outcome::NoFrame(Shortage::Huge)
        }
        libc::ENOMEM => Outcome::NoFrame(Shortage::Node),
        libc::EFAULT => Outcome::Unmapped,
        other => Outcome::Busy(Busy::Other(other)),
    }
}

/// Whether it may be different later.
pub(super) fn may_pass(errno: Errno) -> bool {
    matches!(errno.0, libc::EBUSY | libc::EAGAIN | libc::ENOMEM)
}

/// How long a page that failed is left alone: 30 ms, then 90, then 270. Longer than the kernel's
/// own ten tries (`NR_MAX_MIGRATE_PAGES_RETRY`), and than most I/O.
fn spacing(tries: u32) -> Duration {
    Duration::from_millis(30) * 3u32.pow(tries.min(5))
}

impl Mover<'_> {
    /// Keeps what failed to be tried again.
    pub(super) fn keep_failed(&mut self, process: &Arc<Process>, tries: u32) {
        let mut failed = std::mem::take(&mut self.failed);
        failed.sort_unstable_by_key(|(item, _)| (item.seen, item.address));
        for alike in failed.chunk_by(|(a, _), (b, _)| a.seen == b.seen) {
            let mut piece = Piece::new(Arc::clone(process));
            piece.tries = tries + 1;
            piece.seen = alike[0].0.seen;
            piece.due = self.job.kernel.now() + spacing(tries);
            for (item, _) in alike {
                let Item { address: start, page_bytes, kind, .. } = *item;
                // What is common was counted the first time.
                let (end, common, mapping) = (start + page_bytes, false, 0);
                piece.push(Span { start, end, page_bytes, kind, common, mapping });
            }
            let bytes = piece.bytes as u64;
            if self.job.work.try_later(piece).is_err() {
                self.tally.notes.add(Note::NotRetried { bytes });
                for (item, errno) in alike {
                    let outcome = outcome_of(*errno, item.page_bytes, item.kind);
                    self.settle(process, std::slice::from_ref(item), outcome);
                }
            }
        }
        failed.clear();
        self.failed = failed;
    }

    /// Settles what was to be tried again when the move ended before.
    pub(super) fn leave(&mut self, piece: &Piece) {
        self.all(piece, Outcome::Cancelled);
    }
}
