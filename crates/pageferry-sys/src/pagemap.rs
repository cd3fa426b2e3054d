//! What stands behind a range of this process: `/proc/self/pagemap` and its `PAGEMAP_SCAN`.
//!
//! Source: `include/uapi/linux/fs.h` (`struct pm_scan_arg`, `PAGE_IS_*`; 6.7),
//! `Documentation/admin-guide/mm/pagemap.rst`, fs/proc/task_mmu.c (`pte_to_pagemap_entry`),
//! include/linux/swap.h (`SWP_PTE_MARKER`, `MAX_SWAPFILES`).

use crate::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

bitflags::bitflags! {
    /// Properties of a page (`PAGE_IS_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Categories: u64 {
        /// Belongs to a file or shared memory.
        const FILE = 1 << 2;
        /// Mapped.
        const PRESENT = 1 << 3;
        /// No page, and something else in its place: [`Absent`]. A page that was swapped out, one
        /// that migrates, a marker; guard markers, too, also where the kernel knows [`Self::GUARD`].
        const SWAPPED = 1 << 4;
        /// The shared zero page.
        const PFN_ZERO = 1 << 5;
        /// Mapped by a page-middle entry: a huge page.
        const HUGE = 1 << 6;
        /// A guard marker of `MADV_GUARD_INSTALL` (6.15).
        const GUARD = 1 << 8;
    }
}

/// A run of pages with the same properties (`struct page_region`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    categories: u64,
}

impl Run {
    /// A run of nothing, to fill a buffer for [`Sys::scan`](crate::Sys::scan).
    pub const EMPTY: Self = Self { start: 0, end: 0, categories: 0 };

    /// A run with these properties, as the kernel would tell it.
    pub fn new(start: usize, end: usize, categories: Categories) -> Self {
        Self { start: start as u64, end: end as u64, categories: categories.bits() }
    }

    /// Whether `next` continues it.
    pub fn joins(&self, next: &Self) -> bool {
        self.end == next.start && self.categories == next.categories
    }

    /// The run's properties.
    pub fn categories(&self) -> Categories {
        Categories::from_bits_truncate(self.categories)
    }
}

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<PmScanArg>() == 96 && size_of::<Run>() == 24);
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = (3 << 30) | (96 << 16) | ((b'f' as u64) << 8) | 16;

/// The swap type of markers: the last there is, in every kernel from 6.2 on.
const MARKER_TYPE: u64 = 31;
/// Types below are those of swap areas, however the kernel is configured: of 32 it sets aside one for
/// markers, four for memory of devices, three for pages that migrate and one for poisoned ones, or
/// fewer.
const AREA_TYPES: u64 = 32 - 1 - 4 - 3 - 1;

/// What stands in a page table where the page map says [swapped](Entry::swapped).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// A page that was swapped out.
    Swapped,
    /// A marker, with no page behind it: of a guard region (`MADV_GUARD_INSTALL`, 6.13), of a
    /// userfaultfd's write protection, of a page that was lost.
    Marker,
    /// Any of these, or a page that migrates or is on a device: without `CAP_SYS_ADMIN` the kernel
    /// tells guard markers only, and those from 6.15 on.
    Untold,
}

/// One entry of `/proc/self/pagemap`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub u64);

impl Entry {
    /// Page frame number; `None` when not present or hidden (it needs `CAP_SYS_ADMIN`).
    pub fn pfn(self) -> Option<u64> {
        let pfn = self.0 & ((1 << 55) - 1);
        (self.present() && pfn != 0).then_some(pfn)
    }
    /// Bit 63.
    pub fn present(self) -> bool {
        self.0 >> 63 != 0
    }
    /// Bit 62.
    pub fn swapped(self) -> bool {
        self.0 >> 62 & 1 != 0
    }
    /// What stands there if it is [swapped](Self::swapped): by bit 58 and the swap type.
    pub fn absent(self) -> Option<Absent> {
        let word = self.0 & ((1 << 55) - 1);
        match (word != 0, word & 31) {
            _ if !self.swapped() => None,
            _ if self.0 >> 58 & 1 != 0 => Some(Absent::Marker),
            (true, MARKER_TYPE) => Some(Absent::Marker),
            (true, 0..AREA_TYPES) => Some(Absent::Swapped),
            // Hidden: no area has a page at offset 0, where its header is.
            _ => Some(Absent::Untold),
        }
    }
    /// Bit 61: belongs to a file or shared memory.
    pub fn file(self) -> bool {
        self.0 >> 61 & 1 != 0
    }
    /// Bit 57: write-protected by a userfaultfd.
    pub fn write_protected(self) -> bool {
        self.0 >> 57 & 1 != 0
    }
    /// Bit 56 (4.2): mapped by this process only, once. Told to everybody. Of a page of a larger
    /// folio it may tell of the folio instead (`CONFIG_NO_PAGE_MAPCOUNT`, 6.16).
    pub fn exclusive(self) -> bool {
        self.0 >> 56 & 1 != 0
    }
}

/// `/proc/self/pagemap`, opened once (reading it is checked against this process, so a child
/// after fork must not use it).
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// An open pagemap file of any process.
    pub(crate) fn of(file: File) -> Self {
        Self { file }
    }

    /// Opens the calling process's pagemap.
    ///
    /// # Errors
    /// `ENOENT`: no procfs; `EACCES`: forbidden here.
    pub fn open() -> Result<Self, Errno> {
        let file = File::open("/proc/self/pagemap")
            .map_err(|e| Errno(e.raw_os_error().unwrap_or(libc::EIO)))?;
        Ok(Self { file })
    }

    /// The entries of the pages from `start` on, one for each element of `out`.
    ///
    /// # Errors
    /// What `pread(2)` says; `EIO` when the range leaves the address space.
    pub fn entries(&self, start: usize, out: &mut [Entry]) -> Result<(), Errno> {
        let offset = (start / crate::page_size() * 8) as u64;
        // SAFETY: the bytes of the entries, which nobody else refers to meanwhile. Each is a word
        // (`repr(transparent)`) of which every value is one.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u8>(), size_of_val(out))
        };
        let read = self.file.read_exact_at(bytes, offset);
        read.map_err(|e| Errno(e.raw_os_error().unwrap_or(libc::EIO)))
    }

    /// Runs of pages in `start..end` that have any of `wanted`, with those of `wanted` that they
    /// have. Returns how many runs were written and where the walk ended (at `end`, or earlier
    /// when `out` was full).
    ///
    /// # Errors
    /// `ENOTTY`: a kernel without `PAGEMAP_SCAN` (before 6.7). `EINVAL`: a bad range.
    pub(crate) fn scan(
        &self,
        start: usize,
        end: usize,
        wanted: Categories,
        returned: Categories,
        out: &mut [Run],
    ) -> Result<(usize, usize), Errno> {
        let mut arg = PmScanArg {
            size: 96,
            flags: 0,
            start: start as u64,
            end: end as u64,
            walk_end: 0,
            vec: out.as_mut_ptr().addr() as u64,
            vec_len: out.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: 0,
            category_anyof_mask: wanted.bits(),
            return_mask: returned.bits(),
        };
        // The kernel writes through the address in `vec`, so its provenance must be exposed.
        let _ = out.as_mut_ptr().expose_provenance();
        // SAFETY: PAGEMAP_SCAN reads and writes `arg`, of the size it encodes, and writes at most
        // `vec_len` runs at `vec`; without PM_SCAN_WP_MATCHING it changes nothing else.
        let ret = unsafe {
            libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, std::ptr::from_mut(&mut arg))
        };
        let n = Errno::result(ret.into())?;
        Ok((n, usize::try_from(arg.walk_end).unwrap_or(end)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_where_a_page_is_swapped_is_told_as_far_as_the_kernel_tells() {
        let swapped = 1 << 62;
        let absent = |bits: u64| Entry(bits).absent();
        assert_eq!(absent(1 << 63 | 31), None, "a frame, not a type");
        assert_eq!(absent(0), None);
        // Seen on Linux 6.18: a guard marker, one of write protection, the guard marker as it is
        // told without rights.
        assert_eq!(absent(0x4400_0000_0000_009f), Some(Absent::Marker));
        assert_eq!(absent(0x4200_0000_0000_003f), Some(Absent::Marker));
        assert_eq!(absent(0x4400_0000_0000_0000), Some(Absent::Marker));
        assert_eq!(absent(swapped), Some(Absent::Untold));
        assert_eq!(absent(swapped | 1 << 57), Some(Absent::Untold), "protected, and hidden");
        assert_eq!(absent(swapped | 7 << 5), Some(Absent::Swapped), "the first area");
        assert_eq!(absent(swapped | 7 << 5 | 22), Some(Absent::Swapped));
        assert_eq!(absent(swapped | 7 << 5 | 26), Some(Absent::Untold), "it may migrate");
    }
}
