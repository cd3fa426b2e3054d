//! The control: what the load feels when CPU time is burnt and nothing moves.
//!
//! Moving takes CPU time however it is done, and a machine with none to spare feels that first. So
//! beside the paced moves of a round as many threads as a move has copy private memory for as much
//! CPU time as the last paced moves took, all of the engine's threads counted, in as many steps at
//! the same times. What the load feels beyond that is the price of moving itself: holes, faults,
//! interrupts.

use super::limits::no_thread;
use super::pace::{self, Wall};
use crate::cancel;
use crate::exit::Exit;
use crate::output::Problem;
use pageferry_sys::{sched, usage::Usage};
use serde::Serialize;
use std::convert::Infallible;
use std::time::{Duration, Instant};

/// Bytes copied before a thread looks at its CPU time.
const CHUNK: usize = 128 << 10;
/// Bytes of one buffer at least and at most: beyond a second-level cache, as the moved memory is.
const BUFFER: (usize, usize) = (2 << 20, 8 << 20);
/// Bytes of all buffers on a machine with few CPUs.
const BUFFERS: usize = 32 << 20;

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
    /// CPU time that the last paced moves took.
    owed: Duration,
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
            owed: Duration::ZERO,
            moving: Busy::default(),
            burning: Busy::default(),
        })
    }

    /// Notes what the paced moves of a round took: the next burning takes as much.
    pub(super) fn moved(&mut self, busy: Busy) {
        self.owed = busy.cpu;
        self.moving.add(busy);
    }

    /// Notes what a burning took.
    pub(super) fn burnt(&mut self, busy: Busy) {
        self.burning.add(busy);
    }

    /// Burns what is owed, in equal steps that are due at `dues`.
    pub(super) fn burn(&mut self, dues: &[Duration]) -> Result<(), Problem> {
        let clock = Wall(Instant::now());
        let owed = self.owed / u32::try_from(self.buffers.len()).unwrap_or(1).max(1);
        std::thread::scope(|scope| {
            for (from, to) in &mut self.buffers {
                let builder = std::thread::Builder::new().name("demo-burn".to_owned());
                let started = builder.spawn_scoped(scope, || burn(from, to, owed, dues, clock));
                started.map_err(|error| no_thread(&error))?;
            }
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

/// Copies until the thread has used `owed` of CPU time: in each step an equal share.
fn burn(from: &[u8], to: &mut [u8], owed: Duration, dues: &[Duration], clock: Wall) {
    let mut chunks = (0..from.len() / CHUNK).cycle();
    let Ok(_) = pace::keep(dues, &clock, |step| {
        let until = owed.mul_f64((step + 1) as f64 / dues.len() as f64);
        while Duration::from_nanos(sched::thread_cpu_ns()) < until && !cancel::requested() {
            let Some(chunk) = chunks.next() else { break };
            let range = chunk * CHUNK..(chunk + 1) * CHUNK;
            to[range.clone()].copy_from_slice(&from[range]);
            // Nobody reads what is copied; it must be copied all the same.
            std::hint::black_box(&mut *to);
        }
        Ok::<_, Infallible>(())
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_burns_what_the_moves_took_and_nothing_before_any() -> Result<(), Problem> {
        let mut control = Control::new(2)?;
        let run = |control: &mut Control| {
            let watch = Watch::begin(Duration::ZERO);
            control.burn(&[Duration::ZERO, Duration::from_millis(1)])?;
            control.burnt(watch.end(Duration::ZERO));
            Ok(())
        };
        run(&mut control)?;
        assert!(control.buffers.iter().all(|(_, to)| to.iter().all(|b| *b == 2)), "no CPU owed");
        let owed = Duration::from_millis(40);
        control.moved(Busy { cpu: owed, wall: owed * 2 });
        run(&mut control)?;
        assert!(control.buffers.iter().all(|(_, to)| to[0] == 1), "each thread has its share");
        // Threads count their own CPU time, so all of it was burnt however busy the machine is.
        assert!(control.burning.cpu >= owed, "{control:?}", control = control.burning);
        let burnt = control.result();
        assert_eq!((burnt.threads, burnt.cpus_moving), (2, 0.5));
        assert!(burnt.cpus_burnt > 0.0);
        Ok(())
    }
}
