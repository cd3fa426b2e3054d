//! userfaultfd: registration, resolution of faults, and `UFFDIO_MOVE`.
//!
//! Source of every number and layout: `include/uapi/linux/userfaultfd.h` (Linux 6.18; the parts
//! used here are unchanged since 6.8, which brought `UFFDIO_MOVE`), and `ioctl_userfaultfd(2)`,
//! `userfaultfd(2)`.

use crate::Errno;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

bitflags::bitflags! {
    /// What a userfaultfd is asked to deliver, or offers (`UFFD_FEATURE_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// Write-protection faults carry a flag of their own.
        const PAGEFAULT_FLAG_WP = 1 << 0;
        /// `mremap` of a registered range is an event.
        const EVENT_REMAP = 1 << 2;
        /// `madvise(MADV_DONTNEED, MADV_FREE, MADV_REMOVE)` is an event, before it is done.
        const EVENT_REMOVE = 1 << 3;
        /// `munmap` of a registered range is an event, after it was done.
        const EVENT_UNMAP = 1 << 6;
        /// `UFFDIO_MOVE` exists (6.8).
        const MOVE = 1 << 16;
    }
}

bitflags::bitflags! {
    /// Which faults a registered range delivers (`UFFDIO_REGISTER_MODE_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Modes: u64 {
        /// Accesses to pages that are not there.
        const MISSING = 1 << 0;
        /// Writes to pages protected by `UFFDIO_WRITEPROTECT`.
        const WP = 1 << 1;
    }
}

const UFFD_API: u64 = 0xAA;
/// `UFFD_USER_MODE_ONLY`: faults raised inside system calls are not delivered (`EFAULT` instead).
const UFFD_USER_MODE_ONLY: i32 = 1;

const fn iowr(nr: u64, size: usize) -> u64 {
    // _IOC(_IOC_READ | _IOC_WRITE, UFFDIO, nr, size), include/uapi/asm-generic/ioctl.h
    (3 << 30) | ((size as u64) << 16) | (UFFD_API << 8) | nr
}
const fn ior(nr: u64, size: usize) -> u64 {
    (2 << 30) | ((size as u64) << 16) | (UFFD_API << 8) | nr
}

const UFFDIO_API: u64 = iowr(0x3F, size_of::<UffdioApi>());
const UFFDIO_REGISTER: u64 = iowr(0x00, size_of::<UffdioRegister>());
const UFFDIO_UNREGISTER: u64 = ior(0x01, size_of::<UffdioRange>());
const UFFDIO_WAKE: u64 = ior(0x02, size_of::<UffdioRange>());
const UFFDIO_COPY: u64 = iowr(0x03, size_of::<UffdioCopy>());
const UFFDIO_ZEROPAGE: u64 = iowr(0x04, size_of::<UffdioZeropage>());
const UFFDIO_MOVE: u64 = iowr(0x05, size_of::<UffdioMove>());
const UFFDIO_WRITEPROTECT: u64 = iowr(0x06, size_of::<UffdioWriteprotect>());
const UFFDIO_CONTINUE: u64 = iowr(0x07, size_of::<UffdioZeropage>());
const UFFDIO_POISON: u64 = iowr(0x08, size_of::<UffdioZeropage>());
/// `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd`: `_IO(0xAA, 0x00)`.
const USERFAULTFD_IOC_NEW: u64 = UFFD_API << 8;

const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}
#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}
#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}
#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}
/// `struct uffdio_zeropage`; `struct uffdio_continue` and `struct uffdio_poison` have the same
/// layout.
#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}
#[repr(C)]
struct UffdioMove {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}
#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}
const _: () = {
    assert!(size_of::<UffdioApi>() == 24);
    assert!(size_of::<UffdioRegister>() == 32);
    assert!(size_of::<UffdioCopy>() == 40);
    assert!(size_of::<UffdioZeropage>() == 32);
    assert!(size_of::<UffdioMove>() == 40);
    assert!(size_of::<UffdioWriteprotect>() == 24);
    assert!(size_of::<RawMsg>() == 32);
};

/// `struct uffd_msg` (packed there; all fields here fall on their natural alignment).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RawMsg {
    event: u8,
    _reserved1: u8,
    _reserved2: u16,
    _reserved3: u32,
    arg: [u64; 3],
}

impl RawMsg {
    /// A message of no event, to fill a buffer for
    /// [`Sys::read_events`](crate::Sys::read_events).
    pub const EMPTY: Self =
        Self { event: 0, _reserved1: 0, _reserved2: 0, _reserved3: 0, arg: [0; 3] };

    /// What the message says; `None` for an event that was not asked for.
    pub fn decode(&self) -> Option<Event> {
        // UFFD_EVENT_*: PAGEFAULT 0x12, FORK 0x13, REMAP 0x14, REMOVE 0x15, UNMAP 0x16.
        // UFFD_PAGEFAULT_FLAG_WRITE 1, _WP 2.
        let at = |i: usize| usize::try_from(self.arg[i]).unwrap_or(usize::MAX);
        match self.event {
            0x12 => Some(Event::Fault {
                addr: at(1),
                write: self.arg[0] & 1 != 0,
                protected: self.arg[0] & 2 != 0,
            }),
            0x14 => Some(Event::Remap { from: at(0), to: at(1), len: at(2) }),
            0x15 => Some(Event::Remove { start: at(0), end: at(1) }),
            0x16 => Some(Event::Unmap { start: at(0), end: at(1) }),
            _ => None,
        }
    }
}

/// A message read from a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread waits at `addr`.
    Fault {
        /// The page's address (exact or rounded down to the page, as the kernel chose).
        addr: usize,
        /// The access was a write.
        write: bool,
        /// The page is there but write-protected; else the page is missing.
        protected: bool,
    },
    /// `mremap` moved `len` bytes.
    Remap {
        /// Old address.
        from: usize,
        /// New address.
        to: usize,
        /// Bytes.
        len: usize,
    },
    /// The range is about to be dropped by `madvise`; its caller waits for this to be read.
    Remove {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
    },
    /// The range was unmapped.
    Unmap {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
    },
}

/// How a userfaultfd was obtained, which decides whose faults it sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Faults raised inside system calls are delivered too.
    Full,
    /// Only faults of user code are delivered; a system call that touches a missing or protected
    /// page fails with `EFAULT`.
    UserModeOnly,
}

/// An open userfaultfd of this process.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Uffd {
    /// Opens a userfaultfd with `features`.
    ///
    /// With [`Rights::Full`] the system call is tried first (it needs `CAP_SYS_PTRACE` or
    /// `vm.unprivileged_userfaultfd=1`), then `/dev/userfaultfd` (it needs its file permission).
    ///
    /// # Errors
    /// `EPERM`/`EACCES`: no rights. `ENOSYS`: kernel without userfaultfd, or seccomp. `EINVAL`: a
    /// feature that this kernel does not have.
    pub(crate) fn open(rights: Rights, features: Features) -> Result<Self, Errno> {
        let this = Self::open_raw(rights)?;
        this.handshake(features)?;
        Ok(this)
    }

    fn open_raw(rights: Rights) -> Result<Self, Errno> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let flags = match rights {
            Rights::Full => flags,
            Rights::UserModeOnly => flags | UFFD_USER_MODE_ONLY,
        };
        // SAFETY: userfaultfd(2) takes flags only and returns a new descriptor or -1.
        let ret = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = match (Errno::result(ret), rights) {
            (Ok(fd), _) => fd,
            (Err(e), Rights::UserModeOnly) => return Err(e),
            (Err(e), Rights::Full) => Self::open_device(flags).map_err(|_| e)?,
        };
        let fd = RawFd::try_from(fd).map_err(|_| Errno(libc::EMFILE))?;
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    fn open_device(flags: i32) -> Result<usize, Errno> {
        use std::os::unix::fs::OpenOptionsExt;
        let device = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open("/dev/userfaultfd")
            .map_err(|e| Errno(e.raw_os_error().unwrap_or(libc::ENOENT)))?;
        // SAFETY: USERFAULTFD_IOC_NEW takes the flags by value and returns a new descriptor.
        let ret = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        Errno::result(ret.into())
    }

    fn handshake(&self, features: Features) -> Result<(), Errno> {
        let mut api = UffdioApi { api: UFFD_API, features: features.bits(), ioctls: 0 };
        self.ioctl(UFFDIO_API, &mut api)
    }

    /// The features that this kernel offers to this process (a descriptor is opened to ask).
    ///
    /// # Errors
    /// `EPERM`, `EACCES`: no rights. `ENOSYS`: no userfaultfd, or a seccomp filter.
    pub fn offered(rights: Rights) -> Result<u64, Errno> {
        let this = Self::open_raw(rights)?;
        let mut api = UffdioApi { api: UFFD_API, features: 0, ioctls: 0 };
        this.ioctl(UFFDIO_API, &mut api)?;
        Ok(api.features)
    }

    fn ioctl<T>(&self, request: u64, arg: &mut T) -> Result<(), Errno> {
        // SAFETY: `arg` is the structure that `request` encodes the size of (asserted above), and
        // outlives the call.
        let ret = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, std::ptr::from_mut(arg)) };
        Errno::result(ret.into()).map(drop)
    }

    pub(crate) fn register(&self, start: usize, len: usize, modes: Modes) -> Result<(), Errno> {
        let range = UffdioRange { start: start as u64, len: len as u64 };
        let mut arg = UffdioRegister { range, mode: modes.bits(), ioctls: 0 };
        self.ioctl(UFFDIO_REGISTER, &mut arg)
    }

    pub(crate) fn unregister(&self, start: usize, len: usize) -> Result<(), Errno> {
        let mut arg = UffdioRange { start: start as u64, len: len as u64 };
        self.ioctl(UFFDIO_UNREGISTER, &mut arg)
    }

    pub(crate) fn wake(&self, start: usize, len: usize) -> Result<(), Errno> {
        let mut arg = UffdioRange { start: start as u64, len: len as u64 };
        self.ioctl(UFFDIO_WAKE, &mut arg)
    }

    pub(crate) fn write_protect(&self, start: usize, len: usize, on: bool) -> Result<(), Errno> {
        let range = UffdioRange { start: start as u64, len: len as u64 };
        let mode = if on { UFFDIO_WRITEPROTECT_MODE_WP } else { 0 };
        self.ioctl(UFFDIO_WRITEPROTECT, &mut UffdioWriteprotect { range, mode })
    }

    pub(crate) fn move_range(&self, dst: usize, src: usize, len: usize) -> Progress {
        let (dst, src) = (dst as u64, src as u64);
        // `moved` starts at zero: the kernel leaves it alone when it refuses the arguments.
        let mut arg = UffdioMove { dst, src, len: len as u64, mode: 0, moved: 0 };
        let ret = self.ioctl(UFFDIO_MOVE, &mut arg);
        Progress::new(ret, arg.moved, len)
    }

    pub(crate) fn copy_range(&self, dst: usize, src: usize, len: usize) -> Progress {
        let (dst, src) = (dst as u64, src as u64);
        let mut arg = UffdioCopy { dst, src, len: len as u64, mode: 0, copy: 0 };
        let ret = self.ioctl(UFFDIO_COPY, &mut arg);
        Progress::new(ret, arg.copy, len)
    }

    pub(crate) fn zero_range(&self, start: usize, len: usize) -> Progress {
        let range = UffdioRange { start: start as u64, len: len as u64 };
        let mut arg = UffdioZeropage { range, mode: 0, zeropage: 0 };
        let ret = self.ioctl(UFFDIO_ZEROPAGE, &mut arg);
        Progress::new(ret, arg.zeropage, len)
    }

    pub(crate) fn poison_range(&self, start: usize, len: usize) -> Progress {
        let range = UffdioRange { start: start as u64, len: len as u64 };
        let mut arg = UffdioZeropage { range, mode: 0, zeropage: 0 };
        let ret = self.ioctl(UFFDIO_POISON, &mut arg);
        Progress::new(ret, arg.zeropage, len)
    }

    /// Whether one registered mapping covers the whole range at this moment.
    ///
    /// `UFFDIO_CONTINUE` (5.13) tells, because on anonymous memory it never does anything else: it
    /// looks the mapping up under its lock, says `ENOENT` where none covers the range or it is not
    /// registered, and refuses what is not shared memory with `EINVAL` after that
    /// (`mfill_atomic` in mm/userfaultfd.c).
    pub(crate) fn is_registered(&self, start: usize, len: usize) -> Result<bool, Errno> {
        let range = UffdioRange { start: start as u64, len: len as u64 };
        let mut arg = UffdioZeropage { range, mode: 0, zeropage: 0 };
        match self.ioctl(UFFDIO_CONTINUE, &mut arg) {
            // But for EINVAL: shared memory, registered.
            Ok(()) | Err(Errno(libc::EINVAL | libc::EEXIST | libc::EFAULT)) => Ok(true),
            Err(Errno(libc::ENOENT)) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    pub(crate) fn read(&self, buffer: &mut [RawMsg]) -> Result<usize, Errno> {
        let bytes = size_of_val(buffer);
        // SAFETY: the buffer is writable for `bytes`, and any bytes are a valid RawMsg.
        let ret = unsafe { libc::read(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), bytes) };
        Errno::result(ret as i64).map(|n| n / size_of::<RawMsg>())
    }
}

/// What [`wait_readable`] waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// There is a message.
    Message,
    /// The signal to stop was raised.
    Stop,
    /// The time has passed.
    Timeout,
}

/// Waits until `fd` has a message, `stop` (an eventfd) was written, or `timeout` has passed
/// (`None`: for ever).
///
/// # Errors
/// What `ppoll(2)` says, `EINTR` left out.
pub fn wait_readable(fd: &Uffd, stop: RawFd, timeout: Option<Duration>) -> Result<Woken, Errno> {
    let events = libc::POLLIN;
    let mut fds = [
        libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 },
        libc::pollfd { fd: stop, events, revents: 0 },
    ];
    let timeout = timeout.map(|t| libc::timespec {
        tv_sec: libc::time_t::try_from(t.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: t.subsec_nanos().into(),
    });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    loop {
        // SAFETY: ppoll reads and writes the two entries it is given, and reads the timeout, which
        // outlives the call; without a mask it leaves the signals alone.
        let ret = unsafe { libc::ppoll(fds.as_mut_ptr(), 2, timeout, std::ptr::null()) };
        match Errno::result(ret.into()) {
            Ok(0) => return Ok(Woken::Timeout),
            Ok(_) if fds[1].revents != 0 => return Ok(Woken::Stop),
            Ok(_) => return Ok(Woken::Message),
            Err(Errno(libc::EINTR)) => {}
            Err(e) => return Err(e),
        }
    }
}

/// An eventfd: a descriptor that becomes readable once [`Signal::raise`] was called.
#[derive(Debug)]
pub struct Signal(OwnedFd);

impl Signal {
    /// A signal not yet raised.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn new() -> Result<Self, Errno> {
        // SAFETY: eventfd(2) takes two integers and returns a new descriptor.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        Errno::result(fd.into())?;
        // SAFETY: the kernel just gave us this descriptor.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Raises the signal, for good.
    pub fn raise(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: the buffer is eight bytes, as eventfd(2) asks. It cannot block before 2^64-1.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

impl AsRawFd for Signal {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// How far a call over a range came before it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done from the start of the range.
    pub done: usize,
    /// Why it ended early; `None` when all was done. After a partial success the kernel says
    /// `EAGAIN`: asking for the rest tells the reason.
    pub error: Option<Errno>,
}

impl Progress {
    fn new(ret: Result<(), Errno>, done: i64, len: usize) -> Self {
        match ret {
            Ok(()) => Self { done: len, error: None },
            // The kernel writes a negative errno into the field when nothing was done.
            Err(e) => Self { done: usize::try_from(done).unwrap_or(0).min(len), error: Some(e) },
        }
    }
}
