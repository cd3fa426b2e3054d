//! Who is at the other end of a local socket.

use crate::Errno;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// The process at the other end, as the kernel noted it when the connection was made (`unix(7)`,
/// `SO_PEERCRED`), in the caller's namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process number; 0 if it is in no namespace of ours.
    pub pid: i32,
    /// Its effective user.
    pub uid: u32,
}

impl Peer {
    /// Who is at the other end of `stream`.
    ///
    /// # Errors
    /// What `getsockopt(2)` says.
    pub fn of(stream: &UnixStream) -> Result<Self, Errno> {
        let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut len = libc::socklen_t::try_from(size_of_val(&cred)).unwrap_or(0);
        // SAFETY: the kernel writes at most `len` bytes to the ucred.
        let ret = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                std::ptr::from_mut(&mut cred).cast(),
                &mut len,
            )
        };
        Errno::result(ret.into()).map(|_| Self { pid: cred.pid, uid: cred.uid })
    }
}

/// The effective user of the calling thread.
pub fn effective_user() -> u32 {
    // SAFETY: no preconditions.
    unsafe { libc::geteuid() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_of_a_pair_are_this_process() {
        let (one, _other) = UnixStream::pair().expect("a pair of sockets");
        let peer = Peer::of(&one).expect("credentials");
        let pid = i32::try_from(std::process::id()).expect("pids are positive ints");
        assert_eq!(peer, Peer { pid, uid: effective_user() });
    }
}
