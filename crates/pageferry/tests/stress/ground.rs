//! The memory that is moved, and whose words are whose: every word can be verified at any time by
//! whoever reads it.
//!
//! A plot is a region. Its first page is the signal handlers'. Then come *lines* of 64 words, of
//! which one is written, by one faulting thread; then pages that one thread gives up; and at the end of
//! a plot that was adopted, pages that are unmapped, remapped and protected.

#![allow(unreachable_pub, reason = "a test binary exports nothing")]

use crate::support::siege::{advise, far_address, map_at, ptr};
use crate::support::{fill, promised, value, word};
use pageferry::{Engine, Folios, HUGE, References, Region};
use pageferry_sys::page_size;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Words of a line.
const LINE: usize = 64;

/// One region.
#[derive(Debug)]
pub struct Plot {
    pub region: Arc<Region>,
    pub name: &'static str,
    /// Bytes with lines.
    lines: Range<usize>,
    /// Bytes whose pages are given up and touched again.
    pub given: Range<usize>,
    /// Bytes whose mappings change.
    pub victim: Range<usize>,
    /// How often the word of each line was written.
    rounds: Box<[AtomicU64]>,
    /// How often the handlers have added to each of their words, after they did.
    heard: Box<[AtomicU64]>,
}

/// What there is on a machine with one node, too: own memory and adopted memory, base pages and huge
/// ones, with a promise and without.
pub fn plots(engine: &Engine) -> Vec<Plot> {
    let own = |bytes, folios| engine.map(bytes).folios(folios);
    let built = |region: pageferry::RegionBuilder| region.build().expect("memory for the test");
    let adopted = |blocks: usize, advice, references| {
        // Neither end at the boundary of a block.
        let (start, len) = (far_address() + HUGE / 4, blocks * HUGE + HUGE / 2);
        map_at(start, len);
        advise(start..start + len, advice);
        // SAFETY: mapped just now, private and anonymous, and for the test alone; of what it
        // unmaps or replaces it expects that a move may call it gone.
        let region = unsafe { engine.adopt(ptr(start).cast(), len, references) };
        region.expect("mapped, and nobody else's")
    };
    let (base, huge) = (libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE);
    let (possible, never) = (References::Possible, References::Never);
    vec![
        Plot::new("own base", built(promised(own(4 * HUGE, Folios::Base))), true, false),
        Plot::new("own huge", built(promised(own(8 * HUGE, Folios::Huge))), false, false),
        Plot::new("own mixed, references", built(own(4 * HUGE, Folios::Mixed)), true, false),
        Plot::new("own huge, references", built(own(4 * HUGE, Folios::Huge)), true, false),
        Plot::new("adopted base, references", adopted(4, base, possible), true, true),
        Plot::new("adopted huge, references", adopted(5, huge, possible), false, true),
        Plot::new("adopted base", adopted(4, base, never), true, true),
    ]
}

impl Plot {
    fn new(name: &'static str, region: Region, gives: bool, changes: bool) -> Self {
        let len = region.len();
        // Parts of blocks, so that the others' pages are in the same segments.
        let victim = if changes { len - 3 * HUGE / 4..len } else { len..len };
        let given = if gives { victim.start - 3 * HUGE / 4..victim.start } else { len..len };
        let lines = page_size()..if gives { given.start } else { victim.start };
        let zeros = |n| (0..n).map(|_| AtomicU64::new(0)).collect();
        let region = Arc::new(region);
        fill(&region, lines.clone());
        fill(&region, victim.clone());
        let rounds = zeros(lines.len() / (8 * LINE));
        Self { region, name, lines, given, victim, rounds, heard: zeros(page_size() / 8) }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        word(&self.region, index)
    }

    pub fn lines(&self) -> usize {
        self.rounds.len()
    }

    /// The word of a line that is written.
    fn written(&self, line: usize) -> usize {
        self.lines.start / 8 + line * LINE + line * 11 % LINE
    }

    /// Its writer verifies what it wrote last, and writes what comes next.
    pub fn write(&self, line: usize) {
        let (index, round) = (self.written(line), self.rounds[line].load(Ordering::Relaxed));
        let found = self.word(index).load(Ordering::Relaxed);
        self.expect(index, found, value(index, round), "what its thread wrote last");
        self.word(index).store(value(index, round + 1), Ordering::Relaxed);
        // A child of fork finds the word in this round or the next. Release: in this order.
        self.rounds[line].store(round + 1, Ordering::Release);
    }

    /// A word that nobody writes.
    pub fn read(&self, line: usize, word: usize) {
        let index = self.lines.start / 8 + line * LINE + word % LINE;
        if index != self.written(line) {
            let found = self.word(index).load(Ordering::Relaxed);
            self.expect(index, found, value(index, 0), "what nobody writes");
        }
    }

    /// The word of another thread: it may be written at any moment.
    pub fn glance(&self, line: usize) {
        let index = self.written(line);
        let before = self.rounds[line].load(Ordering::Acquire);
        let found = self.word(index).load(Ordering::Acquire);
        let after = self.rounds[line].load(Ordering::Acquire);
        // From `before` on, up to one that is written but not yet counted.
        let round = (found ^ value(index, 0)) & 0xFFFF_FFFF;
        if found != value(index, round) || round < before || round > after + 1 {
            self.expect(index, found, value(index, before), "what another thread writes");
        }
    }

    fn expect(&self, index: usize, found: u64, wanted: u64, what: &str) {
        assert_eq!(
            found,
            wanted,
            "{}: word {index} at {:#x}: {what}",
            self.name,
            self.region.addr() + index * 8
        );
    }

    /// What a signal handler does: adds to a word of its own, which others may be doing, too, and
    /// reads one that nobody writes. False: that one is wrong. Only atomics, no panic.
    pub fn hear(&self, n: usize) -> bool {
        let own = n % self.heard.len();
        // SAFETY: aligned and within the region, which is there as long as this plot.
        let at =
            |i: usize| unsafe { AtomicU64::from_ptr(self.region.as_ptr().cast::<u64>().add(i)) };
        at(own).fetch_add(1, Ordering::Relaxed);
        self.heard[own].fetch_add(1, Ordering::Release);
        let line = n.wrapping_mul(0x9E37_79B1) % self.rounds.len();
        let first = self.lines.start / 8 + line * LINE;
        let index = if self.written(line) == first { first + 1 } else { first };
        at(index).load(Ordering::Relaxed) == value(index, 0)
    }

    /// Whether all of this, as a child of fork has it, is what the parent had at one moment; `late` is
    /// how many handlers may have added without having counted it. Else a number that says what not.
    pub fn is_snapshot(&self, late: u64) -> Result<(), i32> {
        for line in 0..self.lines() {
            let (index, round) = (self.written(line), self.rounds[line].load(Ordering::Acquire));
            let found = self.word(index).load(Ordering::Relaxed);
            if found != value(index, round) && found != value(index, round + 1) {
                return Err(10);
            }
            let still = self.lines.start / 8 + line * LINE + (line * 11 + 1) % LINE;
            if self.word(still).load(Ordering::Relaxed) != value(still, 0) {
                return Err(11);
            }
        }
        for (own, counted) in self.heard.iter().enumerate() {
            let counted = counted.load(Ordering::Acquire);
            let found = self.word(own).load(Ordering::Relaxed);
            if found < counted || found > counted + late {
                return Err(12);
            }
        }
        Ok(())
    }

    /// Everything but the victim and what is given up, when all threads have ended.
    pub fn check(&self) {
        for line in 0..self.lines() {
            for index in (0..LINE).map(|i| self.lines.start / 8 + line * LINE + i) {
                let wrote = index == self.written(line);
                let round = if wrote { self.rounds[line].load(Ordering::Relaxed) } else { 0 };
                let found = self.word(index).load(Ordering::Relaxed);
                self.expect(index, found, value(index, round), "at the end");
            }
        }
        for (own, counted) in self.heard.iter().enumerate() {
            let found = self.word(own).load(Ordering::Relaxed);
            self.expect(own, found, counted.load(Ordering::Relaxed), "what handlers counted");
        }
    }
}
