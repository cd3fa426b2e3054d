//! Signals to the process, each millisecond, whose handler reads and writes managed memory.
//!
//! The kernel gives such a signal to the main thread where that will have it, and else to one thread
//! as long as that will. So whoever has taken one takes no more until its next turn
//! ([`take_again`]), and all threads get some.

#![allow(unreachable_pub, reason = "a test binary exports nothing")]

use crate::ground::Plot;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// What the handler looks at; null before and after.
static PLOTS: AtomicPtr<Vec<Plot>> = AtomicPtr::new(std::ptr::null_mut());
/// Handlers that run.
pub static RUNNING: AtomicU64 = AtomicU64::new(0);
static HEARD: AtomicUsize = AtomicUsize::new(0);
static HEARD_MOVING: AtomicU64 = AtomicU64::new(0);
/// A handler has read a wrong word.
pub static WRONG: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// This thread is in a move.
    pub static MOVING: Cell<bool> = const { Cell::new(false) };
}

extern "C" fn handler(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's frame of this handler; what is written there becomes the thread's mask.
    // Errno is the interrupted code's.
    let errno = unsafe {
        libc::sigaddset(&raw mut (*context.cast::<libc::ucontext_t>()).uc_sigmask, libc::SIGALRM);
        *libc::__errno_location()
    };
    RUNNING.fetch_add(1, Ordering::SeqCst);
    let plots = PLOTS.load(Ordering::SeqCst);
    // SAFETY: whoever set it waits, after it has taken it back, until no handler runs.
    if let Some(plots) = unsafe { plots.as_ref() } {
        let n = HEARD.fetch_add(1, Ordering::Relaxed);
        HEARD_MOVING.fetch_add(u64::from(MOVING.get()), Ordering::Relaxed);
        for (i, plot) in plots.iter().enumerate() {
            if !plot.hear(n.wrapping_mul(31).wrapping_add(i)) {
                WRONG.store(true, Ordering::Relaxed);
            }
        }
    }
    RUNNING.fetch_sub(1, Ordering::SeqCst);
    // SAFETY: this thread's own.
    unsafe { *libc::__errno_location() = errno };
}

/// Handlers that ran so far, and those on a thread that was moving pages.
pub fn heard() -> (u64, u64) {
    (HEARD.load(Ordering::Relaxed) as u64, HEARD_MOVING.load(Ordering::Relaxed))
}

/// This thread takes signals (again).
pub fn take_again() {
    // SAFETY: writes and reads a set; a null old set is allowed.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut set, libc::SIGALRM);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// A child of fork has no such timer, and is ended by SIGALRM.
pub fn forget_in_child() {
    // SAFETY: the default action is valid for any signal.
    unsafe { libc::signal(libc::SIGALRM, libc::SIG_DFL) };
    take_again();
}

fn every(time: Duration) {
    let us = libc::suseconds_t::try_from(time.as_micros()).expect("less than a second");
    let time = libc::timeval { tv_sec: 0, tv_usec: us };
    let timer = libc::itimerval { it_interval: time, it_value: time };
    // SAFETY: reads the timer.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
}

/// Signals until this is dropped.
pub struct Signals<'a>(std::marker::PhantomData<&'a Vec<Plot>>);

impl<'a> Signals<'a> {
    pub fn start(plots: &'a Vec<Plot>, time: Duration) -> Self {
        PLOTS.store(std::ptr::from_ref(plots).cast_mut(), Ordering::SeqCst);
        // SAFETY: a handler of the right kind; zero is a valid action otherwise.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_RESTART | libc::SA_SIGINFO;
            libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut());
        }
        every(time);
        Self(std::marker::PhantomData)
    }
}

impl Drop for Signals<'_> {
    fn drop(&mut self) {
        every(Duration::ZERO);
        PLOTS.store(std::ptr::null_mut(), Ordering::SeqCst);
        while RUNNING.load(Ordering::SeqCst) > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
