//! What the threads note: latencies by phase and kind of operation, and answers that differ.

use hdrhistogram::Histogram;
use std::time::Duration;

/// The longest latency told from longer ones: 100 s.
const LONGEST_NS: u64 = 100_000_000_000;

/// What happens to the memory meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// Nothing; the threads find their rate.
    WarmUp,
    /// Nothing.
    Still,
    /// The region is moved.
    Moving,
    /// Nothing, but as much CPU time is burnt as moving took.
    Burning,
    /// The region is moved one folio at a time.
    OneByOne,
    /// The threads end.
    Stop,
}

impl Phase {
    /// The phases that are measured, in their order: what is burnt is known after moving.
    pub(super) const MEASURED: [Self; 4] =
        [Self::Still, Self::Moving, Self::Burning, Self::OneByOne];

    fn slot(self) -> Option<usize> {
        Self::MEASURED.iter().position(|p| *p == self)
    }

    pub(super) fn from_u8(raw: u8) -> Self {
        [Self::WarmUp, Self::Still, Self::Moving, Self::Burning, Self::OneByOne]
            .into_iter()
            .find(|p| *p as u8 == raw)
            .unwrap_or(Self::Stop)
    }
}

/// What a thread does; each has a histogram of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Documents with a word.
    One,
    /// Documents with two words.
    Both,
    /// Documents with a phrase.
    Phrase,
    /// A document is added.
    Add,
    /// A document is taken out.
    Remove,
}

impl Kind {
    /// The questions.
    pub(super) const QUERIES: [Self; 3] = [Self::One, Self::Both, Self::Phrase];
    /// The changes.
    pub(super) const UPDATES: [Self; 2] = [Self::Add, Self::Remove];
    const COUNT: usize = 5;
}

/// Latencies in ns and what the comparison of answers said.
#[derive(Debug)]
pub(super) struct Tally {
    latencies: Vec<Histogram<u64>>,
    /// Queries whose answers were compared, in all phases.
    pub(super) compared: u64,
    /// Of those, how many differed.
    pub(super) differing: u64,
    /// The first difference.
    pub(super) difference: Option<String>,
    /// Documents that could not be added for want of room.
    pub(super) full: u64,
}

impl Tally {
    pub(super) fn new() -> Result<Self, hdrhistogram::CreationError> {
        // Three digits: a quantile is exact to 0.1 %.
        let empty = Histogram::new_with_bounds(1, LONGEST_NS, 3)?;
        let latencies = vec![empty; Phase::MEASURED.len() * Kind::COUNT];
        Ok(Self { latencies, compared: 0, differing: 0, difference: None, full: 0 })
    }

    pub(super) fn record(&mut self, phase: Phase, kind: Kind, took: Duration) {
        if let Some(slot) = phase.slot() {
            let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
            self.latencies[slot * Kind::COUNT + kind as usize].saturating_record(ns);
        }
    }

    pub(super) fn merge(&mut self, other: Self) -> Result<(), hdrhistogram::AdditionError> {
        for (mine, theirs) in self.latencies.iter_mut().zip(&other.latencies) {
            mine.add(theirs)?;
        }
        self.compared += other.compared;
        self.differing += other.differing;
        self.difference = self.difference.take().or(other.difference);
        self.full += other.full;
        Ok(())
    }

    /// The latencies of some kinds of operation in a phase.
    pub(super) fn latencies(&self, phase: Phase, kinds: &[Kind]) -> Option<Histogram<u64>> {
        let slot = phase.slot()?;
        let mut all = Histogram::new_from(self.latencies.first()?);
        for kind in kinds {
            all.add(&self.latencies[slot * Kind::COUNT + *kind as usize]).ok()?;
        }
        Some(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_kept_by_phase_and_kind() -> anyhow::Result<()> {
        let mut tally = Tally::new()?;
        tally.record(Phase::Moving, Kind::Add, Duration::from_micros(5));
        tally.record(Phase::WarmUp, Kind::Add, Duration::from_secs(1));
        tally.record(Phase::Still, Kind::One, Duration::MAX);
        let count = |phase, kinds: &[Kind]| tally.latencies(phase, kinds).map(|h| h.len());
        assert_eq!(count(Phase::Moving, &Kind::UPDATES), Some(1));
        assert_eq!(count(Phase::Moving, &Kind::QUERIES), Some(0));
        assert_eq!(count(Phase::Still, &Kind::QUERIES), Some(1));
        assert_eq!(count(Phase::WarmUp, &Kind::UPDATES), None);
        Ok(())
    }

    #[test]
    fn a_phase_survives_as_a_number() {
        for phase in Phase::MEASURED.into_iter().chain([Phase::WarmUp, Phase::Stop]) {
            assert_eq!(Phase::from_u8(phase as u8), phase);
        }
    }
}
