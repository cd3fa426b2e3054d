//! What is worth knowing about processes that live while they are looked at.
//!
//! What always holds: notes are bounded in number, however many processes a cgroup has. Of what is
//! said of many the first few are named and the others counted, by kind; kernel threads and zombies,
//! of which nobody wants the numbers, are only counted. What is left out beyond that is counted too.

use pageferry_sys::Errno;
use pageferry_topology::NodeId;
use serde::Serialize;
use std::fmt;
use std::mem::discriminant;

/// Notes kept.
const NOTES: usize = 64;
/// Of one kind that name a process each; further ones are counted, for some kinds.
const NAMED: usize = 8;

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
    /// Processes that were found had ended before they were looked at (zombies).
    Zombies {
        /// How many.
        processes: u64,
    },
    /// Kernel threads were found, which have no memory of their own.
    KernelThreads {
        /// How many.
        processes: u64,
    },
    /// More processes ended meanwhile than are named.
    MoreExited {
        /// How many more.
        processes: u64,
    },
    /// More joined than are named.
    MoreJoined {
        /// How many more.
        processes: u64,
    },
    /// The caller may not look into more processes than are named.
    MoreDenied {
        /// How many more.
        processes: u64,
    },
    /// More processes than are named gave memory back while that was looked at.
    MoreChanging {
        /// Bytes that were there and then not.
        bytes: u64,
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
    /// Whether pages of a process were used could not be found out; they stayed.
    AgeUnknown {
        /// Its pid.
        pid: u32,
        /// The errno.
        errno: i32,
    },
    /// More pages than are remembered failed at once; these were not tried again.
    NotRetried {
        /// Bytes.
        bytes: u64,
    },
    /// Pages were swapped out while they were looked at, and stay so; or somebody else was
    /// migrating them each time that they were asked for, which looks the same.
    SwappedOut {
        /// Bytes.
        bytes: u64,
    },
    /// Most calls took longer than the latency target although they were as small as calls get.
    SlowCalls {
        /// What half of the calls took at most, in microseconds.
        median_us: u64,
        /// The target, in microseconds.
        target_us: u64,
        /// Base pages that calls are not cut below.
        least_pages: usize,
    },
    /// The kernel has no NUMA: all memory is on node 0, and no page was asked for.
    NoNuma,
    /// Too many scattered pieces of shared memory to remember: what several mappings have in
    /// common is counted more than once.
    CountedTwice,
    /// Anonymous memory that several processes map (since a fork, or merged by KSM) was counted once.
    CommonOnce {
        /// Bytes of further mappings of it, which were left out.
        bytes: u64,
    },
    /// Anonymous memory that other processes map too was counted for each process that was looked at:
    /// which is the same is told with `CAP_SYS_ADMIN` only, from Linux 6.7 on.
    CommonUntold {
        /// Bytes of it in all.
        bytes: u64,
    },
    /// Anonymous memory that other processes map too was looked at, and counted, for each process; a
    /// page of it moves once.
    CommonMoved {
        /// Bytes of it in all.
        bytes: u64,
    },
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
            Self::Zombies { processes } => {
                write!(f, "{processes} had ended before (zombies): no memory")
            }
            Self::KernelThreads { processes } => {
                write!(f, "{processes} kernel threads, which have no memory of their own")
            }
            Self::MoreExited { processes } => write!(f, "{processes} more ended meanwhile"),
            Self::MoreJoined { processes } => write!(f, "{processes} more joined meanwhile"),
            Self::MoreDenied { processes } => {
                write!(f, "{processes} more are not ours to look into: run as root")
            }
            Self::MoreChanging { bytes } => {
                write!(f, "others gave back {bytes} bytes while they were looked at")
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
            Self::AgeUnknown { pid, errno } => write!(
                f,
                "whether pages of process {pid} were used could not be found out, so they stayed: {}",
                Errno(*errno)
            ),
            Self::NotRetried { bytes } => {
                write!(f, "{bytes} bytes were not tried again: too many pages failed at once")
            }
            Self::SwappedOut { bytes } => write!(
                f,
                "{bytes} bytes were swapped out while they were looked at, and stay so (run it \
                 again if there is no swap: somebody else was migrating them)"
            ),
            Self::SlowCalls { median_us, target_us, least_pages } => write!(
                f,
                "calls took {median_us} us, longer than the target of {target_us} us: pages are \
                 slow here, and calls are not cut below {least_pages} pages, or one huge page"
            ),
            Self::NoNuma => f.write_str("this kernel has no NUMA: all memory is on node 0"),
            Self::CountedTwice => {
                f.write_str("shared memory is counted once for each process that maps it")
            }
            Self::CommonOnce { bytes } => write!(
                f,
                "anonymous memory that several processes map (since a fork, or merged by KSM) is \
                 counted once: {bytes} bytes of further mappings were left out"
            ),
            Self::CommonUntold { bytes } => write!(
                f,
                "{bytes} bytes are anonymous memory that other processes map too (since a fork, or \
                 merged by KSM), counted for each process that was looked at: which is the same is \
                 told with CAP_SYS_ADMIN only, from Linux 6.7 on"
            ),
            Self::CommonMoved { bytes } => write!(
                f,
                "{bytes} bytes are anonymous memory that other processes map too (since a fork, or \
                 merged by KSM): a page of it moves once, and is counted for each process that was \
                 looked at"
            ),
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

impl Note {
    /// What it comes to when it is counted, not named.
    fn counted(&self) -> Option<Self> {
        Some(match self {
            Self::Exited { .. } => Self::MoreExited { processes: 1 },
            Self::Joined { .. } => Self::MoreJoined { processes: 1 },
            Self::Denied { .. } => Self::MoreDenied { processes: 1 },
            Self::Changing { bytes, .. } => Self::MoreChanging { bytes: *bytes },
            _ => return None,
        })
    }

    /// Adds a note of the same thing, if that can be added up.
    fn take(&mut self, other: &Self) -> bool {
        let (sum, more) = match (self, other) {
            (Self::Changing { pid, bytes }, Self::Changing { pid: p, bytes: b }) if pid == p => {
                (bytes, b)
            }
            (Self::SharedLeft { bytes }, Self::SharedLeft { bytes: b })
            | (Self::CommonOnce { bytes }, Self::CommonOnce { bytes: b })
            | (Self::CommonUntold { bytes }, Self::CommonUntold { bytes: b })
            | (Self::CommonMoved { bytes }, Self::CommonMoved { bytes: b })
            | (Self::NotRetried { bytes }, Self::NotRetried { bytes: b })
            | (Self::SwappedOut { bytes }, Self::SwappedOut { bytes: b })
            | (Self::MoreChanging { bytes }, Self::MoreChanging { bytes: b }) => (bytes, b),
            (Self::Zombies { processes }, Self::Zombies { processes: p })
            | (Self::KernelThreads { processes }, Self::KernelThreads { processes: p })
            | (Self::MoreExited { processes }, Self::MoreExited { processes: p })
            | (Self::MoreJoined { processes }, Self::MoreJoined { processes: p })
            | (Self::MoreDenied { processes }, Self::MoreDenied { processes: p }) => (processes, p),
            (old, new) => return old == new,
        };
        *sum += more;
        true
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
        if self.list.iter_mut().any(|old| old.take(&note)) {
            return;
        }
        let kind = discriminant(&note);
        let alike = self.list.iter().filter(|old| discriminant(*old) == kind).count();
        match note.counted() {
            Some(more) if alike >= NAMED => self.add(more),
            _ if self.list.len() >= NOTES => self.left_out += 1,
            _ => self.list.push(note),
        }
    }

    pub(super) fn all(&mut self, notes: impl IntoIterator<Item = Note>) {
        notes.into_iter().for_each(|note| self.add(note));
    }

    /// Adds those of another move or look.
    pub fn extend(&mut self, other: Self) {
        self.all(other.list);
        self.left_out += other.left_out;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_processes_the_first_are_named_and_the_others_counted() {
        let (mut here, mut there) = (Notes::default(), Notes::default());
        for pid in 1..=100 {
            here.add(Note::KernelThreads { processes: 1 });
            here.add(Note::Exited { pid });
            there.add(Note::Exited { pid: 100 + pid });
            there.add(Note::Changing { pid, bytes: 10 });
            there.add(Note::Changing { pid: 1, bytes: 10 });
        }
        here.extend(there);
        assert_eq!((here.list.len(), here.left_out), (1 + 8 + 1 + 8 + 1, 0));
        let has = |note: &Note| here.list.contains(note);
        assert!(has(&Note::KernelThreads { processes: 100 }), "{here:?}");
        assert!(has(&Note::Exited { pid: 8 }) && has(&Note::MoreExited { processes: 192 }));
        assert!(has(&Note::Changing { pid: 1, bytes: 1010 }), "{here:?}");
        assert!(has(&Note::MoreChanging { bytes: 920 }), "{here:?}");
    }

    #[test]
    fn what_cannot_be_counted_by_kind_is_left_out_and_counted() {
        let mut notes = Notes::default();
        for pid in 0..100 {
            notes.add(Note::Executed { pid });
            notes.add(Note::Executed { pid });
        }
        assert_eq!(notes.list.len(), NOTES);
        // Of what is left out nobody knows whether it was the same.
        assert_eq!(notes.left_out, 2 * (100 - NOTES as u64));
    }
}
