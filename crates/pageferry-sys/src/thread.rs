//! Threads that no signal handler of the program runs on.

use std::io;
use std::thread::{Builder, JoinHandle};

/// What the kernel sends to a thread for what the thread itself did (signal(7)); blocked, such a
/// signal kills the process instead of reaching its handler.
const SYNCHRONOUS: [libc::c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];

/// Puts the signal mask of the calling thread back when dropped.
struct Restore(libc::sigset_t);

impl Drop for Restore {
    fn drop(&mut self) {
        // SAFETY: reads the set that pthread_sigmask wrote; a null old set is allowed.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

/// Blocks all signals of the calling thread but the synchronous ones.
fn block() -> io::Result<Restore> {
    // SAFETY: a sigset_t is plain bits; sigfillset and sigdelset write the set that they are
    // given, and pthread_sigmask reads one and writes the other.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut set);
        for signal in SYNCHRONOUS {
            libc::sigdelset(&mut set, signal);
        }
        match libc::pthread_sigmask(libc::SIG_BLOCK, &set, &mut old) {
            0 => Ok(Restore(old)),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// Starts a thread called `name` (at most 15 bytes are shown) that has all signals blocked but the
/// synchronous ones from its first instruction on: it inherits the mask. A handler that ran there
/// could wait for what the thread itself must do, and a program that takes its signals by
/// `sigwait(3)` blocks them in its own threads only.
///
/// What `body` starts in turn, threads and programs, inherits the mask as well.
///
/// # Errors
/// What `pthread_create(3)` says.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let _restore = block()?;
    Builder::new().name(name.into()).spawn(body)
}
