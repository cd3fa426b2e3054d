//! The same index twice: in managed memory, and in ordinary memory as the reference.
//!
//! Documents are spread over shards. Under a shard's lock both indexes hold the same documents,
//! so a query that gets both answers under one lock may compare them exactly, whatever updates
//! run beside it. The locks stand outside the managed memory: a lock that blocks makes a system
//! call with its own address, and in user-mode-only form no system call may be given an address
//! in a region that moves.

use super::corpus::Corpus;
use super::index::{Answer, Comparison, Index};
use super::postings::Full;
use super::text::{Grouped, Vocabulary};
use crate::cancel;
use allocator_api2::alloc::{Allocator, Global};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

/// How many shards there are: more than threads that want one on a small machine, and few enough
/// that a query, which asks them all, stays short.
pub(super) const SHARDS: usize = 8;

/// How often a text goes in at most. A text of one KiB so often makes about the least index that is
/// worth moving; a smaller one makes a smaller index, and not millions of documents all alike.
pub(super) const EDITIONS: u32 = 1000;

/// A document in a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Its number in the index; ascending in the order of adding.
    id: u32,
    /// Its number in the corpus.
    pub(super) document: u32,
}

#[derive(Debug)]
struct Shard<A: Allocator + Clone> {
    managed: Index<A>,
    reference: Index<Global>,
    members: Vec<Member>,
    next: u32,
}

/// What is looked for, as word numbers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Query {
    /// Documents with a word.
    One(u32),
    /// Documents with both words.
    Both(u32, u32),
    /// Documents with these words one after another.
    Phrase([u32; 3]),
}

impl Query {
    fn ask<A: Allocator + Clone>(self, index: &Index<A>, vocabulary: &Vocabulary) -> Answer {
        let word = |number| vocabulary.word(number);
        match self {
            Self::One(a) => index.one(word(a)),
            Self::Both(a, b) => index.both(word(a), word(b)),
            Self::Phrase(numbers) => index.phrase(&numbers.map(word)),
        }
    }

    /// As a person would write it.
    fn text(self, vocabulary: &Vocabulary) -> String {
        let word = |number| vocabulary.word(number);
        match self {
            Self::One(a) => word(a).to_owned(),
            Self::Both(a, b) => format!("{} AND {}", word(a), word(b)),
            Self::Phrase(numbers) => format!("\"{}\"", numbers.map(word).join(" ")),
        }
    }
}

/// The outcome of a query on all shards.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// Time spent waiting for locks and in the managed index, without the reference.
    pub(super) took: Duration,
    /// Shards whose two answers differ.
    pub(super) differing: u64,
    /// The first difference, in words.
    pub(super) difference: Option<String>,
}

/// Which memory has no room for a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// The region.
    Managed,
    /// Ordinary memory: the system gives this process no more.
    Reference,
}

/// How far filling came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Filled {
    /// Documents added.
    pub(super) documents: u64,
    /// What had no room for more.
    pub(super) no_room: Option<NoRoom>,
    /// The text went in [`EDITIONS`] times, and that was not enough.
    pub(super) used_up: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Twin<A: Allocator + Clone> {
    shards: Vec<RwLock<Shard<A>>>,
}

impl<A: Allocator + Clone + Send + Sync> Twin<A> {
    /// Two empty indexes, the managed one in the memory of `alloc`.
    pub(super) fn new_in(alloc: &A) -> Self {
        let shard = || Shard {
            managed: Index::new_in(alloc.clone()),
            reference: Index::new_in(Global),
            members: Vec::new(),
            next: 0,
        };
        Self { shards: (0..SHARDS).map(|_| RwLock::new(shard())).collect() }
    }

    // A thread that panics with a lock held ends the demo when it is joined; until then the others
    // go on with what is there.
    fn read(&self, shard: usize) -> RwLockReadGuard<'_, Shard<A>> {
        self.shards[shard].read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, shard: usize) -> RwLockWriteGuard<'_, Shard<A>> {
        self.shards[shard].write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the corpus, again and again, until `is_enough`, a memory is full, the user cancels or
    /// it went in [`EDITIONS`] times, with `threads` threads. `progress` is called now and then.
    ///
    /// # Errors
    /// A thread could not be started; what the others added by then is in the indexes.
    pub(super) fn fill(
        &self,
        corpus: &Corpus,
        threads: usize,
        is_enough: impl Fn() -> bool + Sync,
        progress: impl Fn() + Sync,
    ) -> std::io::Result<Filled> {
        let (enough, no_room) = (AtomicBool::new(false), OnceLock::new());
        let documents = AtomicU64::new(0);
        // A list that grows has two blocks for a moment, so what is in use counts only while nobody
        // adds. Nothing is guarded by the lock that a panic could leave half done.
        let adding = RwLock::new(());
        let is_enough = || {
            is_enough() && {
                let _nobody = adding.write().unwrap_or_else(PoisonError::into_inner);
                is_enough()
            }
        };
        // Relaxed everywhere: a flag that need only be seen soon, and a sum read after the join.
        let once = |thread: usize, grouped: &mut Grouped| {
            for (number, document) in (0..).zip(&corpus.documents) {
                let shard = number as usize % SHARDS;
                if shard % threads != thread {
                    continue;
                }
                if enough.load(Ordering::Relaxed) {
                    break;
                }
                grouped.set(document);
                let added = {
                    let _adding = adding.read().unwrap_or_else(PoisonError::into_inner);
                    self.add(shard, number, grouped, &corpus.vocabulary)
                };
                match added {
                    Ok(_) => _ = documents.fetch_add(1, Ordering::Relaxed),
                    Err(which) => _ = no_room.set(which),
                }
                if no_room.get().is_some() || cancel::requested() || is_enough() {
                    enough.store(true, Ordering::Relaxed);
                }
                progress();
            }
        };
        let work = |thread| {
            let mut grouped = Grouped::default();
            for _ in 0..EDITIONS {
                if enough.load(Ordering::Relaxed) {
                    break;
                }
                once(thread, &mut grouped);
            }
        };
        std::thread::scope(|scope| {
            for thread in 1..threads {
                let builder = std::thread::Builder::new().name("demo-fill".to_owned());
                let started = builder.spawn_scoped(scope, move || work(thread));
                started.inspect_err(|_| enough.store(true, Ordering::Relaxed))?;
            }
            work(0);
            Ok::<_, std::io::Error>(())
        })?;
        Ok(Filled {
            documents: documents.into_inner(),
            no_room: no_room.into_inner(),
            used_up: !enough.into_inner(),
        })
    }

    /// Asks both indexes and compares.
    pub(super) fn ask(&self, query: Query, vocabulary: &Vocabulary) -> Asked {
        let mut asked = Asked::default();
        for shard in 0..SHARDS {
            let start = Instant::now();
            let locked = self.read(shard);
            let managed = query.ask(&locked.managed, vocabulary);
            asked.took += start.elapsed();
            let reference = query.ask(&locked.reference, vocabulary);
            if managed != reference {
                asked.differing += 1;
                asked.difference.get_or_insert_with(|| {
                    let query = query.text(vocabulary);
                    format!("{query} in shard {shard}: {managed:?}, but expected {reference:?}")
                });
            }
        }
        asked
    }

    /// Adds a document of the corpus to a shard; the time it took without the reference.
    pub(super) fn add(
        &self,
        shard: usize,
        document: u32,
        grouped: &Grouped,
        vocabulary: &Vocabulary,
    ) -> Result<Duration, NoRoom> {
        let start = Instant::now();
        let mut locked = self.write(shard);
        let Shard { managed, reference, members, next } = &mut *locked;
        // An index that has used up its numbers takes no more, as if it were full.
        let (id, after) = (*next, next.checked_add(1).ok_or(NoRoom::Managed)?);
        let added = managed.add(id, grouped, vocabulary).map_err(|Full| NoRoom::Managed);
        let took = start.elapsed();
        // The number is spent in any case: what is taken out again leaves dead entries with it.
        *next = after;
        let added = added.and_then(|()| {
            members.try_reserve(1).map_err(|_| NoRoom::Reference)?;
            reference.add(id, grouped, vocabulary).map_err(|Full| NoRoom::Reference)
        });
        if let Err(which) = added {
            managed.remove(id, grouped, vocabulary);
            reference.remove(id, grouped, vocabulary);
            return Err(which);
        }
        members.push(Member { id, document });
        Ok(took)
    }

    /// A member of a shard, picked by `random`.
    pub(super) fn pick(&self, shard: usize, random: u64) -> Option<Member> {
        let locked = self.read(shard);
        let count = locked.members.len() as u64;
        let at = usize::try_from(random.checked_rem(count)?).ok()?;
        locked.members.get(at).copied()
    }

    /// Puts a document back where it was taken out, so that the members stand as before; else as
    /// [`Twin::add`].
    pub(super) fn put_back(
        &self,
        shard: usize,
        document: u32,
        place: usize,
        grouped: &Grouped,
        vocabulary: &Vocabulary,
    ) -> Result<Duration, NoRoom> {
        let took = self.add(shard, document, grouped, vocabulary)?;
        let members = &mut self.write(shard).members;
        if let Some(last) = members.len().checked_sub(1) {
            // What took its place when it was taken out is the last one again.
            members.swap(place.min(last), last);
        }
        Ok(took)
    }

    /// Takes out a member that was picked; the time it took without the reference and where it
    /// stood, or `None` when another thread was faster.
    pub(super) fn remove(
        &self,
        shard: usize,
        member: Member,
        grouped: &Grouped,
        vocabulary: &Vocabulary,
    ) -> Option<(Duration, usize)> {
        let start = Instant::now();
        let mut locked = self.write(shard);
        let Shard { managed, reference, members, .. } = &mut *locked;
        let waited = start.elapsed();
        let at = members.iter().position(|m| *m == member)?;
        members.swap_remove(at);
        let start = Instant::now();
        managed.remove(member.id, grouped, vocabulary);
        let took = waited + start.elapsed();
        reference.remove(member.id, grouped, vocabulary);
        Some((took, at))
    }

    /// The documents of each shard in the order in which they are picked.
    #[cfg(test)]
    pub(super) fn order(&self) -> Vec<Vec<u32>> {
        let documents =
            |shard| self.read(shard).members.iter().map(|m| m.document).collect::<Vec<_>>();
        (0..SHARDS).map(documents).collect()
    }

    /// The document that was added last to each shard.
    #[cfg(test)]
    pub(super) fn last_added(&self) -> Vec<Option<u32>> {
        let newest = |shard| {
            let locked = self.read(shard);
            locked.members.iter().max_by_key(|m| m.id).map(|m| m.document)
        };
        (0..SHARDS).map(newest).collect()
    }

    /// How many documents are in it now.
    pub(super) fn documents(&self) -> u64 {
        (0..SHARDS).map(|shard| self.read(shard).members.len() as u64).sum()
    }

    /// Compares everything in both indexes. `progress` is told how many shards are done.
    pub(super) fn compare(&self, progress: impl Fn(usize)) -> Comparison {
        let mut all = Comparison::default();
        for shard in 0..SHARDS {
            let locked = self.read(shard);
            all += locked.managed.compare(&locked.reference);
            progress(shard + 1);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus() -> Corpus {
        let mut corpus = Corpus::default();
        for i in 0..20 {
            corpus.add(&format!("folio number {i} of the pool on node {}", i % 4));
        }
        corpus
    }

    fn filled(corpus: &Corpus, documents: u64, threads: usize) -> (Twin<Global>, Filled) {
        let twin = Twin::new_in(&Global);
        let filled = twin.fill(corpus, threads, || twin.documents() >= documents, || {});
        let Ok(filled) = filled else { panic!("a thread can be started") };
        (twin, filled)
    }

    #[test]
    fn filling_goes_through_the_corpus_again_until_there_is_enough() {
        let corpus = corpus();
        for threads in [1, 3] {
            let (twin, filled) = filled(&corpus, 90, threads);
            assert!(filled.documents >= 90 && filled.documents < 90 + threads as u64);
            assert_eq!(twin.documents(), filled.documents);
            assert_eq!((filled.no_room, filled.used_up), (None, false));
            assert_eq!(twin.compare(|_| {}).differing, 0);
        }
    }

    /// As when a list of another thread has its old and its new block.
    #[test]
    fn what_is_enough_for_a_moment_only_is_not_enough() {
        let corpus = corpus();
        for threads in [1, 3] {
            let twin = Twin::new_in(&Global);
            let asked = AtomicU64::new(0);
            // Yes, and at once no again, as long as there are too few.
            let is_enough = || {
                let moment = asked.fetch_add(1, Ordering::Relaxed).is_multiple_of(2);
                twin.documents() >= 50 || threads == 1 && moment
            };
            let filled = twin.fill(&corpus, threads, is_enough, || {});
            let Ok(filled) = filled else { panic!("a thread can be started") };
            assert!(filled.documents >= 50, "{} documents", filled.documents);
        }
    }

    #[test]
    fn a_corpus_smaller_than_the_threads_fills_too() {
        let mut corpus = Corpus::default();
        corpus.add("one document");
        let (twin, _) = filled(&corpus, 5, 4);
        assert_eq!(twin.documents(), 5);
    }

    #[test]
    fn a_text_goes_in_so_often_and_no_more() {
        let mut corpus = Corpus::default();
        corpus.add("word");
        for threads in [1, 3] {
            let (twin, filled) = filled(&corpus, u64::MAX, threads);
            assert_eq!(twin.documents(), u64::from(EDITIONS));
            assert_eq!((filled.no_room, filled.used_up), (None, true));
        }
    }

    #[test]
    fn updates_reach_both_indexes() {
        let corpus = corpus();
        let (twin, filled) = filled(&corpus, 40, 1);
        let mut grouped = Grouped::default();
        let member = twin.pick(3, 1234).filter(|m| m.document % 8 == 3);
        let Some(member) = member else { panic!("shard 3 has members") };
        grouped.set(&corpus.documents[member.document as usize]);
        assert!(twin.remove(3, member, &grouped, &corpus.vocabulary).is_some());
        assert!(twin.remove(3, member, &grouped, &corpus.vocabulary).is_none(), "gone already");
        assert_eq!(twin.documents(), filled.documents - 1);
        assert!(twin.add(3, member.document, &grouped, &corpus.vocabulary).is_ok());
        assert_eq!(twin.compare(|_| {}).differing, 0);
    }

    #[test]
    fn an_answer_that_differs_is_counted_and_named() {
        let corpus = corpus();
        let (twin, _) = filled(&corpus, 20, 1);
        let query =
            Query::Phrase([corpus.documents[0][3], corpus.documents[0][4], corpus.documents[0][5]]);
        assert_eq!(twin.ask(query, &corpus.vocabulary).differing, 0);
        let mut grouped = Grouped::default();
        grouped.set(&corpus.documents[0]);
        twin.write(5).managed.remove(0, &grouped, &corpus.vocabulary);
        let asked = twin.ask(query, &corpus.vocabulary);
        assert_eq!(asked.differing, 1);
        let difference = asked.difference.unwrap_or_default();
        assert!(difference.starts_with("\"of the pool\" in shard 5"), "{difference}");
        assert!(twin.compare(|_| {}).differing > 0);
    }
}
