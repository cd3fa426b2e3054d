//! Where the wrapper around `memcpy` leaves its stack pointer, so that the [guard](super::guard) can
//! tell whether a fault happened in such a call, on the thread that faulted.
//!
//! No thread-local: in a library that was loaded at run time the first access to one on a thread may
//! allocate, and the guard runs in a signal handler on any thread of the program, in the middle of
//! whatever that was doing. Instead all records are in one list, and a stack pointer tells whose
//! fault it is, since stacks do not overlap.
//!
//! # What must always hold
//! - A record is one thread's at a time; only that thread, or its wrapper, writes `top`.
//! - Records are never freed, and the list only grows: to as many as there were threads with a
//!   record at once.
//! - A record is believed only if the stack says the same: a forked child has records of threads
//!   that it does not have, and their stacks serve others there.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// How far below the recorded stack pointer `memcpy` itself can be: its return address and
/// what little it may push. A signal handler that interrupted it is further away, because the
/// kernel skips the red zone of 128 bytes and then writes a frame of more than a KiB
/// (`struct rt_sigframe` with the FPU state): its own faults are not ours.
const MEMCPY_STACK: usize = 512;

/// Of one thread; alone in its cache lines, because it is written for each copy.
#[derive(Debug)]
#[repr(align(128))]
struct Record {
    /// The stack pointer of the thread's call to `memcpy` through our wrapper; 0 outside one.
    top: AtomicUsize,
    taken: AtomicBool,
    next: *const Record,
}

static FIRST: AtomicPtr<Record> = AtomicPtr::new(ptr::null_mut());

fn all() -> impl Iterator<Item = &'static Record> {
    // Acquire: whoever finds a record finds it as it was made.
    let mut at = FIRST.load(Ordering::Acquire).cast_const();
    std::iter::from_fn(move || {
        // SAFETY: null, or a record, which lives for ever.
        let record = unsafe { at.as_ref() }?;
        at = record.next;
        Some(record)
    })
}

/// A thread's hold on a record.
#[derive(Debug)]
struct Held(&'static Record);

impl Held {
    fn new() -> Self {
        // Acquire, with the release when it was given back: its last user has left it.
        let take = |r: &&Record| {
            r.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        if let Some(free) = all().find(take) {
            // A child's, of a thread that is its parent's only.
            free.top.store(0, Ordering::Relaxed);
            return Self(free);
        }
        let (top, taken) = (AtomicUsize::new(0), AtomicBool::new(true));
        let new = Box::leak(Box::new(Record { top, taken, next: ptr::null() }));
        let mut first = FIRST.load(Ordering::Relaxed);
        loop {
            new.next = first;
            let new = ptr::from_mut(new);
            // Release: see `all`.
            match FIRST.compare_exchange_weak(first, new, Ordering::Release, Ordering::Relaxed) {
                // SAFETY: leaked above, and from now on only read but for its atomics.
                Ok(_) => return Self(unsafe { &*new }),
                Err(other) => first = other,
            }
        }
    }

    fn word(&self) -> *mut usize {
        self.0.top.as_ptr()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.taken.store(false, Ordering::Release);
    }
}

thread_local! {
    static OWN: Held = Held::new();
}

/// Calls `f` with the word in which the wrapper around `memcpy` leaves its stack pointer.
pub(super) fn with_own<T>(f: impl FnOnce(*mut usize) -> T) -> T {
    match OWN.try_with(Held::word) {
        Ok(word) => f(word),
        // The thread is ending, and has given its record back.
        Err(_) => f(Held::new().word()),
    }
}

/// The stack pointer that the wrapper on this stack has recorded, if `memcpy` is at `stack_pointer`
/// there, called by the instruction before `back`, and faulted at another address than its own
/// stack's. Async-signal-safe.
pub(super) fn called_from(stack_pointer: usize, fault: usize, back: usize) -> Option<usize> {
    all().find_map(|record| {
        let top = record.top.load(Ordering::Relaxed);
        if stack_pointer > top || top - stack_pointer > MEMCPY_STACK {
            return None;
        }
        // The stack itself ran out: not a fault of the copy.
        if fault < top && top - fault <= 2 * MEMCPY_STACK {
            return None;
        }
        let word = |at: usize| {
            // SAFETY: of the stack in use, just above its end; nobody else writes it.
            unsafe { ptr::with_exposed_provenance::<usize>(at).read_volatile() }
        };
        let own = record.top.as_ptr().expose_provenance();
        (word(top) == own && word(top - size_of::<usize>()) == back).then_some(top)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_used_again_when_its_thread_has_ended_and_by_one_thread_at_a_time() {
        let word = || std::thread::spawn(|| with_own(|word| word.addr())).join().expect("a thread");
        for _ in 0..100 {
            word();
        }
        // Tests that run beside this one have threads, too.
        assert!(all().count() < 90, "{} records", all().count());
        let own = with_own(|word| word.addr());
        assert_ne!(own, word());
        assert_eq!(own, with_own(|word| word.addr()));
    }

    #[test]
    fn a_record_counts_only_where_the_stack_says_the_same() {
        let held = Held::new();
        let mut stack = [0usize; 2 + MEMCPY_STACK / 8];
        let base = stack.as_mut_ptr().expose_provenance();
        let top = base + MEMCPY_STACK;
        let (back, far) = (0x1234, 0x1000);
        let write = |at: usize, value: usize| {
            // SAFETY: a word of `stack`, which nobody else has.
            unsafe { ptr::with_exposed_provenance_mut::<usize>(at).write_volatile(value) };
        };
        let seen = |pointer: usize, fault: usize| called_from(pointer, fault, back);
        assert_eq!(seen(top - 8, far), None, "no call");
        held.0.top.store(top, Ordering::Relaxed);
        assert_eq!(seen(top - 8, far), None, "left behind by another thread");
        write(top, held.word().addr());
        assert_eq!(seen(top - 8, far), None, "not in a call");
        write(top - 8, back);
        assert_eq!(seen(top - 8, far), Some(top));
        assert_eq!(seen(base, far), Some(top));
        assert_eq!(seen(top + 8, far), None, "not below it");
        assert_eq!(seen(top - 8, base), None, "the stack ran out");
        write(top, 0);
        assert_eq!(seen(top - 8, far), None, "another thread's stack now");
        held.0.top.store(0, Ordering::Relaxed);
    }
}
