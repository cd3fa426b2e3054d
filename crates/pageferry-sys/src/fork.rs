//! Standing aside while this process forks (`pthread_atfork(3)`).
//!
//! A fork copies the page tables; a page that is out of its place at that moment is not there for
//! the child. Whoever moves pages therefore registers a [`Quiesce`] and stands still while one
//! runs. `vfork` and `posix_spawn` share the page tables and need nothing.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, Weak};

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
static OWNER: AtomicU32 = AtomicU32::new(0);
static HOOK: Once = Once::new();

/// From now on `listener` is called around every fork(3) of this process, as long as it lives.
pub fn register(listener: Weak<dyn Quiesce>) {
    HOOK.call_once(|| {
        // SAFETY: the three handlers are functions of this program that live as long as it does.
        unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    });
    let mut listeners = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
    let me = std::process::id();
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
    let ours = OWNER.load(Ordering::Relaxed) == std::process::id();
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
    OWNER.store(std::process::id(), Ordering::Relaxed);
}
