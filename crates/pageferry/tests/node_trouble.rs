//! What goes wrong between nodes: a destination that fills up, memory errors, pages in swap. Each
//! is an outcome in the report, and nothing else is lost.

mod node_common;
mod support;
mod trial;

use node_common::{region_on, several, vmstat};
use pageferry::{Folios, Frames, HUGE, Order, Outcome, Shortage};
use pageferry_sys::page_size;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;
use support::siege::{advise, errno, readable};
use support::{check, engine, is_guest, on_their_node, sized};
use trial::{Watchdog, accounted_whole};

/// A node with less free memory than this can be filled by a test.
const SMALL: u64 = 400 << 20;

#[test]
fn a_destination_that_fills_up_is_a_shortage_and_nothing_is_lost() {
    let Some(engine) = engine() else { return };
    let Some(nodes) = several(&engine) else { return };
    let machine = engine.machine();
    let free = |id| machine.memory_nodes().find(|n| n.id == id).map_or(0, |n| n.free_bytes);
    let small = nodes.iter().copied().find(|&n| free(n) < SMALL);
    let Some((small, home)) = small.zip(nodes.iter().copied().find(|&n| free(n) > 2 * SMALL))
    else {
        return eprintln!("skipped: no node here is small beside another");
    };
    let _watchdog = Watchdog::seconds(60, "a destination that fills up");
    let killed = vmstat("oom_kill");
    let bytes =
        usize::try_from(free(small)).expect("memory").next_multiple_of(HUGE) + sized(64 << 20);
    for (folios, source) in [
        (Folios::Base, Frames::Recycled),
        (Folios::Base, Frames::KernelCopy),
        (Folios::Huge, Frames::Fresh),
    ] {
        let region = region_on(&engine, home, bytes, folios);
        let report = engine.migrate(region.to(small)).frames(source).run().expect("a move");
        let what = format!("{folios:?} {source:?}: {:?}", report.by_outcome());
        accounted_whole(&report, &region);
        let only = |o| matches!(o, Outcome::Moved | Outcome::NoFrame(_));
        assert_eq!(report.bytes(only), bytes as u64, "{what}");
        assert!(report.bytes_moved > 0, "{what}");
        let short = |o| matches!(o, Outcome::NoFrame(Shortage::Node | Shortage::Huge));
        assert!(report.bytes(short) > 0, "{what}");
        on_their_node(&region, &report, small);
        check(&region, 0..bytes);
        // And back: what is there already stays.
        let report = engine.migrate(region.to(home)).run().expect("a move");
        assert!(report.is_complete(), "{folios:?} {source:?}: {:?}", report.by_outcome());
        check(&region, 0..bytes);
    }
    assert_eq!(vmstat("oom_kill"), killed, "the kernel killed somebody");
}

/// The thread that makes a memory error right now; 0: none.
static INJECTOR: AtomicI32 = AtomicI32::new(0);

/// `MADV_HWPOISON` sends `SIGBUS` to its caller, as if it had read the page. Any other `SIGBUS` ends
/// the process as usual: without a handler, the access that it came from faults again.
extern "C" fn bear(signal: i32) {
    // SAFETY: both calls are async-signal-safe.
    unsafe {
        if libc::gettid() != INJECTOR.load(Ordering::Relaxed) {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
}

/// Whether memory errors can be made here. To be called before an engine is built, whose handler
/// passes on to the one that it finds.
fn errors_can_be_made() -> bool {
    // A frame with an error is lost until the machine starts again.
    if !is_guest() {
        eprintln!("skipped: real memory would be lost (PAGEFERRY_GUEST is not set)");
        return false;
    }
    let handler: extern "C" fn(i32) = bear;
    // SAFETY: the handler makes async-signal-safe calls only.
    unsafe { libc::signal(libc::SIGBUS, handler as libc::sighandler_t) };
    true
}

/// Makes a memory error in the page at `addr`.
fn poison(addr: usize) {
    // SAFETY: gettid has no preconditions.
    INJECTOR.store(unsafe { libc::gettid() }, Ordering::Relaxed);
    let range = addr..addr + page_size();
    let mut tries = 0;
    // EBUSY, EAGAIN: somebody else has the page at this moment, or it is on its way.
    while !advise(range.clone(), libc::MADV_HWPOISON) {
        assert!(tries < 1000 && matches!(errno(), libc::EBUSY | libc::EAGAIN), "{}", errno());
        tries += 1;
        std::thread::sleep(Duration::from_millis(1));
    }
    INJECTOR.store(0, Ordering::Relaxed);
}

#[test]
fn a_memory_error_in_a_source_page_is_reported_and_nothing_else_is_lost() {
    if !errors_can_be_made() {
        return;
    }
    let Some(engine) = engine() else { return };
    let Some(nodes) = several(&engine) else { return };
    let bytes = 4 * HUGE;
    let bad = HUGE + 5 * page_size();
    for folios in [Folios::Base, Folios::Huge] {
        for order in [Order::Frozen, Order::Live] {
            let region = region_on(&engine, nodes[0], bytes, folios);
            poison(region.addr() + bad);
            let report = engine.migrate(region.to(nodes[1])).order(order).run().expect("a move");
            let what = format!("{folios:?} {order:?}: {:?}", report.by_outcome());
            accounted_whole(&report, &region);
            let at = region.addr() + bad;
            let hit = report.pages.iter().find(|(range, _)| range.contains(&at));
            let (_, outcome) = hit.expect("every page is in the report");
            assert!(
                matches!(outcome, Outcome::Busy(_) | Outcome::CopyFailed),
                "the bad page: {outcome}; {what}"
            );
            let rest = (bytes - page_size()) as u64;
            assert_eq!(report.bytes_moved, rest, "all but the bad page: {what}");
            on_their_node(&region, &report, nodes[1]);
            assert!(!readable(at), "the error is gone: {what}");
            check(&region, 0..bad);
            check(&region, bad + page_size()..bytes);
        }
    }
}

#[test]
fn memory_errors_that_come_up_during_moves_cost_their_own_pages_only() {
    if !errors_can_be_made() {
        return;
    }
    let Some(engine) = engine() else { return };
    let Some(nodes) = several(&engine) else { return };
    let _watchdog = Watchdog::seconds(60, "memory errors during moves");
    let bytes = 4 * HUGE;
    let bad: Vec<_> = (1..8).map(|i| i * bytes / 8 + i * page_size()).collect();
    for folios in [Folios::Base, Folios::Huge] {
        let region = region_on(&engine, nodes[0], bytes, folios);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let mover = scope.spawn(|| {
                let mut moves = 0;
                while !over.load(Ordering::Relaxed) {
                    for (to, order) in [(nodes[1], Order::Live), (nodes[0], Order::Frozen)] {
                        let moving = engine.migrate(region.to(to)).order(order);
                        accounted_whole(&moving.run().expect("a move"), &region);
                        moves += 1;
                    }
                }
                moves
            });
            for &offset in &bad {
                poison(region.addr() + offset);
                std::thread::sleep(Duration::from_millis(50));
            }
            over.store(true, Ordering::Relaxed);
            assert!(mover.join().expect("the moves went well") > 0);
        });
        for page in (0..bytes).step_by(page_size()) {
            // An error that hit a frame just after its page had left it costs nothing.
            if !bad.contains(&page) || readable(region.addr() + page) {
                check(&region, page..page + page_size());
            }
        }
    }
}
