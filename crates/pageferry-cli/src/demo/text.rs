//! Words: how text is cut into them, and the numbers they go by in ordinary memory.
//!
//! A word is a run of letters and digits, lower case. The corpus keeps its documents as word
//! numbers, so that a document can be indexed again, or taken out of the index again, without
//! reading its file again. The index itself holds the words, not the numbers.

use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::BuildHasher;

/// Bytes in a word at most; a longer run is cut (such runs are encoded data, not language).
pub(super) const LONGEST_WORD: usize = 64;

/// Calls `each` with every word of `text`, in order.
pub(super) fn words(text: &str, mut each: impl FnMut(&str)) {
    let mut word = String::with_capacity(LONGEST_WORD + 16);
    for c in text.chars() {
        if c.is_ascii_alphanumeric() {
            word.push(c.to_ascii_lowercase());
        } else if !c.is_ascii() && c.is_alphanumeric() {
            word.extend(c.to_lowercase());
        } else if !word.is_empty() {
            each(&word);
            word.clear();
        }
        if word.len() >= LONGEST_WORD {
            each(&word);
            word.clear();
        }
    }
    if !word.is_empty() {
        each(&word);
    }
}

/// Every word seen so far, by number.
#[derive(Debug, Default)]
pub(super) struct Vocabulary {
    words: Vec<Box<str>>,
    numbers: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl Vocabulary {
    /// The number of `word`, a new one if it has none. `None` when all 2^32 are taken.
    pub(super) fn number(&mut self, word: &str) -> Option<u32> {
        let Self { words, numbers, hasher } = self;
        let slot = numbers.entry(
            hasher.hash_one(word),
            |&n| *words[n as usize] == *word,
            |&n| hasher.hash_one(&*words[n as usize]),
        );
        match slot {
            Entry::Occupied(slot) => Some(*slot.get()),
            Entry::Vacant(slot) => {
                let number = u32::try_from(words.len()).ok()?;
                words.push(word.into());
                slot.insert(number);
                Some(number)
            }
        }
    }

    /// The word that goes by `number`, which this vocabulary gave out.
    pub(super) fn word(&self, number: u32) -> &str {
        &self.words[number as usize]
    }

    /// How many words there are.
    pub(super) fn len(&self) -> usize {
        self.words.len()
    }
}

/// The words of one document with their places, brought together word by word: what indexing a
/// document needs. Reused from document to document, so that it allocates once.
#[derive(Debug, Default)]
pub(super) struct Grouped {
    /// Word number in the upper half, position in the lower.
    pairs: Vec<u64>,
    /// The positions alone, in the order of `pairs`.
    positions: Vec<u32>,
}

impl Grouped {
    /// Takes the document whose words are `numbers`.
    pub(super) fn set(&mut self, numbers: &[u32]) {
        self.pairs.clear();
        let pairs = (0u64..).zip(numbers).map(|(at, &n)| u64::from(n) << 32 | at);
        self.pairs.extend(pairs);
        self.pairs.sort_unstable();
        self.positions.clear();
        #[allow(clippy::cast_possible_truncation, reason = "the lower half is what is wanted")]
        self.positions.extend(self.pairs.iter().map(|&pair| pair as u32));
    }

    /// Every word of the document once, with its positions in ascending order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &[u32])> {
        let mut start = 0;
        self.pairs.chunk_by(|a, b| a >> 32 == b >> 32).map(move |run| {
            let positions = &self.positions[start..start + run.len()];
            start += run.len();
            #[allow(clippy::cast_possible_truncation, reason = "the upper half fits")]
            let number = (run[0] >> 32) as u32;
            (number, positions)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> Vec<String> {
        let mut out = Vec::new();
        words(text, |word| out.push(word.to_owned()));
        out
    }

    #[test]
    fn a_word_is_a_run_of_letters_and_digits_in_lower_case() {
        assert_eq!(cut("Folio-by-folio, 4K pages!"), ["folio", "by", "folio", "4k", "pages"]);
        assert_eq!(cut("Größe ÉTÉ\u{a0}x"), ["größe", "été", "x"]);
        assert_eq!(cut(" \n-- "), [""; 0]);
    }

    #[test]
    fn a_run_that_is_too_long_is_cut() {
        let long = "a".repeat(LONGEST_WORD * 2 + 3);
        let lengths: Vec<_> = cut(&long).iter().map(String::len).collect();
        assert_eq!(lengths, [LONGEST_WORD, LONGEST_WORD, 3]);
    }

    #[test]
    fn a_word_keeps_its_number() {
        let mut vocabulary = Vocabulary::default();
        let numbers: Vec<_> =
            ["a", "b", "a", "c", "b"].iter().map(|w| vocabulary.number(w)).collect();
        assert_eq!(numbers, [Some(0), Some(1), Some(0), Some(2), Some(1)]);
        assert_eq!((vocabulary.word(2), vocabulary.len()), ("c", 3));
    }

    #[test]
    fn grouping_brings_the_places_of_a_word_together() {
        let mut grouped = Grouped::default();
        grouped.set(&[7, 3, 7, 7, 1]);
        let all: Vec<(u32, Vec<u32>)> = grouped.iter().map(|(n, p)| (n, p.to_vec())).collect();
        assert_eq!(all, [(1, vec![4]), (3, vec![1]), (7, vec![0, 2, 3])]);
        grouped.set(&[]);
        assert_eq!(grouped.iter().count(), 0);
    }
}
