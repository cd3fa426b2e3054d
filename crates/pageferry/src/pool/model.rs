//! The bookkeeping of the pools, checked by loom: whatever the order in which movers and the
//! housekeeper take and give, an extent has one owner, and the budget holds.

use super::arena::{Arena, Extent};
use super::budget::Budget;
use crate::units::{FolioSize, HUGE};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

/// An arena whose extents hold one frame each, and marks of who has one.
struct Pool {
    arena: Arena,
    budget: Budget,
    owned: Vec<AtomicBool>,
}

impl Pool {
    fn new(extents: usize, frames: usize) -> Self {
        Self {
            arena: {
                let arena = Arena::new(0, FolioSize::Base, extents);
                arena.grow(0..extents * HUGE);
                arena
            },
            budget: Budget::new(frames),
            owned: (0..extents).map(|_| AtomicBool::new(false)).collect(),
        }
    }

    fn taken(&self, extent: Extent) -> Extent {
        let before = self.owned[extent.addr / HUGE].swap(true, Ordering::AcqRel);
        assert!(!before, "an extent has two owners");
        extent
    }

    fn given(&self, extent: &Extent) {
        let before = self.owned[extent.addr / HUGE].swap(false, Ordering::AcqRel);
        assert!(before, "an extent was given back twice");
    }

    /// As `Pools::empty`.
    fn empty(&self, extent: &mut Extent) {
        self.budget.give_back(std::mem::take(&mut extent.populated));
    }

    fn shelve(&self, extent: Extent) {
        assert_eq!(extent.populated, 0);
        self.given(&extent);
        self.arena.put_empty(extent);
    }

    fn rest(&self, extent: Extent) {
        assert_eq!(extent.populated, 1);
        self.given(&extent);
        self.arena.put_frames(extent);
    }

    fn rested(&self) -> Option<Extent> {
        self.arena.take_oldest(None).map(|extent| self.taken(extent))
    }

    /// As `Pools::free_one_rested`.
    fn free_one(&self) -> bool {
        let Some(mut extent) = self.rested() else { return false };
        self.empty(&mut extent);
        self.shelve(extent);
        true
    }

    /// As `Pools::take_slot`.
    fn slot(&self, registered: bool) -> Option<Extent> {
        if let Some(extent) = self.arena.take_empty(registered) {
            return Some(self.taken(extent));
        }
        let mut extent = self.rested()?;
        self.empty(&mut extent);
        Some(extent)
    }

    /// As `Pools::take_frames`.
    fn frames(&self) -> Option<Extent> {
        if let Some(extent) = self.rested() {
            return Some(extent);
        }
        if !self.budget.claim(1, || self.free_one()) {
            return None;
        }
        assert!(self.budget.held() <= self.budget.limit());
        let Some(mut extent) = self.slot(false) else {
            self.budget.give_back(1);
            return None;
        };
        extent.populated = 1;
        Some(extent)
    }

    /// A batch: the frame goes into the region, the old page becomes the next frame.
    fn migrate(&self) {
        let Some(mut frames) = self.frames() else { return };
        let Some(mut slot) = self.slot(true) else {
            self.rest(frames);
            return;
        };
        slot.populated = std::mem::take(&mut frames.populated);
        self.shelve(frames);
        self.rest(slot);
    }

    /// Everything was given back, and what is held is at rest.
    fn check(&self, extents: usize) {
        assert_eq!(self.budget.held(), self.arena.rested_pages());
        assert!(self.budget.held() <= self.budget.limit());
        while self.free_one() {}
        assert_eq!(self.budget.held(), 0);
        let left: Vec<_> = std::iter::from_fn(|| self.arena.take_empty(false)).collect();
        assert_eq!(left.len(), extents);
    }
}

fn explore(extents: usize, frames: usize, housekeeper: bool) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let pool = Arc::new(Pool::new(extents, frames));
        let theirs = Arc::clone(&pool);
        let mover = thread::spawn(move || theirs.migrate());
        let theirs = Arc::clone(&pool);
        let keeper = housekeeper.then(|| thread::spawn(move || while theirs.free_one() {}));
        pool.migrate();
        pool.migrate();
        mover.join().expect("the mover ends");
        if let Some(keeper) = keeper {
            keeper.join().expect("the housekeeper ends");
        }
        pool.check(extents);
    });
}

#[test]
fn extents_have_one_owner_and_the_budget_holds_while_frames_are_released() {
    explore(4, 2, true);
}

#[test]
fn movers_that_run_out_of_budget_or_of_room_leave_nothing_behind() {
    explore(4, 1, false);
    explore(2, 2, false);
    explore(1, 1, false);
}
