//! Mapping, advice and memory policy.
//!
//! Source: `include/uapi/asm-generic/mman-common.h`, `include/uapi/linux/mempolicy.h`, `mbind(2)`,
//! `move_pages(2)`, `madvise(2)`.

use crate::Errno;

/// Advice to the kernel about a range; a closed list, so that a test can fail each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// `MADV_NORMAL`: takes the lock of the address space for writing, and changes nothing where no
    /// other access pattern was told.
    Normal,
    /// `MADV_HUGEPAGE`.
    HugePage,
    /// `MADV_NOHUGEPAGE`.
    NoHugePage,
    /// `MADV_DONTNEED`: frees the pages.
    DontNeed,
    /// `MADV_DONTFORK`: a child does not get the range.
    DontFork,
    /// `MADV_DONTDUMP`: core dumps leave the range out.
    DontDump,
    /// `MADV_POPULATE_WRITE` (5.14): fault all pages in, writable, their content unchanged.
    PopulateWrite,
    /// `MADV_GUARD_INSTALL` (6.13): drops the pages, and an access raises SIGSEGV.
    GuardInstall,
}

impl Advice {
    fn raw(self) -> i32 {
        match self {
            Self::Normal => libc::MADV_NORMAL,
            Self::HugePage => libc::MADV_HUGEPAGE,
            Self::NoHugePage => libc::MADV_NOHUGEPAGE,
            Self::DontNeed => libc::MADV_DONTNEED,
            Self::DontFork => libc::MADV_DONTFORK,
            Self::DontDump => libc::MADV_DONTDUMP,
            Self::PopulateWrite => libc::MADV_POPULATE_WRITE,
            Self::GuardInstall => MADV_GUARD_INSTALL,
        }
    }
}

/// `MADV_GUARD_INSTALL`, include/uapi/asm-generic/mman-common.h; the libc crate lacks it for some
/// targets.
const MADV_GUARD_INSTALL: i32 = 102;
/// `MPOL_PREFERRED`, include/uapi/linux/mempolicy.h.
const MPOL_PREFERRED: i32 = 1;
/// `MPOL_DEFAULT`.
const MPOL_DEFAULT: i32 = 0;
/// Nodes a mask here can name; the kernel's largest `MAX_NUMNODES` is 1024 (`NODES_SHIFT` 10).
pub const MAX_NODES: usize = 1024;
const MASK_WORDS: usize = MAX_NODES / 64;

/// The mask of one node. `EINVAL`: beyond [`MAX_NODES`].
pub(crate) fn mask_of(node: u32) -> Result<[u64; MASK_WORDS], Errno> {
    let mut mask = [0u64; MASK_WORDS];
    let word = mask.get_mut(node as usize / 64).ok_or(Errno(libc::EINVAL))?;
    *word = 1 << (node % 64);
    Ok(mask)
}

/// Maps `len` bytes of private anonymous memory at a multiple of `align` (a power of two, at least
/// a page). No swap space is reserved and, even under `mlockall(MCL_FUTURE)`, nothing is populated.
pub(crate) fn map(len: usize, align: usize) -> Result<usize, Errno> {
    let room = len.checked_add(align).ok_or(Errno(libc::ENOMEM))?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let raw = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
    if raw == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    let raw = raw.addr();
    let start = raw.next_multiple_of(align);
    // SAFETY: both trimmed pieces lie within the mapping just made, which nobody else knows of.
    unsafe {
        if start > raw {
            libc::munmap(std::ptr::without_provenance_mut(raw), start - raw);
        }
        if raw + room > start + len {
            let tail = std::ptr::without_provenance_mut(start + len);
            libc::munmap(tail, raw + room - (start + len));
        }
    }
    if let Err(e) = unlock_and_open(start, len) {
        // SAFETY: as above; nobody has seen the mapping.
        unsafe { libc::munmap(std::ptr::without_provenance_mut(start), len) };
        return Err(e);
    }
    Ok(start)
}

/// # Safety
/// The range belongs to the caller, and its content is given up.
pub(crate) unsafe fn map_over(start: usize, len: usize) -> Result<(), Errno> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let at = std::ptr::without_provenance_mut(start);
    // SAFETY: promised by the caller.
    let raw = unsafe { libc::mmap(at, len, libc::PROT_NONE, flags, -1, 0) };
    if raw == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    unlock_and_open(start, len)
}

/// Makes a new mapping writable. Under `MCL_FUTURE` it is born locked; made writable while locked,
/// it would be populated.
fn unlock_and_open(start: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: munlock and mprotect of a mapping that was just made, and that nobody uses.
    let ret = unsafe {
        libc::munlock(std::ptr::without_provenance(start), len);
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        libc::mprotect(std::ptr::without_provenance_mut(start), len, rw)
    };
    Errno::result(ret.into()).map(drop)
}

/// # Safety
/// Nothing may use the range any more.
pub(crate) unsafe fn unmap(start: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: promised by the caller.
    let ret = unsafe { libc::munmap(std::ptr::without_provenance_mut(start), len) };
    Errno::result(ret.into()).map(drop)
}

/// `PR_SET_VMA` and `PR_SET_VMA_ANON_NAME` (Linux 5.17), include/uapi/linux/prctl.h.
const PR_SET_VMA: libc::c_int = 0x5356_4d41;
const PR_SET_VMA_ANON_NAME: libc::c_ulong = 0;

/// Names private anonymous memory: `[anon:NAME]` in `/proc/PID/maps`. A name has up to 79 printable
/// characters, without `[]\$` and the backtick.
///
/// # Errors
/// `EINVAL`: a kernel without `CONFIG_ANON_VMA_NAME`, or such a character; `EBADF`: not anonymous;
/// `ENOMEM`: not mapped.
pub fn name(start: usize, len: usize, name: &std::ffi::CStr) -> Result<(), Errno> {
    // SAFETY: reads the name, and changes neither the mapping's content nor its rights.
    let ret = unsafe { libc::prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, start, len, name.as_ptr()) };
    Errno::result(ret.into()).map(drop)
}

/// # Safety
/// The range belongs to the caller; with [`Advice::DontNeed`] its content is given up.
pub(crate) unsafe fn advise(start: usize, len: usize, advice: Advice) -> Result<(), Errno> {
    // SAFETY: promised by the caller.
    let ret = unsafe { libc::madvise(std::ptr::without_provenance_mut(start), len, advice.raw()) };
    Errno::result(ret.into()).map(drop)
}

/// `mbind(MPOL_PREFERRED)`: pages of the range are allocated on `node` while it has any.
pub(crate) fn prefer_node(start: usize, len: usize, node: u32) -> Result<(), Errno> {
    let mask = mask_of(node)?;
    // SAFETY: mbind reads the mask (maxnode counts bits, and the kernel drops one) and changes the
    // policy of a range, not its content; no flag asks it to move pages.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            start,
            len,
            MPOL_PREFERRED,
            mask.as_ptr(),
            MAX_NODES + 1,
            0u32,
        )
    };
    Errno::result(ret).map(drop)
}

/// `mincore(2)`: bit 0 of each byte of `pages` tells whether a page from `start` on is in memory. Of an
/// entry that is neither a page nor in swap (under migration, a memory error, a marker) it is set.
pub(crate) fn in_core(start: usize, pages: &mut [u8]) -> Result<(), Errno> {
    let len = pages.len() * crate::page_size();
    let at = std::ptr::without_provenance_mut(start);
    // SAFETY: the kernel writes one byte a page, and looks at the range only.
    let ret = unsafe { libc::mincore(at, len, pages.as_mut_ptr()) };
    Errno::result(ret.into()).map(drop)
}

/// Whether the machine has swap space now (`sysinfo(2)`); true where that cannot be told.
pub fn has_swap() -> bool {
    // SAFETY: all fields may be zero, and the kernel writes the structure that it is given.
    unsafe {
        let mut info: libc::sysinfo = std::mem::zeroed();
        libc::sysinfo(&mut info) != 0 || info.totalswap > 0
    }
}

/// The calling thread's memory policy, put back when this is dropped (`set_mempolicy(2)`).
#[derive(Debug)]
pub struct PreferringNode {
    mode: i32,
    mask: [u64; MASK_WORDS],
}

impl PreferringNode {
    /// Until this is dropped, the calling thread's allocations in mappings without a policy of
    /// their own prefer `node`.
    ///
    /// # Errors
    /// `EINVAL`: the node has no memory, or a cpuset forbids it; `ENOSYS`: a kernel without NUMA.
    pub fn new(node: u32) -> Result<Self, Errno> {
        let mut saved = Self { mode: MPOL_DEFAULT, mask: [0; MASK_WORDS] };
        let wanted = mask_of(node)?;
        let null = std::ptr::null::<u8>();
        // SAFETY: get_mempolicy writes the mode and at most MAX_NODES bits of the mask.
        let ret = unsafe {
            let (mode, mask) = (&raw mut saved.mode, saved.mask.as_mut_ptr());
            libc::syscall(libc::SYS_get_mempolicy, mode, mask, MAX_NODES, null, 0)
        };
        Errno::result(ret)?;
        // SAFETY: set_mempolicy reads the mask and changes the calling thread's policy only.
        let ret = unsafe {
            let mask = wanted.as_ptr();
            libc::syscall(libc::SYS_set_mempolicy, MPOL_PREFERRED, mask, MAX_NODES + 1)
        };
        Errno::result(ret)?;
        Ok(saved)
    }
}

impl Drop for PreferringNode {
    fn drop(&mut self) {
        let empty = self.mask.iter().all(|&word| word == 0);
        let (mask, bits) =
            if empty { (std::ptr::null(), 0) } else { (self.mask.as_ptr(), MAX_NODES + 1) };
        // SAFETY: as above; mode and mask are what the kernel gave us.
        unsafe { libc::syscall(libc::SYS_set_mempolicy, self.mode, mask, bits) };
    }
}

/// `move_pages(2)` as a query: the node of each page, or a negative errno (`-ENOENT`: no page).
///
/// # Errors
/// `EINVAL`/`ENOSYS`: a kernel without NUMA.
pub(crate) fn page_nodes(pages: &[usize], status: &mut [i32]) -> Result<(), Errno> {
    assert_eq!(pages.len(), status.len(), "one status for each page");
    // SAFETY: pid 0 is this process; without a node list nothing is moved; the kernel reads
    // `pages` and writes `status`, both of the length given.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            pages.len(),
            pages.as_ptr(),
            std::ptr::null::<i32>(),
            status.as_mut_ptr(),
            0,
        )
    };
    Errno::result(ret).map(drop)
}

/// `set_mempolicy(2)` with `MPOL_DEFAULT`: the calling thread takes memory as the system does. To
/// find out whether the call is allowed, by a thread that has no other policy.
///
/// # Errors
/// `ENOSYS`: no NUMA; `EPERM`: a sandbox refuses it.
pub fn set_default_policy() -> Result<(), Errno> {
    // SAFETY: takes two numbers and no mask; it affects where memory comes from, not what is in it.
    let ret = unsafe { libc::syscall(libc::SYS_set_mempolicy, 0, std::ptr::null::<u64>(), 0) };
    Errno::result(ret).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_shows_in_the_maps_if_the_kernel_has_names() {
        let len = 4 * crate::page_size();
        let start = map(len, crate::page_size()).expect("memory");
        match name(start, len, c"pageferry test") {
            Ok(()) => {
                let maps = std::fs::read_to_string("/proc/self/maps").expect("procfs");
                let line = maps.lines().find(|l| l.starts_with(&format!("{start:x}-")));
                let line = line.expect("a mapping of its own");
                assert!(line.ends_with("[anon:pageferry test]"), "{line}");
            }
            Err(e) => eprintln!("skipped: this kernel does not name memory ({e})"),
        }
        assert_eq!(name(start, len, c"[no]"), Err(Errno(libc::EINVAL)));
        // SAFETY: mapped above.
        unsafe { unmap(start, len) }.expect("mapped");
    }
}
