//! Pages in swap: they stay there, and whoever waits for a page in the air does not wait for a disk.

mod support;
mod trial;

use pageferry::{Engine, Folios, Frames, HUGE, Order, Outcome, Region};
use pageferry_sys::page_size;
use pageferry_sys::pagemap::{Entry, Pagemap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use support::siege::advise;
use support::{StopOnDrop, check, engine, fill, first_node, promised};
use trial::accounted_whole;

fn swapped(region: &Region) -> usize {
    let mut entries = vec![Entry(0); region.len() / page_size()];
    Pagemap::open().expect("procfs").entries(region.addr(), &mut entries).expect("mapped");
    entries.iter().filter(|e| e.swapped()).count() * page_size()
}

/// Half of a region goes to swap; `None` where there is none.
fn half_out(engine: &Engine, folios: Folios) -> Option<(Arc<Region>, usize)> {
    let bytes = 2 * HUGE;
    let region = promised(engine.map(bytes).folios(folios)).build().expect("memory");
    fill(&region, 0..bytes);
    let out = region.addr() + bytes / 4..region.addr() + 3 * bytes / 4;
    if !advise(out, libc::MADV_PAGEOUT) {
        eprintln!("skipped: this kernel has no MADV_PAGEOUT");
        return None;
    }
    let out = swapped(&region);
    if out == 0 {
        eprintln!("skipped: nothing went to swap; is there any (swapon --show)?");
        return None;
    }
    Some((Arc::new(region), out))
}

#[test]
fn pages_in_swap_stay_there_and_are_told_and_all_others_move() {
    let Some(engine) = engine() else { return };
    for folios in [Folios::Base, Folios::Huge] {
        for order in [Order::Frozen, Order::Live] {
            for frames in [Frames::Recycled, Frames::KernelCopy] {
                let Some((region, out)) = half_out(&engine, folios) else { return };
                let to = region.to(first_node(&engine));
                let moved = engine.migrate(to).even_if_there().order(order).frames(frames).run();
                let report = moved.expect("a move");
                let what = format!("{folios:?} {order:?} {frames:?}, {out} in swap: {report:?}");
                accounted_whole(&report, &region);
                let left = swapped(&region);
                // Copied in place, what is in memory still besides being in swap moves.
                let kept = if order == Order::Frozen { left == out } else { left <= out };
                assert!(kept, "a move fetches nothing from swap: {left} left, {what}");
                assert_eq!(report.bytes(|o| o == Outcome::Swapped), left as u64, "{what}");
                let moved = report.bytes(|o| o == Outcome::Moved);
                assert_eq!(moved, (region.len() - left) as u64, "{what}");
                assert!(report.is_complete(), "{what}");
                check(&region, 0..region.len());
            }
        }
    }
}

/// Pages go to swap and come back all the time, also between the plan and the moment when they are
/// taken out.
#[test]
fn pages_that_go_to_swap_while_they_move_keep_their_content() {
    let Some(engine) = engine() else { return };
    for (folios, order) in
        [(Folios::Base, Order::Frozen), (Folios::Base, Order::Live), (Folios::Huge, Order::Live)]
    {
        let Some((region, _)) = half_out(&engine, folios) else { return };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _stop = StopOnDrop(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    advise(region.addresses(), libc::MADV_PAGEOUT);
                    check(&region, 0..region.len());
                }
            });
            for _ in 0..40 {
                let to = region.to(first_node(&engine));
                let moved = engine.migrate(to).even_if_there().order(order).run();
                accounted_whole(&moved.expect("a move"), &region);
            }
        });
        check(&region, 0..region.len());
    }
}
