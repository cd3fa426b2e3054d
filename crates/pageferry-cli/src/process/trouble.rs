//! Refusals of the library in the command's form: what, because, remedy.

use pageferry::process::{Notes, ProcessError, TargetError};
use pageferry_sys::idle::BITMAP as IDLE_BITMAP;
use pageferry_sys::peer::effective_user;

use crate::exit::Exit;
use crate::output::Problem;
use crate::topology::unreadable;

/// A target that cannot be looked at.
pub(super) fn of_target(error: &TargetError) -> Problem {
    match error {
        TargetError::Empty => Problem::bad_input(
            "no process is named",
            "there is nothing to look at",
            "name a pid or a cgroup",
        ),
        TargetError::ForeignProcfs => Problem {
            what: "/proc shows another pid namespace than this command is in".into(),
            because: "a number there is another process than in a system call (nsenter -p without \
                      -m, unshare -p without --mount-proc)"
                .into(),
            remedy:
                "enter the mount namespace too (nsenter -p -m), or mount -t proc proc /proc in \
                     a mount namespace of your own"
                    .into(),
            exit: Exit::Failed,
        },
        TargetError::Refused(errno) => Problem {
            what: "this command may not ask where pages are".into(),
            because: format!("move_pages(2) is refused: {errno}"),
            remedy:
                "allow move_pages in the sandbox's seccomp profile (containers: --security-opt \
                     seccomp=PROFILE, or --cap-add SYS_NICE where the runtime's profile goes by \
                     that); `pageferry doctor` says what else is refused"
                    .into(),
            exit: Exit::Failed,
        },
        TargetError::NoProcess(pid) => Problem::bad_input(
            format!("cannot look at process {pid}"),
            "there is none: it has ended, or lives in another pid namespace",
            "name a running process; `ps -e` lists them",
        ),
        TargetError::Zombie(pid) => Problem::bad_input(
            format!("cannot look at process {pid}"),
            "it has ended and has no memory; its parent has not waited for it (a zombie)",
            "name a running process; `ps -e` lists them",
        ),
        TargetError::KernelThread(pid) => Problem::bad_input(
            format!("cannot look at process {pid}"),
            "it is a kernel thread, which has no memory of its own",
            "name a program: in `ps -e -o pid,args` kernel threads stand in [brackets]",
        ),
        TargetError::Denied { pid, uid, source } => Problem::bad_input(
            format!("cannot look into process {pid} of user {uid}"),
            format!("it is not ours to look into: {source}"),
            denied(effective_user()),
        ),
        TargetError::NoGroup(path) => Problem::bad_input(
            format!("cannot look at cgroup {}", path.display()),
            "there is none of this name",
            "name a folder that holds cgroup.procs, or a path below /sys/fs/cgroup (v2) or \
             /sys/fs/cgroup/memory (v1)",
        ),
        TargetError::Group { path, source } => Problem::bad_input(
            format!("cannot look at cgroup {}", path.display()),
            format!("its processes cannot be listed: {source}"),
            "run as root, or as the user that the group is delegated to",
        ),
        TargetError::Open { pid, source } => Problem {
            what: format!("process {pid} cannot be opened"),
            because: source.to_string(),
            remedy: "mount procfs at /proc; raise the limit on open files (ulimit -n)".into(),
            exit: Exit::Failed,
        },
        other => Problem {
            what: "a process cannot be looked at".into(),
            because: other.to_string(),
            remedy: "`pageferry doctor` says what is missing".into(),
            exit: Exit::Failed,
        },
    }
}

/// What this user can do where a process is not to be looked into.
fn denied(user: u32) -> &'static str {
    if user == 0 {
        return "root is refused by a security module (SELinux, AppArmor), for want of \
                CAP_SYS_PTRACE, or in a user namespace that is not the program's: run outside of \
                the container, with CAP_SYS_PTRACE; `pageferry doctor` says what is missing";
    }
    "run as that user or as root, or with CAP_SYS_PTRACE (and CAP_SYS_NICE to move what processes \
     share); `pageferry doctor` says what is missing"
}

/// A move that could not begin.
pub(super) fn of_move(error: &ProcessError) -> Problem {
    match error {
        ProcessError::Target(error) => of_target(error),
        ProcessError::Node(error) => Problem::bad_input(
            "a node that was named cannot be used",
            error.to_string(),
            "`pageferry topology` shows the nodes and their memory",
        ),
        ProcessError::Forbidden { pid, node, allowed } => Problem::bad_input(
            format!("process {pid} cannot have memory on node {node}"),
            format!("its cpuset allows node {allowed} only"),
            "choose one of these, or widen cpuset.mems of its cgroup",
        ),
        ProcessError::Option(error) => {
            let option = match error.option {
                "call_latency" => "--latency",
                "workers" => "--threads",
                "priority" => "--nice",
                "rate" => "--rate",
                "min_age" => "--min-age",
                _ => "--to, with --weights where given",
            };
            Problem::bad_input(
                format!("invalid value '{}' for {option}", error.value),
                format!("allowed: {}", error.reason),
                "see `pageferry move --help`",
            )
        }
        ProcessError::Machine(error) => unreadable(error),
        ProcessError::NoNuma(errno) => Problem {
            what: "this kernel does not move pages".into(),
            because: errno.to_string(),
            remedy: "use a kernel with CONFIG_NUMA and CONFIG_MIGRATION; in a container, its \
                     seccomp profile must allow move_pages(2)"
                .into(),
            exit: Exit::Failed,
        },
        ProcessError::NoIdlePages(errno) => Problem {
            what: "--min-age: this kernel does not track which pages are idle".into(),
            because: format!("{IDLE_BITMAP}: {errno}"),
            remedy:
                "use a kernel with CONFIG_IDLE_PAGE_TRACKING=y, as root; or leave --min-age out"
                    .into(),
            // As with any option that cannot be used here; nothing was tried.
            exit: Exit::Usage,
        },
        ProcessError::IdlePagesDenied(errno) => Problem {
            what: "--min-age: which pages are idle is told to root alone".into(),
            because: format!("{IDLE_BITMAP}: {errno}"),
            remedy: "run as root, with CAP_SYS_ADMIN outside of containers; or leave --min-age out"
                .into(),
            exit: Exit::Failed,
        },
        ProcessError::Thread(error) => Problem {
            what: "no thread could be started for the move".into(),
            because: error.to_string(),
            remedy: "raise the limit on processes (ulimit -u, pids.max of the cgroup)".into(),
            exit: Exit::Failed,
        },
        other => Problem {
            what: "the move broke off".into(),
            because: other.to_string(),
            remedy: "all pages are intact; report this as a bug".into(),
            exit: Exit::Failed,
        },
    }
}

/// No process could be looked at, though what was named is there.
pub(super) fn nobody(notes: &Notes) -> Problem {
    if notes.list.is_empty() {
        return Problem::bad_input(
            "no process to look at",
            "the cgroups that are named hold no process",
            "name a cgroup with processes; `systemd-cgls` or its cgroup.procs lists them",
        );
    }
    let why: Vec<String> = notes.list.iter().take(3).map(ToString::to_string).collect();
    Problem {
        what: "no process could be looked at".into(),
        because: why.join("; "),
        remedy: "name other processes, or run with the rights that `pageferry doctor` names".into(),
        exit: Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_not_told_to_become_root() {
        assert!(denied(1000).contains("as root"));
        assert!(!denied(0).contains("as root") && denied(0).contains("CAP_SYS_PTRACE"));
    }
}
