//! How much in one call, how fast, and how many at once: the three controls of a move.
//!
//! - [`Chunk`] keeps one `move_pages(2)` call within the latency target, because a page that is
//!   being moved makes the program wait until its call's batch is through.
//! - [`Rate`] is a token bucket in bytes per second.
//! - [`Growth`] adds workers while they add throughput.
//!
//! All are arithmetic over times that they are told, so that a test needs no clock.

use std::time::Duration;

/// Pages of one call at most: 64 MiB of base pages, buffers of 256 KiB.
pub(super) const MAX_CHUNK: usize = 16_384;
/// Base pages of the first call: about 0.1 ms at 1.8 GB/s, what the kernel reaches with one
/// thread on the machines in `docs/design.md`.
const FIRST_CHUNK: usize = 64;

/// Pages that the kernel moves at a time (mm/migrate.c, `NR_MAX_BATCHED_MIGRATION`): who touches one
/// waits for its batch, so that fewer in a call make the wait no shorter.
const BATCH: usize = 512;
/// A base page takes at most this, even on a slow machine (0.5 to 1 us on current ones).
const DEAR_NS: f64 = 20_000.0;

/// The size of calls, for pages of one size class.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    target_ns: f64,
    ns_per_page: Option<f64>,
    pages: usize,
    /// A call has a fixed cost, too (draining the lists of every CPU, milliseconds on a busy
    /// machine). Divided by a few pages it makes these look dear, and calls ever smaller: they are
    /// not cut below this.
    least: usize,
}

impl Chunk {
    /// Share of the target that a call is planned to take: times scatter.
    const AIM: f64 = 0.7;

    pub(super) fn new(target: Duration, huge: bool) -> Self {
        let target_ns = target.as_nanos() as f64;
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a quotient of positive numbers, clamped to a small range"
        )]
        let batch = ((target_ns / DEAR_NS) as usize).clamp(1, BATCH);
        let (pages, least) = if huge { (1, 1) } else { (FIRST_CHUNK.min(batch), batch) };
        Self { target_ns, ns_per_page: None, pages, least }
    }

    /// Calls are not cut below so many pages.
    pub(super) fn least(&self) -> usize {
        self.least
    }

    /// How many pages the next call may have.
    pub(super) fn pages(&self) -> usize {
        self.pages
    }

    /// A call with so many pages took so long.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a quotient of positive numbers, clamped to a small range"
    )]
    pub(super) fn learn(&mut self, pages: usize, took: Duration) {
        if pages == 0 {
            return;
        }
        let seen = took.as_nanos() as f64 / pages as f64;
        // Slower is believed sooner than faster.
        let mean = self.ns_per_page.map_or(seen, |known| {
            let weight = if seen > known { 0.5 } else { 0.125 };
            known + (seen - known) * weight
        });
        self.ns_per_page = Some(mean);
        let fits = (self.target_ns * Self::AIM / mean.max(1.0)) as usize;
        // A short call says little about a long one: at most double.
        let most = if pages >= self.pages { self.pages * 2 } else { self.pages };
        self.pages = fits.max(self.least).clamp(1, most.min(MAX_CHUNK));
    }
}

/// A token bucket.
#[derive(Clone, Debug)]
pub(super) struct Rate {
    bytes_per_s: f64,
    /// May be negative: what was taken is paid by waiting.
    tokens: f64,
    at: Duration,
}

impl Rate {
    /// Tokens that may be saved up, as time: a pause is not made good by a burst.
    const BURST: Duration = Duration::from_millis(50);

    pub(super) fn new(bytes_per_s: u64, now: Duration) -> Self {
        Self { bytes_per_s: bytes_per_s as f64, tokens: 0.0, at: now }
    }

    /// Takes `bytes`; returns how long to wait before using them.
    pub(super) fn take(&mut self, bytes: u64, now: Duration) -> Duration {
        let most = self.bytes_per_s * Self::BURST.as_secs_f64();
        let gained = now.saturating_sub(self.at).as_secs_f64() * self.bytes_per_s;
        self.at = self.at.max(now);
        self.tokens = (self.tokens + gained).min(most);
        // Wait for the debt that was there before: what is taken now is the next one's.
        let wait = (-self.tokens / self.bytes_per_s).max(0.0);
        self.tokens -= bytes as f64;
        Duration::from_secs_f64(wait.min(3600.0))
    }
}

/// How many workers.
#[derive(Clone, Debug)]
pub(super) struct Growth {
    most: usize,
    now: usize,
    /// Throughput with one worker less, while the last one is on trial.
    before: Option<f64>,
    /// Windows to rest after a worker was of no use.
    rest: u32,
}

impl Growth {
    /// A worker that adds less than this share of the throughput is sent home.
    const GAIN: f64 = 1.10;
    /// Windows before one is tried again: conditions change.
    const REST: u32 = 40;

    pub(super) fn new(most: usize) -> Self {
        Self { most: most.max(1), now: 1, before: None, rest: 0 }
    }

    /// A window with this throughput has passed; how many workers from now on.
    pub(super) fn window(&mut self, throughput: f64) -> usize {
        if let Some(before) = self.before.take()
            && throughput < before * Self::GAIN
        {
            self.now -= 1;
            self.rest = Self::REST;
            return self.now;
        }
        if self.rest > 0 {
            self.rest -= 1;
        } else if self.now < self.most && throughput > 0.0 {
            self.before = Some(throughput);
            self.now += 1;
        }
        self.now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn micros(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    #[test]
    fn calls_grow_to_the_target_and_shrink_at_once_when_pages_become_dear() {
        let target = micros(20_000);
        let mut chunk = Chunk::new(target, false);
        for _ in 0..20 {
            let pages = chunk.pages();
            chunk.learn(pages, micros(2) * u32::try_from(pages).expect("few"));
        }
        assert_eq!(chunk.pages(), 7000);
        // Ten times as dear from now on: one call too long, then none.
        chunk.learn(7000, micros(20 * 7000));
        assert!(micros(20) * u32::try_from(chunk.pages()).expect("few") < target * 2);
        for _ in 0..10 {
            let pages = chunk.pages();
            chunk.learn(pages, micros(20) * u32::try_from(pages).expect("few"));
        }
        assert!(micros(20) * u32::try_from(chunk.pages()).expect("few") <= target);
    }

    #[test]
    fn workers_are_added_while_they_help_and_the_useless_one_goes() {
        let mut growth = Growth::new(8);
        // Two help, a third does not.
        let speed = |n: usize| n.min(2) as f64;
        let mut now = 1;
        let mut seen = Vec::new();
        for _ in 0..6 {
            now = growth.window(speed(now));
            seen.push(now);
        }
        assert_eq!(seen, [2, 3, 2, 2, 2, 2]);
        assert!((0..100).map(|_| growth.window(0.0)).all(|n| (1..=3).contains(&n)));
    }

    proptest! {
        #[test]
        fn a_call_never_has_no_page_and_never_too_many(
            took in proptest::collection::vec((1usize..20_000, 0u64..10_000_000), 1..50),
            huge in any::<bool>(),
        ) {
            let mut chunk = Chunk::new(micros(20_000), huge);
            for (pages, us) in took {
                chunk.learn(pages, micros(us));
                prop_assert!((1..=MAX_CHUNK).contains(&chunk.pages()));
            }
        }

        #[test]
        fn the_rate_is_kept_over_any_time(
            takes in proptest::collection::vec((1u64..1 << 24, 0u64..100_000), 1..100)
        ) {
            let rate = 1u64 << 30;
            let mut bucket = Rate::new(rate, Duration::ZERO);
            let (mut now, mut sent, mut last) = (Duration::ZERO, 0u64, 0);
            for (bytes, pause) in takes {
                now += micros(pause);
                now += bucket.take(bytes, now);
                sent += bytes;
                last = bytes;
            }
            // All but the last debt, and the burst, has been waited for.
            let owed = (sent - last) as f64 / rate as f64 - Rate::BURST.as_secs_f64() - 1e-6;
            prop_assert!(now.as_secs_f64() >= owed, "{now:?} for {sent}");
        }
    }
}
