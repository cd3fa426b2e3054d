//! What can go wrong: reading the tree, and asking for a node.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::ids::NodeId;
use crate::list::NodeList;

/// The tree could not be read as a machine.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadError {
    /// A file or directory that every kernel has could not be read.
    #[error("cannot read {}: {}", path.display(), self.remedy())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file does not say what the kernel documents for it.
    #[error("{} says {content:?}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it contains, cut after 80 characters.
        content: String,
        /// What was expected instead.
        reason: String,
    },
}

impl ReadError {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Io { source, .. } if is_callers_own(source) => {
                "raise the limits on open files and on memory (ulimit -n, memory.max of the cgroup)"
            }
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => {
                    "every Linux has it; mount the whole sysfs at /sys and procfs at /proc"
                }
                io::ErrorKind::PermissionDenied => {
                    "let the sandbox read it (a snap's interface hardware-observe, the AppArmor \
                     profile, the SELinux policy, the mode of /sys and /proc)"
                }
                _ => "report this with `uname -a`",
            },
            Self::Malformed { .. } => "report this with the file's content and `uname -a`",
        }
    }
}

/// Whether an errno tells of the caller's own want, not of the file.
pub(crate) fn is_callers_own(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

/// A node was named that cannot serve. Each message names the nodes that can.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The machine has no such node.
    #[error("node {node} does not exist: this machine has node(s) {online}")]
    Unknown {
        /// The node asked for.
        node: NodeId,
        /// The nodes that are online.
        online: NodeList,
    },
    /// The kernel keeps a number for the node, but nothing of it is online.
    #[error(
        "node {node} is offline: bring its memory online (for example `daxctl online-memory`) \
         or use one of the online node(s) {online}"
    )]
    Offline {
        /// The node asked for.
        node: NodeId,
        /// The nodes that are online.
        online: NodeList,
    },
    /// The node is online but has no memory, only CPUs or devices, or neither.
    #[error("node {node} has no memory: the node(s) with memory are {with_memory}")]
    NoMemory {
        /// The node asked for.
        node: NodeId,
        /// The nodes that have memory.
        with_memory: NodeList,
    },
}
