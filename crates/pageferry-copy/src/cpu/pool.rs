//! Persistent worker threads that lend a hand and park when there is nothing to do.
//!
//! Two kinds of work: a [`run`](WorkerPool::run), in which the caller takes part and pool
//! threads join while they can, and a *service* (a CPU copy engine's queue), which threads
//! serve while there is work in it.
//!
//! # What must always hold
//! - `run` returns only when every thread that entered the closure has left it; that is what
//!   lets the closure borrow. A thread enters only under the pool's lock, by taking a seat in
//!   the job's entry, and `run` takes back the free seats under the same lock: so a caller
//!   never waits for a thread that has not begun.
//! - A free thread goes to the job with the fewest threads, the oldest of equals: callers share
//!   the pool fairly.
//! - A panic in a closure is carried to the caller of `run`; one in a service ends that
//!   service's turn. The thread lives on.
//! - In the child of a fork there are no threads and the lock may be held for ever: there `run`
//!   works alone, and drop joins nobody.

use crate::cpu::kernel::Kernel;
use std::{
    any::Any,
    collections::VecDeque,
    io,
    mem::ManuallyDrop,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    ptr::NonNull,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use pageferry_sys::{
    affinity::{CpuSet, usable_cpus},
    fork,
};

use super::rest::{IDLE, Rest};
use crate::spin::Spinner;

/// Why a pool could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The system refused a thread.
    #[error(
        "cannot start copy worker {index} of {count}: {source}; ask for fewer threads or raise the process limit (ulimit -u, pids.max)"
    )]
    Spawn {
        /// The worker.
        index: usize,
        /// Workers asked for.
        count: usize,
        /// Why.
        source: io::Error,
    },
    /// A CPU to pin to does not exist or is not allowed.
    #[error(
        "cannot pin copy workers to CPU {cpu}: {source}; name CPUs of this process's affinity mask (taskset -p)"
    )]
    Pin {
        /// The CPU.
        cpu: usize,
        /// Why.
        source: io::Error,
    },
}

/// Something that pool threads serve while it has work.
pub(crate) trait Service: Send + Sync {
    /// Does one turn of work. False if there was none.
    fn turn(&self) -> bool;
}

type Closure<'a> = dyn Fn(usize) + Sync + 'a;

enum Work {
    /// The closure of a `run`, valid while its entry is in the list.
    Run(NonNull<Closure<'static>>),
    Service(Arc<dyn Service>),
}

// SAFETY: the closure is Sync, so calling it from another thread is fine, and `WorkerPool::run`
// keeps it alive while its job is listed or has threads.
unsafe impl Send for Work {}

struct Job {
    id: u64,
    work: Work,
    /// Threads that may still join.
    seats: usize,
    /// Threads inside.
    inside: usize,
    /// Threads that have ever joined: the number of the last one.
    joined: usize,
    /// For a service: asked for again since a thread last looked.
    again: bool,
    panic: Option<Box<dyn Any + Send>>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    next_id: u64,
    rest: Rest,
    stop: bool,
}

struct Shared {
    state: Mutex<State>,
    /// Each thread sleeps at its own until it is called.
    bells: Vec<Condvar>,
    /// Callers of `run` sleep here until their last helper has left.
    left: Condvar,
    /// Changes with every new job, for threads that spin.
    news: AtomicUsize,
    stop: AtomicBool,
}

/// A set of threads that copy. See the [module](self).
pub struct WorkerPool {
    shared: ManuallyDrop<Arc<Shared>>,
    threads: ManuallyDrop<Vec<JoinHandle<()>>>,
    /// The process that started the threads.
    home: u64,
}

impl WorkerPool {
    /// A pool for as many copiers as the process has CPUs (its main thread's affinity mask, and
    /// its CPU quota), not pinned.
    ///
    /// # Errors
    /// [`PoolError::Spawn`].
    pub fn new() -> Result<Self, PoolError> {
        Self::with_copiers(usable_cpus(), &[])
    }

    /// A pool for `copiers` threads that copy at once: the caller and `copiers - 1` threads
    /// named `pf-copy-1` and so on. Thread `i` is pinned to the `i`-th CPU of `pin`, cyclically;
    /// with an empty list they run where the process may.
    ///
    /// # Errors
    /// [`PoolError`]; no thread is left behind.
    pub fn with_copiers(copiers: usize, pin: &[usize]) -> Result<Self, PoolError> {
        let count = copiers.saturating_sub(1);
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                jobs: VecDeque::with_capacity(32),
                rest: Rest::with_capacity(count),
                ..State::default()
            }),
            bells: (0..count).map(|_| Condvar::new()).collect(),
            left: Condvar::new(),
            news: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self {
            shared: ManuallyDrop::new(shared),
            threads: ManuallyDrop::new(Vec::with_capacity(count)),
            home: fork::generation(),
        };
        for index in 1..=count {
            let shared = Arc::clone(&pool.shared);
            let thread =
                pageferry_sys::thread::spawn(format!("pf-copy-{index}"), move || shared.thread())
                    .map_err(|source| PoolError::Spawn { index, count, source })?;
            if !pin.is_empty() {
                pin_thread(&thread, pin[(index - 1) % pin.len()])?;
            }
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Threads of the pool, the callers not counted.
    pub fn helpers(&self) -> usize {
        if self.in_forked_child() {
            return 0;
        }
        self.threads.len()
    }

    /// Calls `f(0)` on this thread and, on at most `helpers` threads of the pool that are free
    /// meanwhile, `f(1)`, `f(2)` and so on. Returns when all that began have returned.
    ///
    /// # Panics
    /// With the panic of `f`, once all have left it.
    pub fn run(&self, helpers: usize, f: &(dyn Fn(usize) + Sync)) {
        let seats = helpers.min(self.helpers());
        if seats == 0 {
            return f(0);
        }
        // SAFETY: only the lifetime changes. The job that holds the pointer is taken off the
        // list below, after its last thread has left, whether or not `f` panics here.
        let closure: NonNull<Closure<'static>> = unsafe { std::mem::transmute(NonNull::from(f)) };
        let id = self.shared.offer(Work::Run(closure), seats);
        let own = catch_unwind(AssertUnwindSafe(|| f(0)));
        let theirs = self.shared.take_back(id);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        if let Some(panic) = theirs {
            resume_unwind(panic);
        }
    }

    /// Asks up to `helpers` threads to serve `service` until its work is done.
    pub(crate) fn request(&self, service: &Arc<dyn Service>, helpers: usize) {
        let seats = helpers.min(self.helpers());
        if seats > 0 {
            self.shared.request(service, seats);
        }
    }

    /// Whether this process is a child that came of a fork after the pool was made.
    pub(crate) fn in_forked_child(&self) -> bool {
        fork::generation() != self.home
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        if self.in_forked_child() {
            // The threads live in the parent only: there is nothing to join, and their handles
            // and the lock must not be touched. The memory is the price of it.
            return;
        }
        self.shared.stop.store(true, Ordering::Release);
        self.shared.lock().stop = true;
        self.shared.bells.iter().for_each(Condvar::notify_all);
        // SAFETY: neither is used again; drop runs once.
        let (threads, shared) = unsafe {
            (ManuallyDrop::take(&mut self.threads), ManuallyDrop::take(&mut self.shared))
        };
        let me = std::thread::current().id();
        for thread in threads {
            // A closure may own the pool's last handle and drop it on one of its threads.
            if thread.thread().id() != me && thread.join().is_err() {
                tracing::error!("a copy worker ended with a panic");
            }
        }
        drop(shared);
    }
}

impl std::fmt::Debug for WorkerPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerPool").field("helpers", &self.threads.len()).finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists a job and wakes threads for it.
    fn offer(&self, work: Work, seats: usize) -> u64 {
        self.list(self.lock(), work, seats)
    }

    fn list(&self, mut state: MutexGuard<'_, State>, work: Work, seats: usize) -> u64 {
        state.next_id += 1;
        let id = state.next_id;
        state.jobs.push_back(Job {
            id,
            work,
            seats,
            inside: 0,
            joined: 0,
            again: false,
            panic: None,
        });
        self.wake(state, seats);
        id
    }

    fn request(&self, service: &Arc<dyn Service>, seats: usize) {
        let mut state = self.lock();
        let listed = state.jobs.iter_mut().find(|job| match &job.work {
            Work::Service(other) => Arc::ptr_eq(other, service),
            Work::Run(_) => false,
        });
        let Some(job) = listed else {
            self.list(state, Work::Service(Arc::clone(service)), seats);
            return;
        };
        job.again = true;
        job.seats = job.seats.max(seats.saturating_sub(job.inside));
        let wanted = job.seats;
        self.wake(state, wanted);
    }

    /// Wakes up to `wanted` threads; the lock is free while it rings for each.
    fn wake(&self, state: MutexGuard<'_, State>, wanted: usize) {
        self.news.fetch_add(1, Ordering::Release);
        let mut state = Some(state);
        for _ in 0..wanted {
            let called = state.take().unwrap_or_else(|| self.lock()).rest.call();
            let Some(index) = called else { return };
            self.bells[index].notify_one();
        }
    }

    /// Takes the job's free seats away, waits for the threads inside, and delists it.
    fn take_back(&self, id: u64) -> Option<Box<dyn Any + Send>> {
        let mut state = self.lock();
        loop {
            let at = state.jobs.iter().position(|job| job.id == id)?;
            let job = &mut state.jobs[at];
            job.seats = 0;
            if job.inside == 0 {
                return state.jobs.remove(at).and_then(|job| job.panic);
            }
            state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The life of a pool thread.
    fn thread(&self) {
        Kernel::prepare_thread();
        let mut state = self.lock();
        let index = state.rest.enrol();
        while !state.stop {
            let best =
                (state.jobs.iter_mut()).filter(|job| job.seats > 0).min_by_key(|job| job.inside);
            let Some(job) = best else {
                state = self.idle(state, index);
                continue;
            };
            job.seats -= 1;
            job.inside += 1;
            job.joined += 1;
            job.again = false;
            let (id, number) = (job.id, job.joined);
            let (more, panic) = match &job.work {
                Work::Run(closure) => {
                    let closure = *closure;
                    drop(state);
                    // SAFETY: `run` waits for the threads inside, of which we are one.
                    let call = AssertUnwindSafe(|| unsafe { closure.as_ref() }(number));
                    (false, catch_unwind(call).err())
                }
                Work::Service(service) => {
                    let service = Arc::clone(service);
                    drop(state);
                    let more = catch_unwind(AssertUnwindSafe(|| service.turn()));
                    (more.unwrap_or(true), None)
                }
            };
            state = self.lock();
            self.leave(&mut state, id, more, panic);
        }
    }

    fn leave(&self, state: &mut State, id: u64, more: bool, panic: Option<Box<dyn Any + Send>>) {
        let Some(at) = state.jobs.iter().position(|job| job.id == id) else {
            return;
        };
        let job = &mut state.jobs[at];
        job.inside -= 1;
        match job.work {
            Work::Run(_) => {
                job.panic = job.panic.take().or(panic);
                if job.inside == 0 && job.seats == 0 {
                    self.left.notify_all();
                }
            }
            // A service that has work keeps its seat; so does one that was asked for while we
            // found nothing.
            Work::Service(_) if more || job.again => job.seats += 1,
            Work::Service(_) => {
                if job.inside == 0 {
                    state.jobs.remove(at);
                } else {
                    job.seats = 0;
                }
            }
        }
    }

    /// Spins for news, then sleeps until there is some.
    fn idle<'a>(&'a self, state: MutexGuard<'a, State>, index: usize) -> MutexGuard<'a, State> {
        let news = self.news.load(Ordering::Acquire);
        drop(state);
        let mut spinner = Spinner::new();
        while spinner.spin() {
            if self.news.load(Ordering::Acquire) != news || self.stop.load(Ordering::Acquire) {
                return self.lock();
            }
        }
        let mut state = self.lock();
        if self.news.load(Ordering::Acquire) == news && !state.stop {
            state.rest.sleep(index);
            let bell = &self.bells[index];
            let on = |state: &mut State| state.rest.is_asleep(index) && !state.stop;
            let slept = bell.wait_timeout_while(state, IDLE, on);
            state = slept.unwrap_or_else(PoisonError::into_inner).0;
            if on(&mut state) {
                state.rest.widen(index);
                state = bell.wait_while(state, on).unwrap_or_else(PoisonError::into_inner);
            }
            state.rest.wake(index);
        }
        state
    }
}

fn pin_thread(thread: &JoinHandle<()>, cpu: usize) -> Result<(), PoolError> {
    // One that a set has no room for leaves it empty, which is refused as any other that is not
    // there.
    let only: CpuSet = u32::try_from(cpu).into_iter().collect();
    only.apply_to(thread).map_err(|errno| PoolError::Pin { cpu, source: errno.into() })
}
