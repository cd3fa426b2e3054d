//! What a machine's memory looks like: NUMA nodes, tiers, CPUs, caches and the
//! distances between them, read from the files that the kernel publishes.
//!
//! Everything comes from one directory tree, by default `/`; a test gives the
//! tree of another machine instead ([`Machine::read_from`]). Files are only
//! read, nothing is written and no system call other than file access is made,
//! save the page size of the running system.
//!
//! What always holds for a [`Machine`]:
//! - it has at least one node and at least one CPU, both in ascending order of
//!   id; a CPU is listed by several nodes where nodes are emulated (`numa=fake`);
//! - every node has a distance to every node, itself included;
//! - only online nodes and CPUs appear; nodes that are possible but offline are
//!   known by id alone ([`Machine::offline_nodes`]);
//! - a node with memory belongs to exactly one tier, a node without to none.
//!
//! What can go wrong: a file is unreadable, or says something that this crate
//! cannot make sense of. Both are a [`ReadError`] that names the file, and for
//! the second its content. Optional knowledge (caches, tiers, bandwidths, huge
//! page sizes) may be absent and is then empty, `None`, or marked as derived.
//!
//! A machine is a snapshot: hot-plug and the free memory move on without it. While
//! nodes or CPUs come or go it is read anew.
//!
//! ```no_run
//! use pageferry_topology::{Machine, NodeId};
//!
//! let machine = Machine::read()?;
//! let node = machine.memory_node(NodeId::new(0))?;
//! println!("{} bytes, CPUs {}", node.memory_bytes, machine.nearest_cpus(node.id)?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod cpu;
mod error;
mod ids;
mod list;
mod machine;
mod model;
mod node;
mod pages;
mod tier;
mod tree;

pub use cpu::{Cache, CacheKind, Cpu};
pub use error::{NodeError, ReadError};
pub use ids::{CpuId, Id, NodeId, TierId};
pub use list::{CpuList, IdList, ListError, NodeList};
pub use machine::Machine;
pub use node::{Access, Node};
pub use pages::PageSizes;
pub use tier::{Tier, TierSource};
