//! A command under a real seccomp filter.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// The command will run under a filter that refuses these calls, by number, with this errno.
pub fn refusing(mut command: Command, calls: &[libc::c_long], errno: i32) -> Command {
    // linux/bpf_common.h, linux/seccomp.h: load the call's number (offset 0 of seccomp_data); for each
    // call, if it is this one go on, else skip one; return the errno; at the end return "allow".
    const LOAD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let refusal = ERRNO | u32::try_from(errno).expect("positive");
    let mut steps = vec![step(LOAD, 0, 0, 0)];
    for &call in calls {
        let call = u32::try_from(call).expect("a small number");
        steps.extend([step(JUMP_EQUAL, 0, 1, call), step(RETURN, 0, 0, refusal)]);
    }
    steps.push(step(RETURN, 0, 0, ALLOW));
    let install = move || {
        let len = u16::try_from(steps.len()).unwrap_or(0);
        let program = libc::sock_fprog { len, filter: steps.as_ptr().cast_mut() };
        // SAFETY: prctl reads the program, of the length it says.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
                    == 0
        };
        if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec two system calls are made, and nothing is allocated.
    unsafe { command.pre_exec(install) };
    command
}
