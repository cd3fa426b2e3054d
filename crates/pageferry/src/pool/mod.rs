//! Frames: populated spare pages on a known node, and empty slots for pages that were taken out.
//!
//! For each node and folio size there is an *arena* of address space, cut into *extents* of
//! 2 MiB. An extent holds one huge frame, up to 512 base frames, or nothing. A transaction takes
//! one extent of frames (on the destination) and one empty extent (of the source node); it moves
//! the old pages into the empty one and the frames out of the other, so that afterwards they have
//! changed places and nothing was allocated or freed.
//!
//! What always holds:
//! - An [`Extent`] has one owner: the pool, or the transaction that took it.
//! - A frame is on its node: arenas *prefer* their node (a strict binding would call the OOM
//!   killer when it is full) and every fresh frame is looked up; what landed elsewhere is given
//!   back and reported as a shortage.
//! - The memory that the engine has beyond what the program would use never exceeds the budget,
//!   but for the batches in the air: it grows by populating and shrinks by freeing. Detach and
//!   attach exchange pages one for one; where the kernel copies, the old pages come on top until
//!   their extent is given back.
//! - Who holds a plain reference (`FOLL_GET`) to a page is not noticed by `UFFDIO_MOVE`, and cannot
//!   be seen from here. So a detached page is freed, and carries other data only where its region
//!   promises that there is no such reference ([`References::Never`](crate::References)); then it
//!   rests for the grace period first, for readers from outside the program that hold a page for
//!   a moment (`process_vm_readv(2)`), and it carries data of that region, or of one that moves
//!   in exchange with it, alone.
//! - Extents of huge frames never keep a page table of their own: the kernel moves a huge page
//!   whole only into an empty page-middle entry. One that was split is mapped anew.

#[cfg(not(loom))]
mod allowance;
mod arena;
mod budget;
#[cfg(all(test, loom))]
mod model;
#[cfg(not(loom))]
mod pools;

#[cfg(not(loom))]
pub use pools::PoolStats;
#[cfg(not(loom))]
pub(crate) use {
    arena::{Extent, pages_per_extent},
    pools::{PoolConfig, Pools, Source},
};
