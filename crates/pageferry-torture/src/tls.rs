//! What the C library would keep in its heap for this library's thread-locals, kept elsewhere.
//!
//! A thread-local of a shared library is found through a table (the dtv) that glibc allocates by
//! malloc, and a destructor is noted in a list that it allocates by calloc. A mover that waits for
//! malloc's memory to come back would wait for itself. Stable Rust has no way to choose another
//! model, and the standard library comes compiled. So both functions are defined here, hidden:
//! this library's calls come here, the program's own go to the C library as ever.
//!
//! - `__tls_get_addr`: a preloaded library's thread-locals lie at a fixed distance from the thread
//!   pointer ("Static TLS", ELF Handling For Thread-Local Storage by Ulrich Drepper, 3.4.2 and
//!   4.3.6), which the dynamic linker puts where `@gottpoff` says. On arm64 the dynamic linker's
//!   descriptors do the same by themselves.
//! - `__cxa_thread_atexit_impl`: destructors of thread-locals are forgotten. What leaks are a few
//!   words of each thread of the engine.

#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".section .tbss,\"awT\",@nobits",
    ".p2align 3",
    "pageferry_torture_anchor:",
    ".zero 8",
    ".text",
    ".globl __tls_get_addr",
    ".hidden __tls_get_addr",
    ".type __tls_get_addr,@function",
    "__tls_get_addr:",
    "movq pageferry_torture_anchor@gottpoff(%rip), %rax",
    "addq %fs:0, %rax",
    "xorl %ecx, %ecx",
    "leaq pageferry_torture_anchor@dtpoff(%rcx), %rcx",
    "subq %rcx, %rax",
    "addq 8(%rdi), %rax",
    "retq",
    ".size __tls_get_addr, .-__tls_get_addr",
    ".globl __cxa_thread_atexit_impl",
    ".hidden __cxa_thread_atexit_impl",
    ".type __cxa_thread_atexit_impl,@function",
    "__cxa_thread_atexit_impl:",
    "xorl %eax, %eax",
    "retq",
    ".size __cxa_thread_atexit_impl, .-__cxa_thread_atexit_impl",
    options(att_syntax)
);

#[cfg(target_arch = "aarch64")]
std::arch::global_asm!(
    ".globl __cxa_thread_atexit_impl",
    ".hidden __cxa_thread_atexit_impl",
    ".type __cxa_thread_atexit_impl,@function",
    "__cxa_thread_atexit_impl:",
    "mov w0, #0",
    "ret",
);
