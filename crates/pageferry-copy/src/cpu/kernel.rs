//! Copy kernels: which there are, which this machine can run, and running one.
//!
//! # Why copying memory that others write is sound here
//! A data race is undefined behaviour between accesses that the Rust abstract machine makes.
//! The kernels are assembly, or libc's `memcpy` called from assembly by address: the compiler
//! sees a call with integers and knows nothing of the accesses behind it. No reference, slice
//! or typed access to the memory exists on our side, so what other threads do to it cannot
//! contradict anything the compiler assumes. What is copied while it is written is some mixture
//! of old and new bytes; the transaction copies such pages again once they are still.
//!
//! # What can go wrong
//! A fault ends one copy with [`CopyFault`], on x86-64. Elsewhere the only kernel is `memcpy`,
//! unguarded, and a fault ends the process: see [`recovers_from_faults`].

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

#[cfg(target_arch = "x86_64")]
use super::{
    guard, records,
    x86_64::{self, CopyFn, Outcome},
};
use crate::engine::CopyError;

/// How the bytes are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KernelFamily {
    /// libc's `memcpy`.
    Memcpy,
    /// `rep movsb`, the microcoded copy.
    RepMovsb,
    /// Non-temporal stores of 16 bytes.
    Sse2Nt,
    /// Non-temporal stores of 32 bytes.
    Avx2Nt,
    /// Non-temporal stores of 64 bytes.
    Avx512Nt,
}

impl KernelFamily {
    const ALL: [Self; 5] =
        [Self::Memcpy, Self::RepMovsb, Self::Sse2Nt, Self::Avx2Nt, Self::Avx512Nt];

    fn name(self) -> &'static str {
        match self {
            Self::Memcpy => "memcpy",
            Self::RepMovsb => "rep-movsb",
            Self::Sse2Nt => "sse2-nt",
            Self::Avx2Nt => "avx2-nt",
            Self::Avx512Nt => "avx512-nt",
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn runs_here(self) -> bool {
        match self {
            Self::Memcpy | Self::RepMovsb | Self::Sse2Nt => true,
            Self::Avx2Nt => std::is_x86_feature_detected!("avx2"),
            Self::Avx512Nt => std::is_x86_feature_detected!("avx512f"),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn runs_here(self) -> bool {
        self == Self::Memcpy
    }
}

/// A copy kernel that this machine can run. Written as `avx2-nt+prefetch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Kernel {
    family: KernelFamily,
    prefetch: bool,
}

/// A kernel's name that means nothing here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no copy kernel '{name}' on this machine; available: {available}")]
#[non_exhaustive]
pub struct UnknownKernel {
    /// What was asked for.
    pub name: String,
    /// What there is, separated by commas.
    pub available: String,
}

/// A copy or comparison met memory that cannot be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("memory fault at {addr:#x} (signal {signal})")]
pub struct CopyFault {
    /// The address (`si_addr`); 0 if the kernel gave none.
    pub addr: usize,
    /// `SIGSEGV` or `SIGBUS`.
    pub signal: i32,
}

impl From<CopyFault> for CopyError {
    fn from(fault: CopyFault) -> Self {
        Self::MemoryFault { addr: fault.addr, signal: fault.signal }
    }
}

impl Kernel {
    /// libc's `memcpy`: the kernel that every machine has.
    pub const MEMCPY: Self = Self { family: KernelFamily::Memcpy, prefetch: false };

    /// The kernel of a family, with or without software prefetch; `None` if this machine
    /// cannot run it.
    pub fn new(family: KernelFamily, prefetch: bool) -> Option<Self> {
        let possible = family.runs_here() && (!prefetch || cfg!(target_arch = "x86_64"));
        possible.then_some(Self { family, prefetch })
    }

    /// All kernels that this machine can run.
    pub fn available() -> Vec<Self> {
        (KernelFamily::ALL.into_iter())
            .flat_map(|family| [false, true].map(|prefetch| Self::new(family, prefetch)))
            .flatten()
            .collect()
    }

    /// How it moves bytes.
    pub fn family(self) -> KernelFamily {
        self.family
    }

    /// Whether it prefetches.
    pub fn prefetch(self) -> bool {
        self.prefetch
    }

    /// Makes ready what the first copy on a thread needs, so that no copy of the calling thread asks the
    /// allocator for anything: others may wait for that copy while they hold the allocator's lock.
    pub fn prepare_thread() {
        #[cfg(target_arch = "x86_64")]
        {
            guard::install();
            records::with_own(|_| ());
        }
    }

    /// Copies `len` bytes, which may be any number at any addresses. After it returns, a store
    /// by this thread that another thread sees means that it sees the copy too.
    ///
    /// # Errors
    /// [`CopyFault`] if some of the memory cannot be accessed; the destination's content is
    /// then undefined.
    ///
    /// # Safety
    /// `dst .. dst + len` does not overlap the source and is the caller's to write, and holds
    /// nothing that Rust code looks at meanwhile. Where [`recovers_from_faults`] is false, both
    /// ranges must be accessible.
    pub unsafe fn copy(self, dst: usize, src: usize, len: usize) -> Result<(), CopyFault> {
        // SAFETY: the caller's promise.
        let result = unsafe { self.copy_unfenced(dst, src, len, src) };
        fence();
        result
    }

    /// Copies without the closing [`fence`]. `next` is where the caller's next copy will read,
    /// for prefetching; it need not be mapped.
    ///
    /// # Safety
    /// As [`Kernel::copy`].
    #[cfg(target_arch = "x86_64")]
    pub(crate) unsafe fn copy_unfenced(
        self,
        dst: usize,
        src: usize,
        len: usize,
        next: usize,
    ) -> Result<(), CopyFault> {
        guard::install();
        let nt: CopyFn = match (self.family, self.prefetch) {
            (KernelFamily::Memcpy, prefetch) => {
                let memcpy = libc::memcpy as *const () as usize;
                return records::with_own(|record| {
                    in_blocks(prefetch, dst, src, len, next, |dst, src, len| {
                        // SAFETY: the caller's promise; the record is this thread's.
                        unsafe { x86_64::pageferry_copy_memcpy(dst, src, len, memcpy, record) }
                    })
                });
            }
            (KernelFamily::RepMovsb, prefetch) => {
                return in_blocks(prefetch, dst, src, len, next, |dst, src, len| {
                    // SAFETY: the caller's promise.
                    unsafe { x86_64::pageferry_copy_movsb(dst, src, len, 0) }
                });
            }
            (KernelFamily::Sse2Nt, false) => x86_64::pageferry_copy_sse2,
            (KernelFamily::Sse2Nt, true) => x86_64::pageferry_copy_sse2_pf,
            (KernelFamily::Avx2Nt, false) => x86_64::pageferry_copy_avx2,
            (KernelFamily::Avx2Nt, true) => x86_64::pageferry_copy_avx2_pf,
            (KernelFamily::Avx512Nt, false) => x86_64::pageferry_copy_avx512,
            (KernelFamily::Avx512Nt, true) => x86_64::pageferry_copy_avx512_pf,
        };
        // SAFETY: the caller's promise; a `Kernel` exists only where the CPU can run it.
        outcome(unsafe { nt(dst, src, len, next) }).map(|_| ())
    }

    /// Copies without the closing [`fence`].
    ///
    /// # Safety
    /// As [`Kernel::copy`].
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) unsafe fn copy_unfenced(
        self,
        dst: usize,
        src: usize,
        len: usize,
        _next: usize,
    ) -> Result<(), CopyFault> {
        type Memcpy = unsafe extern "C" fn(
            *mut libc::c_void,
            *const libc::c_void,
            usize,
        ) -> *mut libc::c_void;
        static MEMCPY: Memcpy = libc::memcpy;
        // SAFETY: a volatile read of a static. It hides from the compiler which function is
        // called, so that it cannot treat the copy as its own access.
        let memcpy = unsafe { std::ptr::read_volatile(&raw const MEMCPY) };
        // SAFETY: the caller's promise.
        unsafe {
            memcpy(
                std::ptr::with_exposed_provenance_mut(dst),
                std::ptr::with_exposed_provenance(src),
                len,
            )
        };
        Ok(())
    }
}

/// Orders the copies of this thread before its later stores.
pub(crate) fn fence() {
    #[cfg(target_arch = "x86_64")]
    x86_64::fence();
    #[cfg(not(target_arch = "x86_64"))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
}

/// Whether a memory fault during a copy is an error of that copy (true on x86-64, once the
/// handlers could be installed) or ends the process.
pub fn recovers_from_faults() -> bool {
    #[cfg(target_arch = "x86_64")]
    return guard::install();
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Offset of the first byte in which two ranges of `len` bytes differ, if they do. Either may
/// be written meanwhile; every byte is read once.
///
/// # Errors
/// [`CopyFault`] if some of the memory cannot be accessed.
///
/// # Safety
/// Reading the ranges has no side effects (they are no device registers). Where
/// [`recovers_from_faults`] is false, both must be accessible.
pub unsafe fn differs(a: usize, b: usize, len: usize) -> Result<Option<usize>, CopyFault> {
    #[cfg(target_arch = "x86_64")]
    let offset = {
        guard::install();
        // SAFETY: the caller's promise; AVX2 is used only where there is AVX2.
        outcome(unsafe {
            if std::is_x86_feature_detected!("avx2") {
                x86_64::pageferry_copy_differs_avx2(a, b, len)
            } else {
                x86_64::pageferry_copy_differs_sse2(a, b, len)
            }
        })?
    };
    #[cfg(not(target_arch = "x86_64"))]
    let offset = (0..len)
        .find(|&at| {
            let byte = |base: usize| {
                let addr = std::ptr::with_exposed_provenance::<u8>(base + at);
                // SAFETY: the caller's promise. An atomic load, because others may write it.
                unsafe { &*addr.cast::<std::sync::atomic::AtomicU8>() }
                    .load(std::sync::atomic::Ordering::Relaxed)
            };
            byte(a) != byte(b)
        })
        .unwrap_or(len);
    Ok((offset < len).then_some(offset))
}

#[cfg(target_arch = "x86_64")]
fn outcome(outcome: Outcome) -> Result<usize, CopyFault> {
    match i32::try_from(outcome.signal) {
        Ok(0) => Ok(outcome.value),
        signal => Err(CopyFault { addr: outcome.value, signal: signal.unwrap_or_default() }),
    }
}

/// Copies in one go or, with prefetch, in blocks, reading each block ahead during the copy of
/// the one before it.
#[cfg(target_arch = "x86_64")]
fn in_blocks(
    prefetch: bool,
    dst: usize,
    src: usize,
    len: usize,
    next: usize,
    copy: impl Fn(usize, usize, usize) -> Outcome,
) -> Result<(), CopyFault> {
    /// A base page: long enough for the start-up cost of `rep movsb` to be small.
    const BLOCK: usize = 4096;
    if !prefetch {
        return outcome(copy(dst, src, len)).map(|_| ());
    }
    let mut at = 0;
    while at < len {
        let size = BLOCK.min(len - at);
        let ahead = at + size;
        let (from, bytes) = if ahead < len {
            (src + ahead, BLOCK.min(len - ahead))
        } else {
            (next, BLOCK.min(len))
        };
        // SAFETY: prefetching cannot fault and changes nothing.
        unsafe { x86_64::pageferry_copy_prefetch(from, bytes) };
        outcome(copy(dst + at, src + at, size))?;
        at = ahead;
    }
    Ok(())
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = if self.prefetch { "+prefetch" } else { "" };
        f.pad(&format!("{}{suffix}", self.family.name()))
    }
}

impl FromStr for Kernel {
    type Err = UnknownKernel;

    fn from_str(name: &str) -> Result<Self, UnknownKernel> {
        let available = Self::available();
        let found = available.iter().find(|kernel| kernel.to_string() == name);
        found.copied().ok_or_else(|| UnknownKernel {
            name: name.to_owned(),
            available: (available.iter().map(ToString::to_string)).collect::<Vec<_>>().join(", "),
        })
    }
}

impl From<Kernel> for String {
    fn from(kernel: Kernel) -> Self {
        kernel.to_string()
    }
}

impl TryFrom<String> for Kernel {
    type Error = UnknownKernel;

    fn try_from(name: String) -> Result<Self, UnknownKernel> {
        name.parse()
    }
}
