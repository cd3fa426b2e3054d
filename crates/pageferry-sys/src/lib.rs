//! Kernel interfaces for page migration, typed and thin.
//!
//! Every raw system call of the project is made in this crate, so that one place holds the
//! binary interface (each number cites its uapi header) and one seam, the trait [`Sys`], lets a
//! test fail any call with any errno ([`inject`]).
//!
//! What always holds here:
//! - A call does what its name says and nothing more: no retry, no policy. The layers above
//!   decide what an errno means.
//! - Addresses are plain `usize`: the memory behind them belongs to someone else, may be written
//!   by other threads at any time, and is never turned into a reference.
//! - Calls that change what is mapped somewhere are `unsafe`: the caller promises that the range
//!   is under its control.

pub mod affinity;
pub mod cgroup;
mod errno;
pub mod fork;
pub mod idle;
pub mod in_use;
pub mod inject;
pub mod maps;
pub mod mm;
pub mod pagemap;
pub mod peer;
pub mod pidfd;
pub mod process;
pub mod procfs;
pub mod sched;
mod sys;
pub mod thread;
pub mod uffd;
pub mod usage;

pub use errno::Errno;
pub use sys::{Linux, Sys, SysOp};

/// The base page size in bytes, as the kernel reports it.
pub fn page_size() -> usize {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static SIZE: AtomicUsize = AtomicUsize::new(0);
    // Relaxed: the value is the same whoever computes it, and nothing else is published by it.
    match SIZE.load(Ordering::Relaxed) {
        0 => {
            // SAFETY: sysconf has no memory-safety preconditions.
            let raw = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
            let size = usize::try_from(raw).unwrap_or(4096);
            SIZE.store(size, Ordering::Relaxed);
            size
        }
        size => size,
    }
}
