//! Everything at once for as long as told (`PAGEFERRY_SOAK_SECONDS`, default 5): migrations,
//! exchanges, cancels, racing readers and writers, discarded and newly touched pages, all chosen
//! at random. `PAGEFERRY_SOAK_SEED` repeats a choice.

mod support;
mod trial;

use pageferry::{Engine, Folios, Frames, Outcome, Region};
use pageferry_sys::page_size;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};
use support::{Racers, build, fill, nodes, promised, value, word};
use trial::{Numbers, Watchdog, small};

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Discards pages and touches them again: after `madvise` has returned they are zero, and what is
/// written then stays.
fn discard(region: &Region, stop: &AtomicBool, seed: u64) -> u64 {
    let (mut numbers, page, mut count) = (Numbers::new(seed), page_size(), 0);
    while !stop.load(Ordering::Relaxed) {
        let first = numbers.below(region.len() / page);
        let pages = (1 + numbers.below(32)).min(region.len() / page - first);
        // SAFETY: part of the region, which nobody but this thread uses; its content is given up.
        let done = unsafe {
            libc::madvise(
                region.as_ptr().add(first * page).cast(),
                pages * page,
                libc::MADV_DONTNEED,
            )
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        for at in (first..first + pages).map(|p| p * page / 8) {
            assert_eq!(word(region, at + 1).load(Ordering::Relaxed), 0, "word {at} came back");
            word(region, at).store(value(at, 1), Ordering::Relaxed);
        }
        for at in (first..first + pages).map(|p| p * page / 8) {
            assert_eq!(word(region, at).load(Ordering::Relaxed), value(at, 1), "word {at}");
            assert_eq!(word(region, at + 1).load(Ordering::Relaxed), 0, "word {}", at + 1);
        }
        count += 1;
    }
    count
}

/// One random move, perhaps cancelled.
fn step(engine: &Engine, regions: &[Arc<Region>], numbers: &mut Numbers) -> u64 {
    let (home, away) = nodes(engine);
    let part = |numbers: &mut Numbers, region: &Region| {
        let mut part = region.to(numbers.pick(&[home, away]));
        let (page, pages) = (page_size(), region.len() / page_size());
        // None: the whole region.
        for _ in 0..numbers.below(4) {
            let first = numbers.below(pages);
            let end = first + 1 + numbers.below(pages - first);
            part = part.range(first * page..end * page);
        }
        part
    };
    let one = numbers.below(regions.len());
    let first = part(numbers, &regions[one]);
    let moving = if numbers.below(4) == 0 {
        let other = (one + 1 + numbers.below(regions.len() - 1)) % regions.len();
        let second = part(numbers, &regions[other]);
        engine.exchange(first, second)
    } else {
        engine.migrate(first)
    };
    let moving = moving
        .even_if_there()
        .frames(numbers.pick(&[
            Frames::Recycled,
            Frames::Recycled,
            Frames::Fresh,
            Frames::KernelCopy,
        ]))
        .stall_budget(Duration::from_micros(50 << numbers.below(8)))
        .threads(1 + numbers.below(2))
        .batch_bytes(page_size() << numbers.below(10));
    let moving = numbers.in_some_way(moving);
    let report = if numbers.below(4) == 0 {
        let handle = moving.start().expect("a move");
        let until = Instant::now() + Duration::from_micros(numbers.next() % 3000);
        while Instant::now() < until && !handle.is_finished() {
            std::hint::spin_loop();
        }
        handle.cancel();
        handle.wait().expect("a report")
    } else {
        moving.run().expect("a move")
    };
    // Each page once: ascending, disjoint.
    let starts_after = |w: &[(std::ops::Range<usize>, Outcome)]| w[0].0.end <= w[1].0.start;
    assert!(report.pages.windows(2).all(starts_after), "{report:?}");
    report.bytes_moved
}

#[test]
fn soak() {
    let seconds = from_environment("PAGEFERRY_SOAK_SECONDS").unwrap_or(5);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_secs());
    let seed = from_environment("PAGEFERRY_SOAK_SEED").unwrap_or(now);
    eprintln!("soaking for {seconds} s, seed {seed}");
    let _watchdog = Watchdog::seconds(seconds + 60, "the soak");
    let Some(engine) = build(small()) else { return };
    let make = |bytes: usize, folios| {
        Arc::new(promised(engine.map(bytes).folios(folios)).build().expect("memory for the test"))
    };
    let regions: Vec<_> =
        [(8 << 20, Folios::Base), (16 << 20, Folios::Huge), (8 << 20, Folios::Mixed)]
            .map(|(bytes, folios)| make(bytes, folios))
            .into();
    regions[2].advise(2 << 20..4 << 20, Folios::Huge).expect("advice");
    let racers: Vec<_> = regions
        .iter()
        .map(|region| {
            fill(region, 0..region.len());
            Racers::start(region, usize::from(region.len() > 8 << 20), 1)
        })
        .collect();
    let scratch = make(4 << 20, Folios::Mixed);
    let moving: Vec<_> = regions.iter().chain([&scratch]).cloned().collect();
    let stop = AtomicBool::new(false);
    let (moves, bytes, discards) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        // A panic of any thread stops the others: the scope then ends with it.
        struct StopAll<'a>(&'a AtomicBool);
        impl Drop for StopAll<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        scope.spawn(|| {
            let _stop = StopAll(&stop);
            discards.store(discard(&scratch, &stop, seed), Ordering::Relaxed);
        });
        for mover in 0..2 {
            let (engine, moving, stop, moves, bytes) = (&engine, &moving, &stop, &moves, &bytes);
            scope.spawn(move || {
                let _stop = StopAll(stop);
                let mut numbers = Numbers::new(seed + 1 + mover);
                let until = Instant::now() + Duration::from_secs(seconds);
                while Instant::now() < until && !stop.load(Ordering::Relaxed) {
                    bytes.fetch_add(step(engine, moving, &mut numbers), Ordering::Relaxed);
                    moves.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let accesses: u64 = racers.into_iter().map(Racers::finish).sum();
    let stats = engine.stats();
    assert!(stats.frame_bytes <= 2 * (16 << 20), "spare frames grew: {stats:?}");
    assert!(moves.into_inner() > 0 && bytes.into_inner() > 0 && discards.into_inner() > 0);
    assert!(accesses > 0);
    eprintln!("{} moves, {} MiB, {accesses} accesses", stats.moves, stats.bytes_moved >> 20);
}
