//! How long ranges were away, over many moves.
//!
//! A move reports its holes as a histogram of its own. Their values are few (its buckets), so that
//! the counts of all moves are kept by value and nothing is lost by adding them up.

use pageferry::Holes;
use std::collections::BTreeMap;
use std::time::Duration;

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct HoleCounts {
    counts: BTreeMap<Duration, u64>,
    total: u64,
}

impl HoleCounts {
    /// Adds the holes of one move.
    #[allow(clippy::cast_precision_loss, reason = "holes of one move are far fewer than 2^52")]
    pub(super) fn add(&mut self, holes: &Holes) {
        let count = holes.count();
        // The middle of a rank's share, so that rounding cannot make it its neighbour's.
        let at = |rank: u64| holes.quantile((rank as f64 + 0.5) / count as f64);
        let mut rank = 0;
        while rank < count {
            let value = at(rank);
            // Ranks ascend: bisect for the first one with another value.
            let (mut same, mut other) = (rank, count);
            while other - same > 1 {
                let middle = same + (other - same) / 2;
                if at(middle) == value { same = middle } else { other = middle }
            }
            self.record(value, other - rank);
            rank = other;
        }
    }

    fn record(&mut self, hole: Duration, count: u64) {
        *self.counts.entry(hole).or_default() += count;
        self.total += count;
    }

    /// How many holes there were.
    pub(super) fn count(&self) -> u64 {
        self.total
    }

    /// What a fraction `q` (0 to 1) of the holes did not exceed; zero when there was none.
    #[allow(clippy::cast_precision_loss, reason = "a fraction for people")]
    pub(super) fn quantile(&self, q: f64) -> Duration {
        let mut seen = 0;
        let reached = |count: &u64| {
            seen += count;
            seen as f64 >= q * self.total as f64
        };
        let mut reached = reached;
        let found = self.counts.iter().find(|(_, count)| reached(count));
        found.or(self.counts.last_key_value()).map_or(Duration::ZERO, |(hole, _)| *hole)
    }

    /// How many did not last longer than `budget`.
    pub(super) fn within(&self, budget: Duration) -> u64 {
        self.counts.range(..=budget).map(|(_, count)| count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_the_budget_count_every_hole() {
        let mut holes = HoleCounts::default();
        assert_eq!(holes.quantile(0.5), Duration::ZERO);
        for (us, count) in [(10, 90), (20, 9), (3000, 1)] {
            holes.record(Duration::from_micros(us), count);
        }
        let us = |q| holes.quantile(q).as_micros();
        assert_eq!(
            [us(0.0), us(0.5), us(0.9), us(0.95), us(0.99), us(1.0)],
            [10, 10, 10, 20, 20, 3000]
        );
        let within = |us| holes.within(Duration::from_micros(us));
        assert_eq!([within(9), within(10), within(2999), within(3000)], [0, 90, 99, 100]);
        assert_eq!(holes.count(), 100);
    }

    #[test]
    fn a_move_without_holes_adds_none() {
        let mut holes = HoleCounts::default();
        holes.add(&Holes::default());
        assert_eq!(holes.count(), 0);
    }
}
