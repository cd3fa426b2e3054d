//! `pageferry demo`: a program whose memory moves while it works.
//!
//! It reads text, builds an inverted index of it in managed memory ([`index`], [`twin`]), lets
//! threads ask and update the index ([`load`]), and has the memory moved under them ([`moving`]),
//! by the engine as it comes and one folio at a time, with times of rest between: in turn, several
//! times, so that whatever else the machine does falls on all three alike. The same index in
//! ordinary memory tells what every answer must be. In the end it says what was felt, what was
//! moved, and whether anything differed ([`report`]).
//!
//! What must always hold: no address in the region is given to a system call while it moves, so
//! that it works in user-mode-only form, for users without rights. Locks, histograms, answers and
//! everything that is printed live in ordinary memory.

mod corpus;
mod index;
#[cfg(test)]
mod index_tests;
mod load;
mod memory;
mod moving;
mod postings;
mod report;
mod text;
mod twin;

use crate::cancel;
use crate::cli::JsonArg;
use crate::exit::Exit;
use crate::output::{Context, DIM, Problem, YELLOW};
use anyhow::Context as _;
use clap::{Args, ValueEnum, ValueHint};
use corpus::Corpus;
use indicatif::{ProgressBar, ProgressStyle};
use load::{Kind, Load, Phase, Tally};
use moving::{Mover, Route};
use pageferry::{BuildError, Engine, Folios, IoPins, Region, RegionAlloc, Rights};
use report::{Answers, DemoReport, Felt, IndexSize, Moved, SCHEMA};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use twin::Twin;

/// Seconds of a round (rest, move, move one by one) at most; there are three at least where there
/// is time for them.
const ROUND: u32 = 3;
/// How long the threads look for their rate.
const WARM_UP: Duration = Duration::from_millis(400);
/// Threads that update.
const UPDATES: usize = 1;
/// Frames are kept this long: through the times of rest.
const KEEP_FRAMES: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Index the text files below this folder [default: this machine's documentation]
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    dir: Option<PathBuf>,

    /// Size of the index, such as 64M or 1G [default: 256M, less where memory is short]
    #[arg(long, value_name = "BYTES", value_parser = memory::parse)]
    size: Option<u64>,

    /// Seconds to measure, building the index not counted
    #[arg(long, value_name = "N", default_value_t = 12,
          value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: u32,

    /// Threads that query; one more updates
    #[arg(long, value_name = "N", default_value_t = 2,
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,

    /// Folios that the index lives in
    #[arg(long, value_name = "KIND", default_value = "base")]
    folios: FolioKind,

    /// Use userfaultfd in user-mode-only form, as a user without rights does
    #[arg(long, visible_alias = "user")]
    user_mode_only: bool,

    #[command(flatten)]
    json: JsonArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FolioKind {
    /// 4 KiB pages
    Base,
    /// 2 MiB pages where the kernel has them
    Huge,
    /// Both: half of the index in huge pages, half in base pages
    Mixed,
}

impl FolioKind {
    fn describe(self) -> &'static str {
        match self {
            Self::Base => "base pages",
            Self::Huge => "huge pages where the kernel has them",
            Self::Mixed => "huge pages (where the kernel has them) and base pages",
        }
    }
}

pub(crate) fn run(args: DemoArgs, context: &Context) -> anyhow::Result<Exit> {
    if let Some(dir) = &args.dir {
        check_folder(dir)?;
    }
    let size = memory::size(args.size)?;
    let engine = build_engine(args.user_mode_only)?;
    let stage = Stage::new(context)?;

    let corpus = read(args.dir, size, &stage)?;
    if cancel::requested() {
        note("cancelled while reading; nothing was moved");
        return Ok(Exit::Cancelled);
    }
    let route = Route::on(engine.machine(), memory::region_bytes(size))
        .context("this machine shows no node with memory")?;
    let region = map(&engine, size, route, args.folios)?;
    let alloc = RegionAlloc::new(Arc::clone(&region));
    let twin = Twin::new_in(&alloc);
    fill(&twin, &corpus, &alloc, size, &stage)?;
    let editions = ratio(twin.documents(), corpus.documents.len() as u64).unwrap_or(0.0);

    let mut mover = Mover::new(engine.clone(), Arc::clone(&region), route);
    let queries = usize::from(args.threads);
    let load = Load::new(&twin, &corpus);
    let (moved, tally) =
        load.run(queries, UPDATES, || rounds(&load, &mut mover, args.seconds, &stage))?;
    stage.bar.finish_and_clear();
    moved?;

    stage.begin("comparing all of the index", 0);
    let scan = twin.compare();
    stage.bar.finish_and_clear();
    let residency = region.residency()?;
    let (moved, one_by_one) = (Moved::from(&mover.by_engine), Moved::from(&mover.one_by_one));
    let rates = (moved.gb_per_s, one_by_one.gb_per_s);
    let report = DemoReport {
        schema: SCHEMA,
        text: corpus.taken.clone(),
        index: IndexSize {
            bytes: alloc.used_bytes() as u64,
            region_bytes: region.len() as u64,
            present_bytes: residency.iter().map(|r| r.bytes).sum(),
            documents: twin.documents(),
            editions,
        },
        route,
        memory_nodes: engine.machine().memory_nodes().count(),
        user_mode_only: engine.rights() == Rights::UserModeOnly,
        folios: args.folios.describe(),
        query_threads: queries,
        ratio: (rates.1 > 0.0).then(|| rates.0 / rates.1),
        moved,
        one_folio_at_a_time: one_by_one,
        queries: Felt::new(&tally, &Kind::QUERIES),
        updates: Felt::new(&tally, &Kind::UPDATES),
        updates_without_room: tally.full,
        answers: answers(tally),
        scan,
        physical_pages: mover.frames,
        cancelled: cancel::requested(),
    };
    if args.json.json {
        context.print_json(&report)?;
    } else {
        context.print(&report)?;
    }
    Ok(match (report.is_right(), report.cancelled) {
        (false, _) => Exit::Failed,
        (true, true) => Exit::Cancelled,
        (true, false) => Exit::Ok,
    })
}

fn check_folder(dir: &Path) -> Result<(), Problem> {
    let what = || format!("cannot index {}", dir.display());
    let remedy = "give a folder with text files, or none for this machine's documentation";
    match std::fs::metadata(dir) {
        Err(e) => Err(Problem::bad_input(what(), e.to_string(), remedy)),
        Ok(found) if !found.is_dir() => {
            Err(Problem::bad_input(what(), "it is not a folder", remedy))
        }
        // A folder that may not be listed would look like one without text.
        Ok(_) => match std::fs::read_dir(dir) {
            Ok(_) => Ok(()),
            Err(e) => Err(Problem::bad_input(what(), e.to_string(), remedy)),
        },
    }
}

/// The engine; without the rights for all of it, in the form that needs none, and says so.
fn build_engine(user_mode_only: bool) -> anyhow::Result<Engine> {
    let builder = || Engine::builder().idle_release(KEEP_FRAMES);
    let refused = match builder().user_mode_only(user_mode_only).build() {
        Err(BuildError::NotPermitted(errno)) if !user_mode_only => errno,
        other => return Ok(other?),
    };
    let engine = builder().user_mode_only(true).build()?;
    note(format_args!(
        "{YELLOW}notice:{YELLOW:#} full userfaultfd rights are missing ({refused}), so the \
         demo uses user-mode-only form: no system call is given the index's memory while it moves"
    ));
    Ok(engine)
}

/// Prints a line to stderr. If stderr is gone, nobody wants it.
fn note(text: impl std::fmt::Display) {
    let _ = writeln!(anstream::stderr(), "{text}");
}

fn read(dir: Option<PathBuf>, size: u64, stage: &Stage) -> Result<Corpus, Problem> {
    let limit = memory::text_bytes(size);
    stage.begin("reading text", limit);
    let given = dir.is_some();
    let folders = dir.map_or_else(corpus::usual_folders, |dir| vec![dir]);
    let names: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
    let corpus = Corpus::read(folders, limit, |bytes| stage.bar.set_position(bytes));
    stage.bar.finish_and_clear();
    if !corpus.documents.is_empty() || cancel::requested() {
        return Ok(corpus);
    }
    let taken = &corpus.taken;
    let below = if names.is_empty() { "the usual folders".to_owned() } else { names.join(", ") };
    Err(Problem::bad_input(
        format!("there is no text to index below {below}"),
        format!(
            "{} files are not text in UTF-8, {} could not be read, and no other holds a word",
            taken.not_text, taken.unreadable
        ),
        if given {
            "give a folder with text files, or none for this machine's documentation"
        } else {
            "give a folder with text files: pageferry demo DIR"
        },
    ))
}

fn map(engine: &Engine, size: u64, route: Route, folios: FolioKind) -> anyhow::Result<Arc<Region>> {
    let bytes = usize::try_from(memory::region_bytes(size)).context("size of the region")?;
    let whole = match folios {
        FolioKind::Base => Folios::Base,
        FolioKind::Huge => Folios::Huge,
        FolioKind::Mixed => Folios::Mixed,
    };
    // No device is ever given the index's memory.
    let options = engine.map(bytes).folios(whole).prefer(route.home()).io_pins(IoPins::Never);
    let region = options.build()?;
    if let FolioKind::Mixed = folios {
        // The allocator fills the region from the front, and an index takes about half of it.
        let half = (bytes / 4).next_multiple_of(pageferry::HUGE);
        region.advise(0..half, Folios::Huge)?;
        region.advise(half..bytes, Folios::Base)?;
    }
    Ok(Arc::new(region))
}

fn fill(
    twin: &Twin<RegionAlloc>,
    corpus: &Corpus,
    alloc: &RegionAlloc,
    size: u64,
    stage: &Stage,
) -> anyhow::Result<()> {
    stage.begin("building the index twice", size);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(twin::SHARDS);
    let used = || alloc.used_bytes() as u64;
    let filled = twin.fill(corpus, threads, || used() >= size, || stage.bar.set_position(used()));
    stage.bar.finish_and_clear();
    if filled.documents == 0 && !cancel::requested() {
        return Err(Problem {
            what: "the index could not be built".into(),
            because: "not even one document fits into the region".into(),
            remedy: "use a larger --size".into(),
            exit: Exit::Failed,
        }
        .into());
    }
    if filled.full {
        note(format_args!("{DIM}the region is full at an index of {}{DIM:#}", memory::iec(used())));
    }
    Ok(())
}

/// The measured part: rest, move, move one by one, in turn.
fn rounds(
    load: &Load<'_, RegionAlloc>,
    mover: &mut Mover,
    seconds: u32,
    stage: &Stage,
) -> anyhow::Result<()> {
    let total = Duration::from_secs(seconds.into());
    let rounds = (seconds / ROUND).max(seconds.min(3));
    let slice = total / (rounds * 3);
    let start = Instant::now() + WARM_UP;
    let length = u64::try_from(total.as_millis()).unwrap_or(u64::MAX);
    stage.begin("warming up", length);
    let glance = || {
        let passed = start.elapsed().as_millis();
        stage.bar.set_position(u64::try_from(passed).unwrap_or(length).min(length));
    };
    rest(WARM_UP, &glance);
    for _ in 0..rounds {
        for phase in Phase::MEASURED {
            if cancel::requested() {
                return Ok(());
            }
            stage.bar.set_message(match phase {
                Phase::Moving => "moving the index",
                Phase::OneByOne => "moving it one folio at a time",
                _ => "nothing moves",
            });
            load.enter(phase);
            let end = Instant::now() + slice;
            match phase {
                Phase::Moving => mover.move_until(end, glance)?,
                Phase::OneByOne => mover.one_by_one_until(end, glance)?,
                _ => rest(slice, &glance),
            }
        }
    }
    Ok(())
}

/// Lets time pass, in steps short enough to notice that the user cancels.
fn rest(time: Duration, glance: &impl Fn()) {
    const STEP: Duration = Duration::from_millis(50);
    let end = Instant::now() + time;
    while !cancel::requested() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        std::thread::sleep(left.min(STEP));
        glance();
    }
}

fn answers(tally: Tally) -> Answers {
    Answers {
        compared: tally.compared,
        differing: tally.differing,
        first_difference: tally.difference,
    }
}

#[allow(clippy::cast_precision_loss, reason = "rounded to be read")]
fn ratio(a: u64, b: u64) -> Option<f64> {
    (b > 0).then(|| a as f64 / b as f64)
}

/// The progress bar, one stage after another.
struct Stage {
    bar: ProgressBar,
}

impl Stage {
    fn new(context: &Context) -> anyhow::Result<Self> {
        let bar = if context.progress { ProgressBar::new(0) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template("{msg:<30} {wide_bar} {percent:>3} %");
        bar.set_style(style.context("progress bar")?);
        Ok(Self { bar })
    }

    fn begin(&self, what: &'static str, length: u64) {
        self.bar.set_message(what);
        self.bar.set_length(length);
        self.bar.reset();
    }
}
