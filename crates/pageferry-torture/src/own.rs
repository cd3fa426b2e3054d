//! Memory that is never adopted: the library's and the engine's own, and every thread's stack.
//!
//! A stack has the thread's control block, which the kernel writes to when the thread exits; it
//! cannot wait for a page then, and what it had to say is lost (`docs/design.md`, "Limits").
//!
//! What always holds: while a thread is being created nothing moves, and what was read of the
//! mappings before is out of date afterwards. So no stack is ever taken for data.

use pageferry_sys::in_use::{InUse, UsedBy};
use pageferry_sys::maps::Maps;
use pageferry_sys::{Errno, Linux, Sys};
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

const ROOM: usize = 8192;
static RANGES: [[AtomicUsize; 2]; ROOM] = [const { [const { AtomicUsize::new(0) }; 2] }; ROOM];
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// Threads being created.
static CREATING: AtomicUsize = AtomicUsize::new(0);
/// Threads created so far.
static CREATED: AtomicUsize = AtomicUsize::new(0);
static MOVING: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Whether this thread is the library's or the engine's.
    static OURS: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// This thread, and those that it creates, are the library's.
pub(crate) fn this_thread_is_ours() {
    OURS.set(true);
}

/// Adds a range.
pub(crate) fn add(range: Range<usize>) {
    let known = |at: &[AtomicUsize; 2]| {
        at[0].load(SeqCst) == range.start && at[1].load(SeqCst) == range.end
    };
    if RANGES[..COUNT.load(SeqCst).min(ROOM)].iter().any(known) {
        return;
    }
    if let Some(slot) = RANGES.get(COUNT.fetch_add(1, SeqCst)) {
        slot[0].store(range.start, SeqCst);
        slot[1].store(range.end, SeqCst);
    }
}

/// All of them; `None`: there were more than there is room for, and nothing may be adopted.
pub(crate) fn ranges() -> Option<Vec<Range<usize>>> {
    let slots = RANGES.get(..COUNT.load(SeqCst))?;
    Some(slots.iter().map(|slot| slot[0].load(SeqCst)..slot[1].load(SeqCst)).collect())
}

/// How many threads there have been: read before the mappings are.
pub(crate) fn threads_seen() -> usize {
    CREATED.load(SeqCst)
}

/// Nothing creates a thread while this lives.
#[derive(Debug)]
pub(crate) struct Moving;

impl Moving {
    /// `None`: a thread is being created, or was since `seen`; read the mappings again.
    pub(crate) fn begin(seen: usize) -> Option<Self> {
        MOVING.store(true, SeqCst);
        let moving = Self;
        (CREATING.load(SeqCst) == 0 && CREATED.load(SeqCst) == seen).then_some(moving)
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        MOVING.store(false, SeqCst);
    }
}

/// In a forked child, which has neither the mover nor who was creating threads.
pub(crate) fn after_fork() {
    MOVING.store(false, SeqCst);
    CREATING.store(0, SeqCst);
}

/// The kernel's calls; what the engine maps is its own.
#[derive(Debug)]
pub(crate) struct Recorded;

impl Sys for Recorded {
    fn map(&self, len: usize, align: usize) -> Result<usize, Errno> {
        let start = Linux.map(len, align)?;
        add(start..start + len);
        Ok(start)
    }
    /// The program's heap is data here: engine and library have an allocator of their own.
    fn in_use(&self, maps: &Maps) -> Result<Vec<InUse>, Errno> {
        let mut found = Linux.in_use(maps)?;
        found.retain(|used| used.by != UsedBy::Heap);
        Ok(found)
    }
}

type Start = extern "C" fn(*mut c_void) -> *mut c_void;
type Create = unsafe extern "C" fn(
    *mut libc::pthread_t,
    *const libc::pthread_attr_t,
    Start,
    *mut c_void,
) -> c_int;

struct Begin {
    start: Start,
    argument: *mut c_void,
    ours: bool,
}

extern "C" fn begin(argument: *mut c_void) -> *mut c_void {
    // SAFETY: made by `pthread_create` below for this thread alone.
    let begin = unsafe { Box::from_raw(argument.cast::<Begin>()) };
    let Begin { start, argument, ours } = *begin;
    OURS.set(ours);
    // SAFETY: the attributes are initialised by the first call, read by the second, and destroyed.
    unsafe {
        let mut attributes = std::mem::zeroed();
        if libc::pthread_getattr_np(libc::pthread_self(), &raw mut attributes) == 0 {
            let (mut stack, mut len) = (std::ptr::null_mut(), 0);
            if libc::pthread_attr_getstack(&raw const attributes, &raw mut stack, &raw mut len) == 0
            {
                let end = (stack.addr() + len).next_multiple_of(4096);
                add(stack.addr() & !4095..end);
            }
            libc::pthread_attr_destroy(&raw mut attributes);
        }
    }
    CREATED.fetch_add(1, SeqCst);
    CREATING.fetch_sub(1, SeqCst);
    start(argument)
}

fn real() -> Option<Create> {
    static REAL: AtomicUsize = AtomicUsize::new(0);
    let mut real = REAL.load(SeqCst);
    if real == 0 {
        // SAFETY: a C string; looked for behind this library, so it is the C library's.
        real = unsafe { libc::dlsym(libc::RTLD_NEXT, c"pthread_create".as_ptr()) }.addr();
        REAL.store(real, SeqCst);
    }
    // SAFETY: the C library's function of this name has this type; null is `None`.
    unsafe { std::mem::transmute::<usize, Option<Create>>(real) }
}

/// Stands before the C library's function, to learn of each stack before anything moves.
///
/// # Safety
/// As `pthread_create(3)`.
#[cfg_attr(not(test), unsafe(no_mangle))]
#[allow(unreachable_pub, reason = "exported for the dynamic linker")]
pub unsafe extern "C" fn pthread_create(
    thread: *mut libc::pthread_t,
    attributes: *const libc::pthread_attr_t,
    start: Start,
    argument: *mut c_void,
) -> c_int {
    let Some(real) = real() else { return libc::EAGAIN };
    let ours = OURS.get();
    CREATING.fetch_add(1, SeqCst);
    // A mover needs nothing that the program holds here: it comes to an end.
    while !ours && MOVING.load(SeqCst) {
        std::thread::sleep(std::time::Duration::from_micros(50));
    }
    let begun = Box::into_raw(Box::new(Begin { start, argument, ours }));
    // SAFETY: the caller's promise; the argument is what `begin` expects.
    let errno = unsafe { real(thread, attributes, begin, begun.cast()) };
    if errno != 0 {
        CREATING.fetch_sub(1, SeqCst);
        // SAFETY: there is no thread that would take it.
        drop(unsafe { Box::from_raw(begun) });
    }
    errno
}
