//! A thread that gives up a right for a while.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use pageferry_sys::page_size;
use pageferry_sys::pagemap::{Entry, Pagemap};

/// `_LINUX_CAPABILITY_VERSION_3`, include/uapi/linux/capability.h.
const VERSION: u32 = 0x2008_0522;
const SYS_ADMIN: u32 = 21;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// Effective, permitted and inheritable, of capabilities 0 to 31 and of those above.
type Sets = [[u32; 3]; 2];

fn call(number: libc::c_long, sets: &mut Sets) {
    let header = Header { version: VERSION, pid: 0 };
    // SAFETY: capget writes and capset reads sets of this version, of the calling thread.
    let done = unsafe { libc::syscall(number, &raw const header, sets.as_mut_ptr()) };
    assert_eq!(done, 0, "capabilities: {}", std::io::Error::last_os_error());
}

/// Does this without `CAP_SYS_ADMIN`, which the page map's frames and swap types take; threads that
/// are started meanwhile do not have it either.
pub fn without_sys_admin<T>(does: impl FnOnce() -> T) -> T {
    let mut before = [[0; 3]; 2];
    call(libc::SYS_capget, &mut before);
    let mut fewer = before;
    fewer[0][0] &= !(1 << SYS_ADMIN);
    call(libc::SYS_capset, &mut fewer);
    let result = does();
    call(libc::SYS_capset, &mut before);
    result
}

/// Whether this thread is told frames and swap types.
pub fn sees_frames() -> bool {
    let here = 0usize;
    let page = (&raw const here).addr() & !(page_size() - 1);
    let mut entry = [Entry(0)];
    let read = Pagemap::open().and_then(|map| map.entries(page, &mut entry));
    read.is_ok() && entry[0].pfn().is_some()
}
