//! What is worth knowing about processes that live while they are looked at. Bounded in number;
//! what is left out is counted.

use pageferry_sys::Errno;
use pageferry_topology::NodeId;
use serde::Serialize;
use std::fmt;

/// Notes kept.
const NOTES: usize = 64;

/// Something that is worth knowing and no error: processes live while they are looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "note", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Note {
    /// The process ended meanwhile.
    Exited {
        /// Its pid.
        pid: u32,
    },
    /// It executed another program; that one was looked at too.
    Executed {
        /// Its pid.
        pid: u32,
    },
    /// It mapped, unmapped or discarded memory while that was looked at.
    Changing {
        /// Its pid.
        pid: u32,
        /// Bytes that were there and then not.
        bytes: u64,
    },
    /// It had ended before it was looked at (a zombie).
    Zombie {
        /// Its pid.
        pid: u32,
    },
    /// A kernel thread, which has no memory of its own.
    KernelThread {
        /// Its pid.
        pid: u32,
    },
    /// The caller may not look into it.
    Denied {
        /// Its pid.
        pid: u32,
        /// Its user.
        uid: u32,
    },
    /// It could not be opened or read on.
    Unreadable {
        /// Its pid.
        pid: u32,
        /// The errno.
        errno: i32,
    },
    /// The number named a thread; its process was looked at.
    Thread {
        /// What was given.
        tid: u32,
        /// The process.
        pid: u32,
    },
    /// The process is the caller itself.
    Own {
        /// Its pid.
        pid: u32,
    },
    /// It joined while others were looked at, and was looked at too.
    Joined {
        /// Its pid.
        pid: u32,
    },
    /// A cgroup was removed, or its processes could not be listed any more.
    GroupLost {
        /// Its folder.
        path: String,
    },
    /// The cpuset of the process does not allow a destination any more.
    Forbidden {
        /// Its pid.
        pid: u32,
        /// The destination.
        node: NodeId,
    },
    /// Pages that several processes map stayed: moving them needs `CAP_SYS_NICE`.
    SharedLeft {
        /// Bytes.
        bytes: u64,
    },
    /// A destination node was down to its reserve, or the kernel had no memory there.
    NodeFull {
        /// The node.
        node: NodeId,
    },
    /// More pages than are remembered failed at once; these were not tried again.
    NotRetried {
        /// Bytes.
        bytes: u64,
    },
    /// Too many scattered pieces of shared memory to remember: what several mappings have in
    /// common is counted more than once.
    CountedTwice,
    /// Processes kept joining; the last ones were not looked at.
    StillJoining,
    /// The workers may not have the priority asked for, and ran as the caller does.
    PriorityRefused {
        /// The errno.
        errno: i32,
    },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited { pid } => write!(f, "process {pid} ended meanwhile"),
            Self::Executed { pid } => {
                write!(f, "process {pid} executed another program, which was looked at too")
            }
            Self::Changing { pid, bytes } => {
                write!(f, "process {pid} gave back {bytes} bytes while they were looked at")
            }
            Self::Zombie { pid } => write!(f, "process {pid} has ended (a zombie): no memory"),
            Self::KernelThread { pid } => {
                write!(f, "process {pid} is a kernel thread: no memory of its own")
            }
            Self::Denied { pid, uid } => write!(
                f,
                "process {pid} (user {uid}) is not ours to look into: run as that user or as root"
            ),
            Self::Unreadable { pid, errno } => {
                write!(f, "process {pid} could not be read to the end: {}", Errno(*errno))
            }
            Self::Thread { tid, pid } => {
                write!(f, "{tid} is a thread of process {pid}, which was looked at")
            }
            Self::Own { pid } => write!(f, "process {pid} is this program itself"),
            Self::Joined { pid } => write!(f, "process {pid} joined meanwhile"),
            Self::GroupLost { path } => {
                write!(f, "cgroup {path} was removed or cannot be listed any more")
            }
            Self::Forbidden { pid, node } => write!(
                f,
                "the cpuset of process {pid} does not allow node {node}: change cpuset.mems"
            ),
            Self::SharedLeft { bytes } => write!(
                f,
                "{bytes} bytes that several processes map stayed: moving them needs CAP_SYS_NICE"
            ),
            Self::NodeFull { node } => write!(
                f,
                "node {node} was down to its reserve: free memory there, lower the reserve, or \
                 name another node"
            ),
            Self::NotRetried { bytes } => {
                write!(f, "{bytes} bytes were not tried again: too many pages failed at once")
            }
            Self::CountedTwice => {
                f.write_str("shared memory is counted once for each process that maps it")
            }
            Self::PriorityRefused { errno } => write!(
                f,
                "the workers ran at the caller's priority: {}; raising it needs CAP_SYS_NICE",
                Errno(*errno)
            ),
            Self::StillJoining => f.write_str(
                "processes kept joining; the last ones were not looked at: run it again",
            ),
        }
    }
}

/// Notes, bounded in number; of one kind about one process there is one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Notes {
    /// The first of them.
    pub list: Vec<Note>,
    /// How many more there were.
    pub left_out: u64,
}

impl Notes {
    pub(super) fn add(&mut self, note: Note) {
        let known = self.list.iter_mut().find_map(|old| match (old, &note) {
            (Note::Changing { pid, bytes }, Note::Changing { pid: p, bytes: b }) if pid == p => {
                Some((bytes, *b))
            }
            (Note::SharedLeft { bytes }, Note::SharedLeft { bytes: b })
            | (Note::NotRetried { bytes }, Note::NotRetried { bytes: b }) => Some((bytes, *b)),
            _ => None,
        });
        if let Some((bytes, more)) = known {
            *bytes += more;
        } else if self.list.len() >= NOTES {
            self.left_out += u64::from(!self.list.contains(&note));
        } else if !self.list.contains(&note) {
            self.list.push(note);
        }
    }

    pub(super) fn extend(&mut self, other: Self) {
        other.list.into_iter().for_each(|note| self.add(note));
        self.left_out += other.left_out;
    }
}
