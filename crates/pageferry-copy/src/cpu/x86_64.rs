//! The copy kernels of x86-64, in assembly.
//!
//! # What must always hold
//! - Every kernel between `pageferry_copy_text` and `pageferry_copy_text_end` is a leaf: it
//!   pushes nothing, calls nothing and changes only registers that the System V ABI lets a
//!   function change. So wherever in it an access faults, the stack is as it was at entry, and
//!   the [guard](super::guard) can end it by going on at a landing pad, which returns to the
//!   kernel's caller.
//! - Kernels from `pageferry_copy_text_avx` on may have dirtied the upper halves of vector
//!   registers; their landing pad clears them.
//! - A kernel returns `rax` = 0 and `rdx` = its result, or, out of a landing pad, `rax` = the
//!   signal and `rdx` = the faulting address, both put there by the guard.
//! - Non-temporal stores are weakly ordered (Intel SDM vol. 1, 10.4.6.2): the kernels do not
//!   fence, [`fence`] does, once for a group of copies.
//!
//! `pageferry_copy_memcpy` is no leaf. It writes its stack pointer to a [record](super::records),
//! which the guard finds by the stack that the fault happened on: there lies the record's address,
//! and below it where `memcpy` returns to. The landing pad restores the callee-saved registers from
//! there. It assumes that no shadow stack is in force, as is so for every Rust program today.

use std::arch::{asm, global_asm};

/// What a kernel returns, in `rax` and `rdx`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Outcome {
    /// 0, or the signal that ended the kernel.
    pub(super) signal: usize,
    /// The kernel's result, or the address that faulted.
    pub(super) value: usize,
}

/// `(dst, src, len, next)`: copies; prefetching kernels also read the first KiB at `next`
/// ahead, which need not be mapped.
pub(super) type CopyFn = unsafe extern "C" fn(usize, usize, usize, usize) -> Outcome;

unsafe extern "C" {
    static pageferry_copy_text: u8;
    static pageferry_copy_text_avx: u8;
    static pageferry_copy_text_end: u8;
    static pageferry_copy_called: u8;
    static pageferry_copy_landing: u8;
    static pageferry_copy_landing_avx: u8;
    static pageferry_copy_landing_memcpy: u8;
    static pageferry_copy_landing_memcpy_avx: u8;

    pub(super) fn pageferry_copy_movsb(d: usize, s: usize, len: usize, next: usize) -> Outcome;
    pub(super) fn pageferry_copy_sse2(d: usize, s: usize, len: usize, next: usize) -> Outcome;
    pub(super) fn pageferry_copy_sse2_pf(d: usize, s: usize, len: usize, next: usize) -> Outcome;
    pub(super) fn pageferry_copy_avx2(d: usize, s: usize, len: usize, next: usize) -> Outcome;
    pub(super) fn pageferry_copy_avx2_pf(d: usize, s: usize, len: usize, next: usize) -> Outcome;
    pub(super) fn pageferry_copy_avx512(d: usize, s: usize, len: usize, next: usize) -> Outcome;
    pub(super) fn pageferry_copy_avx512_pf(d: usize, s: usize, len: usize, next: usize) -> Outcome;
    /// Calls `memcpy` under the protection of `record`.
    pub(super) fn pageferry_copy_memcpy(
        dst: usize,
        src: usize,
        len: usize,
        memcpy: usize,
        record: *mut usize,
    ) -> Outcome;
    /// Reads one byte of every cache line of `len` bytes ahead. Cannot fault.
    pub(super) fn pageferry_copy_prefetch(addr: usize, len: usize);
    /// Offset of the first byte that differs, or `len`.
    pub(super) fn pageferry_copy_differs_sse2(a: usize, b: usize, len: usize) -> Outcome;
    /// The same, with AVX2.
    pub(super) fn pageferry_copy_differs_avx2(a: usize, b: usize, len: usize) -> Outcome;
}

/// Orders non-temporal stores before every later store, such as the one that says "done".
pub(super) fn fence() {
    // SAFETY: sfence touches neither memory nor registers.
    unsafe { asm!("sfence", options(nostack, preserves_flags)) };
}

/// The landing pad for a fault at `rip`, if that is in a leaf kernel.
pub(super) fn landing(rip: usize) -> Option<usize> {
    let text = (&raw const pageferry_copy_text).addr();
    let avx = (&raw const pageferry_copy_text_avx).addr();
    let end = (&raw const pageferry_copy_text_end).addr();
    if (text..avx).contains(&rip) {
        Some((&raw const pageferry_copy_landing).addr())
    } else if (avx..end).contains(&rip) {
        Some((&raw const pageferry_copy_landing_avx).addr())
    } else {
        None
    }
}

/// Where `memcpy` returns to, called by the wrapper.
pub(super) fn back_from_memcpy() -> usize {
    (&raw const pageferry_copy_called).addr()
}

/// The landing pad for a fault inside `memcpy`, which may have used AVX where there is AVX.
pub(super) fn landing_memcpy(avx: bool) -> usize {
    if avx {
        (&raw const pageferry_copy_landing_memcpy_avx).addr()
    } else {
        (&raw const pageferry_copy_landing_memcpy).addr()
    }
}

// The prefetch distance is 1 KiB: with it AVX2 copies 18-20 GB/s, without 16-17 (one thread on
// Zen 4). In the last KiB the kernel reads ahead where the next copy will begin instead, so
// that no prefetch walks page tables for memory that nobody asked for. Reading all of a next,
// scattered 4 KiB page ahead instead measured no better (8 against 8-10 GB/s, one thread).
global_asm!(
    r#"
.pushsection .text.pageferry_copy,"ax",@progbits

.macro pageferry_begin name
    .p2align 6
    .globl \name
    .hidden \name
    .type \name, @function
    \name:
    .cfi_startproc
.endm
.macro pageferry_finish name
    .cfi_endproc
    .size \name, . - \name
.endm
.macro pageferry_mark name
    .globl \name
    .hidden \name
    \name:
.endm

.macro pageferry_block_sse2
    movdqu xmm0, [rsi]
    movdqu xmm1, [rsi + 16]
    movdqu xmm2, [rsi + 32]
    movdqu xmm3, [rsi + 48]
    movdqu xmm4, [rsi + 64]
    movdqu xmm5, [rsi + 80]
    movdqu xmm6, [rsi + 96]
    movdqu xmm7, [rsi + 112]
    movntdq [rdi], xmm0
    movntdq [rdi + 16], xmm1
    movntdq [rdi + 32], xmm2
    movntdq [rdi + 48], xmm3
    movntdq [rdi + 64], xmm4
    movntdq [rdi + 80], xmm5
    movntdq [rdi + 96], xmm6
    movntdq [rdi + 112], xmm7
.endm
.macro pageferry_block_avx2
    vmovdqu ymm0, [rsi]
    vmovdqu ymm1, [rsi + 32]
    vmovdqu ymm2, [rsi + 64]
    vmovdqu ymm3, [rsi + 96]
    vmovntdq [rdi], ymm0
    vmovntdq [rdi + 32], ymm1
    vmovntdq [rdi + 64], ymm2
    vmovntdq [rdi + 96], ymm3
.endm
.macro pageferry_block_avx512
    vmovdqu64 zmm0, [rsi]
    vmovdqu64 zmm1, [rsi + 64]
    vmovntdq [rdi], zmm0
    vmovntdq [rdi + 64], zmm1
.endm

// Bytes until the destination is aligned to a cache line, then 128 bytes at a time, then the
// rest. In: rdi, rsi, rdx = length, rcx = next.
.macro pageferry_nt name, isa, prefetch
    pageferry_begin \name
    mov r8, rdx
    mov r9, rcx
    mov ecx, edi
    neg ecx
    and ecx, 63
    cmp rcx, r8
    cmova rcx, r8
    sub r8, rcx
    test ecx, ecx
    jz 2f
    rep movsb
2:
.if \prefetch
    cmp r8, 1152
    jb 4f
    .p2align 5
3:
    prefetchnta [rsi + 1024]
    prefetchnta [rsi + 1088]
    pageferry_block_\isa
    sub rsi, -128
    sub rdi, -128
    add r8, -128
    cmp r8, 1152
    jae 3b
.endif
4:
    cmp r8, 128
    jb 6f
    .p2align 5
5:
.if \prefetch
    prefetchnta [r9]
    prefetchnta [r9 + 64]
    sub r9, -128
.endif
    pageferry_block_\isa
    sub rsi, -128
    sub rdi, -128
    add r8, -128
    cmp r8, 128
    jae 5b
6:
    mov rcx, r8
    test ecx, ecx
    jz 7f
    rep movsb
7:
.ifnc \isa,sse2
    vzeroupper
.endif
    xor eax, eax
    ret
    pageferry_finish \name
.endm

// The end of a comparison of rdi with rsi, rdx = length, which is the same up to rcx. Entered from
// above: the block there differs at its byte rax. Entered at 4: what is left is less than a block,
// and goes byte by byte.
.macro pageferry_differs_end isa
    add rcx, rax
    jmp 5f
4:
    cmp rcx, rdx
    jae 5f
    movzx eax, byte ptr [rdi + rcx]
    cmp al, byte ptr [rsi + rcx]
    jne 5f
    inc rcx
    jmp 4b
5:
    mov rdx, rcx
.ifnc \isa,sse2
    vzeroupper
.endif
    xor eax, eax
    ret
.endm

pageferry_mark pageferry_copy_text

pageferry_begin pageferry_copy_movsb
    mov rcx, rdx
    rep movsb
    xor eax, eax
    ret
pageferry_finish pageferry_copy_movsb

pageferry_nt pageferry_copy_sse2, sse2, 0
pageferry_nt pageferry_copy_sse2_pf, sse2, 1

pageferry_begin pageferry_copy_differs_sse2
    xor ecx, ecx
2:
    lea r8, [rcx + 16]
    cmp r8, rdx
    ja 4f
    movdqu xmm0, [rdi + rcx]
    movdqu xmm1, [rsi + rcx]
    pcmpeqb xmm0, xmm1
    pmovmskb eax, xmm0
    xor eax, 0xffff
    jnz 3f
    mov rcx, r8
    jmp 2b
3:
    bsf eax, eax
    pageferry_differs_end sse2
pageferry_finish pageferry_copy_differs_sse2

pageferry_mark pageferry_copy_text_avx

pageferry_nt pageferry_copy_avx2, avx2, 0
pageferry_nt pageferry_copy_avx2_pf, avx2, 1
pageferry_nt pageferry_copy_avx512, avx512, 0
pageferry_nt pageferry_copy_avx512_pf, avx512, 1

pageferry_begin pageferry_copy_differs_avx2
    xor ecx, ecx
2:
    lea r8, [rcx + 64]
    cmp r8, rdx
    ja 4f
    vmovdqu ymm0, [rdi + rcx]
    vmovdqu ymm1, [rdi + rcx + 32]
    vpcmpeqb ymm0, ymm0, [rsi + rcx]
    vpcmpeqb ymm1, ymm1, [rsi + rcx + 32]
    vpand ymm2, ymm0, ymm1
    vpmovmskb eax, ymm2
    cmp eax, -1
    jne 3f
    mov rcx, r8
    jmp 2b
3:
    vpmovmskb eax, ymm0
    vpmovmskb r9d, ymm1
    shl r9, 32
    or rax, r9
    not rax
    bsf rax, rax
    pageferry_differs_end avx2
pageferry_finish pageferry_copy_differs_avx2

pageferry_mark pageferry_copy_text_end

// The guard has set rax and rdx.
pageferry_mark pageferry_copy_landing_avx
    vzeroupper
pageferry_mark pageferry_copy_landing
    ret

pageferry_begin pageferry_copy_prefetch
    add rsi, rdi
2:
    cmp rdi, rsi
    jae 3f
    prefetchnta [rdi]
    add rdi, 64
    jmp 2b
3:
    ret
pageferry_finish pageferry_copy_prefetch

// In: rdi, rsi, rdx as memcpy takes them, rcx = memcpy, r8 = the thread's record.
pageferry_begin pageferry_copy_memcpy
    push rbx
    .cfi_adjust_cfa_offset 8
    .cfi_rel_offset rbx, 0
    push rbp
    .cfi_adjust_cfa_offset 8
    .cfi_rel_offset rbp, 0
    push r12
    .cfi_adjust_cfa_offset 8
    .cfi_rel_offset r12, 0
    push r13
    .cfi_adjust_cfa_offset 8
    .cfi_rel_offset r13, 0
    push r14
    .cfi_adjust_cfa_offset 8
    .cfi_rel_offset r14, 0
    push r15
    .cfi_adjust_cfa_offset 8
    .cfi_rel_offset r15, 0
    push r8
    .cfi_adjust_cfa_offset 8
    mov [r8], rsp
    call rcx
pageferry_mark pageferry_copy_called
    xor eax, eax
    jmp pageferry_copy_landing_memcpy
// The guard has set rax, rdx, and rsp to what the record says.
pageferry_mark pageferry_copy_landing_memcpy_avx
    vzeroupper
pageferry_mark pageferry_copy_landing_memcpy
    pop rcx
    .cfi_adjust_cfa_offset -8
    mov qword ptr [rcx], 0
    pop r15
    .cfi_adjust_cfa_offset -8
    pop r14
    .cfi_adjust_cfa_offset -8
    pop r13
    .cfi_adjust_cfa_offset -8
    pop r12
    .cfi_adjust_cfa_offset -8
    pop rbp
    .cfi_adjust_cfa_offset -8
    pop rbx
    .cfi_adjust_cfa_offset -8
    ret
pageferry_finish pageferry_copy_memcpy

.popsection
"#
);
