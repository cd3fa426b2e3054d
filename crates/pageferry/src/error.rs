//! What can be wrong before a page is touched. One enum for each operation; every message names
//! the input, the reason and the remedy.

use pageferry_sys::Errno;
use pageferry_sys::in_use::UsedBy;
use pageferry_topology::{NodeError, ReadError};
use std::any::Any;
use std::ops::Range;

/// Why an engine could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// No right to a userfaultfd that sees faults inside system calls.
    #[error(
        "userfaultfd is not permitted ({0}): run as root or with CAP_SYS_PTRACE, or set \
         vm.unprivileged_userfaultfd=1, or give this user read and write access to \
         /dev/userfaultfd (in a container its seccomp profile must allow userfaultfd(2) too); or opt in to user-mode-only, whose contract is that no system call is \
         given managed memory while it moves"
    )]
    NotPermitted(#[source] Errno),
    /// The kernel has no `UFFDIO_MOVE`, or no userfaultfd at all.
    #[error(
        "this kernel cannot move pages between addresses ({0}): Linux 6.8 or later is needed, \
         built with CONFIG_USERFAULTFD; in a container, a seccomp profile that denies \
         userfaultfd(2) has the same effect"
    )]
    KernelTooOld(#[source] Errno),
    /// `PAGEMAP_SCAN` or procfs is missing.
    #[error("/proc/self/pagemap cannot be scanned ({0}): mount procfs, and use Linux 6.7 or later")]
    Pagemap(#[source] Errno),
    /// A resource of the kernel is exhausted.
    #[error("{what}: {source}; raise the limit (ulimit -n, memory) or close what is not needed")]
    Resource {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// The machine's description could not be read.
    #[error(transparent)]
    Machine(#[from] ReadError),
    /// Copy threads could not be started.
    #[error("copy threads could not be started: {0}")]
    Threads(String),
    /// The environment names a copy kernel that does not exist here.
    #[error("{0}")]
    Kernel(#[source] pageferry_copy::CalibrateError),
    /// An option that makes no sense.
    #[error("{option} = {value}: {reason}")]
    Option {
        /// Its name.
        option: &'static str,
        /// What was given.
        value: String,
        /// Why not, and what is allowed.
        reason: &'static str,
    },
}

/// Why a region could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// Zero bytes, or more than the address space.
    #[error("a region of {0} bytes cannot be mapped: ask for 1 byte to 2^46")]
    Size(usize),
    /// The address or length of memory to adopt is not a multiple of the page size.
    #[error("{0:#x?} is not aligned to pages: adopt whole pages")]
    Unaligned(Range<usize>),
    /// The preferred node does not exist or has no memory.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// Nothing is mapped at address 0.
    #[error("memory to adopt begins at a null pointer: give the address of a mapping")]
    Null,
    /// Memory to adopt is (in part) managed already.
    #[error("{0:#x?} overlaps a region of this engine: memory has one owner, adopt other memory")]
    Managed(Range<usize>),
    /// Memory to adopt is what a mover works with.
    #[error(
        "{0:#x?} holds the engine's own memory or the caller's stack, which a move would wait for \
         itself: adopt memory that was mapped for data"
    )]
    OwnMemory(Range<usize>),
    /// Memory to adopt is (in part) no data: the kernel, or the C library, uses it where it cannot
    /// wait.
    #[error("{range:#x?} holds {} at {at:#x}, {}", user(*by), remedy(*by))]
    InUse {
        /// What was to be adopted.
        range: Range<usize>,
        /// The first address of it that is in use.
        at: usize,
        /// By whom.
        by: UsedBy,
    },
    /// The kernel refused.
    #[error(
        "{what} failed: {source}; free memory, address space or descriptors (ulimit -v, ulimit -n, \
         overcommit)"
    )]
    Kernel {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// A range is not within the region.
    #[error(
        "bytes {given:?} are not within the region's {len} bytes: give bytes from the region's start"
    )]
    Foreign {
        /// The range, in bytes from the region's start.
        given: Range<usize>,
        /// The region's length.
        len: usize,
    },
}

fn user(by: UsedBy) -> String {
    match by {
        UsedBy::Thread(id) => format!("the control block of thread {id}"),
        UsedBy::Stack => "the main thread's stack".to_owned(),
        UsedBy::Heap => "the C library's heap".to_owned(),
        other => format!("what {other:?} uses"),
    }
}

fn remedy(by: UsedBy) -> &'static str {
    match by {
        UsedBy::Thread(_) => {
            "to which the kernel writes when the thread ends, and cannot wait for a page: adopt no \
             thread's stack (give threads other memory: pthread_attr_setstack(3))"
        }
        UsedBy::Stack => "on which a move may have to run: adopt memory that was mapped for data",
        _ => {
            "which a move may need itself: adopt memory that was mapped for data (mmap(2)), not what \
             malloc gave"
        }
    }
}

/// Why a move could not begin. No page has been touched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// The destination does not exist, is offline or has no memory.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// A range is empty or reversed.
    #[error("bytes {0:?} hold nothing to move: give a range that ends after it begins")]
    Empty(Range<usize>),
    /// A range does not begin and end at pages.
    #[error("bytes {given:?} are not aligned: move whole pages of {page} bytes")]
    Unaligned {
        /// The range, in bytes from the region's start.
        given: Range<usize>,
        /// The page size.
        page: usize,
    },
    /// A range is not within the region.
    #[error(
        "bytes {given:?} are not within the region's {len} bytes: give bytes from the region's start"
    )]
    Foreign {
        /// The range, in bytes from the region's start.
        given: Range<usize>,
        /// The region's length.
        len: usize,
    },
    /// The two sides of an exchange overlap.
    #[error("both sides of the exchange contain address {0:#x}: exchange disjoint ranges")]
    SameOnBothSides(usize),
    /// The region holds what the mover itself works with.
    #[error(
        "the region at {0:#x?} holds the engine's own memory or the caller's stack, which the move \
         would wait for itself: call from another stack, and allocate with another allocator"
    )]
    OwnMemory(Range<usize>),
    /// The region belongs to another engine.
    #[error("the region was made by another engine: move it with that one")]
    OtherEngine,
    /// The region was dropped before the move began.
    #[error("the region was dropped before its move began: keep it until the move has ended")]
    RegionGone,
    /// Another move has part of the range.
    #[error("{0:#x?} is being moved by another call: wait for it, or let this call wait")]
    Overlapping(Range<usize>),
    /// An option that makes no sense.
    #[error("{option} = {value}: {reason}")]
    Option {
        /// Its name.
        option: &'static str,
        /// What was given.
        value: String,
        /// Why not, and what is allowed.
        reason: &'static str,
    },
    /// The memory cannot be watched while it moves.
    #[error(
        "{range:#x?} cannot be registered for migration: {source}; it must be private anonymous \
         memory of this process that no other userfaultfd watches (shared memory and files move \
         by move_pages(2))"
    )]
    Register {
        /// Addresses.
        range: Range<usize>,
        /// What the kernel said.
        source: Errno,
    },
    /// The call was made in a forked child: the engine stayed with the parent.
    #[error("this engine belongs to the parent process: build a new one after fork")]
    AfterFork,
    /// No thread for the move.
    #[error("no thread could be started for the move: {0}")]
    Thread(#[source] std::io::Error),
    /// The move itself panicked; every page is where it was or where it was to go.
    #[error("the move stopped by a panic (a bug; all pages are intact): {0}")]
    Panicked(String),
}

/// What a panic said, if it was text.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
    text.unwrap_or_default()
}
