//! From ranges to segments: what is there, of which size, on which node, and in what order it is
//! moved.
//!
//! A [`Segment`] is a run of folios of one size within one 2 MiB block. What the planner knows is
//! a hint (the program goes on meanwhile); detach finds out exactly. Pages that need not or
//! cannot move get their outcome here.

use crate::context::Context;
use crate::flight::MAX_PAGES;
use crate::report::{Busy, Outcome};
use crate::tally::Tally;
use crate::units::{FolioSize, HUGE};
use pageferry_sys::pagemap::{Categories, Run};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Address space that is looked at in one go: one block, so that the others who want a segment do
/// not wait long; where nothing is found, twice as much each time.
const WINDOW: Range<usize> = HUGE..32 << 20;
/// Runs that one look returns at most.
const RUNS: usize = 512;
/// Segments that are given back, in part or whole, until the next is wanted.
const GIVEN_BACK: usize = 4;
/// Tries of a look that fails for a passing reason.
const TRIES: u32 = 16;

/// Folios that move together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) range: Range<usize>,
    pub(crate) size: FolioSize,
    /// The node they are on, where that was asked.
    pub(crate) from: Option<u32>,
    pub(crate) to: u32,
    /// Its region.
    pub(crate) owner: u64,
    /// It was tried before and is tried once more.
    pub(crate) again: bool,
}

impl Segment {
    /// Cuts off what comes after `bytes`.
    pub(crate) fn split_off(&mut self, bytes: usize) -> Self {
        let middle = self.range.start + bytes;
        let rest = Self { range: middle..self.range.end, ..self.clone() };
        self.range.end = middle;
        rest
    }
}

/// What is to go where.
#[derive(Clone, Debug)]
pub(crate) struct Leg {
    /// The region.
    pub(crate) owner: u64,
    pub(crate) ranges: Vec<Range<usize>>,
    pub(crate) to: u32,
}

#[derive(Debug)]
struct Cursor {
    leg: Leg,
    /// Index of the range under way, and the address up to which it was looked at.
    range: usize,
    looked: usize,
    window: usize,
    ready: VecDeque<Segment>,
}

/// What `PAGEMAP_SCAN` can tell here.
fn tells(ctx: &Context) -> Categories {
    Categories::from_bits_truncate(ctx.tells.load(Ordering::Relaxed))
}

/// Gives out segments until all ranges are done. Legs (there are two in an exchange) take turns,
/// so that one's old pages are the other's frames.
#[derive(Debug)]
pub(crate) struct Planner {
    cursors: Vec<Cursor>,
    turn: usize,
    even_if_there: bool,
    one_node: bool,
    runs: Box<[Run; RUNS]>,
    /// Reused by every query for nodes.
    pages: Vec<usize>,
    nodes: Vec<i32>,
    /// In swap, or under migration by the kernel, when they were looked at, with their leg: looked
    /// at once more at the end.
    swapped: Vec<(usize, Range<usize>)>,
    /// To be tried once more at the end.
    again: VecDeque<Segment>,
    returned: VecDeque<Segment>,
}

impl Planner {
    pub(crate) fn new(legs: Vec<Leg>, even_if_there: bool, one_node: bool) -> Self {
        let cursors = legs
            .into_iter()
            .map(|leg| {
                let looked = leg.ranges.first().map_or(0, |r| r.start);
                Cursor {
                    leg,
                    range: 0,
                    looked,
                    window: WINDOW.start,
                    // All pages of a block, and one that is cut.
                    ready: VecDeque::with_capacity(RUNS.max(MAX_PAGES) + 1),
                }
            })
            .collect();
        Self {
            cursors,
            turn: 0,
            even_if_there,
            one_node,
            runs: Box::new([Run::EMPTY; RUNS]),
            pages: Vec::with_capacity(MAX_PAGES),
            nodes: Vec::with_capacity(MAX_PAGES),
            swapped: Vec::new(),
            again: VecDeque::new(),
            returned: VecDeque::new(),
        }
    }

    /// Room for what is given back, found and to be tried again while batches are in the air.
    pub(crate) fn make_room(&mut self) {
        if !self.has_room() {
            self.returned.reserve(4 * GIVEN_BACK);
            self.again.reserve(4 * MAX_PAGES);
            self.swapped.reserve(RUNS);
        }
    }

    /// Whether the next segment is found, and may be given back, without the allocator.
    pub(crate) fn has_room(&self) -> bool {
        let spare = |list: &VecDeque<Segment>| list.capacity() - list.len();
        spare(&self.returned) >= GIVEN_BACK
            && spare(&self.again) >= MAX_PAGES
            && self.swapped.capacity() - self.swapped.len() >= RUNS
    }

    /// The next segment, of at most `limit` bytes (a huge folio always whole). With batches in the
    /// air (`airborne`) only what is ready or found in the next block, so that no list outgrows
    /// the room that it has; there may be more then.
    pub(crate) fn next(
        &mut self,
        ctx: &Context,
        limit: usize,
        airborne: bool,
        tally: &mut Tally,
    ) -> Option<Segment> {
        if let Some(segment) = self.returned.pop_front() {
            return Some(self.cut(segment, limit));
        }
        for _ in 0..self.cursors.len() {
            let turn = self.turn;
            self.turn = (turn + 1) % self.cursors.len();
            self.look(ctx, turn, airborne, tally);
            if let Some(segment) = self.cursors[turn].ready.pop_front() {
                return Some(self.cut_ready(turn, segment, limit));
            }
        }
        if airborne && self.cursors.iter().any(|c| c.range < c.leg.ranges.len()) {
            return None;
        }
        if !self.swapped.is_empty() {
            if airborne {
                return None;
            }
            self.look_at_swapped(ctx, tally);
            return self.next(ctx, limit, airborne, tally);
        }
        let segment = self.again.pop_front()?;
        Some(self.cut(segment, limit))
    }

    /// What is in swap still stays there: to fetch it would take memory that the kernel has freed,
    /// and, once it is taken out of its place, keep whoever waits for it waiting for a disk.
    fn look_at_swapped(&mut self, ctx: &Context, tally: &mut Tally) {
        let (there, tell) = (Categories::PRESENT | Categories::SWAPPED, tells(ctx));
        for (turn, range) in std::mem::take(&mut self.swapped) {
            let mut at = range.start;
            while at < range.end {
                let (start, end) = (at, range.end);
                let scan = ctx.sys.scan(&ctx.pagemap, start, end, there, tell, &mut self.runs[..]);
                let Ok((count, ended)) = scan else { break };
                for i in 0..count {
                    let run = self.runs[i];
                    let clip = |v: u64| usize::try_from(v).unwrap_or(end).clamp(at, end);
                    let (from, to) = (clip(run.start), clip(run.end));
                    tally.outcome(at..from, Outcome::NotPresent);
                    if run.categories().contains(Categories::SWAPPED) {
                        self.add_swapped(ctx, turn, from..to, run.categories(), tally);
                    } else {
                        self.add_run(ctx, turn, from..to, run.categories(), tally);
                    }
                    at = to;
                }
                let ended = ended.clamp(at, end);
                tally.outcome(at..ended, Outcome::NotPresent);
                if ended <= start {
                    break;
                }
                at = ended;
            }
            tally.outcome(at..range.end, Outcome::Swapped);
        }
    }

    /// What the page table calls swapped may also be a memory error or a marker, and what is in swap
    /// may be in memory, too: of that detach finds out, without a disk.
    fn add_swapped(
        &mut self,
        ctx: &Context,
        turn: usize,
        range: Range<usize>,
        is: Categories,
        tally: &mut Tally,
    ) {
        let page = pageferry_sys::page_size();
        let mut at = range.start;
        while at < range.end {
            let count = ((range.end - at) / page).min(MAX_PAGES);
            let mut told = [0; MAX_PAGES];
            // Without an answer they count as in swap.
            let _ = ctx.sys.in_core(at, &mut told[..count]);
            for same in told[..count].chunk_by(|a, b| a & 1 == b & 1) {
                let end = at + same.len() * page;
                match same[0] & 1 {
                    0 => tally.outcome(at..end, Outcome::Swapped),
                    _ => self.add_run(ctx, turn, at..end, is, tally),
                }
                at = end;
            }
        }
    }

    fn cut(&mut self, mut segment: Segment, limit: usize) -> Segment {
        if segment.size == FolioSize::Base && segment.range.len() > limit {
            let rest = segment.split_off(limit);
            self.returned.push_front(rest);
        }
        segment
    }

    fn cut_ready(&mut self, turn: usize, mut segment: Segment, limit: usize) -> Segment {
        if segment.size == FolioSize::Base && segment.range.len() > limit {
            let rest = segment.split_off(limit);
            self.cursors[turn].ready.push_front(rest);
        }
        segment
    }

    /// Takes back what was not moved yet.
    pub(crate) fn give_back(&mut self, segment: Segment) {
        self.returned.push_front(segment);
    }

    /// Notes segments that stayed for a reason that may pass.
    pub(crate) fn try_again(&mut self, segments: impl Iterator<Item = Segment>) {
        self.again.extend(segments.map(|s| Segment { again: true, ..s }));
    }

    /// Whether nothing is left to give out.
    pub(crate) fn is_finished(&self) -> bool {
        self.returned.is_empty()
            && self.again.is_empty()
            && self.swapped.is_empty()
            && self.cursors.iter().all(|c| c.ready.is_empty() && c.range >= c.leg.ranges.len())
    }

    /// All that was not given out gets `outcome`.
    pub(crate) fn give_up(&mut self, outcome: Outcome, tally: &mut Tally) {
        for segment in self.returned.drain(..).chain(self.again.drain(..)) {
            tally.outcome(segment.range, outcome);
        }
        for (_, range) in self.swapped.drain(..) {
            tally.outcome(range, outcome);
        }
        for cursor in &mut self.cursors {
            for segment in cursor.ready.drain(..) {
                tally.outcome(segment.range, outcome);
            }
            while let Some(range) = cursor.leg.ranges.get(cursor.range) {
                tally.outcome(cursor.looked.max(range.start)..range.end, outcome);
                cursor.range += 1;
                cursor.looked = 0;
            }
        }
    }

    /// Looks ahead until a segment is ready or the leg ends; with batches in the air at one block.
    fn look(&mut self, ctx: &Context, turn: usize, airborne: bool, tally: &mut Tally) {
        let mut looked = false;
        while self.cursors[turn].ready.is_empty() && !(airborne && looked) {
            let cursor = &mut self.cursors[turn];
            let Some(range) = cursor.leg.ranges.get(cursor.range).cloned() else { return };
            let start = cursor.looked.max(range.start);
            if start >= range.end {
                cursor.range += 1;
                cursor.looked = 0;
                continue;
            }
            let window = if airborne { WINDOW.start } else { cursor.window };
            // Windows end at block boundaries, so that no huge page is seen in part.
            let end = ((start + window) & !(HUGE - 1)).min(range.end);
            looked = true;
            let ended = self.look_at(ctx, turn, start..end, tally);
            let cursor = &mut self.cursors[turn];
            cursor.looked = ended;
            cursor.window = if cursor.ready.is_empty() { cursor.window * 2 } else { 0 }
                .clamp(WINDOW.start, WINDOW.end);
        }
    }

    fn look_at(
        &mut self,
        ctx: &Context,
        turn: usize,
        window: Range<usize>,
        tally: &mut Tally,
    ) -> usize {
        // Whether a page is a file's is not asked: the kernel would look at every struct page,
        // which costs 50 ns a page; detach tells it for nothing.
        let there = Categories::PRESENT | Categories::SWAPPED;
        let tell = tells(ctx);
        let swap = ctx.swap.load(Ordering::Relaxed);
        let mut tries = 0;
        let (count, mut ended) = loop {
            let (start, end) = (window.start, window.end);
            match ctx.sys.scan(&ctx.pagemap, start, end, there, tell, &mut self.runs[..]) {
                Ok((count, ended)) => break (count, ended),
                Err(_) if tries < TRIES => {
                    crate::berth::back_off(tries);
                    tries += 1;
                }
                Err(errno) => {
                    tally.outcome(window.clone(), Outcome::Busy(Busy::Other(errno.0)));
                    return window.end;
                }
            }
        };
        // A full buffer may have cut a run short: look again from the start of its block.
        if ended < window.end {
            let block = ended & !(HUGE - 1);
            if block > window.start {
                ended = block;
            }
        }
        let mut at = window.start;
        for i in 0..count {
            let run = self.runs[i];
            let clip = |v: u64| usize::try_from(v).unwrap_or(usize::MAX).clamp(at, ended);
            let range = clip(run.start)..clip(run.end);
            if range.is_empty() {
                continue;
            }
            tally.outcome(at..range.start, Outcome::NotPresent);
            at = range.end;
            let is = run.categories();
            if swap && is.contains(Categories::SWAPPED) && !is.contains(Categories::GUARD) {
                self.swapped.push((turn, range));
            } else {
                self.add_run(ctx, turn, range, is, tally);
            }
        }
        tally.outcome(at..ended, Outcome::NotPresent);
        ended
    }

    fn add_run(
        &mut self,
        ctx: &Context,
        turn: usize,
        run: Range<usize>,
        is: Categories,
        tally: &mut Tally,
    ) {
        if is.contains(Categories::GUARD) {
            ctx.note_guard();
        }
        // The zero page is nobody's, and a guard marker no page.
        if is.intersects(Categories::PFN_ZERO | Categories::GUARD) {
            return tally.outcome(run, Outcome::NotPresent);
        }
        let size = if is.contains(Categories::HUGE) { FolioSize::Huge } else { FolioSize::Base };
        let mut start = run.start;
        while start < run.end {
            let end = ((start & !(HUGE - 1)) + HUGE).min(run.end);
            let piece = start..end;
            start = end;
            if size == FolioSize::Huge && piece.len() < HUGE {
                tally.outcome(piece, Outcome::Busy(Busy::PartOfHuge));
            } else {
                self.add_piece(ctx, turn, piece, size, tally);
            }
        }
    }

    fn add_piece(
        &mut self,
        ctx: &Context,
        turn: usize,
        piece: Range<usize>,
        size: FolioSize,
        tally: &mut Tally,
    ) {
        let Leg { to, owner, .. } = self.cursors[turn].leg;
        if self.one_node {
            if !self.even_if_there {
                return tally.outcome(piece, Outcome::AlreadyThere);
            }
            let segment = Segment { range: piece, size, from: Some(to), to, owner, again: false };
            return self.cursors[turn].ready.push_back(segment);
        }
        let step = size.bytes();
        self.pages.clear();
        self.pages.extend(piece.step_by(step));
        self.nodes.clear();
        self.nodes.resize(self.pages.len(), -1);
        // Without an answer the pages are moved as if they were elsewhere.
        let known = ctx.sys.page_nodes(&self.pages, &mut self.nodes).is_ok();
        let mut i = 0;
        while i < self.pages.len() {
            let node = self.nodes[i];
            let same = self.nodes[i..].iter().take_while(|n| **n == node).count();
            let range = self.pages[i]..self.pages[i] + same * step;
            i += same;
            // No node: swapped out, or given back since; detach will tell.
            let from = if known { u32::try_from(node).ok() } else { None };
            if from == Some(to) && !self.even_if_there {
                tally.outcome(range, Outcome::AlreadyThere);
            } else {
                let segment = Segment { range, size, from, to, owner, again: false };
                self.cursors[turn].ready.push_back(segment);
            }
        }
    }
}
