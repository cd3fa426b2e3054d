//! The sandbox: which calls that pageferry makes a seccomp filter refuses.
//!
//! Each is made in a way that the kernel itself refuses to nobody and that changes nothing. So where a
//! filter is in force and such a call fails with an errno of refusal, the filter is the likely cause; a
//! security module could be another.
//!
//! Source: seccomp(2), proc(5) (`Seccomp`), Docker's default profile (moby, profiles/seccomp: it has
//! mbind, set_mempolicy and get_mempolicy for `CAP_SYS_NICE`, move_pages and userfaultfd not at all),
//! systemd.exec(5) (`SystemCallFilter=`).

use pageferry_sys::mm::set_default_policy;
use pageferry_sys::pidfd::PidFd;
use pageferry_sys::process::{LinuxProcesses, ProcessKernel as _};
use pageferry_sys::uffd::{Rights, Uffd};
use pageferry_sys::{Errno, Linux, Sys as _, page_size};

use super::Check;
use crate::host::Host;

/// A call, what needs it, and how it ended.
type Tried = (&'static str, &'static str, Result<(), Errno>);

pub(super) fn check(host: &Host) -> Check {
    judge(host.seccomp_filter(), &tried())
}

fn tried() -> Vec<Tried> {
    let kernel = LinuxProcesses::default();
    // In user mode only: that takes no right.
    let uffd = Uffd::offered(Rights::UserModeOnly).map(drop);
    let mut calls = vec![
        ("userfaultfd", "the library's own moves", uffd),
        ("pidfd_open", "other processes", PidFd::open(std::process::id()).map(drop)),
    ];
    // Where the kernel has none of them no filter is to blame.
    if !kernel.lacks_numa() {
        calls.extend([
            ("move_pages", "nodes of pages, other processes", kernel.may_ask()),
            // Of no page, so that nothing changes (mm/mempolicy.c, `do_mbind`).
            ("mbind", "new pages on a node", Linux.prefer_node(page_size(), 0, 0)),
            ("set_mempolicy", "new pages on a node", set_default_policy()),
        ]);
    }
    calls
}

fn judge(filtered: bool, tried: &[Tried]) -> Check {
    const ID: &str = "seccomp";
    if !filtered {
        return Check::ok(ID, "no seccomp filter");
    }
    // What a profile answers is its own choice; these are what they answer.
    let is_refusal = |errno: Errno| matches!(errno.name(), "EPERM" | "ENOSYS" | "EACCES");
    let refused: Vec<_> = tried
        .iter()
        .filter_map(|(call, what, result)| {
            result.err().filter(|errno| is_refusal(*errno)).map(|errno| (*call, *what, errno))
        })
        .collect();
    let names = |calls: &mut dyn Iterator<Item = &'static str>| calls.collect::<Vec<_>>();
    if refused.is_empty() {
        let all = names(&mut tried.iter().map(|(call, ..)| *call)).join(", ");
        return Check::ok(
            ID,
            format!("a filter is in force, and lets through what is needed: {all}"),
        );
    }
    let told: Vec<String> = refused
        .iter()
        .map(|(call, what, errno)| format!("{call} ({what}): {}", errno.name()))
        .collect();
    let calls = names(&mut refused.iter().map(|(call, ..)| *call));
    Check::warn(
        ID,
        format!(
            "a seccomp filter is in force (as by default in Docker, Podman and many systemd units), \
             and is the likely cause that these are refused: {}",
            told.join(", ")
        ),
        format!(
            "allow {} in its profile (containers: --security-opt seccomp=PROFILE; --cap-add SYS_NICE \
             is enough for mbind and set_mempolicy in Docker's own; systemd: \
             SystemCallFilter={} in the unit)",
            calls.join(", "),
            calls.join(" ")
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    fn results(errno: Option<i32>) -> Vec<Tried> {
        let refused = errno.map_or(Ok(()), |errno| Err(Errno(errno)));
        vec![("userfaultfd", "own moves", Ok(())), ("move_pages", "others", refused)]
    }

    #[test]
    fn calls_that_are_refused_under_a_filter_are_named_with_the_remedy() {
        for errno in [libc::EPERM, libc::ENOSYS, libc::EACCES] {
            let check = judge(true, &results(Some(errno)));
            assert_eq!(check.status, Status::Warn, "{check:?}");
            let told = format!("move_pages (others): {}", Errno(errno).name());
            assert!(check.found.contains(&told) && !check.found.contains("userfaultfd"));
            let remedy = check.remedy.expect("it is no ok");
            assert!(remedy.contains("SystemCallFilter=move_pages in"), "{remedy}");
        }
    }

    #[test]
    fn no_filter_is_blamed_that_is_not_there_or_refuses_nothing() {
        let open_files = results(Some(libc::EMFILE));
        for (filtered, tried) in
            [(false, results(Some(libc::EPERM))), (true, results(None)), (true, open_files)]
        {
            let check = judge(filtered, &tried);
            assert_eq!(check.status, Status::Ok, "{check:?}");
        }
    }

    #[test]
    fn what_is_tried_works_where_nothing_is_filtered() {
        if Host::new("/".as_ref()).seccomp_filter() {
            return eprintln!("skipped: these tests run under a seccomp filter");
        }
        for (call, _, result) in tried() {
            match result {
                Err(Errno(libc::ENOSYS)) => eprintln!("skipped in part: no {call} in this kernel"),
                result => assert_eq!(result, Ok(()), "{call}"),
            }
        }
    }
}
