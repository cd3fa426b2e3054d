//! A process, held so that its number cannot come to mean another one unnoticed.
//!
//! A pid is reused once its process has been waited for. A [`PidFd`] refers to the process itself:
//! if it [is alive](PidFd::is_alive) after a call that took the pid, the pid was its own during
//! the call.
//!
//! Source: `pidfd_open(2)` (Linux 5.3).

use crate::Errno;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A reference to a process (`pidfd_open(2)`).
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Refers to the process that has this pid now. Not a thread other than the first.
    ///
    /// # Errors
    /// `ESRCH`: there is none; `EINVAL` or `ENOENT`: the number of a thread that is not its
    /// process's first; `ENOSYS`: before Linux 5.3; `EMFILE`: too many files are open.
    pub fn open(pid: u32) -> Result<Self, Errno> {
        // SAFETY: takes two numbers and makes a new descriptor.
        let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let raw = i32::try_from(Errno::result(raw)?).map_err(|_| Errno(libc::EBADF))?;
        // SAFETY: the kernel has just made this descriptor; nobody else knows of it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(raw) }))
    }

    /// Whether the process has not ended: a zombie has. Where the kernel cannot be asked now,
    /// it is taken for alive.
    pub fn is_alive(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, which the kernel writes; a timeout of 0 does not wait.
        let ready = unsafe { libc::poll(&mut poll, 1, 0) };
        ready <= 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_alive_until_it_ends_even_before_it_is_waited_for() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("cat is everywhere");
        let fd = match PidFd::open(child.id()) {
            Ok(fd) => fd,
            Err(e) => {
                eprintln!("skipped: no pidfd here ({e})");
                child.kill().expect("ours");
                child.wait().expect("ours");
                return;
            }
        };
        assert!(fd.is_alive());
        drop(child.stdin.take());
        // It ends, and stays a zombie until it is waited for.
        while fd.is_alive() {
            std::thread::yield_now();
        }
        child.wait().expect("ours");
        assert!(!fd.is_alive());
        assert_eq!(PidFd::open(u32::MAX >> 1).map(drop), Err(Errno(libc::ESRCH)));
    }
}
