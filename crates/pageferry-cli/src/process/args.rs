//! Values that options take: nodes, durations, addresses, kinds of memory.

use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueHint};
use pageferry::process::{Filter, Kind, Selection, Target};
use pageferry_topology::{ListError, Machine, NodeId, NodeList};

use crate::output::Problem;
use crate::topology::unreadable;

/// `PID_MAX_LIMIT` on 64-bit kernels, include/linux/threads.h.
const PID_MAX: u32 = 4 << 20;

/// Which of their memory.
#[derive(Debug, Args)]
pub(super) struct FilterArgs {
    /// Only memory of these kinds
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = kinds())]
    pub(super) only: Vec<Kind>,

    /// Only mappings whose name contains this, or is like it where it has * or ?
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub(super) file: Option<String>,
}

impl FilterArgs {
    pub(super) fn filter(&self) -> Filter {
        let filter = Filter::new().kinds(self.only.iter().copied());
        match &self.file {
            Some(name) => filter.name(name),
            None => filter,
        }
    }
}

/// Whole cgroups, and children.
#[derive(Debug, Args)]
pub(super) struct GroupArgs {
    /// A cgroup with those below it: a folder, seen from the current one too, or a path below
    /// /sys/fs/cgroup; may be repeated
    #[arg(long, value_name = "PATH", value_hint = ValueHint::DirPath)]
    pub(super) cgroup: Vec<PathBuf>,

    /// Their children too, and theirs
    #[arg(long)]
    pub(super) children: bool,
}

/// Everything that was named.
pub(super) fn targets(pids: &[u32], groups: &GroupArgs) -> Result<Vec<Target>, Problem> {
    let here = std::env::current_dir().unwrap_or_default();
    let groups = groups.cgroup.iter().map(|path| Ok(Target::Cgroup(group(path, &here)?)));
    pids.iter().map(|pid| Ok(Target::Pid(*pid))).chain(groups).collect()
}

/// The cgroup that a path names: a folder, seen from the current one `here`, that is a cgroup;
/// else a path below where cgroups are mounted, as it is given. Such a one goes downwards only: `.`
/// and `..` would name the root, which is every process of the machine.
fn group(path: &Path, here: &Path) -> Result<PathBuf, Problem> {
    let folder = here.join(path);
    if !path.as_os_str().is_empty() && folder.join("cgroup.procs").exists() {
        return Ok(folder.canonicalize().unwrap_or(folder));
    }
    let downwards = |part| matches!(part, Component::RootDir | Component::Normal(_));
    if !path.as_os_str().is_empty() && path.components().all(downwards) {
        return Ok(path.to_path_buf());
    }
    Err(Problem::bad_input(
        format!("cannot look at cgroup '{}'", path.display()),
        format!("{} is no cgroup: it holds no cgroup.procs", folder.display()),
        "name a folder that holds cgroup.procs, or a path below /sys/fs/cgroup (v2) or \
         /sys/fs/cgroup/memory (v1)",
    ))
}

/// Part of a mapping's name.
fn name(text: &str) -> Result<String, String> {
    match text {
        "" => Err("it is empty, and every name contains that; leave it out for all".into()),
        text => Ok(text.to_owned()),
    }
}

/// Their memory.
pub(super) fn selection(targets: impl IntoIterator<Item = Target>) -> Selection {
    targets.into_iter().fold(Selection::new(), Selection::target)
}

fn kinds() -> impl TypedValueParser<Value = Kind> {
    let named = |name: String| Kind::ALL.into_iter().find(|kind| kind.name() == name);
    PossibleValuesParser::new(Kind::ALL.map(Kind::name))
        .try_map(move |name| named(name).ok_or("no such kind"))
}

/// The machine that this runs on.
pub(super) fn machine() -> Result<Machine, Problem> {
    Machine::read().map_err(|error| unreadable(&error))
}

/// Nodes that pages are taken from.
pub(super) fn from(text: &str, machine: &Machine) -> Result<NodeList, Problem> {
    let all = machine.nodes().iter().map(|node| node.id).collect();
    NodeList::parse(text, &all).map_err(|error| bad_list("--from", text, &error, &all))
}

/// Nodes that pages go to, in the order in which they are named where each is named by itself.
pub(super) fn to(text: &str, machine: &Machine) -> Result<Vec<NodeId>, Problem> {
    let with_memory = machine.memory_nodes().map(|node| node.id).collect();
    let nodes = with_memory_only("--to", text, machine, &with_memory)?;
    let in_order = text.split(',').map(|part| NodeList::parse(part, &with_memory));
    let in_order: Result<Vec<_>, _> = in_order.collect();
    let mut list: Vec<NodeId> = match in_order {
        Ok(parts) if !text.trim().starts_with(['!', '+']) => {
            parts.iter().flat_map(NodeList::iter).collect()
        }
        _ => nodes.iter().collect(),
    };
    let mut seen = Vec::new();
    list.retain(|node| {
        let is_new = !seen.contains(node);
        seen.push(*node);
        is_new
    });
    Ok(list)
}

/// A list of nodes that must have memory.
pub(super) fn with_memory_only(
    option: &str,
    text: &str,
    machine: &Machine,
    allowed: &NodeList,
) -> Result<NodeList, Problem> {
    NodeList::parse(text, allowed).map_err(|error| {
        let all: NodeList = machine.nodes().iter().map(|node| node.id).collect();
        match NodeList::parse(text, &all) {
            Ok(nodes) if matches!(error, ListError::NotThere { .. }) => {
                let empty = nodes.difference(allowed);
                Problem::bad_input(
                    format!("{option} '{text}': no memory can go there"),
                    format!("node {empty} has no memory, or is not allowed to this process"),
                    format!("choose from {allowed}; `pageferry topology` shows the nodes"),
                )
            }
            _ => bad_list(option, text, &error, allowed),
        }
    })
}

/// What numactl takes for the nodes of devices (libnuma, affinity.c).
const DEVICES: [&str; 5] = ["netdev:", "file:", "ip:", "pci:", "block:"];

fn bad_list(option: &str, text: &str, error: &ListError, allowed: &NodeList) -> Problem {
    let named = text.trim().trim_start_matches(['!', '+']);
    if let Some(form) = DEVICES.iter().find(|form| named.starts_with(**form)) {
        return Problem::bad_input(
            format!("{option} '{text}': the node of a device is not looked up"),
            format!("of numactl's forms, {form} and its like are not taken, only numbers of nodes"),
            "read the device's numa_node below /sys (of a network card: \
             /sys/class/net/NAME/device/numa_node), and name that node",
        );
    }
    Problem::bad_input(
        format!("{option} '{text}': not a list of nodes of this machine"),
        error.to_string(),
        format!("name some of {allowed}, such as +0 or all; `pageferry topology` shows them"),
    )
}

/// The number of a process.
pub(super) fn pid(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(pid) if (1..=PID_MAX).contains(&pid) => Ok(pid),
        _ => Err(format!("the number of a process is 1 to {PID_MAX}; `ps -e` lists them")),
    }
}

/// The time that one call may take.
pub(super) fn latency(text: &str) -> Result<Duration, String> {
    let latency = duration(text)?;
    match (Duration::from_micros(100)..=Duration::from_secs(10)).contains(&latency) {
        true => Ok(latency),
        false => Err("it can be 100us to 10s".into()),
    }
}

/// The time for which pages must not have been used.
pub(super) fn age(text: &str) -> Result<Duration, String> {
    let age = duration(text)?;
    match (Duration::from_millis(1)..=Duration::from_secs(24 * 60 * 60)).contains(&age) {
        true => Ok(age),
        false => Err("it can be 1ms to 24h".into()),
    }
}

/// `20ms`, `500us`, `1.5s`, `5m`, `2h`.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "" => return Err("the unit is missing; write for example 20ms".into()),
        unit => return Err(format!("unknown unit '{unit}'; use us, ms, s, m or h")),
    };
    let number: f64 = digits.parse().map_err(|_| "expected a time such as 20ms".to_owned())?;
    Duration::try_from_secs_f64(number * unit).map_err(|_| "not a time".to_owned())
}

/// `7f0000000000-7f0000200000`: hexadecimal, as in `/proc/PID/maps`, `0x` or not.
pub(super) fn addresses(text: &str) -> Result<Range<usize>, String> {
    let number = |part: &str| {
        let digits = part.trim().trim_start_matches("0x");
        usize::from_str_radix(digits, 16)
            .map_err(|_| format!("'{part}' is no hexadecimal address; see /proc/PID/maps"))
    };
    let (start, end) =
        text.split_once('-').ok_or("expected two addresses such as 7f0000000000-7f0000200000")?;
    let (start, end) = (number(start)?, number(end)?);
    if start >= end {
        return Err("the range ends before it begins".into());
    }
    whole_pages(start..end).ok_or_else(|| "beyond the address space".into())
}

/// The pages that a range has a part of. `None`: beyond the address space.
pub(super) fn whole_pages(range: Range<usize>) -> Option<Range<usize>> {
    let page = pageferry_sys::page_size();
    Some(range.start / page * page..range.end.checked_next_multiple_of(page)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_seen_from_the_current_folder_and_never_the_root_by_accident() {
        let root = tempfile::tempdir().expect("a folder");
        let mount = root.path().canonicalize().expect("there");
        let (a, b) = (mount.join("a"), mount.join("a/b b"));
        std::fs::create_dir_all(&b).expect("folders");
        for folder in [&mount, &a, &b] {
            std::fs::write(folder.join("cgroup.procs"), "").expect("a file");
        }
        let found = |path: &str, here: &Path| group(Path::new(path), here).ok();
        assert_eq!(found(".", &a), Some(a.clone()));
        assert_eq!(found("", &a), None);
        assert_eq!(found("b b", &a), Some(b.clone()));
        assert_eq!(found("../a/b b", &a), Some(b.clone()));
        assert_eq!(found("..", &b), Some(a.clone()));
        assert_eq!(found(&b.display().to_string(), Path::new("/")), Some(b));
        // Names below the root stay as they are.
        for name in ["other.slice", "/other.slice/x", "other.slice/."] {
            assert_eq!(found(name, &a), Some(name.into()));
        }
        let elsewhere = tempfile::tempdir().expect("a folder");
        for bad in [".", "..", "./x", "x/..", "/x/..", ""] {
            assert_eq!(found(bad, elsewhere.path()), None, "{bad}");
        }
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("500us"), Ok(Duration::from_micros(500)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(age("24h"), Ok(Duration::from_secs(86_400)));
        assert!(age("25h").is_err() && age("1us").is_err());
        for bad in ["20", "ms", "", "-1s", "1d", "1e400s", "NaNs"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_are_written_as_in_maps() {
        assert_eq!(addresses("10000-30000"), Ok(0x10000..0x30000));
        let page = pageferry_sys::page_size();
        let part = format!("{:#x}-{:#x}", 8 * page + 16, 9 * page + 16);
        assert_eq!(addresses(&part), Ok(8 * page..10 * page));
        for bad in ["1000", "3000-1000", "1000-1000", "x-y", "1-", "", "1-ffffffffffffffff"] {
            assert!(addresses(bad).is_err(), "{bad}");
        }
    }
}
