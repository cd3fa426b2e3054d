//! What a measurement needs: what this process has used so far, on which CPUs a thread runs, and
//! the kernel's own page migration to compare with.
//!
//! Every number is a running total; callers take the difference of two readings. What the kernel
//! does not tell is `None`, never zero.
//!
//! Source: `getrusage(2)`, `sched_setaffinity(2)`, `move_pages(2)`, `migrate_pages(2)`,
//! `Documentation/filesystems/proc.rst` (interrupts, smaps_rollup).

use std::fs;

use crate::Errno;
use crate::mm::{MAX_NODES, mask_of};

/// Totals of this process, all threads, since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in user mode, in nanoseconds.
    pub user_ns: u64,
    /// CPU time in the kernel, in nanoseconds.
    pub system_ns: u64,
    /// Page faults that needed no I/O.
    pub minor_faults: u64,
    /// Page faults that waited for I/O.
    pub major_faults: u64,
    /// Context switches because a thread waited.
    pub voluntary_switches: u64,
    /// Context switches because a thread's turn was over.
    pub involuntary_switches: u64,
}

impl Usage {
    /// `getrusage(RUSAGE_SELF)`. CPU times are exact only to the kernel's accounting: a tick
    /// (1 to 10 ms) where it does not account in nanoseconds.
    pub fn of_process() -> Self {
        // SAFETY: an all-zero rusage is a valid one.
        let mut raw: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes the rusage it is given; with RUSAGE_SELF it cannot fail.
        unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut raw) };
        Self {
            user_ns: nanoseconds(raw.ru_utime),
            system_ns: nanoseconds(raw.ru_stime),
            minor_faults: total(raw.ru_minflt),
            major_faults: total(raw.ru_majflt),
            voluntary_switches: total(raw.ru_nvcsw),
            involuntary_switches: total(raw.ru_nivcsw),
        }
    }

    /// CPU time in both modes, in nanoseconds.
    pub fn cpu_ns(&self) -> u64 {
        self.user_ns + self.system_ns
    }

    /// What was used after `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            user_ns: self.user_ns.saturating_sub(earlier.user_ns),
            system_ns: self.system_ns.saturating_sub(earlier.system_ns),
            minor_faults: self.minor_faults.saturating_sub(earlier.minor_faults),
            major_faults: self.major_faults.saturating_sub(earlier.major_faults),
            voluntary_switches: self.voluntary_switches.saturating_sub(earlier.voluntary_switches),
            involuntary_switches: (self.involuntary_switches)
                .saturating_sub(earlier.involuntary_switches),
        }
    }
}

fn nanoseconds(time: libc::timeval) -> u64 {
    total(time.tv_sec) * 1_000_000_000 + total(time.tv_usec) * 1_000
}

fn total(raw: i64) -> u64 {
    u64::try_from(raw).unwrap_or(0)
}

/// TLB shootdowns received by all CPUs since boot, whoever caused them: the `TLB` line of
/// `/proc/interrupts`. `None` where there is no such line (other architectures).
pub fn tlb_shootdowns() -> Option<u64> {
    tlb_line(&fs::read_to_string("/proc/interrupts").ok()?)
}

fn tlb_line(interrupts: &str) -> Option<u64> {
    let counts = interrupts.lines().find_map(|line| line.trim_start().strip_prefix("TLB:"))?;
    // The counts of the CPUs, then what they count, in words.
    let numbers = counts.split_ascii_whitespace().map_while(|word| word.parse::<u64>().ok());
    Some(numbers.sum())
}

/// Memory of this process that is resident, in bytes. From `smaps_rollup`, which walks the page
/// tables and is exact; `status` may lag behind by some pages per CPU.
pub fn resident_bytes() -> Option<u64> {
    kib_line(&fs::read_to_string("/proc/self/smaps_rollup").ok()?, "Rss:")
        .or_else(|| kib_line(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS:"))
}

/// Memory that could be given to programs without swapping, in bytes (`MemAvailable`).
pub fn available_bytes() -> Option<u64> {
    kib_line(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

fn kib_line(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = value.split_ascii_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// `MPOL_MF_MOVE`, include/uapi/linux/mempolicy.h: pages that only this process maps.
const MPOL_MF_MOVE: i32 = 1 << 1;

/// `move_pages(2)`: the kernel moves each page of this process to the node of the same index.
/// Returns how many it did not move; `status` says for each page its node or a negative errno.
///
/// # Errors
/// `ENODEV`: a node is not online; `EACCES`: not allowed by the cpuset; `ENOSYS`: no NUMA.
pub fn move_pages(pages: &[usize], nodes: &[i32], status: &mut [i32]) -> Result<usize, Errno> {
    assert!(pages.len() == nodes.len() && pages.len() == status.len(), "one of each for a page");
    // SAFETY: pid 0 is this process. The kernel reads `pages` and `nodes` and writes `status`, all
    // of the length given. Moving a page changes neither its address nor its content.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            pages.len(),
            pages.as_ptr(),
            nodes.as_ptr(),
            status.as_mut_ptr(),
            MPOL_MF_MOVE,
        )
    };
    Errno::result(ret)
}

/// `migrate_pages(2)`: the kernel moves all pages of a process (0: this one) that are on node
/// `from` to node `to`, in one call; those that other processes map too only with
/// `CAP_SYS_NICE`. Returns how many pages it did not move; which, and why, it does not tell.
///
/// # Errors
/// `EINVAL`: a node is out of range or has no memory that is allowed; `EPERM`: not ours, or not
/// within its cpuset; `ESRCH`: no such process; `ENOMEM`: `to` is full; `ENOSYS`: no NUMA.
pub fn migrate_pages(pid: u32, from: u32, to: u32) -> Result<usize, Errno> {
    let (from, to) = (mask_of(from)?, mask_of(to)?);
    // SAFETY: the kernel reads both masks (maxnode counts bits, and the kernel drops one). Moving
    // a page changes neither its address nor its content.
    let ret = unsafe {
        libc::syscall(libc::SYS_migrate_pages, pid, MAX_NODES + 1, from.as_ptr(), to.as_ptr())
    };
    Errno::result(ret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tlb_line_is_summed_over_cpus_and_its_words_are_left_out() {
        let text = "            CPU0       CPU1\n RES:  1 2  Rescheduling interrupts\n \
                    TLB:  59570      56603   TLB shootdowns\n";
        assert_eq!(tlb_line(text), Some(116_173));
        assert_eq!(tlb_line("IPI0:  1 2  Rescheduling interrupts\n"), None);
    }

    #[test]
    fn sizes_in_kib_become_bytes() {
        assert_eq!(kib_line("Name:\tx\nVmRSS:\t    1024 kB\n", "VmRSS:"), Some(1 << 20));
        assert_eq!(kib_line("VmRSS:\t many\n", "VmRSS:"), None);
    }

    #[test]
    fn usage_grows_with_work_and_differences_are_never_negative() {
        let before = Usage::of_process();
        // Larger than what an allocator may keep in hand (glibc: 32 MiB), so that it is fresh.
        let pages = std::hint::black_box(vec![1u8; 48 << 20]);
        let used = Usage::of_process().since(&before);
        assert!(used.minor_faults > 0, "{used:?} after touching {} bytes", pages.len());
        assert_eq!(before.since(&Usage::of_process()).minor_faults, 0);
    }

    #[test]
    fn migrating_from_a_node_that_cannot_be_is_refused() {
        let beyond = u32::try_from(MAX_NODES).expect("small");
        assert_eq!(migrate_pages(0, beyond, 0), Err(Errno(libc::EINVAL)));
        assert_eq!(migrate_pages(0, 0, beyond), Err(Errno(libc::EINVAL)));
    }

    #[test]
    fn migrating_to_the_node_they_are_on_leaves_no_page_behind() {
        match migrate_pages(0, 0, 0) {
            Ok(left) => assert_eq!(left, 0),
            Err(e) => eprintln!("skipped: migrate_pages is not available here ({e})"),
        }
    }

    #[test]
    fn moving_a_page_to_where_it_is_leaves_it_there() {
        let page = vec![7u8; 2 * crate::page_size()];
        let start = page.as_ptr().addr().next_multiple_of(crate::page_size());
        let mut status = [-1];
        if let Err(e) = crate::mm::page_nodes(&[start], &mut status) {
            eprintln!("skipped: this kernel does not tell the node of a page ({e})");
            return;
        }
        let node = status[0];
        let mut status = [-1];
        match move_pages(&[start], &[node], &mut status) {
            Ok(left) => assert_eq!((left, status[0]), (0, node)),
            Err(e) => eprintln!("skipped: move_pages is not available here ({e})"),
        }
        assert!(page.iter().all(|&byte| byte == 7));
    }
}
