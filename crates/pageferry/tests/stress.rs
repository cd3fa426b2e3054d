//! All at once, for as long as told (`PAGEFERRY_SOAK_SECONDS`; `cargo xtask soak`): many threads move in every
//! way, many more fault and verify every word, a signal comes each millisecond, and meanwhile the
//! program is stopped and continued, forks, gives up pages and changes its mappings. Everybody goes
//! on, and no byte is lost. `PAGEFERRY_SOAK_SEED` repeats a choice.

mod support;
mod trial;

#[path = "stress/ground.rs"]
mod ground;
#[path = "stress/hearing.rs"]
mod hearing;
#[path = "stress/movers.rs"]
mod movers;
#[path = "stress/outside.rs"]
mod outside;
#[path = "stress/strains.rs"]
mod strains;

use hearing::Signals;
use movers::Fleet;
use outside::{Beat, Outside};
use pageferry::copy::Kernel;
use pageferry::{Engine, Folios};
use pageferry_sys::page_size;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Builder, Scope};
use std::time::{Duration, Instant, SystemTime};
use support::{StopOnDrop, build, is_guest, patient};

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Page faults of this process so far.
fn faults() -> u64 {
    // SAFETY: the kernel writes the struct, for which zero is a valid value.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    (usage.ru_minflt + usage.ru_majflt).unsigned_abs()
}

/// Threads of the test, all watched.
struct Crew<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    outside: &'env Outside,
    stop: &'env AtomicBool,
    count: usize,
}

impl<'scope, 'env> Crew<'scope, 'env> {
    /// Whoever fails stops the others: the scope then ends with it.
    fn add(&mut self, name: &str, body: impl FnOnce(&Beat) + Send + 'scope) {
        let (beat, stop) = (self.outside.beat(self.count), self.stop);
        // The number that the watchdog tells is in the name.
        let name = format!("{name}-{}", self.count);
        self.count += 1;
        let thread = Builder::new().name(name).stack_size(256 << 10);
        let run = thread.spawn_scoped(self.scope, move || {
            let _stop = StopOnDrop(stop);
            body(&beat);
        });
        run.expect("a thread");
    }
}

/// What has not been done at all, so far.
fn idle(
    moved: &movers::Did,
    did: &strains::Did,
    heard: (u64, u64),
    stops: u64,
) -> Vec<&'static str> {
    let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
    let counts = [
        ("moves", count(&moved.moves)),
        ("bytes moved", count(&moved.bytes)),
        ("frozen batches", count(&moved.frozen)),
        ("live batches", count(&moved.live)),
        ("conducted moves", count(&moved.conducted)),
        ("shared moves", count(&moved.shared)),
        ("bytes moved by devices", count(&moved.by_device)),
        ("cancelled moves", count(&moved.cancelled)),
        ("passing regions", count(&moved.regions)),
        ("accesses", count(&did.accesses)),
        ("first touches", count(&did.first_touches)),
        ("pages given up", count(&did.given_up)),
        ("forks", count(&did.forks)),
        ("new mappings", count(&did.mapped)),
        ("mremap", count(&did.remapped)),
        ("protection", count(&did.protected)),
        ("signals", heard.0),
        ("signals in movers", heard.1),
        ("stops", stops),
    ];
    counts.into_iter().filter(|(_, count)| *count == 0).map(|(what, _)| what).collect()
}

#[test]
fn all_at_once() {
    let Some(seconds) = from_environment("PAGEFERRY_SOAK_SECONDS") else {
        return eprintln!("skipped: 250 threads at once, for as long as told: cargo xtask soak");
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_secs());
    let seed = from_environment("PAGEFERRY_SOAK_SEED").unwrap_or(now);
    let (movers, faulters) = if is_guest() { (12, 50) } else { (48, 200) };
    eprintln!("{movers} movers, {faulters} faulting threads, {seconds} s, seed {seed}");
    let outside = Outside::start(seed);
    let builder = Engine::builder().kernel(Kernel::MEMCPY).threads(4).frame_budget(64 << 20);
    let Some(engine) = build(builder) else { return };
    let plots = ground::plots(&engine);
    let own = faulters * strains::OWN_PAGES * page_size();
    let fresh = engine.map(own).folios(Folios::Base).build().expect("memory for the test");
    let devices = movers::devices();
    let (moved, did) = (movers::Did::default(), strains::Did::default());
    let (stop, before) = (AtomicBool::new(false), faults());
    let began = Instant::now();
    let until = began + Duration::from_secs(seconds);
    // On a busy machine a little longer, until everybody has done something.
    let enough = || idle(&moved, &did, hearing::heard(), outside.stops()).is_empty();
    let last = until + Duration::from_secs(patient(40));
    let is_over = || {
        let now = Instant::now();
        stop.load(Ordering::Relaxed) || now > until && (now > last || enough())
    };
    {
        let _signals = Signals::start(&plots, Duration::from_millis(1));
        std::thread::scope(|scope| {
            let mut crew = Crew { scope, outside: &outside, stop: &stop, count: 0 };
            let (engine, plots, fresh) = (&engine, &plots[..], &fresh);
            let (devices, moved, did, is_over) = (&devices[..], &moved, &did, &is_over);
            for n in 0..movers as u64 {
                let fleet = Fleet { engine, plots, devices, did: moved };
                crew.add("mover", move |beat| fleet.sail(seed + n, beat, is_over));
            }
            for n in 0..faulters {
                crew.add("faulter", move |beat| {
                    strains::fault(plots, fresh, (n, faulters), did, beat, is_over);
                });
            }
            for plot in plots.iter().filter(|plot| !plot.victim.is_empty()) {
                crew.add("changer", move |beat| strains::change(plot, did, beat, is_over));
            }
            crew.add("giver", move |beat| strains::give_up(plots, 10_000, did, beat, is_over));
            crew.add("forker", move |beat| strains::fork(plots, did, beat, is_over));
            // Regions of first touches move, too.
            crew.add("fresh", move |beat| {
                let (_, away) = support::nodes(engine);
                while !is_over() {
                    let moved = engine.migrate(fresh.to(away)).even_if_there().run();
                    moved.expect("a move");
                    beat.beat();
                }
            });
        });
    }
    let took = began.elapsed();
    assert!(!hearing::WRONG.load(Ordering::Relaxed), "a signal handler read a wrong word");
    plots.iter().for_each(ground::Plot::check);
    let (stops, heard) = (outside.stops(), hearing::heard());
    let faults = faults() - before;
    eprintln!("{took:.1?}: {moved:?}");
    eprintln!("longest hole {:?}; {did:?}", moved.longest_hole());
    eprintln!("{faults} faults; {} signals, {} of them in movers; {stops} stops", heard.0, heard.1);
    let did_nothing = idle(&moved, &did, heard, stops);
    assert!(did_nothing.is_empty(), "nothing was done of: {did_nothing:?}");
}
