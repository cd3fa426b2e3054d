//! An inverted index: from words to the documents they stand in and the places in them.
//!
//! It is generic over the allocator, and everything that it holds (the table, the words, the
//! postings) lives in that allocator's memory, while its locks and what answers are made of do
//! not: the demo builds it once in managed memory, which moves while it is used, and once in
//! ordinary memory, which does not, and compares. An [`Answer`] holds no reference into the index,
//! so that it can be printed or sent anywhere while the memory moves.

use super::postings::{Full, Postings};
use super::text::{Grouped, Vocabulary};
use allocator_api2::alloc::Allocator;
use allocator_api2::vec::Vec;
use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::BuildHasher;

/// One word with its postings.
#[derive(Debug)]
struct Record<A: Allocator> {
    word: Vec<u8, A>,
    postings: Postings<A>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Index<A: Allocator + Clone> {
    table: HashTable<Record<A>, A>,
    hasher: DefaultHashBuilder,
    alloc: A,
}

/// How many of the best documents an answer names.
const BEST: usize = 5;

/// What a query found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    /// Documents that match.
    pub(super) documents: u32,
    /// Matches in all of them.
    pub(super) matches: u64,
    /// The documents with most matches, `(matches, document)`, best first.
    pub(super) best: [(u32, u32); BEST],
    /// Depends on every matching document, its matches and the place of its first.
    pub(super) digest: u64,
}

impl Answer {
    fn add(&mut self, doc: u32, matches: u32, first: u32) {
        self.documents += 1;
        self.matches += u64::from(matches);
        for word in [doc, matches, first] {
            // FNV-1a's prime: any change of any word changes what follows.
            self.digest = (self.digest ^ u64::from(word)).wrapping_mul(0x0100_0000_01b3);
        }
        if matches > self.best[BEST - 1].0 {
            let at = self.best.partition_point(|&(m, _)| m >= matches);
            self.best[at..].rotate_right(1);
            self.best[at] = (matches, doc);
        }
    }
}

impl<A: Allocator + Clone> Index<A> {
    pub(super) fn new_in(alloc: A) -> Self {
        let table = HashTable::new_in(alloc.clone());
        Self { table, hasher: DefaultHashBuilder::default(), alloc }
    }

    fn postings(&self, word: &str) -> Option<&Postings<A>> {
        let word = word.as_bytes();
        let record = self.table.find(self.hasher.hash_one(word), |r| r.word == *word)?;
        Some(&record.postings)
    }

    /// Adds a document. `doc` is greater than every document added before.
    ///
    /// # Errors
    /// [`Full`]: part of the document may be in the index; [`Index::remove`] takes it out.
    pub(super) fn add(
        &mut self,
        doc: u32,
        words: &Grouped,
        vocabulary: &Vocabulary,
    ) -> Result<(), Full> {
        for (number, positions) in words.iter() {
            let word = vocabulary.word(number).as_bytes();
            let Self { table, hasher, alloc } = self;
            let rehash = |r: &Record<A>| hasher.hash_one(&r.word[..]);
            table.try_reserve(1, rehash).map_err(|_| Full)?;
            let record = match table.entry(hasher.hash_one(word), |r| r.word == *word, rehash) {
                Entry::Occupied(slot) => slot.into_mut(),
                Entry::Vacant(slot) => {
                    let mut copy = Vec::new_in(alloc.clone());
                    copy.try_reserve_exact(word.len()).map_err(|_| Full)?;
                    copy.extend_from_slice(word);
                    let postings = Postings::new_in(alloc.clone());
                    slot.insert(Record { word: copy, postings }).into_mut()
                }
            };
            record.postings.add(doc, positions)?;
        }
        Ok(())
    }

    /// Takes a document out again. Words that are left without documents stay in the table.
    pub(super) fn remove(&mut self, doc: u32, words: &Grouped, vocabulary: &Vocabulary) {
        for (number, _) in words.iter() {
            let word = vocabulary.word(number).as_bytes();
            let hash = self.hasher.hash_one(word);
            if let Some(record) = self.table.find_mut(hash, |r| r.word == *word) {
                record.postings.remove(doc);
            }
        }
    }

    /// The documents in which `word` stands.
    pub(super) fn one(&self, word: &str) -> Answer {
        let mut answer = Answer::default();
        if let Some(list) = self.postings(word) {
            for entry in list.iter() {
                let first = list.positions(entry).first().copied().unwrap_or_default();
                answer.add(entry.doc, entry.count, first);
            }
        }
        answer
    }

    /// The documents in which both words stand.
    pub(super) fn both(&self, a: &str, b: &str) -> Answer {
        let mut answer = Answer::default();
        let (Some(a), Some(b)) = (self.postings(a), self.postings(b)) else { return answer };
        let (rare, common) = if a.documents() <= b.documents() { (a, b) } else { (b, a) };
        let mut cursor = common.cursor();
        for entry in rare.iter() {
            if let Some(other) = cursor.seek(entry.doc) {
                let firsts = (rare.positions(entry).first(), common.positions(other).first());
                let first = firsts.0.min(firsts.1).copied().unwrap_or_default();
                answer.add(entry.doc, entry.count + other.count, first);
            }
        }
        answer
    }

    /// The documents in which the words stand one after another.
    pub(super) fn phrase(&self, words: &[&str]) -> Answer {
        let mut answer = Answer::default();
        let lists: Option<std::vec::Vec<_>> = words.iter().map(|w| self.postings(w)).collect();
        let Some(lists) = lists else { return answer };
        let Some((lead, _)) = lists.iter().enumerate().min_by_key(|(_, l)| l.documents()) else {
            return answer;
        };
        let mut cursors: std::vec::Vec<_> = lists.iter().map(|l| l.cursor()).collect();
        let mut places: std::vec::Vec<&[u32]> = std::vec::Vec::with_capacity(lists.len());
        for entry in lists[lead].iter() {
            places.clear();
            for (list, cursor) in lists.iter().zip(&mut cursors) {
                let Some(found) = cursor.seek(entry.doc) else { break };
                places.push(list.positions(found));
            }
            if places.len() == lists.len() {
                let (matches, first) = runs(&places);
                if matches > 0 {
                    answer.add(entry.doc, matches, first);
                }
            }
        }
        answer
    }

    /// Compares everything in this index with everything in `other`.
    pub(super) fn compare<B: Allocator + Clone>(&self, other: &Index<B>) -> Comparison {
        let mut result = Comparison::default();
        let mut documents = 0usize;
        for record in self.table.iter().filter(|r| r.postings.documents() > 0) {
            let list = &record.postings;
            result.words += 1;
            documents += list.documents();
            let hash = other.hasher.hash_one(&record.word[..]);
            let twin = other.table.find(hash, |r| r.word[..] == record.word[..]);
            let equal = twin.is_some_and(|twin| {
                let twin = &twin.postings;
                let same = |(a, b): (&super::postings::Entry, &super::postings::Entry)| {
                    a.doc == b.doc && list.positions(a) == twin.positions(b)
                };
                list.documents() == twin.documents() && list.iter().zip(twin.iter()).all(same)
            });
            result.positions += list.iter().map(|e| u64::from(e.count)).sum::<u64>();
            if !equal {
                result.differing += 1;
            }
        }
        result.postings = documents as u64;
        // A word that only the other one has is a difference too.
        let others = other.table.iter().filter(|r| r.postings.documents() > 0);
        for record in others {
            let hash = self.hasher.hash_one(&record.word[..]);
            let mine = self.table.find(hash, |r| r.word[..] == record.word[..]);
            if mine.is_none_or(|r| r.postings.documents() == 0) {
                result.differing += 1;
            }
        }
        result
    }
}

/// How often the places of several words follow one another, and where that begins first.
fn runs(places: &[&[u32]]) -> (u32, u32) {
    let Some((heads, tails)) = places.split_first() else { return (0, 0) };
    let (mut matches, mut first) = (0, 0);
    for &head in *heads {
        let follow = (head + 1..).zip(tails).all(|(want, tail)| tail.binary_search(&want).is_ok());
        if follow {
            if matches == 0 {
                first = head;
            }
            matches += 1;
        }
    }
    (matches, first)
}

/// The result of comparing two indexes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(super) struct Comparison {
    /// Words compared.
    pub(super) words: u64,
    /// Postings (a document in the list of a word) compared.
    pub(super) postings: u64,
    /// Positions compared.
    pub(super) positions: u64,
    /// Words whose postings are not the same in both.
    pub(super) differing: u64,
}

impl std::ops::AddAssign for Comparison {
    fn add_assign(&mut self, other: Self) {
        self.words += other.words;
        self.postings += other.postings;
        self.positions += other.positions;
        self.differing += other.differing;
    }
}
