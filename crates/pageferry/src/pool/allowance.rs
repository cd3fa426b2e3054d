//! How much the memory cgroup lets the pools, and the kernel's copies, take.

use crate::sync::Mutex;
use pageferry_sys::cgroup;
use std::time::{Duration, Instant};

/// What the cgroup was last seen to allow, so that it need not be asked each time.
#[derive(Debug)]
struct Seen {
    until: Instant,
    bytes: u64,
}

impl Seen {
    fn take(&mut self, bytes: u64) -> bool {
        let has = self.bytes >= bytes && Instant::now() <= self.until;
        self.bytes -= if has { bytes } else { 0 };
        has
    }
}

#[derive(Debug)]
pub(super) struct Allowance {
    seen: Mutex<Seen>,
    /// Asked by those who have no hole open.
    headroom: Mutex<cgroup::Headroom>,
}

impl Allowance {
    pub(super) fn new() -> Self {
        let seen = Mutex::new(Seen { until: Instant::now(), bytes: 0 });
        Self { seen, headroom: Mutex::default() }
    }

    /// Whether the memory cgroup has room. That is read from a dozen files, so an answer is good
    /// for half of the room that it found, and for a tenth of a second. Who may not wait (for the
    /// allocator, or for somebody else who reads them) gets no for an answer when that is used up.
    pub(super) fn take(&self, bytes: u64, may_wait: bool) -> bool {
        if self.seen.lock().take(bytes) {
            return true;
        }
        if !may_wait {
            return false;
        }
        let mut headroom = self.headroom.lock();
        if self.seen.lock().take(bytes) {
            return true;
        }
        let room = headroom.look().map_or(u64::MAX, |r| r.saturating_sub(cgroup::MARGIN));
        if room < bytes {
            return false;
        }
        let until = Instant::now() + Duration::from_millis(100);
        let mut seen = self.seen.lock();
        *seen = Seen { until, bytes: (room / 2).max(bytes) };
        seen.take(bytes)
    }
}
