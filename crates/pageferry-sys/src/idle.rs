//! Which page frames have not been used: the kernel's idle page tracking, and what a frame is.
//!
//! A frame that is marked idle stays so until something uses its page: a look at the bitmap looks
//! at the accessed bits of everything that maps the page. Only the first frame of a folio carries
//! the mark, and only user memory on the kernel's lists of reclaimable pages (LRU) does: never
//! hugetlb pages, kernel memory, or a page that is on its way into these lists.
//!
//! What always holds: a call does what it says for whatever frames it is given. That they are
//! first frames of folios is the caller's to find out ([`FrameFlags`]).
//!
//! What can go wrong: there is one bitmap for the whole machine. Who else marks frames idle hides
//! what used them before; so may reclaim, which clears accessed bits for itself. And clearing an
//! accessed bit flushes no TLB (x86): a page whose translation stays in one, as a few hot huge
//! pages' can, is used without being noticed.
//!
//! Source: `Documentation/admin-guide/mm/idle_page_tracking.rst`, mm/page_idle.c,
//! `Documentation/admin-guide/mm/pagemap.rst`, `include/uapi/linux/kernel-page-flags.h`.

use crate::procfs::errno_of;
use crate::{Errno, page_size};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Frames of one word of the bitmap.
pub const FRAMES_OF_WORD: u64 = 64;
/// The bitmap. Absent from kernels without `CONFIG_IDLE_PAGE_TRACKING`; mode 0600.
pub const BITMAP: &str = "/sys/kernel/mm/page_idle/bitmap";
/// A word of flags for each frame.
const FLAGS: &str = "/proc/kpageflags";
/// Words read or written at once: the kernel gives sysfs files a page for each call.
const AT_ONCE: usize = 512;

bitflags::bitflags! {
    /// What the page in a frame is (`KPF_*`), as far as it matters here.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FrameFlags: u64 {
        /// The first of a folio of several frames.
        const COMPOUND_HEAD = 1 << 15;
        /// One of the others. Folios are aligned to their size, which is a power of two.
        const COMPOUND_TAIL = 1 << 16;
    }
}

/// Idle page tracking, opened.
#[allow(clippy::missing_errors_doc, reason = "each error is the errno of the call named")]
pub trait IdlePages: Send + Sync + std::fmt::Debug {
    /// The flags ([`FrameFlags`] among them) of the frames from `first` on; 0 where there is none.
    fn flags(&self, first: u64, out: &mut [u64]) -> Result<(), Errno>;
    /// The words of the bitmap from word `first` on, a bit for each frame: 1 where it was marked
    /// and its page has not been used since. 0 where there is no frame.
    fn read(&self, first: u64, out: &mut [u64]) -> Result<(), Errno>;
    /// Marks frames idle: those with a 1 in these words, the first of which is word `first`. What
    /// cannot be marked is left out in silence. `ENXIO`: no memory is that far.
    fn mark(&self, first: u64, words: &[u64]) -> Result<(), Errno>;
}

/// The kernel's own.
#[derive(Debug)]
pub(crate) struct LinuxIdle {
    bitmap: File,
    flags: File,
}

impl LinuxIdle {
    /// `ENOENT`: the kernel has none. `EACCES`, `EPERM`, `EROFS`: not this caller's to use.
    pub(crate) fn open() -> Result<Self, Errno> {
        Self::open_at(Path::new(BITMAP), Path::new(FLAGS))
    }

    fn open_at(bitmap: &Path, flags: &Path) -> Result<Self, Errno> {
        let bitmap = OpenOptions::new().read(true).write(true).open(bitmap);
        let bitmap = bitmap.map_err(|e| errno_of(&e))?;
        let flags = File::open(flags).map_err(|e| errno_of(&e))?;
        Ok(Self { bitmap, flags })
    }
}

impl IdlePages for LinuxIdle {
    fn flags(&self, first: u64, out: &mut [u64]) -> Result<(), Errno> {
        read_words(&self.flags, first, out)
    }

    fn read(&self, first: u64, out: &mut [u64]) -> Result<(), Errno> {
        read_words(&self.bitmap, first, out)
    }

    fn mark(&self, first: u64, words: &[u64]) -> Result<(), Errno> {
        let mut at = first.saturating_mul(8);
        for part in words.chunks(AT_ONCE) {
            let bytes: Vec<u8> = part.iter().flat_map(|word| word.to_ne_bytes()).collect();
            // The kernel takes whole words: what it took last may only have been the end.
            self.bitmap.write_all_at(&bytes, at).map_err(|e| errno_of(&e))?;
            at += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Words of a file from word `first` on; 0 beyond its end.
fn read_words(file: &File, first: u64, out: &mut [u64]) -> Result<(), Errno> {
    let mut at = first.saturating_mul(8);
    let mut bytes = [0u8; AT_ONCE * 8];
    for part in out.chunks_mut(AT_ONCE) {
        let bytes = &mut bytes[..part.len() * 8];
        let mut have = 0;
        while have < bytes.len() {
            match file.read_at(&mut bytes[have..], at + have as u64) {
                Ok(0) => break,
                Ok(more) => have += more,
                Err(e) => return Err(errno_of(&e)),
            }
        }
        bytes[have..].fill(0);
        for (word, raw) in part.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut eight = [0u8; 8];
            eight.copy_from_slice(raw);
            *word = u64::from_ne_bytes(eight);
        }
        at += bytes.len() as u64;
    }
    Ok(())
}

/// Whether pagemap tells this process the numbers of frames (`CAP_SYS_ADMIN` in the first user
/// namespace): whether it tells that of a page that certainly is there.
pub(crate) fn sees_frames() -> Result<bool, Errno> {
    let witness = 1u8;
    let address = (&raw const witness).addr() & !(page_size() - 1);
    let mut entry = [crate::pagemap::Entry(0)];
    crate::pagemap::Pagemap::open()?.entries(address, &mut entry)?;
    std::hint::black_box(witness);
    Ok(entry[0].pfn().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plain files stand in for the kernel's.
    fn files() -> (tempfile::TempDir, LinuxIdle) {
        let dir = tempfile::tempdir().expect("a folder");
        let (bitmap, flags) = (dir.path().join("bitmap"), dir.path().join("flags"));
        std::fs::write(&bitmap, vec![0u8; 3000 * 8]).expect("a file");
        let words: Vec<u8> = (0..2000u64).flat_map(u64::to_ne_bytes).collect();
        std::fs::write(&flags, words).expect("a file");
        let idle = LinuxIdle::open_at(&bitmap, &flags).expect("both are there");
        (dir, idle)
    }

    #[test]
    fn words_are_written_and_read_where_they_belong() {
        let (_dir, idle) = files();
        let words: Vec<u64> = (1..=1200).collect();
        idle.mark(1000, &words).expect("a plain file");
        let mut read = vec![u64::MAX; 1202];
        idle.read(999, &mut read).expect("a plain file");
        assert_eq!((read[0], read[1], read[1200], read[1201]), (0, 1, 1200, 0));
    }

    #[test]
    fn beyond_the_last_frame_there_is_nothing() {
        let (_dir, idle) = files();
        let mut flags = [7; 4];
        idle.flags(1998, &mut flags).expect("a plain file");
        assert_eq!(flags, [1998, 1999, 0, 0]);
        idle.flags(1 << 40, &mut flags).expect("a plain file");
        assert_eq!(flags, [0; 4]);
    }

    #[test]
    fn a_kernel_without_a_bitmap_says_so() {
        let nowhere = Path::new("/proc/self/no-such-file");
        assert_eq!(LinuxIdle::open_at(nowhere, nowhere).err(), Some(Errno(libc::ENOENT)));
        match LinuxIdle::open() {
            Ok(idle) => {
                // The first frame is never a user's.
                let mut word = [0];
                assert_eq!(idle.read(0, &mut word), Ok(()));
            }
            Err(errno) => {
                let known = [libc::ENOENT, libc::EACCES, libc::EPERM, libc::EROFS];
                assert!(known.contains(&errno.0), "{errno}");
            }
        }
    }

    /// Frames of this memory's pages; `None`: they are not told.
    fn frames(memory: &[u8]) -> Option<Vec<u64>> {
        let start = memory.as_ptr().addr().next_multiple_of(page_size());
        let end = (memory.as_ptr().addr() + memory.len()) & !(page_size() - 1);
        let mut entries = vec![crate::pagemap::Entry(0); (end - start) / page_size()];
        let map = crate::pagemap::Pagemap::open().expect("procfs");
        map.entries(start, &mut entries).expect("our own memory");
        entries.into_iter().map(crate::pagemap::Entry::pfn).collect()
    }

    #[test]
    fn a_huge_page_has_one_head_and_is_aligned() {
        use crate::Sys as _;
        const HUGE: usize = 2 << 20;
        let mut memory = vec![0u8; 2 * HUGE];
        let start = memory.as_ptr().addr().next_multiple_of(HUGE);
        // SAFETY: the range lies within a vector of ours; the advice changes no content.
        let advised = unsafe { crate::Linux.advise(start, HUGE, crate::mm::Advice::HugePage) };
        memory.fill(1);
        let skip = start - memory.as_ptr().addr();
        let (Ok(()), Some(frames)) = (advised, frames(&memory[skip..skip + HUGE])) else {
            eprintln!("skipped: no huge pages, or frames are not told (CAP_SYS_ADMIN)");
            return;
        };
        let Ok(file) = File::open(FLAGS) else {
            eprintln!("skipped: {FLAGS} is root's");
            return;
        };
        let mut flags = vec![0; frames.len()];
        read_words(&file, frames[0], &mut flags).expect("frames that are there");
        let head = FrameFlags::from_bits_truncate(flags[0]);
        if frames[0] % (frames.len() as u64) != 0 || head.is_empty() {
            eprintln!("skipped: the kernel had no huge page to give");
            return;
        }
        assert_eq!(head, FrameFlags::COMPOUND_HEAD);
        let tail = |word: &u64| FrameFlags::from_bits_truncate(*word) == FrameFlags::COMPOUND_TAIL;
        assert!(flags[1..].iter().all(tail));
    }

    #[test]
    fn a_page_that_is_marked_is_idle_until_it_is_used() {
        let idle = match LinuxIdle::open() {
            Ok(idle) if sees_frames() == Ok(true) => idle,
            Ok(_) => return eprintln!("skipped: frames are not told (CAP_SYS_ADMIN)"),
            Err(errno) => return eprintln!("skipped: {BITMAP}: {errno}"),
        };
        let mut memory = vec![1u8; 4 << 20];
        let is_idle = |frame: u64| {
            let mut word = [0];
            idle.read(frame / FRAMES_OF_WORD, &mut word).expect("a frame that is there");
            word[0] >> (frame % FRAMES_OF_WORD) & 1 != 0
        };
        let frames = frames(&memory).expect("told");
        for frame in &frames {
            let word = 1 << (frame % FRAMES_OF_WORD);
            idle.mark(frame / FRAMES_OF_WORD, &[word]).expect("a frame that is there");
        }
        // Tails of folios, and pages on their way into the kernel's lists, are not marked.
        let marked: Vec<u64> = frames.iter().copied().filter(|frame| is_idle(*frame)).collect();
        assert!(!marked.is_empty());
        std::hint::black_box(&mut memory).fill(2);
        assert!(marked.iter().all(|frame| !is_idle(*frame)));
    }
}
