//! The kernel's way: pages of any process, moved by `move_pages(2)` while it runs.
//!
//! [`ProcessMove`] moves, [`Where`] only looks. Both take a [`Selection`]: processes by pid, by
//! cgroup, with their children; both walk over the mappings as a stream, so that memory does not grow with what they
//! look at; and both count every page exactly once.
//!
//! How it works: the `walk` finds present pages (`PAGEMAP_SCAN`) and cuts them into pieces; the
//! `work` queue gives them out, those that failed once more after a while; a `mover` asks for each
//! page's node, moves what is to be moved in calls that fit a latency target (`pace`), where the
//! destination has memory to spare (`room`), and accounts for every page (`report`). With a
//! minimum `age`, a first walk marks pages idle, and only those that stay so are moved.
//!
//! What always holds:
//! - The outcomes add up to all pages looked at. A page that could not be moved is where it was.
//! - What a process does meanwhile (end, exec, fork, map, unmap) is a [`Note`], not an error.
//! - Nothing spins; every retry is bounded.
//!
//! What can go wrong:
//! - The walk does not see a page that somebody else (compaction, another mover) is migrating at the
//!   moment of its scan: the page map shows it as swapped out. Like what is, it is in no line.
//! - Anonymous memory that processes have in common since a fork is looked at for each of them by a
//!   move, which finds it there already the second time; [`Where`] and dry runs count it once where
//!   the caller may see frames, and a [`Note`] says what was done (`common`).
//! - `move_pages(2)` takes a pid, which may be another process's by the time of the call, if this one
//!   ended and was waited for. A pidfd tells afterwards; at worst pages of another process were
//!   moved, which changes where they are and not what they hold.

mod absent;
mod age;
mod common;
mod control;
mod cost;
mod error;
mod job;
mod missing;
mod mover;
mod notes;
mod pace;
mod piece;
mod place;
mod report;
mod request;
mod residency;
mod retry;
mod room;
mod seen;
mod select;
mod send;
mod targets;
mod walk;
mod work;

pub use control::{ProcessProgress, Stage};
pub use cost::Cost;
pub use error::{OptionError, ProcessError, TargetError};
pub use notes::{Note, Notes};
pub use place::Destination;
pub use report::{Example, Line, ProcessReport};
pub use request::{DEFAULT_CALL_LATENCY, DEFAULT_RETRIES, ProcessHandle, ProcessMove};
pub use residency::{BigMapping, Holding, ProcessResidency, Where};
pub use select::{Filter, Kind, Selection};
pub use targets::Target;

/// How the workers compete for CPUs with the programs of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// As the caller does.
    #[default]
    Normal,
    /// With this nice value (-20 to 19).
    Nice(i8),
    /// Only where nobody else wants to run (`SCHED_IDLE`).
    Idle,
}

/// What stays free on the destination nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reserve {
    /// The sum of the node's high watermarks: below it the kernel reclaims memory of others.
    #[default]
    Watermark,
    /// So many bytes; 0 for none.
    Bytes(u64),
}
