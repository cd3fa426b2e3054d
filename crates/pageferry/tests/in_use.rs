//! Memory that looks like data and is none: what the kernel writes to where nobody can wait, and
//! what a mover itself needs, is refused when it is to be adopted, as far as it can be seen.

mod support;
mod trial;

use pageferry::{Engine, References, Region, RegionError, UsedBy};
use pageferry_sys::inject::{Fault, Faulty};
use pageferry_sys::{Errno, SysOp, page_size};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use support::build;
use support::siege::{far_address, map_at, ptr};
use trial::small;

fn adopt(engine: &Engine, range: &Range<usize>) -> Result<Region, RegionError> {
    // SAFETY: nothing of it is moved.
    unsafe { engine.adopt(ptr(range.start).cast(), range.len(), References::Possible) }
}

/// It is refused, by whom it should be, with an address in it and these words.
fn refused(engine: &Engine, range: &Range<usize>, used_by: UsedBy, words: &[&str]) {
    let why = adopt(engine, range).expect_err("it is no data");
    let text = why.to_string();
    let RegionError::InUse { range: named, at, by } = why else { panic!("{text}") };
    assert_eq!((&named, by), (range, used_by), "{text}");
    assert!(range.contains(&at), "{text}");
    let given = format!("{:#x?}", range);
    for word in words.iter().chain([&given.as_str()]) {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
}

/// A mapping of this process, by the name that the kernel has for it.
fn mapping(name: &str) -> Option<Range<usize>> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("procfs");
    let line = maps.lines().find(|line| line.ends_with(name))?;
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let hex = |text| usize::from_str_radix(text, 16).ok();
    Some(hex(start)?..hex(end)?)
}

/// A thread on a stack of the test's own, until it is told to end.
struct Sleeper {
    handle: libc::pthread_t,
    end: Option<Sender<()>>,
}

struct Begin(Sender<i32>, Receiver<()>);

extern "C" fn sleep(begin: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: made by `Sleeper::on` for this thread alone.
    let Begin(tell, ended) = *unsafe { Box::from_raw(begin.cast::<Begin>()) };
    // SAFETY: no preconditions.
    let _ = tell.send(unsafe { libc::gettid() });
    let _ = ended.recv();
    std::ptr::null_mut()
}

impl Sleeper {
    fn on(stack: &Range<usize>) -> (Self, u32) {
        let ((tell, told), (end, ended)) = (channel(), channel());
        let begin = Box::into_raw(Box::new(Begin(tell, ended)));
        // SAFETY: attributes are initialised, given memory that outlives the thread, read, and
        // destroyed; the argument is what `sleep` expects.
        let handle = unsafe {
            let (mut attributes, mut handle) = (std::mem::zeroed(), std::mem::zeroed());
            assert_eq!(libc::pthread_attr_init(&raw mut attributes), 0);
            let set =
                libc::pthread_attr_setstack(&raw mut attributes, ptr(stack.start), stack.len());
            assert_eq!(set, 0);
            let (handle_at, attributes_at) = (&raw mut handle, &raw const attributes);
            let made = libc::pthread_create(handle_at, attributes_at, sleep, begin.cast());
            assert_eq!(made, 0);
            libc::pthread_attr_destroy(&raw mut attributes);
            handle
        };
        let id = told.recv().expect("it runs").unsigned_abs();
        (Self { handle, end: Some(end) }, id)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.end.take();
        // SAFETY: joined once, here.
        unsafe { libc::pthread_join(self.handle, std::ptr::null_mut()) };
    }
}

fn has_robust_lists() -> bool {
    let (mut head, mut len) = (0usize, 0usize);
    // SAFETY: the kernel writes two words.
    let ret = unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut len) };
    ret == 0 && head != 0
}

#[test]
fn a_threads_control_block_is_refused_as_long_as_there_is_the_thread() {
    let Some(engine) = build(small()) else { return };
    if !has_robust_lists() {
        eprintln!("skipped: get_robust_list(2) is denied, or the C library makes no list");
        return;
    }
    let start = far_address();
    let stack = start..start + 64 * page_size();
    map_at(stack.start, stack.len());
    let (sleeper, id) = Sleeper::on(&stack);
    let words = [&format!("thread {id}") as &str, "when the thread ends", "pthread_attr_setstack"];
    refused(&engine, &stack, UsedBy::Thread(id), &words);
    // Beside other memory, too.
    let more = stack.start - page_size()..stack.end;
    map_at(more.start, page_size());
    refused(&engine, &more, UsedBy::Thread(id), &words);
    drop(sleeper);
    // The kernel forgets the list before it tells that the thread has ended.
    drop(adopt(&engine, &stack).expect("memory like any other"));
    // SAFETY: mapped above; used by nobody.
    unsafe { libc::munmap(ptr(more.start), more.len()) };
}

#[test]
fn the_calling_threads_control_block_is_refused_on_a_stack_that_is_elsewhere() {
    let Some(engine) = build(small()) else { return };
    if !has_robust_lists() {
        eprintln!("skipped: get_robust_list(2) is denied, or the C library makes no list");
        return;
    }
    let own = || {
        let mut head = 0usize;
        let mut len = 0usize;
        // SAFETY: the kernel writes two words; no preconditions.
        unsafe {
            libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut len);
            (head & !(page_size() - 1), libc::gettid().unsigned_abs())
        }
    };
    let (page, id) = own();
    let range = page..page + page_size();
    refused(&engine, &range, UsedBy::Thread(id), &["control block"]);
}

#[test]
fn the_heap_and_the_main_threads_stack_are_refused() {
    let Some(engine) = build(small()) else { return };
    match mapping("[heap]") {
        Some(heap) => {
            // A page that the allocator need not have come to: its last.
            let page = heap.end - page_size()..heap.end;
            refused(&engine, &page, UsedBy::Heap, &["C library's heap", "mmap(2)", "malloc"]);
        }
        None => eprintln!("skipped in part: the C library here does without a heap by brk(2)"),
    }
    let stack = mapping("[stack]").expect("every program has one");
    refused(&engine, &stack, UsedBy::Stack, &["main thread's stack", "mapped for data"]);
}

#[test]
fn where_there_is_no_room_to_look_nothing_is_adopted() {
    let faulty = Arc::new(Faulty::new());
    let Some(engine) = build(small().sys(faulty.clone())) else { return };
    let errno = Errno(libc::EMFILE);
    faulty.fail(Fault { op: SysOp::InUse, after: 0, times: 1, errno, partial: 0 });
    let start = far_address();
    map_at(start, page_size());
    let range = start..start + page_size();
    let why = adopt(&engine, &range).expect_err("nobody has looked").to_string();
    for word in ["EMFILE", "ulimit -n"] {
        assert!(why.contains(word), "{why}");
    }
    drop(adopt(&engine, &range).expect("data"));
    // SAFETY: mapped above; used by nobody.
    unsafe { libc::munmap(ptr(start), page_size()) };
}
