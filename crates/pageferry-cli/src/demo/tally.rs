//! What the threads note: latencies by kind of operation, and answers that differ.

use hdrhistogram::{CreationError, Histogram};
use std::time::Duration;

/// The longest latency told from longer ones: 100 s.
const LONGEST_NS: u64 = 100_000_000_000;

/// What happens to the memory meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The region is moved as fast as it goes.
    FullSpeed,
    /// The same, one folio at a time.
    FullSpeedOneByOne,
    /// Nothing.
    Still,
    /// Parts of the region are moved at the common pace.
    Moving,
    /// Nothing, but as much CPU time is burnt as moving took.
    Burning,
    /// The same parts are moved at the same pace, one folio at a time.
    OneByOne,
}

impl Phase {
    /// All that is measured, in the order of a round; every other round goes backwards.
    pub(super) const ALL: [Self; 6] = [
        Self::FullSpeed,
        Self::FullSpeedOneByOne,
        Self::Still,
        Self::Moving,
        Self::Burning,
        Self::OneByOne,
    ];
}

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It asks: documents with a word, with two words, with a phrase.
    Query,
    /// It takes documents out and puts them back.
    Update,
}

impl Kind {
    /// Both.
    pub(super) const ALL: [Self; 2] = [Self::Query, Self::Update];
}

/// What the comparison of answers said, and what had no room.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Queries whose answers were compared.
    pub(super) compared: u64,
    /// Of those, how many differed.
    pub(super) differing: u64,
    /// The first difference.
    pub(super) difference: Option<String>,
    /// Documents that could not be put back for want of room.
    pub(super) full: u64,
}

impl Seen {
    pub(super) fn merge(&mut self, other: Self) {
        self.compared += other.compared;
        self.differing += other.differing;
        self.difference = self.difference.take().or(other.difference);
        self.full += other.full;
    }
}

/// The latencies of one slice, in ns.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    latencies: [Histogram<u64>; 2],
    /// Time spent in operations, by kind.
    pub(super) busy: [Duration; 2],
    /// Operations tried, by kind.
    pub(super) operations: [u32; 2],
}

impl Tally {
    pub(super) fn new() -> Result<Self, CreationError> {
        // Three digits: a quantile is exact to 0.1 %.
        let empty = Histogram::new_with_bounds(1, LONGEST_NS, 3)?;
        Ok(Self { latencies: [empty.clone(), empty], busy: Default::default(), operations: [0; 2] })
    }

    pub(super) fn clear(&mut self) {
        self.latencies.iter_mut().for_each(Histogram::reset);
        self.busy = Default::default();
        self.operations = [0; 2];
    }

    pub(super) fn record(&mut self, kind: Kind, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.latencies[kind as usize].saturating_record(ns);
    }

    pub(super) fn merge(&mut self, other: &Self) -> Result<(), hdrhistogram::AdditionError> {
        for kind in 0..self.latencies.len() {
            self.latencies[kind].add(&other.latencies[kind])?;
            self.busy[kind] += other.busy[kind];
            self.operations[kind] = self.operations[kind].saturating_add(other.operations[kind]);
        }
        Ok(())
    }

    /// The latencies of a kind of operation.
    pub(super) fn latencies(&self, kind: Kind) -> &Histogram<u64> {
        &self.latencies[kind as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_kept_by_kind_until_they_are_cleared() -> anyhow::Result<()> {
        let (mut tally, mut all) = (Tally::new()?, Tally::new()?);
        tally.record(Kind::Update, Duration::from_micros(5));
        tally.record(Kind::Query, Duration::MAX);
        tally.record(Kind::Query, Duration::ZERO);
        all.merge(&tally)?;
        all.merge(&tally)?;
        tally.clear();
        let count = |tally: &Tally| Kind::ALL.map(|kind| tally.latencies(kind).len());
        assert_eq!((count(&all), count(&tally)), ([4, 2], [0, 0]));
        Ok(())
    }
}
