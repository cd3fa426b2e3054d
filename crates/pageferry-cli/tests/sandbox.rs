//! The command under a real seccomp filter, as in a container: what it refuses is named.

#[path = "support/seccomp.rs"]
mod seccomp;
mod support;

use seccomp::refusing;
use serde_json::Value;
use support::command;

/// The check `seccomp` of `doctor` under such a filter. `None`: there can be none here.
fn told(calls: &[libc::c_long], errno: i32) -> Option<Value> {
    let output = match refusing(command(&["doctor", "--json"]), calls, errno).output() {
        Ok(output) => output,
        Err(why) => {
            eprintln!("skipped: no seccomp filter can be installed: {why}");
            return None;
        }
    };
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let mut checks = report["checks"].as_array().expect("checks").iter();
    Some(checks.find(|check| check["id"] == "seccomp").expect("always looked at").clone())
}

#[test]
fn doctor_names_the_calls_that_a_filter_refuses_and_what_to_do() {
    let calls = [
        ("userfaultfd", libc::SYS_userfaultfd),
        ("pidfd_open", libc::SYS_pidfd_open),
        ("move_pages", libc::SYS_move_pages),
        ("mbind", libc::SYS_mbind),
        ("set_mempolicy", libc::SYS_set_mempolicy),
    ];
    let numa = std::path::Path::new("/sys/devices/system/node").exists();
    for (errno, name) in [(libc::EPERM, "EPERM"), (libc::ENOSYS, "ENOSYS")] {
        // One by one, and all of them.
        let all: Vec<_> = calls.iter().map(|(_, number)| *number).collect();
        for (call, number) in calls {
            if !numa && !["userfaultfd", "pidfd_open"].contains(&call) {
                eprintln!("skipped in part: a kernel without NUMA, and so without {call}");
                continue;
            }
            for refused in [&[number][..], &all] {
                let Some(check) = told(refused, errno) else { return };
                assert_eq!(check["status"], "warn", "{check}");
                let found = check["found"].as_str().expect("a text");
                assert!(found.contains("seccomp filter"), "{check}");
                let told = found.split_once(&format!("{call} (")).expect(found).1;
                let told = told.split_once("): ").expect(found).1;
                assert!(told.starts_with(name), "{check}");
                let remedy = check["remedy"].as_str().expect("a text");
                for part in [call, "--security-opt seccomp=", "SystemCallFilter="] {
                    assert!(remedy.contains(part), "{part}: {check}");
                }
            }
        }
    }
}

#[test]
fn a_filter_that_refuses_nothing_that_is_needed_is_fine() {
    let Some(check) = told(&[libc::SYS_acct], libc::EPERM) else { return };
    // Unless the tests run in a sandbox themselves.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if status.lines().any(|line| line.starts_with("Seccomp:") && line.ends_with('2')) {
        return eprintln!("skipped: these tests run under a seccomp filter");
    }
    assert_eq!(check["status"], "ok", "{check}");
    assert!(check["found"].as_str().is_some_and(|f| f.contains("move_pages")), "{check}");
}
