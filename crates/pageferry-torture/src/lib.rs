//! A test part, not a product: preloaded into an unmodified program (`LD_PRELOAD`), it moves the
//! program's memory back to back while the program computes. `cargo xtask torture` runs real
//! programs with it and checks what they compute.
//!
//! It does nothing unless `PAGEFERRY_TORTURE` names the file that it appends its totals to
//! (see `tally`) and `PAGEFERRY_TORTURE_PROGRAMS` has the program's file name (names separated
//! by colons). `PAGEFERRY_TORTURE_SEED` is the seed of its choices.
//!
//! What always holds:
//! - What existed before its engine is left alone, and so is every stack (`own`).
//! - Its threads use neither the program's allocator (`alloc`) nor memory that the C library
//!   allocates for thread-locals (`tls`), take no signals, and have a file table of their own.
//! - A forked child has an engine of its own, built by a thread of its own.

#[cfg(target_os = "linux")]
#[cfg_attr(test, allow(dead_code, reason = "what is preloaded is not in the tests"))]
mod alloc;
#[cfg(target_os = "linux")]
#[cfg_attr(test, allow(dead_code, reason = "what is preloaded is not in the tests"))]
mod maps;
#[cfg(target_os = "linux")]
#[cfg_attr(test, allow(dead_code, reason = "what is preloaded is not in the tests"))]
mod mover;
#[cfg(target_os = "linux")]
#[cfg_attr(test, allow(dead_code, reason = "what is preloaded is not in the tests"))]
mod own;
#[cfg(target_os = "linux")]
#[cfg_attr(test, allow(dead_code, reason = "what is preloaded is not in the tests"))]
mod tally;
#[cfg(all(target_os = "linux", not(test)))]
mod tls;

#[cfg(all(target_os = "linux", not(test)))]
mod preload {
    use crate::alloc::Arena;
    use crate::mover::{self, Before, Random};
    use crate::own;
    use crate::tally::Tally;
    use std::sync::atomic::{AtomicPtr, Ordering};
    use std::time::Duration;

    #[global_allocator]
    static ARENA: Arena = Arena::new();

    struct State {
        tally: Tally,
        before: Before,
        seed: u64,
    }

    /// This process's; null where the library does nothing.
    static STATE: AtomicPtr<State> = AtomicPtr::new(std::ptr::null_mut());

    fn state() -> Option<&'static State> {
        // SAFETY: null, or leaked by `set`.
        unsafe { STATE.load(Ordering::Acquire).as_ref() }
    }

    fn set(state: State) -> &'static State {
        let state: &'static State = Box::leak(Box::new(state));
        STATE.store(std::ptr::from_ref(state).cast_mut(), Ordering::Release);
        state
    }

    #[unsafe(link_section = ".init_array")]
    #[used]
    static LOADED: extern "C" fn() = loaded;
    #[unsafe(link_section = ".fini_array")]
    #[used]
    static UNLOADED: extern "C" fn() = unloaded;

    extern "C" fn loaded() {
        let Some(log) = std::env::var_os("PAGEFERRY_TORTURE") else { return };
        let Ok(programs) = std::env::var("PAGEFERRY_TORTURE_PROGRAMS") else { return };
        let Ok(program) = std::env::current_exe() else { return };
        let Some(name) = program.file_name().and_then(|name| name.to_str()) else { return };
        if !programs.split(':').any(|wanted| wanted == name) {
            return;
        }
        let seed = std::env::var("PAGEFERRY_TORTURE_SEED").ok().and_then(|s| s.parse().ok());
        let tally = Tally::new(log.into(), name.to_owned());
        let state = set(State { tally, before: Before::new(), seed: seed.unwrap_or(1) });
        std::panic::set_hook(Box::new(|info| {
            if let Some(state) = self::state() {
                state.tally.panic(&info.to_string());
            }
        }));
        // Before the engine's: a child's allocator is whole when its hooks are called. After an
        // allocator's that the program brings along, which this call sets up.
        // SAFETY: the block is freed at once; the handlers live as long as the process.
        unsafe {
            libc::free(libc::malloc(1));
            libc::pthread_atfork(None, None, Some(forked));
        }
        start(state, Duration::ZERO);
    }

    extern "C" fn unloaded() {
        if let Some(state) = state() {
            state.tally.write();
        }
    }

    extern "C" fn forked() {
        ARENA.abandon();
        own::after_fork();
        let Some(old) = state() else { return };
        let before = Before::new();
        if let Some(ranges) = old.before.get() {
            let _ = before.set(ranges.clone());
        }
        let seed = old.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let state = set(State { tally: old.tally.afresh(), before, seed });
        // Most children that execute another program do so before that.
        start(state, Duration::from_millis(10));
    }

    /// Starts the mover, which takes no signals but those of a fault.
    fn start(state: &'static State, after: Duration) {
        // SAFETY: the sets are initialised before they are read, and the mask is put back.
        unsafe {
            let (mut all, mut old) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
                libc::sigdelset(&raw mut all, fault);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
            let mover = std::thread::Builder::new().name("pf-torture".into());
            let started = mover.spawn(move || {
                std::thread::sleep(after);
                mover::run(&state.tally, &state.before, Random::new(state.seed));
            });
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const old, std::ptr::null_mut());
            if let Err(error) = started {
                state.tally.refuse(&error.to_string());
            }
        }
    }
}
