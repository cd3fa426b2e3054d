//! The mappings of this process.
//!
//! Source: `struct procmap_query` and `PROCMAP_QUERY` (6.11) in `include/uapi/linux/fs.h`,
//! `proc_pid_maps(5)`.

use crate::Errno;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

/// `_IOWR(PROCFS_IOCTL_MAGIC, 17, struct procmap_query)`, the magic being `'f'`.
const PROCMAP_QUERY: u64 =
    (3 << 30) | ((size_of::<ProcmapQuery>() as u64) << 16) | ((b'f' as u64) << 8) | 17;
/// `PROCMAP_QUERY_COVERING_OR_NEXT_VMA`.
const COVERING_OR_NEXT: u64 = 0x10;

#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}
const _: () = assert!(size_of::<ProcmapQuery>() == 104);

/// An open `/proc/self/maps`.
#[derive(Debug)]
pub struct Maps(Mutex<File>);

impl Maps {
    /// Opens it.
    ///
    /// # Errors
    /// What `open(2)` says.
    pub fn open() -> Result<Self, Errno> {
        let file = File::open("/proc/self/maps").map_err(|e| errno_of(&e))?;
        Ok(Self(Mutex::new(file)))
    }

    /// The mappings that overlap a range, whole, in ascending order. On kernels before 6.11 the
    /// file is read from its start.
    pub(crate) fn within(&self, range: Range<usize>) -> Result<Vec<Range<usize>>, Errno> {
        match self.query(&range) {
            Err(Errno(libc::ENOTTY)) => self.read(&range),
            found => found,
        }
    }

    fn query(&self, range: &Range<usize>) -> Result<Vec<Range<usize>>, Errno> {
        let file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let mut arg = ProcmapQuery {
                size: size_of::<ProcmapQuery>() as u64,
                query_flags: COVERING_OR_NEXT,
                query_addr: at as u64,
                ..ProcmapQuery::default()
            };
            // SAFETY: the kernel reads and writes the structure whose size it is told, and no
            // buffer is asked for.
            let ret = unsafe { libc::ioctl(file.as_raw_fd(), PROCMAP_QUERY, &raw mut arg) };
            match Errno::result(ret.into()) {
                Ok(_) => {}
                Err(Errno(libc::ENOENT)) => break,
                Err(Errno(libc::EINTR)) => continue,
                Err(errno) => return Err(errno),
            }
            let address = |a: u64| usize::try_from(a).unwrap_or(usize::MAX);
            let mapping = address(arg.vma_start)..address(arg.vma_end);
            if mapping.start >= range.end || mapping.end <= at {
                break;
            }
            at = mapping.end;
            found.push(mapping);
        }
        Ok(found)
    }

    fn read(&self, range: &Range<usize>) -> Result<Vec<Range<usize>>, Errno> {
        let mut text = String::new();
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(0)).map_err(|e| errno_of(&e))?;
        file.read_to_string(&mut text).map_err(|e| errno_of(&e))?;
        Ok(parse(&text, range))
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno(error.raw_os_error().unwrap_or(libc::EIO))
}

/// The mappings that overlap a range in the text of a maps file, whose lines are in ascending
/// order.
fn parse(maps: &str, range: &Range<usize>) -> Vec<Range<usize>> {
    let mappings = maps.lines().filter_map(|line| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
    });
    mappings.filter(|m| m.end > range.start && m.start < range.end).collect()
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "one mapping is a list of mappings")]
mod tests {
    use super::*;
    use crate::mm::{map, unmap};

    #[test]
    fn the_mappings_of_a_range_are_those_that_overlap_it() {
        let maps = "1000-3000 rw-p 0 0\n4000-5000 r--p 0 0 [heap]\n5000-6000 rw-p 0 0\n";
        assert_eq!(parse(maps, &(0x1000..0x3000)), [0x1000..0x3000]);
        assert_eq!(parse(maps, &(0x2000..0x5000)), [0x1000..0x3000, 0x4000..0x5000]);
        assert_eq!(parse(maps, &(0x3000..0x4000)), []);
    }

    #[test]
    fn the_kernel_is_asked_and_the_file_read_with_the_same_answer() {
        let page = crate::page_size();
        let start = map(5 * page, page).expect("five pages");
        // SAFETY: mapped above, used by nobody.
        unsafe { unmap(start + 2 * page, page) }.expect("ours");
        let maps = Maps::open().expect("procfs");
        let range = start + page..start + 4 * page;
        let read = maps.read(&range).expect("readable");
        let [left, right] = &read[..] else { panic!("two mappings: {read:x?}") };
        assert!(left.end == start + 2 * page && right.start == start + 3 * page, "{read:x?}");
        match maps.query(&range) {
            Err(Errno(libc::ENOTTY)) => eprintln!("skipped: a kernel before 6.11 is not asked"),
            asked => assert_eq!(asked, Ok(read)),
        }
        // SAFETY: as above.
        unsafe { unmap(start, 5 * page) }.expect("ours");
    }
}
