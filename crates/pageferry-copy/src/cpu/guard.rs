//! Turns a memory fault inside a copy kernel into an error of that copy.
//!
//! A page to be copied may carry a hardware memory error, lie beyond the end of its file, or be
//! unmapped by another thread: the kernel then sends `SIGBUS` or `SIGSEGV`, which would end the
//! process. Handlers for both, installed once, look at where the fault happened.
//!
//! # What must always hold
//! - A fault in a leaf kernel (see [`super::x86_64`]), or in `memcpy` called by our wrapper on
//!   this very thread, goes on at a landing pad that returns an error.
//! - Anything else, a signal sent by `kill` while a kernel runs included, reaches the action
//!   that was installed before ours, with the mask it asked for, or ends the process as it
//!   would have without us.
//! - The handler allocates nothing, takes no lock and touches, besides its arguments, only
//!   atomics, and the stack of a call that is [recorded](super::records). No thread-local.
//!
//! # What can go wrong
//! A program that installs its own handler later and does not call the previous one takes the
//! protection away: a fault in a copy is then that handler's to deal with.

use std::{
    io,
    mem::MaybeUninit,
    ptr,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use libc::{SIGBUS, SIGSEGV, c_int, c_void, sigaction, siginfo_t, ucontext_t};

use super::{records, x86_64};

/// What was installed before us, by signal; written before our handlers are installed.
static PREVIOUS: [OnceLock<sigaction>; 2] = [OnceLock::new(), OnceLock::new()];
static HAS_AVX: AtomicBool = AtomicBool::new(false);

/// Installs the handlers, once for the process. False if the system refused: then a fault
/// during a copy ends the process, as it would without us.
pub(super) fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        HAS_AVX.store(std::is_x86_feature_detected!("avx"), Ordering::Relaxed);
        for (signal, previous) in [SIGSEGV, SIGBUS].into_iter().zip(&PREVIOUS) {
            if let Err(error) = install_one(signal, previous) {
                tracing::warn!(signal, %error, "no protection from memory faults while copying");
                return false;
            }
        }
        true
    })
}

fn install_one(signal: c_int, previous: &OnceLock<sigaction>) -> io::Result<()> {
    let mut old = MaybeUninit::<sigaction>::zeroed();
    // SAFETY: sigaction is plain data for which zero is a valid value, and both pointers are
    // valid for the call or null.
    let mut ours: sigaction = unsafe {
        if libc::sigaction(signal, ptr::null(), old.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        std::mem::zeroed()
    };
    // SAFETY: the call above wrote it.
    let _ = previous.set(unsafe { old.assume_init() });
    ours.sa_sigaction = handler as *const () as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for and is async-signal-safe
    // (see the module's invariants).
    let rc = unsafe { libc::sigaction(signal, &ours, ptr::null_mut()) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

extern "C" fn handler(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo and the interrupted thread's context to a
    // handler installed with SA_SIGINFO; nobody else has references into them.
    if unsafe { recover(signal, &*info, &mut *context.cast::<ucontext_t>()) } {
        return;
    }
    let previous = PREVIOUS[usize::from(signal == SIGBUS)].get();
    // SAFETY: the arguments are the ones the kernel gave us.
    unsafe { chain(signal, info, context, previous) };
}

/// Redirects the interrupted thread to a landing pad, if it was copying.
fn recover(signal: c_int, info: &siginfo_t, context: &mut ucontext_t) -> bool {
    // Signals that a process sent say nothing about memory. Kernel-made ones are positive
    // (include/uapi/asm-generic/siginfo.h: SI_FROMKERNEL).
    if info.si_code <= 0 {
        return false;
    }
    // SAFETY: SIGSEGV and SIGBUS made by the kernel carry an address.
    let addr = unsafe { info.si_addr() }.addr();
    let registers = &mut context.uc_mcontext.gregs;
    #[expect(clippy::cast_possible_truncation, reason = "x86-64 addresses have 64 bits")]
    let [rip, rsp] = [libc::REG_RIP, libc::REG_RSP]
        .map(|register| registers[register as usize].cast_unsigned() as usize);
    let landing = match x86_64::landing(rip) {
        Some(landing) => landing,
        None => {
            let Some(top) = records::called_from(rsp, addr, x86_64::back_from_memcpy()) else {
                return false;
            };
            registers[libc::REG_RSP as usize] = top as i64;
            x86_64::landing_memcpy(HAS_AVX.load(Ordering::Relaxed))
        }
    };
    registers[libc::REG_RIP as usize] = landing as i64;
    registers[libc::REG_RAX as usize] = i64::from(signal);
    registers[libc::REG_RDX as usize] = addr as i64;
    true
}

/// Does with the signal what would have been done had we not been here.
///
/// # Safety
/// The arguments are those of a handler now running.
unsafe fn chain(
    signal: c_int,
    info: *mut siginfo_t,
    context: *mut c_void,
    previous: Option<&sigaction>,
) {
    let action = previous.map_or(libc::SIG_DFL, |old| old.sa_sigaction);
    // SAFETY: the caller's promise.
    let sent = unsafe { (*info).si_code } <= 0;
    if action == libc::SIG_IGN && sent {
        return;
    }
    let Some(previous) = previous.filter(|_| action > libc::SIG_IGN) else {
        // SAFETY: resets the action and, for a signal that would not come again by itself,
        // sends it again; it is blocked until this handler returns. All async-signal-safe.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            if sent {
                libc::raise(signal);
            }
        }
        return;
    };
    // SAFETY: `action` is a function of the kind that `sa_flags` says, given to sigaction by
    // whoever was here before us. The mask is restored by the return from this handler.
    unsafe {
        libc::pthread_sigmask(libc::SIG_BLOCK, &previous.sa_mask, ptr::null_mut());
        if previous.sa_flags & libc::SA_NODEFER != 0 {
            let mut this = MaybeUninit::<libc::sigset_t>::uninit();
            libc::sigemptyset(this.as_mut_ptr());
            libc::sigaddset(this.as_mut_ptr(), signal);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, this.as_ptr(), ptr::null_mut());
        }
        if previous.sa_flags & libc::SA_SIGINFO != 0 {
            let call: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                std::mem::transmute(action);
            call(signal, info, context);
        } else {
            let call: extern "C" fn(c_int) = std::mem::transmute(action);
            call(signal);
        }
    }
}
