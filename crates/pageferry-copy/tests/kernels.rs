//! The copy kernels on their own: exact at every length and alignment.
#![cfg(not(loom))]

mod common;

use common::{Pages, pattern};
use pageferry_copy::{Kernel, KernelFamily, differs};
use proptest::prelude::*;

const ROOM: usize = 64 << 10;

fn copies_exactly(kernel: Kernel, dst_at: usize, src_at: usize, len: usize) {
    let (dst, src) = (Pages::new(ROOM), Pages::new(ROOM));
    dst.fill(0xa5);
    src.fill(0x3c);
    // SAFETY: within both mappings, which are apart and ours.
    let result = unsafe { kernel.copy(dst.addr + dst_at, src.addr + src_at, len) };
    assert_eq!(result, Ok(()), "{kernel}");
    for at in 0..ROOM {
        let want = if (dst_at..dst_at + len).contains(&at) {
            pattern(at - dst_at + src_at, 0x3c)
        } else {
            pattern(at, 0xa5)
        };
        assert_eq!(dst.byte(at), want, "{kernel}: byte {at}, {dst_at} <- {src_at}, {len} bytes");
    }
}

#[test]
fn every_kernel_copies_every_short_length_at_every_alignment_class() {
    for kernel in Kernel::available() {
        for len in (0..=300).chain([1023, 1024, 1151, 1152, 1153, 4095, 4096, 4097]) {
            for (dst_at, src_at) in [(64, 64), (65, 64), (64, 67), (127, 1), (96, 33)] {
                copies_exactly_quickly(kernel, dst_at, src_at, len);
            }
        }
    }
}

/// Like `copies_exactly`, looking only near the copied bytes.
fn copies_exactly_quickly(kernel: Kernel, dst_at: usize, src_at: usize, len: usize) {
    const SMALL: usize = 8192;
    let src: Vec<u8> = (0..SMALL).map(|at| pattern(at, 1)).collect();
    let mut dst = vec![0xee_u8; SMALL];
    let (to, from) = (dst.as_mut_ptr().expose_provenance(), src.as_ptr().expose_provenance());
    // SAFETY: within both vectors, which nothing else uses.
    unsafe { kernel.copy(to + dst_at, from + src_at, len) }.expect("both are mapped");
    assert_eq!(&dst[dst_at..dst_at + len], &src[src_at..src_at + len], "{kernel} {len}");
    assert!(dst[..dst_at].iter().all(|&byte| byte == 0xee), "{kernel} {len}: before");
    assert!(dst[dst_at + len..].iter().all(|&byte| byte == 0xee), "{kernel} {len}: after");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_kernel_copies_exactly_and_leaves_the_neighbours_alone(
        dst_at in 0_usize..5000, src_at in 0_usize..5000, len in 0_usize..50_000,
    ) {
        for kernel in Kernel::available() {
            copies_exactly(kernel, dst_at, src_at, len);
        }
    }

    #[test]
    fn differs_finds_the_first_of_the_changed_bytes(
        len in 1_usize..5000, skew in 0_usize..64, changes in prop::collection::vec(0_usize..5000, 0..3),
    ) {
        let a: Vec<u8> = (0..len).map(|at| pattern(at, 0)).collect();
        let mut b = vec![0; skew];
        b.extend(&a);
        for change in &changes {
            if *change < len {
                b[skew + change] ^= 0x10;
            }
        }
        let want = (0..len).find(|&at| a[at] != b[skew + at]);
        let (a, b) = (a.as_ptr().expose_provenance(), b.as_ptr().expose_provenance());
        // SAFETY: both vectors live on and are plain memory.
        prop_assert_eq!(unsafe { differs(a, b + skew, len) }, Ok(want));
    }
}

#[test]
fn a_kernels_name_parses_back_to_it() {
    for kernel in Kernel::available() {
        assert_eq!(kernel.to_string().parse(), Ok(kernel));
        let json = serde_json::to_string(&kernel).expect("a string");
        assert_eq!(serde_json::from_str::<Kernel>(&json).expect("the same string"), kernel);
    }
}

#[test]
fn an_unknown_kernel_is_named_with_those_there_are() {
    let error = "turbo".parse::<Kernel>().expect_err("there is no such kernel");
    let text = error.to_string();
    assert!(text.contains("'turbo'") && text.contains("memcpy"), "{text}");
}

#[test]
fn memcpy_is_always_available() {
    assert_eq!(Kernel::new(KernelFamily::Memcpy, false), Some(Kernel::MEMCPY));
    assert!(Kernel::available().contains(&Kernel::MEMCPY));
}
