//! What the kernel lets this process do: userfaultfd, pagemap, populate, policy.

use std::path::Path;

use pageferry_sys::mm::Advice;
use pageferry_sys::mm::set_default_policy;
use pageferry_sys::pagemap::{Categories, Entry, Pagemap, Run};
use pageferry_sys::process::{LinuxProcesses, ProcessKernel as _};
use pageferry_sys::uffd::{Features, Modes, Rights, Uffd};
use pageferry_sys::{Errno, Linux, Sys, page_size};

use super::Check;
use crate::host::{Capability, Host};

const NEWER_KERNEL: &str = "use Linux 6.8 or newer, built with CONFIG_USERFAULTFD";

pub(super) fn checks(host: &Host) -> Vec<Check> {
    let mut checks = vec![sandbox(host)];
    let (rights_check, rights) = rights(host);
    checks.push(rights_check);
    if let Some(rights) = rights {
        checks.extend(features(host, rights));
    }
    match Pages::new(4) {
        Ok(pages) => {
            checks.push(populate(&pages));
            checks.push(frame_numbers(host, &pages));
            checks.push(scan(&pages));
            checks.push(policy(host, &pages));
        }
        Err(errno) => checks.push(Check::missing(
            "memory-map",
            format!("a few pages cannot be mapped: {errno}"),
            "raise the limits on address space (ulimit -v) and memory",
        )),
    }
    checks
}

/// A few pages of this process to try things on; unmapped when dropped.
struct Pages {
    start: usize,
    len: usize,
}

impl Pages {
    fn new(count: usize) -> Result<Self, Errno> {
        let len = count * page_size();
        let start = Linux.map(len, page_size())?;
        Ok(Self { start, len })
    }

    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        // SAFETY: the range is ours alone, mapped in `new`, and nothing in it is kept.
        unsafe { Linux.advise(self.start, self.len, advice) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the range was mapped in `new` and no reference to it is ever formed.
        // That it fails would leak a few pages of a program about to end.
        let _ = unsafe { Linux.unmap(self.start, self.len) };
    }
}

fn sandbox(host: &Host) -> Check {
    let version = host.text("proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into());
    let contained = ["run/.containerenv", ".dockerenv", "run/systemd/container"]
        .iter()
        .any(|file| host.root().join(file).exists());
    let mut found = format!("Linux {version}, {}", std::env::consts::ARCH);
    if contained {
        found += ", in a container";
    }
    if host.seccomp_filter() {
        found += ", under a seccomp filter";
    }
    Check::ok("kernel", found)
}

fn rights(host: &Host) -> (Check, Option<Rights>) {
    const ID: &str = "userfaultfd";
    let full = match Uffd::offered(Rights::Full) {
        Ok(_) => {
            let way = if host.has(Capability::SysPtrace) {
                "CAP_SYS_PTRACE"
            } else if host.number("proc/sys/vm/unprivileged_userfaultfd") == Some(1) {
                "vm.unprivileged_userfaultfd=1"
            } else {
                "/dev/userfaultfd"
            };
            return (Check::ok(ID, format!("full rights, by {way}")), Some(Rights::Full));
        }
        Err(errno) => errno,
    };
    let user = match Uffd::offered(Rights::UserModeOnly) {
        Ok(_) => {
            let device = if Path::new("/dev/userfaultfd").exists() {
                ", or give yourself read and write permission on /dev/userfaultfd"
            } else {
                ""
            };
            let check = Check::warn(
                ID,
                format!(
                    "user mode only ({}): during a move no system call may be given the memory",
                    full.name()
                ),
                format!(
                    "sysctl vm.unprivileged_userfaultfd=1, or run with CAP_SYS_PTRACE \
                     (setcap cap_sys_ptrace+ep on the program){device}"
                ),
            );
            return (check, Some(Rights::UserModeOnly));
        }
        Err(errno) => errno,
    };
    let found = format!("refused: {user}");
    let remedy = if host.seccomp_filter() {
        "allow the system call userfaultfd in the sandbox's seccomp profile \
         (for a container: --security-opt seccomp=PROFILE)"
    } else {
        match user.name() {
            "ENOSYS" => NEWER_KERNEL,
            "EMFILE" | "ENFILE" => "raise the limit on open files (ulimit -n)",
            _ => "allow userfaultfd in the security module's policy (SELinux: anon_inode create)",
        }
    };
    (Check::missing(ID, found, remedy), None)
}

fn features(host: &Host, rights: Rights) -> Vec<Check> {
    let Ok(offered) = Uffd::offered(rights) else {
        // Only if descriptors ran out since `rights` asked the same.
        return Vec::new();
    };
    let version = host.text("proc/sys/kernel/osrelease").unwrap_or_default();
    let needed = |id, feature: Features, what: &str| {
        if offered & feature.bits() == feature.bits() {
            Check::ok(id, format!("{what}: offered"))
        } else {
            Check::missing(id, format!("{what}: not offered by {version}"), NEWER_KERNEL)
        }
    };
    let events = Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
    let protect = Features::PAGEFAULT_FLAG_WP;
    vec![
        move_page(rights, offered),
        needed("uffd-events", events, "events for mremap, madvise and munmap"),
        needed("uffd-protect", protect, "write protection, for live moves"),
    ]
}

/// Moves a page and looks whether it arrived.
fn move_page(rights: Rights, offered: u64) -> Check {
    const ID: &str = "uffd-move";
    if offered & Features::MOVE.bits() == 0 {
        return Check::missing(ID, "UFFDIO_MOVE: not offered", NEWER_KERNEL);
    }
    match try_move(rights) {
        Ok(true) => Check::ok(ID, "UFFDIO_MOVE: a page was moved"),
        Ok(false) => Check::missing(ID, "UFFDIO_MOVE: a page arrived changed", NEWER_KERNEL),
        Err(errno) => Check::missing(
            ID,
            format!("UFFDIO_MOVE: offered, but fails with {errno}"),
            "allow the ioctls of userfaultfd in the sandbox's profile, or use another kernel",
        ),
    }
}

fn try_move(rights: Rights) -> Result<bool, Errno> {
    const MARK: u64 = 0x7061_6765_6665_7272;
    let (source, target) = (Pages::new(1)?, Pages::new(1)?);
    let fd = Linux.open_uffd(rights, Features::MOVE)?;
    Linux.register(&fd, target.start, target.len, Modes::MISSING)?;
    source.advise(Advice::PopulateWrite)?;
    let word = std::ptr::with_exposed_provenance_mut::<u64>(source.start);
    // SAFETY: the word is the first of a writable, aligned page that is ours alone.
    unsafe { word.write_volatile(MARK) };
    // SAFETY: both ranges are ours alone and nobody else uses them.
    let progress = unsafe { Linux.move_range(&fd, target.start, source.start, source.len) };
    if let Some(errno) = progress.error {
        return Err(errno);
    }
    let word = std::ptr::with_exposed_provenance::<u64>(target.start);
    // SAFETY: as above; the page is present, so that the access raises no fault to wait for.
    Ok(unsafe { word.read_volatile() } == MARK)
}

fn populate(pages: &Pages) -> Check {
    match pages.advise(Advice::PopulateWrite) {
        Ok(()) => Check::ok("populate", "MADV_POPULATE_WRITE: works"),
        Err(errno) => Check::missing(
            "populate",
            format!("MADV_POPULATE_WRITE: {errno}"),
            "use Linux 5.14 or newer, or raise the memory limit that refuses four pages",
        ),
    }
}

fn frame_numbers(host: &Host, pages: &Pages) -> Check {
    const ID: &str = "pagemap";
    const REMEDY: &str = "run with CAP_SYS_ADMIN to see physical addresses; moving needs none";
    let mut entry = [Entry(0)];
    match Pagemap::open().and_then(|map| map.entries(pages.start, &mut entry)) {
        Ok(()) if entry[0].pfn().is_some() => Check::ok(ID, "page frame numbers can be seen"),
        Ok(()) => {
            let known = if host.has(Capability::SysAdmin) { " (in a user namespace?)" } else { "" };
            Check::warn(ID, format!("page frame numbers are hidden{known}"), REMEDY)
        }
        Err(errno) => Check::warn(ID, format!("/proc/self/pagemap: {errno}"), REMEDY),
    }
}

fn scan(pages: &Pages) -> Check {
    let mut runs = [Run::EMPTY; 4];
    let end = pages.start + pages.len;
    let wanted = Categories::PRESENT;
    let result = Pagemap::open()
        .and_then(|map| Linux.scan(&map, pages.start, end, wanted, wanted, &mut runs));
    match result {
        Ok(_) => Check::ok("pagemap-scan", "PAGEMAP_SCAN: works"),
        Err(errno) => Check::missing(
            "pagemap-scan",
            format!("PAGEMAP_SCAN: {errno}"),
            "use Linux 6.7 or newer, with /proc mounted and /proc/self/pagemap readable",
        ),
    }
}

/// Without a policy new frames land where the thread runs: right on one node, useless on several.
fn policy(host: &Host, pages: &Pages) -> Check {
    const ID: &str = "memory-policy";
    let mut status = [0];
    let nodes: Vec<u32> = pageferry_topology::Machine::read()
        .map(|machine| machine.memory_nodes().map(|node| node.id.get()).collect())
        .unwrap_or_default();
    let first_node = nodes.first().copied().unwrap_or(0);
    let calls = [
        ("mbind", Linux.prefer_node(pages.start, pages.len, first_node)),
        ("set_mempolicy", set_default_policy()),
        ("move_pages", Linux.page_nodes(&[pages.start], &mut status)),
    ];
    let refused: Vec<String> = calls
        .into_iter()
        .filter_map(|(call, result)| result.err().map(|errno| format!("{call}: {errno}")))
        .collect();
    if refused.is_empty() {
        return Check::ok(ID, "mbind, set_mempolicy and move_pages: work");
    }
    let kernel = LinuxProcesses::default();
    let remedy = if kernel.lacks_numa() {
        "use a kernel built with CONFIG_NUMA; without it pages move frame to frame only"
    } else if host.seccomp_filter() {
        "allow mbind, set_mempolicy and move_pages in the sandbox's seccomp profile (containers: \
         --security-opt seccomp=PROFILE, or --cap-add SYS_NICE where the runtime's profile goes \
         by that)"
    } else {
        "let the security module's policy (SELinux, AppArmor) allow them; a kernel needs \
         CONFIG_NUMA and CONFIG_MIGRATION for them"
    };
    // Without NUMA there is nothing that could be asked for; a refusal also keeps `where` and
    // `move` from doing anything.
    let is_refused = kernel.may_ask().is_err() && !kernel.lacks_numa();
    if nodes.len() > 1 || is_refused {
        Check::missing(
            ID,
            format!("no node can be asked for or chosen: {}", refused.join(", ")),
            remedy,
        )
    } else {
        Check::warn(ID, refused.join(", "), remedy)
    }
}
