//! What can be wrong before a page is touched.

use pageferry_sys::Errno;
use pageferry_topology::{NodeError, NodeId, ReadError};
use std::path::PathBuf;

/// An option that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{option} = {value}: {reason}")]
pub struct OptionError {
    /// Its name.
    pub option: &'static str,
    /// What was given.
    pub value: String,
    /// Why not, and what is allowed.
    pub reason: &'static str,
}

/// Why a target cannot be looked at. Only what was named itself is an error; a process that was
/// found in a cgroup or among children becomes a [`Note`](super::Note).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// Nothing was named.
    #[error("no process is named: give at least one pid or cgroup")]
    Empty,
    /// `/proc` is that of another pid namespace: a number means one process there, and another in
    /// a system call.
    #[error(
        "/proc is that of another pid namespace, whose numbers are other processes' (nsenter -p \
         without -m): mount procfs of this one, as `unshare --mount-proc` does, or enter its \
         mount namespace too"
    )]
    ForeignProcfs,
    /// The kernel, or a sandbox, does not let this program ask where pages are.
    #[error(
        "move_pages(2) is refused to this program ({0}), so that it can neither tell where pages \
         are nor move them: allow it in the sandbox's seccomp profile (containers: --security-opt \
         seccomp=PROFILE, or --cap-add SYS_NICE where the runtime's profile goes by that)"
    )]
    Refused(#[source] Errno),
    /// There is no such process.
    #[error("there is no process {0}: it has ended, or lives in another pid namespace")]
    NoProcess(u32),
    /// It has ended and waits for its parent.
    #[error("process {0} has ended (a zombie) and has no memory: its parent has not waited for it")]
    Zombie(u32),
    /// A kernel thread.
    #[error("process {0} is a kernel thread, which has no memory of its own: name a program")]
    KernelThread(u32),
    /// Another user's, or more privileged than the caller.
    #[error(
        "process {pid} (user {uid}) is not ours to look into: {source}; run as that user, as \
         root, or with CAP_SYS_PTRACE (and CAP_SYS_NICE to move memory that processes share)"
    )]
    Denied {
        /// Its pid.
        pid: u32,
        /// Its user.
        uid: u32,
        /// What the kernel said.
        source: Errno,
    },
    /// There is no such cgroup.
    #[error(
        "{} is no cgroup: give a folder that holds cgroup.procs, or a path below \
         /sys/fs/cgroup (v2) or /sys/fs/cgroup/memory (v1)",
        .0.display()
    )]
    NoGroup(PathBuf),
    /// A cgroup's processes cannot be listed.
    #[error("the processes of cgroup {} cannot be listed: {source}", path.display())]
    Group {
        /// The group.
        path: PathBuf,
        /// What the kernel said.
        source: Errno,
    },
    /// A process cannot be held or read for another reason.
    #[error(
        "process {pid} cannot be opened: {source}; is procfs mounted, and are files left (ulimit -n)?"
    )]
    Open {
        /// Its pid.
        pid: u32,
        /// What the kernel said.
        source: Errno,
    },
}

/// Why a move of processes' pages could not begin. No page has been touched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// A target cannot be looked at.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// A node does not exist, is offline or has no memory.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The cpuset of a process does not allow a destination.
    #[error(
        "process {pid} may not have memory on node {node}: its cpuset allows {allowed}; choose \
         one of these, or change cpuset.mems of its cgroup"
    )]
    Forbidden {
        /// Its pid.
        pid: u32,
        /// The destination.
        node: NodeId,
        /// The nodes that it may use, as a list.
        allowed: String,
    },
    /// The cpuset of this program itself does not allow a destination. `move_pages(2)` takes
    /// memory as its caller may, whosever pages it moves.
    #[error(
        "this program itself may not have memory on node {node}, nor move pages of others there: \
         its own cpuset allows {allowed}; run it outside of that cpuset (in another cgroup or \
         container), or change cpuset.mems of its cgroup"
    )]
    OwnCpuset {
        /// The destination.
        node: NodeId,
        /// The nodes that this program may use, as a list.
        allowed: String,
    },
    /// An option makes no sense.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// The machine's description could not be read.
    #[error(transparent)]
    Machine(#[from] ReadError),
    /// The kernel cannot move pages of other processes.
    #[error(
        "this kernel does not move pages ({0}): Linux with CONFIG_NUMA and CONFIG_MIGRATION is needed"
    )]
    NoNuma(#[source] Errno),
    /// A minimum age was asked for, and the kernel does not track idle pages.
    #[error(
        "min_age: this kernel does not track which pages are idle ({0}): Linux with \
         CONFIG_IDLE_PAGE_TRACKING=y is needed, and root; or leave the minimum age out"
    )]
    NoIdlePages(#[source] Errno),
    /// A minimum age was asked for, and which pages are idle is not for the caller to know.
    #[error(
        "min_age: which pages are idle is told to root alone ({0}): run as root, with \
         CAP_SYS_ADMIN in the first user namespace and /sys writable; or leave the minimum age out"
    )]
    IdlePagesDenied(#[source] Errno),
    /// No thread for the move.
    #[error("no thread could be started for the move: {0}")]
    Thread(#[source] std::io::Error),
    /// The move itself panicked; every page is where it was or where it was to go.
    #[error("the move stopped by a panic (a bug; all pages are intact): {0}")]
    Panicked(String),
}
