//! Pages that `mremap` takes elsewhere and back while they are being moved: also what is written to
//! them where their protection did not reach them stays.

mod support;

use pageferry::{Engine, Order, Outcome, References};
use pageferry_copy::model::{Behaviour, ModelEngine};
use pageferry_copy::{Capabilities, CopyBatch, CopyEngine, SubmitError};
use pageferry_sys::uffd::Uffd;
use pageferry_sys::{Errno, Linux, Sys, page_size};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use support::siege::{advise, errno, far_address, map_at, ptr};
use support::{build, check, fill, first_node, value, word};

/// Pages that are taken away.
const PAGES: usize = 8;

/// A kernel that has these pages elsewhere while others beside them are protected.
#[derive(Debug, Default)]
struct Elsewhere {
    armed: AtomicBool,
    page: AtomicUsize,
    place: AtomicUsize,
    /// `MREMAP_DONTUNMAP`: something stays mapped where they were.
    stays: AtomicBool,
}

fn remap(from: usize, to: usize, flags: i32) {
    let (len, flags) = (PAGES * page_size(), flags | libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
    // SAFETY: both places are the test's own.
    let got = unsafe { libc::mremap(ptr(from), len, len, flags, ptr(to)) };
    assert_eq!(got.expose_provenance(), to, "mremap: errno {}", errno());
}

impl Sys for Elsewhere {
    fn protect(&self, fd: &Uffd, start: usize, len: usize) -> Result<(), Errno> {
        let (page, place) = (self.page.load(Ordering::Relaxed), self.place.load(Ordering::Relaxed));
        let ours = start <= page && page < start + len;
        if !ours || !self.armed.swap(false, Ordering::Relaxed) {
            return Linux.protect(fd, start, len);
        }
        let stays = self.stays.load(Ordering::Relaxed);
        remap(page, place, if stays { libc::MREMAP_DONTUNMAP } else { 0 });
        // As long as the event of mremap is under way the kernel protects nothing.
        let done = loop {
            match Linux.protect(fd, start, len) {
                Err(Errno(libc::EAGAIN)) => std::thread::yield_now(),
                done => break done,
            }
        };
        remap(place, page, 0);
        done
    }
}

/// Copies at once, and then has the program write a word.
#[derive(Debug)]
struct ThenWrites {
    model: ModelEngine,
    word: AtomicUsize,
    index: AtomicUsize,
}

impl CopyEngine for ThenWrites {
    fn name(&self) -> &str {
        "writes"
    }
    fn capabilities(&self) -> Capabilities {
        self.model.capabilities()
    }
    unsafe fn submit(&self, batch: &Arc<CopyBatch>) -> Result<(), SubmitError> {
        // SAFETY: the same promise.
        unsafe { self.model.submit(batch) }?;
        self.model.wait(batch);
        // SAFETY: the test's memory, which stays mapped.
        let word = unsafe { AtomicU64::from_ptr(ptr(self.word.load(Ordering::Relaxed)).cast()) };
        word.store(value(self.index.load(Ordering::Relaxed), 1), Ordering::Relaxed);
        Ok(())
    }
    fn cancel(&self, batch: &CopyBatch) {
        self.model.cancel(batch);
    }
}

#[test]
fn what_is_written_to_pages_that_were_elsewhere_while_the_others_were_protected_stays() {
    let elsewhere = Arc::new(Elsewhere::default());
    let Some(engine) = build(Engine::builder().sys(elsewhere.clone())) else { return };
    let len = 64 * page_size();
    for (stays, references) in [
        (false, References::Never),
        (true, References::Never),
        (false, References::Possible),
        (true, References::Possible),
    ] {
        let start = far_address();
        map_at(start, len);
        advise(start..start + len, libc::MADV_NOHUGEPAGE);
        // SAFETY: mapped above, private and anonymous, and it stays mapped.
        let region = unsafe { engine.adopt(ptr(start).cast(), len, references) };
        let region = region.expect("aligned");
        fill(&region, 0..len);
        let page = start + 16 * page_size();
        let written = page + 3 * page_size();
        let index = (written - start) / 8;
        elsewhere.page.store(page, Ordering::Relaxed);
        elsewhere.place.store(far_address(), Ordering::Relaxed);
        elsewhere.stays.store(stays, Ordering::Relaxed);
        elsewhere.armed.store(true, Ordering::Relaxed);
        let model = ModelEngine::threaded(Behaviour::Faithful).expect("a thread");
        let (word_at, index_of) = (AtomicUsize::new(written), AtomicUsize::new(index));
        let copier = ThenWrites { model, word: word_at, index: index_of };
        let moving = engine.migrate(region.to(first_node(&engine))).even_if_there();
        let report = moving.order(Order::Live).engine(Arc::new(copier)).run().expect("a move");
        let what = format!("stays: {stays}, {references:?}: {report}");
        assert!(!elsewhere.armed.load(Ordering::Relaxed), "{what}");
        let found = word(&region, index).load(Ordering::Relaxed);
        assert_eq!(found, value(index, 1), "{what}");
        word(&region, index).store(value(index, 0), Ordering::Relaxed);
        check(&region, 0..len);
        assert_eq!(report.by_outcome(), [(Outcome::Moved, len as u64)], "{what}");
    }
}
