//! How moves are done in the tests of failing system calls, and what each call can fail with.

use crate::support::{fill, first_node, promised};
use pageferry::{Division, Engine, Folios, Frames, MigrateError, Order, Region, Report};
use pageferry_sys::page_size;
use std::sync::Arc;

/// How a move is done.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    pub order: Order,
    pub division: Division,
    pub folios: Folios,
    pub frames: Frames,
}

const fn way(order: Order, division: Division, folios: Folios, frames: Frames) -> Way {
    Way { order, division, folios, frames }
}

pub const WAYS: [Way; 10] = [
    way(Order::Frozen, Division::Conducted, Folios::Base, Frames::Recycled),
    way(Order::Live, Division::Conducted, Folios::Base, Frames::Recycled),
    way(Order::Frozen, Division::Shared, Folios::Base, Frames::Recycled),
    way(Order::Live, Division::Shared, Folios::Base, Frames::Recycled),
    way(Order::Frozen, Division::Conducted, Folios::Huge, Frames::Recycled),
    way(Order::Live, Division::Conducted, Folios::Huge, Frames::Recycled),
    way(Order::Frozen, Division::Shared, Folios::Huge, Frames::Fresh),
    way(Order::Live, Division::Shared, Folios::Huge, Frames::Recycled),
    way(Order::Frozen, Division::Conducted, Folios::Base, Frames::KernelCopy),
    way(Order::Live, Division::Shared, Folios::Base, Frames::Fresh),
];

/// ioctl_userfaultfd(2), UFFDIO_MOVE; EFAULT: a guard page; EINTR: a fatal signal.
pub const MOVE: &[i32] = &[
    libc::EAGAIN,
    libc::EBUSY,
    libc::EEXIST,
    libc::EINVAL,
    libc::ENOENT,
    libc::ENOMEM,
    libc::EPERM,
    libc::ESRCH,
    libc::EFAULT,
    libc::EINTR,
];
/// UFFDIO_COPY.
pub const COPY: &[i32] = &[
    libc::EAGAIN,
    libc::EEXIST,
    libc::EFAULT,
    libc::EINVAL,
    libc::ENOENT,
    libc::ENOMEM,
    libc::ENOSPC,
    libc::ESRCH,
];
/// UFFDIO_WRITEPROTECT.
pub const PROTECT: &[i32] = &[libc::EAGAIN, libc::EFAULT, libc::EINVAL, libc::ENOENT, libc::ENOMEM];
/// UFFDIO_REGISTER.
pub const REGISTER: &[i32] = &[
    libc::EBUSY,
    libc::EFAULT,
    libc::EINVAL,
    libc::ENOMEM,
    libc::EPERM,
    libc::EAGAIN,
    libc::EINTR,
];
/// UFFDIO_UNREGISTER.
pub const UNREGISTER: &[i32] = &[libc::EINVAL, libc::ENOMEM, libc::EFAULT];
/// UFFDIO_WAKE.
pub const WAKE: &[i32] = &[libc::EAGAIN, libc::EFAULT, libc::EINVAL];
/// UFFDIO_ZEROPAGE.
pub const ZERO: &[i32] = &[libc::EAGAIN, libc::EEXIST, libc::EINVAL, libc::ENOENT, libc::ESRCH];
/// read(2) of a userfaultfd.
pub const READ: &[i32] = &[libc::EAGAIN, libc::EFAULT, libc::EINTR, libc::EINVAL];
/// mmap(2).
pub const MAP: &[i32] = &[libc::EAGAIN, libc::EINVAL, libc::ENOMEM, libc::EPERM];
/// munmap(2).
pub const UNMAP: &[i32] = &[libc::EINVAL, libc::ENOMEM];
/// madvise(2), MADV_POPULATE_WRITE.
pub const POPULATE: &[i32] =
    &[libc::EAGAIN, libc::EFAULT, libc::EHWPOISON, libc::EINTR, libc::EINVAL, libc::ENOMEM];
/// madvise(2), other advice.
pub const ADVISE: &[i32] = &[libc::EAGAIN, libc::EINVAL, libc::ENOMEM];
/// PAGEMAP_SCAN.
pub const SCAN: &[i32] = &[libc::EFAULT, libc::EINTR, libc::EINVAL, libc::ENOMEM, libc::ENOTTY];

pub fn region(engine: &Engine, way: Way, pages: usize) -> Arc<Region> {
    let bytes = match way.folios {
        Folios::Huge => 4 << 20,
        _ => pages * page_size(),
    };
    let region =
        promised(engine.map(bytes).folios(way.folios)).build().expect("memory for the test");
    fill(&region, 0..bytes);
    Arc::new(region)
}

pub fn attempt(engine: &Engine, region: &Region, way: Way) -> Result<Report, MigrateError> {
    engine
        .migrate(region.to(first_node(engine)))
        .even_if_there()
        .order(way.order)
        .division(way.division)
        .frames(way.frames)
        .batch_bytes(16 * page_size())
        .run()
}

/// Each of the first with each of the second.
pub fn crossed<A: Copy, B>(
    first: &[A],
    second: impl IntoIterator<Item = B> + Clone,
) -> impl Iterator<Item = (A, B)> {
    first.iter().flat_map(move |a| second.clone().into_iter().map(move |b| (*a, b)))
}

pub fn any(_: Way) -> bool {
    true
}
pub fn live(way: Way) -> bool {
    way.order == Order::Live
}
pub fn base(way: Way) -> bool {
    way.folios == Folios::Base
}
