//! What the devices that mappings name are: shared memory and huge pages are told from files by
//! the device, not by the name, which a program can choose.
//!
//! Source: `memfd_create(2)`, `Documentation/filesystems/proc.rst` (mountinfo), mm/shmem.c
//! (`shm_mnt`), fs/hugetlbfs/inode.c (`hugetlbfs_vfsmount`).

use crate::Errno;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::sync::OnceLock;

/// What a device that mappings name keeps its objects in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Shared memory: tmpfs, memfd, System V, shared anonymous mappings.
    SharedMemory,
    /// Huge pages of this many bytes.
    Hugetlb(usize),
    /// The device `/dev/zero`, the inode of that number: private mappings of it are anonymous
    /// memory (drivers/char/mem.c, `mmap_zero`).
    Zero(u64),
}

/// The devices that are not ordinary files', by major and minor number.
pub type Backings = Vec<((u32, u32), Backing)>;

/// The devices of a mount namespace, by its mountinfo, and those of the kernel itself.
pub(super) fn all(mountinfo: &str) -> Backings {
    let mut backings = internal_mounts().clone();
    backings.extend(mountinfo.lines().filter_map(mount));
    backings
}

/// `/dev/zero` as it is found at `path`: the character device 1:5, by its device and inode.
pub(super) fn zero(path: &str) -> Option<((u32, u32), Backing)> {
    let found = fs::metadata(path).ok()?;
    let is_zero = found.file_type().is_char_device() && found.rdev() == libc::makedev(1, 5);
    let device = (libc::major(found.dev()), libc::minor(found.dev()));
    is_zero.then_some((device, Backing::Zero(found.ino())))
}

/// A line of mountinfo, if its file system is not one of ordinary files.
fn mount(line: &str) -> Option<((u32, u32), Backing)> {
    let (major, minor) = line.split(' ').nth(2)?.split_once(':')?;
    let (_, after) = line.split_once(" - ")?;
    let mut fields = after.split(' ');
    let backing = match fields.next()? {
        "tmpfs" => Backing::SharedMemory,
        "hugetlbfs" => {
            let options = fields.nth(1)?;
            let size = options.split(',').find_map(|o| o.strip_prefix("pagesize="))?;
            let digits = size.trim_end_matches(|c: char| !c.is_ascii_digit());
            let unit = match size.chars().last()? {
                'G' => 1 << 30,
                'M' => 1 << 20,
                'K' => 1 << 10,
                _ => 1,
            };
            Backing::Hugetlb(digits.parse::<usize>().ok()?.checked_mul(unit)?)
        }
        _ => return None,
    };
    Some(((major.parse().ok()?, minor.parse().ok()?), backing))
}

/// The kernel's own mounts, which no mountinfo lists: behind memfd, System V shared memory, and
/// anonymous mappings that are shared or of huge pages. A file of each tells its device.
fn internal_mounts() -> &'static Backings {
    static FOUND: OnceLock<Backings> = OnceLock::new();
    FOUND.get_or_init(|| {
        let mut found: Backings =
            memfd_device(0).map(|d| (d, Backing::SharedMemory)).into_iter().collect();
        for entry in fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten() {
            let name = entry.file_name();
            let kib = name.to_str().and_then(|n| {
                n.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<usize>().ok()
            });
            let Some(bytes) = kib.and_then(|k| k.checked_mul(1024)).filter(|&b| b > 0) else {
                continue;
            };
            // MAP_HUGE_SHIFT, include/uapi/asm-generic/hugetlb_encode.h.
            let device = memfd_device(libc::MFD_HUGETLB | bytes.ilog2() << 26);
            found.extend(device.map(|d| (d, Backing::Hugetlb(bytes))));
        }
        found
    })
}

fn memfd_device(flags: u32) -> Option<(u32, u32)> {
    // SAFETY: the name is a C string; the call makes a new, empty file.
    let raw =
        unsafe { libc::memfd_create(c"pageferry-device".as_ptr(), flags | libc::MFD_CLOEXEC) };
    Errno::result(raw.into()).ok()?;
    // SAFETY: the kernel has just made this descriptor; nobody else knows of it.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: an all-zero stat is a valid one, and the kernel writes the one it is given.
    let stat = unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        Errno::result(libc::fstat(fd.as_raw_fd(), &mut stat).into()).ok()?;
        stat
    };
    Some((libc::major(stat.st_dev), libc::minor(stat.st_dev)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_tell_shared_memory_and_huge_pages_from_files() {
        let line = |kind: &str, options: &str| {
            format!("36 35 0:24 / /mnt rw,noatime shared:1 - {kind} source {options}")
        };
        let device = (0, 24);
        assert_eq!(mount(&line("tmpfs", "rw")), Some((device, Backing::SharedMemory)));
        let huge = mount(&line("hugetlbfs", "rw,pagesize=2M"));
        assert_eq!(huge, Some((device, Backing::Hugetlb(2 << 20))));
        assert_eq!(mount(&line("ext4", "rw")), None);
        assert_eq!(mount("garbage"), None);
    }

    #[test]
    fn the_zero_device_is_known_by_what_it_is_not_by_its_name() {
        assert!(matches!(zero("/dev/zero"), Some((_, Backing::Zero(_)))));
        assert_eq!([zero("/dev/null"), zero("/proc/self/status"), zero("/no/such")], [None; 3]);
    }

    #[test]
    fn the_device_of_shared_anonymous_memory_is_known() {
        assert!(internal_mounts().iter().any(|(_, b)| *b == Backing::SharedMemory));
    }
}
