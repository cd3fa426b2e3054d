//! Software devices for tests: engines that copy, but fail, dawdle, panic, lie or complete out
//! of order as they are told. Not for production use; they are public so that the tests of the
//! layers above can hand them to the code under test.
//!
//! One [`ModelEngine`] copies one operation at a time with `memcpy`: either on a thread of its
//! own, which announces results ([`ModelEngine::threaded`]), or only when polled, as a DMA
//! engine without interrupts does ([`ModelEngine::polled`]).

use std::{
    collections::VecDeque,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use crate::{
    batch::CopyBatch,
    cpu::kernel::Kernel,
    engine::{Capabilities, Completion, CopyEngine, CopyError, SubmitError},
    ticket::{EngineId, Ticket},
};

/// What a [`ModelEngine`] does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Behaviour {
    /// Nothing.
    Faithful,
    /// Completes the last operation first.
    Backwards,
    /// Takes this long for each operation.
    Slow(Duration),
    /// Refuses every batch.
    Refuses,
    /// Fails every `n`-th operation with this device status, without copying it.
    Fails {
        /// 1 for all.
        every: usize,
        /// The status.
        code: i32,
    },
    /// Fails every `n`-th operation with a memory fault at its source, without copying it.
    Faults {
        /// 1 for all.
        every: usize,
    },
    /// Copies and reports this many bytes less than asked, for every `n`-th operation.
    Short {
        /// 1 for all.
        every: usize,
        /// Bytes missing.
        by: usize,
    },
    /// Copies what was asked and claims one byte more.
    Long,
    /// Completes every operation twice.
    Twice,
    /// Never completes every `n`-th operation.
    Forgets {
        /// 1 for all.
        every: usize,
    },
    /// Panics instead of copying the operation after this many, and is out of service from
    /// then on.
    Panics {
        /// Operations that go well.
        after: usize,
    },
}

/// A copy engine that misbehaves as told.
pub struct ModelEngine {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    id: EngineId,
    behaviour: Behaviour,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Operations ever begun.
    begun: usize,
    broken: bool,
    stop: bool,
}

struct Job {
    ticket: Ticket,
    begun: usize,
}

/// Batches that the model queues at most.
const QUEUE_DEPTH: usize = 16;
/// Longest operation that the model takes, in bytes, so that its users must split.
const MAX_OP_LEN: usize = 64 << 20;

impl ModelEngine {
    /// An engine with a thread of its own.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn threaded(behaviour: Behaviour) -> std::io::Result<Self> {
        let mut engine = Self::polled(behaviour);
        let shared = Arc::clone(&engine.shared);
        engine.thread = Some(pageferry_sys::thread::spawn("pf-model", move || shared.thread())?);
        Ok(engine)
    }

    /// An engine that works only inside [`CopyEngine::poll`].
    pub fn polled(behaviour: Behaviour) -> Self {
        Self {
            shared: Arc::new(Shared {
                id: EngineId::new(),
                behaviour,
                state: Mutex::new(State {
                    jobs: VecDeque::with_capacity(QUEUE_DEPTH),
                    ..State::default()
                }),
                work: Condvar::new(),
            }),
            thread: None,
        }
    }
}

impl fmt::Debug for ModelEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelEngine")
            .field("behaviour", &self.shared.behaviour)
            .field("threaded", &self.thread.is_some())
            .finish_non_exhaustive()
    }
}

impl CopyEngine for ModelEngine {
    fn name(&self) -> &str {
        "model"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            max_op_len: MAX_OP_LEN,
            alignment: 1,
            queue_depth: QUEUE_DEPTH,
            max_parallel: 1,
            is_cpu: false,
            uses_caller_cpu: self.thread.is_none(),
            completion: match self.thread {
                Some(_) => Completion::Notified,
                None => Completion::Polled { interval: Duration::from_micros(50) },
            },
        }
    }

    unsafe fn submit(&self, batch: &Arc<CopyBatch>) -> Result<(), SubmitError> {
        let mut state = self.shared.lock();
        if state.broken || self.shared.behaviour == Behaviour::Refuses {
            return Err(SubmitError::OutOfService {
                name: self.name().to_owned(),
                reason: "the model was told to break".to_owned(),
            });
        }
        if state.jobs.len() == QUEUE_DEPTH {
            return Err(SubmitError::QueueFull { depth: QUEUE_DEPTH });
        }
        for (index, len) in batch.live().iter().map(|slot| slot.op().len).enumerate() {
            if len > MAX_OP_LEN {
                return Err(SubmitError::TooLong { index, len, max: MAX_OP_LEN });
            }
        }
        let ticket = batch.begin(&self.shared.id)?;
        if !batch.is_empty() {
            state.jobs.push_back(Job { ticket, begun: 0 });
        }
        drop(state);
        self.shared.work.notify_one();
        Ok(())
    }

    fn poll(&self) {
        if self.thread.is_none() {
            self.shared.guarded_step();
        }
    }

    fn cancel(&self, batch: &CopyBatch) {
        let mut state = self.shared.lock();
        let at = (state.jobs.iter()).position(|job| std::ptr::eq(&**job.ticket.batch(), batch));
        let Some(job) = at.and_then(|at| state.jobs.remove(at)) else {
            return;
        };
        // The lock is held during each copy: none is under way.
        for turn in job.begun..batch.len() {
            job.ticket.cancel(self.shared.index(turn, batch.len()));
        }
    }
}

impl Drop for ModelEngine {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stop = true;
        state.jobs.clear();
        drop(state);
        self.shared.work.notify_one();
        if let Some(thread) = self.thread.take() {
            // Panics of the model are caught within.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn thread(&self) {
        Kernel::prepare_thread();
        loop {
            let mut state = self.lock();
            while state.jobs.is_empty() && !state.stop {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.stop {
                return;
            }
            drop(state);
            self.guarded_step();
        }
    }

    /// Works on one operation. A panic breaks the engine, and its batches are let go of.
    fn guarded_step(&self) {
        if let Behaviour::Slow(delay) = self.behaviour {
            std::thread::sleep(delay);
        }
        if catch_unwind(AssertUnwindSafe(|| self.step())).is_err() {
            let mut state = self.lock();
            state.broken = true;
            let jobs = std::mem::take(&mut state.jobs);
            drop(state);
            drop(jobs);
        }
    }

    fn step(&self) {
        let mut state = self.lock();
        let number = state.begun;
        let Some(job) = state.jobs.front_mut() else {
            return;
        };
        let turn = job.begun;
        job.begun += 1;
        let count = job.ticket.batch().len();
        self.one(&job.ticket, self.index(turn, count), number);
        let over = job.begun == count;
        state.begun += 1;
        if over {
            state.jobs.pop_front();
        }
    }

    /// The operation whose turn it is.
    fn index(&self, turn: usize, count: usize) -> usize {
        match self.behaviour {
            Behaviour::Backwards => count - 1 - turn,
            _ => turn,
        }
    }

    /// Does one operation as the behaviour wants it; `number` counts all of the engine's.
    fn one(&self, ticket: &Ticket, index: usize, number: usize) {
        let Some(op) = ticket.batch().op(index) else {
            return;
        };
        let hit = |every: usize| (number + 1).is_multiple_of(every.max(1));
        let mut len = op.len;
        match self.behaviour {
            Behaviour::Fails { every, code } if hit(every) => {
                return ticket.complete(index, Err(CopyError::Device { code }));
            }
            Behaviour::Faults { every } if hit(every) => {
                let fault = CopyError::MemoryFault { addr: op.src, signal: 0 };
                return ticket.complete(index, Err(fault));
            }
            Behaviour::Forgets { every } if hit(every) => return,
            Behaviour::Short { every, by } if hit(every) => len = len.saturating_sub(by),
            #[expect(clippy::panic, reason = "this is what the model is told to do")]
            Behaviour::Panics { after } if number >= after => {
                panic!("the model engine panics as it was told to")
            }
            _ => {}
        }
        // SAFETY: the batch was submitted, so `submit`'s promises hold for this operation, and
        // `len` is at most its length.
        let copied = unsafe { Kernel::MEMCPY.copy(op.dst, op.src, len) };
        let claimed = len + usize::from(self.behaviour == Behaviour::Long);
        let result = copied.map(|()| claimed).map_err(CopyError::from);
        ticket.complete(index, result);
        if self.behaviour == Behaviour::Twice {
            ticket.complete(index, result);
        }
    }
}
