//! A running move: segments are planned, given out, taken through the transaction by one of the
//! two divisions of labour, and accounted.

use crate::context::Context;
use crate::divide::Running;
use crate::flight::MAX_PAGES;
use crate::plan::{Leg, Planner};
use crate::policy::Wish;
use crate::registered::Registered;
use crate::report::{Order, Outcome, Report};
use crate::sync::Mutex;
use crate::tally::Tally;
use crate::units::blocks_around;
use pageferry_copy::{CopyEngine, CpuEngine};
use pageferry_sys::uffd::Modes;
use pageferry_sys::{Errno, page_size};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// From this stall budget on, live order is not considered: a batch of either folio size fits it
/// frozen, on every machine measured.
const LIVE_BUDGET: Duration = Duration::from_millis(2);

/// Where frames come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Frames {
    /// Where the regions promise [`References::Never`](crate::References), the old pages of one
    /// batch are the frames of a later one; nothing is allocated once the pools are filled. Without
    /// the promise old pages are freed, and where no frame is at rest, base pages are moved as by
    /// `KernelCopy` and huge ones as by `Fresh`.
    #[default]
    Recycled,
    /// Frames are taken fresh from the destination's free memory, and the old pages are freed at
    /// once: a one-way move.
    Fresh,
    /// As `Fresh`, but base pages are allocated and copied by the kernel (`UFFDIO_COPY`), which
    /// saves zeroing them first. Frozen order. Huge folios as with `Fresh`; so, on several nodes,
    /// is memory that has or may have a policy of its own (`prefer`, adopted memory), which would
    /// decide where the kernel allocates; and so, up to Linux 6.18, is everything once the engine has
    /// seen a guard marker (`MADV_GUARD_INSTALL`) in managed memory, which such a copy may replace.
    KernelCopy,
}

/// Who touches what is shared with the handle of a move.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) cancel: AtomicBool,
    pub(crate) done: AtomicU64,
    pub(crate) total: u64,
}

#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) ctx: Arc<Context>,
    pub(crate) cpu: Arc<CpuEngine>,
    /// Another engine than the CPU's.
    pub(crate) engine: Option<Arc<dyn CopyEngine>>,
    pub(crate) wish: Wish,
    pub(crate) frames: Frames,
    /// Regions whose old pages become frames of this move; `None`: old pages are freed.
    pub(crate) recycled: Option<Vec<u64>>,
    pub(crate) even_if_there: bool,
    pub(crate) one_node: bool,
    /// The memory has a policy of its own, which may place elsewhere what the kernel allocates.
    pub(crate) own_policy: bool,
    pub(crate) legs: Vec<Leg>,
    /// Adopted regions, whose mappings are registered whole.
    pub(crate) wholes: Vec<Range<usize>>,
    pub(crate) control: Arc<Control>,
}

impl Job {
    /// The 2 MiB blocks that the move touches: registered, and held against other moves.
    pub(crate) fn blocks(legs: &[Leg], within: &[Range<usize>]) -> Vec<Range<usize>> {
        let blocks = legs.iter().flat_map(|l| &l.ranges).map(|r| {
            let b = blocks_around(r);
            // A region need not begin or end at a block.
            let home = within.iter().find(|w| w.start <= r.start && r.end <= w.end);
            home.map_or(b.clone(), |w| b.start.max(w.start)..b.end.min(w.end))
        });
        crate::units::normalize(blocks.collect())
    }

    /// Moves everything. The ranges in `blocks` are ours.
    pub(crate) fn run(&self, blocks: &[Range<usize>]) -> Result<Report, Errno> {
        let started = Instant::now();
        // Relaxed: read by this move's threads, which begin later.
        self.ctx.swap.store(pageferry_sys::mm::has_swap(), Ordering::Relaxed);
        // Write protection is for live order; its registration costs a walk over all pages at the
        // end, so frozen moves go without.
        let live = self.wish.order != Some(Order::Frozen)
            && (self.wish.order.is_some() || self.wish.budget < LIVE_BUDGET);
        let modes = if live { Modes::MISSING | Modes::WP } else { Modes::MISSING };
        let cancelled = || self.is_cancelled();
        let registered = Registered::new(&self.ctx, blocks, &self.wholes, modes, cancelled)?;
        let workers = self.cpu.worker_cpu_time();
        let wish =
            Wish { order: self.wish.order.or((!live).then_some(Order::Frozen)), ..self.wish };
        let running = Running {
            job: self,
            wish,
            planner: Mutex::new(Planner::new(self.legs.clone(), self.even_if_there, self.one_node)),
            quota: AtomicI64::new(0),
            tallies: Mutex::new(Vec::with_capacity(8)),
            engine_broken: AtomicBool::new(false),
            engine_panicked: AtomicBool::new(false),
            waited: AtomicBool::new(false),
            last_huge: AtomicBool::new(false),
        };
        let division = running.stretches();
        let mut last = Tally::new();
        running.planner.lock().give_up(Outcome::Cancelled, &mut last);
        running.tallies.lock().push(last);
        drop(registered);
        let mut report = running.report(started, division);
        // Moves that run at the same time share the workers, and see each other's time here.
        report.cpu.copy += self.cpu.worker_cpu_time().saturating_sub(workers);
        Ok(report)
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        // Relaxed: a request; nothing is published with it.
        self.control.cancel.load(Ordering::Relaxed)
    }
}

/// Largest limit of a batch, in bytes.
pub(crate) fn max_batch_bytes() -> usize {
    MAX_PAGES * page_size()
}
