//! What is asked for: whose memory, and which of their mappings, by kind of memory, by name, by
//! address.

use super::targets::Target;
use pageferry_sys::page_size;
use pageferry_sys::process::{Backing, Backings};
use pageferry_sys::procfs::{Status, Vma};
use serde::Serialize;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

/// What a mapping is of. A private copy of a file's page counts with its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kind {
    /// Private anonymous memory other than heap and stack.
    Anonymous,
    /// The program break's (`[heap]`); what allocators map is anonymous.
    Heap,
    /// The first thread's stack; those of other threads are anonymous.
    Stack,
    /// Files, programs and libraries.
    File,
    /// tmpfs, memfd, System V, shared anonymous mappings.
    SharedMemory,
    /// Pages of a hugetlb pool.
    Hugetlb,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Anonymous, Self::Heap, Self::Stack, Self::File, Self::SharedMemory, Self::Hugetlb];

    /// Its name, as a command would take it: `anonymous`, `shared-memory`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::Heap => "heap",
            Self::Stack => "stack",
            Self::File => "file",
            Self::SharedMemory => "shared-memory",
            Self::Hugetlb => "hugetlb",
        }
    }

    /// The kind of a mapping, and the size of its pages as far as the mapping tells. `None`: it
    /// is the kernel's own (`[vdso]`).
    pub(crate) fn of(vma: &Vma, backings: &Backings) -> Option<(Self, usize)> {
        let base = page_size();
        if vma.inode != 0 {
            let is_zero = !vma.shared && backings.contains(&(vma.device, Backing::Zero(vma.inode)));
            if is_zero {
                return Some((Self::Anonymous, base));
            }
            let mut backings = backings.iter().filter(|(_, b)| !matches!(b, Backing::Zero(_)));
            let backing = backings.find(|(device, _)| *device == vma.device);
            return Some(match backing {
                Some((_, Backing::SharedMemory)) => (Self::SharedMemory, base),
                Some((_, Backing::Hugetlb(bytes))) => (Self::Hugetlb, *bytes),
                _ => (Self::File, base),
            });
        }
        let kind = match vma.name.as_str() {
            "" => Self::Anonymous,
            "[heap]" => Self::Heap,
            "[stack]" => Self::Stack,
            name if name.starts_with("[anon:") => Self::Anonymous,
            name if name.starts_with('[') => return None,
            _ => Self::File,
        };
        Some((kind, base))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Whose memory is asked for, and which of it.
///
/// Of whom has to be said: of nobody is an error
/// ([`TargetError::Empty`](super::TargetError::Empty)) once it is used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Selection {
    pub(super) targets: Vec<Target>,
    pub(super) children: bool,
    pub(super) filter: Filter,
}

impl Selection {
    /// Nobody's memory so far.
    pub fn new() -> Self {
        Self::default()
    }

    /// That of this process too.
    pub fn pid(self, pid: u32) -> Self {
        self.target(Target::Pid(pid))
    }

    /// That of this cgroup's processes too, those of the groups below it included.
    pub fn cgroup(self, path: impl Into<PathBuf>) -> Self {
        self.target(Target::Cgroup(path.into()))
    }

    /// That of this target too.
    pub fn target(mut self, target: Target) -> Self {
        self.targets.push(target);
        self
    }

    /// That of their children, and theirs, too, or not (the default).
    pub fn children(mut self, yes: bool) -> Self {
        self.children = yes;
        self
    }

    /// Of all of them only these mappings. Default: all.
    pub fn filter(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }
}

/// Which mappings are asked for; by default all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Filter {
    /// Empty: all.
    kinds: Vec<Kind>,
    name: Option<String>,
    range: Option<Range<usize>>,
}

impl Filter {
    /// All mappings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Mappings of these kinds; called again, of those too.
    pub fn kinds(mut self, kinds: impl IntoIterator<Item = Kind>) -> Self {
        self.kinds.extend(kinds);
        self
    }

    /// Mappings whose name (a path, `[heap]`) contains this text; where it has a `*` (any text)
    /// or `?` (any character), whose whole name is like it.
    pub fn name(mut self, pattern: impl Into<String>) -> Self {
        self.name = Some(pattern.into());
        self
    }

    /// Pages that have a part in these addresses, huge ones too. Empty: none.
    pub fn range(mut self, range: Range<usize>) -> Self {
        let start = range.start & !(page_size() - 1);
        // The last address there is ends no page that a program can have.
        let end = range.end.checked_next_multiple_of(page_size()).unwrap_or(usize::MAX);
        self.range = Some(if range.is_empty() { 0..0 } else { start..end });
        self
    }

    /// What the kernel counts as resident of what is asked for.
    pub(crate) fn resident(&self, status: &Status) -> u64 {
        let any = |kinds: &[Kind]| kinds.iter().any(|k| self.has_kind(*k));
        let parts = [
            (any(&[Kind::Anonymous, Kind::Heap, Kind::Stack]), status.anonymous),
            (any(&[Kind::File]), status.file),
            (any(&[Kind::SharedMemory]), status.shared_memory),
            (any(&[Kind::Hugetlb]), status.hugetlb),
        ];
        let bytes = parts.iter().filter(|(asked, _)| *asked).map(|(_, bytes)| bytes).sum::<u64>();
        self.range.as_ref().map_or(bytes, |range| bytes.min(range.len() as u64))
    }

    pub(crate) fn has_kind(&self, kind: Kind) -> bool {
        self.kinds.is_empty() || self.kinds.contains(&kind)
    }

    pub(crate) fn addresses(&self) -> Option<&Range<usize>> {
        self.range.as_ref()
    }

    /// The addresses of a mapping that are asked for.
    pub(crate) fn select(&self, vma: &Vma, kind: Kind) -> Option<Range<usize>> {
        if !self.has_kind(kind) || self.name.as_ref().is_some_and(|p| !matches(p, &vma.name)) {
            return None;
        }
        let mut range = vma.range();
        if let Some(wanted) = &self.range {
            range = range.start.max(wanted.start)..range.end.min(wanted.end);
        }
        (!range.is_empty()).then_some(range)
    }
}

/// Whether a name contains the pattern, or is like it where it has wildcards.
fn matches(pattern: &str, name: &str) -> bool {
    if !pattern.contains(['*', '?']) {
        return name.contains(pattern);
    }
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // Where the last `*` was, and up to where of the name it reaches.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&c) if c == '?' || c == name[n] => (p, n) = (p + 1, n + 1),
            _ => {
                let Some((at, reach)) = star else { return false };
                star = Some((at, reach + 1));
                (p, n) = (at + 1, reach + 1);
            }
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_by_part_or_by_wildcards() {
        for (pattern, name, is) in [
            ("libc", "/usr/lib/libc.so.6", true),
            ("", "", true),
            ("*.so", "/usr/lib/libc.so.6", false),
            ("*.so*", "/usr/lib/libc.so.6", true),
            ("*lib?.so.?", "/usr/lib/libc.so.6", true),
            ("*a*b*c", "xxaxxbxxbxc", true),
            ("?", "", false),
            ("*", "", true),
        ] {
            assert_eq!(matches(pattern, name), is, "{pattern} {name}");
        }
    }

    #[test]
    fn mappings_are_told_apart_by_device_and_name() {
        let vma = |inode, minor, name: &str| Vma {
            inode,
            device: (0, minor),
            name: name.into(),
            ..Vma::default()
        };
        let backings = vec![
            ((0, 1), Backing::SharedMemory),
            ((0, 2), Backing::Hugetlb(1 << 30)),
            // `/dev` is a tmpfs in many containers.
            ((0, 1), Backing::Zero(5)),
            ((0, 4), Backing::Zero(5)),
        ];
        let kind = |v: Vma| Kind::of(&v, &backings);
        let base = page_size();
        assert_eq!(kind(vma(0, 0, "")), Some((Kind::Anonymous, base)));
        assert_eq!(kind(vma(0, 0, "[heap]")), Some((Kind::Heap, base)));
        assert_eq!(kind(vma(0, 0, "[stack]")), Some((Kind::Stack, base)));
        assert_eq!(kind(vma(0, 0, "[anon:pool]")), Some((Kind::Anonymous, base)));
        assert_eq!(kind(vma(0, 0, "[vdso]")), None);
        assert_eq!(kind(vma(7, 1, "/memfd:x (deleted)")), Some((Kind::SharedMemory, base)));
        assert_eq!(kind(vma(7, 2, "/anon_hugepage (deleted)")), Some((Kind::Hugetlb, 1 << 30)));
        // A private mapping of /dev/zero is anonymous memory, whatever /dev is.
        for minor in [1, 4] {
            assert_eq!(kind(vma(5, minor, "/dev/zero")), Some((Kind::Anonymous, base)));
        }
        let shared = Vma { shared: true, ..vma(5, 1, "/dev/zero") };
        assert_eq!(kind(shared), Some((Kind::SharedMemory, base)));
        assert_eq!(kind(vma(6, 4, "/dev/zero")), Some((Kind::File, base)), "a file of that name");
        assert_eq!(kind(vma(7, 3, "/bin/x")), Some((Kind::File, base)));
    }
}
