//! What the tests of misfortune share: a watchdog, a check that a report accounts for every page
//! once, and a small generator of numbers.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

pub mod faults;

use crate::support::patient;
use pageferry::{Division, Engine, EngineBuilder, Move, Order, Outcome, Region, Report};
use pageferry_copy::Kernel;
use pageferry_sys::page_size;
use std::ops::Range;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Ends the process with a message if it is not dropped in time: a hang is a failure, not a wait.
pub struct Watchdog(Sender<()>);

impl Watchdog {
    pub fn seconds(seconds: u64, what: &str) -> Self {
        let (alive, gone) = channel::<()>();
        let seconds = patient(seconds);
        // Made ahead: who hangs may have the allocator's lock.
        let text = format!("hung: {what} did not end within {seconds} s\n");
        std::thread::spawn(move || {
            if gone.recv_timeout(Duration::from_secs(seconds)) == Err(RecvTimeoutError::Timeout) {
                // SAFETY: writes the text to standard error.
                unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
                std::process::abort();
            }
        });
        Self(alive)
    }
}

/// The builder of a small engine that needs no measurement before it starts.
pub fn small() -> EngineBuilder {
    Engine::builder().kernel(Kernel::MEMCPY).threads(2).frame_budget(16 << 20)
}

/// Every page of `asked` (bytes of the region, in ascending order, disjoint) is in exactly one
/// range of the report, and nothing else is in any.
pub fn accounted(report: &Report, region: &Region, asked: &[Range<usize>]) {
    let page = page_size();
    let mut listed: Vec<usize> = Vec::new();
    for (range, _) in &report.pages {
        assert!(!range.is_empty(), "an empty range in {report:?}");
        assert!(range.start % page == 0 && range.end % page == 0, "part of a page: {range:x?}");
        listed.extend(range.clone().step_by(page));
    }
    listed.sort_unstable();
    let expected: Vec<usize> = asked
        .iter()
        .flat_map(|r| region.addr() + r.start..region.addr() + r.end)
        .step_by(page)
        .collect();
    assert_eq!(listed.len(), expected.len(), "pages reported and asked for: {report:?}");
    assert_eq!(listed, expected, "which pages: {report:?}");
    let moved = report.bytes(|o| o == Outcome::Moved);
    assert_eq!(moved, report.bytes_moved, "{report:?}");
}

/// As [`accounted`], for the whole region.
#[expect(clippy::single_range_in_vec_init, reason = "one range is asked for")]
pub fn accounted_whole(report: &Report, region: &Region) {
    accounted(report, region, &[0..region.len()]);
}

/// Numbers that look random, the same for the same seed (xorshift64).
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// From 0 up to, not including, `end`.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap_or(0)
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// A move in either order and division, or in what the engine chooses.
    pub fn in_some_way(&mut self, mut moving: Move) -> Move {
        match self.below(3) {
            0 => moving = moving.order(Order::Live),
            1 => moving = moving.order(Order::Frozen),
            _ => {}
        }
        match self.below(3) {
            0 => moving = moving.division(Division::Conducted),
            1 => moving = moving.division(Division::Shared),
            _ => {}
        }
        moving
    }
}
