//! What became of every page that a move was asked for.

mod show;

use crate::tally::Tally;
use serde::Serialize;
use std::fmt;
use std::ops::Range;
use std::time::Duration;

/// Why a page stayed where it was although it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Busy {
    /// Pinned for device access (`FOLL_PIN`): a registered io_uring buffer, O_DIRECT in flight,
    /// RDMA, VFIO.
    Pinned,
    /// Shared with another process: after `fork`, merged by KSM, or mapped by several; a move from
    /// outside needs `CAP_SYS_NICE` for it.
    Shared,
    /// The mapping differs from the engine's frames in a way that the kernel does not move
    /// pages across: locked by `mlock`, or with other rights than to read and write (read-only,
    /// executable, a protection key).
    Mapping,
    /// A guard marker or a page with a memory error stands there.
    Guarded,
    /// The program is giving the range up by `madvise` right now.
    Discarding,
    /// Part of a huge page of which another part was not asked for.
    PartOfHuge,
    /// The kernel was working on the page (migration, reclaim) every time it was tried.
    Contended,
    /// The kernel said `EAGAIN` every time it was tried.
    Again,
    /// The kernel refused for another reason; the errno.
    Other(i32),
}

/// Why there was no frame for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Shortage {
    /// The destination node had no free memory: the kernel placed the frames elsewhere.
    Node,
    /// The engine's frame budget was spent.
    Budget,
    /// The kernel refused memory (memory cgroup limit, overcommit).
    Memory,
    /// The kernel had no huge page to give.
    Huge,
    /// What the destination node has free is its reserve; see
    /// [`process::Reserve`](crate::process::Reserve).
    Reserve,
    /// The cpuset of the page's owner does not allow the destination node.
    Forbidden,
}

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outcome {
    /// It is on the destination now.
    Moved,
    /// It was on the destination before.
    AlreadyThere,
    /// Nothing is there that could move: never touched, given back, or the shared zero page. (By
    /// the kernel's way, also: swapped out.)
    NotPresent,
    /// It stayed in swap, on no node. When the program needs it again, its policy places it.
    Swapped,
    /// It stayed, unharmed.
    Busy(Busy),
    /// It stayed, for want of a frame.
    NoFrame(Shortage),
    /// It stayed: neither the copy engine nor the CPU could copy it (a memory error).
    CopyFailed,
    /// The program unmapped or discarded it during the move.
    Gone,
    /// It stayed: the move was cancelled before its turn.
    Cancelled,
    /// It stayed: it is on a node that the move does not take pages from.
    NotAsked,
    /// It stayed: it was used within the minimum age that was asked for, or whether it was is not
    /// known; see [`process::ProcessMove::min_age`](crate::process::ProcessMove::min_age).
    Young,
    /// It would be moved, if this were not a dry run.
    WouldMove,
    /// No mapping with movable pages is at its address any more (`EFAULT`), or nothing was ever
    /// written there and the shared zero page stands in for it.
    Unmapped,
    /// Its process ended during the move.
    Exited,
}

impl Outcome {
    /// Whether the page is where it was asked to be, or there is none.
    pub fn is_settled(self) -> bool {
        matches!(
            self,
            Self::Moved
                | Self::AlreadyThere
                | Self::NotPresent
                | Self::Swapped
                | Self::Gone
                | Self::NotAsked
                | Self::Young
                | Self::Unmapped
                | Self::Exited
        )
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Moved => "moved",
            Self::AlreadyThere => "already there",
            Self::NotPresent => "not present",
            Self::Swapped => "in swap",
            Self::Busy(Busy::Pinned) => "busy: pinned for device access",
            Self::Busy(Busy::Shared) => {
                "busy: shared with other processes (from outside it needs CAP_SYS_NICE)"
            }
            Self::Busy(Busy::Mapping) => {
                "busy: locked, or mapped otherwise than for reading and writing"
            }
            Self::Busy(Busy::Guarded) => "busy: guard page or memory error",
            Self::Busy(Busy::Discarding) => "busy: being discarded",
            Self::Busy(Busy::PartOfHuge) => "busy: part of a huge page",
            Self::Busy(Busy::Contended) => "busy: in use by the kernel",
            Self::Busy(Busy::Again) => "busy: the kernel said to try again",
            Self::Busy(Busy::Other(errno)) => return write!(f, "busy: errno {errno}"),
            Self::NoFrame(Shortage::Node) => "no frame: the node is full",
            Self::NoFrame(Shortage::Budget) => "no frame: budget spent",
            Self::NoFrame(Shortage::Memory) => "no frame: memory refused",
            Self::NoFrame(Shortage::Huge) => "no frame: no huge page was free",
            Self::NoFrame(Shortage::Reserve) => "no frame: the node is down to its reserve",
            Self::NoFrame(Shortage::Forbidden) => "no frame: the cpuset does not allow the node",
            Self::CopyFailed => "copy failed",
            Self::Gone => "gone",
            Self::Cancelled => "cancelled",
            Self::NotAsked => "on a node not asked for",
            Self::Young => "used within the minimum age",
            Self::WouldMove => "would be moved",
            Self::Unmapped => "not mapped any more",
            Self::Exited => "process ended",
        };
        f.write_str(text)
    }
}

/// Time spent in the phases of a move, summed over the threads that took part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Phases {
    /// Finding what is there and where.
    pub plan: Duration,
    /// Getting frames.
    pub reserve: Duration,
    /// Write protection (live order).
    pub protect: Duration,
    /// Taking pages out.
    pub detach: Duration,
    /// Copying, by the threads that conduct the move (not the engine's workers).
    pub copy: Duration,
    /// Copying again what was written meanwhile (live order).
    pub repair: Duration,
    /// Putting pages in, and waking who waits.
    pub attach: Duration,
    /// Giving frames back.
    pub release: Duration,
}

impl Phases {
    pub(crate) fn add(&mut self, other: &Self) {
        self.plan += other.plan;
        self.reserve += other.reserve;
        self.protect += other.protect;
        self.detach += other.detach;
        self.copy += other.copy;
        self.repair += other.repair;
        self.attach += other.attach;
        self.release += other.release;
    }
}

/// Whether accesses wait during the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Protect, copy, detach, repair, attach: readers go on during the copy.
    Live,
    /// Detach, copy, attach: accesses wait for the batch.
    Frozen,
}

/// Who does the page-table work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Division {
    /// One thread; the others copy.
    Conducted,
    /// Every thread does all the steps of its own batch.
    Shared,
}

/// What a move did. Ranges are addresses; every page asked for is in exactly one of them.
///
/// Printed (`{report}`), it is a few lines for people: bytes and rate, what became of the pages,
/// order, division, engine and fallbacks, holes, CPU time for each GiB.
///
/// ```
/// # use pageferry::Engine;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let engine = match Engine::new() {
/// #     Ok(engine) => engine,
/// #     Err(e) => { eprintln!("skipped: {e}"); return Ok(()); }
/// # };
/// # let region = engine.map(4 << 20).build()?;
/// # // SAFETY: the region is mapped, writable, and ours.
/// # unsafe { region.as_ptr().write_bytes(7, region.len()) };
/// # let node = engine.machine().memory_nodes().next().ok_or("no node")?.id;
/// let report = engine.migrate(region.to(node)).even_if_there().run()?;
/// println!("{report}");
/// // moved 4 MiB in 0.52 ms, 8.07 GB/s, first folio after 301.5 us
/// //   pages: 4 MiB moved
/// //   how:   2 batches frozen, shared, copied by cpu:avx2-nt; 0 pages repaired, 0 fallbacks
/// //   holes: 2, p50 206.2 us, p99 251.0 us, max 251.0 us
/// //   CPU:   0.81 ms, 0.207 s/GiB
/// # assert!(report.to_string().lines().count() < 8);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Every page asked for, by its address (not its offset in the region), in ascending order;
    /// neighbours of one outcome are joined. Not serialized: see [`Report::by_outcome`].
    #[serde(skip)]
    pub pages: Vec<(Range<usize>, Outcome)>,
    /// Bytes moved.
    pub bytes_moved: u64,
    /// From the start of the move to its end.
    pub elapsed: Duration,
    /// From the start of the move until the first folio was in place.
    pub first_folio: Option<Duration>,
    /// Wall time by phase, summed over threads.
    pub phases: Phases,
    /// CPU time by phase, summed over threads; `copy` includes the engine's workers.
    pub cpu: Phases,
    /// Name of the copy engine.
    pub engine: String,
    /// Batches in frozen order.
    pub batches_frozen: u64,
    /// Batches in live order.
    pub batches_live: u64,
    /// Division of labour of the last part of the move.
    pub division: Division,
    /// Pages copied again because they were written during a live copy.
    pub repairs: u64,
    /// Copies that the engine failed and the CPU did, and pages placed by another call than the
    /// one planned.
    pub fallbacks: u64,
    /// Holes by how long they lasted (detach to attach).
    pub holes: Holes,
    /// Whether the move was cancelled.
    pub cancelled: bool,
}

impl Report {
    pub(crate) fn empty(engine: String, division: Division) -> Self {
        Self {
            pages: Vec::new(),
            bytes_moved: 0,
            elapsed: Duration::ZERO,
            first_folio: None,
            phases: Phases::default(),
            cpu: Phases::default(),
            engine,
            batches_frozen: 0,
            batches_live: 0,
            division,
            repairs: 0,
            fallbacks: 0,
            holes: Holes::default(),
            cancelled: false,
        }
    }

    pub(crate) fn add(&mut self, tally: Tally) {
        self.pages.extend(tally.pages);
        self.bytes_moved += tally.bytes_moved;
        self.phases.add(&tally.wall);
        self.cpu.add(&tally.cpu);
        self.batches_frozen += tally.frozen;
        self.batches_live += tally.live;
        self.repairs += tally.repairs;
        self.fallbacks += tally.fallbacks;
        self.holes.add(&tally.holes);
    }

    /// Sorts the pages and joins neighbours.
    pub(crate) fn tidy(&mut self) {
        self.pages.sort_unstable_by_key(|(r, _)| r.start);
        self.pages.dedup_by(|next, last| {
            let joins = last.1 == next.1 && last.0.end == next.0.start;
            if joins {
                last.0.end = next.0.end;
            }
            joins
        });
    }

    /// Bytes with a given outcome.
    pub fn bytes(&self, is: impl Fn(Outcome) -> bool) -> u64 {
        self.pages.iter().filter(|(_, o)| is(*o)).map(|(r, _)| r.len() as u64).sum()
    }

    /// Bytes by outcome, in ascending order of outcome.
    pub fn by_outcome(&self) -> Vec<(Outcome, u64)> {
        let mut sums = std::collections::BTreeMap::new();
        for (range, outcome) in &self.pages {
            *sums.entry(*outcome).or_insert(0) += range.len() as u64;
        }
        sums.into_iter().collect()
    }

    /// Whether every page that is there is on its destination.
    pub fn is_complete(&self) -> bool {
        self.pages.iter().all(|(_, o)| o.is_settled())
    }

    /// CPU time of the whole move, all threads.
    pub fn cpu_time(&self) -> Duration {
        let c = &self.cpu;
        c.plan + c.reserve + c.protect + c.detach + c.copy + c.repair + c.attach + c.release
    }
}

/// A histogram of hole durations: bucket `i` counts holes of `2^(i/4)` ns up to the next bucket
/// (a resolution of 19 %). Fixed in size, so that recording allocates nothing.
#[derive(Clone, PartialEq, Eq, Serialize)]
pub struct Holes {
    #[serde(skip)]
    buckets: [u32; Self::BUCKETS],
    /// The longest hole.
    pub longest: Duration,
}

impl Default for Holes {
    fn default() -> Self {
        Self { buckets: [0; Self::BUCKETS], longest: Duration::ZERO }
    }
}

impl Holes {
    const BUCKETS: usize = 160; // up to 2^40 ns, 18 minutes

    fn bucket(ns: u64) -> usize {
        let ns = ns.max(4);
        let octave = ns.ilog2();
        // The two bits below the leading one split an octave in four.
        let quarter = (ns >> (octave - 2)) & 3;
        ((octave as usize) * 4 + usize::try_from(quarter).unwrap_or(0)).min(Self::BUCKETS - 1)
    }

    pub(crate) fn record(&mut self, hole: Duration) {
        let ns = u64::try_from(hole.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[Self::bucket(ns)] += 1;
        self.longest = self.longest.max(hole);
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (a, b) in self.buckets.iter_mut().zip(&other.buckets) {
            *a += b;
        }
        self.longest = self.longest.max(other.longest);
    }

    /// How many holes there were.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|&n| u64::from(n)).sum()
    }

    /// The duration that a fraction `q` (0 to 1) of the holes did not exceed, rounded up to the
    /// next bucket; zero when there was none.
    pub fn quantile(&self, q: f64) -> Duration {
        let total = self.count();
        if total == 0 {
            return Duration::ZERO;
        }
        let mut seen = 0u64;
        for (i, &n) in self.buckets.iter().enumerate() {
            seen += u64::from(n);
            if seen as f64 >= q * total as f64 {
                let (octave, quarter) = ((i + 1) / 4, (i + 1) % 4);
                let ns = (1u64 << octave) + ((quarter as u64) << octave) / 4;
                return Duration::from_nanos(ns).min(self.longest);
            }
        }
        self.longest
    }
}
