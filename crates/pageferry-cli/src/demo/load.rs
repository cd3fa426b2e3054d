//! The program whose memory moves: threads that ask and update the index at a steady rate.
//!
//! Each thread has its schedule, set once so that it is busy about a quarter of the time while
//! nothing moves, and kept in every phase: the phases do the same work. An operation's latency
//! counts from the moment it was due, so one that is late because the one before it stalled shows
//! it (no coordinated omission). The time that the reference takes is left out.

use super::corpus::Corpus;
use super::limits::no_thread;
use super::tally::{Kind, Phase, Tally};
use super::text::Grouped;
use super::twin::{Query, SHARDS, Twin};
use allocator_api2::alloc::Allocator;
use pageferry_sys::sched;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Part of its time that a thread works when nothing moves: `1 / REST`.
const REST: u32 = 4;
/// Bounds of the time between two operations of a thread: below, the clock would count for
/// much; above, there would be too few for a p99.9.
const PERIOD: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(20));
/// A sleeping thread wakes up late, by the timer slack (50 us, prctl(2)) and more; so it sleeps
/// until this long before the next operation is due and spins then.
const SPIN: Duration = Duration::from_micros(100);

/// A small generator (xorshift64*, Marsaglia 2003, Vigna 2016): the same work in every run.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        // Any odd constant will do: the state must not be zero.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next()).unwrap_or(0) % bound.max(1)
    }
}

/// The threads' common ground.
#[derive(Debug)]
pub(super) struct Load<'a, A: Allocator + Clone> {
    twin: &'a Twin<A>,
    corpus: &'a Corpus,
    phase: AtomicU8,
    /// CPU time of the threads, each counted after every operation.
    cpu_ns: AtomicU64,
}

impl<'a, A: Allocator + Clone + Send + Sync> Load<'a, A> {
    pub(super) fn new(twin: &'a Twin<A>, corpus: &'a Corpus) -> Self {
        Self { twin, corpus, phase: AtomicU8::new(Phase::WarmUp as u8), cpu_ns: AtomicU64::new(0) }
    }

    /// CPU time that the threads have used so far.
    pub(super) fn cpu(&self) -> Duration {
        // Relaxed: a sum that is read for itself.
        Duration::from_nanos(self.cpu_ns.load(Ordering::Relaxed))
    }

    /// From now on the threads record under `phase`, or end.
    pub(super) fn enter(&self, phase: Phase) {
        // Relaxed: the phase only says where to record and when to end.
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    fn phase(&self) -> Phase {
        Phase::from_u8(self.phase.load(Ordering::Relaxed))
    }

    /// Runs `main` beside `queries` threads that ask and `updates` threads that update, ends
    /// them, and returns what `main` returned and what they saw.
    pub(super) fn run<T>(
        &self,
        queries: usize,
        updates: usize,
        main: impl FnOnce() -> T,
    ) -> anyhow::Result<(T, Tally)> {
        std::thread::scope(|scope| {
            let mut tally = Tally::new()?;
            // The threads end however `main` ends.
            let end = Stop(self);
            let mut threads = Vec::with_capacity(queries + updates);
            for thread in 0..queries + updates {
                let is_update = thread >= queries;
                let name = if is_update { "demo-update" } else { "demo-query" };
                let builder = std::thread::Builder::new().name(name.to_owned());
                let started = builder.spawn_scoped(scope, move || self.work(thread, is_update));
                threads.push(started.map_err(|e| no_thread(&e))?);
            }
            let result = main();
            drop(end);
            for thread in threads {
                match thread.join() {
                    Ok(seen) => tally.merge(seen?)?,
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            Ok((result, tally))
        })
    }

    fn work(&self, thread: usize, updates: bool) -> Result<Tally, hdrhistogram::CreationError> {
        let mut worker = Worker {
            load: self,
            random: Random::new(thread as u64 + 1),
            grouped: Grouped::default(),
            adds_next: false,
            tally: Tally::new()?,
        };
        let mut period = Duration::ZERO;
        let (mut busy, mut operations) = (Duration::ZERO, 0u32);
        let mut due = Instant::now();
        let mut last = Phase::WarmUp;
        let mut cpu_ns = 0;
        loop {
            let phase = self.phase();
            if phase == Phase::Stop {
                return Ok(worker.tally);
            }
            if phase != last {
                if last == Phase::WarmUp {
                    let mean = busy / operations.max(1);
                    period = (mean * REST).clamp(PERIOD.0, PERIOD.1);
                }
                // What is late is late because of the phase before: it does not count here.
                last = phase;
                due = Instant::now();
            }
            wait_until(due);
            let start = Instant::now();
            let done = if updates { worker.update() } else { Some(worker.query()) };
            if let Some((kind, took)) = done {
                worker.tally.record(phase, kind, start.saturating_duration_since(due) + took);
            }
            busy += start.elapsed();
            operations = operations.saturating_add(1);
            let so_far = sched::thread_cpu_ns();
            self.cpu_ns
                .fetch_add(so_far - std::mem::replace(&mut cpu_ns, so_far), Ordering::Relaxed);
            due = if phase == Phase::WarmUp { Instant::now() } else { due + period };
        }
    }
}

struct Stop<'l, 'a, A: Allocator + Clone + Send + Sync>(&'l Load<'a, A>);

impl<A: Allocator + Clone + Send + Sync> Drop for Stop<'_, '_, A> {
    fn drop(&mut self) {
        self.0.enter(Phase::Stop);
    }
}

fn wait_until(due: Instant) {
    let left = due.saturating_duration_since(Instant::now());
    if left > SPIN {
        std::thread::sleep(left - SPIN);
    }
    while Instant::now() < due {
        std::hint::spin_loop();
    }
}

struct Worker<'l, 'a, A: Allocator + Clone> {
    load: &'l Load<'a, A>,
    random: Random,
    grouped: Grouped,
    adds_next: bool,
    tally: Tally,
}

impl<A: Allocator + Clone + Send + Sync> Worker<'_, '_, A> {
    /// A word from a random place of a random document, so that frequent words are asked for
    /// often, as people do; with the place's document and position.
    fn place(&mut self) -> (&[u32], usize) {
        let document =
            &self.load.corpus.documents[self.random.below(self.load.corpus.documents.len())];
        (document, self.random.below(document.len()))
    }

    fn query(&mut self) -> (Kind, Duration) {
        let choice = self.random.below(10);
        let other = self.random.next();
        let (document, at) = self.place();
        let (kind, query) = match (choice, &document[at..]) {
            (0..2, [a, b, c, ..]) => (Kind::Phrase, Query::Phrase([*a, *b, *c])),
            (2..5, [a, ..]) => {
                let other = usize::try_from(other).unwrap_or(0) % document.len();
                (Kind::Both, Query::Both(*a, document[other]))
            }
            _ => (Kind::One, Query::One(document[at])),
        };
        let asked = self.load.twin.ask(query, &self.load.corpus.vocabulary);
        self.tally.compared += 1;
        self.tally.differing += u64::from(asked.differing > 0);
        if self.tally.difference.is_none() {
            self.tally.difference = asked.difference;
        }
        (kind, asked.took)
    }

    /// Takes out and adds documents in turn, so that the index keeps its size. A document is added
    /// to the shard that had it first: its words are known there.
    fn update(&mut self) -> Option<(Kind, Duration)> {
        let Load { twin, corpus, .. } = self.load;
        let document = self.random.below(corpus.documents.len());
        let shard = document % SHARDS;
        if !self.adds_next {
            self.adds_next = true;
            let member = twin.pick(shard, self.random.next())?;
            self.grouped.set(&corpus.documents[member.document as usize]);
            let took = twin.remove(shard, member, &self.grouped, &corpus.vocabulary)?;
            return Some((Kind::Remove, took));
        }
        self.grouped.set(&corpus.documents[document]);
        let document = u32::try_from(document).ok()?;
        match twin.add(shard, document, &self.grouped, &corpus.vocabulary) {
            Ok(took) => {
                self.adds_next = false;
                Some((Kind::Add, took))
            }
            // Nothing more is taken out until something fits again.
            Err(_) => {
                self.tally.full += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use allocator_api2::alloc::Global;

    #[test]
    fn threads_ask_and_update_until_told_to_stop_and_all_answers_agree() -> anyhow::Result<()> {
        let mut corpus = Corpus::default();
        for i in 0..50 {
            corpus.add(&format!("page {i} of folio {} on node {}", i / 7, i % 3));
        }
        let twin = Twin::new_in(&Global);
        twin.fill(&corpus, 1, || twin.documents() >= 200, || {})?;
        let (before, load) = (twin.documents(), Load::new(&twin, &corpus));
        let ((), tally) = load.run(2, 1, || {
            for phase in Phase::MEASURED {
                std::thread::sleep(Duration::from_millis(30));
                load.enter(phase);
            }
            // Updates alternate, so one is under way when the index has not its first size.
            while twin.documents() == before {
                std::thread::yield_now();
            }
        })?;
        assert!(tally.compared > 0);
        assert_eq!((tally.differing, tally.difference), (0, None));
        assert_eq!(twin.compare(|_| {}).differing, 0);
        assert!(load.cpu() > Duration::ZERO);
        Ok(())
    }

    #[test]
    fn the_generator_reaches_every_choice() {
        let mut random = Random::new(1);
        let mut seen = [0u32; 10];
        for _ in 0..1000 {
            seen[random.below(10)] += 1;
        }
        assert!(seen.iter().all(|&n| n > 50), "{seen:?}");
    }
}
