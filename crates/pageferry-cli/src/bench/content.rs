//! The content of a region, word by word, and the proof that nothing happened to it.
//!
//! Every word is a function of its place, a seed and a version: a page that ends up in another's
//! place, a page of zeros, a lost write and a write that lands twice all show. One word of each
//! page belongs to each writer, who alone changes its version and remembers it outside of managed
//! memory.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::probe::{WORD, Words};

/// Words of a base page.
pub(super) const PAGE_WORDS: usize = 4096 / WORD;

/// What the words hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Content {
    /// Makes this content different from another.
    pub(super) seed: u64,
    /// Threads that read and write memory to check it.
    pub(super) threads: usize,
}

/// What is wrong with a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mismatch {
    /// Its index.
    pub(super) word: usize,
    /// What it holds.
    pub(super) found: u64,
    /// What it must hold.
    pub(super) expected: u64,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { word, found, expected } = self;
        write!(f, "byte {:#x} of the region holds {found:#x} instead of {expected:#x}", word * WORD)
    }
}

impl Content {
    /// What a word holds that was written `version` times.
    #[inline]
    pub(super) fn word(&self, index: usize, version: u32) -> u64 {
        // The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
        // generators, OOPSLA 2014): a bijection, so that different places differ.
        let mut z = self.seed ^ (index as u64) ^ (u64::from(version) << 40);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Writes version 0 of every word, touching every page.
    pub(super) fn fill(&self, words: Words<'_>) {
        self.spread(0..words.len(), |index| {
            words.store(index, self.word(index, 0));
            None
        });
    }

    /// Reads the words of a range, all of version 0; the first that is wrong.
    pub(super) fn check(&self, words: Words<'_>, range: Range<usize>) -> Result<(), Mismatch> {
        self.spread(range, |index| {
            let (found, expected) = (words.load(index), self.word(index, 0));
            (found != expected).then_some(Mismatch { word: index, found, expected })
        })
        .map_or(Ok(()), Err)
    }

    /// Calls `f` for every word of the range, from several threads; the first result of each
    /// thread ends it, and the one with the lowest index counts.
    fn spread(
        &self,
        range: Range<usize>,
        f: impl Fn(usize) -> Option<Mismatch> + Sync,
    ) -> Option<Mismatch> {
        let share = range.len().div_ceil(self.threads.max(1)).next_multiple_of(PAGE_WORDS);
        let (f, end) = (&f, range.end);
        let mut found: Vec<Mismatch> = thread::scope(|scope| {
            let parts: Vec<_> = range
                .step_by(share.max(1))
                .map(|start| scope.spawn(move || (start..end.min(start + share)).find_map(f)))
                .collect();
            parts.into_iter().filter_map(|part| part.join().ok().flatten()).collect()
        });
        found.sort_by_key(|mismatch| mismatch.word);
        found.first().copied()
    }
}

/// The words that one writer owns: one in each page, and how often each was written.
#[derive(Debug)]
pub(super) struct Owned {
    /// Which word of each page.
    slot: usize,
    versions: Vec<u32>,
}

impl Owned {
    /// Words of writer `writer` (of at most 511) in a region of `words` words.
    pub(super) fn new(writer: usize, words: usize) -> Self {
        // Spread over the page's cache lines, so that writers do not share one.
        let slot = (writer * 8 + writer / 64) % PAGE_WORDS;
        Self { slot, versions: vec![0; words / PAGE_WORDS] }
    }

    /// Pages, each with one owned word.
    pub(super) fn pages(&self) -> usize {
        self.versions.len()
    }

    /// The owned word of a page.
    pub(super) fn index(&self, page: usize) -> usize {
        page * PAGE_WORDS + self.slot
    }

    /// What it must hold.
    pub(super) fn expected(&self, page: usize, content: &Content) -> u64 {
        content.word(self.index(page), self.versions[page])
    }

    /// The value of its next version, which is now expected.
    pub(super) fn next(&mut self, page: usize, content: &Content) -> u64 {
        self.versions[page] = self.versions[page].wrapping_add(1);
        self.expected(page, content)
    }

    /// Checks every owned word and writes version 0 again. Counts those that are wrong, and
    /// gives one of them.
    pub(super) fn settle(mut self, words: Words<'_>, content: &Content) -> Option<(u64, Mismatch)> {
        let (mut wrong, mut last) = (0, None);
        for page in 0..self.pages() {
            let index = self.index(page);
            let (found, expected) = (words.load(index), self.expected(page, content));
            if found != expected {
                wrong += 1;
                last = Some(Mismatch { word: index, found, expected });
            }
            self.versions[page] = 0;
            words.store(index, self.expected(page, content));
        }
        last.map(|mismatch| (wrong, mismatch))
    }
}

/// Random numbers for choosing pages (xorshift64*, Vigna 2016); fast, and not for secrets.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// A sequence for each seed.
    pub(super) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// A number below `bound`.
    #[inline]
    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        usize::try_from((high * bound as u64) >> 32).unwrap_or(0)
    }
}

/// A count that threads share, for words found wrong.
#[derive(Debug, Default)]
pub(super) struct Tally(AtomicU64);

impl Tally {
    /// Adds some. Relaxed: it is read after the threads have been joined.
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The sum.
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTENT: Content = Content { seed: 42, threads: 2 };

    #[test]
    fn words_differ_by_place_seed_and_version() {
        let one = CONTENT.word(1, 0);
        assert_ne!(one, CONTENT.word(2, 0));
        assert_ne!(one, CONTENT.word(1, 1));
        assert_ne!(one, Content { seed: 43, ..CONTENT }.word(1, 0));
        assert_ne!(one, 0);
    }

    #[test]
    fn the_lowest_wrong_word_is_named_whoever_finds_it() {
        let wrong = |index: usize| {
            (index >= 1500).then_some(Mismatch { word: index, found: 0, expected: 1 })
        };
        let found = CONTENT.spread(0..4096, wrong).expect("a mismatch");
        assert_eq!(found.word, 1500);
        assert_eq!(CONTENT.spread(0..1500, wrong), None);
    }

    #[test]
    fn writers_own_different_words_of_a_page() {
        let slots: std::collections::HashSet<_> =
            (0..64).map(|writer| Owned::new(writer, PAGE_WORDS).index(0)).collect();
        assert_eq!(slots.len(), 64);
    }

    #[test]
    fn random_numbers_stay_below_their_bound_and_reach_all_of_it() {
        let mut random = Random::new(7);
        let mut seen = [false; 10];
        for _ in 0..1000 {
            seen[random.below(10)] = true;
        }
        assert!(seen.iter().all(|&s| s));
    }
}
