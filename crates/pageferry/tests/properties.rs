//! Properties of moves and of the allocator, for inputs that nobody thought of.

mod support;
mod trial;

use allocator_api2::alloc::Allocator;
use allocator_api2::vec::Vec as RegionVec;
use hashbrown::HashMap;
use pageferry::{Division, Engine, FolioSize, Folios, Frames, HUGE, Order, Outcome, RegionAlloc};
use pageferry_sys::page_size;
use proptest::prelude::*;
use std::alloc::Layout;
use std::collections::HashMap as Map;
use std::hash::BuildHasherDefault;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};
use support::{build, first_node, promised, value, word};
use trial::{accounted, small};

/// The budget of spare frames of the engine under test.
const BUDGET: usize = 8 << 20;
/// Huge blocks of a region under test.
const BLOCKS: usize = 4;

fn engine() -> Option<&'static Engine> {
    static ENGINE: OnceLock<Option<Engine>> = OnceLock::new();
    ENGINE.get_or_init(|| build(small().frame_budget(BUDGET))).as_ref()
}

/// What a block of the region holds before the move.
#[derive(Clone, Debug)]
enum Block {
    Empty,
    Huge,
    /// Base pages: those touched.
    Base(Vec<bool>),
}

fn block() -> impl Strategy<Value = Block> {
    let pages = HUGE / page_size();
    prop_oneof![
        1 => Just(Block::Empty),
        2 => Just(Block::Huge),
        4 => proptest::collection::vec(any::<bool>(), pages).prop_map(Block::Base),
        2 => Just(Block::Base(vec![true; pages])),
    ]
}

/// Ranges in pages, which may overlap.
fn ranges() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let pages = BLOCKS * HUGE / page_size();
    let one = (0..pages, 1..600usize).prop_map(move |(start, len)| (start, len.min(pages - start)));
    proptest::collection::vec(one, 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_page_asked_for_is_reported_once_and_none_changes(
        blocks in proptest::collection::vec(block(), BLOCKS),
        ranges in ranges(),
        live in any::<bool>(),
        shared in any::<bool>(),
        source in 0..3usize,
        batch in 0..10u32,
    ) {
        let Some(engine) = engine() else { return Ok(()) };
        let page = page_size();
        let region = promised(engine.map(BLOCKS * HUGE).folios(Folios::Base)).build().expect("memory");
        let mut there = vec![false; BLOCKS * HUGE / page];
        for (i, block) in blocks.iter().enumerate() {
            let touched = match block {
                Block::Empty => vec![false; HUGE / page],
                Block::Huge => {
                    region.advise(i * HUGE..(i + 1) * HUGE, Folios::Huge).expect("advice");
                    vec![true; HUGE / page]
                }
                Block::Base(touched) => touched.clone(),
            };
            there[i * HUGE / page..(i + 1) * HUGE / page].copy_from_slice(&touched);
        }
        let first_word = |p: usize| p * page / 8 + p % 512;
        for p in (0..there.len()).filter(|p| there[*p]) {
            word(&region, first_word(p)).store(value(p, 1), std::sync::atomic::Ordering::Relaxed);
        }
        let huge_there = region
            .residency()
            .expect("residency")
            .iter()
            .any(|r| r.folio == FolioSize::Huge);
        let mut part = region.to(first_node(engine));
        for &(start, len) in &ranges {
            part = part.range(start * page..(start + len) * page);
        }
        let report = engine
            .migrate(part)
            .even_if_there()
            .order(if live { Order::Live } else { Order::Frozen })
            .division(if shared { Division::Shared } else { Division::Conducted })
            .frames([Frames::Recycled, Frames::Fresh, Frames::KernelCopy][source])
            .batch_bytes(page << batch)
            .run()
            .expect("a move");
        let mut asked = vec![false; there.len()];
        for &(start, len) in &ranges {
            asked[start..start + len].fill(true);
        }
        let asked_bytes: Vec<_> =
            (0..asked.len()).filter(|p| asked[*p]).map(|p| p * page..(p + 1) * page).collect();
        accounted(&report, &region, &asked_bytes);
        for (range, outcome) in &report.pages {
            for p in range.clone().step_by(page).map(|a| (a - region.addr()) / page) {
                match outcome {
                    Outcome::Moved => prop_assert!(there[p], "page {p} moved from nowhere"),
                    Outcome::NotPresent => prop_assert!(!there[p], "page {p} was there"),
                    // Only huge pages can be asked for in part, or lack a frame of their size.
                    Outcome::Busy(_) | Outcome::NoFrame(_) => {
                        prop_assert!(huge_there, "page {p}: {outcome}");
                    }
                    other => prop_assert!(false, "page {p}: {other}"),
                }
            }
        }
        for (p, there) in there.iter().enumerate() {
            let found = word(&region, first_word(p)).load(std::sync::atomic::Ordering::Relaxed);
            prop_assert_eq!(found, if *there { value(p, 1) } else { 0 }, "page {}", p);
        }
        let stats = engine.stats();
        let at_rest: usize = stats.frames.iter().map(|f| f.populated_bytes).sum();
        prop_assert!(at_rest <= stats.frame_bytes, "{stats:?}");
        // What it has beyond the program is within its budget, but for one batch on its way.
        prop_assert!(stats.frame_bytes <= BUDGET + HUGE, "{stats:?}");
    }
}

/// A block given out, and the byte that it was filled with.
struct Held {
    start: NonNull<u8>,
    layout: Layout,
    mark: u8,
}

impl Held {
    fn fill(&self) {
        // SAFETY: the block is ours, of that size.
        unsafe { self.start.as_ptr().write_bytes(self.mark, self.layout.size()) };
    }
    fn check(&self, bytes: usize) {
        for i in 0..bytes {
            // SAFETY: as above.
            assert_eq!(unsafe { self.start.as_ptr().add(i).read() }, self.mark, "byte {i}");
        }
    }
    fn overlaps(&self, other: &Self) -> bool {
        let (a, b) = (self.start.addr().get(), other.start.addr().get());
        a < b + other.layout.size() && b < a + self.layout.size()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Allocate { size: usize, align: u32 },
    Free(usize),
    Resize(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let size = prop_oneof![4 => 1..256usize, 2 => 1..8192usize, 1 => 1..100_000usize];
    prop_oneof![
        4 => (size.clone(), 0..14u32).prop_map(|(size, align)| Step::Allocate { size, align }),
        2 => any::<usize>().prop_map(Step::Free),
        2 => (any::<usize>(), size).prop_map(|(which, size)| Step::Resize(which, size)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn blocks_are_aligned_disjoint_and_keep_their_content(
        steps in proptest::collection::vec(step(), 1..120)
    ) {
        let Some(engine) = engine() else { return Ok(()) };
        let region = Arc::new(engine.map(8 << 20).build().expect("memory"));
        let heap = RegionAlloc::new(Arc::clone(&region));
        let mut held: Vec<Held> = Vec::new();
        for (turn, step) in steps.into_iter().enumerate() {
            match step {
                Step::Allocate { size, align } => {
                    let layout = Layout::from_size_align(size, 1 << align).expect("small");
                    // A full region is an answer, too.
                    let Ok(block) = heap.allocate(layout) else { continue };
                    let mark = u8::try_from(turn % 251).expect("small");
                    let new = Held { start: block.cast(), layout, mark };
                    prop_assert!(block.len() >= size);
                    prop_assert!(new.start.addr().get().is_multiple_of(1 << align));
                    let end = new.start.addr().get() + size;
                    prop_assert!(region.addresses().contains(&new.start.addr().get()));
                    prop_assert!(end <= region.addresses().end);
                    prop_assert!(!held.iter().any(|h| h.overlaps(&new)));
                    new.fill();
                    held.push(new);
                }
                Step::Free(which) if !held.is_empty() => {
                    let gone = held.swap_remove(which % held.len());
                    gone.check(gone.layout.size());
                    // SAFETY: allocated here with this layout, and used no more.
                    unsafe { heap.deallocate(gone.start, gone.layout) };
                }
                Step::Resize(which, size) if !held.is_empty() => {
                    let mut block = held.swap_remove(which % held.len());
                    let old = block.layout;
                    let new = Layout::from_size_align(size, old.align()).expect("small");
                    // SAFETY: allocated here with the old layout; the new size is not less
                    // (grow) or not more (shrink).
                    let resized = unsafe {
                        if size >= old.size() {
                            heap.grow(block.start, old, new)
                        } else {
                            heap.shrink(block.start, old, new)
                        }
                    };
                    if let Ok(start) = resized {
                        block.start = start.cast();
                        block.layout = new;
                        prop_assert!(block.start.addr().get().is_multiple_of(new.align()));
                        block.check(size.min(old.size()));
                        block.fill();
                    }
                    prop_assert!(!held.iter().any(|h| h.overlaps(&block)));
                    held.push(block);
                }
                Step::Free(_) | Step::Resize(..) => {}
            }
            let given: usize = held.iter().map(|h| h.layout.size()).sum();
            prop_assert!(heap.used_bytes() >= given);
            prop_assert!(heap.high_water_bytes() >= heap.used_bytes());
        }
        for block in held {
            block.check(block.layout.size());
            // SAFETY: allocated here with this layout, and used no more.
            unsafe { heap.deallocate(block.start, block.layout) };
        }
        prop_assert_eq!(heap.used_bytes(), 0);
    }

    #[test]
    fn collections_in_a_region_agree_with_ordinary_ones_while_it_moves(
        pairs in proptest::collection::vec((0..500u32, any::<u64>()), 1..400),
        removed in proptest::collection::vec(0..500u32, 0..100),
    ) {
        let Some(engine) = engine() else { return Ok(()) };
        let region = Arc::new(engine.map(4 << 20).build().expect("memory"));
        let heap = RegionAlloc::new(Arc::clone(&region));
        let part = region.to(first_node(engine));
        let moving = engine.migrate(part).even_if_there().start().expect("a move");
        let hasher = BuildHasherDefault::<std::hash::DefaultHasher>::default();
        let mut map = HashMap::with_hasher_in(hasher, heap.clone());
        let mut list = RegionVec::new_in(heap.clone());
        let (mut model, mut plain) = (Map::new(), Vec::new());
        for (key, value) in pairs {
            prop_assert_eq!(map.insert(key, value), model.insert(key, value));
            list.push(value);
            plain.push(value);
        }
        for key in removed {
            prop_assert_eq!(map.remove(&key), model.remove(&key));
        }
        moving.wait().expect("a report");
        prop_assert_eq!(&list[..], &plain[..]);
        prop_assert_eq!(map.len(), model.len());
        prop_assert!(model.iter().all(|(key, value)| map.get(key) == Some(value)));
        drop((map, list));
        prop_assert_eq!(heap.used_bytes(), 0);
    }
}
