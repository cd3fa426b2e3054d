//! The program whose memory moves: threads that ask and update the index at a steady rate.
//!
//! Time is cut into slices. In a slice each thread does a fixed number of operations on a fixed
//! schedule, chosen once so that it is busy about a quarter of the time while nothing moves. The
//! slices of a round have one seed, and an update takes a document out and puts it back: so they
//! begin with the same documents, ask the same and change the same. An operation's latency counts
//! from the moment it was due, so one that is late because the one before it stalled shows it (no
//! coordinated omission). The time that the reference takes is left out.

use super::corpus::Corpus;
use super::limits::no_thread;
use super::tally::{Kind, Seen, Tally};
use super::text::Grouped;
use super::twin::{Query, SHARDS, Twin};
use crate::cancel;
use allocator_api2::alloc::Allocator;
use pageferry_sys::sched;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
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

/// How often the threads do something, by kind ([`Kind::ALL`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Schedule {
    periods: [Duration; 2],
    /// Operations of one thread.
    pub(super) operations: [u32; 2],
}

impl Schedule {
    /// For slices of about `length`, from what a warm-up saw.
    pub(super) fn new(warm_up: &Tally, length: Duration) -> Self {
        let mut schedule = Self { periods: Default::default(), operations: [0; 2] };
        for kind in Kind::ALL.map(|kind| kind as usize) {
            let mean = warm_up.busy[kind] / warm_up.operations[kind].max(1);
            let period = (mean * REST).clamp(PERIOD.0, PERIOD.1);
            let fit = u32::try_from(length.as_nanos() / period.as_nanos()).unwrap_or(u32::MAX);
            schedule.periods[kind] = period;
            // Even: each document that is taken out is put back in the same slice.
            schedule.operations[kind] = (fit / 2 * 2).max(2);
        }
        schedule
    }
}

/// What the threads do in a slice.
#[derive(Clone, Copy, Debug)]
pub(super) enum Job {
    /// Work without pauses until what runs beside it ends.
    WarmUp,
    /// Do so many operations on this schedule; with one seed always the same.
    Slice { schedule: Schedule, seed: u64 },
}

/// Where the threads take their jobs and hand in what they saw.
#[derive(Debug)]
struct Desk {
    job: Option<Job>,
    /// Counts jobs, so that a thread takes each once.
    number: u64,
    threads: usize,
    /// Threads that have not handed in yet.
    working: usize,
    tally: Tally,
    seen: Seen,
    /// A thread has ended, by a panic or an error: nobody may wait for it.
    broken: bool,
}

/// The threads' common ground.
#[derive(Debug)]
pub(super) struct Load<'a, A: Allocator + Clone> {
    twin: &'a Twin<A>,
    corpus: &'a Corpus,
    desk: Mutex<Desk>,
    changed: Condvar,
    /// The warm-up is over.
    warm: AtomicBool,
    /// The threads are to end.
    end: AtomicBool,
    /// CPU time of the threads, each counted after every operation.
    cpu_ns: AtomicU64,
}

impl<'a, A: Allocator + Clone + Send + Sync> Load<'a, A> {
    pub(super) fn new(
        twin: &'a Twin<A>,
        corpus: &'a Corpus,
    ) -> Result<Self, hdrhistogram::CreationError> {
        let desk = Desk {
            job: None,
            number: 0,
            threads: 0,
            working: 0,
            tally: Tally::new()?,
            seen: Seen::default(),
            broken: false,
        };
        Ok(Self {
            twin,
            corpus,
            desk: Mutex::new(desk),
            changed: Condvar::new(),
            warm: AtomicBool::new(false),
            end: AtomicBool::new(false),
            cpu_ns: AtomicU64::new(0),
        })
    }

    // A thread that panics ends the demo when it is joined.
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'d>(&self, desk: MutexGuard<'d, Desk>) -> MutexGuard<'d, Desk> {
        self.changed.wait(desk).unwrap_or_else(PoisonError::into_inner)
    }

    /// CPU time that the threads have used so far.
    pub(super) fn cpu(&self) -> Duration {
        // Relaxed: a sum that is read for itself.
        Duration::from_nanos(self.cpu_ns.load(Ordering::Relaxed))
    }

    /// Whether threads are still at their job.
    pub(super) fn is_busy(&self) -> bool {
        let desk = self.desk();
        desk.working > 0 && !desk.broken
    }

    /// Has the threads do a job beside `main`, and waits for both. What they noted, or `None` if
    /// they did not do all of it: the user cancelled.
    ///
    /// # Errors
    /// Those of `main`.
    pub(super) fn slice<T>(
        &self,
        job: Job,
        main: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<(T, Option<Tally>)> {
        let mut desk = self.desk();
        desk.tally.clear();
        desk.job = Some(job);
        desk.number += 1;
        desk.working = desk.threads;
        // Relaxed here and below: flags that need only be seen soon; the desk orders the rest.
        self.warm.store(false, Ordering::Relaxed);
        drop(desk);
        self.changed.notify_all();
        let result = main();
        self.warm.store(true, Ordering::Relaxed);
        let result = result?;
        let mut desk = self.desk();
        while desk.working > 0 && !desk.broken {
            desk = self.wait(desk);
        }
        let whole = !desk.broken && !cancel::requested();
        Ok((result, whole.then(|| desk.tally.clone())))
    }

    /// Runs `main` beside `queries` threads that ask and `updates` threads that update, ends
    /// them, and returns what `main` returned and what they saw.
    pub(super) fn run<T>(
        &self,
        queries: usize,
        updates: usize,
        main: impl FnOnce() -> T,
    ) -> anyhow::Result<(T, Seen)> {
        self.desk().threads = queries + updates;
        std::thread::scope(|scope| {
            // The threads end however `main` ends.
            let end = Stop(self);
            let mut threads = Vec::with_capacity(queries + updates);
            for thread in 0..queries + updates {
                let (kind, name) = match thread < queries {
                    true => (Kind::Query, "demo-query"),
                    false => (Kind::Update, "demo-update"),
                };
                let builder = std::thread::Builder::new().name(name.to_owned());
                let started = builder.spawn_scoped(scope, move || self.work(thread, kind));
                threads.push(started.map_err(|e| no_thread(&e))?);
            }
            let result = main();
            drop(end);
            for thread in threads {
                match thread.join() {
                    Ok(ended) => ended?,
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            Ok((result, std::mem::take(&mut self.desk().seen)))
        })
    }

    fn work(&self, thread: usize, kind: Kind) -> anyhow::Result<()> {
        let mut worker = Worker {
            load: self,
            random: Random::new(0),
            grouped: Grouped::default(),
            out: None,
            tally: Tally::new()?,
            seen: Seen::default(),
        };
        let leaves = Leaves(self);
        let (mut number, mut cpu_ns) = (0, 0);
        loop {
            let mut desk = self.desk();
            while desk.number == number && !self.end.load(Ordering::Relaxed) {
                desk = self.wait(desk);
            }
            number = desk.number;
            let Some(job) = desk.job.filter(|_| !self.end.load(Ordering::Relaxed)) else { break };
            drop(desk);
            let mut count = || {
                let so_far = sched::thread_cpu_ns();
                let more = so_far - std::mem::replace(&mut cpu_ns, so_far);
                self.cpu_ns.fetch_add(more, Ordering::Relaxed);
            };
            worker.tally.clear();
            worker.job(job, thread, kind, &mut count);
            let mut desk = self.desk();
            desk.tally.merge(&worker.tally)?;
            desk.seen.merge(std::mem::take(&mut worker.seen));
            count();
            desk.working -= 1;
            drop(desk);
            self.changed.notify_all();
        }
        std::mem::forget(leaves);
        Ok(())
    }
}

struct Stop<'l, 'a, A: Allocator + Clone + Send + Sync>(&'l Load<'a, A>);

impl<A: Allocator + Clone + Send + Sync> Drop for Stop<'_, '_, A> {
    fn drop(&mut self) {
        let desk = self.0.desk();
        self.0.end.store(true, Ordering::Relaxed);
        drop(desk);
        self.0.changed.notify_all();
    }
}

/// A thread that ends before it is told to.
struct Leaves<'l, 'a, A: Allocator + Clone + Send + Sync>(&'l Load<'a, A>);

impl<A: Allocator + Clone + Send + Sync> Drop for Leaves<'_, '_, A> {
    fn drop(&mut self) {
        self.0.desk().broken = true;
        self.0.changed.notify_all();
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

/// A document that was taken out.
#[derive(Clone, Copy, Debug)]
struct Out {
    shard: usize,
    document: u32,
    place: usize,
}

struct Worker<'l, 'a, A: Allocator + Clone> {
    load: &'l Load<'a, A>,
    random: Random,
    grouped: Grouped,
    /// Is to be put back.
    out: Option<Out>,
    tally: Tally,
    seen: Seen,
}

impl<A: Allocator + Clone + Send + Sync> Worker<'_, '_, A> {
    /// Does a job; `count` is called after each operation.
    fn job(&mut self, job: Job, thread: usize, kind: Kind, count: &mut impl FnMut()) {
        let (schedule, seed) = match job {
            Job::WarmUp => (None, 0),
            Job::Slice { schedule, seed } => (Some(schedule), seed),
        };
        self.random = Random::new((seed << 8) + thread as u64 + 1);
        let period = schedule.map_or(Duration::ZERO, |s| s.periods[kind as usize]);
        let operations = schedule.map_or(u32::MAX, |s| s.operations[kind as usize]);
        let begin = Instant::now();
        for number in 0..operations {
            let over = match schedule {
                None => self.load.warm.load(Ordering::Relaxed),
                Some(_) => false,
            };
            if over || cancel::requested() || self.load.end.load(Ordering::Relaxed) {
                break;
            }
            // In a warm-up each is due when it begins.
            let due = schedule.map_or_else(Instant::now, |_| begin + period * number);
            wait_until(due);
            let start = Instant::now();
            let took = match kind {
                Kind::Query => Some(self.query()),
                Kind::Update => self.update(),
            };
            if let Some(took) = took {
                self.tally.record(kind, start.saturating_duration_since(due) + took);
            }
            self.tally.busy[kind as usize] += start.elapsed();
            self.tally.operations[kind as usize] += 1;
            count();
        }
        // After a warm-up, and where there was no room, a document may be out.
        if self.out.is_some() {
            self.update();
        }
    }

    /// A word from a random place of a random document, so that frequent words are asked for
    /// often, as people do; with the place's document and position.
    fn place(&mut self) -> (&[u32], usize) {
        let document =
            &self.load.corpus.documents[self.random.below(self.load.corpus.documents.len())];
        (document, self.random.below(document.len()))
    }

    fn query(&mut self) -> Duration {
        let choice = self.random.below(10);
        let other = self.random.next();
        let (document, at) = self.place();
        let query = match (choice, &document[at..]) {
            (0..2, [a, b, c, ..]) => Query::Phrase([*a, *b, *c]),
            (2..5, [a, ..]) => {
                let other = usize::try_from(other).unwrap_or(0) % document.len();
                Query::Both(*a, document[other])
            }
            _ => Query::One(document[at]),
        };
        let asked = self.load.twin.ask(query, &self.load.corpus.vocabulary);
        self.seen.compared += 1;
        self.seen.differing += u64::from(asked.differing > 0);
        if self.seen.difference.is_none() {
            self.seen.difference = asked.difference;
        }
        asked.took
    }

    /// Takes a document out and puts it back in turn, so that the index keeps what it holds.
    fn update(&mut self) -> Option<Duration> {
        let Load { twin, corpus, .. } = self.load;
        let Some(Out { shard, document, place }) = self.out else {
            let shard = self.random.below(SHARDS);
            let member = twin.pick(shard, self.random.next())?;
            self.grouped.set(&corpus.documents[member.document as usize]);
            let (took, place) = twin.remove(shard, member, &self.grouped, &corpus.vocabulary)?;
            self.out = Some(Out { shard, document: member.document, place });
            return Some(took);
        };
        self.grouped.set(&corpus.documents[document as usize]);
        match twin.put_back(shard, document, place, &self.grouped, &corpus.vocabulary) {
            Ok(took) => {
                self.out = None;
                Some(took)
            }
            // Nothing more is taken out until something fits again.
            Err(_) => {
                self.seen.full += 1;
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
    fn every_slice_does_the_same_work_from_the_same_documents() -> anyhow::Result<()> {
        let mut corpus = Corpus::default();
        for i in 0..50 {
            corpus.add(&format!("page {i} of folio {} on node {}", i / 7, i % 3));
        }
        let twin = Twin::new_in(&Global);
        twin.fill(&corpus, 1, || twin.documents() >= 200, || {})?;
        let (before, load) = (twin.order(), Load::new(&twin, &corpus)?);
        let slice = |seed| -> anyhow::Result<_> {
            let schedule = Schedule { periods: [Duration::ZERO; 2], operations: [5, 40] };
            let (_, tally) = load.slice(Job::Slice { schedule, seed }, || Ok(()))?;
            let Some(tally) = tally else { panic!("nobody cancelled") };
            assert_eq!(twin.order(), before, "each document is back in its place");
            Ok((Kind::ALL.map(|kind| tally.latencies(kind).len()), twin.last_added()))
        };
        let (did, seen) = load.run(2, 1, || {
            let warm = || {
                // Until each thread has done something, however long that takes.
                while load.cpu() == Duration::ZERO || twin.order() == before {
                    std::thread::yield_now();
                }
                Ok(())
            };
            let ((), warm_up) = load.slice(Job::WarmUp, warm)?;
            assert!(warm_up.is_some_and(|t| t.operations[Kind::Update as usize] > 0));
            assert_eq!(twin.order(), before);
            [1, 1, 2].map(slice).into_iter().collect::<anyhow::Result<Vec<_>>>()
        })?;
        let did = did?;
        assert!(did.iter().all(|(operations, _)| *operations == [10, 40]), "{did:?}");
        assert_eq!(did[0].1, did[1].1, "one seed, one choice of documents");
        assert_ne!(did[1].1, did[2].1, "another seed, others");
        assert!(seen.compared > 30);
        assert_eq!((seen.differing, seen.difference), (0, None));
        assert_eq!(twin.compare(|_| {}).differing, 0);
        assert!(load.cpu() > Duration::ZERO);
        Ok(())
    }

    #[test]
    fn a_schedule_leaves_most_of_the_time_and_has_each_document_put_back() -> anyhow::Result<()> {
        let mut warm_up = Tally::new()?;
        warm_up.busy = [Duration::from_millis(10), Duration::from_secs(100)];
        warm_up.operations = [10, 10];
        let schedule = |ms| Schedule::new(&warm_up, Duration::from_millis(ms));
        assert_eq!(schedule(400).periods, [Duration::from_millis(4), PERIOD.1]);
        assert_eq!(schedule(400).operations, [100, 20]);
        assert_eq!(schedule(70).operations, [16, 2]);
        assert_eq!(schedule(0).operations, [2, 2]);
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
