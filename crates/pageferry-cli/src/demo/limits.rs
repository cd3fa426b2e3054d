//! What the machine and this process's limits leave for the demo.
//!
//! Running out half-way would end the program without a report: most of what it allocates cannot
//! say no. So each supply is looked at before anything is made, against an estimate on the safe
//! side ([`Supply::needed`]), and what is short is named together with its remedy. What no
//! estimate foresees shows when the index is built, where running out is an error
//! ([`super::twin::NoRoom`]).

use super::memory::BESIDES;
use crate::exit::Exit;
use crate::output::Problem;
use pageferry_topology::Machine;
use std::path::Path;

const MIB: u64 = 1 << 20;

/// Address space of the engine's frames, for one node and folio size: twice its usual budget and
/// what is in flight.
const POOL: u64 = 384 * MIB;
/// Address space that glibc sets aside for a thread's heap (`HEAP_MAX_SIZE`), and its stack.
const THREAD: u64 = (64 + 2) * MIB;
/// What is tried twice over while heaps are aligned, and the engine's measurement at its start.
const PASSING: u64 = 192 * MIB;

/// Something of which the demo needs an amount that grows with its index.
#[derive(Clone, Debug)]
pub(super) struct Supply {
    /// What it is, as in "not enough memory".
    pub(super) name: &'static str,
    /// How its amount is said, after the number: "is available".
    pub(super) has: String,
    /// What to do to have more of it.
    pub(super) remedy: &'static str,
    /// Bytes that may be taken.
    pub(super) left: u64,
    /// Bytes needed however small the index is.
    pub(super) fixed: u64,
    /// Bytes needed for two bytes of index.
    pub(super) for_two: u64,
}

impl Supply {
    /// Bytes needed for an index of `size` bytes.
    pub(super) fn needed(&self, size: u64) -> u64 {
        (size / 2).saturating_mul(self.for_two).saturating_add(self.fixed)
    }

    /// Memory: for the index and its reference, each with half as much again for what growing
    /// leaves behind, and the words of the text.
    pub(super) fn memory(left: u64) -> Self {
        Self {
            name: "memory",
            has: "is available".into(),
            remedy: "free some memory, or raise the memory limit",
            left,
            fixed: BESIDES,
            for_two: 3 + 3 + 1,
        }
    }

    /// All that is limited here, for a demo with so many threads that ask and `sizes` folio sizes.
    pub(super) fn all(queries: u16, sizes: u64) -> Vec<Self> {
        let mut supplies: Vec<Self> = available().map(Self::memory).into_iter().collect();
        let read = |file| std::fs::read_to_string(file).unwrap_or_default();
        let (limits, status) = (read("/proc/self/limits"), read("/proc/self/status"));
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        // Copiers and burners; the engine's two, the main one, and those that ask and update.
        let threads = 2 * cpus + 4 + u64::from(queries);
        let nodes = Machine::read().map_or(1, |m| m.memory_nodes().count()).clamp(1, 2) as u64;
        // Frames on both ends of the route.
        let pools = sizes * nodes * POOL;
        supplies.extend(limited(&limits, &status, pools, threads));
        supplies
    }
}

/// The limits of address space in `limits` (proc(5), `/proc/pid/limits`) with what `status`
/// (`/proc/pid/status`) says is used of them.
fn limited(limits: &str, status: &str, pools: u64, threads: u64) -> Vec<Supply> {
    let rows = [
        ("Max address space", "VmSize:", "address space", "ulimit -v", THREAD),
        // Counts what is private and writable: not what is only set aside for heaps.
        ("Max data size", "VmData:", "data memory", "ulimit -d", 2 * MIB),
    ];
    let found = rows.into_iter().filter_map(|(limit, usage, name, ulimit, thread)| {
        let line = limits.lines().find_map(|l| l.strip_prefix(limit))?;
        // The soft limit; "unlimited" is no number.
        let limit: u64 = line.split_whitespace().next()?.parse().ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix(usage))?;
        let used: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        let remedy = match ulimit {
            "ulimit -d" => "raise the limit where it is set: ulimit -d unlimited",
            _ => "raise the limit where it is set: ulimit -v unlimited",
        };
        Some(Supply {
            name,
            has: format!("is left by this process's limit ({ulimit})"),
            remedy,
            left: limit.saturating_sub(used * 1024),
            fixed: BESIDES + pools + PASSING + threads * thread,
            // The region is twice its index.
            for_two: 4 + 3 + 1,
        })
    });
    found.collect()
}

/// Memory that this process can have without swapping: what the kernel estimates
/// (`MemAvailable`, proc(5)) or what the limits of its cgroups leave, if that is less.
fn available() -> Option<u64> {
    let bytes = pageferry_sys::usage::available_bytes()?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or_default();
    Some(cgroup_left(Path::new("/sys/fs/cgroup"), own).map_or(bytes, |left| left.min(bytes)))
}

/// What `memory.max` leaves in the cgroup `own` and those above it (cgroup v2).
fn cgroup_left(root: &Path, own: &str) -> Option<u64> {
    let number = |folder: &Path, file: &str| -> Option<u64> {
        std::fs::read_to_string(folder.join(file)).ok()?.trim().parse().ok()
    };
    let left = |folder: &Path| {
        // "max" is no number: no limit here.
        let max = number(folder, "memory.max")?;
        let used = number(folder, "memory.current")?;
        Some(max.saturating_sub(used))
    };
    let own = root.join(own);
    own.ancestors().take_while(|folder| folder.starts_with(root)).filter_map(left).min()
}

/// A thread that could not be started.
pub(super) fn no_thread(error: &std::io::Error) -> Problem {
    Problem {
        what: "a thread of the demo could not be started".into(),
        because: error.to_string(),
        remedy: "use fewer --threads, or raise the limits of processes (ulimit -u) and of \
                 address space (ulimit -v)"
            .into(),
        exit: Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tpageferry\nVmSize:\t    4096 kB\nVmData:\t    1024 kB\n";

    fn limits(address_space: &str, data: &str) -> String {
        format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max data size             {data:<21}unlimited            bytes     \n\
             Max stack size            8388608              unlimited            bytes     \n\
             Max address space         {address_space:<21}unlimited            bytes     \n"
        )
    }

    #[test]
    fn a_limit_leaves_what_is_not_used_of_it() {
        let found = limited(&limits("104857600", "unlimited"), STATUS, POOL, 4);
        let found: Vec<_> = found.into_iter().map(|s| (s.name, s.left)).collect();
        assert_eq!(found, [("address space", 96 * MIB)]);
        let found = limited(&limits("1048576", "10485760"), STATUS, POOL, 4);
        let found: Vec<_> = found.into_iter().map(|s| (s.name, s.left)).collect();
        assert_eq!(found, [("address space", 0), ("data memory", 9 * MIB)]);
    }

    #[test]
    fn without_limits_or_where_nobody_tells_them_nothing_is_short() {
        assert!(limited(&limits("unlimited", "unlimited"), STATUS, POOL, 4).is_empty());
        assert!(limited("", STATUS, POOL, 4).is_empty());
        assert!(limited(&limits("1", "1"), "", POOL, 4).is_empty());
    }

    #[test]
    fn the_tightest_cgroup_above_counts() -> std::io::Result<()> {
        let root = tempfile::tempdir()?;
        let inner = root.path().join("a/b");
        std::fs::create_dir_all(&inner)?;
        let write = |path: &Path, max: &str, current: &str| {
            std::fs::write(path.join("memory.max"), max)?;
            std::fs::write(path.join("memory.current"), current)
        };
        write(&inner, "max\n", "5\n")?;
        assert_eq!(cgroup_left(root.path(), "a/b"), None);
        write(&root.path().join("a"), "1000\n", "400\n")?;
        assert_eq!(cgroup_left(root.path(), "a/b"), Some(600));
        write(&inner, "100\n", "400\n")?;
        assert_eq!(cgroup_left(root.path(), "a/b"), Some(0));
        Ok(())
    }
}
