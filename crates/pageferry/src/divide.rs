//! Dividing the labour of a move: who plans, who does the page-table work, who copies.
//!
//! *Conducted*: the calling thread does the page-table work and keeps a few batches in the air,
//! which the copy engine works on; it copies too while it waits. *Shared*: the pool's threads and
//! the caller take whole batches through all the steps, each for itself. What they share is the
//! planner (a short lock a batch) and a few counters.

use crate::berth::{Announced, Berth, Reserved};
use crate::job::{Frames, Job};
use crate::plan::{Planner, Segment};
use crate::policy::{Choice, MAX_WINDOW, STRETCH, TRIAL, Wish};
use crate::pool::Source;
use crate::report::{Division, Order, Report};
use crate::sync::Mutex;
use crate::tally::{Phase, Tally};
use crate::units::FolioSize;
use pageferry_copy::{Completion, CopyBatch, CopyEngine};
use pageferry_sys::affinity::usable_cpus;
use pageferry_sys::mm::Advice;
use pageferry_sys::page_size;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

/// Naps of [`NAP`] after which an engine that has not finished a batch never will (10 s); the pages go
/// back where they were. Shorter ones count for as long as they took, and none for more: while the
/// process is stopped nobody naps, and an engine may be stopped, too.
pub(crate) const ENGINE_NAPS: u32 = 2000;
/// From this stall budget on, a batch for which no frame is at rest is allocated and copied by the
/// kernel: 1 us a page, where zeroing fresh frames and copying takes 2 us; but all of it in the
/// hole (measured on Zen 4, Linux 6.18: 512 pages in 0.5 ms).
const KERNEL_COPY_BUDGET: Duration = Duration::from_millis(1);
/// A move of up to so many bytes is done by its caller alone: waking another thread costs more
/// than it saves (512 KiB broke even on Zen 4).
const ALONE: u64 = 256 << 10;
/// Waiting for a copy sleeps this long at most before it looks again.
pub(crate) const NAP: Duration = Duration::from_millis(5);
/// And this long at least, however often the engine would like to be polled.
const MIN_NAP: Duration = Duration::from_micros(10);

/// State of one run of a job.
pub(crate) struct Running<'j> {
    pub(crate) job: &'j Job,
    pub(crate) wish: Wish,
    pub(crate) planner: Mutex<Planner>,
    /// Bytes left of the current stretch.
    pub(crate) quota: AtomicI64,
    pub(crate) tallies: Mutex<Vec<Tally>>,
    pub(crate) engine_broken: AtomicBool,
    pub(crate) engine_panicked: AtomicBool,
    /// The first second try waits a moment: what was busy may be free then.
    pub(crate) waited: AtomicBool,
    /// Folio size of the last segment, by which the next stretch is divided.
    pub(crate) last_huge: AtomicBool,
}

/// A batch in the air.
struct Launched {
    /// The time of its detach.
    detach: Duration,
    /// The CPU copies it, not an engine that may break.
    with_cpu: bool,
    /// An engine has it; else it is copied already, or the kernel will copy it.
    handed: bool,
}

/// What became of a batch that was to begin.
enum Begun {
    /// It is in the air.
    Flying(Order),
    /// None of it can be moved now: it is accounted for.
    Refused,
    /// There is no room for it while others of this thread are in the air: it was given back.
    Full,
}

impl Running<'_> {
    fn engine(&self) -> &dyn CopyEngine {
        match &self.job.engine {
            Some(engine) if !self.engine_broken.load(Ordering::Relaxed) => engine.as_ref(),
            _ => self.job.cpu.as_ref(),
        }
    }

    /// Moves stretch after stretch, each by the division that suits it.
    pub(crate) fn stretches(&self) -> Division {
        let ctx = &self.job.ctx;
        loop {
            let huge = self.last_huge.load(Ordering::Relaxed);
            let size = if huge { FolioSize::Huge } else { FolioSize::Base };
            let small = self.job.control.total <= ALONE;
            let ours = self.job.engine.is_none() && self.wish.division.is_none();
            // Where more threads want to run than there are CPUs, a helper takes its time from the
            // program, and holes stay open while somebody waits for a CPU.
            let alone = small || ours && pageferry_sys::sched::runnable() > usable_cpus();
            let (division, bytes) = match &self.job.engine {
                Some(_) => (Division::Conducted, usize::MAX),
                None if ours && alone => (Division::Shared, TRIAL),
                // Zeroing frames is the most of it, and a conductor would do that alone.
                None if ours && self.job.frames == Frames::Fresh => (Division::Shared, STRETCH),
                None => ctx.policy.division(size, &self.wish),
            };
            self.quota.store(i64::try_from(bytes).unwrap_or(i64::MAX), Ordering::Relaxed);
            let before = self.job.control.done.load(Ordering::Relaxed);
            let started = Instant::now();
            match division {
                Division::Conducted => self.conducted(),
                Division::Shared if alone => self.lane(),
                Division::Shared => self.shared(),
            }
            let moved = self.job.control.done.load(Ordering::Relaxed) - before;
            if !alone {
                ctx.policy.saw_division(size, division, moved, started.elapsed());
            }
            // Participants leave when nothing is left to give out; a second try may have come in
            // after that.
            if self.job.is_cancelled() || self.planner.lock().is_finished() {
                return division;
            }
        }
    }

    /// The next segment to move, of at most `limit` bytes.
    fn next(&self, limit: usize, airborne: bool, tally: &mut Tally) -> Option<Segment> {
        if self.job.is_cancelled() || self.quota.load(Ordering::Relaxed) <= 0 {
            return None;
        }
        let segment = {
            // A look takes about 10 us: less than to sleep and be woken.
            let mut planner = None;
            spin_until(|| {
                planner = self.planner.try_lock();
                planner.is_some()
            });
            let mut planner = planner.unwrap_or_else(|| self.planner.lock());
            planner.try_again(tally.again.drain(..));
            if airborne && !planner.has_room() {
                return None;
            }
            planner.next(&self.job.ctx, limit, airborne, tally)
        };
        let segment = segment?;
        let bytes = i64::try_from(segment.range.len()).unwrap_or(i64::MAX);
        self.quota.fetch_sub(bytes, Ordering::Relaxed);
        self.last_huge.store(segment.size == FolioSize::Huge, Ordering::Relaxed);
        if segment.again {
            self.before_second_try(&segment);
        }
        Some(segment)
    }

    /// A page that nobody else maps any more may still be marked as shared (its child has gone);
    /// a write fault that changes nothing makes it exclusive. No flight is open over it here, so
    /// whatever this touches is resolved as usual.
    fn before_second_try(&self, segment: &Segment) {
        if !self.waited.swap(true, Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let range = &segment.range;
        // SAFETY: populating changes no content.
        let _ = unsafe { self.job.ctx.sys.advise(range.start, range.len(), Advice::PopulateWrite) };
    }

    /// The engine panicked: it is not called any more. What it still holds comes by itself, or not.
    fn panicked(&self) {
        self.engine_broken.store(true, Ordering::Relaxed);
        self.engine_panicked.store(true, Ordering::Relaxed);
    }

    fn source(&self) -> Source<'_> {
        self.job.recycled.as_deref().map_or(Source::Fresh, Source::Recycled)
    }

    fn choose(&self, size: FolioSize, copiers: usize) -> Choice {
        self.job.ctx.policy.choose(size, &self.wish, copiers)
    }

    fn give_back(&self, segment: Segment) {
        let bytes = i64::try_from(segment.range.len()).unwrap_or(0);
        self.quota.fetch_add(bytes, Ordering::Relaxed);
        self.planner.lock().give_back(segment);
    }

    fn join(&self, mut tally: Tally) {
        self.planner.lock().try_again(tally.again.drain(..));
        self.tallies.lock().push(tally);
    }

    /// Bytes asked for by a base segment; a segment's size is known only once it is there.
    fn limit(&self, copiers: usize) -> usize {
        self.choose(FolioSize::Base, copiers).batch * page_size()
    }

    /// Every participant takes its own batches through all the steps.
    fn shared(&self) {
        let helpers = self.wish.threads.saturating_sub(1);
        self.job.cpu.pool().run(helpers, &|_| self.lane());
    }

    /// Batch after batch, all steps, on this thread.
    fn lane(&self) {
        let mut tally = Tally::new();
        let mut berth = Berth::new(&self.job.ctx, self.job.cpu.kernel());
        while let Some(segment) = self.next(self.limit(1), false, &mut tally) {
            tally.lap(Phase::Plan);
            self.one(&mut berth, segment, &mut tally);
        }
        berth.retire(self.source());
        tally.lap(Phase::Release);
        self.join(tally);
    }

    /// One batch, all steps, on this thread.
    fn one(&self, berth: &mut Berth<'_>, segment: Segment, tally: &mut Tally) {
        let size = segment.size;
        let choice = self.choose(size, 1);
        let Begun::Flying(order) = self.begin(berth, segment, choice.order, tally) else { return };
        let pages = berth.bytes() / page_size();
        if order == Order::Frozen {
            berth.detach(0..pages, false);
            let detach = tally.lap(Phase::Detach);
            if !berth.kernel_copies() {
                berth.copy_inline();
                self.job.ctx.policy.saw_copy(size, pages, tally.lap(Phase::Copy));
            }
            self.land(berth, choice, detach, tally);
        } else {
            berth.copy_inline();
            self.job.ctx.policy.saw_copy(size, pages, tally.lap(Phase::Copy));
            self.land(berth, choice, Duration::ZERO, tally);
        }
    }

    /// Reserves, opens and (live) protects.
    fn begin(
        &self,
        berth: &mut Berth<'_>,
        segment: Segment,
        order: Order,
        tally: &mut Tally,
    ) -> Begun {
        // Handlers of signals run here, where this thread has nothing that anybody waits for: no
        // hole, and no huge folio under copy, whose writers wait, too.
        if !berth.is_nested() {
            pageferry_sys::thread::hear();
        }
        // The kernel allocates its copies as the mapping's policy says, if that has one.
        let obeys = self.job.one_node || !self.job.own_policy;
        let kernel_copy = segment.size == FolioSize::Base
            && self.job.ctx.kernel_may_copy()
            && match self.job.frames {
                Frames::KernelCopy => obeys,
                Frames::Fresh => false,
                Frames::Recycled => {
                    order == Order::Frozen
                        && self.job.engine.is_none()
                        && obeys
                        && self.wish.budget >= KERNEL_COPY_BUDGET
                        && !berth.has_frames(segment.to, segment.size)
                        && !self.job.ctx.pools.has_rested(segment.to, segment.size, self.source())
                }
            };
        let order = if kernel_copy { Order::Frozen } else { order };
        let asked = segment.range.len();
        match berth.reserve(segment, self.source(), kernel_copy, tally) {
            Reserved::Refused => {
                tally.lap(Phase::Reserve);
                self.count(asked);
                return Begun::Refused;
            }
            Reserved::Full(segment) => {
                tally.lap(Phase::Reserve);
                self.give_back(segment);
                return Begun::Full;
            }
            Reserved::Ready { rest: Some(rest) } => self.give_back(rest),
            Reserved::Ready { rest: None } => {}
        }
        tally.lap(Phase::Reserve);
        match berth.open(order, tally) {
            Announced::Open => {}
            Announced::Refused => return Begun::Refused,
            Announced::Full => {
                if let Some(segment) = berth.unload() {
                    self.give_back(segment);
                }
                return Begun::Full;
            }
        }
        if order == Order::Live && berth.protect().is_err() {
            // Unmapped in part, perhaps: frozen order finds out page by page.
            berth.freeze();
        }
        tally.lap(Phase::Protect);
        Begun::Flying(berth.order())
    }

    /// From the copied batch to the closed flight.
    fn land(&self, berth: &mut Berth<'_>, choice: Choice, detached: Duration, tally: &mut Tally) {
        let policy = &self.job.ctx.policy;
        let (size, pages) = (berth.size(), berth.bytes() / page_size());
        let live = berth.order() == Order::Live;
        let piece = if live { choice.piece.max(1) } else { pages };
        let mut start = 0;
        while start < pages {
            let end = (start + piece).min(pages);
            let mut tables = detached;
            if live {
                berth.detach(start..end, berth.is_nested());
                tables = tally.lap(Phase::Detach);
            }
            berth.repair(start..end, live && self.wish.compare, tally);
            tally.lap(Phase::Repair);
            let hole = berth.attach(start..end, tally);
            tables += tally.lap(Phase::Attach);
            policy.saw_tables(size, end - start, tables);
            policy.saw_hole(size, self.wish.budget, hole);
            start = end;
        }
        berth.close(tally);
        self.count(pages * page_size());
        tally.lap(Phase::Release);
    }

    fn count(&self, bytes: usize) {
        self.job.control.done.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// This thread does the page-table work, the engine copies.
    ///
    /// While batches are in the air it does not wait for the allocator, whose lock may be held by a
    /// thread that waits for one of their pages (in a signal handler): what it needs is made ready
    /// before the first of them, and where that is used up, they land first.
    fn conducted(&self) {
        let mut tally = Tally::new();
        let mut free: Vec<Berth<'_>> = Vec::with_capacity(MAX_WINDOW);
        let mut air: VecDeque<(Berth<'_>, Choice, Launched)> = VecDeque::with_capacity(MAX_WINDOW);
        let mut ended = false;
        // No more room until a batch has landed.
        let mut full = false;
        loop {
            if air.is_empty() && !ended {
                let pages = self.job.control.total / page_size() as u64;
                tally.make_room(usize::try_from(pages).unwrap_or(usize::MAX));
                self.planner.lock().make_room();
                free.resize_with(MAX_WINDOW, || Berth::new(&self.job.ctx, self.job.cpu.kernel()));
                free.iter_mut().for_each(Berth::make_ready);
            }
            let landed = air.front().is_some_and(|(b, ..)| b.is_copied());
            let forking = self.job.ctx.forks.wanted() && !air.is_empty();
            let copiers = self.engine().capabilities().max_parallel.min(self.wish.threads);
            let window = self
                .choose(
                    if self.last_huge.load(Ordering::Relaxed) {
                        FolioSize::Huge
                    } else {
                        FolioSize::Base
                    },
                    copiers,
                )
                .window;
            if !landed && !forking && !ended && !full && air.len() < window {
                let airborne = !air.is_empty();
                let Some(mut berth) = free.pop_if(|b| b.is_ready() && tally.has_room(air.len()))
                else {
                    full = true;
                    continue;
                };
                let Some(segment) = self.next(self.limit(copiers), airborne, &mut tally) else {
                    free.push(berth);
                    (full, ended) = (airborne, !airborne);
                    continue;
                };
                tally.lap(Phase::Plan);
                let choice = self.choose(segment.size, copiers);
                berth.set_others(air.iter().map(|(other, ..)| other));
                match self.launch(&mut berth, segment, choice, &mut tally) {
                    Ok(launched) => air.push_back((berth, choice, launched)),
                    Err(no_room) => {
                        full = no_room;
                        free.push(berth);
                    }
                }
                continue;
            }
            let Some((mut berth, choice, launched)) = air.pop_front() else { break };
            full = false;
            if !self.await_batch(&Arc::clone(berth.batch()), launched.with_cpu) {
                self.engine_broken.store(true, Ordering::Relaxed);
                tracing::error!(
                    engine = self.engine().name(),
                    "the copy engine did not finish a batch within {:?}: it is not used again, \
                     its pages stay where they were, and its frames are given up",
                    NAP * ENGINE_NAPS
                );
                berth.abandon();
            }
            if launched.handed && !berth.collect_batch(&mut tally) {
                // It reported what it was not asked for: nothing it says can be trusted.
                self.engine_broken.store(true, Ordering::Relaxed);
            }
            tally.lap(Phase::Copy);
            // It may have been the only one when it began.
            berth.set_others(air.iter().map(|(other, ..)| other));
            self.land(&mut berth, choice, launched.detach, &mut tally);
            free.push(berth);
        }
        for berth in &mut free {
            berth.retire(self.source());
        }
        drop(free);
        tally.lap(Phase::Release);
        self.join(tally);
    }

    /// Begins a batch and hands its copies to the engine. Else: whether that is for want of room
    /// beside the others in the air.
    fn launch(
        &self,
        berth: &mut Berth<'_>,
        segment: Segment,
        choice: Choice,
        tally: &mut Tally,
    ) -> Result<Launched, bool> {
        let nested = berth.is_nested();
        let order = match self.begin(berth, segment, choice.order, tally) {
            Begun::Flying(order) => order,
            Begun::Refused => return Err(false),
            Begun::Full => return Err(nested),
        };
        let mut detach = Duration::ZERO;
        if order == Order::Frozen {
            berth.detach(0..berth.bytes() / page_size(), nested);
            detach = tally.lap(Phase::Detach);
        }
        let with_cpu = self.job.engine.is_none() || self.engine_broken.load(Ordering::Relaxed);
        let handed = !berth.kernel_copies() && self.submit(berth);
        if !berth.kernel_copies() && !handed {
            berth.copy_inline();
            tally.fallbacks += u64::from(self.job.engine.is_some());
        }
        tally.lap(Phase::Copy);
        Ok(Launched { detach, with_cpu, handed })
    }

    /// False: the engine did not take the batch.
    fn submit(&self, berth: &mut Berth<'_>) -> bool {
        let longest = self.engine().capabilities().max_op_len;
        let filled = berth.fill_batch(longest);
        let batch = Arc::clone(berth.batch());
        if !filled || batch.is_empty() {
            return filled;
        }
        // SAFETY: the frames are ours alone; the sources are slots that nobody else knows, or
        // pages of the region, where a racing write is noticed by their protection. Nothing else
        // is mapped into pool memory, and what replaces unmapped region memory is this program's.
        let submitted = catch_unwind(AssertUnwindSafe(|| unsafe { self.engine().submit(&batch) }));
        match submitted {
            Ok(result) => result.is_ok(),
            Err(_) => {
                self.panicked();
                // What it took before it panicked is waited for; what it did not is abandoned.
                batch.is_submitted() || batch.is_done()
            }
        }
    }

    /// Waits for the batch; copies a part meanwhile, spins briefly, then sleeps. False: it will
    /// not be done any more.
    fn await_batch(&self, batch: &Arc<CopyBatch>, with_cpu: bool) -> bool {
        // How long to sleep between two looks for results.
        let nap = match self.engine().capabilities().completion {
            Completion::Polled { interval } => interval.clamp(MIN_NAP, NAP),
            _ => NAP,
        };
        // Whatever else a broken engine holds is given a moment, not the same time again. The CPU
        // finishes for certain, but may have to wait for its turn on a busy machine.
        let broken = self.engine_broken.load(Ordering::Relaxed);
        let mut left = NAP * if broken { ENGINE_NAPS / 100 } else { ENGINE_NAPS };
        // A batch is with the engine that took it, which need not be the one used now; each helps
        // only with its own.
        let step = || {
            let usable =
                self.job.engine.as_ref().filter(|_| !self.engine_panicked.load(Ordering::Relaxed));
            let other = usable.is_some_and(|engine| {
                engine.poll();
                engine.help(batch)
            });
            other || self.job.cpu.help(batch)
        };
        loop {
            if !batch.is_submitted() {
                return true;
            }
            let helped = catch_unwind(AssertUnwindSafe(step)).unwrap_or_else(|_| {
                self.panicked();
                false
            });
            if helped {
                continue;
            }
            if spin_until(|| batch.is_done()) {
                return true;
            }
            let before = Instant::now();
            if batch.wait_timeout(nap) {
                return true;
            }
            // However long the process was stopped meanwhile, it was one nap.
            let napped = before.elapsed().min(NAP);
            left = left.saturating_sub(if with_cpu { Duration::ZERO } else { napped });
            if left.is_zero() {
                return false;
            }
        }
    }

    pub(crate) fn report(self, started: Instant, division: Division) -> Report {
        let elapsed = started.elapsed();
        let tallies = self.tallies.into_inner();
        let engine = match &self.job.engine {
            Some(engine) => engine.name().to_owned(),
            None => self.job.cpu.name().to_owned(),
        };
        let mut report = Report::empty(engine, division);
        report.elapsed = elapsed;
        report.cancelled = self.job.is_cancelled();
        let first = tallies.iter().filter_map(|t| t.first_folio).min();
        report.first_folio = first.map(|at| at - started);
        for tally in tallies {
            report.add(tally);
        }
        report.tidy();
        report
    }
}

/// How long waiting spins before it sleeps: about what a wake-up costs.
const SPIN: Duration = Duration::from_micros(30);

fn spin_until(mut done: impl FnMut() -> bool) -> bool {
    if usable_cpus() < 2 {
        return done();
    }
    let until = Instant::now() + SPIN;
    loop {
        for _ in 0..64 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if Instant::now() > until {
            return false;
        }
    }
}
