//! The kernel's way of moving: rights over other programs, what forbids a node, what moves pages
//! on its own. (`numa-balancing` and `nodes` are among the memory settings, `memory-policy` among
//! the kernel's features.)
//!
//! Source: mm/migrate.c (`find_mm_struct`, `do_pages_move`, `kernel_move_pages`), kernel/ptrace.c
//! (`__ptrace_may_access`), security/yama/yama_lsm.c, `Documentation/admin-guide/mm/numaperf.rst`,
//! `Documentation/admin-guide/mm/idle_page_tracking.rst`.

use pageferry_sys::idle::BITMAP;
use pageferry_sys::procfs;
use pageferry_topology::{Machine, NodeList};

use super::Check;
use crate::copiers::{Migrator, OURS};
use crate::host::{Capability, Host};

pub(super) fn checks(host: &Host, nodes: usize) -> Vec<Check> {
    let machine = Machine::read_from(host.root()).ok();
    let memory = machine.as_ref().map(|m| m.memory_nodes().map(|node| node.id).collect());
    let memory: NodeList = memory.unwrap_or_default();
    let tiers = machine.as_ref().map_or(1, |machine| machine.tiers().len());
    vec![
        between(host, &memory, nodes),
        numbers(procfs::is_own()),
        others(host),
        hidden(host),
        shared(host),
        ptrace_scope(host),
        cpuset(host, &memory),
        demotion(host, tiers),
        idle_pages(host),
        copy_offload(host),
    ]
}

/// What `move` has to do here; whether the calls work is `memory-policy`'s to say.
fn between(host: &Host, memory: &NodeList, nodes: usize) -> Check {
    const ID: &str = "move-between";
    if nodes == 0 {
        return Check::warn(ID, "which nodes there are cannot be told", "see `nodes` above");
    }
    if nodes == 1 {
        return Check::ok(ID, "one node: `where` can look, `move` has nothing to move between");
    }
    let mut found = format!("{nodes} nodes: `move` and `migratepages` move programs between them");
    // What to do is the cpuset's own to say.
    if let Some(forbidden) = forbidden(host, memory) {
        found += &format!(", but not to node {forbidden}, which the cpuset here forbids");
    }
    Check::ok(ID, found)
}

/// Numbers of processes are looked up in `/proc` and given to system calls.
fn numbers(is_own: bool) -> Check {
    const ID: &str = "proc";
    if is_own {
        return Check::ok(ID, "/proc is that of this pid namespace");
    }
    Check::missing(
        ID,
        "/proc is that of another pid namespace: its numbers are other processes' here",
        "enter the mount namespace too (nsenter -p -m), or mount -t proc proc /proc in a mount \
         namespace of your own",
    )
}

/// What procfs hides from whom it does not belong to (`hidepid` in proc(5)); one may belong to a
/// group that sees everything, which the mount does not tell of a caller.
fn hidden(host: &Host) -> Check {
    const ID: &str = "proc-hidden";
    let mounts = host.text("proc/self/mounts").unwrap_or_default();
    // The last mount at a place is the one that is seen.
    let options = mounts.lines().rev().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        (fields.next()? == "/proc").then(|| fields.nth(1).unwrap_or_default().to_owned())
    });
    let hidepid = options
        .iter()
        .flat_map(|all| all.split(','))
        .find(|o| o.starts_with("hidepid=") && !matches!(*o, "hidepid=0" | "hidepid=off"));
    match hidepid {
        None => Check::ok(ID, "/proc hides no process"),
        Some(option) if host.has(Capability::SysPtrace) => {
            Check::ok(ID, format!("/proc is mounted with {option}; CAP_SYS_PTRACE sees all"))
        }
        Some(option) => Check::warn(
            ID,
            format!(
                "/proc is mounted with {option}: processes of other users look as if not there"
            ),
            "run as root or with CAP_SYS_PTRACE, join the group of its gid= option, or mount -o \
             remount,hidepid=0 /proc",
        ),
    }
}

/// Looking into and moving takes `PTRACE_MODE_READ_REALCREDS`: the same user, dumpable, and no
/// more capabilities than the caller; or `CAP_SYS_PTRACE`.
fn others(host: &Host) -> Check {
    const ID: &str = "other-processes";
    if host.has(Capability::SysPtrace) {
        return Check::ok(
            ID,
            "CAP_SYS_PTRACE: every process in this pid namespace, as far as security modules and \
             user namespaces allow",
        );
    }
    Check::warn(
        ID,
        "without CAP_SYS_PTRACE only this user's own, if they have no further capabilities",
        "run as root, or setcap cap_sys_ptrace,cap_sys_nice+ep on the pageferry command",
    )
}

/// `MPOL_MF_MOVE_ALL`.
fn shared(host: &Host) -> Check {
    const ID: &str = "shared-pages";
    if host.has(Capability::SysNice) {
        return Check::ok(ID, "CAP_SYS_NICE: pages that several processes map move too");
    }
    Check::warn(
        ID,
        "without CAP_SYS_NICE pages that several processes map stay: libraries, shared memory",
        "run as root, or setcap cap_sys_ptrace,cap_sys_nice+ep on the pageferry command",
    )
}

/// Yama restricts attaching only (`PTRACE_MODE_ATTACH`); it is often taken for more.
fn ptrace_scope(host: &Host) -> Check {
    const ID: &str = "ptrace-scope";
    match host.number("proc/sys/kernel/yama/ptrace_scope") {
        None => Check::ok(ID, "Yama is not part of this kernel"),
        Some(0) => Check::ok(ID, "0: as the kernel has it"),
        Some(scope) => {
            Check::ok(ID, format!("{scope}: restricts debuggers, not looking or moving"))
        }
    }
}

/// Nodes with memory that this process's cpuset allows. `None`: it does not tell.
fn allowed(host: &Host) -> Option<NodeList> {
    host.status("Mems_allowed_list").and_then(|text| text.parse().ok())
}

/// Nodes with memory that it forbids, if there are any.
fn forbidden(host: &Host, memory: &NodeList) -> Option<NodeList> {
    allowed(host).map(|allowed| memory.difference(&allowed)).filter(|nodes| !nodes.is_empty())
}

/// What this process's cpuset allows: programs that are started beside it inherit it, and a move
/// to another node is refused (`EACCES`).
fn cpuset(host: &Host, memory: &NodeList) -> Check {
    const ID: &str = "cpuset";
    if allowed(host).is_none() {
        return Check::ok(ID, "cannot tell which nodes are allowed; the kernel will say");
    }
    let Some(forbidden) = forbidden(host, memory) else {
        return Check::ok(ID, format!("allows every node with memory ({memory})"));
    };
    Check::warn(
        ID,
        format!("forbids node {forbidden} to programs of this cgroup or container"),
        format!(
            "write {memory} to cpuset.mems of the cgroup (--cpuset-mems of the container), and of \
             those above it"
        ),
    )
}

fn demotion(host: &Host, tiers: usize) -> Check {
    const ID: &str = "demotion";
    match host.text("sys/kernel/mm/numa/demotion_enabled").as_deref() {
        None => Check::ok(ID, "not part of this kernel"),
        Some("false" | "0") => Check::ok(ID, "off"),
        Some(_) if tiers < 2 => Check::ok(ID, "on, idle with one tier of memory"),
        Some(_) => Check::warn(
            ID,
            "on: short of memory, the kernel moves pages to slower tiers, also those just moved up",
            "echo false > /sys/kernel/mm/numa/demotion_enabled, if placement is to be yours alone",
        ),
    }
}

/// What `move --min-age` asks. The bitmap is there where the kernel tracks idle pages; reading it
/// would do no harm, but takes root.
fn idle_pages(host: &Host) -> Check {
    const ID: &str = "idle-pages";
    if !host.root().join(BITMAP.trim_start_matches('/')).exists() {
        return Check::warn(
            ID,
            "not tracked by this kernel: `move --min-age` has nothing to go by",
            "use a kernel with CONFIG_IDLE_PAGE_TRACKING=y if pages are to be moved by their age",
        );
    }
    if !host.has(Capability::SysAdmin) {
        return Check::warn(
            ID,
            "tracked, but told to root alone: `move --min-age` will be refused",
            "run as root, with CAP_SYS_ADMIN outside of containers",
        );
    }
    Check::ok(ID, "tracked: `move --min-age` can tell which pages are used")
}

/// Who copies the pages that the kernel moves.
fn copy_offload(host: &Host) -> Check {
    const ID: &str = "kernel-copies";
    let found = match Migrator::of(host) {
        Migrator::Unknown => "folio by folio, as Linux does".to_owned(),
        Migrator::None => {
            let names: Vec<_> = OURS.iter().map(|module| module.name).collect();
            let names = names.join(", ");
            format!("in batches if a module is loaded ({names}); folio by folio now")
        }
        Migrator::Module { name, reasons } => {
            format!("in batches by {name}, for these reasons to migrate: {reasons}")
        }
    };
    Check::ok(ID, found)
}

#[cfg(test)]
mod tests {
    use pageferry_topology::NodeId;

    use super::*;
    use crate::doctor::Status;
    use crate::host::tests::host;

    fn two() -> NodeList {
        [0, 1].into_iter().map(NodeId::new).collect()
    }

    #[test]
    fn what_keeps_programs_from_being_moved_is_warned_of_with_a_remedy() {
        let (_dir, host) = host(&[
            ("proc/self/status", "CapEff:\t0000000000000000\nMems_allowed_list:\t0\n"),
            ("sys/kernel/mm/numa/demotion_enabled", "true\n"),
        ]);
        let found = [
            others(&host),
            shared(&host),
            cpuset(&host, &two()),
            demotion(&host, 2),
            idle_pages(&host),
        ];
        for check in &found {
            assert_eq!(check.status, Status::Warn, "{check:?}");
            assert!(check.remedy.is_some(), "{check:?}");
        }
        assert!(found[2].found.contains("forbids node 1"), "{:?}", found[2]);
        let between = between(&host, &two(), 2);
        assert!(between.found.contains("not to node 1"), "{between:?}");
    }

    #[test]
    fn a_proc_that_is_anothers_or_hides_processes_is_named_with_a_remedy() {
        assert_eq!(numbers(true).status, Status::Ok);
        let foreign = numbers(false);
        assert!(foreign.status == Status::Missing && foreign.remedy.is_some(), "{foreign:?}");
        let status = |options: &str, capabilities: &str| {
            let mounts = format!("proc /proc proc rw 0 0\nproc /proc proc {options} 0 0\n");
            let own = format!("CapEff:\t{capabilities}\n");
            hidden(&host(&[("proc/self/mounts", &mounts), ("proc/self/status", &own)]).1).status
        };
        assert_eq!(status("rw,relatime", "0"), Status::Ok);
        assert_eq!(status("rw,hidepid=off", "0"), Status::Ok);
        assert_eq!(status("rw,gid=7,hidepid=invisible", "0"), Status::Warn);
        // CAP_SYS_PTRACE is bit 19.
        assert_eq!(status("rw,hidepid=2", "80000"), Status::Ok);
    }

    #[test]
    fn who_copies_in_the_kernel_is_told() {
        let folder = "sys/kernel/mm/migrate_offload";
        let (migrator, reasons) = (format!("{folder}/migrator"), format!("{folder}/reasons"));
        let found = |files: &[(&str, &str)]| copy_offload(&host(files).1).found;
        assert_eq!(found(&[]), "folio by folio, as Linux does");
        assert!(found(&[(&migrator, "none\n"), (&reasons, "all\n")]).contains("now"));
        let loaded = found(&[(&migrator, "pageferry_copy_mt\n"), (&reasons, "demotion\n")]);
        assert!(loaded.contains("pageferry_copy_mt") && loaded.ends_with("demotion"), "{loaded}");
    }

    #[test]
    fn idle_pages_take_a_kernel_that_tracks_them_and_root() {
        let bitmap = ("sys/kernel/mm/page_idle/bitmap", "");
        // CAP_SYS_ADMIN is bit 21.
        for (capabilities, status) in [("200000", Status::Ok), ("80000", Status::Warn)] {
            let status_file = format!("CapEff:\t0000000000{capabilities}\n");
            let (_dir, host) = host(&[bitmap, ("proc/self/status", &status_file)]);
            assert_eq!(idle_pages(&host).status, status, "{capabilities}");
        }
    }

    #[test]
    fn what_does_not_matter_is_not_warned_of() {
        let (_dir, host) = host(&[
            // CAP_SYS_PTRACE is bit 19, CAP_SYS_NICE bit 23.
            ("proc/self/status", "CapEff:\t0000000000880000\nMems_allowed_list:\t0-7\n"),
            ("proc/sys/kernel/yama/ptrace_scope", "3\n"),
            ("sys/kernel/mm/numa/demotion_enabled", "true\n"),
        ]);
        let found = [others(&host), shared(&host), cpuset(&host, &two()), ptrace_scope(&host)];
        for check in found.iter().chain([&demotion(&host, 1)]) {
            assert_eq!(check.status, Status::Ok, "{check:?}");
        }
    }
}
