//! The readers and writers of the scenario `feel`.
//!
//! Each access is timed by itself, the clock's cost included, and each word is checked. Readers
//! read words that nobody writes; a writer reads a word of its own, compares it with what it
//! wrote last, and writes the next version. So a lost write shows at once.
//!
//! The accesses follow each other without a pause (a closed loop): a stall counts once, however
//! many accesses it held up. How much of the time went by in long accesses is told too, and how
//! much of that because the thread had lost its CPU: a machine without a CPU to spare makes long
//! accesses whether memory moves or not.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pageferry_sys::sched;

use super::content::{Content, Owned, PAGE_WORDS, Random};
use super::lab::{Field, Trouble};
use super::probe::Words;
use super::stats::{Latencies, Timer};

/// What the accessors of one measurement have to say.
pub(super) struct Accesses {
    pub(super) readers: Latencies,
    pub(super) writers: Latencies,
    pub(super) wrong: u64,
    pub(super) owned: Vec<Owned>,
    pub(super) cpu: Duration,
}

/// Reads random words that no writer owns, until told to stop.
pub(super) fn read(
    words: Words<'_>,
    content: Content,
    writers: usize,
    id: usize,
    stop: &AtomicBool,
) -> Result<(Latencies, u64, u64), Trouble> {
    let mut timer = timer()?;
    let mut random = Random::new(content.seed ^ (0x5eed << 8) ^ id as u64);
    let taken: Vec<usize> = (0..writers).map(|w| Owned::new(w, PAGE_WORDS).index(0)).collect();
    let mut wrong = 0;
    // Relaxed: stopping publishes nothing, and needs to be seen soon, not at once.
    while !stop.load(Ordering::Relaxed) {
        let index = random.below(words.len());
        if taken.contains(&(index % PAGE_WORDS)) {
            continue;
        }
        let found = timer.time(|| words.load(index));
        wrong += u64::from(found != content.word(index, 0));
    }
    Ok((timer.end(), wrong, sched::thread_cpu_ns()))
}

/// Reads and rewrites owned words, until told to stop.
pub(super) fn write(
    words: Words<'_>,
    content: Content,
    mut owned: Owned,
    stop: &AtomicBool,
) -> Result<(Latencies, u64, Owned, u64), Trouble> {
    let mut timer = timer()?;
    let mut random = Random::new(content.seed.rotate_left(9) ^ owned.index(0) as u64);
    let mut wrong = 0;
    while !stop.load(Ordering::Relaxed) {
        let page = random.below(owned.pages());
        let index = owned.index(page);
        let expected = owned.expected(page, &content);
        let next = owned.next(page, &content);
        // Reading back and writing are one access: the read finds the page cold or away, the
        // write finds it protected.
        let found = timer.time(|| {
            let found = words.load(index);
            words.store(index, next);
            found
        });
        wrong += u64::from(found != expected);
    }
    Ok((timer.end(), wrong, owned, sched::thread_cpu_ns()))
}

fn timer() -> Result<Timer, Trouble> {
    Timer::new().map_err(|error| Trouble::Fail(error.to_string()))
}

fn latencies() -> Result<Latencies, Trouble> {
    Latencies::new().map_err(|error| Trouble::Fail(error.to_string()))
}

pub(super) type Reader<'scope> =
    thread::ScopedJoinHandle<'scope, Result<(Latencies, u64, u64), Trouble>>;
pub(super) type Writer<'scope> =
    thread::ScopedJoinHandle<'scope, Result<(Latencies, u64, Owned, u64), Trouble>>;

pub(super) fn join(
    readers: Vec<Reader<'_>>,
    writers: Vec<Writer<'_>>,
) -> Result<Accesses, Trouble> {
    let died = |_| Trouble::Fail("a reader or writer panicked".to_owned());
    let mut all = Accesses {
        readers: latencies()?,
        writers: latencies()?,
        wrong: 0,
        owned: Vec::new(),
        cpu: Duration::ZERO,
    };
    for reader in readers {
        let (latencies, wrong, cpu) = reader.join().map_err(died)??;
        all.readers.add(&latencies);
        all.wrong += wrong;
        all.cpu += Duration::from_nanos(cpu);
    }
    for writer in writers {
        let (latencies, wrong, owned, cpu) = writer.join().map_err(died)??;
        all.writers.add(&latencies);
        all.wrong += wrong;
        all.owned.push(owned);
        all.cpu += Duration::from_nanos(cpu);
    }
    Ok(all)
}

/// Compares every word of the region, and makes it as it was before.
pub(super) fn settle(
    field: &Field,
    words: Words<'_>,
    content: &Content,
    wrong: u64,
    owned: Vec<Owned>,
) -> Result<(), Trouble> {
    let mut lost = Vec::new();
    if wrong > 0 {
        lost.push(format!("{wrong} accesses saw a word that was not what had been written"));
    }
    for owned in owned {
        if let Some((count, mismatch)) = owned.settle(words, content) {
            lost.push(format!("{count} written words are lost, such as: {mismatch}"));
        }
    }
    if !lost.is_empty() {
        return Err(Trouble::Fail(lost.join("; ")));
    }
    field.check_all()
}
