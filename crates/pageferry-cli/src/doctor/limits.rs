//! Resource limits of this process (getrlimit(2)): address space, data, open files, locked memory.
//!
//! What an engine needs was measured as the growth of `VmSize` and of `/proc/self/fd` while one was
//! built with its defaults and moved pages of both sizes; a limit must leave that much *beyond*
//! what this process has already. Regions and what the program itself does come on top.

use super::Check;
use crate::host::Host;
use crate::size::size;

/// Address space of one pool, of which there is one for each node and folio size: twice the default
/// frame budget of 64 MiB, and 128 extents of 2 MiB for batches in the air. Measured: 384 MiB.
const POOL_SPACE: u64 = (2 * 64 + 128 * 2) << 20;
/// Base and huge.
const FOLIO_SIZES: u64 = 2;
/// The standard library's default (`std::thread`, "Stack size").
const STACK: u64 = 2 << 20;
/// Beside one for each CPU: the fault handler, the keeper of the pools, a move of its own.
const OTHER_THREADS: u64 = 3;
/// Regions smaller than this are hardly worth moving.
const SMALL_REGIONS: u64 = 256 << 20;
/// A userfaultfd, an eventfd, and `/proc/self/pagemap` twice. Measured: 4.
const FILES_HELD: u64 = 4;
/// A file of /proc or /sys that is read, one at a time.
const FILES_IN_PASSING: u64 = 1;
/// The usual soft limit is 1024 (`INR_OPEN_CUR`, include/uapi/linux/fs.h).
const FEW_FILES: u64 = 256;
/// Default since 5.16 (`MLOCK_LIMIT` in include/uapi/linux/resource.h).
const USUAL_MEMLOCK: u64 = 8 << 20;

/// For a machine with so many nodes with memory, and so many CPUs to use.
pub(super) fn checks(host: &Host, nodes: usize, cpus: usize) -> Vec<Check> {
    let stacks = (cpus as u64 + OTHER_THREADS) * STACK;
    let pools = nodes.max(1) as u64 * FOLIO_SIZES * POOL_SPACE;
    let spaces = [
        Space {
            id: "limit-address-space",
            limit: "Max address space",
            used: "VmSize",
            remedy: "ulimit -v unlimited, or LimitAS=infinity in the service",
        },
        // Counts private writable mappings, as regions and pools are, since 4.7 (getrlimit(2)).
        Space {
            id: "limit-data",
            limit: "Max data size",
            used: "VmData",
            remedy: "ulimit -d unlimited, or LimitDATA=infinity in the service",
        },
    ];
    let mut checks: Vec<Check> =
        spaces.iter().map(|space| space.check(host, stacks, pools)).collect();
    checks.push(open_files(host));
    checks.push(locked(host));
    checks
}

/// A limit on mapped memory.
struct Space {
    id: &'static str,
    /// Its line in `/proc/self/limits`.
    limit: &'static str,
    /// What counts against it: a field of `/proc/self/status`, in KiB.
    used: &'static str,
    remedy: &'static str,
}

impl Space {
    fn check(&self, host: &Host, stacks: u64, pools: u64) -> Check {
        let Some(limit) = host.soft_limit(self.limit) else {
            return Check::ok(self.id, "unlimited");
        };
        let used = host.status(self.used).and_then(|used| {
            let kib: u64 = used.strip_suffix("kB")?.trim().parse().ok()?;
            kib.checked_mul(1024)
        });
        let left = limit.saturating_sub(used.unwrap_or(0));
        let found = format!("{} left of {}", size(left), size(limit));
        let (one, all) = (stacks + POOL_SPACE, stacks + pools);
        if left < one {
            let why = format!(
                "{found}: an engine needs {}, beside the regions, to move anything",
                size(one)
            );
            Check::missing(self.id, why, self.remedy)
        } else if left < all + SMALL_REGIONS {
            let why = format!(
                "{found}: an engine takes up to {} (pools of every node and folio size), the \
                 regions come on top; pages without a pool stay where they are",
                size(all)
            );
            Check::warn(self.id, why, self.remedy)
        } else {
            let rest = size(left - all);
            Check::ok(self.id, format!("{found}: {} for an engine, {rest} for regions", size(all)))
        }
    }
}

fn open_files(host: &Host) -> Check {
    const ID: &str = "limit-nofile";
    const REMEDY: &str = "ulimit -n 1024, or LimitNOFILE= in the service";
    let Some(limit) = host.soft_limit("Max open files") else {
        return Check::ok(ID, "unlimited");
    };
    let left = limit.saturating_sub(host.open_files());
    let needed = FILES_HELD + FILES_IN_PASSING;
    if left < needed {
        let why = format!(
            "{left} left of {limit}: an engine holds {FILES_HELD} and opens {FILES_IN_PASSING} \
             more in passing"
        );
        Check::missing(ID, why, REMEDY)
    } else if limit < FEW_FILES {
        let why =
            format!("{left} left of {limit}: an engine needs {needed}, the program has the rest");
        Check::warn(ID, why, REMEDY)
    } else {
        Check::ok(ID, format!("{left} left of {limit}; an engine needs {needed}"))
    }
}

fn locked(host: &Host) -> Check {
    const ID: &str = "limit-memlock";
    match host.soft_limit("Max locked memory") {
        Some(bytes) if bytes < USUAL_MEMLOCK => Check::warn(
            ID,
            format!("{}: programs with locked or pinned buffers run out soon", size(bytes)),
            "ulimit -l 8192, or LimitMEMLOCK= in the service",
        ),
        Some(bytes) => Check::ok(ID, size(bytes)),
        None => Check::ok(ID, "unlimited"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::doctor::Status;

    const MIB: u64 = 1 << 20;

    /// A process with 100 MiB mapped, three files open, and these lines of limits.
    fn host(limits: &str) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let of_self = dir.path().join("proc/self");
        fs::create_dir_all(of_self.join("fd")).expect("a directory");
        for fd in ["0", "1", "2"] {
            fs::write(of_self.join("fd").join(fd), "").expect("a file");
        }
        fs::write(of_self.join("limits"), limits).expect("a file");
        let status = "VmSize:\t  102400 kB\nVmData:\t  102400 kB\n";
        fs::write(of_self.join("status"), status).expect("a file");
        let host = Host::new(dir.path());
        (dir, host)
    }

    fn found(limits: &str, id: &str) -> Check {
        let (_dir, host) = host(limits);
        let all = checks(&host, 1, 2);
        all.into_iter().find(|check| check.id == id).expect("a check of that name")
    }

    #[test]
    fn address_space_is_measured_against_what_an_engine_needs_beyond_what_is_used() {
        // One node: two pools of 384 MiB and five stacks of 2 MiB.
        for (mib, status) in
            [(493, Status::Missing), (494, Status::Warn), (1133, Status::Warn), (1134, Status::Ok)]
        {
            for (line, id) in
                [("Max address space", "limit-address-space"), ("Max data size", "limit-data")]
            {
                let check = found(&format!("{line} {} unlimited bytes\n", mib * MIB), id);
                assert_eq!(check.status, status, "{mib} MiB: {check:?}");
                assert_eq!(check.remedy.is_some(), status != Status::Ok, "{check:?}");
                assert!(check.found.contains("left of"), "{check:?}");
            }
        }
        let check = found("Max address space unlimited unlimited bytes\n", "limit-address-space");
        assert_eq!((check.status, &*check.found), (Status::Ok, "unlimited"));
    }

    #[test]
    fn more_nodes_need_more_address_space() {
        let (_dir, host) = host(&format!("Max address space {} unlimited bytes\n", 1400 * MIB));
        let status = |nodes| checks(&host, nodes, 2)[0].status;
        assert_eq!((status(1), status(2)), (Status::Ok, Status::Warn));
    }

    #[test]
    fn open_files_must_suffice_for_one_engine() {
        for (limit, status) in
            [(7, Status::Missing), (8, Status::Warn), (255, Status::Warn), (1024, Status::Ok)]
        {
            let check = found(&format!("Max open files {limit} 4096 files\n"), "limit-nofile");
            assert_eq!(check.status, status, "{limit}: {check:?}");
            assert!(check.found.starts_with(&format!("{} left of", limit - 3)), "{check:?}");
        }
    }

    #[test]
    fn little_lockable_memory_is_warned_of() {
        let check = found("Max locked memory 65536 65536 bytes\n", "limit-memlock");
        assert_eq!(check.status, Status::Warn);
        assert!(check.remedy.is_some());
    }
}
