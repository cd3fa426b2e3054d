// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the work of a batch is shared out: among how many, in what pieces, on which CPUs.
//!
//! Pure arithmetic on numbers, with `core` alone: the kernel's modules (`kernel/modules`) compile
//! this same file, so that what is tested here is what decides there.

/// A copier is to find so many chunks in a batch: one that is slow or was woken late then keeps
/// the others waiting for a quarter of its share at most.
pub const CHUNKS_EACH: usize = 4;
/// Smaller chunks cost more in claiming them than they save in waiting.
pub const CHUNK_MIN: usize = 32 << 10;

/// Bytes that one claim takes of a batch of `bytes` which `copiers` work on: whole pages of `page`
/// bytes (not 0), at most `most` and at least a page, so that many small folios are spread and few
/// big ones split.
pub const fn chunk(bytes: usize, copiers: usize, most: usize, page: usize) -> usize {
    let copiers = if copiers == 0 { 1 } else { copiers };
    let share = bytes.div_ceil(copiers.saturating_mul(CHUNKS_EACH));
    let share = if share < CHUNK_MIN { CHUNK_MIN } else { share }.next_multiple_of(page);
    let most = if most < page { page } else { most - most % page };
    if share < most { share } else { most }
}

/// How many helpers (CPUs, DMA channels) a batch of `bytes` is worth beside the one that has it:
/// each is to have `least` bytes to do (0 counts as 1), no more than are idle, and no more than
/// `most`.
pub const fn helpers(bytes: usize, idle: usize, most: usize, least: usize) -> usize {
    let worth = bytes / if least == 0 { 1 } else { least };
    let worth = if worth == 0 { 0 } else { worth - 1 };
    let few = if idle < most { idle } else { most };
    if worth < few { worth } else { few }
}

/// Part `index` of `parts` of `total` things, as a range: parts differ by one thing at most, and
/// put together they are everything. Beyond the last part there is nothing.
pub const fn part(total: usize, parts: usize, index: usize) -> (usize, usize) {
    if parts == 0 || index >= parts {
        return (total, total);
    }
    let (each, more) = (total / parts, total % parts);
    let before = if index < more { index } else { more };
    let start = each * index + before;
    (start, start + each + (index < more) as usize)
}

/// The order in which CPUs are taken, so that each cache has one before any has two.
///
/// `caches` says for each CPU which cache it is on (any number), `order` becomes the positions in
/// `caches`. If the lengths differ, what both have is ordered.
pub fn spread(caches: &[u32], order: &mut [usize]) {
    let count = if caches.len() < order.len() { caches.len() } else { order.len() };
    let caches = &caches[..count];
    // Quadratic; a node has hundreds of CPUs at most, and this is done when they change.
    let mut filled = 0;
    let mut round = 0;
    while filled < count {
        for (cpu, cache) in caches.iter().enumerate() {
            let before = caches[..cpu].iter().filter(|other| *other == cache).count();
            if before == round && filled < count {
                order[filled] = cpu;
                filled += 1;
            }
        }
        round += 1;
    }
}

/// Chooses CPUs that are `idle`, as many as `chosen` has room for: one of each cache that has any,
/// and only then others. Returns how many; `chosen` has their positions in `caches`.
///
/// `caches` as for [`spread`], in whose order they best are; the search begins at `turn` (any number),
/// so that batches that are under way together do not all look at the same CPUs.
pub fn choose(
    caches: &[u32],
    turn: usize,
    mut idle: impl FnMut(usize) -> bool,
    chosen: &mut [usize],
) -> usize {
    let mut count = 0;
    for second in [false, true] {
        for index in 0..caches.len() {
            if count == chosen.len() {
                return count;
            }
            let cpu = turn.wrapping_add(index) % caches.len();
            let taken = &chosen[..count];
            let is_out = match second {
                false => taken.iter().any(|other| caches[*other] == caches[cpu]),
                true => taken.contains(&cpu),
            };
            if !is_out && idle(cpu) {
                chosen[count] = cpu;
                count += 1;
            }
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_are_whole_pages_within_bounds(
            bytes in 0_usize..1 << 40, copiers in 0_usize..300, most in 1_usize..1 << 30,
            page in prop::sample::select(vec![4096_usize, 16 << 10, 64 << 10]),
        ) {
            let chunk = chunk(bytes, copiers, most, page);
            prop_assert!(chunk >= page && chunk <= most.max(page) && chunk.is_multiple_of(page));
            prop_assert!(chunk >= CHUNK_MIN.min(most / page * page));
            // Nobody waits for more than a quarter of a share, or the smallest chunk.
            let share = bytes / copiers.max(1);
            let smallest = CHUNK_MIN.next_multiple_of(page);
            prop_assert!(chunk <= (share / CHUNKS_EACH + page).next_multiple_of(page).max(smallest));
        }

        #[test]
        fn helpers_are_idle_and_worth_it(
            bytes in 0_usize..1 << 40, idle in 0_usize..300, most in 0_usize..300,
            least in 0_usize..1 << 22,
        ) {
            let helpers = helpers(bytes, idle, most, least);
            prop_assert!(helpers <= idle && helpers <= most);
            prop_assert!(helpers == 0 || bytes / (helpers + 1) >= least.max(1));
            let one_more = helpers < idle && helpers < most && bytes / (helpers + 2) >= least.max(1);
            prop_assert!(!one_more, "one more was worth it");
        }

        #[test]
        fn parts_are_even_and_put_together_everything(total in 0_usize..100_000, parts in 1_usize..300) {
            let mut at = 0;
            for index in 0..parts {
                let (start, end) = part(total, parts, index);
                prop_assert_eq!(start, at);
                prop_assert!((end - start).abs_diff(total / parts) <= 1);
                at = end;
            }
            prop_assert_eq!(at, total);
            prop_assert_eq!(part(total, parts, parts), (total, total));
        }

        #[test]
        fn every_cache_has_a_cpu_before_any_has_two(caches in prop::collection::vec(0_u32..9, 0..200)) {
            let mut order = vec![usize::MAX; caches.len()];
            spread(&caches, &mut order);
            let mut taken = std::collections::HashMap::<u32, usize>::new();
            let mut seen = std::collections::HashSet::new();
            for cpu in order {
                let cache = caches[cpu];
                prop_assert!(seen.insert(cpu), "taken twice");
                let round = taken.entry(cache).or_default();
                *round += 1;
                let round = *round;
                for other in &caches {
                    let all = caches.iter().filter(|cache| *cache == other).count();
                    let has = taken.get(other).copied().unwrap_or(0);
                    prop_assert!(has + 1 >= round.min(all), "cache {other} has {has} in round {round}");
                }
            }
            prop_assert_eq!(seen.len(), caches.len());
        }

        #[test]
        fn idle_cpus_are_chosen_and_of_every_cache_that_has_one_before_a_second(
            cpus in prop::collection::vec((0_u32..9, any::<bool>()), 0..100),
            turn in any::<usize>(), most in 0_usize..32,
        ) {
            let caches: Vec<u32> = cpus.iter().map(|(cache, _)| *cache).collect();
            let mut chosen = vec![usize::MAX; most];
            let count = choose(&caches, turn, |cpu| cpus[cpu].1, &mut chosen);
            let idle = cpus.iter().filter(|(_, idle)| *idle).count();
            prop_assert_eq!(count, idle.min(most));
            let chosen: std::collections::HashSet<usize> = chosen[..count].iter().copied().collect();
            prop_assert_eq!(chosen.len(), count, "one was chosen twice");
            prop_assert!(chosen.iter().all(|cpu| cpus[*cpu].1), "one was busy");
            let with_idle: std::collections::HashSet<u32> =
                cpus.iter().filter(|(_, idle)| *idle).map(|(cache, _)| *cache).collect();
            let used: std::collections::HashSet<u32> = chosen.iter().map(|cpu| caches[*cpu]).collect();
            prop_assert_eq!(used.len(), with_idle.len().min(count), "a cache was left out");
        }
    }
}
