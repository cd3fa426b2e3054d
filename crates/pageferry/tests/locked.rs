//! A program that locks all its memory (`mlockall(2)`). Alone in its process, since that concerns
//! all threads.

mod support;

use pageferry::copy::Kernel;
use pageferry::{Engine, References};
use support::siege::ptr;
use support::{build, check, fill, first_node};

/// Locked memory stays, all other moves go on, and the pools do not grow for good.
#[test]
fn a_program_that_locks_all_its_memory_and_unlocks_it_can_be_moved_again() {
    let Some(engine) = build(Engine::builder().kernel(Kernel::MEMCPY)) else { return };
    let len = 16 << 20;
    let start = pageferry_sys::Sys::map(&pageferry_sys::Linux, len, 2 << 20).expect("memory");
    // SAFETY: mapped above, for good; the advice drops nothing.
    let region = unsafe {
        assert_eq!(libc::madvise(ptr(start), len, libc::MADV_NOHUGEPAGE), 0);
        engine.adopt(ptr(start).cast(), len, References::Never).expect("aligned")
    };
    fill(&region, 0..len);
    let node = first_node(&engine);
    let go = || engine.migrate(region.to(node)).even_if_there().run().expect("a move");
    assert!(go().is_complete());
    // SAFETY: locks and unlocks what is mapped.
    let locked = unsafe { libc::mlockall(libc::MCL_CURRENT) };
    if locked != 0 {
        eprintln!("skipped: mlockall: {}", std::io::Error::last_os_error());
        return;
    }
    let report = go();
    check(&region, 0..len);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::munlockall() }, 0);
    let again = go();
    assert!(again.is_complete(), "locked: {report:?}; unlocked: {again:?}");
    let held = engine.stats().frame_bytes;
    assert!(held <= 64 << 20, "{held} bytes of frames");
    check(&region, 0..len);
}
