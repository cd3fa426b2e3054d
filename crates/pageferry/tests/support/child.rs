//! Child processes for the tests of the kernel path: forked, with memory of a kind, asleep.
//!
//! What a child does after the fork is system calls and plain memory accesses only: the test
//! program has other threads, whose locks nobody releases in the child.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use std::cell::Cell;
use std::ops::Range;
use std::path::PathBuf;
use std::ptr::{null_mut, with_exposed_provenance_mut};

const HUGE: usize = 2 << 20;

/// An address and a length.
pub type Memory = (usize, usize);

/// A child process; it is killed when this is dropped.
#[derive(Debug)]
pub struct Child {
    pub pid: u32,
    memory: Memory,
}

impl Child {
    /// A child that has called `setup`, and sleeps.
    pub fn with(setup: impl FnOnce() -> Memory) -> Self {
        Self::start(setup, || {
            // SAFETY: no preconditions.
            unsafe { libc::pause() };
        })
    }

    /// A child that does this again and again.
    pub fn with_loop(body: impl Fn()) -> Self {
        Self::start(|| (0, 0), body)
    }

    /// A child that has called `setup`, and whose first thread then ended; another one sleeps.
    pub fn with_last_thread(setup: impl FnOnce() -> Memory) -> Self {
        let child = Self::start(setup, || {
            // SAFETY: the new thread shares everything, runs on a stack of its own that nobody
            // else uses, and only sleeps; the first one ends alone.
            unsafe {
                let stack = map(1 << 16, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
                let flags = libc::CLONE_VM
                    | libc::CLONE_FS
                    | libc::CLONE_FILES
                    | libc::CLONE_SIGHAND
                    | libc::CLONE_THREAD;
                let top = with_exposed_provenance_mut(stack + (1 << 16));
                must(libc::clone(asleep, top, flags, null_mut()) > 0);
                libc::syscall(libc::SYS_exit, 0);
            }
        });
        let first = format!("/proc/{}/stat", child.pid);
        while !std::fs::read_to_string(&first).expect("our child").contains(") Z ") {
            std::thread::yield_now();
        }
        child
    }

    /// A child that has called `setup`, and does this with its memory again and again.
    pub fn with_work(setup: impl FnOnce() -> Memory, body: impl Fn(Memory)) -> Self {
        let memory = Cell::new((0, 0));
        let keep = || {
            memory.set(setup());
            memory.get()
        };
        Self::start(keep, || body(memory.get()))
    }

    /// As [`Child::with`], with this pid. `None`: it is taken, or may not be chosen
    /// (`CAP_CHECKPOINT_RESTORE`).
    pub fn with_pid(pid: u32, setup: impl FnOnce() -> Memory) -> Option<Self> {
        Self::start_as(Some(pid), setup, || {
            // SAFETY: no preconditions.
            unsafe { libc::pause() };
        })
    }

    fn start(setup: impl FnOnce() -> Memory, body: impl Fn()) -> Self {
        let child = Self::start_as(None, setup, body);
        child.unwrap_or_else(|| panic!("fork: {}", std::io::Error::last_os_error()))
    }

    fn start_as(
        wanted: Option<u32>,
        setup: impl FnOnce() -> Memory,
        body: impl Fn(),
    ) -> Option<Self> {
        let mut pipe = [0; 2];
        // SAFETY: the kernel writes two descriptors.
        assert_eq!(unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
        // SAFETY: the child makes system calls and accesses memory of its own, and never returns.
        let pid = unsafe { fork(wanted) };
        let mut told = [0usize; 2];
        let size = size_of_val(&told);
        if pid == 0 {
            // SAFETY: system calls; the buffer is as long as is said.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                let (start, len) = setup();
                let told = [start, len];
                libc::write(pipe[1], told.as_ptr().cast(), size);
            }
            loop {
                body();
            }
        }
        // SAFETY: the buffer is as long as is said; the descriptors are ours.
        let read = unsafe {
            libc::close(pipe[1]);
            let read = libc::read(pipe[0], told.as_mut_ptr().cast(), size);
            libc::close(pipe[0]);
            read
        };
        let child = Self { pid: u32::try_from(pid).ok()?, memory: (told[0], told[1]) };
        assert_eq!(usize::try_from(read).ok(), Some(size), "the child could not be set up");
        Some(child)
    }

    /// The memory that it was set up with.
    pub fn range(&self) -> Range<usize> {
        self.memory.0..self.memory.0 + self.memory.1
    }

    fn id(&self) -> i32 {
        i32::try_from(self.pid).expect("positive")
    }

    /// Stops it as a debugger does, until the result is dropped. `None`: not allowed.
    pub fn trace(&self) -> Option<Traced> {
        let pid = self.id();
        // SAFETY: ptrace of our own child; it takes no memory of ours here.
        unsafe {
            let none = null_mut::<libc::c_void>();
            if libc::ptrace(libc::PTRACE_SEIZE, pid, none, none) != 0 {
                return None;
            }
            libc::ptrace(libc::PTRACE_INTERRUPT, pid, none, none);
            let mut status = 0;
            libc::waitpid(pid, &raw mut status, libc::__WALL);
            assert!(libc::WIFSTOPPED(status));
        }
        Some(Traced(pid))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: a child of ours that nobody has waited for.
        unsafe {
            libc::kill(self.id(), libc::SIGKILL);
            libc::waitpid(self.id(), null_mut(), libc::__WALL);
        }
    }
}

/// A child that is stopped.
#[derive(Debug)]
pub struct Traced(i32);

impl Drop for Traced {
    fn drop(&mut self) {
        let none = null_mut::<libc::c_void>();
        // SAFETY: traced by this thread.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, none, none) };
    }
}

extern "C" fn asleep(_: *mut libc::c_void) -> libc::c_int {
    loop {
        // SAFETY: no preconditions.
        unsafe { libc::pause() };
    }
}

/// `fork(2)`, with this pid where one is wanted (`clone3(2)`, Linux 5.5). -1: errno says why not.
///
/// # Safety
/// The child makes system calls and accesses memory of its own only.
unsafe fn fork(wanted: Option<u32>) -> i32 {
    let Some(pid) = wanted.and_then(|pid| libc::pid_t::try_from(pid).ok()) else {
        // SAFETY: as the caller promises.
        return unsafe { libc::fork() };
    };
    // SAFETY: a struct of numbers.
    let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
    how.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    how.set_tid = (&raw const pid).addr() as u64;
    how.set_tid_size = 1;
    let _ = (&raw const pid).expose_provenance();
    // SAFETY: without flags this is a fork; the kernel reads `how`, and `pid` through it.
    let made = unsafe { libc::syscall(libc::SYS_clone3, &raw const how, size_of_val(&how)) };
    i32::try_from(made).unwrap_or(-1)
}

/// Ends a child that cannot be set up.
pub fn must(ok: bool) {
    if !ok {
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(1) };
    }
}

pub fn map(len: usize, protection: i32, flags: i32, file: i32) -> usize {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { libc::mmap(null_mut(), len, protection, flags, file, 0) };
    must(at != libc::MAP_FAILED);
    at.expose_provenance()
}

/// Writes to every page.
pub fn touch(memory: Memory) -> Memory {
    for at in (memory.0..memory.0 + memory.1).step_by(4096) {
        // SAFETY: the caller's mapping, writable.
        unsafe { with_exposed_provenance_mut::<usize>(at).write_volatile(at) };
    }
    memory
}

pub const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Private anonymous memory, all touched.
pub fn anonymous(len: usize, huge: bool) -> Memory {
    let at = map(len + HUGE, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    let start = at.next_multiple_of(HUGE);
    let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    // SAFETY: advice for the mapping just made.
    unsafe { libc::madvise(with_exposed_provenance_mut(start), len, advice) };
    touch((start, len))
}

/// From now on this is only for reading.
pub fn protect(at: usize, len: usize) {
    // SAFETY: the caller's mapping, which it does not write to here any more.
    let done = unsafe { libc::mprotect(with_exposed_provenance_mut(at), len, libc::PROT_READ) };
    must(done == 0);
}

/// A mapping with these flags, all touched.
pub fn shared(len: usize, flags: i32, file: i32) -> Memory {
    touch((map(len, RW, flags, file), len))
}

pub fn unmap(memory: Memory) {
    // SAFETY: the caller's mapping, which it does not use any more.
    unsafe { libc::munmap(with_exposed_provenance_mut(memory.0), memory.1) };
}

pub fn memfd(len: usize) -> Memory {
    // SAFETY: the name is a C string; a new file of our own.
    let file = unsafe { libc::memfd_create(c"pageferry-test".as_ptr(), 0) };
    must(file >= 0);
    let size = i64::try_from(len).expect("small");
    // SAFETY: as above.
    must(unsafe { libc::ftruncate(file, size) } == 0);
    shared(len, libc::MAP_SHARED, file)
}

/// Moves the program break, and touches what that adds.
pub fn grow_heap(len: usize) -> Memory {
    // SAFETY: the child's own break, which nothing else moves after the fork.
    let start = unsafe { libc::syscall(libc::SYS_brk, 0) };
    let start = usize::try_from(start).expect("an address").next_multiple_of(4096);
    // SAFETY: as above.
    let end = unsafe { libc::syscall(libc::SYS_brk, start + len) };
    must(usize::try_from(end).ok() == Some(start + len));
    touch((start, len))
}

/// Locks memory.
pub fn locked(memory: Memory) -> Memory {
    // SAFETY: the child's own mapping.
    must(unsafe { libc::mlock(with_exposed_provenance_mut(memory.0), memory.1) } == 0);
    memory
}

/// Maps, touches and unmaps a megabyte.
pub fn map_and_unmap() {
    unmap(shared(1 << 20, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1));
}

/// So many mappings spread over `len` bytes; every second one is writable and has one page.
pub fn sparse(mappings: usize, len: usize) -> Memory {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let start = map(len, libc::PROT_NONE, flags, -1);
    let stride = (len / mappings) & !4095;
    for at in (1..mappings).step_by(2).map(|i| start + i * stride) {
        // SAFETY: a part of the mapping just made.
        let done = unsafe { libc::mprotect(with_exposed_provenance_mut(at), stride, RW) };
        if done != 0 {
            break;
        }
        touch((at, 4096));
    }
    (start, len)
}

/// A child of this child, and so on, `depth` deep, each with so much memory. When one ends those
/// below it end too.
pub fn chain(depth: usize, len: usize) -> Memory {
    let memory = anonymous(len, false);
    if depth == 0 {
        return memory;
    }
    let mut pipe = [0; 2];
    let mut byte = [0u8];
    // SAFETY: system calls; the buffers are as long as is said. The new child never returns.
    unsafe {
        must(libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) == 0);
        let pid = libc::fork();
        must(pid >= 0);
        if pid == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            chain(depth - 1, len);
            libc::write(pipe[1], byte.as_ptr().cast(), 1);
            loop {
                libc::pause();
            }
        }
        libc::close(pipe[1]);
        must(libc::read(pipe[0], byte.as_mut_ptr().cast(), 1) == 1);
        libc::close(pipe[0]);
    }
    memory
}

/// A cgroup with one group below it; removed when dropped.
#[derive(Debug)]
pub struct Group {
    pub path: PathBuf,
}

impl Group {
    /// `None`: none can be made here.
    pub fn new() -> Option<Self> {
        let mounts = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/memory"];
        mounts.iter().find_map(|mount| {
            let path = PathBuf::from(mount);
            if !path.join("cgroup.procs").exists() {
                return None;
            }
            let path = path.join(format!("pageferry-test-{}", std::process::id()));
            std::fs::create_dir_all(path.join("below")).ok().map(|()| Self { path })
        })
    }

    /// Puts a process into the group, or one below it.
    pub fn join(&self, below: &str, pid: u32) -> bool {
        std::fs::write(self.path.join(below).join("cgroup.procs"), pid.to_string()).is_ok()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The kernel may take a moment to let go of processes that have ended.
        for _ in 0..100 {
            let _ = std::fs::remove_dir(self.path.join("below"));
            if std::fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}
