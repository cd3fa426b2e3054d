//! Memory faults while copying are results; other faults are what they always were.
#![cfg(all(not(loom), target_arch = "x86_64", target_os = "linux"))]

mod common;

use std::{
    os::{fd::AsRawFd, unix::process::ExitStatusExt},
    process::Command,
    ptr,
    sync::atomic::{AtomicUsize, Ordering},
};

use common::Pages;
use libc::{PROT_NONE, PROT_READ, SIGBUS, SIGSEGV};
use pageferry_copy::{CopyFault, Kernel, differs, recovers_from_faults};

const PAGE: usize = 4096;

#[test]
fn a_page_that_may_not_be_read_is_an_error_with_its_address() {
    for kernel in Kernel::available() {
        let (dst, src) = (Pages::new(4 * PAGE), Pages::new(4 * PAGE));
        src.fill(9);
        src.protect(2 * PAGE, PAGE, PROT_NONE);
        // SAFETY: both mappings are ours.
        let result = unsafe { kernel.copy(dst.addr, src.addr, 4 * PAGE) };
        let fault = result.expect_err("a page in the middle cannot be read");
        assert_eq!(fault.signal, SIGSEGV, "{kernel}");
        let page = src.addr + 2 * PAGE;
        assert!((page..page + PAGE).contains(&fault.addr), "{kernel}: {fault}");
    }
}

#[test]
fn a_destination_that_may_not_be_written_is_an_error() {
    for kernel in Kernel::available() {
        let (dst, src) = (Pages::new(2 * PAGE), Pages::new(2 * PAGE));
        dst.protect(PAGE, PAGE, PROT_READ);
        // SAFETY: both mappings are ours.
        let result = unsafe { kernel.copy(dst.addr + 5, src.addr, PAGE) };
        let fault = result.expect_err("the second page cannot be written");
        assert!((dst.addr + PAGE..dst.addr + 2 * PAGE).contains(&fault.addr), "{kernel}: {fault}");
    }
}

#[test]
fn an_unmapped_page_is_an_error() {
    for kernel in Kernel::available() {
        let (dst, src) = (Pages::new(PAGE), Pages::new(PAGE));
        src.protect(0, PAGE, PROT_NONE);
        // SAFETY: the destination is ours. Address 4096 is below vm.mmap_min_addr, so it is
        // never mapped.
        let result = unsafe { kernel.copy(dst.addr, PAGE, 100) };
        assert_eq!(result, Err(CopyFault { addr: PAGE, signal: SIGSEGV }), "{kernel}");
    }
}

#[test]
fn a_file_cut_short_under_its_mapping_is_a_bus_error_of_that_copy_only() {
    let file = tempfile::tempfile().expect("a temporary file");
    file.set_len(2 * PAGE as u64).expect("room for two pages");
    // SAFETY: a new mapping of our own file.
    let map = unsafe {
        libc::mmap(ptr::null_mut(), 2 * PAGE, PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    assert_ne!(map, libc::MAP_FAILED);
    file.set_len(PAGE as u64).expect("a shorter file");
    let map = map.expose_provenance();
    let dst = Pages::new(2 * PAGE);
    for kernel in Kernel::available() {
        // SAFETY: the destination is ours, the source is a mapping nobody else uses.
        unsafe {
            let fault = kernel.copy(dst.addr, map, 2 * PAGE).expect_err("the file ends before");
            assert_eq!((fault.signal, fault.addr & !(PAGE - 1)), (SIGBUS, map + PAGE), "{kernel}");
            assert_eq!(kernel.copy(dst.addr, map, PAGE), Ok(()), "{kernel}");
        }
    }
    // SAFETY: our own mapping, no longer used.
    unsafe { libc::munmap(ptr::with_exposed_provenance_mut(map), 2 * PAGE) };
}

#[test]
fn comparing_with_memory_that_cannot_be_read_is_an_error() {
    let (a, b) = (Pages::new(2 * PAGE), Pages::new(2 * PAGE));
    b.protect(PAGE, PAGE, PROT_NONE);
    // SAFETY: both are plain memory of ours.
    let fault = unsafe { differs(a.addr, b.addr, 2 * PAGE) }.expect_err("half cannot be read");
    assert_eq!(fault.addr, b.addr + PAGE);
    // SAFETY: as above.
    assert_eq!(unsafe { differs(a.addr, b.addr, PAGE) }, Ok(None));
}

#[test]
fn values_in_registers_survive_a_fault() {
    // The wrapper around memcpy must restore what the caller keeps in callee-saved registers.
    let (dst, src) = (Pages::new(PAGE), Pages::new(PAGE));
    src.protect(0, PAGE, PROT_NONE);
    let mut sums = [0_usize; 6];
    for kernel in Kernel::available() {
        for round in 1..200_usize {
            // SAFETY: both mappings are ours.
            let result = unsafe { kernel.copy(dst.addr, src.addr, 8 + 16 * round) };
            for (at, sum) in sums.iter_mut().enumerate() {
                *sum += round * (at + 1) + usize::from(result.is_err());
            }
        }
    }
    let kernels = Kernel::available().len();
    let want: Vec<usize> = (1..=6).map(|at| kernels * (19_900 * at + 199)).collect();
    assert_eq!(sums.as_slice(), want);
}

/// Runs the test `name` of this file in a process of its own, as a child that may die.
fn in_child(name: &str) -> std::process::Output {
    let me = std::env::current_exe().expect("the path of this test");
    Command::new(me)
        .args(["--exact", name, "--nocapture"])
        .env("PAGEFERRY_TEST_CHILD", name)
        .output()
        .expect("this test can be run again")
}

fn is_child(name: &str) -> bool {
    std::env::var_os("PAGEFERRY_TEST_CHILD").is_some_and(|child| child == name)
}

fn touch_nowhere() {
    // SAFETY: not safe at all: it reads an address that is never mapped, in a process that is
    // to die of it. Assembly, so that the compiler makes nothing of it.
    unsafe { std::arch::asm!("mov {x}, [{x}]", x = inout(reg) 4096_usize => _) };
}

#[test]
fn a_fault_outside_the_kernels_still_kills() {
    const NAME: &str = "a_fault_outside_the_kernels_still_kills";
    if is_child(NAME) {
        assert!(recovers_from_faults());
        touch_nowhere();
        return;
    }
    assert_eq!(in_child(NAME).status.signal(), Some(SIGSEGV));
}

#[test]
fn a_signal_sent_by_a_process_still_kills() {
    const NAME: &str = "a_signal_sent_by_a_process_still_kills";
    if is_child(NAME) {
        // The Rust runtime's own handler, which is there first, survives one such signal.
        // SAFETY: sets the default action.
        unsafe { libc::signal(SIGBUS, libc::SIG_DFL) };
        assert!(recovers_from_faults());
        // SAFETY: sends a signal to ourselves.
        unsafe { libc::raise(SIGBUS) };
        return;
    }
    assert_eq!(in_child(NAME).status.signal(), Some(SIGBUS));
}

static SEEN: AtomicUsize = AtomicUsize::new(0);

extern "C" fn users_handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's arguments. Skips the faulting instruction, `mov r, [r]` of 3 bytes.
    unsafe {
        SEEN.store((*info).si_addr().addr() + signal as usize, Ordering::Relaxed);
        (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] += 3;
    }
}

/// Installs [`users_handler`], before ours.
fn install_users_handler() {
    // SAFETY: installs a handler of the right kind.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = users_handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(SIGSEGV, &action, ptr::null_mut()), 0);
    }
}

#[test]
fn the_handler_that_was_there_before_still_gets_its_faults() {
    const NAME: &str = "the_handler_that_was_there_before_still_gets_its_faults";
    if is_child(NAME) {
        install_users_handler();
        let dst = Pages::new(PAGE);
        // SAFETY: the destination is ours; the source is never mapped.
        let copied = unsafe { Kernel::MEMCPY.copy(dst.addr, PAGE, 64) };
        assert_eq!(copied, Err(CopyFault { addr: PAGE, signal: SIGSEGV }));
        assert_eq!(SEEN.load(Ordering::Relaxed), 0, "a fault of ours went to the user's handler");
        // SAFETY: reads an address that is never mapped; the handler skips it. rcx makes the
        // instruction 3 bytes long.
        unsafe { std::arch::asm!("mov rcx, [rcx]", inout("rcx") 4096_usize => _) };
        assert_eq!(SEEN.load(Ordering::Relaxed), PAGE + SIGSEGV as usize);
        return;
    }
    let output = in_child(NAME);
    assert!(output.status.success(), "{output:?}");
}

/// In a library that was loaded at run time a thread-local may have to be allocated when it is first
/// used, which must not happen in a signal handler. Here none can be used at all.
#[test]
fn a_fault_on_a_thread_without_thread_locals_reaches_the_handler_that_was_there() {
    const NAME: &str =
        "a_fault_on_a_thread_without_thread_locals_reaches_the_handler_that_was_there";
    /// arch/x86/include/uapi/asm/prctl.h.
    const ARCH_SET_FS: libc::c_long = 0x1002;
    if is_child(NAME) {
        install_users_handler();
        assert!(recovers_from_faults());
        // Thread-locals of a program lie below the thread pointer (variant II in ELF Handling For
        // Thread-Local Storage, 3.4.6); what the C library keeps, above.
        let pages = Pages::new(2 * PAGE);
        pages.protect(0, PAGE, PROT_NONE);
        // SAFETY: with the pointer set aside only system calls are made and the handlers run, until
        // it is back; no other handler can, since all other signals are blocked. The instruction of
        // 3 bytes reads an address that is never mapped, and is skipped by the handler.
        unsafe {
            let mut others: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut others);
            libc::sigdelset(&raw mut others, SIGSEGV);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const others, ptr::null_mut());
            let own: usize;
            std::arch::asm!("mov {}, fs:0", out(reg) own);
            libc::syscall(libc::SYS_arch_prctl, ARCH_SET_FS, pages.addr + PAGE);
            std::arch::asm!("mov rcx, [rcx]", inout("rcx") 4096_usize => _);
            libc::syscall(libc::SYS_arch_prctl, ARCH_SET_FS, own);
        }
        assert_eq!(SEEN.load(Ordering::Relaxed), PAGE + SIGSEGV as usize);
        return;
    }
    let output = in_child(NAME);
    assert!(output.status.success(), "{output:?}");
}
