//! What `/proc` and the cgroup file system tell about other processes: their mappings, one at a
//! time; what they are; who belongs together.
//!
//! What always holds:
//! - A [`ProcDir`] is one process for as long as it is open. When the process is gone its files
//!   say `ESRCH`, whoever has its number by then.
//! - Mappings are read as a stream ([`Maps`]): memory does not grow with their number.
//! - Text that makes no sense is `EIO`, never a guess.
//!
//! Source: `proc(5)`, `Documentation/filesystems/proc.rst`,
//! `Documentation/admin-guide/cgroup-v2.rst`.

use crate::Errno;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// `PF_KTHREAD`, include/linux/sched.h; `/proc/PID/stat` has the flags word.
const PF_KTHREAD: u64 = 0x0020_0000;

pub(crate) fn errno_of(error: &std::io::Error) -> Errno {
    Errno(error.raw_os_error().unwrap_or(libc::EIO))
}

fn open_at(dir: i32, path: &str, flags: i32) -> Result<OwnedFd, Errno> {
    let path = CString::new(path).map_err(|_| Errno(libc::EINVAL))?;
    // SAFETY: the path is a C string that outlives the call.
    let raw = unsafe { libc::openat(dir, path.as_ptr(), flags | libc::O_CLOEXEC) };
    Errno::result(raw.into())?;
    // SAFETY: the kernel has just made this descriptor; nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// The folder `/proc/PID` of one process.
#[derive(Debug)]
pub struct ProcDir(OwnedFd);

impl ProcDir {
    /// Opens the folder of the process, or thread, that has this number now.
    ///
    /// # Errors
    /// `ESRCH`: there is none; `EMFILE`: too many files are open.
    pub fn open(pid: u32) -> Result<Self, Errno> {
        match open_at(libc::AT_FDCWD, &format!("/proc/{pid}"), libc::O_PATH | libc::O_DIRECTORY) {
            Ok(fd) => Ok(Self(fd)),
            Err(Errno(libc::ENOENT)) => Err(Errno(libc::ESRCH)),
            Err(e) => Err(e),
        }
    }

    /// Opens one of its files.
    ///
    /// # Errors
    /// `ESRCH`: the process is gone; `EACCES`, `EPERM`: not ours to read.
    pub fn file(&self, name: &str) -> Result<File, Errno> {
        match open_at(self.0.as_raw_fd(), name, libc::O_RDONLY) {
            Ok(fd) => Ok(File::from(fd)),
            // The folder is there, and so is the file while the process is.
            Err(Errno(libc::ENOENT)) => Err(Errno(libc::ESRCH)),
            Err(e) => Err(e),
        }
    }

    /// Reads one of its files.
    ///
    /// # Errors
    /// As [`ProcDir::file`].
    pub fn read(&self, name: &str) -> Result<Vec<u8>, Errno> {
        let mut bytes = Vec::new();
        self.file(name)?.read_to_end(&mut bytes).map_err(|e| errno_of(&e))?;
        Ok(bytes)
    }

    /// What the process is now.
    ///
    /// # Errors
    /// As [`ProcDir::file`]; `EIO`: the files make no sense.
    pub fn status(&self) -> Result<Status, Errno> {
        let status = self.read("status")?;
        let stat = self.read("stat")?;
        Status::parse(&String::from_utf8_lossy(&status), &String::from_utf8_lossy(&stat))
            .ok_or(Errno(libc::EIO))
    }
}

/// What a process is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Its pid: for a thread, that of its process.
    pub tgid: u32,
    /// The number by which it knows itself: in the pid namespace that it lives in, and of a thread
    /// the thread's.
    pub own_pid: u32,
    /// Its parent's pid.
    pub parent: u32,
    /// The first letter of its state: `R`, `S`, `Z`, ...
    pub state: char,
    /// Its name, up to 15 bytes.
    pub name: String,
    /// The effective user.
    pub uid: u32,
    /// How many threads it has.
    pub threads: u64,
    /// When it began, in clock ticks since boot.
    pub started: u64,
    /// Whether it is a kernel thread, which has no memory of its own.
    pub kernel_thread: bool,
    /// Resident private anonymous memory, in bytes; may lag behind by some pages per CPU.
    pub anonymous: u64,
    /// Resident file pages, in bytes.
    pub file: u64,
    /// Resident shared memory, in bytes.
    pub shared_memory: u64,
    /// Hugetlb pages, in bytes.
    pub hugetlb: u64,
    /// Private memory that is swapped out, in bytes (`VmSwap`: no shared memory, no markers); may lag
    /// behind as the others do.
    pub swapped: u64,
    /// The nodes that its cpuset allows, as a list like `0-1,3`; empty where not told.
    pub nodes_allowed: String,
}

impl Status {
    /// Whether it has ended and only waits for its parent (`Z`, `X`).
    pub fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }

    fn parse(status: &str, stat: &str) -> Option<Self> {
        let value = |key: &str| status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        let number = |key: &str| value(key)?.split_whitespace().next()?.parse::<u64>().ok();
        let small = |key: &str| u32::try_from(number(key)?).ok();
        let kib = |key: &str| number(key).unwrap_or(0).saturating_mul(1024);
        // After the name, which may contain anything, in parentheses: field 3 is the state.
        let (_, after) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = after.split_ascii_whitespace().collect();
        let field = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
        let tgid = small("Tgid")?;
        // One for each pid namespace, the innermost last; kernels without them have no such line.
        let own =
            value("NSpid").and_then(|numbers| numbers.split_whitespace().last()?.parse().ok());
        Some(Self {
            tgid,
            own_pid: own.unwrap_or(tgid),
            parent: small("PPid")?,
            state: value("State")?.trim_start().chars().next()?,
            name: value("Name")?.trim().to_owned(),
            uid: value("Uid")?.split_whitespace().nth(1)?.parse().ok()?,
            threads: number("Threads")?,
            started: field(22)?,
            kernel_thread: field(9)? & PF_KTHREAD != 0,
            anonymous: kib("RssAnon"),
            file: kib("RssFile"),
            shared_memory: kib("RssShmem"),
            hugetlb: kib("HugetlbPages"),
            swapped: kib("VmSwap"),
            nodes_allowed: value("Mems_allowed_list").unwrap_or("").trim().to_owned(),
        })
    }
}

/// A mapping, as a line of `/proc/PID/maps` has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: usize,
    /// One past the last address.
    pub end: usize,
    /// Whether changes are seen by other mappings of the same object.
    pub shared: bool,
    /// Offset of its start in the mapped object, in bytes.
    pub offset: u64,
    /// Device of the mapped object, major and minor.
    pub device: (u32, u32),
    /// Its inode; 0 for private anonymous memory.
    pub inode: u64,
    /// What the kernel calls it: a path, `[heap]`, or nothing. What is not UTF-8 is replaced.
    pub name: String,
}

impl Vma {
    /// Its addresses.
    pub fn range(&self) -> Range<usize> {
        self.start..self.end
    }

    /// Takes over a line of maps. `None`: not such a line.
    fn read(&mut self, line: &[u8]) -> Option<()> {
        let mut fields = line.splitn(6, |&b| b == b' ');
        let mut field = || std::str::from_utf8(fields.next()?).ok();
        let hex = |text: &str| usize::from_str_radix(text, 16).ok();
        let (start, end) = field()?.split_once('-')?;
        (self.start, self.end) = (hex(start)?, hex(end)?);
        self.shared = field()?.as_bytes().get(3) == Some(&b's');
        self.offset = u64::from_str_radix(field()?, 16).ok()?;
        let (major, minor) = field()?.split_once(':')?;
        self.device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
        self.inode = field()?.parse().ok()?;
        self.name.clear();
        let name = fields.next().unwrap_or_default();
        self.name.push_str(String::from_utf8_lossy(name).trim_start_matches(' '));
        Some(())
    }
}

/// The mappings of a process, in ascending order, as a stream.
pub trait ReadMaps: Send + std::fmt::Debug {
    /// Writes the next mapping to `vma`; `false` at the end, or when the address space is gone.
    ///
    /// # Errors
    /// What reading says; `EIO`: a line makes no sense.
    fn next(&mut self, vma: &mut Vma) -> Result<bool, Errno>;
}

/// An open `/proc/PID/maps`. It belongs to the address space that the process had when it was
/// opened: after exec it is at its end.
#[derive(Debug)]
pub struct Maps<R = File> {
    reader: BufReader<R>,
    line: Vec<u8>,
}

impl<R: Read> Maps<R> {
    /// Reads mappings from a file in the format of maps.
    pub fn new(file: R) -> Self {
        // The kernel gives at most a page of lines for each read.
        Self { reader: BufReader::with_capacity(crate::page_size(), file), line: Vec::new() }
    }
}

impl<R: Read + Send + std::fmt::Debug> ReadMaps for Maps<R> {
    fn next(&mut self, vma: &mut Vma) -> Result<bool, Errno> {
        self.line.clear();
        match self.reader.read_until(b'\n', &mut self.line) {
            Ok(0) => Ok(false),
            Ok(_) => {
                let line = self.line.strip_suffix(b"\n").unwrap_or(&self.line);
                vma.read(line).map(|()| true).ok_or(Errno(libc::EIO))
            }
            // The process is gone.
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(false),
            Err(e) => Err(errno_of(&e)),
        }
    }
}

/// Whether `/proc` is that of the caller's own pid namespace, so that the numbers in it are those
/// that system calls take. Where there is no `/proc` at all it is not another's.
pub fn is_own() -> bool {
    match fs::read_link("/proc/self") {
        Ok(own) => {
            let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
            is_own_number(&own.to_string_lossy(), std::process::id(), &status)
        }
        // The link is there, and leads nowhere: who asks is not in that namespace.
        Err(_) => fs::symlink_metadata("/proc/self").is_err(),
    }
}

/// Whether a `/proc` that has the caller under this name is of its own namespace. `NSpid` has a
/// number for each namespace from that of `/proc` on down to the caller's own (4.1;
/// fs/proc/array.c, `task_state`): one, if they are the same. Numbers alone may agree by chance.
fn is_own_number(name: &str, pid: u32, status: &str) -> bool {
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    name.parse() == Ok(pid) && numbers.is_none_or(|n| n.split_whitespace().count() == 1)
}

/// The parent of every process: pairs of a pid and its parent's.
///
/// # Errors
/// `/proc` cannot be read.
pub fn parents() -> Result<Vec<(u32, u32)>, Errno> {
    let mut pairs = Vec::new();
    for entry in fs::read_dir("/proc").map_err(|e| errno_of(&e))? {
        let name = entry.map_err(|e| errno_of(&e))?.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        // A process that ends while the list is read is not in it.
        let Ok(stat) = fs::read(format!("/proc/{pid}/stat")) else { continue };
        let stat = String::from_utf8_lossy(&stat);
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, after)| after.split_ascii_whitespace().nth(1)?.parse().ok());
        pairs.extend(parent.map(|parent| (pid, parent)));
    }
    Ok(pairs)
}

/// The folder of a cgroup: `path` itself if it is one, else below where cgroup v2, or the memory
/// controller of v1, is usually mounted. `None`: there is no such group.
pub fn find_group(path: &Path) -> Option<PathBuf> {
    let is_group = |p: &Path| p.join("cgroup.procs").exists();
    if path.is_absolute() && is_group(path) {
        return Some(path.to_path_buf());
    }
    let relative = path.strip_prefix("/").unwrap_or(path);
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/memory"]
        .iter()
        .map(|mount| Path::new(mount).join(relative))
        .find(|p| is_group(p))
}

/// Adds the pids of all processes in a cgroup and the groups below it.
///
/// # Errors
/// The group itself cannot be read. Groups below it may come and go meanwhile.
pub fn members(group: &Path, pids: &mut Vec<u32>) -> Result<(), Errno> {
    let list = match fs::read_to_string(group.join("cgroup.procs")) {
        // A threaded group names its threads only.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            fs::read_to_string(group.join("cgroup.threads"))
        }
        list => list,
    }
    .map_err(|e| errno_of(&e))?;
    // 0 stands for a process of another pid namespace, which cannot be named here.
    pids.extend(list.lines().filter_map(|l| l.trim().parse::<u32>().ok()).filter(|&p| p != 0));
    let Ok(entries) = fs::read_dir(group) else { return Ok(()) };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            match members(&entry.path(), pids) {
                Err(Errno(libc::ENOENT | libc::ENODEV)) | Ok(()) => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read_one_by_one_whatever_their_names() {
        let text: &[u8] = b"00400000-00401000 r-xp 00001000 fe:0a 4711                       \
            /tmp/a b\n7f00-7f10 rw-s 00000000 00:01 9    /dev/zero (deleted)\n\
            7f20-7f30 rw-p 00000000 00:00 0 \n7f30-7f40 rw-p 00000000 00:00 0   [heap]\n";
        let mut maps = Maps::new(text);
        let mut vma = Vma::default();
        let mut seen = Vec::new();
        while maps.next(&mut vma).expect("well formed") {
            seen.push(vma.clone());
        }
        assert_eq!(seen.len(), 4);
        assert_eq!((seen[0].start, seen[0].end, seen[0].offset), (0x40_0000, 0x40_1000, 0x1000));
        assert_eq!((seen[0].device, seen[0].inode, seen[0].shared), ((0xfe, 10), 4711, false));
        assert_eq!(seen[0].name, "/tmp/a b");
        assert!(seen[1].shared && seen[1].name == "/dev/zero (deleted)");
        assert_eq!(seen[2].name, "");
        assert_eq!(seen[3].name, "[heap]");
    }

    #[test]
    fn a_line_that_is_none_is_an_error_not_a_guess() {
        for text in ["what\n", "1000-zz rw-p 0 0:0 0\n", "1000-2000 rw-p 0 0 0\n"] {
            let result = Maps::new(text.as_bytes()).next(&mut Vma::default());
            assert_eq!(result, Err(Errno(libc::EIO)), "{text:?}");
        }
    }

    #[test]
    fn the_name_of_a_process_cannot_shift_the_fields_of_its_stat() {
        let status = "Name:\ta) R 1\nState:\tS (sleeping)\nTgid:\t7\nPPid:\t3\n\
            Uid:\t1\t2\t3\t4\nNSpid:\t7\t1\nThreads:\t5\nRssAnon:\t  8 kB\nVmSwap:\t 12 kB\nMems_allowed_list:\t0-1\n";
        let stat = "7 (a) R 1) S 3 7 7 0 -1 2097152 0 0 0 0 0 0 0 0 20 0 5 0 12345 0 0";
        let parsed = Status::parse(status, stat).expect("well formed");
        assert_eq!((parsed.tgid, parsed.parent, parsed.uid, parsed.threads), (7, 3, 2, 5));
        assert_eq!(parsed.own_pid, 1);
        assert_eq!((parsed.started, parsed.kernel_thread, parsed.state), (12345, true, 'S'));
        assert_eq!((parsed.anonymous, parsed.swapped), (8192, 12288));
        assert_eq!(parsed.nodes_allowed, "0-1");
        assert_eq!(Status::parse(status, "7 (a"), None);
    }

    #[test]
    fn a_procfs_of_another_pid_namespace_is_told_even_where_numbers_agree() {
        assert!(is_own_number("7", 7, "Name:\tx\nNSpid:\t7\n"));
        assert!(is_own_number("7", 7, "Name:\tx\n"), "a kernel without pid namespaces");
        assert!(!is_own_number("4711", 7, "NSpid:\t4711\t7\n"));
        assert!(!is_own_number("7", 7, "NSpid:\t7\t7\n"));
        assert!(is_own());
    }

    #[test]
    fn a_process_that_has_ended_is_gone_from_its_folder() {
        let mut child = std::process::Command::new("true").spawn().expect("true is everywhere");
        let dir = ProcDir::open(child.id()).expect("not waited for yet");
        child.wait().expect("ours");
        assert_eq!(dir.status(), Err(Errno(libc::ESRCH)));
        let own = ProcDir::open(std::process::id()).and_then(|d| d.status()).expect("ourselves");
        assert_eq!(own.tgid, std::process::id());
        assert!(!own.is_dead() && !own.kernel_thread);
        assert!(parents().expect("procfs").contains(&(own.tgid, own.parent)));
    }
}
