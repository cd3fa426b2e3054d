//! What an errno about a page means: what became of it, whether that may pass, and how long to leave
//! the page alone.

use super::select::Kind;
use crate::report::{Busy, Outcome, Shortage};
use pageferry_sys::{Errno, page_size};
use std::time::Duration;

/// What an errno about a page means in the end.
pub(super) fn outcome_of(errno: Errno, page_bytes: usize, kind: Kind) -> Outcome {
    match errno.0 {
        libc::EBUSY => Outcome::Busy(Busy::Contended),
        libc::EAGAIN => Outcome::Busy(Busy::Again),
        libc::EACCES => Outcome::Busy(Busy::Shared),
        libc::ENOMEM if kind == Kind::Hugetlb || page_bytes > page_size() => {
            Outcome::NoFrame(Shortage::Huge)
        }
        libc::ENOMEM => Outcome::NoFrame(Shortage::Node),
        libc::ENOENT => Outcome::Gone,
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
pub(super) fn spacing(tries: u32) -> Duration {
    Duration::from_millis(30) * 3u32.pow(tries.min(5))
}
