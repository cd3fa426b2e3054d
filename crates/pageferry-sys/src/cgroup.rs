//! How much memory this process's control group may still take.
//!
//! A memory cgroup at its limit answers a page fault with its OOM killer, not with an error, so
//! whoever wants to take memory that it could do without asks here first. One that is beyond
//! `memory.high` makes whoever takes memory sleep for up to 2 s inside the call, a mover with a hole
//! open included: it counts as a limit, too. (The soft limit of v1 makes nobody sleep.)
//!
//! Source: `Documentation/admin-guide/cgroup-v2.rst` (memory.max, memory.high, memory.current,
//! memory.stat), `Documentation/admin-guide/cgroup-v1/memory.rst`; `try_charge_memcg`, which looks at
//! the `high` of every level, and `MEMCG_MAX_HIGH_DELAY_JIFFIES` in `mm/memcontrol.c`.

use crate::sched;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes that are left free at least: page tables, the process's own next faults.
pub const MARGIN: u64 = 8 << 20;

/// Room for a file to begin with: `memory.stat` has some 2 to 4 KiB.
const TEXT: usize = 16 << 10;

/// Looks at the limits of this process's memory cgroups. The files stay open, at high numbers, as
/// long as the process stays in its groups: a look opens nothing, and allocates nothing.
#[derive(Debug)]
pub struct Headroom {
    /// `/proc/self/cgroup`, and where the hierarchies are mounted.
    own: PathBuf,
    mount: PathBuf,
    file: Option<File>,
    /// What the file said when the groups were opened.
    said: Vec<u8>,
    groups: Vec<Group>,
    text: Vec<u8>,
}

impl Default for Headroom {
    fn default() -> Self {
        Self::of("/proc/self/cgroup".into(), "/sys/fs/cgroup".into())
    }
}

impl Headroom {
    fn of(own: PathBuf, mount: PathBuf) -> Self {
        let text = vec![0; TEXT];
        Self { own, mount, file: None, said: Vec::new(), groups: Vec::new(), text }
    }

    /// Bytes that the tightest limit above this process leaves (`memory.high` is one, too), page
    /// cache that can be dropped counted as free. `None`: no limit, or none that can be read.
    pub fn look(&mut self) -> Option<u64> {
        if self.file.is_none() {
            self.file = Some(aside(File::open(&self.own).ok()?));
        }
        let now = read(self.file.as_ref()?, &mut self.text).ok()?;
        if now != self.said {
            // Into other groups, or for the first time.
            self.said = now.to_vec();
            self.open();
        }
        match self.rooms() {
            Ok(tightest) => tightest,
            // A group has gone, and the process with it elsewhere: looked at anew the next time.
            Err(_) => {
                self.said.clear();
                None
            }
        }
    }

    fn open(&mut self) {
        let said = String::from_utf8_lossy(&self.said);
        let groups = said.lines().filter_map(|line| groups_of(line, &self.mount)).flatten();
        self.groups = groups.collect();
    }

    fn rooms(&mut self) -> io::Result<Option<u64>> {
        let mut tightest = None;
        for group in &self.groups {
            if let Some(room) = group.room(&mut self.text)? {
                tightest = Some(tightest.map_or(room, |least: u64| least.min(room)));
            }
        }
        Ok(tightest)
    }
}

/// The open files of one group.
#[derive(Debug)]
struct Group {
    limit: File,
    /// Where there is such a thing: from where on it is throttled.
    high: Option<File>,
    used: File,
    stat: Option<File>,
    /// The line of `stat` that tells of page cache.
    cache: &'static str,
}

impl Group {
    fn open(group: &Path, v2: bool) -> Option<Self> {
        let (limit, used, cache) = if v2 {
            ("memory.max", "memory.current", "inactive_file ")
        } else {
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
        };
        let open = |name: &str| File::open(group.join(name)).ok().map(aside);
        let high = if v2 { open("memory.high") } else { None };
        let (limit, used) = (open(limit)?, open(used)?);
        Some(Self { limit, high, used, stat: open("memory.stat"), cache })
    }

    /// `None`: it has no limit.
    fn room(&self, text: &mut Vec<u8>) -> io::Result<Option<u64>> {
        let mut limit = number(read(&self.limit, text)?);
        if let Some(high) = &self.high {
            let high = number(read(high, text)?);
            limit = limit.into_iter().chain(high).min();
        }
        let Some(limit) = limit else { return Ok(None) };
        let Some(used) = number(read(&self.used, text)?) else { return Ok(None) };
        let stat = match &self.stat {
            Some(stat) => read(stat, text)?,
            None => &[],
        };
        let mut lines = stat.split(|byte| *byte == b'\n');
        let cache = lines.find_map(|line| line.strip_prefix(self.cache.as_bytes()));
        let cache = cache.and_then(number).unwrap_or(0);
        Ok(Some(limit.saturating_sub(used.saturating_sub(cache))))
    }
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.trim().parse().ok()
}

/// The file by a number out of the program's way, where there is one.
fn aside(file: File) -> File {
    sched::high(&file).unwrap_or(file)
}

/// All of a file, from its start.
fn read<'t>(file: &File, text: &'t mut Vec<u8>) -> io::Result<&'t [u8]> {
    let mut len = 0;
    loop {
        if len == text.len() {
            text.resize(2 * len, 0);
        }
        match file.read_at(&mut text[len..], len as u64) {
            Ok(0) => return Ok(&text[..len]),
            Ok(more) => len += more,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// The group named by a line of `/proc/self/cgroup`, and those above it.
fn groups_of(line: &str, mount: &Path) -> Option<Vec<Group>> {
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
    let groups = relative.ancestors();
    Some(groups.filter_map(|group| Group::open(&root.join(group), v2)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A hierarchy of files, and a process's line in it.
    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str) -> Self {
            let name = format!("pageferry-cgroup-{name}-{}", std::process::id());
            let tree = Self(std::env::temp_dir().join(name));
            fs::create_dir_all(tree.0.join("memory/a/b")).expect("temporary folder");
            fs::write(tree.0.join("memory/cgroup.procs"), "").expect("write");
            tree
        }
        fn group(&self, group: &str, limit: u64, used: u64, cache: u64) {
            let at = self.0.join("memory").join(group);
            fs::create_dir_all(&at).expect("temporary folder");
            let write = |name, text: String| fs::write(at.join(name), text).expect("write");
            write("memory.limit_in_bytes", format!("{limit}\n"));
            write("memory.usage_in_bytes", format!("{used}\n"));
            write("memory.stat", format!("x 1\ntotal_inactive_file {cache}\n"));
        }
        /// A group of the other version: `limit` and `high` as the kernel writes them.
        fn group_v2(&self, group: &str, limit: &str, high: Option<&str>, used: u64, cache: u64) {
            let at = self.0.join(group);
            fs::create_dir_all(&at).expect("temporary folder");
            let write = |name, text: String| fs::write(at.join(name), text).expect("write");
            fs::write(self.0.join("cgroup.procs"), "").expect("write");
            write("memory.max", format!("{limit}\n"));
            high.into_iter().for_each(|high| write("memory.high", format!("{high}\n")));
            write("memory.current", format!("{used}\n"));
            write("memory.stat", format!("anon 1\ninactive_file {cache}\n"));
            fs::write(self.0.join("own"), format!("0::/{group}\n")).expect("write");
        }
        fn is_in(&self, group: &str) {
            let text = format!("2:cpu,cpuacct:/a/b\n3:memory:/{group}\n");
            fs::write(self.0.join("own"), text).expect("write");
        }
        fn headroom(&self) -> Headroom {
            Headroom::of(self.0.join("own"), self.0.clone())
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_tightest_group_above_counts_as_it_is_now() {
        let tree = Tree::new("tightest");
        tree.group("a/b", 1000, 400, 100);
        tree.group("a", 900, 800, 50);
        tree.is_in("a/b");
        let mut headroom = tree.headroom();
        assert_eq!(headroom.look(), Some(150));
        tree.group("a", 900, 100, 50);
        assert_eq!(headroom.look(), Some(700));
        fs::write(tree.0.join("memory/a/b/memory.limit_in_bytes"), "max\n").expect("write");
        assert_eq!(headroom.look(), Some(850));
    }

    #[test]
    fn where_a_group_is_throttled_counts_as_its_limit_at_each_level() {
        let tree = Tree::new("high");
        tree.group_v2("a", "max", Some("2000"), 1000, 0);
        tree.group_v2("a/b", "1000", Some("max"), 400, 100);
        let mut headroom = tree.headroom();
        assert_eq!(headroom.look(), Some(700), "the limit is the tightest");
        tree.group_v2("a/b", "1000", Some("800"), 400, 100);
        assert_eq!(headroom.look(), Some(500), "high, which is below the limit");
        tree.group_v2("a", "max", Some("1100"), 1000, 0);
        tree.group_v2("a/b", "max", Some("800"), 400, 100);
        assert_eq!(headroom.look(), Some(100), "high of the level above");
        tree.group_v2("a", "max", Some("900"), 1000, 0);
        tree.group_v2("a/b", "max", Some("max"), 400, 100);
        assert_eq!(headroom.look(), Some(0), "beyond high");
        tree.group_v2("a", "max", Some("max"), 1000, 0);
        tree.group_v2("a/b", "max", Some("max"), 400, 100);
        assert_eq!(headroom.look(), None, "no limit at all");
    }

    #[test]
    fn a_group_without_high_has_its_limit() {
        let tree = Tree::new("nohigh");
        tree.group_v2("a", "1000", None, 400, 0);
        assert_eq!(tree.headroom().look(), Some(600));
    }

    #[test]
    fn the_soft_limit_of_the_first_version_is_none() {
        let tree = Tree::new("soft");
        tree.group("a/b", 1000, 400, 0);
        fs::write(tree.0.join("memory/a/b/memory.soft_limit_in_bytes"), "500\n").expect("write");
        fs::write(tree.0.join("memory/a/b/memory.high"), "500\n").expect("write");
        tree.is_in("a/b");
        assert_eq!(tree.headroom().look(), Some(600));
    }

    #[test]
    fn a_process_that_changes_its_group_is_followed() {
        let tree = Tree::new("changes");
        tree.group("a/b", 1000, 400, 0);
        tree.group("c", 500, 400, 0);
        tree.is_in("a/b");
        let mut headroom = tree.headroom();
        assert_eq!(headroom.look(), Some(600));
        tree.is_in("c");
        assert_eq!(headroom.look(), Some(100));
        tree.is_in("nowhere");
        assert_eq!(headroom.look(), None);
    }

    #[test]
    fn a_look_takes_no_descriptor() {
        let tree = Tree::new("descriptor");
        tree.group("a/b", 1000, 400, 0);
        tree.is_in("a/b");
        let mut headroom = tree.headroom();
        assert_eq!(headroom.look(), Some(600));
        // SAFETY: the child has one thread, makes system calls and ends by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: from here on the child, and only it, is refused every new descriptor.
            let refused = unsafe {
                libc::alarm(10);
                libc::setrlimit(libc::RLIMIT_NOFILE, &none) == 0 && libc::dup(0) == -1
            };
            let code = if refused { i32::from(headroom.look() != Some(600)) } else { 2 };
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(code) };
        }
        let mut status = 0;
        // SAFETY: waits for the child made above; the kernel writes the status.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "status {status:#x}");
    }
}
