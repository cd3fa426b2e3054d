//! The index against a search that reads every document.

#![allow(clippy::cast_possible_truncation, reason = "six words and short documents")]

use super::index::{Answer, Index};
use super::text::{Grouped, Vocabulary};
use allocator_api2::alloc::Global;
use proptest::prelude::*;
use std::collections::BTreeMap;

const WORDS: [&str; 6] = ["page", "folio", "node", "frame", "pool", "tier"];

/// Documents by their number, as word numbers.
type Texts = BTreeMap<u32, Vec<u32>>;

#[derive(Clone, Debug)]
enum Step {
    Add(Vec<u32>),
    Remove(prop::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let document = prop::collection::vec(0..WORDS.len() as u32, 1..20);
    let step = prop_oneof![
        3 => document.prop_map(Step::Add),
        2 => any::<prop::sample::Index>().prop_map(Step::Remove),
    ];
    prop::collection::vec(step, 0..60)
}

fn vocabulary() -> Vocabulary {
    let mut vocabulary = Vocabulary::default();
    for word in WORDS {
        vocabulary.number(word);
    }
    vocabulary
}

fn build(steps: &[Step], vocabulary: &Vocabulary) -> (Index<Global>, Texts) {
    let mut index = Index::new_in(Global);
    let mut texts = Texts::new();
    let mut grouped = Grouped::default();
    for (doc, step) in (0..).zip(steps) {
        match step {
            Step::Add(text) => {
                grouped.set(text);
                assert!(index.add(doc, &grouped, vocabulary).is_ok());
                texts.insert(doc, text.clone());
            }
            Step::Remove(which) if !texts.is_empty() => {
                let doc = *which.get(&texts.keys().collect::<Vec<_>>());
                let doc = *doc;
                grouped.set(&texts[&doc]);
                index.remove(doc, &grouped, vocabulary);
                texts.remove(&doc);
            }
            Step::Remove(_) => {}
        }
    }
    (index, texts)
}

/// Matches and the first one's place for each document that has any.
fn naive(texts: &Texts, matches: impl Fn(&[u32]) -> Vec<usize>) -> Vec<(u32, u32, u64)> {
    let all = texts.iter().map(|(&doc, text)| (doc, matches(text)));
    all.filter(|(_, at)| !at.is_empty())
        .map(|(doc, at)| (doc, at[0] as u32, at.len() as u64))
        .collect()
}

fn places(text: &[u32], word: u32) -> Vec<usize> {
    (0..text.len()).filter(|&at| text[at] == word).collect()
}

fn check(answer: &Answer, expected: &[(u32, u32, u64)]) {
    assert_eq!(answer.documents as usize, expected.len());
    assert_eq!(answer.matches, expected.iter().map(|e| e.2).sum::<u64>());
    let mut best: Vec<u64> = expected.iter().map(|e| e.2).collect();
    best.sort_unstable_by(|a, b| b.cmp(a));
    best.resize(answer.best.len().max(best.len()), 0);
    let answered: Vec<u64> = answer.best.iter().map(|b| u64::from(b.0)).collect();
    assert_eq!(answered, best[..answer.best.len()]);
    for (matches, doc) in answer.best.iter().filter(|b| b.0 > 0) {
        assert!(expected.iter().any(|e| e.0 == *doc && e.2 == u64::from(*matches)));
    }
}

proptest! {
    #[test]
    fn every_answer_is_that_of_a_search_through_all_documents(steps in steps()) {
        let vocabulary = vocabulary();
        let (index, texts) = build(&steps, &vocabulary);
        let all = 0..WORDS.len() as u32;
        for a in all.clone() {
            let word = WORDS[a as usize];
            check(&index.one(word), &naive(&texts, |t| places(t, a)));
            for b in all.clone().filter(|&b| b != a) {
                let other = WORDS[b as usize];
                check(&index.both(word, other), &naive(&texts, |t| {
                    let (mut x, y) = (places(t, a), places(t, b));
                    if x.is_empty() || y.is_empty() {
                        return Vec::new();
                    }
                    x.extend(y);
                    x.sort_unstable();
                    x
                }));
                for c in all.clone() {
                    let phrase = [a, b, c];
                    let words = phrase.map(|n| WORDS[n as usize]);
                    check(&index.phrase(&words), &naive(&texts, |t| {
                        (0..t.len()).filter(|&at| t[at..].starts_with(&phrase)).collect()
                    }));
                }
            }
        }
    }

    #[test]
    fn two_indexes_with_the_same_history_answer_alike_and_compare_equal(steps in steps()) {
        let vocabulary = vocabulary();
        let (a, texts) = build(&steps, &vocabulary);
        let (b, _) = build(&steps, &vocabulary);
        for word in WORDS {
            prop_assert_eq!(a.one(word), b.one(word));
        }
        let compared = a.compare(&b);
        prop_assert_eq!(compared.differing, 0);
        let positions: usize = texts.values().map(Vec::len).sum();
        prop_assert_eq!(compared.positions, positions as u64);
    }

    #[test]
    fn one_document_more_is_a_difference_in_either_direction(steps in steps(), word in 0..6u32) {
        let vocabulary = vocabulary();
        let (a, _) = build(&steps, &vocabulary);
        let (mut b, _) = build(&steps, &vocabulary);
        let mut grouped = Grouped::default();
        grouped.set(&[word]);
        prop_assert!(b.add(1000, &grouped, &vocabulary).is_ok());
        prop_assert_eq!(a.compare(&b).differing, 1);
        prop_assert_eq!(b.compare(&a).differing, 1);
        b.remove(1000, &grouped, &vocabulary);
        prop_assert_eq!(a.compare(&b).differing, 0);
    }
}

#[test]
fn answers_that_differ_in_one_place_have_different_digests() {
    let vocabulary = vocabulary();
    let answer = |text: &[u32]| build(&[Step::Add(text.to_vec())], &vocabulary).0.one("page");
    assert_ne!(answer(&[0, 1]), answer(&[1, 0]), "the place of the first match counts");
    assert_eq!(answer(&[0, 1]), answer(&[0, 1]));
}

#[test]
fn what_is_nowhere_is_not_found() {
    let (index, _) = build(&[Step::Add(vec![0, 1])], &vocabulary());
    assert_eq!(index.one("absent"), Answer::default());
    assert_eq!(index.both("page", "absent"), Answer::default());
    assert_eq!(index.phrase(&["page", "absent"]), Answer::default());
    assert_eq!(index.phrase(&["folio", "page"]), Answer::default());
    assert_eq!(index.phrase(&[]), Answer::default());
}
