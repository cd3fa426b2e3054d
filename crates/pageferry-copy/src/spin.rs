//! Waiting briefly without giving up the CPU, but only where that costs nobody anything.
//!
//! A waiter that spins on a machine whose CPUs are all busy takes time from the very thread it
//! waits for. So a spinner never spins where the process has one CPU, and stops at the first
//! sign that it lost its CPU to another thread: a gap in time much longer than a few pauses.

use pageferry_sys::affinity::usable_cpus;
use std::time::{Duration, Instant};

/// Longest spin. A futex sleep and wake costs 5 to 50 us and a 64 KiB chunk takes 4 to 8 us, so
/// what comes within this time is cheaper to spin for.
const LIMIT: Duration = Duration::from_micros(20);
/// A gap between two looks at the clock longer than this means that the thread was preempted.
const GAP: Duration = Duration::from_micros(5);
/// Pauses between two looks at the clock (about 1 us on current x86).
const PAUSES: u32 = 16;

/// One wait's spinning.
#[derive(Debug)]
pub(crate) struct Spinner {
    began: Option<Instant>,
    last: Option<Instant>,
    over: bool,
}

impl Spinner {
    pub(crate) fn new() -> Self {
        Self { began: None, last: None, over: usable_cpus() < 2 }
    }

    /// Pauses for about a microsecond. False once it is better to sleep.
    pub(crate) fn spin(&mut self) -> bool {
        if self.over {
            return false;
        }
        for _ in 0..PAUSES {
            std::hint::spin_loop();
        }
        let now = Instant::now();
        let began = *self.began.get_or_insert(now);
        let lost = self.last.is_some_and(|last| now - last > GAP);
        self.last = Some(now);
        self.over = lost || now - began > LIMIT;
        !self.over
    }
}
