//! What the program changes in its mappings around the begin and the end of a move: nothing that
//! is not the engine's is taken, nothing stays registered or noted, and the report tells what was.

mod support;

use pageferry::copy::Kernel;
use pageferry::{Engine, Order, Outcome, References, Region};
use pageferry_sys::maps::Maps;
use pageferry_sys::uffd::{Modes, Uffd};
use pageferry_sys::{Errno, Linux, Sys, page_size};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use support::siege::{far_address, map_at, ptr};
use support::{StopOnDrop, build, check, engine, fill, first_node, is_guest, word};

/// Mapped memory of base pages that an engine adopted, and that stays mapped: where the kernel puts
/// nothing else while a part of it is unmapped.
fn adopted(engine: &Engine, len: usize) -> Region {
    let start = far_address();
    map_at(start, len);
    base_pages(start, len);
    // SAFETY: mapped above, for good; what the tests unmap they map anew.
    unsafe { engine.adopt(ptr(start).cast(), len, References::Possible) }.expect("aligned")
}

fn base_pages(start: usize, len: usize) {
    // SAFETY: the advice drops nothing.
    assert_eq!(unsafe { libc::madvise(ptr(start), len, libc::MADV_NOHUGEPAGE) }, 0);
}

fn unmap(range: &Range<usize>) {
    // SAFETY: memory of the test, which maps it anew or does not touch it again.
    assert_eq!(unsafe { libc::munmap(ptr(range.start), range.len()) }, 0);
}

fn map_anew(range: &Range<usize>, value: u64) {
    map_at(range.start, range.len());
    base_pages(range.start, range.len());
    for page in range.clone().step_by(page_size()) {
        at(page).store(value, Ordering::Relaxed);
    }
}

fn at(address: usize) -> &'static AtomicU64 {
    // SAFETY: an aligned word of memory that the test keeps mapped.
    unsafe { AtomicU64::from_ptr(ptr(address).cast()) }
}

/// The descriptor's registered ranges are not told by the kernel but one by one: whether any page
/// of a mapping is.
fn registered(mappings: &[&Range<usize>]) -> Vec<Range<usize>> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("procfs");
    let mut found = Vec::new();
    let mut current = 0..0;
    for line in smaps.lines() {
        let head = line.split(' ').next().and_then(|w| w.split_once('-'));
        let bounds = head.and_then(|(a, b)| {
            Some((usize::from_str_radix(a, 16).ok()?, usize::from_str_radix(b, 16).ok()?))
        });
        if let Some((start, end)) = bounds {
            current = start..end;
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && flags.split_whitespace().any(|flag| flag == "um" || flag == "uw")
            && mappings.iter().any(|m| m.start < current.end && current.start < m.end)
        {
            found.push(current.clone());
        }
    }
    found
}

/// A kernel that unmaps 64 pages just before one call, and maps them anew just after another.
#[derive(Debug, Default)]
struct Meddler {
    armed: AtomicBool,
    page: AtomicUsize,
    /// Around which call: 0 to register, 1 to ask.
    step: AtomicUsize,
    calls: AtomicUsize,
    meddled: AtomicUsize,
}

impl Meddler {
    fn range(&self) -> Range<usize> {
        let start = self.page.load(Ordering::Relaxed);
        start..start + 64 * page_size()
    }

    fn around<T>(&self, step: usize, range: Range<usize>, call: impl FnOnce() -> T) -> T {
        let ours = self.range();
        let mine = self.armed.load(Ordering::Relaxed)
            && self.step.load(Ordering::Relaxed) == step
            && range.start <= ours.start
            && ours.end <= range.end
            && self.calls.fetch_add(1, Ordering::Relaxed) == 0;
        if !mine {
            return call();
        }
        unmap(&ours);
        let result = call();
        map_anew(&ours, 2);
        self.meddled.fetch_add(1, Ordering::Relaxed);
        result
    }
}

impl Sys for Meddler {
    fn register(&self, fd: &Uffd, start: usize, len: usize, modes: Modes) -> Result<(), Errno> {
        self.around(0, start..start + len, || Linux.register(fd, start, len, modes))
    }
    fn is_registered(&self, fd: &Uffd, start: usize, len: usize) -> Result<bool, Errno> {
        self.around(1, start..start + len, || Linux.is_registered(fd, start, len))
    }
    fn mappings(&self, maps: &Maps, range: Range<usize>) -> Result<Vec<Range<usize>>, Errno> {
        Linux.mappings(maps, range)
    }
}

#[test]
fn what_is_mapped_anew_around_the_registration_is_not_taken() {
    let sys = Arc::new(Meddler::default());
    let builder = Engine::builder().kernel(Kernel::MEMCPY).sys(Arc::clone(&sys) as Arc<dyn Sys>);
    let Some(engine) = build(builder) else { return };
    let region = adopted(&engine, 4 << 20);
    fill(&region, 0..region.len());
    let page = region.addr() + (1 << 20);
    sys.page.store(page, Ordering::Relaxed);
    let (stop, torn) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let reader = std::thread::spawn({
        let (stop, torn) = (Arc::clone(&stop), Arc::clone(&torn));
        let other = region.addr();
        move || {
            while !stop.load(Ordering::Relaxed) {
                let found = at(other).load(Ordering::Relaxed);
                torn.fetch_add(u64::from(found != support::value(0, 0)), Ordering::Relaxed);
            }
        }
    });
    let rounds = if is_guest() { 4 } else { 20 };
    for step in [0, 1] {
        for order in [Order::Frozen, Order::Live] {
            for _ in 0..rounds {
                map_anew(&sys.range(), 2);
                sys.step.store(step, Ordering::Relaxed);
                sys.calls.store(0, Ordering::Relaxed);
                sys.armed.store(true, Ordering::Relaxed);
                let node = first_node(&engine);
                let moved = engine.migrate(region.to(node)).even_if_there().order(order).run();
                let report = moved.expect("a move");
                sys.armed.store(false, Ordering::Relaxed);
                let lost = sys.range().step_by(page_size());
                let lost = lost.filter(|page| at(*page).load(Ordering::Relaxed) != 2).count();
                assert_eq!(lost, 0, "pages lost, step {step}, {order:?}: {report:?}");
                assert!(report.bytes_moved > 0, "{report:?}");
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    reader.join().expect("no panic");
    assert_eq!(torn.load(Ordering::Relaxed), 0);
    assert_eq!(sys.meddled.load(Ordering::Relaxed), 4 * rounds);
    check(&region, 0..1 << 20);
    assert_eq!(registered(&[&region.addresses()]), []);
}

#[test]
fn what_is_unmapped_over_the_border_of_two_moves_is_forgotten_by_one_and_known_to_the_other() {
    let Some(engine) = engine() else { return };
    let (below, above) = (support::sized(64 << 20), 4 << 20);
    let start = far_address();
    map_at(start, below + above);
    base_pages(start, below + above);
    // SAFETY: mapped above, for good.
    let adopt = |start, len| unsafe {
        engine.adopt(ptr(start).cast(), len, References::Possible).expect("aligned")
    };
    let (b, a) = (adopt(start, below), adopt(start + below, above));
    fill(&a, 0..above);
    fill(&b, 0..below);
    let node = first_node(&engine);
    let border = start + below - 64 * page_size()..start + below + 64 * page_size();
    for _ in 0..5 {
        let moving = engine.migrate(b.to(node)).even_if_there().start().expect("a move");
        while moving.progress().bytes_done == 0 && !moving.is_finished() {
            std::thread::yield_now();
        }
        let other = engine.migrate(a.to(node)).even_if_there().start().expect("a move");
        unmap(&border);
        map_anew(&border, 77);
        other.wait().expect("a move");
        engine.migrate(a.to(node)).even_if_there().run().expect("a move");
        let report = moving.wait().expect("a move");
        let pages = border.clone().step_by(page_size());
        let lost = pages.filter(|page| at(*page).load(Ordering::Relaxed) != 77).count();
        assert_eq!(lost, 0, "pages lost: {report:?}");
    }
    assert_eq!(registered(&[&(start..start + below + above)]), []);
}

/// A part of a 2 MiB block is unmapped while the move runs: that part alone is gone.
#[test]
fn what_is_unmapped_is_told_page_by_page_and_the_rest_moves() {
    for step in [Order::Frozen, Order::Live] {
        let sys = Arc::new(Meddler::default());
        let builder =
            Engine::builder().kernel(Kernel::MEMCPY).sys(Arc::clone(&sys) as Arc<dyn Sys>);
        let Some(engine) = build(builder) else { return };
        let region = adopted(&engine, 4 << 20);
        fill(&region, 0..region.len());
        sys.page.store(region.addr() + (1 << 20), Ordering::Relaxed);
        sys.armed.store(true, Ordering::Relaxed);
        let node = first_node(&engine);
        let report = engine.migrate(region.to(node)).even_if_there().order(step).run();
        let report = report.expect("a move");
        let gone = report.bytes(|o| o == Outcome::Gone);
        assert_eq!(gone, 64 * page_size() as u64, "{report:?}");
        assert_eq!(report.bytes_moved, region.len() as u64 - gone, "{report:?}");
    }
}

fn remap(from: &Range<usize>, len: usize, flags: libc::c_int, to: usize) -> usize {
    // SAFETY: both places are the test's own.
    let got = unsafe { libc::mremap(ptr(from.start), from.len(), len, flags, ptr(to)) };
    assert_ne!(got, libc::MAP_FAILED, "{from:x?}: {}", std::io::Error::last_os_error());
    got.expose_provenance()
}

/// Memory that grows, and that goes elsewhere, while it moves: afterwards nothing is registered,
/// and the next move over the old place tells of what is there.
#[test]
fn nothing_stays_registered_or_noted_where_mremap_was_at_work() {
    let Some(engine) = engine() else { return };
    let node = first_node(&engine);
    let len = 8 << 20;
    for round in 0..if is_guest() { 6 } else { 60 } {
        let region = adopted(&engine, len);
        fill(&region, 0..len);
        let home = region.addresses();
        let moving = engine.migrate(region.to(node)).even_if_there().start().expect("a move");
        // Now and then at its very end.
        let wait = if round % 2 == 0 { 0 } else { len as u64 };
        while moving.progress().bytes_done < wait && !moving.is_finished() {
            std::hint::spin_loop();
        }
        let part = home.start..home.start + 64 * page_size();
        let away = far_address();
        let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // Larger than it was: the rest comes from the mapping that it was part of.
        remap(&part, 2 * part.len(), fixed, away);
        moving.wait().expect("a move");
        // Late events are looked after by the housekeeper.
        let (home, there) = (home.clone(), away..away + 2 * part.len());
        let places = [&home, &there];
        for _ in 0..5000 {
            if registered(&places).is_empty() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(registered(&places), [], "round {round}");
        for (i, page) in (away..away + part.len()).step_by(page_size()).enumerate() {
            let expected = support::value(i * page_size() / 8, 0);
            assert_eq!(at(page).load(Ordering::Relaxed), expected, "page {i}, round {round}");
        }
        map_anew(&part, 5);
        let report = engine.migrate(region.to(node)).even_if_there().run().expect("a move");
        assert_eq!(report.bytes(|o| o == Outcome::Gone), 0, "round {round}: {report:?}");
        assert_eq!(word(&region, 0).load(Ordering::Relaxed), 5);
        drop(region);
        unmap(&home);
        unmap(&(away..away + 2 * part.len()));
    }
}

/// Registration would split a mapping that moves in part, and `mremap` refuses a range over a
/// border: adopted memory is registered by whole mappings.
#[test]
fn mremap_within_an_adopted_mapping_answers_as_ever_while_a_part_of_it_moves() {
    let Some(engine) = engine() else { return };
    let (node, half) = (first_node(&engine), 4 << 20);
    for order in [Order::Frozen, Order::Live] {
        let region = adopted(&engine, 2 * half);
        fill(&region, 0..region.len());
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _stop = StopOnDrop(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let part = region.to(node).range(0..half);
                    let moved = engine.migrate(part).even_if_there().order(order).run();
                    moved.expect("a move");
                }
            });
            let border = region.addr() + half;
            let over = border - 16 * page_size()..border + 16 * page_size();
            let away = far_address();
            let there = away..away + over.len();
            let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            for _ in 0..if is_guest() { 10 } else { 50 } {
                remap(&over, over.len(), fixed, away);
                remap(&there, over.len(), fixed, over.start);
                // One mapping again, as the program left it.
                check(&region, half - 16 * page_size()..half + 16 * page_size());
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        check(&region, 0..region.len());
    }
}
