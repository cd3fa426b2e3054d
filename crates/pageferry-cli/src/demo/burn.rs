//! The control: what the load feels when CPU time is burnt and nothing moves.
//!
//! Moving takes CPU time however it is done, and a machine with none to spare feels that first. So
//! after the moves of a round as many threads as a move has copy private memory for as much CPU
//! time as the moves took, all of the engine's threads counted. What the load feels beyond that
//! is the price of moving itself: holes, faults, interrupts.

use super::limits::no_thread;
use crate::cancel;
use crate::exit::Exit;
use crate::output::Problem;
use pageferry_sys::{sched, usage::Usage};
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Bytes copied before a thread looks at its CPU time.
const CHUNK: usize = 128 << 10;
/// Bytes of one buffer at least and at most: beyond a second-level cache, as the moved memory is.
const BUFFER: (usize, usize) = (2 << 20, 8 << 20);
/// Bytes of all buffers on a machine with few CPUs.
const BUFFERS: usize = 32 << 20;
/// A thread that is ahead of its share sleeps so long at least: less would be all overhead.
const NAP: Duration = Duration::from_micros(50);

/// CPU time that this process, without its load, spends in a phase.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Busy {
    cpu: Duration,
    wall: Duration,
}

impl Busy {
    /// CPUs kept busy on average.
    fn cpus(self) -> f64 {
        if self.wall.is_zero() { 0.0 } else { self.cpu.as_secs_f64() / self.wall.as_secs_f64() }
    }

    fn add(&mut self, other: Self) {
        self.cpu += other.cpu;
        self.wall += other.wall;
    }
}

/// A phase under way.
#[derive(Debug)]
pub(super) struct Watch {
    began: Instant,
    process: Usage,
    load: Duration,
}

impl Watch {
    /// Begins; `load` is the CPU time that the load has used so far.
    pub(super) fn begin(load: Duration) -> Self {
        Self { began: Instant::now(), process: Usage::of_process(), load }
    }

    /// Ends; what was spent beside the load.
    pub(super) fn end(self, load: Duration) -> Busy {
        let wall = self.began.elapsed();
        let process = Duration::from_nanos(Usage::of_process().since(&self.process).cpu_ns());
        Busy { cpu: process.saturating_sub(load.saturating_sub(self.load)), wall }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Control {
    buffers: Vec<(Vec<u8>, Vec<u8>)>,
    /// CPUs that the last moves kept busy.
    owed: f64,
    moving: Busy,
    burning: Busy,
}

/// What the control did, for the report.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Burnt {
    /// Threads that copied.
    pub(super) threads: usize,
    /// CPUs that moving kept busy, on average, beside the load.
    pub(super) cpus_moving: f64,
    /// CPUs that the control kept busy.
    pub(super) cpus_burnt: f64,
}

impl Control {
    /// A control of `threads` threads; their memory is made here.
    ///
    /// # Errors
    /// There is no memory.
    pub(super) fn new(threads: usize) -> Result<Self, Problem> {
        let bytes = (BUFFERS / 2 / threads.max(1)).clamp(BUFFER.0, BUFFER.1);
        let buffer = |fill: u8| {
            let mut buffer = Vec::new();
            buffer.try_reserve_exact(bytes).map_err(|e| Problem {
                what: "no memory for the control that burns CPU time".into(),
                because: e.to_string(),
                remedy: "free some memory, or raise the memory limit".into(),
                exit: Exit::Failed,
            })?;
            // Not zeros, so that every page is made now.
            buffer.resize(bytes, fill);
            Ok::<_, Problem>(buffer)
        };
        let buffers = (0..threads).map(|_| Ok((buffer(1)?, buffer(2)?)));
        Ok(Self {
            buffers: buffers.collect::<Result<_, Problem>>()?,
            owed: 0.0,
            moving: Busy::default(),
            burning: Busy::default(),
        })
    }

    /// Notes what the moves of a round took: the next burning takes as much.
    pub(super) fn moved(&mut self, busy: Busy) {
        self.owed = busy.cpus();
        self.moving.add(busy);
    }

    /// Notes what a burning took.
    pub(super) fn burnt(&mut self, busy: Busy) {
        self.burning.add(busy);
    }

    /// Burns until `end`, beside `wait`, which returns then.
    pub(super) fn burn_until(&mut self, end: Instant, wait: impl FnOnce()) -> Result<(), Problem> {
        let share = (self.owed / self.buffers.len().max(1) as f64).clamp(0.0, 1.0);
        let stop = AtomicBool::new(false);
        // Relaxed: stopping publishes nothing, and needs to be seen soon, not at once.
        let goes_on =
            || Instant::now() < end && !cancel::requested() && !stop.load(Ordering::Relaxed);
        std::thread::scope(|scope| {
            for (from, to) in &mut self.buffers {
                let builder = std::thread::Builder::new().name("demo-burn".to_owned());
                let started = builder.spawn_scoped(scope, || burn(from, to, share, goes_on));
                if let Err(error) = started {
                    stop.store(true, Ordering::Relaxed);
                    return Err(no_thread(&error));
                }
            }
            wait();
            Ok(())
        })
    }

    /// For the report.
    pub(super) fn result(&self) -> Burnt {
        Burnt {
            threads: self.buffers.len(),
            cpus_moving: self.moving.cpus(),
            cpus_burnt: self.burning.cpus(),
        }
    }
}

/// Copies, for `share` of the time, while `goes_on`.
fn burn(from: &[u8], to: &mut [u8], share: f64, goes_on: impl Fn() -> bool) {
    let began = Instant::now();
    let mut chunks = (0..from.len() / CHUNK).cycle();
    while goes_on() {
        let owed = began.elapsed().mul_f64(share);
        let spent = Duration::from_nanos(sched::thread_cpu_ns());
        if spent >= owed {
            std::thread::sleep((spent - owed).max(NAP));
            continue;
        }
        let Some(chunk) = chunks.next() else { return };
        let range = chunk * CHUNK..(chunk + 1) * CHUNK;
        to[range.clone()].copy_from_slice(&from[range]);
        // Nobody reads what is copied; it must be copied all the same.
        std::hint::black_box(&mut *to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_burns_what_the_moves_took_and_nothing_before_any() -> Result<(), Problem> {
        let mut control = Control::new(2)?;
        let run = |control: &mut Control| {
            let (watch, length) = (Watch::begin(Duration::ZERO), Duration::from_millis(40));
            control.burn_until(Instant::now() + length, || std::thread::sleep(length))?;
            control.burnt(watch.end(Duration::ZERO));
            Ok(())
        };
        run(&mut control)?;
        assert!(control.buffers.iter().all(|(_, to)| to.iter().all(|b| *b == 2)), "no CPU owed");
        control.moved(Busy { cpu: Duration::from_secs(1), wall: Duration::from_secs(2) });
        let copied = |c: &Control| c.buffers.iter().any(|(_, to)| to[0] == 1);
        // On a busy machine a thread may come too late for one burning.
        for _ in 0..100 {
            if !copied(&control) {
                run(&mut control)?;
            }
        }
        assert!(copied(&control));
        let burnt = control.result();
        assert_eq!((burnt.threads, burnt.cpus_moving), (2, 0.5));
        assert!(burnt.cpus_burnt > 0.0);
        Ok(())
    }
}
