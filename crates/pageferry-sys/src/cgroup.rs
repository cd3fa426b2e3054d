//! How much memory this process's control group may still take.
//!
//! A memory cgroup at its limit answers a page fault with its OOM killer, not with an error, so
//! whoever wants to take memory that it could do without asks here first.
//!
//! Source: `Documentation/admin-guide/cgroup-v2.rst` (memory.max, memory.current, memory.stat),
//! `Documentation/admin-guide/cgroup-v1/memory.rst`.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that are left free at least: page tables, the process's own next faults.
pub const MARGIN: u64 = 8 << 20;

/// Bytes that the tightest limit above this process leaves, page cache that can be dropped
/// counted as free. `None`: no limit, or none that can be read.
pub fn headroom() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    own.lines().filter_map(|line| group_of(line, Path::new("/sys/fs/cgroup"))).flatten().min()
}

/// The headrooms of the group named by a line of `/proc/self/cgroup`, and of those above it.
fn group_of(line: &str, mount: &Path) -> Option<Vec<u64>> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let v2 = controllers.is_empty();
    if !v2 && !controllers.split(',').any(|c| c == "memory") {
        return None;
    }
    let roots = if v2 {
        vec![mount.to_path_buf(), mount.join("unified")]
    } else {
        vec![mount.join("memory")]
    };
    let root = roots.into_iter().find(|r| r.join("cgroup.procs").exists())?;
    let relative = Path::new(path).strip_prefix("/").ok()?;
    let mut rooms = Vec::new();
    let mut at: Option<&Path> = Some(relative);
    while let Some(group) = at {
        rooms.extend(room(&root.join(group), v2));
        at = group.parent();
    }
    Some(rooms)
}

fn room(group: &Path, v2: bool) -> Option<u64> {
    let names = if v2 {
        ("memory.max", "memory.current", "inactive_file ")
    } else {
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
    };
    let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = number(group.join(names.0))?;
    let used = number(group.join(names.1))?;
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cache = stat
        .lines()
        .find_map(|l| l.strip_prefix(names.2))
        .and_then(|n| n.trim().parse::<u64>().ok())
        .unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_group_above_counts() {
        let dir = std::env::temp_dir().join(format!("pageferry-cgroup-{}", std::process::id()));
        let inner = dir.join("memory/a/b");
        fs::create_dir_all(&inner).expect("temporary folder");
        fs::write(dir.join("memory/cgroup.procs"), "").expect("write");
        let write = |at: &Path, limit: u64, used: u64, cache: u64| {
            fs::write(at.join("memory.limit_in_bytes"), format!("{limit}\n")).expect("write");
            fs::write(at.join("memory.usage_in_bytes"), format!("{used}\n")).expect("write");
            fs::write(at.join("memory.stat"), format!("x 1\ntotal_inactive_file {cache}\n"))
                .expect("write");
        };
        write(&inner, 1000, 400, 100);
        write(&dir.join("memory/a"), 900, 800, 50);
        let rooms = group_of("3:memory:/a/b", &dir).expect("a memory group");
        assert_eq!(rooms, [700, 150]);
        assert_eq!(group_of("2:cpu,cpuacct:/a/b", &dir), None);
        fs::remove_dir_all(&dir).expect("remove");
    }
}
