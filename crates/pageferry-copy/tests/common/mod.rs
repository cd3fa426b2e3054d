//! Memory that tests may do as they like with.
#![allow(dead_code, reason = "not every test file uses all of it")]

use std::ptr;

/// A private anonymous mapping, unmapped when dropped.
pub(crate) struct Pages {
    pub(crate) addr: usize,
    pub(crate) len: usize,
}

impl Pages {
    pub(crate) fn new(len: usize) -> Self {
        // SAFETY: a new mapping.
        let addr = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(addr, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self { addr: addr.expose_provenance(), len }
    }

    /// Writes a pattern in which every byte depends on its place and on `seed`.
    pub(crate) fn fill(&self, seed: u8) {
        for at in 0..self.len {
            // SAFETY: within the mapping.
            unsafe { *ptr::with_exposed_provenance_mut(self.addr + at) = pattern(at, seed) };
        }
    }

    pub(crate) fn byte(&self, at: usize) -> u8 {
        assert!(at < self.len);
        // SAFETY: within the mapping.
        unsafe { *ptr::with_exposed_provenance(self.addr + at) }
    }

    pub(crate) fn protect(&self, at: usize, len: usize, prot: i32) {
        assert!(at + len <= self.len);
        // SAFETY: within the mapping, which only the test uses.
        let rc =
            unsafe { libc::mprotect(ptr::with_exposed_provenance_mut(self.addr + at), len, prot) };
        assert_eq!(rc, 0);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(self.addr), self.len) };
    }
}

pub(crate) fn pattern(at: usize, seed: u8) -> u8 {
    (at.wrapping_mul(167) >> 3).to_le_bytes()[0] ^ at.to_le_bytes()[0] ^ seed
}
