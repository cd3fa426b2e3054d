//! Threads that move, in every way there is.

#![allow(unreachable_pub, reason = "a test binary exports nothing")]

use crate::ground::Plot;
use crate::hearing::{MOVING, take_again};
use crate::outside::Beat;
use crate::support::{check, fill, nodes, promised};
use crate::trial::Numbers;
use pageferry::{Division, Engine, Folios, Frames, MigrateError, Outcome, Overlap, Region, Report};
use pageferry_copy::model::{Behaviour, ModelEngine};
use pageferry_copy::{CopyBatch, CopyEngine, CopyOp};
use pageferry_sys::page_size;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What the movers did.
#[derive(Debug, Default)]
pub struct Did {
    pub moves: AtomicU64,
    pub bytes: AtomicU64,
    pub frozen: AtomicU64,
    pub live: AtomicU64,
    pub conducted: AtomicU64,
    pub shared: AtomicU64,
    pub by_device: AtomicU64,
    pub repairs: AtomicU64,
    pub cancelled: AtomicU64,
    pub refused: AtomicU64,
    pub regions: AtomicU64,
    pub copy_failed: AtomicU64,
    longest_us: AtomicU64,
}

impl Did {
    fn add(&self, report: &Report, device: bool) {
        let add = |to: &AtomicU64, n: u64| to.fetch_add(n, Ordering::Relaxed);
        add(&self.moves, 1);
        add(&self.bytes, report.bytes_moved);
        add(&self.frozen, report.batches_frozen);
        add(&self.live, report.batches_live);
        let conducted = report.division == Division::Conducted;
        add(if conducted { &self.conducted } else { &self.shared }, 1);
        add(&self.by_device, if device { report.bytes_moved } else { 0 });
        add(&self.repairs, report.repairs);
        add(&self.cancelled, u64::from(report.cancelled));
        add(&self.copy_failed, report.bytes(|o| o == Outcome::CopyFailed));
        let longest = u64::try_from(report.holes.longest.as_micros()).unwrap_or(u64::MAX);
        self.longest_us.fetch_max(longest, Ordering::Relaxed);
    }

    pub fn longest_hole(&self) -> Duration {
        Duration::from_micros(self.longest_us.load(Ordering::Relaxed))
    }
}

/// Copy engines other than the CPU's, good ones and bad ones. Their threads have begun: one that begins
/// allocates, and whoever has the allocator's lock may wait for what it is to copy.
pub fn devices() -> Vec<Arc<dyn CopyEngine>> {
    let threaded = [
        Behaviour::Faithful,
        Behaviour::Backwards,
        Behaviour::Fails { every: 7, code: 5 },
        Behaviour::Short { every: 5, by: 100 },
        Behaviour::Forgets { every: 9 },
    ];
    let threaded = threaded.map(|how| ModelEngine::threaded(how).expect("a thread"));
    let polled = ModelEngine::polled(Behaviour::Faithful);
    let engines = threaded.into_iter().chain([polled]);
    let warm = |engine: ModelEngine| {
        let (from, to) = ([1u8; 64], [0u8; 64]);
        let batch = CopyBatch::with_capacity(1);
        let (src, dst) = (from.as_ptr().expose_provenance(), to.as_ptr().expose_provenance());
        batch.fill([CopyOp { dst, src, len: 64 }]).expect("one operation");
        // SAFETY: both are there, and nobody else's, until the batch is done.
        unsafe { engine.submit(&batch) }.expect("a new engine");
        engine.wait(&batch);
        Arc::new(engine) as _
    };
    engines.map(warm).collect()
}

/// What all movers need.
pub struct Fleet<'a> {
    pub engine: &'a Engine,
    pub plots: &'a [Plot],
    pub devices: &'a [Arc<dyn CopyEngine>],
    pub did: &'a Did,
}

impl Fleet<'_> {
    /// Moves until told to stop.
    pub fn sail(&self, seed: u64, beat: &Beat, is_over: impl Fn() -> bool) {
        let mut numbers = Numbers::new(seed);
        while !is_over() {
            take_again();
            MOVING.set(true);
            match numbers.below(64) {
                0 => self.passing_region(&mut numbers),
                _ => self.step(&mut numbers),
            }
            MOVING.set(false);
            beat.beat();
        }
    }

    /// A region of this thread's own that comes, moves and goes.
    fn passing_region(&self, numbers: &mut Numbers) {
        let region = promised(self.engine.map(1 << 20).folios(Folios::Base)).build();
        let region = region.expect("memory for the test");
        fill(&region, 0..region.len());
        let (_, away) = nodes(self.engine);
        let part = region.to(away);
        let going = self.engine.migrate(part).even_if_there().start().expect("a move");
        if numbers.below(2) == 0 {
            check(&region, 0..region.len());
            self.did.add(&going.wait().expect("a report"), false);
            check(&region, 0..region.len());
        } else {
            drop(region);
            match going.wait() {
                Ok(report) => self.did.add(&report, false),
                // Its turn had not come.
                Err(MigrateError::RegionGone) => {}
                Err(other) => panic!("{other}"),
            }
        }
        self.did.regions.fetch_add(1, Ordering::Relaxed);
    }

    /// Bytes of a region: a few pages, some blocks, or all of it.
    fn some(region: &Region, numbers: &mut Numbers) -> Range<usize> {
        let pages = region.len() / page_size();
        let most = numbers.pick(&[16, 64, 64, 512, 512, 2048, pages]);
        let first = if most < pages { numbers.below(pages) } else { 0 };
        let count = if most < pages { 1 + numbers.below(most) } else { pages };
        first * page_size()..(first + count).min(pages) * page_size()
    }

    /// One move, chosen at random.
    fn step(&self, numbers: &mut Numbers) {
        let (home, away) = nodes(self.engine);
        let mut asked = 0;
        let mut part = |n: usize, numbers: &mut Numbers| {
            let region = &self.plots[n].region;
            let range = Self::some(region, numbers);
            asked += range.len();
            region.to(numbers.pick(&[home, away])).range(range)
        };
        let one = numbers.below(self.plots.len());
        let first = part(one, numbers);
        let moving = if numbers.below(6) == 0 {
            let other = (one + 1 + numbers.below(self.plots.len() - 1)) % self.plots.len();
            let second = part(other, numbers);
            self.engine.exchange(first, second)
        } else {
            self.engine.migrate(first)
        };
        // Single pages, of a few; more of many, or everybody waits for one move.
        let least = page_size() << if asked > 64 * page_size() { 6 } else { 0 };
        let frames = [
            Frames::Recycled,
            Frames::Recycled,
            Frames::Recycled,
            Frames::Fresh,
            Frames::KernelCopy,
        ];
        let mut moving = moving
            .even_if_there()
            .frames(numbers.pick(&frames))
            .stall_budget(Duration::from_micros(numbers.pick(&[100, 300, 1000, 3000, 10_000])))
            .threads(1 + numbers.below(4))
            .batch_bytes(least << numbers.below(4));
        moving = numbers.in_some_way(moving);
        let device = numbers.below(4) == 0;
        if device {
            let engine = &self.devices[numbers.below(self.devices.len())];
            moving = moving.engine(Arc::clone(engine));
        }
        if numbers.below(4) == 0 {
            moving = moving.if_overlapping(Overlap::Refuse);
        }
        let moved = match numbers.below(8) {
            0 => moving.start().and_then(|handle| {
                std::thread::sleep(Duration::from_micros(numbers.next() % 3000));
                handle.cancel();
                handle.wait()
            }),
            1 => moving.start().and_then(pageferry::Handle::wait),
            _ => moving.run(),
        };
        let report = match moved {
            Ok(report) => report,
            Err(MigrateError::Overlapping(_)) => {
                self.did.refused.fetch_add(1, Ordering::Relaxed);
                return std::thread::yield_now();
            }
            Err(other) => panic!("{other}"),
        };
        // Each page once: ascending, disjoint, and all of them.
        assert!(report.pages.windows(2).all(|w| w[0].0.end <= w[1].0.start), "{report:?}");
        assert_eq!(report.bytes(|_| true), asked as u64, "{report:?}");
        self.did.add(&report, device);
    }
}
