//! `pageferry demo`: a program whose memory moves while it works.
//!
//! It reads text, builds an inverted index of it in managed memory ([`index`], [`twin`]), lets
//! threads ask and update the index ([`load`]), and has the memory moved under them ([`moving`]),
//! by the engine as it comes and one folio at a time: at full speed for the rates, and at a common
//! pace ([`pace`]) for what is felt. Between the moves nothing moves, once at rest and once with as
//! much CPU time burnt as moving took ([`burn`]): in turn, several times ([`rounds`]). The same index in ordinary memory tells what every answer must be. In the end it
//! says what was felt, what was moved, and whether anything differed ([`report`]).
//!
//! What must always hold: no address in the region is given to a system call while it moves, so
//! that it works in user-mode-only form, for users without rights. Locks, histograms, answers and
//! everything that is printed live in ordinary memory.

mod burn;
mod corpus;
mod holes;
mod index;
#[cfg(test)]
mod index_tests;
mod limits;
mod load;
mod look;
mod memory;
mod moving;
mod pace;
mod postings;
mod progress;
mod report;
mod report_text;
mod rounds;
mod tally;
mod text;
mod twin;

use crate::cancel;
use crate::cli::JsonArg;
use crate::exit::Exit;
use crate::output::{Context, Problem, YELLOW};
use anyhow::Context as _;
use burn::Control;
use clap::{Args, ValueEnum, ValueHint};
use corpus::Corpus;
use load::Load;
use moving::{Mover, Route};
use pageferry::{BuildError, Engine, Folios, Region, RegionAlloc, Rights};
use pageferry_copy::CopyEngine as _;
use progress::Progress;
use report::{Answers, DemoReport, IndexSize, Moved, Rounds, Setting};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tally::{Kind, Seen};
use twin::{Filled, NoRoom, Twin};

/// Threads that update: one, so that it finds each document where the last slice put it back.
const UPDATES: usize = 1;
/// Frames are kept this long: through the times of rest.
const KEEP_FRAMES: Duration = Duration::from_secs(60);
/// Stripes of a mixed region at most, and so of mappings that it consists of (a process has 65530:
/// vm.max_map_count).
const STRIPES: usize = 64;

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

    /// Threads that query, up to 64; one more updates
    #[arg(long, value_name = "N", default_value_t = 2,
          value_parser = clap::value_parser!(u16).range(1..=64))]
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
    /// Both: half of the index in huge pages, half in base pages, in stripes
    Mixed,
}

impl FolioKind {
    /// Folio sizes for which the engine has frames.
    fn sizes(self) -> u64 {
        match self {
            Self::Base => 1,
            Self::Huge | Self::Mixed => 2,
        }
    }

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
    let size = memory::size(args.size, args.threads, args.folios.sizes())?;
    let engine = build_engine(args.user_mode_only)?;
    let route = Route::on(engine.machine(), memory::region_bytes(size))
        .context("this machine shows no node with memory")?;
    let setting = Setting {
        route,
        memory_nodes: engine.machine().memory_nodes().count(),
        user_mode_only: engine.rights() == Rights::UserModeOnly,
        folios: args.folios.describe(),
        query_threads: args.threads.into(),
        wanted_bytes: size,
    };
    let progress = Progress::new(context)?;
    let corpus = read(args.dir.clone(), size, &progress)?;
    let mut report = DemoReport::new(setting, corpus.taken.clone());
    if cancel::requested() {
        note("cancelled while reading; nothing was moved");
    } else {
        demonstrate(&args, &engine, route, &corpus, &progress, &mut report)?;
    }
    report.cancelled = cancel::requested();
    if args.json.json {
        context.print_json(&report)?;
    } else if !report.cancelled || report.index.documents > 0 {
        context.print(&report)?;
    }
    Ok(match (report.is_right(), report.cancelled) {
        (false, _) => Exit::Failed,
        (true, true) => Exit::Cancelled,
        (true, false) => Exit::Ok,
    })
}

/// Indexes the text, has it moved while it is used, and adds what came of it to the report.
fn demonstrate(
    args: &DemoArgs,
    engine: &Engine,
    route: Route,
    corpus: &Corpus,
    progress: &Progress,
    report: &mut DemoReport,
) -> anyhow::Result<()> {
    let size = report.index.wanted_bytes;
    let region = map(engine, size, route, args.folios)?;
    let alloc = RegionAlloc::new(Arc::clone(&region));
    let twin = Twin::new_in(&alloc);
    let filled = fill(&twin, corpus, &alloc, size, progress)?;
    // Before the updates, which take documents out and put them back.
    let built = alloc.used_bytes() as u64;

    let mut mover = Mover::new(engine.clone(), Arc::clone(&region), route);
    let mut control = Control::new(engine.cpu().capabilities().max_parallel)?;
    let load = Load::new(&twin, corpus)?;
    let threads = [args.threads.into(), UPDATES];
    let mut rounds = Rounds::new()?;
    let measure = || {
        let time = (args.seconds, progress);
        rounds::run(&load, threads, &mut mover, &mut control, time, |round| rounds.add(round))
    };
    let (equal, seen) = load.run(threads[0], threads[1], measure)?;
    let equal = equal?;

    let bar = progress.begin("comparing all of the index", twin::SHARDS as u64);
    report.scan = twin.compare(|shards| bar.set_position(shards as u64));
    bar.finish_and_clear();
    report.index = IndexSize {
        bytes: built,
        wanted_bytes: size,
        region_bytes: region.len() as u64,
        present_bytes: region.residency()?.iter().map(|r| r.bytes).sum(),
        documents: twin.documents(),
        editions: ratio(filled.documents, corpus.documents.len() as u64).unwrap_or(0.0),
        text_used_up: filled.used_up,
    };
    report.moved = Moved::from(&mover.by_engine);
    report.one_folio_at_a_time = Moved::from(&mover.one_by_one);
    let median = |moved: &Moved| moved.spread.map_or(0.0, |spread| spread.median);
    let rates = (median(&report.moved), median(&report.one_folio_at_a_time));
    report.ratio = (rates.1 > 0.0).then(|| rates.0 / rates.1);
    report.queries = rounds.felt(Kind::Query);
    report.updates = rounds.felt(Kind::Update);
    report.equal_work = rounds.equal_work(&equal);
    report.burnt_cpu = control.result();
    report.updates_without_room = seen.full;
    report.answers = answers(seen);
    report.physical_pages = mover.frames;
    Ok(())
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

fn read(dir: Option<PathBuf>, size: u64, progress: &Progress) -> Result<Corpus, Problem> {
    let limit = memory::text_bytes(size);
    let bar = progress.begin("reading text", limit);
    let given = dir.is_some();
    let folders = dir.map_or_else(corpus::usual_folders, |dir| vec![dir]);
    let names: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
    let corpus = Corpus::read(folders, limit, |bytes| bar.set_position(bytes));
    bar.finish_and_clear();
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
    let options = engine.map(bytes).folios(whole).prefer(route.home());
    // SAFETY: the index is read and written by the demo's threads alone, and no system call is
    // given any of it.
    let options = unsafe { options.no_references() };
    let region = options.build()?;
    if let FolioKind::Mixed = folios {
        // The allocator fills the region from the front: in stripes both kinds are used, however
        // far it comes.
        let stripe = (bytes / STRIPES).next_multiple_of(pageferry::HUGE);
        for (start, folios) in
            (0..bytes).step_by(stripe).zip([Folios::Huge, Folios::Base].into_iter().cycle())
        {
            region.advise(start..(start + stripe).min(bytes), folios)?;
        }
    }
    Ok(Arc::new(region))
}

fn fill(
    twin: &Twin<RegionAlloc>,
    corpus: &Corpus,
    alloc: &RegionAlloc,
    size: u64,
    progress: &Progress,
) -> Result<Filled, Problem> {
    let bar = progress.begin("building the index twice", size);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(twin::SHARDS);
    let used = || alloc.used_bytes() as u64;
    let filled = twin.fill(corpus, threads, || used() >= size, || bar.set_position(used()));
    bar.finish_and_clear();
    let filled = filled.map_err(|e| limits::no_thread(&e))?;
    let failed = |because: String, remedy: &str| Problem {
        what: "the index could not be built".into(),
        because,
        remedy: remedy.into(),
        exit: Exit::Failed,
    };
    match filled.no_room {
        // What follows needs memory too: better to end here than in the middle of it.
        Some(NoRoom::Reference) => Err(failed(
            format!(
                "the system refused memory for its reference at {} of {}",
                memory::iec(used()),
                memory::iec(size)
            ),
            "use a smaller --size, or raise this process's limits (ulimit -v, ulimit -d, the \
             cgroup's memory.max)",
        )),
        Some(NoRoom::Managed) if filled.documents == 0 => {
            Err(failed("not even one document fits into the region".into(), "use a larger --size"))
        }
        Some(NoRoom::Managed) => {
            note(format_args!(
                "{YELLOW}notice:{YELLOW:#} the region is full at an index of {}",
                memory::iec(used())
            ));
            Ok(filled)
        }
        None => Ok(filled),
    }
}

fn answers(seen: Seen) -> Answers {
    Answers {
        compared: seen.compared,
        differing: seen.differing,
        first_difference: seen.difference,
    }
}

#[allow(clippy::cast_precision_loss, reason = "rounded to be read")]
fn ratio(a: u64, b: u64) -> Option<f64> {
    (b > 0).then(|| a as f64 / b as f64)
}
