//! What the program did to its mappings while something moves: unmapped, moved away, given up.
//!
//! The handler writes these notes when it reads an event, movers read them before they take a
//! page. They are kept sorted, so that a look costs the same however many there are, and in
//! vectors that are replaced ahead of need by larger ones ([`Notes::wanted`]): neither the handler
//! nor whoever it waits for must wait for the program's allocator, which may be held by a thread that
//! waits for the handler. So nothing here allocates or frees as long as there is room.

use super::{Bits, MAX_PAGES, WORDS, bit};
use crate::units::{HUGE, overlap};
use std::collections::HashMap;
use std::ops::Range;

/// Ranges given up within one block that are watched by a witness each.
const WITNESSES: usize = 8;
/// Sets of pages of a block that are in quarantine without a witness.
const SETS: usize = 4;

/// Looks of the housekeeper (50 ms apart, and each with the lock of the address space taken once)
/// after which a range that was given up counts as dropped although that cannot be seen: a page
/// that was dropped and touched again at once looks as if it had never been dropped. The thread in
/// `madvise` needs one turn on a CPU and the lock of the address space, which is handed out in
/// order. Looks rather than time: while the process is stopped or frozen, or somebody holds that
/// lock for seconds, nobody looks either.
pub(super) const LOOKS: u32 = 21;

/// Room for notes of each kind to begin with.
const ROOM: usize = 1024;

/// A range that was unmapped, or moved away.
#[derive(Clone, Debug)]
struct Left {
    range: Range<usize>,
    /// The number of the event that told so.
    event: usize,
}

/// Where a page went by `mremap` while it was in the air.
#[derive(Clone, Debug)]
struct Detour {
    event: usize,
    from: Range<usize>,
    to: usize,
}

impl Detour {
    fn target(&self) -> Range<usize> {
        self.to..self.to + self.from.len()
    }
    fn follow(&self, addr: usize) -> Option<usize> {
        self.from.contains(&addr).then(|| self.to + (addr - self.from.start))
    }
}

/// Pages of one block that were given up by `madvise` but may not have been dropped yet.
#[derive(Clone, Copy, Debug)]
struct Quarantine {
    first: u32,
    end: u32,
    /// A page that was there when the event was read: once it is missing, the drop is under way
    /// beyond it. The last such page is watched.
    witness: u32,
    /// Looks that there had been.
    since: u32,
}

/// The quarantines of one block. Where there are more than witnesses can be watched, the oldest
/// wait for looks alone.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    watched: [Option<Quarantine>; WITNESSES],
    /// Pages, looks when the set was begun, and looks when a page was last added.
    blind: [Option<(Bits, u32, u32)>; SETS],
}

impl Block {
    fn add(&mut self, new: Quarantine) {
        // What is given up anew, within: the later witness counts.
        let within = |q: &Quarantine| new.first <= q.first && q.end <= new.end;
        let slot = self.watched.iter_mut().find(|q| q.as_ref().is_none_or(within));
        if let Some(slot) = slot {
            *slot = Some(new);
            return;
        }
        self.watched.rotate_left(1);
        if let Some(old) = self.watched[WITNESSES - 1].replace(new) {
            self.add_blind(old);
        }
    }

    fn add_blind(&mut self, old: Quarantine) {
        // Sets begin LOOKS / (SETS - 1) looks apart, so that all but the newest are over when
        // their turn comes.
        let apart = LOOKS / (index(SETS) - 1);
        let fresh = |begun: u32| old.since.wrapping_sub(begun) < apart;
        if !self.blind[0].is_some_and(|(_, begun, _)| fresh(begun)) {
            let carried = self.blind[SETS - 1]
                .filter(|(_, _, since)| old.since.wrapping_sub(*since) < LOOKS)
                .map_or([0; WORDS], |(bits, ..)| bits);
            self.blind.rotate_right(1);
            self.blind[0] = Some((carried, old.since, old.since));
        }
        if let Some((bits, _, since)) = &mut self.blind[0] {
            for page in old.first..old.end {
                bits[page as usize / 64] |= 1 << (page % 64);
            }
            *since = old.since;
        }
    }

    /// Drops what is over.
    fn expire(&mut self, looks: u32, is_missing: impl Fn(u32) -> bool) {
        let over = |since: u32| looks.wrapping_sub(since) >= LOOKS;
        for q in &mut self.watched {
            q.take_if(|q| over(q.since) || is_missing(q.witness));
        }
        for set in &mut self.blind {
            set.take_if(|(_, _, since)| over(*since));
        }
    }

    fn is_empty(&self) -> bool {
        self.watched.iter().all(Option::is_none) && self.blind.iter().all(Option::is_none)
    }

    fn pages(&self) -> Bits {
        let mut all = [0; WORDS];
        for page in self.watched.iter().flatten().flat_map(|q| q.first..q.end) {
            all[page as usize / 64] |= 1 << (page % 64);
        }
        for (bits, ..) in self.blind.iter().flatten() {
            all.iter_mut().zip(bits).for_each(|(all, bits)| *all |= bits);
        }
        all
    }
}

#[derive(Debug, Default)]
pub(super) struct Notes {
    /// Ascending, disjoint.
    left: Vec<Left>,
    /// In the order in which they were read, which need not be that in which they happened.
    detours: Vec<Detour>,
    /// Targets of detours, registered still, with the number of their event.
    strays: Vec<(usize, Range<usize>)>,
    /// By the block's address.
    quarantines: HashMap<usize, Block>,
    /// Of the moves under way: what is registered. Of anything else no note is taken.
    watched: Vec<Range<usize>>,
}

fn block_size(page: usize) -> usize {
    (MAX_PAGES * page).min(HUGE)
}

fn index(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Room for notes, by kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room([usize; 5]);

/// Puts the notes of `old` into `new`, where that is larger.
fn exchange<T>(old: &mut Vec<T>, new: &mut Vec<T>) {
    if new.capacity() > old.capacity() {
        new.append(old);
        std::mem::swap(old, new);
    }
}

impl Notes {
    pub(super) fn with_room() -> Self {
        Self::with(Room([ROOM; 5]))
    }

    pub(super) fn with(room: Room) -> Self {
        let Room([left, detours, strays, quarantines, watched]) = room;
        Self {
            left: Vec::with_capacity(left),
            detours: Vec::with_capacity(detours),
            strays: Vec::with_capacity(strays),
            quarantines: HashMap::with_capacity(quarantines),
            watched: Vec::with_capacity(watched),
        }
    }

    /// The room that there should be, if there is less than for half as many notes again.
    pub(super) fn wanted(&self) -> Option<Room> {
        let is = [
            (self.left.len(), self.left.capacity()),
            (self.detours.len(), self.detours.capacity()),
            (self.strays.len(), self.strays.capacity()),
            (self.quarantines.len(), self.quarantines.capacity()),
            (self.watched.len(), self.watched.capacity()),
        ];
        let short = |(len, room): (usize, usize)| room - len < len.max(ROOM) / 2;
        let wanted = |(len, room)| if short((len, room)) { 2 * len.max(ROOM) } else { 0 };
        is.into_iter().any(short).then(|| Room(is.map(wanted)))
    }

    /// Takes the room of `other`, which has no notes; what is to be freed is left there.
    pub(super) fn take_room(&mut self, other: &mut Self) {
        exchange(&mut self.left, &mut other.left);
        exchange(&mut self.detours, &mut other.detours);
        exchange(&mut self.strays, &mut other.strays);
        exchange(&mut self.watched, &mut other.watched);
        if other.quarantines.capacity() > self.quarantines.capacity() {
            other.quarantines.extend(self.quarantines.drain());
            std::mem::swap(&mut self.quarantines, &mut other.quarantines);
        }
    }

    /// Whether no page needs to be looked up here.
    pub(super) fn is_empty(&self) -> bool {
        self.left.is_empty() && self.detours.is_empty() && self.quarantines.is_empty()
    }

    pub(super) fn watch(&mut self, range: Range<usize>) {
        self.watched.push(range);
    }

    /// The parts of `range` that no other move watches; this move does not watch it any more.
    pub(super) fn unwatch(&mut self, range: &Range<usize>, parts: &mut Vec<Range<usize>>) {
        if let Some(at) = self.watched.iter().position(|w| w == range) {
            self.watched.swap_remove(at);
        }
        self.unwatched(range.clone(), parts);
    }

    /// How many parts [`Notes::unwatched`] finds at most, if no more is noted meanwhile.
    pub(super) fn most_parts(&self) -> usize {
        self.watched.len() + self.strays.len() + 1
    }

    /// The parts of a range that no move watches, and where no page in the air is at home.
    pub(super) fn unwatched(&self, range: Range<usize>, parts: &mut Vec<Range<usize>>) {
        parts.clear();
        parts.push(range);
        for watched in self.watched.iter().chain(self.strays.iter().map(|(_, stray)| stray)) {
            let mut at = 0;
            while let Some(part) = parts.get(at).cloned() {
                let mut left = subtract(part, watched);
                match left.next() {
                    None => drop(parts.remove(at)),
                    Some(first) => {
                        parts[at] = first;
                        at += 1;
                    }
                }
                if let Some(second) = left.next() {
                    parts.insert(at, second);
                    at += 1;
                }
            }
        }
    }

    /// Notes that `range` has left, as event number `event` told; only what is watched.
    pub(super) fn leave(&mut self, range: &Range<usize>, event: usize) {
        for i in 0..self.watched.len() {
            let watched = &self.watched[i];
            let part = range.start.max(watched.start)..range.end.min(watched.end);
            if !part.is_empty() {
                self.insert(part, event);
            }
        }
    }

    fn insert(&mut self, range: Range<usize>, event: usize) {
        self.return_(&range, usize::MAX);
        let at = self.left.partition_point(|l| l.range.start < range.start);
        self.left.insert(at, Left { range, event });
    }

    /// Forgets of `range` what event number `until` and those before it told.
    pub(super) fn return_(&mut self, range: &Range<usize>, until: usize) {
        let mut at = self.left.partition_point(|l| l.range.end <= range.start);
        while let Some(left) = self.left.get(at).filter(|l| l.range.start < range.end) {
            if left.event > until {
                at += 1;
                continue;
            }
            let Left { range: old, event } = self.left.remove(at);
            for part in subtract(old, range) {
                self.left.insert(at, Left { range: part, event });
                at += 1;
            }
        }
    }

    /// The pages of a range that have left.
    pub(super) fn gone(&self, range: &Range<usize>, page: usize) -> Option<Bits> {
        let mut gone: Option<Bits> = None;
        let from = self.left.partition_point(|l| l.range.end <= range.start);
        for left in self.left[from..].iter().take_while(|l| l.range.start < range.end) {
            let bits = gone.get_or_insert([0; WORDS]);
            let first = left.range.start.max(range.start);
            for addr in (first..left.range.end.min(range.end)).step_by(page) {
                let i = (addr - range.start) / page;
                bits[i / 64] |= 1 << (i % 64);
            }
        }
        gone
    }

    /// Notes that `mremap` has taken pages elsewhere.
    pub(super) fn detour(&mut self, from: Range<usize>, to: usize, event: usize) {
        let detour = Detour { event, from, to };
        self.strays.push((event, detour.target()));
        self.leave(&detour.from.clone(), event);
        self.detours.push(detour);
    }

    pub(super) fn has_detours(&self, since: usize) -> bool {
        self.detours.iter().any(|d| d.event > since)
    }

    /// Where a page is now that was at `addr` when there had been `since` events. If nothing is
    /// there, events were read out of order: [`Notes::home_in_any_order`].
    pub(super) fn home_of(&self, since: usize, addr: usize) -> usize {
        let later = self.detours.iter().filter(|d| d.event > since);
        later.fold(addr, |at, d| d.follow(at).unwrap_or(at))
    }

    /// The same when two calls of `mremap` by different threads may have been told in the wrong
    /// order (the kernel queues an event after it has let go of the address space's lock): what is
    /// left over of the detours is followed from there, each of them once.
    pub(super) fn home_in_any_order(&self, since: usize, addr: usize) -> usize {
        // Those that were followed; as many as are remembered without allocating.
        let mut followed = [false; ROOM];
        let later = || self.detours.iter().filter(|d| d.event > since).zip(0..ROOM);
        let mut at = addr;
        for (detour, i) in later() {
            if let Some(next) = detour.follow(at) {
                (at, followed[i]) = (next, true);
            }
        }
        while let Some((detour, i)) = later().find(|(d, i)| !followed[*i] && d.from.contains(&at)) {
            followed[i] = true;
            at = detour.follow(at).unwrap_or(at);
        }
        at
    }

    /// Where a page was then that is at `addr` now; `None` if what was there has left since.
    pub(super) fn origin_of(&self, since: usize, addr: usize) -> Option<usize> {
        let later = self.detours.iter().rev().filter(|d| d.event > since);
        later.clone().try_fold(addr, |at, d| {
            if d.target().contains(&at) {
                Some(d.from.start + (at - d.to))
            } else {
                (!d.from.contains(&at)).then_some(at)
            }
        })
    }

    /// Drops the detours that no flight needs any more: those up to event `until`. Their targets,
    /// which are registered still, go to `ended`, as many as it has room for.
    pub(super) fn end_detours(&mut self, until: usize, ended: &mut Vec<Range<usize>>) {
        self.detours.retain(|d| d.event > until);
        self.strays.retain(|(event, range)| {
            let takes = *event <= until && ended.len() < ended.capacity();
            if takes {
                ended.push(range.clone());
            }
            !takes
        });
    }

    pub(super) fn strays(&self) -> usize {
        self.strays.len()
    }

    pub(super) fn has_strays(&self) -> bool {
        !self.strays.is_empty()
    }

    /// Nothing of a range flies until the page `witness`, which is there now, is seen to be missing.
    /// The range lies within one block.
    pub(super) fn quarantine(
        &mut self,
        range: &Range<usize>,
        witness: usize,
        page: usize,
        looks: u32,
    ) {
        let block = range.start & !(block_size(page) - 1);
        let at = |addr: usize| index((addr - block) / page);
        let (first, end) = (at(range.start), at(range.end.next_multiple_of(page)));
        let new = Quarantine { first, end, witness: at(witness), since: looks };
        self.quarantines.entry(block).or_default().add(new);
    }

    /// The pages of a range that are being given up. `is_missing` is asked about their witnesses.
    pub(super) fn given_up(
        &mut self,
        range: &Range<usize>,
        page: usize,
        looks: u32,
        is_missing: impl Fn(usize) -> bool,
    ) -> Option<Bits> {
        if self.quarantines.is_empty() {
            return None;
        }
        let size = block_size(page);
        let mut gone: Option<Bits> = None;
        for start in (range.start & !(size - 1)..range.end).step_by(size) {
            let Some(block) = self.quarantines.get_mut(&start) else { continue };
            block.expire(looks, |witness| is_missing(start + witness as usize * page));
            if block.is_empty() {
                self.quarantines.remove(&start);
                continue;
            }
            let pages = block.pages();
            let part = start.max(range.start)..(start + size).min(range.end);
            for addr in part.step_by(page).filter(|addr| bit(&pages, (addr - start) / page)) {
                let n = (addr - range.start) / page;
                gone.get_or_insert([0; WORDS])[n / 64] |= 1 << (n % 64);
            }
        }
        gone
    }

    /// Drops the quarantines that are over by the number of looks; true if any is left.
    pub(super) fn expire(&mut self, looks: u32) -> bool {
        self.quarantines.retain(|_, block| {
            block.expire(looks, |_| false);
            !block.is_empty()
        });
        !self.quarantines.is_empty()
    }
}

/// What is left of `range` without `without`: up to two parts.
fn subtract(range: Range<usize>, without: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let parts = if overlap(&range, without) {
        [range.start..without.start.max(range.start), without.end.min(range.end)..range.end]
    } else {
        [range, 0..0]
    };
    parts.into_iter().filter(|part| !part.is_empty())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: usize = 4096;

    fn pages() -> impl Strategy<Value = Range<usize>> {
        (1usize..100, 1usize..20).prop_map(|(start, n)| start * PAGE..(start + n) * PAGE)
    }

    #[derive(Clone, Debug)]
    enum Step {
        Leave(Range<usize>),
        Forget(Range<usize>),
        Prove(Range<usize>, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => pages().prop_map(Step::Leave),
            1 => pages().prop_map(Step::Forget),
            1 => (pages(), 0usize..20).prop_map(|(range, ago)| Step::Prove(range, ago)),
        ]
    }

    proptest! {
        /// Page for page the same as a table with one entry for each page.
        #[test]
        fn what_has_left_is_known_page_by_page(steps in proptest::collection::vec(step(), 0..60)) {
            let mut notes = Notes::default();
            notes.watch(0..200 * PAGE);
            let mut table = [0usize; 200];
            for (event, step) in steps.into_iter().enumerate() {
                let event = event + 1;
                match step {
                    Step::Leave(range) => {
                        notes.leave(&range, event);
                        table[range.start / PAGE..range.end / PAGE].fill(event);
                    }
                    Step::Forget(range) => {
                        notes.return_(&range, usize::MAX);
                        table[range.start / PAGE..range.end / PAGE].fill(0);
                    }
                    Step::Prove(range, ago) => {
                        let until = event.saturating_sub(ago);
                        notes.return_(&range, until);
                        let pages = &mut table[range.start / PAGE..range.end / PAGE];
                        pages.iter_mut().filter(|e| **e <= until).for_each(|e| *e = 0);
                    }
                }
                prop_assert!(notes.left.windows(2).all(|w| w[0].range.end <= w[1].range.start));
                let gone = notes.gone(&(0..200 * PAGE), PAGE).unwrap_or([0; WORDS]);
                for (page, event) in table.iter().enumerate() {
                    prop_assert_eq!(bit(&gone, page), *event > 0, "page {}", page);
                }
            }
        }

        /// However often a block is given up in parts, what was given up stays in quarantine, and
        /// one block never costs more than its share.
        #[test]
        fn what_is_given_up_stays_in_quarantine_until_its_witness_is_missing(
            ranges in proptest::collection::vec((0usize..500, 1usize..12), 1..40)
        ) {
            let mut notes = Notes::default();
            for (first, n) in &ranges {
                let range = HUGE + first * PAGE..HUGE + (first + n) * PAGE;
                notes.quarantine(&range, range.end - PAGE, PAGE, 0);
            }
            prop_assert_eq!(notes.quarantines.len(), 1);
            let block = HUGE..2 * HUGE;
            let held = notes.given_up(&block, PAGE, LOOKS - 1, |_| false).unwrap_or([0; WORDS]);
            for (first, n) in &ranges {
                prop_assert!((*first..first + n).all(|page| bit(&held, page)));
            }
            prop_assert_eq!(notes.given_up(&block, PAGE, 2 * LOOKS, |_| false), None);
            prop_assert!(notes.is_empty());
        }
    }

    #[test]
    fn the_end_of_one_move_leaves_the_notes_of_its_neighbour() {
        let mut notes = Notes::default();
        let (ours, theirs) = (0..8 * PAGE, 8 * PAGE..16 * PAGE);
        notes.watch(ours.clone());
        notes.watch(theirs.clone());
        // One munmap over the border.
        notes.leave(&(6 * PAGE..10 * PAGE), 1);
        let mut parts = Vec::new();
        notes.unwatch(&ours, &mut parts);
        for part in parts {
            notes.return_(&part, usize::MAX);
        }
        assert_eq!(notes.gone(&ours, PAGE), None);
        assert_eq!(notes.gone(&theirs, PAGE).map(|bits| bits[0]), Some(0b11));
    }

    #[test]
    fn what_nobody_watches_leaves_no_note() {
        let mut notes = Notes::default();
        notes.watch(0..8 * PAGE);
        let mut parts = Vec::new();
        notes.unwatch(&(0..8 * PAGE), &mut parts);
        assert_eq!(parts, vec![0..8 * PAGE]);
        notes.leave(&(2 * PAGE..3 * PAGE), 1);
        assert!(notes.is_empty());
    }

    #[test]
    fn a_page_is_found_where_two_calls_took_it_whose_events_came_in_the_wrong_order() {
        let mut notes = Notes::default();
        let (a, b, c) = (PAGE, 20 * PAGE, 40 * PAGE);
        notes.detour(b..b + PAGE, c, 1);
        notes.detour(a..a + PAGE, b, 2);
        assert_eq!(notes.home_of(0, a), b);
        assert_eq!(notes.home_in_any_order(0, a), c);
        // There and back again is no circle.
        let mut notes = Notes::default();
        notes.detour(a..a + PAGE, b, 1);
        notes.detour(b..b + PAGE, a, 2);
        assert_eq!(notes.home_in_any_order(0, a), a);
    }

    #[test]
    fn detours_are_kept_as_long_as_a_flight_needs_them() {
        let mut notes = Notes::default();
        notes.detour(PAGE..2 * PAGE, 20 * PAGE, 1);
        notes.detour(3 * PAGE..4 * PAGE, 30 * PAGE, 2);
        let mut ended = Vec::with_capacity(1);
        notes.end_detours(1, &mut ended);
        assert_eq!(ended, vec![20 * PAGE..21 * PAGE]);
        assert!(notes.has_detours(1) && notes.has_strays());
        // Without room they stay for the next time.
        notes.end_detours(2, &mut ended);
        assert!(ended.len() == 1 && notes.has_strays() && !notes.has_detours(0));
        let mut ended = Vec::with_capacity(1);
        notes.end_detours(2, &mut ended);
        assert_eq!(ended, vec![30 * PAGE..31 * PAGE]);
        assert!(!notes.has_strays() && notes.is_empty());
    }
}
