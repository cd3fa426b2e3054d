//! The engine: one per process, shared by its regions and moves.

use crate::context::Context;
use crate::control::{ListenError, Listener};
use crate::error::{BuildError, RegionError};
use crate::flight::{Flights, MAX_PAGES};
use crate::job::Control;
use crate::policy::Policy;
use crate::pool::{PoolConfig, PoolStats, Pools};
use crate::quiesce::ForkGate;
use crate::region::{References, Region, RegionBuilder};
use crate::request::{Move, Part};
use crate::sync::{Condvar, Mutex};
use crate::units::overlap;
use crate::{handler, probe, registered};
use pageferry_copy::{CpuEngine, Kernel, WorkerPool};
use pageferry_sys::affinity::usable_cpus;
use pageferry_sys::maps::Maps;
use pageferry_sys::mm::Advice;
use pageferry_sys::pagemap::Pagemap;
use pageferry_sys::thread::Deaf;
use pageferry_sys::uffd::{Features, Rights, Signal, Uffd};
use pageferry_sys::{Errno, Linux, Sys, fork, page_size};
use pageferry_topology::{Machine, NodeId};
use serde::Serialize;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Flights at once. A move that has none open waits for one; it holds nothing then.
const FLIGHTS: usize = 256;
/// How often the housekeeping thread looks, while there is something to look after.
const HOUSEKEEPING: Duration = Duration::from_millis(50);

/// Moves pages of this process. Cheap to clone; the last clone, region and handle that goes away
/// stops its threads.
///
/// # Fork
/// Moves stand still while the process forks by `fork(3)`, so a child finds all its memory. The
/// engine itself stays with the parent: in a child every call fails with
/// [`AfterFork`](crate::MigrateError::AfterFork), and dropping it does nothing. A child made by
/// the raw `clone(2)` system call, past the C library, must not share managed memory by
/// copy-on-write while something moves.
#[derive(Clone, Debug)]
pub struct Engine {
    pub(crate) inner: Arc<Inner>,
    /// Keeps the threads; the threads themselves hold `inner` only.
    _threads: Arc<Threads>,
}

/// A range that a move has for itself.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) ranges: Vec<Range<usize>>,
    pub(crate) control: Arc<Control>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) ctx: Arc<Context>,
    pub(crate) machine: Machine,
    pub(crate) rights: Rights,
    pub(crate) cpu: Arc<CpuEngine>,
    pub(crate) threads: usize,
    /// Of each region that is there: all of it.
    pub(crate) regions: Mutex<Vec<Part>>,
    pub(crate) claims: Mutex<Vec<Claim>>,
    pub(crate) released: Condvar,
    pub(crate) moves: AtomicU64,
    pub(crate) bytes_moved: AtomicU64,
    pub(crate) last_move: Mutex<Instant>,
    idle_release: Duration,
    /// The process that built it.
    home: u64,
    housekeeping: (Mutex<bool>, Condvar),
}

impl Inner {
    /// Whether this is the process that built the engine.
    pub(crate) fn is_at_home(&self) -> bool {
        self.home == fork::generation()
    }

    /// Cancels every move that touches `range`, and waits until none does. From then on `gone` is
    /// set, and no move of that region begins.
    pub(crate) fn clear_range(&self, range: &Range<usize>, gone: &AtomicBool) {
        let mut claims = self.claims.lock();
        // Relaxed: read and written under the lock.
        gone.store(true, Ordering::Relaxed);
        loop {
            let mut found = false;
            for claim in claims.iter() {
                if claim.ranges.iter().any(|r| overlap(r, range)) {
                    claim.control.cancel.store(true, Ordering::Relaxed);
                    found = true;
                }
            }
            if !found {
                return;
            }
            claims = self.released.wait(claims);
        }
    }

    /// Whether a range holds memory that a mover itself uses: some of the engine's own, of what the
    /// allocator gives now, or of the caller's stack. It would wait for itself.
    ///
    /// This finds whole heaps and stacks; that a mover uses nothing else of a region is in the
    /// contract of [`Engine::adopt`] and [`RegionAlloc`](crate::RegionAlloc).
    pub(crate) fn is_used_by_movers(&self, range: &Range<usize>) -> bool {
        let (on_stack, on_heap) = (0u8, Box::new(0u8));
        let used = [
            std::ptr::from_ref(self).addr(),
            Arc::as_ptr(&self.ctx).addr(),
            std::ptr::from_ref(&on_stack).addr(),
            std::ptr::from_ref(&*on_heap).addr(),
        ];
        used.iter().any(|address| range.contains(address))
    }

    /// Tells the housekeeping thread that there is something to do.
    pub(crate) fn rouse(&self) {
        *self.housekeeping.0.lock() = true;
        self.housekeeping.1.notify_one();
    }
}

#[derive(Debug)]
struct Threads {
    inner: Arc<Inner>,
    stop: Arc<Signal>,
    stopping: Arc<AtomicBool>,
    joins: Vec<JoinHandle<()>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        if !self.inner.is_at_home() {
            // A forked child has no such threads, and the locks may be held by nobody.
            return;
        }
        self.stop.raise();
        self.stopping.store(true, Ordering::Release);
        self.inner.rouse();
        let me = std::thread::current().id();
        for join in self.joins.drain(..) {
            if join.thread().id() != me {
                let _ = join.join();
            }
        }
    }
}

/// Options of an [`Engine`]. The defaults need no thought.
#[derive(Debug)]
#[must_use]
pub struct EngineBuilder {
    user_mode_only: bool,
    threads: Option<usize>,
    kernel: Option<Kernel>,
    frame_budget: Option<usize>,
    frame_grace: Duration,
    idle_release: Duration,
    sys: Arc<dyn Sys>,
}

impl EngineBuilder {
    fn new() -> Self {
        Self {
            user_mode_only: false,
            threads: None,
            kernel: None,
            frame_budget: None,
            // A reader with a plain reference copies a page at a time: microseconds. This leaves
            // room for it to lose its CPU once.
            frame_grace: Duration::from_millis(1),
            idle_release: Duration::from_secs(1),
            sys: Arc::new(Linux),
        }
    }

    /// Uses a userfaultfd that sees faults of user code only, which an ordinary user may have.
    ///
    /// The contract: while a move runs, no system call is given memory of its region (as a buffer
    /// of `read`, a path, an io_uring buffer, ...). One that is may fail with `EFAULT`. No data is
    /// lost. Off by default.
    pub fn user_mode_only(mut self, yes: bool) -> Self {
        self.user_mode_only = yes;
        self
    }

    /// Threads that work on moves, the caller of a move counted: 1 to 1024. Default: the CPUs
    /// that the process's main thread may use, and no more than its CPU quota. Threads of the
    /// engine run there, whichever thread builds it.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// The copy kernel. Default: what measures best on this machine (measured once in under
    /// 200 ms, then remembered in the user's cache folder).
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = Some(kernel);
        self
    }

    /// Bytes of spare frames at most, all pools together: 4 MiB or more. Default: 64 MiB, or an
    /// eighth of the free memory if that is less.
    pub fn frame_budget(mut self, bytes: usize) -> Self {
        self.frame_budget = Some(bytes);
        self
    }

    /// How long a page that was moved away rests before its frame carries other data. Default:
    /// 1 ms; 0 to 1 s.
    pub fn frame_grace(mut self, grace: Duration) -> Self {
        self.frame_grace = grace;
        self
    }

    /// After how long without a move all spare frames are freed. Default: 1 s.
    pub fn idle_release(mut self, after: Duration) -> Self {
        self.idle_release = after;
        self
    }

    /// The system calls to use; for fault injection by tests
    /// ([`pageferry_sys::inject::Faulty`]).
    pub fn sys(mut self, sys: Arc<dyn Sys>) -> Self {
        self.sys = sys;
        self
    }

    /// Builds the engine and starts its threads.
    ///
    /// # Errors
    /// [`BuildError`]: rights, kernel or resources are missing, or an option makes no sense.
    pub fn build(self) -> Result<Engine, BuildError> {
        let machine = Machine::read()?;
        let threads = self.threads.unwrap_or_else(usable_cpus);
        if !(1..=1024).contains(&threads) {
            let reason = "a move is done by 1 to 1024 threads";
            let value = threads.to_string();
            return Err(BuildError::Option { option: "threads", value, reason });
        }
        if self.frame_grace > Duration::from_secs(1) {
            let value = format!("{:?}", self.frame_grace);
            let reason = "frames rest for 0 to 1 s; longer would starve the pools";
            return Err(BuildError::Option { option: "frame_grace", value, reason });
        }
        let free: u64 = machine.memory_nodes().map(|n| n.free_bytes).sum();
        let eighth = usize::try_from(free / 8).unwrap_or(usize::MAX);
        let budget = self.frame_budget.unwrap_or((64 << 20).min(eighth).max(4 << 20));
        if budget < 4 << 20 {
            let value = format!("{budget} bytes");
            let reason = "at least 4 MiB: two batches in flight";
            return Err(BuildError::Option { option: "frame_budget", value, reason });
        }
        let rights = if self.user_mode_only { Rights::UserModeOnly } else { Rights::Full };
        let uffd = Arc::new(open_descriptor(self.sys.as_ref(), rights)?);
        let pagemap = Pagemap::open().map_err(no_pagemap)?;
        let maps = Maps::open()
            .map_err(|source| BuildError::Resource { what: "opening /proc/self/maps", source })?;
        let nodes = machine.memory_nodes().map(|n| n.id.get()).collect();
        let config = PoolConfig { budget, grace: self.frame_grace, nodes };
        let pools =
            Pools::new(Arc::clone(&self.sys), Arc::clone(&uffd), config).map_err(no_pagemap)?;
        let workers = WorkerPool::with_copiers(threads, &[])
            .map_err(|e| BuildError::Threads(e.to_string()))?;
        let workers = Arc::new(workers);
        let kernel = match self.kernel {
            Some(kernel) => kernel,
            None => probe::best_kernel(&workers)?,
        };
        let cpu = Arc::new(CpuEngine::new(kernel, workers));
        let ctx = Arc::new(Context {
            sys: self.sys,
            uffd,
            pools,
            flights: Flights::new(FLIGHTS, page_size()),
            pagemap,
            maps,
            registering: Mutex::default(),
            tells: AtomicU64::new(0),
            swap: AtomicBool::new(false),
            spare_batches: Mutex::default(),
            policy: Policy::new(),
            forks: ForkGate::new(),
            move_keeps_protection: AtomicBool::new(false),
            copy_replaces_guards: AtomicBool::new(false),
            guards: AtomicBool::new(false),
        });
        probe::what_move_does(&ctx)?;
        // Opens its file now, so that no move does.
        pageferry_sys::sched::runnable();
        let inner = Arc::new(Inner {
            ctx: Arc::clone(&ctx),
            machine,
            rights,
            cpu,
            threads,
            regions: Mutex::default(),
            claims: Mutex::default(),
            released: Condvar::new(),
            moves: AtomicU64::new(0),
            bytes_moved: AtomicU64::new(0),
            last_move: Mutex::new(Instant::now()),
            idle_release: self.idle_release,
            home: fork::generation(),
            housekeeping: (Mutex::new(false), Condvar::new()),
        });
        let resource = |what| move |source| BuildError::Resource { what, source };
        let stop = Arc::new(Signal::new().map_err(resource("an eventfd"))?);
        let stopping = Arc::new(AtomicBool::new(false));
        let mut threads = Threads {
            inner: Arc::clone(&inner),
            stop: Arc::clone(&stop),
            stopping: Arc::clone(&stopping),
            joins: Vec::with_capacity(2),
        };
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            pageferry_sys::thread::spawn(name, body).map_err(|e| BuildError::Threads(e.to_string()))
        };
        threads.joins.push(spawn("pf-faults", {
            let ctx = Arc::clone(&ctx);
            Box::new(move || handler::serve(&ctx, &stop))
        })?);
        threads.joins.push(spawn("pf-pools", {
            let inner = Arc::clone(&inner);
            Box::new(move || look_after_pools(&inner, &stopping))
        })?);
        let gate: Weak<dyn fork::Quiesce> = Arc::downgrade(&ctx) as _;
        fork::register(gate);
        Ok(Engine { inner, _threads: Arc::new(threads) })
    }
}

fn no_pagemap(errno: Errno) -> BuildError {
    match errno {
        Errno(libc::EMFILE | libc::ENFILE | libc::ENOMEM) => {
            BuildError::Resource { what: "opening /proc/self/pagemap", source: errno }
        }
        errno => BuildError::Pagemap(errno),
    }
}

fn open_descriptor(sys: &dyn Sys, rights: Rights) -> Result<Uffd, BuildError> {
    let features = Features::MOVE
        | Features::PAGEFAULT_FLAG_WP
        | Features::EVENT_REMAP
        | Features::EVENT_REMOVE
        | Features::EVENT_UNMAP;
    sys.open_uffd(rights, features).map_err(|e| match e {
        Errno(libc::EPERM | libc::EACCES) => BuildError::NotPermitted(e),
        Errno(libc::EINVAL | libc::ENOSYS) => BuildError::KernelTooOld(e),
        source => BuildError::Resource { what: "opening a userfaultfd", source },
    })
}

/// Refills the pools that are in demand, and frees all frames when nothing has moved for long.
fn look_after_pools(inner: &Inner, stopping: &AtomicBool) {
    let (roused, condition) = &inner.housekeeping;
    loop {
        {
            let mut roused = roused.lock();
            while !*roused && !stopping.load(Ordering::Acquire) {
                roused = condition.wait(roused);
            }
            *roused = false;
        }
        loop {
            if stopping.load(Ordering::Acquire) {
                return;
            }
            let pools = &inner.ctx.pools;
            let demand = pools.demand.lock().take();
            if let Some(demand) = demand {
                pools.refill(demand, pools.budget() / 8, pools.budget() / 4);
            }
            registered::tidy(&inner.ctx);
            pools.renew();
            let held = look_after_notes(&inner.ctx);
            let busy = held || !inner.claims.lock().is_empty();
            if !busy && inner.last_move.lock().elapsed() >= inner.idle_release {
                pools.release_all();
                break;
            }
            drop(condition.wait_for(roused.lock(), HOUSEKEEPING.min(inner.idle_release)));
        }
    }
}

/// One look at what the program gave up ([`Flights::look`]); true as long as there is any.
fn look_after_notes(ctx: &Context) -> bool {
    let here = 0u8;
    let page = std::ptr::from_ref(&here).addr() & !(page_size() - 1);
    // So that each look stands for one turn at the lock of the address space. (Refused, it does.)
    // SAFETY: the page is of this thread's stack, whose access pattern is the normal one already.
    let _ = unsafe { ctx.sys.advise(page, page_size(), Advice::Normal) };
    ctx.flights.look()
}

/// What an engine has and has done.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Stats {
    /// Frames at rest, by pool.
    pub frames: Vec<PoolStats>,
    /// Memory that the engine holds beyond what the program would use: all spare frames.
    pub frame_bytes: usize,
    /// Memory of the engine's own bookkeeping.
    pub metadata_bytes: usize,
    /// Moves begun.
    pub moves: u64,
    /// Bytes moved.
    pub bytes_moved: u64,
}

impl Engine {
    /// An engine with the defaults.
    ///
    /// # Errors
    /// As [`EngineBuilder::build`].
    pub fn new() -> Result<Self, BuildError> {
        Self::builder().build()
    }

    /// An engine with options.
    pub fn builder() -> EngineBuilder {
        EngineBuilder::new()
    }

    /// The machine as it was when the engine was built.
    pub fn machine(&self) -> &Machine {
        &self.inner.machine
    }

    /// Whose faults the engine sees.
    pub fn rights(&self) -> Rights {
        self.inner.rights
    }

    /// The copy engine that is used where a move names no other.
    pub fn cpu(&self) -> &Arc<CpuEngine> {
        &self.inner.cpu
    }

    /// A new region of `bytes`, rounded up to pages.
    pub fn map(&self, bytes: usize) -> RegionBuilder {
        RegionBuilder::new(self.clone(), bytes)
    }

    /// Manages memory that is there already: private, anonymous, writable.
    ///
    /// # Errors
    /// [`RegionError`]: not aligned, empty, managed already, or in use otherwise
    /// ([`RegionError::OwnMemory`], [`RegionError::InUse`]), as far as that can be seen at this moment:
    /// the control blocks of the process's threads, what `brk(2)` gave and what `malloc(3)` gives now,
    /// the main thread's stack and the caller's.
    ///
    /// # Safety
    /// The range stays mapped, and private anonymous memory, until the region is dropped, but for
    /// parts that the program unmaps or replaces knowing that a move may then report them as
    /// [`Gone`](crate::Outcome::Gone). No other userfaultfd watches it. With [`References::Never`], the
    /// promise that is told there is kept. No thread that moves pages (by [`Move::run`], or one of the
    /// engine's own) needs it to go on: it holds no stack of theirs, nothing that the program's global
    /// allocator gives out, and nothing that the C library's `malloc` does, which the C library itself
    /// uses (glibc has the table of thread-locals of loaded modules there, which every access to
    /// a thread-local of a shared object may read).
    ///
    /// Nor does it hold, while it moves, what the kernel writes to where it cannot wait for a page; the
    /// write is lost then, and nothing tells: a thread's control block (the C library's `struct
    /// pthread`, at the top of the thread's stack, with its list of robust mutexes and the word cleared
    /// at its end), a mutex that is robust (`pthread_mutexattr_setrobust(3)`) or has priority
    /// inheritance, and what `set_robust_list(2)` and `set_tid_address(2)` were given.
    ///
    /// If a [`RegionAlloc`](crate::RegionAlloc) is made over it, the
    /// program uses it for nothing else.
    pub unsafe fn adopt(
        &self,
        start: *mut u8,
        len: usize,
        references: References,
    ) -> Result<Region, RegionError> {
        Region::adopt(self.clone(), start.expose_provenance(), len, references)
    }

    /// Moves pages to a node.
    pub fn migrate(&self, part: Part) -> Move {
        Move::new(self.clone(), vec![part])
    }

    /// Moves two sets of pages to each other's node (or wherever each is to go), taking turns, so
    /// that each uses the frames that the other leaves: no memory is allocated if both regions
    /// promise [`References::Never`].
    pub fn exchange(&self, one: Part, other: Part) -> Move {
        Move::new(self.clone(), vec![one, other])
    }

    /// Lets this program be asked to move its regions, by its own user and by root, while the
    /// listener is there. See [`control`](crate::control).
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn listen(&self) -> Result<Listener, ListenError> {
        Listener::new(self.clone())
    }

    /// What the engine has and has done.
    pub fn stats(&self) -> Stats {
        let inner = &self.inner;
        let pools = &inner.ctx.pools;
        // Movers need the locks of the pools.
        let _deaf = Deaf::new();
        Stats {
            frames: pools.stats(),
            frame_bytes: pools.extra_bytes(),
            metadata_bytes: pools.metadata_bytes()
                + inner.ctx.flights.bookkeeping_bytes()
                // 64 bytes for each operation, as `CopyBatch::with_capacity` says.
                + inner.ctx.spare_batches.lock().len() * MAX_PAGES * 64
                + size_of::<Inner>()
                + size_of::<Context>(),
            // Relaxed: counters for display.
            moves: inner.moves.load(Ordering::Relaxed),
            bytes_moved: inner.bytes_moved.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn only_node(&self) -> Option<NodeId> {
        let mut nodes = self.inner.machine.memory_nodes();
        match (nodes.next(), nodes.next()) {
            (Some(node), None) => Some(node.id),
            _ => None,
        }
    }
}
