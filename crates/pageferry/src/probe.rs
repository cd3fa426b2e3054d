//! What is found out by trying, when an engine is built.

use crate::context::Context;
use crate::error::BuildError;
use pageferry_copy::cpu::calibrate::{CalibrateOptions, calibrate};
use pageferry_copy::{Kernel, WorkerPool};
use pageferry_sys::mm::Advice;
use pageferry_sys::pagemap::{Categories, Entry, Run};
use pageferry_sys::uffd::Modes;
use pageferry_sys::{Errno, page_size};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The copy kernel that measures best on this machine with the threads there are.
pub(crate) fn best_kernel(workers: &Arc<WorkerPool>) -> Result<Kernel, BuildError> {
    let measured = calibrate(&CalibrateOptions::default(), workers).map_err(BuildError::Kernel)?;
    Ok(if workers.helpers() == 0 { measured.one } else { measured.all })
}

/// Moves one protected page, to see that this kernel can, and whether the page's protection goes
/// with it. (Until Linux 7.0 it does not; a later fix, sent to stable kernels too, keeps it.) Then
/// copies it to where a guard marker stands. (`mfill_atomic_install_pte` in mm/userfaultfd.c takes any
/// marker for nothing; since `pte_is_uffd_marker`, after 6.18, only the userfaultfd's own ones.)
pub(crate) fn what_move_does(ctx: &Context) -> Result<(), BuildError> {
    let page = page_size();
    let resource = |source| BuildError::Resource { what: "two pages to try UFFDIO_MOVE", source };
    let start = ctx.sys.map(2 * page, page).map_err(resource)?;
    what_scan_tells(ctx, start, page)?;
    let tried = try_move(ctx, start, page);
    if tried.is_ok() {
        // The page is the second of the two now.
        let replaces = replaces_guards(ctx, start, start + page, page);
        ctx.copy_replaces_guards.store(replaces, Ordering::Relaxed);
    }
    // Nobody reads events yet, and unmapping what is registered would wait for that.
    let registered = ctx.sys.unregister(&ctx.uffd, start, 2 * page);
    if let Err(errno) = registered
        && tried.is_ok()
    {
        return Err(resource(errno));
    }
    // SAFETY: mapped above, known to nobody else.
    let _ = unsafe { ctx.sys.unmap(start, 2 * page) };
    let keeps = tried.map_err(BuildError::KernelTooOld)?;
    ctx.move_keeps_protection.store(keeps, Ordering::Relaxed);
    Ok(())
}

fn what_scan_tells(ctx: &Context, start: usize, page: usize) -> Result<(), BuildError> {
    let there = Categories::PRESENT | Categories::SWAPPED;
    let basic = there | Categories::PFN_ZERO | Categories::HUGE;
    let mut runs = [Run::EMPTY; 1];
    let mut scan =
        |tell| ctx.sys.scan(&ctx.pagemap, start, start + page, there, tell, &mut runs).map(drop);
    let all = basic | Categories::GUARD;
    let known = match scan(all) {
        Ok(()) => all,
        // A bit that the kernel does not know.
        Err(Errno(libc::EINVAL)) => scan(basic).map(|()| basic).map_err(BuildError::Pagemap)?,
        Err(errno) => return Err(BuildError::Pagemap(errno)),
    };
    ctx.tells.store(known.bits(), Ordering::Relaxed);
    Ok(())
}

fn try_move(ctx: &Context, start: usize, page: usize) -> Result<bool, Errno> {
    let (sys, fd) = (&ctx.sys, ctx.uffd.as_ref());
    // SAFETY: the range is this function's own.
    unsafe {
        sys.advise(start, 2 * page, Advice::NoHugePage).or_else(|e| match e {
            Errno(libc::EINVAL) => Ok(()), // a kernel without huge pages
            e => Err(e),
        })?;
        sys.advise(start, page, Advice::PopulateWrite)?;
    }
    sys.register(fd, start, 2 * page, Modes::WP)?;
    sys.protect(fd, start, page)?;
    for _ in 0..64 {
        // SAFETY: both pages are this function's own.
        let moved = unsafe { sys.move_range(fd, start + page, start, page) };
        match moved.error {
            None => {
                let mut entry = [Entry(0)];
                ctx.pagemap.entries(start + page, &mut entry)?;
                return Ok(entry[0].write_protected());
            }
            Some(Errno(libc::EAGAIN)) => std::thread::yield_now(),
            Some(errno) => return Err(errno),
        }
    }
    Err(Errno(libc::EAGAIN))
}

/// Whether `UFFDIO_COPY` replaces a guard marker, tried at `dst`, where nothing is.
fn replaces_guards(ctx: &Context, dst: usize, src: usize, page: usize) -> bool {
    // SAFETY: a page of the caller's own, which is empty.
    match unsafe { ctx.sys.advise(dst, page, Advice::GuardInstall) } {
        // A kernel without such markers (before 6.13).
        Err(Errno(libc::EINVAL)) => return false,
        Err(_) => return true,
        Ok(()) => {}
    }
    for _ in 0..64 {
        // SAFETY: both pages are the caller's own.
        let copied = unsafe { ctx.sys.copy_in(&ctx.uffd, dst, src, page) };
        match copied.error {
            Some(Errno(libc::EEXIST)) => return false,
            Some(Errno(libc::EAGAIN)) => std::thread::yield_now(),
            _ => return true,
        }
    }
    true
}
