//! Calls that are given memory, or an address in it, to read and write.

use super::call::{Call, WAITS, differs, said, sys};
use super::stage::{Spot, digest, is_intact};
use crate::support::siege::ptr;
use io_uring::{IoUring, opcode, types};
use pageferry_sys::page_size;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

/// Bytes that are none of the stage's.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251).to_le_bytes()[0] ^ 0x5A).collect()
}

/// A file in memory that holds the pattern.
fn file(len: usize) -> File {
    // SAFETY: a fresh descriptor.
    let fd = unsafe { libc::memfd_create(c"pattern".as_ptr(), libc::MFD_CLOEXEC) };
    // SAFETY: it is ours.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.write_all_at(&pattern(len), 0).expect("room in memory");
    file
}

fn sockets() -> (UnixStream, UnixStream) {
    UnixStream::pair().expect("sockets")
}

/// What arrived, in a number.
fn arrived(mut from: impl Read, len: i64) -> i64 {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    if from.read_exact(&mut bytes).is_ok() { digest(&bytes) } else { -1 }
}

fn vector(s: &Spot) -> libc::iovec {
    libc::iovec { iov_base: ptr(s.at), iov_len: s.len }
}

fn message(vector: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: zeros are a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (vector, 1);
    message
}

/// The first word of the spot.
fn word(s: &Spot) -> &'static AtomicU32 {
    // SAFETY: the spot's own memory; only atomics are used on this word.
    unsafe { AtomicU32::from_ptr(ptr(s.at).cast()) }
}

fn set(s: &Spot, value: u32) {
    word(s).store(value, Ordering::Relaxed);
}

/// Puts a string to the spot.
fn put(s: &Spot, text: &std::ffi::CStr) {
    // SAFETY: the spot is longer than the string.
    unsafe { libc::strcpy(ptr(s.at).cast(), text.as_ptr()) };
}

fn pipe_read(s: &Spot) -> Vec<i64> {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    writer.write_all(&pattern(s.len)).expect("room in the pipe");
    vec![sys!(libc::SYS_read, reader.as_raw_fd(), s.at, s.len)]
}

fn pipe_write(s: &Spot) -> Vec<i64> {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let written = sys!(libc::SYS_write, writer.as_raw_fd(), s.at, s.len);
    vec![written, arrived(reader, written)]
}

/// Lends the pages to a pipe.
fn vmsplice(s: &Spot) -> Vec<i64> {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let vector = vector(s);
    let lent = sys!(libc::SYS_vmsplice, writer.as_raw_fd(), &raw const vector, 1usize, 0);
    vec![lent, arrived(reader, lent)]
}

/// Lends the pages to a connection.
fn zero_copy(s: &Spot) -> Vec<i64> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = listener.local_addr().expect("bound");
    let sender = std::net::TcpStream::connect(address).expect("loopback");
    let (receiver, _) = listener.accept().expect("loopback");
    let one = 1;
    let (fd, size) = (sender.as_raw_fd(), size_of::<i32>());
    let asked = sys!(libc::SYS_setsockopt, fd, libc::SOL_SOCKET, 60, &raw const one, size); // SO_ZEROCOPY
    let sent = sys!(libc::SYS_sendto, fd, s.at, s.len, 0x400_0000, 0usize, 0usize); // MSG_ZEROCOPY
    vec![asked, sent, arrived(receiver, sent)]
}

fn process_vm(s: &Spot, number: libc::c_long) -> Vec<i64> {
    let mut bytes = pattern(s.len);
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: s.len };
    let remote = vector(s);
    let pid = std::process::id();
    let done = sys!(number, pid, &raw const local, 1usize, &raw const remote, 1usize, 0);
    vec![done, digest(&bytes)]
}

/// Through `/proc/self/mem`.
fn memory_file(s: &Spot, write: bool) -> Vec<i64> {
    let file = File::options().read(true).write(true).open("/proc/self/mem").expect("procfs");
    let (mut bytes, fd) = (pattern(s.len), file.as_raw_fd());
    let number = if write { libc::SYS_pwrite64 } else { libc::SYS_pread64 };
    let done = sys!(number, fd, bytes.as_mut_ptr(), s.len, s.at);
    vec![done, digest(&bytes)]
}

/// What that answers about a page that it would have to wait for.
fn io_error(s: &Spot) -> Vec<i64> {
    vec![-5, digest(&pattern(s.len))]
}

fn ring(s: &Spot, fixed: bool) -> Vec<i64> {
    let Ok(mut ring) = IoUring::new(4) else { return vec![] };
    let file = file(s.len);
    let (fd, at) = (types::Fd(file.as_raw_fd()), ptr(s.at).cast::<u8>());
    let len = u32::try_from(s.len).expect("small");
    let entry = if fixed {
        // SAFETY: the spot's own memory, unregistered with the ring.
        let registered = unsafe { ring.submitter().register_buffers(&[vector(s)]) };
        if let Err(e) = registered {
            return vec![-i64::from(e.raw_os_error().unwrap_or(0))];
        }
        opcode::ReadFixed::new(fd, at, len, 0).build()
    } else {
        opcode::Read::new(fd, at, len).build()
    };
    // SAFETY: the buffer is the spot's own.
    unsafe { ring.submission().push(&entry) }.expect("room in the queue");
    ring.submit_and_wait(1).expect("submitted");
    vec![ring.completion().next().map_or(-1, |done| i64::from(done.result()))]
}

fn futex(s: &Spot, operation: i32, value: u32) -> i64 {
    let wait = libc::timespec { tv_sec: 0, tv_nsec: 1000 };
    sys!(libc::SYS_futex, s.at, operation, value, &raw const wait)
}

static SLEEPER: Mutex<Option<JoinHandle<i64>>> = Mutex::new(None);

/// Starts a thread that sleeps at the spot's first word.
fn sleep_at(s: &Spot, operation: i32) {
    set(s, 7);
    let (at, (tell, told)) = (s.at, channel());
    let sleeper = std::thread::spawn(move || {
        // SAFETY: asks for this thread's number.
        let _ = tell.send(unsafe { libc::gettid() });
        sys!(libc::SYS_futex, at, operation, 7, 0usize)
    });
    let state = format!("/proc/self/task/{}/stat", told.recv().expect("it runs"));
    while std::fs::read_to_string(&state).is_ok_and(|text| !text.contains(") S ")) {
        std::thread::yield_now();
    }
    *SLEEPER.lock().expect("not poisoned") = Some(sleeper);
}

/// Wakes the sleeper, as soon as it sleeps.
fn wake(s: &Spot, operation: i32) -> Vec<i64> {
    loop {
        match sys!(libc::SYS_futex, s.at, operation, 1) {
            0 => std::thread::yield_now(),
            woken => return vec![woken],
        }
    }
}

fn slept(_: &Spot) -> Vec<i64> {
    let sleeper = SLEEPER.lock().expect("not poisoned").take().expect("started");
    vec![sleeper.join().expect("a thread that sleeps")]
}

static SIGNALS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_signal(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// Takes a signal on a stack in the spot.
fn signal_stack(s: &Spot) -> Vec<i64> {
    // SAFETY: the spot is a stack of its own until the old one is back; the handler only counts.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK;
        let stack = libc::stack_t { ss_sp: ptr(s.at), ss_flags: 0, ss_size: s.len / 2 };
        let mut old: libc::stack_t = std::mem::zeroed();
        let before = SIGNALS.load(Ordering::Relaxed);
        let told = [
            said(libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut())),
            said(libc::sigaltstack(&raw const stack, &raw mut old)),
            said(libc::raise(libc::SIGUSR2)),
            said(libc::sigaltstack(&raw const old, std::ptr::null_mut())),
        ];
        let taken = SIGNALS.load(Ordering::Relaxed) - before;
        [told.as_slice(), &[said(taken)]].concat()
    }
}

type Parked = (Sender<()>, JoinHandle<i64>);
static PARKED: Mutex<Option<Parked>> = Mutex::new(None);

/// Starts a thread that does `first` with the spot's address now, and `then` when it is told to.
fn park(s: &Spot, first: fn(usize), then: fn(usize) -> i64) {
    let (at, (go, told), (ready, is_ready)) = (s.at, channel::<()>(), channel());
    let thread = std::thread::spawn(move || {
        first(at);
        let _ = ready.send(());
        let _ = told.recv();
        then(at)
    });
    let _ = is_ready.recv();
    *PARKED.lock().expect("not poisoned") = Some((go, thread));
}

fn unpark() -> Vec<i64> {
    let (go, thread) = PARKED.lock().expect("not poisoned").take().expect("started");
    let _ = go.send(());
    vec![thread.join().expect("a thread that ends")]
}

fn own_number(word: &AtomicU32) {
    // SAFETY: asks for this thread's number.
    let own = unsafe { libc::gettid() };
    word.store(u32::try_from(own).expect("positive"), Ordering::Relaxed);
}

/// A list of robust mutexes at `at` (its head: next, offset, pending), one entry behind that, and the
/// mutex, which the thread holds, 8 bytes into the entry: include/uapi/linux/futex.h. The kernel is
/// told last of all: memory that has such a list cannot be adopted.
fn hold_a_robust_mutex(at: usize) {
    // SAFETY: the spot's own memory.
    unsafe {
        let head = ptr(at).cast::<usize>();
        head.write(at + 64);
        head.add(1).write(8);
        head.add(2).write(0);
        head.add(8).write(at);
        own_number(AtomicU32::from_ptr(head.add(9).cast()));
    }
}

fn mutex(s: &Spot) -> &'static AtomicU32 {
    // SAFETY: the mutex from above.
    unsafe { AtomicU32::from_ptr(ptr(s.at + 72).cast()) }
}

/// The holder ends, and the mutex is nobody's.
fn let_it_die_unnoticed(s: &Spot) -> Vec<i64> {
    mutex(s).store(0, Ordering::Relaxed);
    unpark()
}

/// Whether the kernel has marked the mutex as its dead owner's.
fn owner_died(s: &Spot) -> Vec<i64> {
    vec![i64::from(mutex(s).load(Ordering::Relaxed) & 0x4000_0000 != 0)]
}

/// `FUTEX_WAKE_OP` that sets the spot's second word: include/uapi/linux/futex.h.
fn wake_op(s: &Spot) -> Vec<i64> {
    vec![sys!(libc::SYS_futex, s.at, 133, 1, 1usize, s.at + 4, 1 << 12)]
}

/// The thread's restartable sequences live in the spot for a moment (rseq(2)). `ENOSYS` where the C
/// library's own cannot be found to be put aside: in a static program, which looks up no names.
fn restartable(s: &Spot) -> Vec<i64> {
    let symbol = |name: &std::ffi::CStr| {
        // SAFETY: looks a name up; the C library's variables live for ever.
        unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }
    };
    let offset = symbol(c"__rseq_offset").cast::<isize>();
    if offset.is_null() || cfg!(not(target_arch = "x86_64")) {
        return vec![-i64::from(libc::ENOSYS)];
    }
    let number = libc::SYS_rseq;
    // SAFETY: on x86-64 glibc's thread pointer is the value of `pthread_self`, and the offset is a
    // variable of glibc's.
    let (thread, offset) = unsafe { (libc::pthread_self(), *offset) };
    let own = usize::try_from(thread).unwrap_or(0).wrapping_add_signed(offset);
    let sign = 0x5305_3053u32;
    let left = sys!(number, own, 32u32, 1, sign);
    if left != 0 {
        return vec![left];
    }
    let here = sys!(number, s.at, 32u32, 0, sign);
    std::thread::yield_now();
    vec![here, sys!(number, s.at, 32u32, 1, sign), sys!(number, own, 32u32, 0, sign)]
}

/// The exit status of a child.
fn status_of(pid: i64) -> i64 {
    let mut status = 0;
    let pid = libc::pid_t::try_from(pid).unwrap_or(-1);
    // SAFETY: waits for a child; the kernel writes the status.
    if pid <= 0 || unsafe { libc::waitpid(pid, &raw mut status, 0) } != pid {
        return -1;
    }
    i64::from(status)
}

/// Whether all pages of the spot are as they were. Allocates nothing.
fn intact(s: &Spot) -> bool {
    (s.at..s.at + s.len).step_by(page_size()).all(is_intact)
}

/// A child by fork(3), which looks at the spot.
fn fork(s: &Spot) -> Vec<i64> {
    // SAFETY: the child reads memory and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let code = i32::from(!intact(s));
        // SAFETY: ends the child.
        unsafe { libc::_exit(code) };
    }
    vec![status_of(pid.into())]
}

/// A child by the system call, past the C library's hooks; its arguments are where `arguments` says.
fn clone3(s: &Spot, arguments: usize) -> Vec<i64> {
    // SAFETY: as fork; the child only reads memory and ends.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, arguments, 64usize) };
    if pid == 0 {
        let code = i32::from(!intact(s));
        // SAFETY: ends the child.
        unsafe { libc::_exit(code) };
    }
    vec![status_of(pid)]
}

/// `clone_args` (include/uapi/linux/sched.h): a child whose end is told by SIGCHLD.
fn plain_child() -> [u64; 8] {
    [0, 0, 0, 0, libc::SIGCHLD.unsigned_abs().into(), 0, 0, 0]
}

/// Starts `true`: its path and its argument are in the spot. The C library does this by vfork and
/// execve.
fn spawn(s: &Spot) -> Vec<i64> {
    let (path, mut pid) = (ptr(s.at).cast(), 0);
    let (arguments, environment) = ([path, std::ptr::null_mut()], [path, std::ptr::null_mut()]);
    // SAFETY: strings and lists as posix_spawn(3) wants them.
    let done = unsafe {
        libc::posix_spawn(
            &raw mut pid,
            path,
            std::ptr::null(),
            std::ptr::null(),
            arguments.as_ptr(),
            environment.as_ptr(),
        )
    };
    vec![i64::from(done), status_of(pid.into())]
}

fn path_of_true(s: &Spot) {
    let path =
        if std::path::Path::new("/bin/true").exists() { c"/bin/true" } else { c"/usr/bin/true" };
    put(s, path);
}

pub(crate) const BUFFERS: &[Call] = &[
    Call::waits("read from a pipe", pipe_read),
    Call::waits("write to a pipe", pipe_write),
    Call::waits("pread", |s| {
        vec![sys!(libc::SYS_pread64, file(s.len).as_raw_fd(), s.at, s.len, 0)]
    }),
    Call::waits("readv", |s| {
        let vector = vector(s);
        vec![sys!(libc::SYS_readv, file(s.len).as_raw_fd(), &raw const vector, 1)]
    }),
    Call::waits("pwrite", |s| {
        let file = file(s.len);
        let written = sys!(libc::SYS_pwrite64, file.as_raw_fd(), s.at, s.len, 0);
        vec![written, arrived(&file, written)]
    }),
    Call::waits("send", |s| {
        let (from, to) = sockets();
        let sent = sys!(libc::SYS_sendto, from.as_raw_fd(), s.at, s.len, 0, 0usize, 0usize);
        vec![sent, arrived(to, sent)]
    }),
    Call::waits("recv", |s| {
        let (mut from, to) = sockets();
        from.write_all(&pattern(s.len)).expect("room in the socket");
        let all = libc::MSG_WAITALL;
        vec![sys!(libc::SYS_recvfrom, to.as_raw_fd(), s.at, s.len, all, 0usize, 0usize)]
    }),
    Call::waits("sendmsg", |s| {
        let ((from, to), mut vector) = (sockets(), vector(s));
        let message = message(&mut vector);
        let sent = sys!(libc::SYS_sendmsg, from.as_raw_fd(), &raw const message, 0);
        vec![sent, arrived(to, sent)]
    }),
    Call::waits("recvmsg", |s| {
        let ((mut from, to), mut vector) = (sockets(), vector(s));
        from.write_all(&pattern(s.len)).expect("room in the socket");
        let mut message = message(&mut vector);
        vec![sys!(libc::SYS_recvmsg, to.as_raw_fd(), &raw mut message, libc::MSG_WAITALL)]
    }),
    Call::waits("process_vm_readv", |s| process_vm(s, libc::SYS_process_vm_readv)),
    Call::waits("process_vm_writev", |s| process_vm(s, libc::SYS_process_vm_writev)),
    // Beside moves a page may be missing behind some that are there: then it is those.
    Call::new("/proc/self/mem, read", differs(io_error), |s| memory_file(s, false)).once(),
    Call::new("/proc/self/mem, write", differs(io_error), |s| memory_file(s, true))
        .protected(differs(io_error))
        .once(),
    Call::waits("io_uring, read", |s| ring(s, false)),
    Call::waits("io_uring, read to a fixed buffer", |s| ring(s, true)),
    Call::waits("getrandom", |s| vec![sys!(libc::SYS_getrandom, s.at, s.len, 0)]).blind(),
    Call::waits("stat", |s| vec![sys!(libc::SYS_stat, c"/".as_ptr(), s.at)]).blind(),
    Call::waits("open, of a path", |s| {
        let fd = sys!(libc::SYS_openat, libc::AT_FDCWD, s.at, libc::O_PATH);
        vec![sys!(libc::SYS_close, fd)]
    })
    .prepared(|s| put(s, c"/")),
    Call::waits("getcwd", |s| vec![sys!(libc::SYS_getcwd, s.at, s.len)]).blind(),
    Call::waits("poll", |s| vec![sys!(libc::SYS_poll, s.at, 1, 0)]).prepared(|s| set(s, u32::MAX)),
    Call::waits("nanosleep", |s| vec![sys!(libc::SYS_nanosleep, s.at, 0usize)]).prepared(|s| {
        // SAFETY: the spot's own memory.
        unsafe { ptr(s.at).cast::<[u64; 2]>().write([0, 1000]) };
    }),
    Call::waits("futex WAIT for another value", |s| vec![futex(s, 128, 8)]).prepared(|s| set(s, 7)),
    Call::waits("futex WAIT until it times out", |s| vec![futex(s, 128, 7)])
        .prepared(|s| set(s, 7)),
    Call::ever("futex WAKE, private", |s| wake(s, 129)).prepared(|s| sleep_at(s, 128)).then(slept),
    Call::waits("futex WAKE, shared", |s| wake(s, 1)).prepared(|s| sleep_at(s, 0)).then(slept),
    Call::waits("sigaltstack, and a signal", signal_stack).blind(),
    Call::waits("rseq", restartable).blind(),
    Call::waits("fork", fork),
    Call::waits("clone3, arguments in it", |s| clone3(s, s.at))
        .prepared(|s| {
            // SAFETY: the spot's own memory.
            unsafe { ptr(s.at).cast::<[u64; 8]>().write(plain_child()) };
        })
        .once(),
    Call::waits("posix_spawn, arguments in it", spawn).prepared(path_of_true),
];

/// That lend pages, or that differ: only while a move is held.
pub(crate) const LENT: &[Call] = &[
    // The kernel's own way to make a word writable does not wait (fixup_user_fault).
    Call::new("futex LOCK_PI", differs(|_| vec![-14]), |s| {
        vec![sys!(libc::SYS_futex, s.at, 134, 0, 0usize)]
    })
    .protected(differs(|_| vec![-14]))
    .prepared(|s| set(s, 0))
    .blind()
    .once(),
    Call::new("futex UNLOCK_PI", WAITS, |_| unpark())
        .protected(differs(|_| vec![-14]))
        .prepared(|s| {
            park(
                s,
                // SAFETY: the spot's first word.
                |at| own_number(unsafe { AtomicU32::from_ptr(ptr(at).cast()) }),
                |at| sys!(libc::SYS_futex, at, 135, 0, 0usize),
            );
        })
        .blind()
        .once(),
    Call::new("futex WAKE_OP", differs(|_| vec![-14]), wake_op)
        .protected(differs(|_| vec![-14]))
        .once(),
    Call::waits("vmsplice", vmsplice).once(),
    Call::waits("send MSG_ZEROCOPY", zero_copy).once(),
    // The kernel cannot wait at a thread's end, and lets the mutex be.
    Call::new("set_robust_list, and the thread's end", differs(let_it_die_unnoticed), |_| unpark())
        .protected(differs(let_it_die_unnoticed))
        .prepared(|s| {
            let tell = |at| sys!(libc::SYS_set_robust_list, at, 24usize);
            park(s, hold_a_robust_mutex, tell);
        })
        .then(owner_died)
        .blind()
        .once(),
    // The child has holes, which read as zeros.
    Call::new("clone3", differs(|_| vec![0x100]), |s| clone3(s, plain_child().as_ptr().addr()))
        .once(),
];
