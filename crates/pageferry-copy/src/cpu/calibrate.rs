//! Which copy kernel is fastest here: measured in well under 200 ms, and remembered.
//!
//! Every kernel copies between two arenas larger than most last-level caches, a section at a
//! time and each time another section, so that neither side is in a cache; once on one thread
//! and once on all. The best of a few interleaved rounds counts. The figures are kept in
//! `$XDG_CACHE_HOME/pageferry` (or `$HOME/.cache/pageferry`), one file per CPU model, number of
//! copiers, kernel release and version of this crate.
//!
//! # What can go wrong
//! Nothing that stops a program: an unreadable, damaged or unwritable cache, or no folder for
//! it, means measuring again; no memory to measure with means `memcpy`. Only a kernel that was
//! asked for by name and does not exist is an error.

use std::{
    collections::HashMap,
    ffi::OsString,
    path::PathBuf,
    ptr,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    cache,
    kernel::{Kernel, KernelFamily, UnknownKernel},
    pool::WorkerPool,
};

/// AVX2 with prefetch is used if it reaches this fraction of the best kernel. The kernels that come
/// that close are alike in a plain copy; but beside a thread that changes page tables, in moves of
/// 4K folios, it was 5 to 19 % faster than AVX-512 (two cores of Zen 4, Linux 6.18).
const AS_GOOD: f64 = 0.9;
/// The environment variable that names the kernel to use.
pub const KERNEL_VARIABLE: &str = "PAGEFERRY_KERNEL";

/// Bytes of each of the two arenas: with both, twice the 32 MiB of L3 that a core complex of
/// current servers has.
const ARENA: usize = 32 << 20;
/// Bytes that one copier moves in one measurement.
const SECTION: usize = 2 << 20;
/// Bytes that a copier claims at once.
const PIECE: usize = 128 << 10;
/// Rounds over all kernels, if time allows.
const ROUNDS: usize = 4;
/// After this time no more memory is populated. A virtual machine whose host has yet to give
/// it the memory can take 15 us for a page.
const POPULATE_BUDGET: Duration = Duration::from_millis(60);
/// After this time no kernel is measured a second time.
const BUDGET: Duration = Duration::from_millis(110);

/// How to choose.
#[derive(Clone, Debug, Default)]
pub struct CalibrateOptions {
    /// Use this kernel, whatever was measured. Comes before the environment variable.
    pub kernel: Option<Kernel>,
    /// Where to remember the figures.
    pub cache: CacheFolder,
    /// Measure again even if there are remembered figures.
    pub refresh: bool,
}

/// Where the figures are remembered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CacheFolder {
    /// `pageferry` in the user's cache directory.
    #[default]
    User,
    /// This folder.
    At(PathBuf),
    /// Nowhere.
    None,
}

/// What a kernel reached, in GB/s (10^9 bytes copied per second, counted once).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelRate {
    /// The kernel.
    pub kernel: Kernel,
    /// On one thread.
    pub one: f64,
    /// On all threads of the pool together with the caller.
    pub all: f64,
}

/// Where a choice came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Source {
    /// The caller named the kernel.
    Asked,
    /// The environment variable named it.
    Environment,
    /// Figures remembered from an earlier run.
    Cached,
    /// Figures measured now.
    Measured,
    /// There was no memory to measure with: `memcpy`.
    Unmeasured,
}

/// The kernels to use here, and what was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Calibration {
    /// Best on one thread.
    pub one: Kernel,
    /// Best on all threads.
    pub all: Kernel,
    /// Threads that "all" means.
    pub copiers: usize,
    /// Figures of every available kernel; empty if they could not be measured.
    pub rates: Vec<KernelRate>,
    /// Why these kernels.
    pub source: Source,
}

/// Why no kernel could be chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrateError {
    /// The environment variable names no kernel that runs here.
    #[error("the environment variable {KERNEL_VARIABLE} is wrong: {0}")]
    Environment(UnknownKernel),
}

impl Calibration {
    /// GB/s of the best kernel on one thread; `None` if nothing could be measured.
    pub fn one_gb_per_s(&self) -> Option<f64> {
        self.rate(self.one).map(|rate| rate.one)
    }

    /// GB/s of the best kernel on all threads; `None` if nothing could be measured.
    pub fn all_gb_per_s(&self) -> Option<f64> {
        self.rate(self.all).map(|rate| rate.all)
    }

    fn rate(&self, kernel: Kernel) -> Option<&KernelRate> {
        self.rates.iter().find(|rate| rate.kernel == kernel)
    }
}

/// Chooses the kernels for this machine and this pool.
///
/// # Errors
/// [`CalibrateError`] if the environment names a kernel that does not exist here.
pub fn calibrate(
    options: &CalibrateOptions,
    pool: &WorkerPool,
) -> Result<Calibration, CalibrateError> {
    calibrate_with(options, pool, std::env::var_os(KERNEL_VARIABLE))
}

fn calibrate_with(
    options: &CalibrateOptions,
    pool: &WorkerPool,
    variable: Option<OsString>,
) -> Result<Calibration, CalibrateError> {
    let asked = match (options.kernel, variable) {
        (Some(kernel), _) => Some((kernel, Source::Asked)),
        (None, Some(name)) if !name.is_empty() => {
            let kernel = name.to_string_lossy().parse();
            let kernel = kernel.map_err(CalibrateError::Environment)?;
            Some((kernel, Source::Environment))
        }
        _ => None,
    };
    let copiers = pool.helpers() + 1;
    let file = cache::file(&options.cache, copiers);
    let cached = (file.as_ref().filter(|_| !options.refresh)).and_then(cache::File::read);
    let (rates, mut source) = match cached {
        Some(rates) => (rates, Source::Cached),
        None => match measure(pool) {
            Some(rates) => {
                if let Some(file) = &file {
                    file.write(&rates);
                }
                (rates, Source::Measured)
            }
            None => (Vec::new(), Source::Unmeasured),
        },
    };
    let best = |rate: fn(&KernelRate) -> f64| {
        let best = (rates.iter()).max_by(|a, b| rate(a).total_cmp(&rate(b)));
        let usual = (rates.iter()).find(|r| {
            Kernel::new(KernelFamily::Avx2Nt, true) == Some(r.kernel)
                && best.is_some_and(|best| rate(r) >= rate(best) * AS_GOOD)
        });
        usual.or(best).map_or(Kernel::MEMCPY, |rate| rate.kernel)
    };
    let (mut one, mut all) = (best(|rate| rate.one), best(|rate| rate.all));
    if let Some((kernel, why)) = asked {
        (one, all, source) = (kernel, kernel, why);
    }
    Ok(Calibration { one, all, copiers, rates, source })
}

/// Measures every kernel. `None` without memory to do it.
fn measure(pool: &WorkerPool) -> Option<Vec<KernelRate>> {
    let began = Instant::now();
    let (from, to) = (Arena::new()?, Arena::new()?);
    let mut room = 0;
    while room < ARENA && (room == 0 || began.elapsed() < POPULATE_BUDGET) {
        from.populate(room, 2 * SECTION);
        to.populate(room, 2 * SECTION);
        room += 2 * SECTION;
    }
    let mut place = 0;
    let mut best: HashMap<Kernel, KernelRate> = HashMap::new();
    let kernels = Kernel::available();
    'rounds: for round in 0..ROUNDS {
        for &kernel in &kernels {
            if round > 0 && began.elapsed() > BUDGET {
                tracing::debug!(round, "calibration ended early to keep within its time");
                break 'rounds;
            }
            let mut rate = |helpers: usize| {
                let bytes = (SECTION * (helpers + 1)).min(room);
                if place + bytes > room {
                    place = 0;
                }
                let seconds = time_copy(pool, kernel, &to, &from, place, bytes, helpers);
                place += bytes;
                bytes as f64 / seconds / 1e9
            };
            let one = rate(0);
            // With one copier, the second class is the first.
            let all = if pool.helpers() == 0 { one } else { rate(pool.helpers()) };
            let entry = best.entry(kernel).or_insert(KernelRate { kernel, one, all });
            (entry.one, entry.all) = (entry.one.max(one), entry.all.max(all));
        }
    }
    Some(kernels.iter().filter_map(|kernel| best.remove(kernel)).collect())
}

/// Seconds that a copy of `bytes` at offset `place` takes.
fn time_copy(
    pool: &WorkerPool,
    kernel: Kernel,
    to: &Arena,
    from: &Arena,
    place: usize,
    bytes: usize,
    helpers: usize,
) -> f64 {
    let cursor = AtomicUsize::new(0);
    let began = Instant::now();
    pool.run(helpers, &|_| {
        loop {
            let at = cursor.fetch_add(PIECE, Ordering::Relaxed);
            if at >= bytes {
                return;
            }
            let len = PIECE.min(bytes - at);
            // SAFETY: within both arenas, which are ours alone; no two pieces overlap.
            let copied = unsafe { kernel.copy(to.addr + place + at, from.addr + place + at, len) };
            debug_assert_eq!(copied, Ok(()));
        }
    });
    began.elapsed().as_secs_f64().max(1e-9)
}

/// A mapping of [`ARENA`] bytes.
struct Arena {
    addr: usize,
}

impl Arena {
    fn new() -> Option<Self> {
        // SAFETY: a new private mapping; nothing existing is touched.
        unsafe {
            let addr = libc::mmap(
                ptr::null_mut(),
                ARENA,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if addr == libc::MAP_FAILED {
                return None;
            }
            // A hint; without huge pages the measurement holds too.
            libc::madvise(addr, ARENA, libc::MADV_HUGEPAGE);
            Some(Self { addr: addr.expose_provenance() })
        }
    }

    /// Fills a part: pages never written are all one zero page, which would sit in the cache.
    fn populate(&self, at: usize, len: usize) {
        debug_assert!(at + len <= ARENA);
        // SAFETY: within our own mapping.
        unsafe { libc::memset(ptr::with_exposed_provenance_mut(self.addr + at), 0x5a, len) };
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(self.addr), ARENA) };
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn pool() -> WorkerPool {
        WorkerPool::with_copiers(2, &[]).expect("a thread can be started")
    }

    fn at(folder: &tempfile::TempDir) -> CalibrateOptions {
        CalibrateOptions {
            cache: CacheFolder::At(folder.path().join("new")),
            ..CalibrateOptions::default()
        }
    }

    fn only_file(options: &CalibrateOptions) -> PathBuf {
        let CacheFolder::At(folder) = &options.cache else {
            panic!("the tests use a folder of their own");
        };
        let mut files = std::fs::read_dir(folder).expect("the folder was made");
        let file = files.next().expect("a file was written").expect("it can be read");
        assert!(files.next().is_none(), "nothing else is left behind");
        file.path()
    }

    #[test]
    fn the_second_calibration_remembers_the_figures_of_the_first() {
        let (pool, folder) = (pool(), tempfile::tempdir().expect("a folder"));
        let options = at(&folder);
        let first = calibrate_with(&options, &pool, None).expect("nothing was asked for");
        assert_eq!((first.source, first.copiers), (Source::Measured, 2));
        assert_eq!(first.rates.len(), Kernel::available().len());
        let second = calibrate_with(&options, &pool, None).expect("nothing was asked for");
        assert_eq!(second.source, Source::Cached);
        assert_eq!((second.one, second.all), (first.one, first.all));
        assert!(second.all_gb_per_s().is_some_and(|rate| rate > 0.0));
        let again = CalibrateOptions { refresh: true, ..options };
        let third = calibrate_with(&again, &pool, None).expect("nothing was asked for");
        assert_eq!(third.source, Source::Measured);
    }

    #[test]
    fn a_damaged_or_foreign_file_is_measured_anew_and_replaced() {
        let (pool, folder) = (pool(), tempfile::tempdir().expect("a folder"));
        let options = at(&folder);
        calibrate_with(&options, &pool, None).expect("nothing was asked for");
        let path = only_file(&options);
        let good = std::fs::read_to_string(&path).expect("it was written");
        let damaged = [
            String::new(),
            "{".to_owned(),
            good.replacen("kernel=", "kernel=9", 1),
            good.replacen("memcpy", "turbo", 1),
            good.replacen("\"one\": ", "\"one\": -", 1),
        ];
        for text in damaged {
            assert_ne!(text, good);
            std::fs::write(&path, text).expect("it can be damaged");
            let found = calibrate_with(&options, &pool, None).expect("nothing was asked for");
            assert_eq!(found.source, Source::Measured);
            let found = calibrate_with(&options, &pool, None).expect("nothing was asked for");
            assert_eq!(found.source, Source::Cached);
            assert_eq!(only_file(&options), path);
        }
    }

    #[test]
    fn no_folder_or_one_that_cannot_be_made_only_means_measuring() {
        let pool = pool();
        let folder = PathBuf::from("/proc/self/no-such-folder");
        for cache in [CacheFolder::None, CacheFolder::At(folder)] {
            let options = CalibrateOptions { cache, ..CalibrateOptions::default() };
            let found = calibrate_with(&options, &pool, None).expect("nothing was asked for");
            assert_eq!(found.source, Source::Measured);
        }
    }

    #[test]
    fn a_kernel_asked_for_comes_before_the_environments_and_both_before_the_figures() {
        let (pool, folder) = (pool(), tempfile::tempdir().expect("a folder"));
        let mut options = at(&folder);
        let variable = || Some(OsString::from("memcpy"));
        let found = calibrate_with(&options, &pool, variable()).expect("memcpy is there");
        assert_eq!((found.one, found.source), (Kernel::MEMCPY, Source::Environment));
        assert!(!found.rates.is_empty(), "the figures are there all the same");
        let other = *Kernel::available().last().expect("there is memcpy at least");
        options.kernel = Some(other);
        let found = calibrate_with(&options, &pool, variable()).expect("it is there");
        assert_eq!((found.all, found.source), (other, Source::Asked));
    }

    #[test]
    fn a_wrong_name_in_the_environment_is_an_error_that_lists_the_right_ones() {
        let options = CalibrateOptions { cache: CacheFolder::None, ..Default::default() };
        let error = calibrate_with(&options, &pool(), Some("warp".into())).expect_err("no such");
        let text = error.to_string();
        for part in [KERNEL_VARIABLE, "'warp'", "memcpy"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
