//! Raw access to memory that is being moved: the only unsafe code of the bench.
//!
//! # What must always hold
//! - Memory of a region or buffer is touched through [`Words`] alone, word by word, atomically:
//!   other threads write it, and its pages change under it, so no reference or slice over plain
//!   data may exist.
//! - [`Words`] and [`Buffer`] check every index: a wrong one panics and touches nothing.
//!
//! # What can go wrong
//! An access may wait, for as long as the page is away: that is what is measured.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use pageferry::Region;
use pageferry_copy::{CopyFault, Kernel};
use pageferry_sys::mm::Advice;
use pageferry_sys::{Errno, Linux, Sys};

/// Bytes of a word.
pub(super) const WORD: usize = 8;
/// Alignment of buffers, so that huge pages fit.
const HUGE: usize = 2 << 20;

/// The words of a region or buffer, which outlives `'a`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Words<'a> {
    /// Exposed address of the first, a multiple of [`WORD`].
    base: usize,
    len: usize,
    owner: PhantomData<&'a ()>,
}

impl<'a> Words<'a> {
    /// The words of a region.
    pub(super) fn of(region: &'a Region) -> Self {
        let base = region.as_ptr().expose_provenance();
        Self { base, len: region.len() / WORD, owner: PhantomData }
    }

    /// The words of a buffer.
    pub(super) fn of_buffer(buffer: &'a Buffer) -> Self {
        let base = std::ptr::with_exposed_provenance::<u8>(buffer.start).expose_provenance();
        Self { base, len: buffer.len / WORD, owner: PhantomData }
    }

    /// How many words there are.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn word(&self, index: usize) -> &'a AtomicU64 {
        assert!(index < self.len, "word {index} of {}", self.len);
        let at = std::ptr::with_exposed_provenance_mut(self.base + index * WORD);
        // SAFETY: the index is in range, so `at` is a word of the owner's mapping, which is
        // readable, writable, page-aligned and outlives 'a. Everybody in this process accesses it
        // atomically, as here, or by the assembly of a copy kernel, which the compiler cannot see.
        unsafe { AtomicU64::from_ptr(at) }
    }

    /// Reads a word. Relaxed: a word is checked by itself, nothing is published by it.
    #[inline]
    pub(super) fn load(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Relaxed)
    }

    /// Writes a word.
    #[inline]
    pub(super) fn store(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Relaxed);
    }
}

/// Populated private memory of ours, unmapped at the end; no engine knows of it.
#[derive(Debug)]
pub(super) struct Buffer {
    start: usize,
    len: usize,
}

impl Buffer {
    /// Maps and populates `len` bytes (a multiple of 4 KiB), in huge pages if there are any.
    pub(super) fn new(len: usize, huge: bool) -> Result<Self, Errno> {
        let buffer = Self { start: Linux.map(len, HUGE)?, len };
        let advice = if huge { Advice::HugePage } else { Advice::NoHugePage };
        // SAFETY: the mapping is ours alone, and neither advice gives its content up.
        unsafe {
            // Refused by kernels without huge pages: then small ones are what there is.
            let _ = Linux.advise(buffer.start, len, advice);
            Linux.advise(buffer.start, len, Advice::PopulateWrite)?;
        }
        Ok(buffer)
    }

    /// Its length in bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Its first address.
    pub(super) fn addr(&self) -> usize {
        self.start
    }

    /// Copies a range of `from` to the same range of this buffer.
    pub(super) fn copy_from(
        &self,
        from: &Self,
        range: Range<usize>,
        kernel: Kernel,
    ) -> Result<(), CopyFault> {
        assert!(range.start <= range.end && range.end <= self.len.min(from.len), "{range:?}");
        assert!(self.start != from.start, "a buffer is not copied to itself");
        // SAFETY: both ranges lie within mappings that live as long as `self` and `from`, two
        // different mappings; no Rust object lies in them and nothing reads them but copies.
        unsafe { kernel.copy(self.start + range.start, from.start + range.start, range.len()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and whoever copies holds a reference to this buffer.
        let unmapped = unsafe { Linux.unmap(self.start, self.len) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}
