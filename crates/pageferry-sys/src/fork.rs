//! Which process this is, and standing aside while it forks (`pthread_atfork(3)`).
//!
//! A fork copies the page tables; a page that is out of its place at that moment is not there for
//! the child. Whoever moves pages therefore registers a [`Quiesce`] and stands still while one
//! runs. `vfork` and `posix_spawn` share the page tables and need nothing.

use crate::page_size;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, Weak};

/// Says of the mark that the kernel refuses it.
const NONE: usize = usize::MAX;

/// The number of this process among those that it descends from: what keeps it knows later
/// whether it is in a copy of its process. Never zero.
///
/// A process number is no such thing: process 1 of a container whose child is in a new pid
/// namespace has a child with its own number. This one lies in a page that the kernel clears in
/// every process that gets a copy of it (`MADV_WIPEONFORK`, since Linux 4.14, madvise(2)), also
/// where the C library does not know of it (`clone(2)`). Siblings may have the same number. Where
/// the kernel has no such page it is the process number.
pub fn generation() -> u64 {
    /// The last number taken, by this process or one that it descends from.
    static LAST: AtomicU64 = AtomicU64::new(0);
    let Some(mark) = mark() else { return u64::from(std::process::id()) };
    // Relaxed: only the number itself is told.
    match mark.load(Ordering::Relaxed) {
        0 => {
            let next = LAST.fetch_add(1, Ordering::Relaxed) + 1;
            let taken = mark.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed);
            taken.map_or_else(|other| other, |_| next)
        }
        number => number,
    }
}

/// The word that is zero in a child. Nobody waits for anybody here: a fork may come at any time.
fn mark() -> Option<&'static AtomicU64> {
    static MARK: AtomicUsize = AtomicUsize::new(0);
    let mut at = MARK.load(Ordering::Acquire);
    if at == 0 {
        let made = wiped_page().unwrap_or(NONE);
        at = match MARK.compare_exchange(0, made, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => made,
            Err(other) => {
                if made != NONE {
                    // SAFETY: mapped above, and nobody else knows of it.
                    unsafe {
                        libc::munmap(std::ptr::with_exposed_provenance_mut(made), page_size())
                    };
                }
                other
            }
        };
    }
    let mark = std::ptr::with_exposed_provenance::<AtomicU64>(at);
    // SAFETY: an aligned word of a page that stays mapped, readable and writable, for good.
    (at != NONE).then(|| unsafe { &*mark })
}

/// A page that is all zeros here, and again in each child.
fn wiped_page() -> Option<usize> {
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping where the kernel likes; it is advised, or unmapped, before anybody
    // else knows of it.
    unsafe {
        let page = libc::mmap(std::ptr::null_mut(), page_size(), prot, flags, -1, 0);
        if page == libc::MAP_FAILED {
            return None;
        }
        if libc::madvise(page, page_size(), libc::MADV_WIPEONFORK) != 0 {
            libc::munmap(page, page_size());
            return None;
        }
        Some(page.expose_provenance())
    }
}

/// Stands still around a fork of the process.
pub trait Quiesce: Send + Sync {
    /// Called by the forking thread before the fork; returns when nothing is under way.
    fn before(&self);
    /// Called in the parent after the fork.
    fn after_in_parent(&self);
    /// Called in the child after the fork, on its only thread. Whether it is there for the child,
    /// too, and stands still around the child's own forks.
    ///
    /// By default it is not, and is left alone for good: its locks may be held by threads that
    /// the child does not have.
    fn after_in_child(self: Arc<Self>) -> bool {
        std::mem::forget(self);
        false
    }
}

type Listeners = Vec<Weak<dyn Quiesce>>;

/// Those of this process. Locked while a fork is under way, so that the child never finds it
/// locked by a thread that it does not have.
static LISTENERS: Mutex<Listeners> = Mutex::new(Vec::new());
/// The process that they belong to. A child that came without the handlers inherits the list, but
/// nothing to be quiet about.
static OWNER: AtomicU64 = AtomicU64::new(0);
static HOOK: Once = Once::new();

/// From now on `listener` is called around every fork(3) of this process, as long as it lives.
pub fn register(listener: Weak<dyn Quiesce>) {
    HOOK.call_once(|| {
        // SAFETY: the three handlers are functions of this program that live as long as it does.
        unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    });
    let mut listeners = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
    let me = generation();
    // Relaxed: the lock orders it for all but a forked child, which has one thread.
    if OWNER.swap(me, Ordering::Relaxed) != me {
        // Inherited from a parent: what they stand for is not here.
        std::mem::take(&mut *listeners).into_iter().for_each(std::mem::forget);
    }
    listeners.retain(|l| l.strong_count() > 0);
    listeners.push(listener);
}

/// What a fork under way holds: the lock, and exactly those that it made stand still.
struct Held {
    lock: MutexGuard<'static, Listeners>,
    quiet: Vec<Arc<dyn Quiesce>>,
}

/// Of the one fork that is under way. Not a thread-local: those are gone already when a
/// destructor of one forks.
struct Slot(UnsafeCell<Option<Held>>);

// SAFETY: it is touched only by who has locked LISTENERS.
unsafe impl Sync for Slot {}

static HELD: Slot = Slot(UnsafeCell::new(None));

/// # Safety
/// The calling thread has locked LISTENERS, and has no other reference to the slot.
unsafe fn held() -> &'static mut Option<Held> {
    // SAFETY: nobody else has the lock, as promised.
    unsafe { &mut *HELD.0.get() }
}

extern "C" fn prepare() {
    let lock = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
    let ours = OWNER.load(Ordering::Relaxed) == generation();
    let quiet: Vec<_> =
        if ours { lock.iter().filter_map(Weak::upgrade).collect() } else { Vec::new() };
    for listener in &quiet {
        listener.before();
    }
    // SAFETY: locked above.
    unsafe { *held() = Some(Held { lock, quiet }) };
}

extern "C" fn parent() {
    // SAFETY: this thread has held the lock since `prepare`.
    let Some(Held { lock, quiet }) = (unsafe { held().take() }) else { return };
    drop(lock);
    for listener in quiet {
        listener.after_in_parent();
    }
}

extern "C" fn child() {
    // SAFETY: as in `parent`; this is the copy of that thread.
    let Some(Held { mut lock, quiet }) = (unsafe { held().take() }) else { return };
    std::mem::take(&mut *lock).into_iter().for_each(std::mem::forget);
    for listener in quiet {
        let inherited = Arc::downgrade(&listener);
        if listener.after_in_child() {
            lock.push(inherited);
        } else {
            std::mem::forget(inherited);
        }
    }
    OWNER.store(generation(), Ordering::Relaxed);
}
