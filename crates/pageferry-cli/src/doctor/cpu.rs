//! CPUs: which may be used, how much of them, and what they copy with.

use pageferry_copy::Kernel;
use pageferry_copy::cpu::calibrate::KERNEL_VARIABLE;
use pageferry_sys::affinity;
use pageferry_topology::{CpuId, CpuList};

use super::Check;
use crate::host::{Capability, Host};

pub(super) fn checks(host: &Host) -> Vec<Check> {
    let allowed = affinity::allowed_cpus();
    vec![
        copying(),
        chosen_kernel(),
        available(&allowed),
        quota(host, allowed.len()),
        counters(host),
    ]
}

#[cfg(target_arch = "x86_64")]
fn copying() -> Check {
    const ID: &str = "cpu-copy";
    // SSE2 is part of x86-64.
    let mut names = vec!["sse2"];
    names.extend(std::arch::is_x86_feature_detected!("avx2").then_some("avx2"));
    names.extend(std::arch::is_x86_feature_detected!("avx512f").then_some("avx512f"));
    names.extend(std::arch::is_x86_feature_detected!("ermsb").then_some("erms"));
    let found = names.join(" ");
    if names.contains(&"avx2") {
        Check::ok(ID, found)
    } else {
        Check::warn(
            ID,
            format!("{found}: only narrow streaming stores"),
            "in a guest, let the CPU model pass AVX2 through (QEMU: -cpu host)",
        )
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn copying() -> Check {
    Check::ok("cpu-copy", "the C library's memcpy")
}

/// The copy kernel that the environment names, if it does.
fn chosen_kernel() -> Check {
    const ID: &str = "cpu-kernel";
    match std::env::var_os(KERNEL_VARIABLE) {
        None => Check::ok(ID, "the one that measures best"),
        Some(name) => match name.to_string_lossy().parse::<Kernel>() {
            Ok(kernel) => Check::ok(ID, format!("{kernel}, as {KERNEL_VARIABLE} says")),
            Err(error) => Check::missing(
                ID,
                format!("{KERNEL_VARIABLE}: {error}"),
                format!("unset {KERNEL_VARIABLE}, or name one of these"),
            ),
        },
    }
}

fn available(allowed: &[u32]) -> Check {
    const ID: &str = "cpus";
    let list: CpuList = allowed.iter().copied().map(CpuId::new).collect();
    if allowed.len() < 2 {
        return Check::warn(
            ID,
            format!("only CPU {list}: copying and page-table work cannot overlap"),
            "widen the affinity (taskset, AllowedCPUs=, --cpuset-cpus)",
        );
    }
    Check::ok(ID, format!("{} usable: {list}", allowed.len()))
}

/// `cpu.max` is `$QUOTA $PERIOD` in microseconds (Documentation/admin-guide/cgroup-v2.rst).
fn quota(host: &Host, allowed: usize) -> Check {
    const ID: &str = "cpu-quota";
    let cpus = |group: &String| {
        let text = host.text(&format!("{group}/cpu.max"))?;
        let (quota, period) = text.split_once(' ')?;
        let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
        Some(quota / period)
    };
    let Some(groups) = host.cgroups() else {
        return Check::ok(ID, "cannot tell without cgroup v2");
    };
    let least = groups.iter().filter_map(cpus).min_by(f64::total_cmp);
    match least {
        Some(cpus) if cpus < allowed as f64 => Check::warn(
            ID,
            format!("{cpus:.1} of {allowed} CPUs: a move may be stopped half-way for its turn"),
            "raise cpu.max of the group (CPUQuota= in the service, --cpus of the container)",
        ),
        Some(cpus) => Check::ok(ID, format!("{cpus:.1} CPUs")),
        None => Check::ok(ID, "no limit"),
    }
}

/// A process may count its own events up to level 2
/// (Documentation/admin-guide/sysctl/kernel.rst); some distributions add 3 and 4.
fn counters(host: &Host) -> Check {
    const ID: &str = "perf-counters";
    if host.has(Capability::PerfMon) || host.has(Capability::SysAdmin) {
        return Check::ok(ID, "allowed by capability");
    }
    match host.number("proc/sys/kernel/perf_event_paranoid") {
        Some(level) if level <= 2 => Check::ok(ID, format!("kernel.perf_event_paranoid={level}")),
        Some(level) => Check::warn(
            ID,
            format!("kernel.perf_event_paranoid={level}: bench cannot count faults and switches"),
            "sysctl kernel.perf_event_paranoid=2, or run with CAP_PERFMON",
        ),
        None => Check::warn(
            ID,
            "this kernel has no perf events",
            "use a kernel built with CONFIG_PERF_EVENTS to have bench count faults and switches",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::doctor::Status;

    #[test]
    fn the_tightest_quota_up_the_tree_counts() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (path, content) in [
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/cpu.max", "150000 100000\n"),
            ("sys/fs/cgroup/a/b/cpu.max", "max 100000\n"),
        ] {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, content).expect("a file");
        }
        let host = Host::new(dir.path());
        let check = quota(&host, 2);
        assert_eq!(check.status, Status::Warn);
        assert!(check.found.starts_with("1.5 of 2 CPUs"), "{}", check.found);
        assert_eq!(quota(&host, 1).status, Status::Ok);
    }

    #[test]
    fn one_cpu_is_warned_of() {
        assert_eq!(available(&[3]).status, Status::Warn);
        assert!(available(&[0, 1, 5]).found.ends_with("0-1,5"));
    }
}
