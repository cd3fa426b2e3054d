//! Threads that no signal handler of the program runs on, or only where it can wait for nobody.

use crate::affinity::CpuSet;
use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
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

/// All signals but the synchronous ones.
fn asynchronous() -> libc::sigset_t {
    // SAFETY: a sigset_t is plain bits; sigfillset and sigdelset write the set that they are given.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut set);
        for signal in SYNCHRONOUS {
            libc::sigdelset(&mut set, signal);
        }
        set
    }
}

/// Blocks all signals of the calling thread but the synchronous ones.
fn block() -> io::Result<Restore> {
    // SAFETY: pthread_sigmask reads one set and writes the other, for which zero is a valid value.
    unsafe {
        let mut old: libc::sigset_t = std::mem::zeroed();
        match libc::pthread_sigmask(libc::SIG_BLOCK, &asynchronous(), &mut old) {
            0 => Ok(Restore(old)),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

thread_local! {
    /// The mask that a [`Deaf`] of this thread puts back, where that lets any signal in.
    static OUTSIDE: Cell<Option<libc::sigset_t>> = const { Cell::new(None) };
}

/// While this lives, no signal handler of the program runs on this thread, but for those of the
/// synchronous signals; [`hear`] lets in what has come meanwhile.
pub struct Deaf {
    /// None: the system refused.
    _mask: Option<Restore>,
    before: Option<libc::sigset_t>,
    thread: PhantomData<*const ()>,
}

impl Deaf {
    /// From now on. Costs a system call here and one when it goes.
    pub fn new() -> Self {
        let mask = block().ok();
        // SAFETY: sigismember reads a set that pthread_sigmask wrote.
        let is_blocked = |old: &libc::sigset_t, n| unsafe { libc::sigismember(old, n) == 1 };
        let open =
            |n: &i32| !SYNCHRONOUS.contains(n) && ![libc::SIGKILL, libc::SIGSTOP].contains(n);
        let signals = || (1..32).chain(libc::SIGRTMIN()..=libc::SIGRTMAX()).filter(open);
        let old = mask.as_ref().map(|mask| mask.0);
        // A thread of ours: there is nothing to let in.
        let old = old.filter(|old| signals().any(|n| !is_blocked(old, n)));
        Self { _mask: mask, before: OUTSIDE.replace(old), thread: PhantomData }
    }
}

impl Default for Deaf {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Deaf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Deaf")
    }
}

impl Drop for Deaf {
    fn drop(&mut self) {
        OUTSIDE.set(self.before);
    }
}

/// Where a [`Deaf`] lives on this thread: runs the handlers of the signals that have come since.
/// Called where the thread holds nothing that a handler could wait for.
pub fn hear() {
    let Some(outside) = OUTSIDE.get() else { return };
    // SAFETY: reads sets that are there; null old sets are allowed. Pending signals are delivered
    // before the first call returns (pthread_sigmask(3)).
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, &outside, std::ptr::null_mut());
        libc::pthread_sigmask(libc::SIG_BLOCK, &asynchronous(), std::ptr::null_mut());
    }
}

/// Whether a signal waits for [`hear`].
pub fn is_called() -> bool {
    let Some(outside) = OUTSIDE.get() else { return false };
    // SAFETY: sigpending writes the set, for which zero is a valid value; sigismember reads sets.
    unsafe {
        let mut waiting: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&mut waiting) == 0
            && (1..=libc::SIGRTMAX())
                .any(|n| libc::sigismember(&waiting, n) == 1 && libc::sigismember(&outside, n) == 0)
    }
}

/// Gives the calling thread the nice value of the process's main thread, as far as it may.
fn take_nice() {
    // SAFETY: no preconditions; the main thread's number is the process's. -1 is a nice value, too,
    // and what a failed call returns; the thread would then have the value already or be refused.
    unsafe {
        let main = libc::id_t::from(std::process::id());
        let wanted = libc::getpriority(libc::PRIO_PROCESS, main);
        if libc::getpriority(libc::PRIO_PROCESS, 0) != wanted {
            libc::setpriority(libc::PRIO_PROCESS, 0, wanted);
        }
    }
}

/// Starts a thread called `name` (at most 15 bytes are shown) that has all signals blocked but the
/// synchronous ones from its first instruction on: it inherits the mask. A handler that ran there
/// could wait for what the thread itself must do, and a program that takes its signals by
/// `sigwait(3)` blocks them in its own threads only.
///
/// It does not inherit where its parent may run: it takes the CPUs and the nice value of the
/// process's main thread, which are those that `taskset(1)` and `nice(1)` set. (A nice value below
/// the parent's is refused without `CAP_SYS_NICE` or `RLIMIT_NICE`: it keeps the parent's then.) A
/// program with a thread for each CPU pins those threads, and builds its engine on one of them.
///
/// What `body` starts in turn, threads and programs, inherits all that.
///
/// # Errors
/// What `pthread_create(3)` says.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let _restore = block()?;
    let thread = Builder::new().name(name.into()).spawn(|| {
        take_nice();
        body()
    })?;
    // Here, so that it does not undo what the caller does next. Where the kernel does not tell, or
    // the thread has ended, there is nothing to do.
    if let Ok(cpus) = CpuSet::of_main_thread() {
        let _ = cpus.apply_to(&thread);
    }
    Ok(thread)
}
