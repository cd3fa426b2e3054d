//! Moves the memory of a running program between NUMA nodes and memory tiers: in batches, with
//! many threads or a DMA engine, while the program goes on.
//!
//! An [`Engine`] manages [`Region`]s: memory that it mapped or adopted. [`Engine::migrate`] moves
//! pages of a region to a node, [`Engine::exchange`] swaps two sets of pages. Each gives a
//! [`Report`] that says for every page what became of it. The addresses stay the same, and the
//! program reads and writes the region throughout; an access to a page that is in the air waits
//! for it, within a *stall budget*.
//!
//! ```
//! use pageferry::{Engine, Outcome};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let engine = match Engine::new() {
//! #     Ok(engine) => engine,
//! #     Err(e) => { eprintln!("skipped: {e}"); return Ok(()); }
//! # };
//! # let _ = "
//! let engine = Engine::new()?;
//! # ";
//! let region = engine.map(4 << 20).build()?;
//! // SAFETY: the region is mapped, writable, and ours.
//! unsafe { region.as_ptr().write_bytes(7, region.len()) };
//!
//! let node = engine.machine().memory_nodes().next().ok_or("no node")?.id;
//! let report = engine.migrate(region.to(node)).run()?;
//! assert!(report.is_complete());
//! for (outcome, bytes) in report.by_outcome() {
//!     println!("{outcome}: {bytes} bytes");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! How it works, and why it loses nothing, is told in `docs/design.md`; the protocol between the
//! mover and the fault handler stands in the module `flight`.

#[cfg(not(loom))]
mod alloc;
#[cfg(not(loom))]
mod berth;
#[cfg(not(loom))]
mod context;
#[cfg(not(loom))]
pub mod control;
#[cfg(not(loom))]
mod divide;
#[cfg(not(loom))]
mod engine;
#[cfg(not(loom))]
mod error;
#[cfg_attr(loom, allow(dead_code, reason = "the model takes the protocol's calls alone"))]
mod flight;
#[cfg(all(test, loom))]
mod flight_model;
#[cfg(not(loom))]
mod handler;
#[cfg(not(loom))]
mod job;
#[cfg(not(loom))]
mod plan;
#[cfg(not(loom))]
mod policy;
#[cfg_attr(loom, allow(dead_code, reason = "the model takes the bookkeeping alone"))]
mod pool;
#[cfg(not(loom))]
mod probe;
#[cfg(not(loom))]
pub mod process;
#[cfg_attr(loom, allow(dead_code, reason = "the model takes the gate alone"))]
mod quiesce;
#[cfg(not(loom))]
mod region;
#[cfg(not(loom))]
mod registered;
#[cfg(not(loom))]
mod report;
#[cfg(not(loom))]
mod request;
mod sync;
#[cfg(not(loom))]
mod tally;
#[cfg_attr(loom, allow(dead_code, reason = "the models take no ranges apart"))]
mod units;

pub use units::{FolioSize, HUGE};
#[cfg(not(loom))]
pub use {
    alloc::RegionAlloc,
    engine::{Engine, EngineBuilder, Stats},
    error::{BuildError, MigrateError, RegionError},
    job::Frames,
    policy::DEFAULT_STALL_BUDGET,
    pool::PoolStats,
    region::{Folios, References, Region, RegionBuilder, Residency},
    report::{Busy, Division, Holes, Order, Outcome, Phases, Report, Shortage},
    request::{Handle, Move, Overlap, Part, Progress},
};

pub use pageferry_copy as copy;
pub use pageferry_sys::in_use::UsedBy;
pub use pageferry_sys::uffd::Rights;
pub use pageferry_topology as topology;

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
