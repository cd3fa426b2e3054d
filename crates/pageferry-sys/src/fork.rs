//! Standing aside while this process forks (`pthread_atfork(3)`).
//!
//! A fork copies the page tables; a page that is out of its place at that moment is not there for
//! the child. Whoever moves pages therefore registers a [`Quiesce`] and stands still while one
//! runs. `vfork` and `posix_spawn` share the page tables and need nothing.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, Once, PoisonError, Weak};

/// Stands still around a fork of the process.
pub trait Quiesce: Send + Sync {
    /// Called by the forking thread before the fork; returns when nothing is under way.
    fn before(&self);
    /// Called in the parent after the fork.
    fn after_in_parent(&self);
}

static LISTENERS: Mutex<Vec<Weak<dyn Quiesce>>> = Mutex::new(Vec::new());
static HOOK: Once = Once::new();

/// From now on `listener` is called around every fork(3) of this process, as long as it lives.
pub fn register(listener: Weak<dyn Quiesce>) {
    HOOK.call_once(|| {
        // SAFETY: the two handlers are functions of this program that live as long as it does.
        // In the child nothing is called: its copies of locks may be held by threads that it
        // does not have.
        unsafe { libc::pthread_atfork(Some(prepare), Some(parent), None) };
    });
    let mut listeners = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
    listeners.retain(|l| l.strong_count() > 0);
    listeners.push(listener);
}

thread_local! {
    /// Those that stand still for a fork of this thread: exactly they are let go afterwards.
    static HELD: RefCell<Vec<Arc<dyn Quiesce>>> = const { RefCell::new(Vec::new()) };
}

extern "C" fn prepare() {
    let listeners: Vec<_> = {
        let guard = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
        guard.iter().filter_map(Weak::upgrade).collect()
    };
    for listener in &listeners {
        listener.before();
    }
    HELD.with(|held| *held.borrow_mut() = listeners);
}

extern "C" fn parent() {
    for listener in HELD.with(RefCell::take) {
        listener.after_in_parent();
    }
}
