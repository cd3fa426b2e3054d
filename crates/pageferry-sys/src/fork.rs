//! Standing aside while this process forks (`pthread_atfork(3)`).
//!
//! A fork copies the page tables; a page that is out of its place at that moment is not there for
//! the child. Whoever moves pages therefore registers a [`Quiesce`] and stands still while one
//! runs. `vfork` and `posix_spawn` share the page tables and need nothing.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, Weak};

/// Stands still around a fork of the process.
pub trait Quiesce: Send + Sync {
    /// Called by the forking thread before the fork; returns when nothing is under way.
    fn before(&self);
    /// Called in the parent after the fork.
    fn after_in_parent(&self);
}

type Listeners = Vec<Weak<dyn Quiesce>>;

/// Those of this process. Locked while a fork is under way, so that the child never finds it
/// locked by a thread that it does not have.
static LISTENERS: Mutex<Listeners> = Mutex::new(Vec::new());
/// The process that they belong to: a child inherits the list, but nothing to be quiet about.
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

/// What a fork of this thread holds: the lock, and exactly those that it made stand still.
struct Held {
    lock: MutexGuard<'static, Listeners>,
    quiet: Vec<Arc<dyn Quiesce>>,
}

thread_local! {
    static HELD: RefCell<Option<Held>> = const { RefCell::new(None) };
}

extern "C" fn prepare() {
    let lock = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
    let ours = OWNER.load(Ordering::Relaxed) == std::process::id();
    let quiet: Vec<_> =
        if ours { lock.iter().filter_map(Weak::upgrade).collect() } else { Vec::new() };
    for listener in &quiet {
        listener.before();
    }
    HELD.with(|held| *held.borrow_mut() = Some(Held { lock, quiet }));
}

extern "C" fn parent() {
    let Some(Held { lock, quiet }) = HELD.with(RefCell::take) else { return };
    drop(lock);
    for listener in quiet {
        listener.after_in_parent();
    }
}

extern "C" fn child() {
    let Some(Held { lock, quiet }) = HELD.with(RefCell::take) else { return };
    drop(lock);
    // Their locks may be held by threads that are not here: they are left alone.
    std::mem::forget(quiet);
}
