//! Memory of this process that is not data: what the kernel writes to where it cannot wait for a
//! page, and what the C library, and so a mover, needs to go on.
//!
//! - *A thread's control block*: its list of robust mutexes, the word that the kernel clears when
//!   the thread ends, its restartable sequences, and where its thread pointer points. glibc and musl
//!   keep them side by side, at the top of the thread's stack. The list's place is told of every
//!   thread of the process; the others' lie at the same distance from it as on the calling thread.
//! - *The heap*: what `brk(2)` gave, and what `malloc(3)` gives this thread now. glibc keeps the
//!   table of thread-locals of loaded modules (the dtv) there, too.
//! - *The main thread's stack*, with the program's arguments and environment.
//!
//! More cannot be seen: the stack of a thread that runs, memory that another thread's malloc gives.
//!
//! Source: `get_robust_list(2)`, `exit_robust_list` in `kernel/futex/core.c`, `PR_GET_TID_ADDRESS` in
//! `prctl(2)` (`CONFIG_CHECKPOINT_RESTORE`), `__rseq_offset` in glibc's manual (2.35), `start_brk` and
//! `startstack` in `proc_pid_stat(5)`; ELF Handling For Thread-Local Storage (Ulrich Drepper), 3.4.

use crate::maps::Maps;
use crate::{Errno, page_size, procfs};
use std::fs;
use std::ops::Range;

/// Who uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum UsedBy {
    /// The thread of this number: its control block.
    Thread(u32),
    /// The C library: its heap.
    Heap,
    /// The main thread: its stack.
    Stack,
}

/// Memory that is no data, as far as it can be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InUse {
    /// Addresses; of a control block one byte each of what is known of it.
    pub addresses: Range<usize>,
    /// Who uses it.
    pub by: UsedBy,
}

/// `PR_GET_TID_ADDRESS`, include/uapi/linux/prctl.h.
const PR_GET_TID_ADDRESS: i32 = 40;

/// All that can be seen. A thread that ends meanwhile may be missing, and one that begins.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`: there is no room to look. What a sandbox hides is not seen.
pub(crate) fn look(maps: &Maps) -> Result<Vec<InUse>, Errno> {
    let mut found = Vec::new();
    threads(&mut found)?;
    process(maps, &mut found)?;
    // SAFETY: the memory is given back at once; only its address is looked at.
    let given = unsafe {
        let given = libc::malloc(1);
        let at = given.addr();
        libc::free(given);
        at
    };
    if given != 0 {
        found.push(InUse { addresses: given..given + 1, by: UsedBy::Heap });
    }
    Ok(found)
}

fn visible<T>(result: std::io::Result<T>) -> Result<Option<T>, Errno> {
    match result.map_err(|e| procfs::errno_of(&e)) {
        Ok(value) => Ok(Some(value)),
        Err(e @ Errno(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => Err(e),
        Err(_) => Ok(None),
    }
}

fn threads(found: &mut Vec<InUse>) -> Result<(), Errno> {
    // SAFETY: no preconditions.
    let own = unsafe { libc::gettid() }.unsigned_abs();
    let (own_list, own_points) = (robust_list(own), own_points());
    let mut add = |at: usize, id: u32| {
        found.push(InUse { addresses: at..at.saturating_add(1), by: UsedBy::Thread(id) });
    };
    own_list.into_iter().chain(own_points.iter().copied()).for_each(|at| add(at, own));
    // The numbers of another namespace's procfs are those of other processes here.
    if !procfs::is_own() {
        return Ok(());
    }
    let Some(list) = visible(fs::read_dir("/proc/self/task"))? else { return Ok(()) };
    for entry in list.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Some(list) = robust_list(id).filter(|_| id != own) else { continue };
        add(list, id);
        for point in &own_points {
            let away = own_list.map(|own_list| point.wrapping_sub(own_list));
            away.into_iter().for_each(|away| add(list.wrapping_add(away), id));
        }
    }
    Ok(())
}

/// Where a thread of this process has its list of robust mutexes. `None`: it has ended, or has none,
/// or the call is denied.
fn robust_list(id: u32) -> Option<usize> {
    let (mut head, mut len) = (0usize, 0usize);
    let (head_at, len_at) = (&raw mut head, &raw mut len);
    // SAFETY: the kernel writes two words.
    let ret = unsafe { libc::syscall(libc::SYS_get_robust_list, id, head_at, len_at) };
    (ret == 0 && head != 0).then_some(head)
}

/// Of the calling thread, without its list.
fn own_points() -> Vec<usize> {
    let mut cleared = 0usize;
    // SAFETY: the kernel writes one word.
    let told = unsafe { libc::prctl(PR_GET_TID_ADDRESS, &raw mut cleared) };
    let cleared = (told == 0).then_some(cleared);
    let pointer = thread_pointer();
    let sequences = pointer.zip(sequences()).map(|(at, offset)| at.wrapping_add_signed(offset));
    [cleared, pointer, sequences].into_iter().flatten().filter(|&at| at != 0).collect()
}

/// How far behind the thread pointer glibc has a thread's restartable sequences.
fn sequences() -> Option<isize> {
    // SAFETY: looks a name up; a static program finds none.
    let at = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
    // SAFETY: glibc's variable of this name is a constant `ptrdiff_t`, which lives for ever.
    (!at.is_null()).then(|| unsafe { *at.cast::<isize>() })
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::unnecessary_wraps, reason = "elsewhere it is not known")]
fn thread_pointer() -> Option<usize> {
    let at;
    // SAFETY: reads the first word that the thread pointer points to, which the ABI has point to
    // itself.
    unsafe {
        std::arch::asm!("mov {}, fs:0", out(reg) at, options(nostack, readonly, preserves_flags));
    }
    Some(at)
}

#[cfg(target_arch = "aarch64")]
#[allow(clippy::unnecessary_wraps, reason = "elsewhere it is not known")]
fn thread_pointer() -> Option<usize> {
    let at;
    // SAFETY: reads a register.
    unsafe {
        std::arch::asm!("mrs {}, tpidr_el0", out(reg) at, options(nomem, nostack, preserves_flags));
    }
    Some(at)
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn thread_pointer() -> Option<usize> {
    None
}

/// Heap and stack of the process.
fn process(maps: &Maps, found: &mut Vec<InUse>) -> Result<(), Errno> {
    let Some(stat) = visible(fs::read("/proc/self/stat"))? else { return Ok(()) };
    let stat = String::from_utf8_lossy(&stat);
    // SAFETY: asks for an address that cannot be: the end stays where it is, and is told.
    let end = usize::try_from(unsafe { libc::syscall(libc::SYS_brk, 0) }).unwrap_or(0);
    let (heap, stack) = (field(&stat, 47), field(&stat, 28));
    if let Some(start) = heap.filter(|&start| start < end) {
        // The kernel maps whole pages.
        found.push(InUse { addresses: start..end.next_multiple_of(page_size()), by: UsedBy::Heap });
    }
    if let Some(at) = stack {
        let mapping = maps.within(at..at + 1).ok().and_then(|mappings| mappings.first().cloned());
        let addresses = mapping.unwrap_or(at..at + 1);
        found.push(InUse { addresses, by: UsedBy::Stack });
    }
    Ok(())
}

/// An address in the text of a stat file, by its number in `proc_pid_stat(5)`. `None` where it is
/// hidden (0).
fn field(stat: &str, number: usize) -> Option<usize> {
    // After the name, which may contain anything, in parentheses: field 3 is the state.
    let (_, after) = stat.rsplit_once(')')?;
    let value = after.split_ascii_whitespace().nth(number - 3)?.parse().ok()?;
    (value != 0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen() -> Vec<InUse> {
        look(&Maps::open().expect("procfs")).expect("room to look")
    }

    #[test]
    fn heap_and_stack_are_those_that_the_kernel_names() {
        let maps = fs::read_to_string("/proc/self/maps").expect("procfs");
        let found = seen();
        for (name, by) in [("[heap]", UsedBy::Heap), ("[stack]", UsedBy::Stack)] {
            let Some(line) = maps.lines().find(|line| line.ends_with(name)) else {
                eprintln!("skipped in part: this process has no {name}");
                continue;
            };
            let start = line.split('-').next().and_then(|at| usize::from_str_radix(at, 16).ok());
            let start = start.expect("an address");
            // The heap may grow meanwhile, and its first page may be in part the program's data.
            let near = |m: &InUse| m.by == by && m.addresses.start.abs_diff(start) < page_size();
            assert!(found.iter().any(near), "{name} {start:x} in {found:x?}");
        }
    }

    #[test]
    fn what_malloc_gives_is_seen_where_it_is_no_named_heap() {
        // Threads beyond the first may have arenas that are plain mappings (glibc).
        let thread = std::thread::spawn(|| {
            let byte = |m: &InUse| m.by == UsedBy::Heap && m.addresses.len() == 1;
            seen().into_iter().find(byte).map(|m| m.addresses.start)
        });
        let given = thread.join().expect("a thread").expect("malloc gives something");
        let mappings = Maps::open().and_then(|maps| maps.within(given..given + 1));
        assert_eq!(mappings.expect("procfs").len(), 1, "{given:x}");
    }

    #[test]
    fn every_thread_is_seen_at_the_distances_of_the_calling_one() {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            // SAFETY: no preconditions.
            let id = unsafe { libc::gettid() }.unsigned_abs();
            let _ = tell.send((id, robust_list(id), own_points()));
            let _ = ended.recv();
        });
        let (id, list, points) = told.recv().expect("it runs");
        let found: Vec<_> = seen().into_iter().filter(|m| m.by == UsedBy::Thread(id)).collect();
        drop(end);
        other.join().expect("a thread");
        let Some(list) = list else {
            eprintln!("skipped: get_robust_list(2) is denied, or the C library makes no list");
            return;
        };
        let points = points.into_iter().chain([list]);
        for point in points {
            let has = |m: &InUse| m.addresses == (point..point + 1);
            assert!(found.iter().any(has), "{point:x} of thread {id} in {found:x?}");
        }
    }

    #[test]
    fn fields_are_counted_behind_the_name_and_zero_is_hidden() {
        let stat = "7 (a) R 1) S 4 5 6";
        assert_eq!(field(stat, 4), Some(4));
        assert_eq!(field(stat, 6), Some(6));
        assert_eq!(field(stat, 7), None);
        assert_eq!(field("7 (a) S 0", 4), None);
    }
}
