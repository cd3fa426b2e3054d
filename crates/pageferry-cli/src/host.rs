//! Reading settings from the kernel's files. A file that cannot be read is not
//! an error here: a check then says that it cannot tell.

use std::fs;
use std::path::{Path, PathBuf};

/// A directory with `sys/` and `proc/`.
#[derive(Debug)]
pub(crate) struct Host {
    root: PathBuf,
}

/// `CAP_*` numbers, include/uapi/linux/capability.h.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Capability {
    SysPtrace = 19,
    SysAdmin = 21,
    SysNice = 23,
    PerfMon = 38,
}

impl Host {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.into() }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// A file's content without the blanks around it.
    pub(crate) fn text(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.root.join(path)).ok()?;
        Some(text.trim().to_owned())
    }

    /// A file that holds a number.
    pub(crate) fn number(&self, path: &str) -> Option<i64> {
        self.text(path)?.parse().ok()
    }

    /// The chosen word of a file like `always [madvise] never`.
    pub(crate) fn choice(&self, path: &str) -> Option<String> {
        chosen(&self.text(path)?).map(str::to_owned)
    }

    /// A field of `/proc/self/status`.
    pub(crate) fn status(&self, key: &str) -> Option<String> {
        let text = self.text("proc/self/status")?;
        text.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name == key).then(|| value.trim().to_owned())
        })
    }

    /// Whether this process has a capability in effect.
    pub(crate) fn has(&self, capability: Capability) -> bool {
        let mask = self.status("CapEff").and_then(|hex| u64::from_str_radix(&hex, 16).ok());
        mask.is_some_and(|mask| mask >> (capability as u32) & 1 == 1)
    }

    /// Whether a seccomp filter is in force (mode 2 in proc(5)).
    pub(crate) fn seccomp_filter(&self) -> bool {
        self.status("Seccomp").as_deref() == Some("2")
    }

    /// The soft limit in a line of `/proc/self/limits`; `None` also for unlimited.
    pub(crate) fn soft_limit(&self, name: &str) -> Option<u64> {
        let text = self.text("proc/self/limits")?;
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_ascii_whitespace().next()?.parse().ok()
    }

    /// Files that this process has open; the standard three if that cannot be seen.
    pub(crate) fn open_files(&self) -> u64 {
        let path = self.root.join("proc/self/fd");
        let Ok(entries) = fs::read_dir(&path) else { return 3 };
        // Looking needs one itself.
        let looking = u64::from(path.starts_with("/proc"));
        (entries.count() as u64).saturating_sub(looking)
    }

    /// The directories of this process's cgroup (v2), from its own up to the
    /// root; `None` where there is only cgroup v1, whose limits are not looked at.
    pub(crate) fn cgroups(&self) -> Option<Vec<String>> {
        let own = self.text("proc/self/cgroup")?;
        let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let groups = (0..=parts.len())
            .rev()
            .map(|depth| {
                std::iter::once("sys/fs/cgroup")
                    .chain(parts.iter().take(depth).copied())
                    .collect::<Vec<_>>()
                    .join("/")
            })
            .collect();
        Some(groups)
    }
}

/// The word in force of a setting like `always [madvise] never`.
pub(crate) fn chosen(text: &str) -> Option<&str> {
    text.split_ascii_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A host with these files below its root, for the tests of all checks.
    pub(crate) fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (path, content) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, content).expect("a file");
        }
        let host = Host::new(dir.path());
        (dir, host)
    }

    #[test]
    fn the_chosen_word_is_the_one_in_brackets() {
        let (_dir, host) = host(&[("a", "always [madvise] never\n"), ("b", "no brackets\n")]);
        assert_eq!(host.choice("a").as_deref(), Some("madvise"));
        assert_eq!(host.choice("b"), None);
    }

    #[test]
    fn capabilities_are_read_from_the_effective_mask() {
        let (_dir, host) =
            host(&[("proc/self/status", "CapPrm:\tffffffffff\nCapEff:\t0000000000080000\n")]);
        assert!(host.has(Capability::SysPtrace));
        assert!(!host.has(Capability::SysAdmin));
    }

    #[test]
    fn limits_give_the_soft_value() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                      Max open files            1024                 524288               files\n\
                      Max locked memory         unlimited            unlimited            bytes\n";
        let (_dir, host) = host(&[("proc/self/limits", limits)]);
        assert_eq!(host.soft_limit("Max open files"), Some(1024));
        assert_eq!(host.soft_limit("Max locked memory"), None);
    }

    #[test]
    fn the_cgroups_go_from_the_own_one_to_the_root() {
        let (_dir, host) = host(&[("proc/self/cgroup", "0::/user.slice/a.scope\n")]);
        let expected =
            ["sys/fs/cgroup/user.slice/a.scope", "sys/fs/cgroup/user.slice", "sys/fs/cgroup"];
        assert_eq!(host.cgroups(), Some(expected.map(str::to_owned).to_vec()));
    }

    #[test]
    fn cgroup_v1_is_not_taken_for_no_limit() {
        let (_dir, host) = host(&[("proc/self/cgroup", "3:memory:/a\n2:cpu:/a\n")]);
        assert_eq!(host.cgroups(), None);
    }
}
