//! Calls that change mappings, or tell of them.

use super::call::{Call, differs, said, sys};
use super::stage::Spot;
use crate::support::siege::{far_address, map_at, protect, ptr};
use pageferry_sys::page_size;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANON: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Names of numbers that the libc crate lacks for some targets: include/uapi/asm-generic/unistd.h,
/// and mman-common.h.
const SYS_SET_MEMPOLICY_HOME_NODE: libc::c_long = 450;
const SYS_MSEAL: libc::c_long = 462;
const MADV_COLLAPSE: i32 = 25;
const MADV_GUARD_INSTALL: i32 = 102;
const MADV_GUARD_REMOVE: i32 = 103;

fn mmap(s: &Spot, flags: i32) -> i64 {
    // SAFETY: the spot's own memory.
    let got = unsafe { libc::mmap(ptr(s.at), s.len, RW, ANON | flags, -1, 0) };
    placed(s, got)
}

/// An address as it is answered: from the spot (1) or from away (2); a negative errno.
fn placed(s: &Spot, got: *mut libc::c_void) -> i64 {
    if got == libc::MAP_FAILED {
        said(-1)
    } else if got.addr() == s.at {
        1
    } else if got.addr() == s.away {
        2
    } else {
        3
    }
}

fn mprotect(s: &Spot, prot: i32) -> i64 {
    // SAFETY: the spot's own memory.
    said(unsafe { libc::mprotect(ptr(s.at), s.len, prot) })
}

fn mremap(s: &Spot, from: usize, old: usize, new: usize, flags: i32, to: usize) -> i64 {
    // SAFETY: both places are the spot's own.
    placed(s, unsafe { libc::mremap(ptr(from), old, new, flags, ptr(to)) })
}

const TO: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;

fn advise(s: &Spot, advice: i32) -> Vec<i64> {
    // SAFETY: the spot's own memory; what becomes of its content is looked at.
    vec![said(unsafe { libc::madvise(ptr(s.at), s.len, advice) })]
}

/// By `process_madvise(2)` on this process.
fn advise_self(s: &Spot, advice: i32) -> Vec<i64> {
    let fd = sys!(libc::SYS_pidfd_open, std::process::id(), 0);
    let vector = libc::iovec { iov_base: ptr(s.at), iov_len: s.len };
    let told = sys!(libc::SYS_process_madvise, fd, &raw const vector, 1usize, advice, 0);
    // SAFETY: the descriptor from above.
    unsafe { libc::close(i32::try_from(fd).unwrap_or(-1)) };
    vec![told]
}

fn nodes(s: &Spot, to: Option<i32>) -> Vec<i64> {
    let pages: Vec<usize> = (s.at..s.at + s.len).step_by(page_size()).collect();
    let wanted = vec![to.unwrap_or(0); pages.len()];
    let mut status = vec![i32::MIN; pages.len()];
    let wanted = to.map_or(std::ptr::null(), |_| wanted.as_ptr());
    // SAFETY: three arrays, one element for each page; 2 is MPOL_MF_MOVE.
    let done = said(unsafe {
        let (count, pages) = (pages.len(), pages.as_ptr());
        libc::syscall(libc::SYS_move_pages, 0, count, pages, wanted, status.as_mut_ptr(), 2)
    });
    let missing = status.iter().filter(|&&node| node == -libc::ENOENT).count();
    vec![done, said(missing)]
}

fn mbind(s: &Spot, mode: i32) -> i64 {
    let mask = 1u64;
    let flags = 1 | 2; // MPOL_MF_STRICT, MPOL_MF_MOVE
    // SAFETY: the spot's own memory, and a mask of 64 bits.
    said(unsafe {
        libc::syscall(libc::SYS_mbind, s.at, s.len, mode, &raw const mask, 64usize, flags)
    })
}

fn policy(s: &Spot, flags: i32) -> Vec<i64> {
    let (mut mode, mut mask) = (-1, 0u64);
    let told = sys!(
        libc::SYS_get_mempolicy,
        &raw mut mode,
        &raw mut mask,
        64usize,
        s.at,
        flags | 2 // MPOL_F_ADDR
    );
    vec![told, i64::from(mode)]
}

fn resident(s: &Spot) -> Vec<i64> {
    let mut pages = vec![0u8; s.len / page_size()];
    // SAFETY: the kernel writes one byte for each page.
    let told = said(unsafe { libc::mincore(ptr(s.at), s.len, pages.as_mut_ptr()) });
    vec![told, said(pages.iter().filter(|page| **page & 1 != 0).count())]
}

/// How many pages the page map calls present, and write-protected by a userfaultfd.
fn page_map(s: &Spot) -> Vec<i64> {
    let file = std::fs::File::open("/proc/self/pagemap").expect("procfs");
    let mut bytes = vec![0u8; s.len / page_size() * 8];
    file.read_exact_at(&mut bytes, (s.at / page_size() * 8) as u64).expect("mapped");
    let entries = bytes.chunks_exact(8).filter_map(|b| b.try_into().ok()).map(u64::from_ne_bytes);
    let (mut present, mut protected) = (0, 0);
    for entry in entries {
        present += i64::from(entry >> 63 == 1);
        protected += i64::from(entry >> 57 & 1 == 1);
    }
    vec![present, protected]
}

/// What `/proc/self/smaps` says of the mapping: KiB that are resident, and whether a userfaultfd
/// watches any of it.
fn smaps(s: &Spot) -> Vec<i64> {
    let (mut resident, mut watched, mut ours) = (0, 0, false);
    for line in std::fs::read_to_string("/proc/self/smaps").expect("procfs").lines() {
        let number = |text: &str| usize::from_str_radix(text, 16).ok();
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or("");
        if let Some(start) = first.split_once('-').and_then(|(start, _)| number(start)) {
            ours = s.mapping.contains(&start);
        } else if ours && first == "Rss:" {
            resident += words.next().and_then(|n| n.parse::<i64>().ok()).unwrap_or(0);
        } else if ours && first == "VmFlags:" {
            watched |= i64::from(words.any(|flag| flag == "um"));
        }
    }
    vec![resident, watched]
}

fn kib(bytes: usize) -> i64 {
    said(bytes >> 10)
}

/// How many mappings `/proc/self/maps` lists there.
fn listed(s: &Spot) -> Vec<i64> {
    let text = std::fs::read_to_string("/proc/self/maps").expect("procfs");
    let starts = text.lines().filter_map(|line| line.split_once('-'));
    let starts = starts.filter_map(|(start, _)| usize::from_str_radix(start, 16).ok());
    vec![said(starts.filter(|start| s.mapping.contains(start)).count())]
}

/// The program registers its memory with a userfaultfd of its own (ioctl_userfaultfd(2)).
fn userfaultfd(s: &Spot) -> Vec<i64> {
    let fd = sys!(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1); // UFFD_USER_MODE_ONLY
    let Ok(fd) = i32::try_from(fd) else { return vec![-1] };
    if fd < 0 {
        return vec![-1];
    }
    // SAFETY: the descriptor is fresh.
    let fd = unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) };
    let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
    let (mut api, mut range) = ([0xAAu64, 0, 0], [s.at as u64, s.len as u64, 1, 0]);
    // SAFETY: UFFDIO_API and UFFDIO_REGISTER read and write these structures.
    vec![unsafe {
        assert_eq!(libc::ioctl(raw, 0xC018_AA3F, api.as_mut_ptr()), 0, "UFFDIO_API");
        said(libc::ioctl(raw, 0xC020_AA00, range.as_mut_ptr()))
    }]
}

/// Puts shared memory over the spot, writes to it and takes it away again.
fn attach_over(s: &Spot) -> Vec<i64> {
    // SAFETY: System V shared memory of the test's own over the spot's own memory.
    unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, s.len, 0o600);
        let over = libc::shmat(id, ptr(s.at), 0o40000); // SHM_REMAP
        libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut());
        let placed = placed(s, over);
        vec![placed, if placed == 1 { said(libc::shmdt(over)) } else { 0 }]
    }
}

/// `pkey_mprotect(2)` with a key that denies nothing.
fn with_key(s: &Spot) -> Vec<i64> {
    let key = sys!(libc::SYS_pkey_alloc, 0, 0);
    if key < 0 {
        return vec![key];
    }
    let done = sys!(libc::SYS_pkey_mprotect, s.at, s.len, RW, key);
    let back = sys!(libc::SYS_pkey_mprotect, s.at, s.len, RW, 0);
    vec![done, back, sys!(libc::SYS_pkey_free, key)]
}

/// Whether the first 2 MiB block can *not* be made a huge page (in the air: `EINVAL` or `EBUSY`).
fn collapse(s: &Spot) -> Vec<i64> {
    let len = 512 * page_size();
    if s.mapping.len() < len {
        return vec![0, 1];
    }
    // SAFETY: the stage's own memory, whose content it keeps.
    unsafe {
        let advised = said(libc::madvise(ptr(s.mapping.start), len, libc::MADV_HUGEPAGE));
        let collapsed = libc::madvise(ptr(s.mapping.start), len, MADV_COLLAPSE);
        vec![advised, i64::from(collapsed != 0)]
    }
}

fn no_collapse(s: &Spot) -> Vec<i64> {
    let len = 512 * page_size();
    if s.mapping.len() < len {
        return vec![0, 1];
    }
    // SAFETY: the stage's own memory; the advice keeps its content.
    vec![said(unsafe { libc::madvise(ptr(s.mapping.start), len, libc::MADV_HUGEPAGE) }), 1]
}

/// What the guard markers' coming and going does to pages in the air: nothing.
fn guard_undone(s: &Spot) -> Vec<i64> {
    let still = s.len - usize::try_from(s.moving).unwrap_or(0) * page_size();
    // SAFETY: the spot's own memory.
    let dropped = unsafe { libc::madvise(ptr(s.at + s.len - still), still, libc::MADV_DONTNEED) };
    vec![0, said(dropped)]
}

/// That need a mapping that is one.
pub(crate) const REMAPS: &[Call] = &[
    Call::ever("mremap away", |s| vec![mremap(s, s.at, s.len, s.len, TO, s.away)]),
    Call::ever("mremap away and back", |s| {
        let away = mremap(s, s.at, s.len, s.len, TO, s.away);
        vec![away, mremap(s, s.away, s.len, s.len, TO, s.at)]
    }),
    Call::ever("mremap DONTUNMAP", |s| {
        vec![mremap(s, s.at, s.len, s.len, TO | libc::MREMAP_DONTUNMAP, s.away)]
    }),
    Call::ever("mremap larger, where the next page is taken", |s| {
        vec![mremap(s, s.at, s.len, 2 * s.len, 0, 0)]
    }),
    Call::ever("mseal, then mremap", |s| {
        let sealed = sys!(SYS_MSEAL, s.at, s.len, 0);
        vec![sealed, mremap(s, s.at, s.len, s.len, TO, s.away)]
    }),
];

/// That make it larger.
pub(crate) const GROWTH: &[Call] = &[
    Call::ever("mremap away, and larger", |s| vec![mremap(s, s.at, s.len, 2 * s.len, TO, s.away)]),
    Call::ever("mremap anywhere, and larger", |s| {
        vec![mremap(s, s.at, s.len, 2 * s.len, libc::MREMAP_MAYMOVE, 0)]
    }),
];

/// At the end of a mapping: that make it larger.
pub(crate) const GROWTH_IN_PLACE: &[Call] = &[
    Call::ever("mremap larger in place", |s| vec![mremap(s, s.at, s.len, 2 * s.len, 0, 0)]),
    Call::ever("mremap larger in place, all the mapping", |s| {
        let len = s.mapping.len();
        vec![i64::from(mremap(s, s.mapping.start, len, len + s.len, 0, 0) > 0)]
    }),
];

/// All of the mapping.
pub(crate) const WHOLE: &[Call] = &[
    Call::ever("mremap away, all the mapping", |s| {
        let len = s.mapping.len();
        vec![mremap(s, s.mapping.start, len, len, TO, s.away)]
    }),
    Call::ever("munmap, all the mapping", |s| {
        vec![sys!(libc::SYS_munmap, s.mapping.start, s.mapping.len())]
    }),
    Call::ever("mremap smaller, all the mapping", |s| {
        vec![i64::from(mremap(s, s.mapping.start, s.mapping.len(), s.len, 0, 0) > 0)]
    }),
];

pub(crate) const LOCK_ALL: Call = Call::waits("mlockall and munlockall", |_| {
    vec![sys!(libc::SYS_mlockall, libc::MCL_CURRENT), sys!(libc::SYS_munlockall)]
});

/// How many mappings there are to see.
pub(crate) const MAPS: Call = Call::ever("maps", listed);

/// Across the end of the managed part of a mapping, which shows as two: `EFAULT`, and nothing is done.
pub(crate) const ACROSS: &[Call] = &[
    Call::new("maps", differs(|_| vec![2]), listed).protected(differs(|_| vec![2])).once(),
    across("mremap away", |s| vec![mremap(s, s.at, s.len, s.len, TO, s.away)]),
    across("mremap DONTUNMAP", |s| {
        vec![mremap(s, s.at, s.len, s.len, TO | libc::MREMAP_DONTUNMAP, s.away)]
    }),
    across("mremap away, and larger", |s| vec![mremap(s, s.at, s.len, 2 * s.len, TO, s.away)]),
    across("mremap anywhere, and larger", |s| {
        vec![mremap(s, s.at, s.len, 2 * s.len, libc::MREMAP_MAYMOVE, 0)]
    }),
    across("mremap larger, where the next page is taken", |s| {
        vec![mremap(s, s.at, s.len, 2 * s.len, 0, 0)]
    }),
];

const fn across(name: &'static str, act: fn(&Spot) -> Vec<i64>) -> Call {
    Call::new(name, differs(|_| vec![-14]), act).protected(differs(|_| vec![-14])).once()
}

/// Across the edge of what was mapped while the rest was moving, and is not registered: `EFAULT`.
pub(crate) const SEAM: &[Call] =
    &[Call::new("mmap, then mremap across its edge", differs(seam), |s| {
        vec![map_half(s), mremap(s, s.at, s.len, s.len, TO, s.away)]
    })
    .protected(differs(seam))
    .once()];

fn seam(s: &Spot) -> Vec<i64> {
    let mapped = map_half(s);
    if moves_many() {
        mremap(s, s.at, s.len / 2, s.len / 2, TO, s.away);
    }
    vec![mapped, -14]
}

/// Whether mremap takes several mappings at once (Linux 6.17): then it stops at the first that is
/// registered with a userfaultfd, and those before it have moved.
fn moves_many() -> bool {
    let (at, page) = (far_address(), page_size());
    map_at(at, 2 * page);
    protect(at..at + page, libc::PROT_READ);
    // SAFETY: mapped above; what is there is given up.
    unsafe {
        let to = ptr(at + 4 * page);
        libc::mremap(ptr(at), 2 * page, 2 * page, TO, to) == to
    }
}

/// Maps the spot's first half anew.
fn map_half(s: &Spot) -> i64 {
    mmap(&Spot { len: s.len / 2, mapping: s.mapping.clone(), ..*s }, libc::MAP_FIXED)
}

pub(crate) const MAPPINGS: &[Call] = &[
    Call::ever("munmap", |s| vec![sys!(libc::SYS_munmap, s.at, s.len)]),
    Call::ever("mmap FIXED", |s| vec![mmap(s, libc::MAP_FIXED)]),
    Call::ever("munmap and mmap", |s| {
        vec![sys!(libc::SYS_munmap, s.at, s.len), mmap(s, libc::MAP_FIXED_NOREPLACE)]
    }),
    Call::ever("mremap smaller", |s| vec![mremap(s, s.at, s.len, s.len / 2, 0, 0)]),
    Call::ever("mremap away, and smaller", |s| vec![mremap(s, s.at, s.len, s.len / 2, TO, s.away)]),
    Call::ever("mremap of the length that it has", |s| vec![mremap(s, s.at, s.len, s.len, 0, 0)]),
    Call::ever("mremap of a second mapping", |s| {
        vec![mremap(s, s.at, 0, s.len, libc::MREMAP_MAYMOVE, 0)]
    }),
    Call::ever("mmap FIXED_NOREPLACE", |s| vec![mmap(s, libc::MAP_FIXED_NOREPLACE)]),
    Call::ever("mprotect READ", |s| vec![mprotect(s, libc::PROT_READ)]),
    Call::ever("mprotect NONE", |s| vec![mprotect(s, libc::PROT_NONE)]),
    Call::ever("mprotect NONE and back", |s| vec![mprotect(s, libc::PROT_NONE), mprotect(s, RW)]),
    Call::ever("mprotect EXEC", |s| vec![mprotect(s, RW | libc::PROT_EXEC)]),
    Call::ever("mprotect, not aligned", |s| vec![sys!(libc::SYS_mprotect, s.at + 1, s.len, RW)]),
    Call::ever("pkey_mprotect", with_key),
    Call::waits("mlock", |s| vec![sys!(libc::SYS_mlock, s.at, s.len)]),
    Call::ever("mlock2 ONFAULT", |s| vec![sys!(libc::SYS_mlock2, s.at, s.len, 1)]),
    Call::waits("mlock and munlock", |s| {
        vec![sys!(libc::SYS_mlock, s.at, s.len), sys!(libc::SYS_munlock, s.at, s.len)]
    }),
    Call::ever("munlock", |s| vec![sys!(libc::SYS_munlock, s.at, s.len)]),
    Call::new("mincore", differs(|s| vec![0, 8 - s.moving]), resident).once(),
    Call::new("pagemap", differs(|s| vec![8 - s.moving, 0]), page_map)
        .protected(differs(|s| vec![8, s.moving]))
        .once(),
    Call::new("smaps", differs(|s| vec![kib(s.mapping.len() - 64 * page_size()), 1]), smaps)
        .protected(differs(|s| vec![kib(s.mapping.len()), 1]))
        .once(),
    Call::ever("msync SYNC", |s| vec![sys!(libc::SYS_msync, s.at, s.len, libc::MS_SYNC)]),
    Call::ever("msync ASYNC and INVALIDATE", |s| {
        vec![sys!(libc::SYS_msync, s.at, s.len, libc::MS_ASYNC | libc::MS_INVALIDATE)]
    }),
    Call::ever("mbind", |s| vec![mbind(s, libc::MPOL_BIND), mbind(s, libc::MPOL_PREFERRED)]),
    Call::ever("set_mempolicy_home_node", |s| {
        let bound = mbind(s, libc::MPOL_BIND);
        vec![bound, sys!(SYS_SET_MEMPOLICY_HOME_NODE, s.at, s.len, 0, 0)]
    }),
    Call::ever("get_mempolicy ADDR", |s| policy(s, 0)),
    Call::waits("get_mempolicy NODE and ADDR", |s| policy(s, 1)),
    Call::new("move_pages, the question", differs(|s| vec![0, s.moving]), |s| nodes(s, None))
        .once(),
    Call::new("move_pages", differs(|s| vec![0, s.moving]), |s| nodes(s, Some(0))).once(),
    Call::ever("migrate_pages", |_| {
        let node = 1u64;
        vec![sys!(libc::SYS_migrate_pages, 0, 64usize, &raw const node, &raw const node)]
    }),
    Call::new("UFFDIO_REGISTER", differs(|_| vec![-16]), userfaultfd)
        .protected(differs(|_| vec![-16]))
        .once(),
    Call::ever("prctl SET_VMA", |s| {
        vec![sys!(libc::SYS_prctl, 0x5356_4D41, 0, s.at, s.len, c"name".as_ptr())]
    }),
    Call::ever("remap_file_pages", |s| {
        vec![sys!(libc::SYS_remap_file_pages, s.at, s.len, 0, 0, 0)]
    }),
    Call::ever("shmat REMAP and shmdt", attach_over),
    Call::ever("mseal, then munmap and mprotect", |s| {
        let sealed = sys!(SYS_MSEAL, s.at, s.len, 0);
        vec![sealed, sys!(libc::SYS_munmap, s.at, s.len), mprotect(s, libc::PROT_READ)]
    }),
    Call::ever("membarrier", |_| vec![sys!(libc::SYS_membarrier, 0, 0, 0)]),
];

pub(crate) const ADVICE: &[Call] = &[
    Call::ever("madvise NORMAL", |s| advise(s, libc::MADV_NORMAL)),
    Call::ever("madvise RANDOM", |s| advise(s, libc::MADV_RANDOM)),
    Call::ever("madvise WILLNEED", |s| advise(s, libc::MADV_WILLNEED)),
    Call::ever("madvise DONTNEED", |s| advise(s, libc::MADV_DONTNEED)),
    Call::ever("madvise DONTNEED_LOCKED", |s| advise(s, 24)),
    Call::ever("madvise FREE", |s| advise(s, libc::MADV_FREE)).blind(),
    Call::ever("madvise REMOVE", |s| advise(s, libc::MADV_REMOVE)),
    Call::ever("madvise COLD", |s| advise(s, libc::MADV_COLD)),
    Call::ever("madvise PAGEOUT", |s| advise(s, libc::MADV_PAGEOUT)),
    Call::waits("madvise POPULATE_READ", |s| advise(s, libc::MADV_POPULATE_READ)),
    Call::waits("madvise POPULATE_WRITE", |s| advise(s, libc::MADV_POPULATE_WRITE)),
    Call::ever("madvise HUGEPAGE", |s| advise(s, libc::MADV_HUGEPAGE)),
    Call::ever("madvise NOHUGEPAGE", |s| advise(s, libc::MADV_NOHUGEPAGE)),
    Call::ever("madvise MERGEABLE", |s| advise(s, libc::MADV_MERGEABLE)),
    Call::ever("madvise MERGEABLE and UNMERGEABLE", |s| {
        [advise(s, libc::MADV_MERGEABLE), advise(s, libc::MADV_UNMERGEABLE)].concat()
    }),
    Call::ever("madvise DONTFORK", |s| advise(s, libc::MADV_DONTFORK)),
    Call::ever("madvise DONTFORK and DOFORK", |s| {
        [advise(s, libc::MADV_DONTFORK), advise(s, libc::MADV_DOFORK)].concat()
    }),
    Call::ever("madvise WIPEONFORK", |s| advise(s, libc::MADV_WIPEONFORK)),
    Call::ever("madvise DONTDUMP", |s| advise(s, libc::MADV_DONTDUMP)),
    // Beside moves the kernel may copy, and its copy replaces a marker that is installed meanwhile, if
    // none was seen before: the old content comes back.
    Call::ever("madvise GUARD_INSTALL", |s| advise(s, MADV_GUARD_INSTALL)).once(),
    // No event tells of it: the old content comes back.
    Call::new("madvise GUARD_INSTALL and REMOVE", differs(guard_undone), |s| {
        [advise(s, MADV_GUARD_INSTALL), advise(s, MADV_GUARD_REMOVE)].concat()
    })
    .once(),
    Call::ever("madvise of an unknown kind", |s| advise(s, 9999)),
    Call::ever("process_madvise COLD", |s| advise_self(s, libc::MADV_COLD)),
    Call::ever("process_madvise PAGEOUT", |s| advise_self(s, libc::MADV_PAGEOUT)),
    Call::ever("process_madvise WILLNEED", |s| advise_self(s, libc::MADV_WILLNEED)),
    Call::ever("process_madvise DONTNEED", |s| advise_self(s, libc::MADV_DONTNEED)),
    Call::new("madvise COLLAPSE", differs(no_collapse), collapse)
        .protected(differs(no_collapse))
        .once(),
];
