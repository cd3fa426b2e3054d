//! What is cheapest, decided by what was measured: order, size of a batch, division of labour.
//!
//! The costs of a batch of `n` pages are modelled as two page-table calls with a fixed part each
//! (the TLB shootdown), a part per page, and the copy. All three are running averages of what
//! this process measured since it started; they begin with figures from two-core machines (Zen 4,
//! Linux 6.18) and are within a few batches of the machine at hand.
//!
//! The *stall budget* bounds the hole, from detach to attach. The model aims at a fraction of it,
//! and that fraction shrinks when holes overrun and grows when they do not, so that the bound
//! holds at the 99th percentile rather than on average.

use crate::flight::MAX_PAGES;
use crate::report::{Division, Order};
use crate::units::FolioSize;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// The stall budget when none is given.
///
/// A frozen batch of 2 MiB, the size from which throughput no longer grows, takes 0.2 to 0.5 ms on
/// the machines measured (two cores of Zen 4, Linux 6.18), and conducted moves are fastest with
/// two or three such batches in the air; so this budget costs no throughput there. And it is no
/// more than a time slice of the scheduler (1.4 to 2.8 ms), which any thread must expect to lose
/// anyway.
pub const DEFAULT_STALL_BUDGET: Duration = Duration::from_millis(2);

/// Bytes moved by one division before the other is tried, while neither is known; and on a busy
/// machine, before the load is looked at again.
pub(crate) const TRIAL: usize = 16 << 20;
/// Bytes moved by the division that measured best before the measurement is looked at again.
pub(crate) const STRETCH: usize = 256 << 20;
/// After so many stretches the other division gets a trial: the load may have changed.
const LOOK_AGAIN: u32 = 16;

/// A running average that threads update without a lock; a lost update does no harm.
#[derive(Debug)]
struct Average(AtomicU64);

impl Average {
    fn new(start: f64) -> Self {
        Self(AtomicU64::new(start.to_bits()))
    }
    fn get(&self) -> f64 {
        // Relaxed, here and below: each value stands for itself.
        f64::from_bits(self.0.load(Ordering::Relaxed))
    }
    fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }
    fn add(&self, sample: f64) {
        let old = self.get();
        // A thread that lost its CPU measured something else.
        let sample = sample.clamp(old / 4.0, old * 4.0);
        self.set(old + (sample - old) / 8.0);
    }
}

/// Costs of one folio size.
#[derive(Debug)]
struct Costs {
    /// Of a pair of page-table calls, in ns.
    calls: Average,
    /// Of detach and attach of a page, in ns, beyond the calls.
    tables: Average,
    /// Of copying a page on one thread, in ns.
    copy: Average,
    /// Fraction of the budget that the model aims at.
    aim: Average,
    /// Bytes per second by division; 0: not known.
    speed: [Average; 2],
    stretches: AtomicU32,
}

impl Costs {
    fn new(tables: f64) -> Self {
        Self {
            // Two calls with a second CPU in the process: about 20 us each.
            calls: Average::new(40_000.0),
            tables: Average::new(tables),
            copy: Average::new(4096.0 / 10.0), // 10 GB/s
            aim: Average::new(0.75),
            speed: [Average::new(0.0), Average::new(0.0)],
            stretches: AtomicU32::new(0),
        }
    }
}

/// How one batch is to be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) order: Order,
    /// Pages of a batch at most.
    pub(crate) batch: usize,
    /// Pages of one hole at most (live).
    pub(crate) piece: usize,
    /// Frozen batches in the air at once (conducted).
    pub(crate) window: usize,
}

/// What a move asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    pub(crate) order: Option<Order>,
    pub(crate) division: Option<Division>,
    pub(crate) budget: Duration,
    /// Pages of a batch at most.
    pub(crate) batch: usize,
    pub(crate) threads: usize,
    /// Live copies must be compared with their originals.
    pub(crate) compare: bool,
}

/// Nor is a hole cut smaller than this: its calls take 10 to 40 us, these pages 4 us more.
const MIN_PIECE: usize = 16;

#[derive(Debug)]
pub(crate) struct Policy {
    costs: [Costs; 2],
}

/// Batches in the air at most.
pub(crate) const MAX_WINDOW: usize = 3;
/// A frozen batch smaller than this wastes most of its time on the calls; below it, live order is
/// the better way to a short stall.
const MIN_FROZEN: usize = 32;

impl Policy {
    pub(crate) fn new() -> Self {
        // Detach and attach: 113 + 125 ns a base page; a huge page is one entry.
        Self { costs: [Costs::new(238.0), Costs::new(5.0)] }
    }

    fn of(&self, size: FolioSize) -> &Costs {
        &self.costs[usize::from(size == FolioSize::Huge)]
    }

    /// How to move a batch of this size of folio. `copiers`: threads that share the copy of one
    /// batch.
    pub(crate) fn choose(&self, size: FolioSize, wish: &Wish, copiers: usize) -> Choice {
        let costs = self.of(size);
        let budget = wish.budget.as_nanos() as f64 * costs.aim.get();
        let left = budget - costs.calls.get();
        let copy = costs.copy.get() / copiers.max(1) as f64;
        let fit = |per_page: f64| {
            let pages = (left / per_page).clamp(0.0, MAX_PAGES as f64);
            // In range by the clamp.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let pages = pages as usize;
            pages
        };
        let (mut batch, least) = match size {
            FolioSize::Base => (wish.batch, MIN_FROZEN.min(wish.batch)),
            FolioSize::Huge => (MAX_PAGES, MAX_PAGES),
        };
        let frozen = fit(costs.tables.get() + copy);
        let order = wish.order.unwrap_or(if frozen >= least { Order::Frozen } else { Order::Live });
        let mut piece = batch;
        let mut window = 1;
        match order {
            Order::Frozen => {
                if size == FolioSize::Base {
                    batch = batch.min(frozen.max(MIN_PIECE));
                }
                let one = costs.calls.get() + batch as f64 * (costs.tables.get() + copy);
                while window < MAX_WINDOW && one * (window + 1) as f64 <= budget {
                    window += 1;
                }
            }
            Order::Live => {
                let check = if wish.compare { copy } else { 0.0 };
                if size == FolioSize::Base {
                    piece = piece.min(fit(costs.tables.get() + check).max(MIN_PIECE));
                }
                window = MAX_WINDOW;
            }
        }
        Choice { order, batch, piece, window }
    }

    /// Notes what detach and attach of `pages` cost.
    pub(crate) fn saw_tables(&self, size: FolioSize, pages: usize, took: Duration) {
        let costs = self.of(size);
        let ns = took.as_nanos() as f64;
        if pages <= 8 || size == FolioSize::Huge {
            costs.calls.add((ns - pages as f64 * costs.tables.get()).max(1_000.0));
        } else if pages >= 128 {
            costs.tables.add(((ns - costs.calls.get()) / pages as f64).max(1.0));
        }
    }

    /// Notes what copying `pages` on one thread cost.
    pub(crate) fn saw_copy(&self, size: FolioSize, pages: usize, took: Duration) {
        if pages > 0 {
            self.of(size).copy.add(took.as_nanos() as f64 / pages as f64);
        }
    }

    /// Notes how long a hole lasted.
    pub(crate) fn saw_hole(&self, size: FolioSize, budget: Duration, took: Duration) {
        // Whoever lost the CPU in a hole would have lost it in a smaller one, too.
        if took > budget * 3 {
            return;
        }
        let aim = &self.of(size).aim;
        // One overrun in a hundred leaves the aim where it is: 0.95 * 1.0005^99 = 1.
        let now = if took > budget { aim.get() * 0.95 } else { aim.get() * 1.0005 };
        aim.set(now.clamp(0.1, 0.9));
    }

    /// Which division to use for the next stretch, and for how many bytes.
    pub(crate) fn division(&self, size: FolioSize, wish: &Wish) -> (Division, usize) {
        if wish.threads <= 1 {
            return (Division::Shared, usize::MAX);
        }
        if let Some(division) = wish.division {
            return (division, usize::MAX);
        }
        let costs = self.of(size);
        let [conducted, shared] = [costs.speed[0].get(), costs.speed[1].get()];
        if conducted == 0.0 {
            return (Division::Conducted, TRIAL);
        }
        if shared == 0.0 {
            return (Division::Shared, TRIAL);
        }
        let (best, other) = if conducted >= shared {
            (Division::Conducted, Division::Shared)
        } else {
            (Division::Shared, Division::Conducted)
        };
        if costs.stretches.fetch_add(1, Ordering::Relaxed) % LOOK_AGAIN == LOOK_AGAIN - 1 {
            return (other, TRIAL);
        }
        (best, STRETCH)
    }

    /// Notes how fast a division was.
    pub(crate) fn saw_division(
        &self,
        size: FolioSize,
        division: Division,
        bytes: u64,
        took: Duration,
    ) {
        // Shorter stretches measure the start and the end of the threads.
        if bytes < (TRIAL / 2) as u64 || took.is_zero() {
            return;
        }
        let speed = &self.of(size).speed[usize::from(division == Division::Shared)];
        let sample = bytes as f64 / took.as_secs_f64();
        if speed.get() == 0.0 { speed.set(sample) } else { speed.add(sample) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(budget: Duration) -> Wish {
        Wish { order: None, division: None, budget, batch: MAX_PAGES, threads: 2, compare: false }
    }

    #[test]
    fn a_generous_budget_freezes_whole_batches_and_a_tight_one_goes_live() {
        let policy = Policy::new();
        let generous = policy.choose(FolioSize::Base, &wish(Duration::from_millis(5)), 1);
        assert_eq!((generous.order, generous.batch), (Order::Frozen, MAX_PAGES));
        let tight = policy.choose(FolioSize::Base, &wish(Duration::from_micros(60)), 1);
        assert_eq!(tight.order, Order::Live);
        assert!(tight.piece < MAX_PAGES);
        let huge = policy.choose(FolioSize::Huge, &wish(Duration::from_micros(100)), 1);
        assert_eq!((huge.order, huge.batch), (Order::Live, MAX_PAGES));
    }

    #[test]
    fn holes_that_overrun_make_the_next_ones_smaller() {
        let policy = Policy::new();
        let budget = Duration::from_micros(400);
        let before = policy.choose(FolioSize::Base, &wish(budget), 1);
        for _ in 0..20 {
            policy.saw_hole(FolioSize::Base, budget, budget * 2);
        }
        let after = policy.choose(FolioSize::Base, &wish(budget), 1);
        assert!(after.batch < before.batch || after.order == Order::Live);
    }

    #[test]
    fn the_division_that_measured_best_is_used_after_both_were_tried() {
        let policy = Policy::new();
        let wish = wish(DEFAULT_STALL_BUDGET);
        let size = FolioSize::Base;
        assert_eq!(policy.division(size, &wish).0, Division::Conducted);
        policy.saw_division(size, Division::Conducted, 1 << 30, Duration::from_millis(100));
        assert_eq!(policy.division(size, &wish).0, Division::Shared);
        policy.saw_division(size, Division::Shared, 1 << 30, Duration::from_millis(60));
        assert_eq!(policy.division(size, &wish).0, Division::Shared);
        policy.saw_division(size, Division::Conducted, 1 << 40, Duration::from_secs(1));
        assert_eq!(policy.division(size, &Wish { threads: 1, ..wish }).0, Division::Shared);
    }
}
