//! Input that cannot be meant, and machines that cannot serve: an error that names the input, the
//! reason and the remedy, before a page is touched.
//!
//! What changes a whole process (its user, its limits, its system calls) is tried in a process of
//! its own: this test binary, started again with the name of the case.

mod support;
mod trial;

use pageferry::{
    BuildError, Engine, Folios, MigrateError, Outcome, Part, References, Region, RegionError,
};
use pageferry_sys::inject::{Fault, Faulty};
use pageferry_sys::uffd::{Features, Modes};
use pageferry_sys::{Errno, Linux, Sys, SysOp, page_size};
use pageferry_topology::{NodeError, NodeId};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use support::{build, check, fill, first_node, frames};
use trial::small;

/// A node that no machine has (`MAX_NUMNODES` is at most 1024).
const NOWHERE: NodeId = NodeId::new(1023);

fn region(engine: &Engine) -> Region {
    let region = engine.map(1 << 20).folios(Folios::Base).build().expect("memory");
    fill(&region, 0..1 << 20);
    region
}

/// `why` has all the words.
fn says(why: &dyn std::fmt::Display, words: &[&str]) {
    let text = why.to_string();
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
}

/// Every attempt fails with an error that says its words, and moves nothing.
fn refused(attempts: impl Fn(&Engine, &Region) -> Vec<(Result<(), MigrateError>, Vec<String>)>) {
    let faulty = Arc::new(Faulty::new());
    let Some(engine) = build(small().sys(faulty.clone())) else { return };
    let region = region(&engine);
    let before = frames(&region);
    let calls = |op| faulty.calls(op);
    let ops = [SysOp::Register, SysOp::Protect, SysOp::Move, SysOp::CopyIn];
    let count = ops.map(calls);
    for (result, words) in attempts(&engine, &region) {
        let why = result.expect_err("it cannot be meant");
        says(&why, &words.iter().map(String::as_str).collect::<Vec<_>>());
    }
    assert_eq!(ops.map(calls), count, "no page was touched");
    assert_eq!(frames(&region), before, "every page is where it was");
    check(&region, 0..region.len());
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

fn moved(engine: &Engine, part: Part) -> Result<(), MigrateError> {
    engine.migrate(part).even_if_there().run().map(drop)
}

#[test]
fn a_node_that_is_not_there_is_named_with_those_that_are() {
    refused(|engine, region| {
        let there = first_node(engine).to_string();
        let names = words(&["node 1023", "does not exist", &there]);
        vec![
            (moved(engine, region.to(NOWHERE)), names.clone()),
            (engine.migrate(region.to(NOWHERE)).start().map(drop), names.clone()),
            (
                engine
                    .exchange(
                        region.to(first_node(engine)).range(0..page_size()),
                        region.to(NOWHERE).range(page_size()..2 * page_size()),
                    )
                    .run()
                    .map(drop),
                names,
            ),
        ]
    });
    let Some(engine) = build(small()) else { return };
    let why = engine.map(1 << 20).prefer(NOWHERE).build().expect_err("no such node");
    assert!(matches!(why, RegionError::Node(NodeError::Unknown { .. })), "{why:?}");
    says(&why, &["node 1023", "does not exist"]);
    // Other ways for a node to be of no use. Trees of such machines are read by the tests of
    // pageferry-topology; this machine may have none.
    let node = NodeId::new(3);
    let online = engine.machine().memory_nodes().map(|n| n.id).collect();
    let offline = MigrateError::from(NodeError::Offline { node, online });
    says(&offline, &["node 3", "offline", "daxctl"]);
    let with_memory = engine.machine().memory_nodes().map(|n| n.id).collect();
    let empty = MigrateError::from(NodeError::NoMemory { node, with_memory });
    says(&empty, &["node 3", "no memory", &first_node(&engine).to_string()]);
}

#[test]
fn a_range_that_is_unaligned_empty_reversed_overflowing_or_foreign_is_named() {
    let page = page_size();
    // Reversed on purpose.
    #[expect(clippy::reversed_empty_ranges, reason = "the test is about them")]
    let cases = [
        (1..page, words(&["1..4096", "not aligned", "whole pages"])),
        (0..page + 1, words(&["not aligned"])),
        (page..page, words(&["4096..4096", "nothing to move", "ends after it begins"])),
        (2 * page..page, words(&["8192..4096", "nothing to move"])),
        (usize::MAX..0, words(&["nothing to move"])),
        (0..(1 << 20) + page, words(&["1052672", "not within", "1048576"])),
        (0..usize::MAX, words(&["not within"])),
        (usize::MAX - page + 1..usize::MAX, words(&["not within"])),
        (1 << 20..2 << 20, words(&["not within"])),
    ];
    refused(|engine, region| {
        let to = first_node(engine);
        cases
            .iter()
            .map(|(range, words)| {
                // A good range beside it does not help.
                let part = region.to(to).range(0..page).range(range.clone());
                (moved(engine, part), words.clone())
            })
            .collect()
    });
}

#[test]
fn a_region_of_another_engine_is_refused() {
    let Some(other) = build(small()) else { return };
    let foreign = region(&other);
    refused(|engine, region| {
        let to = first_node(engine);
        vec![
            (moved(engine, foreign.to(to)), words(&["another engine", "that one"])),
            (
                engine.exchange(region.to(to), foreign.to(to)).run().map(drop),
                words(&["another engine"]),
            ),
        ]
    });
    check(&foreign, 0..foreign.len());
}

#[test]
fn an_option_of_a_move_that_makes_no_sense_is_named_with_what_is_allowed() {
    refused(|engine, region| {
        let part = || engine.migrate(region.to(first_node(engine))).even_if_there();
        let run = |m: pageferry::Move| m.run().map(drop);
        vec![
            (run(part().batch_bytes(0)), words(&["batch_bytes = 0", "2 MiB"])),
            (run(part().batch_bytes(5000)), words(&["batch_bytes = 5000", "whole pages"])),
            (run(part().batch_bytes(usize::MAX)), words(&["batch_bytes", "2 MiB"])),
            (run(part().stall_budget(Duration::ZERO)), words(&["stall_budget = 0", "10 us"])),
            (run(part().stall_budget(Duration::MAX)), words(&["stall_budget", "10 s"])),
            (run(part().threads(0)), words(&["threads = 0", "1 up to"])),
            (run(part().threads(3)), words(&["threads = 3", "built with"])),
        ]
    });
}

#[test]
fn an_option_of_an_engine_that_makes_no_sense_is_named_with_what_is_allowed() {
    let cases = [
        (small().threads(0), ["threads = 0", "1 to 1024"]),
        (small().threads(1025), ["threads = 1025", "1 to 1024"]),
        (small().frame_budget(0), ["frame_budget = 0", "4 MiB"]),
        (small().frame_budget((4 << 20) - 1), ["frame_budget = 4194303", "4 MiB"]),
        (small().frame_grace(Duration::from_secs(2)), ["frame_grace = 2s", "0 to 1 s"]),
    ];
    for (builder, words) in cases {
        let why = builder.build().expect_err("it cannot be meant");
        assert!(matches!(why, BuildError::Option { .. }), "{why:?}");
        says(&why, &words);
    }
}

#[test]
fn a_region_that_cannot_be_is_named_by_its_size_or_place() {
    let Some(engine) = build(small()) else { return };
    for bytes in [0, usize::MAX, usize::MAX - 4095, (1 << 46) + 1] {
        let why = engine.map(bytes).build().expect_err("no such region");
        assert!(matches!(why, RegionError::Size(b) if b == bytes), "{why:?}");
        says(&why, &[&bytes.to_string(), "2^46"]);
    }
    let page = page_size();
    let at = |address: usize| std::ptr::without_provenance_mut::<u8>(address);
    for (start, len, words) in [
        (at(page + 1), page, ["0x1001", "whole pages"]),
        (at(page), page + 1, ["0x1000", "whole pages"]),
        (at(page), 0, ["0 bytes", "1 byte"]),
        (at(usize::MAX - page + 1), 2 * page, ["8192 bytes", "2^46"]),
    ] {
        // SAFETY: nothing is adopted: the input is refused.
        let why = unsafe { engine.adopt(start, len, References::Possible) };
        says(&why.expect_err("it cannot be adopted"), &words);
    }
    let region = region(&engine);
    for range in [0..(1 << 20) + 1, usize::MAX - 1..usize::MAX] {
        let why = region.advise(range, Folios::Huge).expect_err("not within");
        says(&why, &["not within", "1048576"]);
    }
}

/// Maps for one test; unmapped at its end.
struct Mapping(*mut u8, usize);

impl Mapping {
    fn new(len: usize, flags: i32, fd: i32) -> Self {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, rw, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self(at.cast(), len)
    }
    fn word(&self, page: usize) -> *mut u64 {
        // SAFETY: within the mapping.
        unsafe { self.0.add(page * page_size()).cast() }
    }
    fn fill(&self) {
        for page in 0..self.1 / page_size() {
            // SAFETY: within the mapping, aligned, ours alone.
            unsafe { self.word(page).write_volatile(page as u64 + 1) };
        }
    }
    fn check(&self) {
        for page in 0..self.1 / page_size() {
            // SAFETY: as above.
            assert_eq!(unsafe { self.word(page).read_volatile() }, page as u64 + 1);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; nothing refers to it any more.
        unsafe { libc::munmap(self.0.cast(), self.1) };
    }
}

#[test]
fn adopted_memory_that_is_not_private_anonymous_stays_and_the_reason_is_said() {
    let Some(engine) = build(small()) else { return };
    let to = first_node(&engine);
    let len = 64 * page_size();
    let file = tempfile_of(len);
    let shared = Mapping::new(len, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
    let of_file = Mapping::new(len, libc::MAP_SHARED, file.as_raw_fd());
    for mapping in [&shared, &of_file] {
        mapping.fill();
        // SAFETY: the mapping outlives the region, and nobody else watches it. That it is not
        // private and anonymous is what must be found out.
        let adopted = unsafe { engine.adopt(mapping.0, len, References::Possible) };
        let region = adopted.expect("aligned");
        match engine.migrate(region.to(to)).even_if_there().run() {
            Err(why @ MigrateError::Register { .. }) => {
                let start = format!("{:#x}", region.addr());
                says(&why, &[&start, "private anonymous", "move_pages(2)"]);
            }
            Ok(report) => {
                let stayed = report.bytes(|o| matches!(o, Outcome::Busy(_)));
                assert_eq!(stayed, len as u64, "{report:?}");
            }
            Err(other) => panic!("{other}"),
        }
        mapping.check();
    }
}

fn tempfile_of(len: usize) -> std::fs::File {
    let path = std::env::temp_dir().join(format!("pageferry-bad-input-{}", std::process::id()));
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).open(&path).expect("a file");
    std::fs::remove_file(&path).expect("just made");
    file.set_len(len as u64).expect("room");
    file
}

#[test]
fn adopted_memory_that_is_not_mapped_or_watched_by_another_is_refused() {
    let Some(engine) = build(small()) else { return };
    let len = 64 * page_size();
    // Far from where the engine's own allocations are placed.
    let start = support::siege::ptr(support::siege::far_address()).cast::<u8>();
    // SAFETY: nothing is mapped there, which is what must be found out.
    let region = unsafe { engine.adopt(start, len, References::Possible) }.expect("aligned");
    let why = engine.migrate(region.to(first_node(&engine))).run().expect_err("not mapped");
    assert!(matches!(why, MigrateError::Register { .. }), "{why:?}");
    says(&why, &[&format!("{:#x}", start.addr()), "private anonymous"]);
    // Another userfaultfd of this process has it.
    let taken = Mapping::new(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    taken.fill();
    let features = Features::PAGEFAULT_FLAG_WP;
    let fd = Linux.open_uffd(engine.rights(), features).expect("the engine got one too");
    Linux.register(&fd, taken.0.addr(), len, Modes::WP).expect("nobody else has it");
    // SAFETY: mapped and ours; that somebody watches it is what must be found out.
    let region = unsafe { engine.adopt(taken.0, len, References::Possible) }.expect("aligned");
    let why = engine.migrate(region.to(first_node(&engine))).run().expect_err("watched");
    says(&why, &["EBUSY", "no other userfaultfd"]);
    taken.check();
}

#[test]
fn a_kernel_that_is_too_old_or_without_userfaultfd_is_told_from_missing_rights() {
    for (errno, words) in [
        (libc::EINVAL, ["EINVAL", "Linux 6.8", "CONFIG_USERFAULTFD"]),
        (libc::ENOSYS, ["ENOSYS", "Linux 6.8", "seccomp"]),
        (libc::EPERM, ["EPERM", "CAP_SYS_PTRACE", "/dev/userfaultfd"]),
        (libc::EACCES, ["EACCES", "vm.unprivileged_userfaultfd", "user-mode-only"]),
        (libc::EMFILE, ["EMFILE", "userfaultfd", "ulimit -n"]),
    ] {
        let faulty = Arc::new(Faulty::new());
        let (op, errno) = (SysOp::OpenUffd, Errno(errno));
        faulty.fail(Fault { op, after: 0, times: 1, errno, partial: 0 });
        says(&small().sys(faulty).build().expect_err("it cannot be opened"), &words);
    }
}

/// Says which case a process started by [`alone`] is to run.
const CASE: &str = "PAGEFERRY_TEST_CASE";

/// Runs the test `name` again in a process of its own; true in that process.
fn alone(name: &str) -> bool {
    if std::env::var_os(CASE).is_some_and(|case| case == name) {
        return true;
    }
    let binary = std::env::current_exe().expect("a test binary");
    let child = Command::new(binary)
        .args([name, "--exact", "--nocapture", "--test-threads", "1"])
        .env(CASE, name)
        .output()
        .expect("this binary can be started");
    let (out, err) =
        (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    std::io::stderr().write_all(&child.stderr).expect("stderr");
    assert!(child.status.success(), "{name}: {}\n{out}{err}", child.status);
    false
}

#[test]
fn a_user_without_rights_is_told_every_way_to_get_them() {
    if !alone("a_user_without_rights_is_told_every_way_to_get_them") {
        return;
    }
    become_nobody();
    match small().build() {
        Err(why @ BuildError::NotPermitted(_)) => says(
            &why,
            &[
                "userfaultfd",
                "EPERM",
                "CAP_SYS_PTRACE",
                "vm.unprivileged_userfaultfd=1",
                "/dev/userfaultfd",
                "user-mode-only",
            ],
        ),
        Ok(_) => eprintln!("skipped: this user has the right to a userfaultfd"),
        Err(why) => panic!("{why}"),
    }
}

#[test]
fn a_seccomp_filter_that_denies_userfaultfd_is_named_as_a_possible_cause() {
    if !alone("a_seccomp_filter_that_denies_userfaultfd_is_named_as_a_possible_cause") {
        return;
    }
    // /dev/userfaultfd is another way in, which this user does not have.
    become_nobody();
    // A later filter counts where it is as strict: first as a kernel without the call would
    // answer, then as container runtimes do.
    for errno in [libc::ENOSYS, libc::EPERM] {
        if let Err(why) = deny_userfaultfd(errno) {
            eprintln!("skipped: no seccomp filter can be installed: {why}");
            return;
        }
        match small().build() {
            Ok(_) => eprintln!("skipped: /dev/userfaultfd serves this user"),
            Err(why) => says(&why, &["seccomp", "userfaultfd", Errno(errno).name()]),
        }
    }
}

/// Gives up the rights of root where this process has them.
fn become_nobody() {
    // SAFETY: changes the user of this process, which runs one test only.
    let changed = unsafe {
        libc::setresgid(65534, 65534, 65534) == 0 && libc::setresuid(65534, 65534, 65534) == 0
    };
    if !changed {
        eprintln!("in part: the user cannot be changed, so the tests' own user is tried");
    }
}

/// From now on `userfaultfd(2)` fails with `errno` in this process.
fn deny_userfaultfd(errno: i32) -> std::io::Result<()> {
    // linux/bpf_common.h, linux/seccomp.h: load the call's number (offset 0 of seccomp_data), if
    // it is the one go on, else skip one; return the errno; return "allow".
    const LOAD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;
    let call = u32::try_from(libc::SYS_userfaultfd).expect("a small number");
    let errno = ERRNO | u32::try_from(errno).expect("positive");
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut steps = [
        step(LOAD, 0, 0, 0),
        step(JUMP_EQUAL, 0, 1, call),
        step(RETURN, 0, 0, errno),
        step(RETURN, 0, 0, ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: steps.as_mut_ptr() };
    // SAFETY: prctl reads the program, of the length it says; the filter denies one call that
    // only this test makes.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    };
    if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[test]
fn too_little_address_space_is_an_error_that_names_the_limit() {
    if !alone("too_little_address_space_is_an_error_that_names_the_limit") {
        return;
    }
    let Some(engine) = build(small()) else { return };
    let kept = region(&engine);
    // What is mapped now and a little more.
    let status = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    let pages: u64 = status.split(' ').next().and_then(|n| n.parse().ok()).expect("a number");
    let limit = pages * page_size() as u64 + (8 << 20);
    let limits = libc::rlimit { rlim_cur: limit, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: sets a limit of this process, which runs this test only.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limits) }, 0);
    let why = engine.map(64 << 20).build().expect_err("more than the limit");
    says(&why, &["mapping the region", "ENOMEM", "ulimit -v"]);
    // No room for the pools either: reported page by page, and nothing is harmed.
    let report = engine
        .migrate(kept.to(first_node(&engine)))
        .even_if_there()
        .run()
        .expect("a shortage is an outcome");
    assert_eq!(report.bytes(|o| matches!(o, Outcome::NoFrame(_))), 1 << 20, "{report:?}");
    check(&kept, 0..1 << 20);
}

#[test]
fn memory_that_a_mover_itself_needs_and_memory_that_is_managed_already_are_refused() {
    let Some(engine) = build(small()) else { return };
    let page = page_size();
    let around = |address: usize| {
        let start = std::ptr::with_exposed_provenance_mut::<u8>(address & !(page - 1));
        // SAFETY: it is refused, or nothing of it is moved.
        unsafe { engine.adopt(start, page, References::Possible) }
    };
    let on_stack = 0u8;
    let stack = std::ptr::from_ref(&on_stack).expose_provenance();
    let refused = around(stack).expect_err("this frame's page, or the next one's");
    assert!(matches!(refused, RegionError::OwnMemory(_)), "{refused}");
    assert!(matches!(around(0), Err(RegionError::Null)));

    let region = engine.map(4 * page).build().expect("a region");
    let refused = around(region.addr() + page).expect_err("it has an owner");
    assert!(matches!(refused, RegionError::Managed(_)), "{refused}");
    let refused = region.advise(0..1, Folios::Huge).expect_err("not a page");
    assert!(matches!(refused, RegionError::Unaligned(_)), "{refused}");
}

#[test]
fn a_stack_that_was_adopted_elsewhere_is_refused_by_a_move_that_runs_on_it() {
    let Some(engine) = build(small()) else { return };
    let thread = std::thread::Builder::new().stack_size(8 << 20);
    let run = thread.spawn(move || {
        // Two MiB away from where this thread is: another frame of the same stack.
        let on_stack = 0u8;
        let here = std::ptr::from_ref(&on_stack).expose_provenance();
        let page = page_size();
        let start = (here & !(page - 1)) - (4 << 20);
        let start = std::ptr::with_exposed_provenance_mut::<u8>(start);
        // SAFETY: a part of this thread's stack that it has not come to; nothing is moved.
        let region = unsafe { engine.adopt(start, 4 << 20, References::Possible) }.expect("unused");
        let to = first_node(&engine);
        deeper(1 << 20, &|| engine.migrate(region.to(to)).run().expect_err("on its own stack"))
    });
    let why = run.expect("a thread").join().expect("no panic");
    assert!(matches!(why, MigrateError::OwnMemory(_)), "{why}");
}

/// Calls `f` with so many bytes more of stack in use.
fn deeper<T>(bytes: usize, f: &dyn Fn() -> T) -> T {
    let room = std::hint::black_box([0u8; 64 << 10]);
    let result = if bytes > room.len() { deeper(bytes - room.len(), f) } else { f() };
    std::hint::black_box(room);
    result
}
