//! A move of processes' pages: its options, its checks before a page is touched, its handle.

use super::age::Age;
use super::common::Attention;
use super::control::Control;
use super::error::{OptionError, ProcessError};
use super::job::{Job, Watcher};
use super::notes::Notes;
use super::pace::Rate;
use super::place::{Destination, Placement};
use super::report::ProcessReport;
use super::room::Room;
use super::select::Selection;
use super::targets::{Targets, allowed_nodes};
use super::walk::Walk;
use super::work::Work;
use super::{Priority, ProcessProgress, Reserve};
use crate::error::panic_text;
use crate::sync::Mutex;
use pageferry_sys::Errno;
use pageferry_sys::affinity::{CpuSet, allowed_cpus};
use pageferry_sys::process::{LinuxProcesses, ProcessKernel};
use pageferry_sys::procfs::Status;
use pageferry_topology::{Machine, NodeId, NodeList};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// The longest that one call is meant to take, unless asked otherwise.
pub const DEFAULT_CALL_LATENCY: Duration = Duration::from_millis(20);
/// How often a page that failed is tried again, unless asked otherwise.
pub const DEFAULT_RETRIES: u32 = 3;
/// Workers at most, unless asked otherwise: beyond it the kernel's locks are the limit.
const DEFAULT_WORKERS: usize = 8;

/// A move of the pages of processes by the kernel (`move_pages(2)`).
///
/// ```no_run
/// use pageferry::process::{Destination, ProcessMove, Selection};
/// use pageferry::topology::NodeId;
///
/// let program = Selection::new().pid(4711);
/// let report = ProcessMove::new(program, Destination::node(NodeId::new(1))).run()?;
/// for (outcome, bytes) in report.by_outcome() {
///     println!("{outcome}: {bytes} bytes");
/// }
/// # Ok::<(), pageferry::process::ProcessError>(())
/// ```
#[derive(Debug)]
#[must_use]
pub struct ProcessMove {
    kernel: Arc<dyn ProcessKernel>,
    machine: Option<Machine>,
    selection: Selection,
    from: Option<NodeList>,
    to: Destination,
    min_age: Option<Duration>,
    latency: Duration,
    retries: u32,
    rate: Option<u64>,
    workers: Option<usize>,
    priority: Priority,
    reserve: Reserve,
    dry_run: bool,
    cancel: Arc<AtomicBool>,
    watcher: Option<Watcher>,
}

impl ProcessMove {
    /// A move of this memory to these nodes.
    pub fn new(selection: Selection, to: Destination) -> Self {
        Self {
            kernel: Arc::new(LinuxProcesses::default()),
            machine: None,
            selection,
            from: None,
            to,
            min_age: None,
            latency: DEFAULT_CALL_LATENCY,
            retries: DEFAULT_RETRIES,
            rate: None,
            workers: None,
            priority: Priority::Normal,
            reserve: Reserve::Watermark,
            dry_run: false,
            cancel: Arc::new(AtomicBool::new(false)),
            watcher: None,
        }
    }

    /// Only pages that are on these nodes.
    pub fn from(mut self, nodes: NodeList) -> Self {
        self.from = Some(nodes);
        self
    }

    /// Only pages that were not used for so long (1 ms to 24 h), as the kernel's idle page tracking
    /// tells it. The move begins by marking pages, and waits for that long; pages that were used
    /// meanwhile stay, and are [`Young`](crate::Outcome::Young). So are those that have no idle
    /// information: hugetlb pages, what was faulted in meanwhile. Of a folio of several pages all
    /// are as young as the youngest.
    ///
    /// Needs `CONFIG_IDLE_PAGE_TRACKING` and root. What the kernel does not notice is not seen:
    /// uses that another program hides by marking pages idle at the same time, and those of pages
    /// whose translations stay in a CPU's TLB. Default: of any age.
    pub fn min_age(mut self, age: Duration) -> Self {
        self.min_age = Some(age);
        self
    }

    /// One call is meant to take no longer than this (100 us to 10 s): the seam at which the
    /// program waits. Default: [`DEFAULT_CALL_LATENCY`]. A single huge page may take longer.
    pub fn call_latency(mut self, latency: Duration) -> Self {
        self.latency = latency;
        self
    }

    /// How often a page that failed with `EBUSY`, `EAGAIN` or `ENOMEM` is tried again, with
    /// growing time in between (0 to 10). Default: [`DEFAULT_RETRIES`].
    pub fn retries(mut self, times: u32) -> Self {
        self.retries = times;
        self
    }

    /// No more than so many bytes per second (at least one page). Default: no limit.
    pub fn rate(mut self, bytes_per_s: u64) -> Self {
        self.rate = Some(bytes_per_s);
        self
    }

    /// Up to so many threads, as long as each adds to the throughput (1 to 256). Default: the
    /// CPUs allowed, at most 8.
    pub fn workers(mut self, most: usize) -> Self {
        self.workers = Some(most);
        self
    }

    /// How the workers compete for CPUs.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// What stays free on the destination nodes.
    pub fn reserve(mut self, reserve: Reserve) -> Self {
        self.reserve = reserve;
        self
    }

    /// Only finds out what would move; see [`Outcome::WouldMove`](crate::Outcome::WouldMove).
    pub fn dry_run(mut self, yes: bool) -> Self {
        self.dry_run = yes;
        self
    }

    /// Stops after the calls under way once this becomes true.
    pub fn cancelled_by(mut self, flag: Arc<AtomicBool>) -> Self {
        self.cancel = flag;
        self
    }

    /// Calls `watcher` about this often while it runs, and once at the end.
    pub fn on_progress(
        mut self,
        every: Duration,
        watcher: impl Fn(&ProcessProgress) + Send + Sync + 'static,
    ) -> Self {
        self.watcher = Some(Watcher { every, call: Box::new(watcher) });
        self
    }

    /// Another kernel: the seam for tests.
    pub fn kernel(mut self, kernel: Arc<dyn ProcessKernel>) -> Self {
        self.kernel = kernel;
        self
    }

    /// Another machine than the one this runs on: for tests.
    pub fn machine(mut self, machine: Machine) -> Self {
        self.machine = Some(machine);
        self
    }

    /// Moves on this thread, and some that it starts.
    ///
    /// # Errors
    /// [`ProcessError`]; no page has been touched then. That pages could not be moved is no error
    /// but in the report.
    pub fn run(self) -> Result<ProcessReport, ProcessError> {
        self.prepare().and_then(|(job, _)| go(job))
    }

    /// Moves on a thread of its own.
    ///
    /// # Errors
    /// As [`ProcessMove::run`], but for a panic.
    pub fn start(self) -> Result<ProcessHandle, ProcessError> {
        let (job, control) = self.prepare()?;
        let thread = std::thread::Builder::new()
            .name("pageferry-move".into())
            .spawn(move || go(job))
            .map_err(ProcessError::Thread)?;
        Ok(ProcessHandle { control, thread })
    }

    /// Checks everything that can be checked without touching a page.
    fn prepare(self) -> Result<(Job, Arc<Control>), ProcessError> {
        self.check_options()?;
        let machine = match self.machine {
            Some(machine) => machine,
            None => Machine::read()?,
        };
        for node in self.to.nodes().iter() {
            machine.memory_node(node)?;
        }
        for node in self.from.iter().flat_map(NodeList::iter) {
            machine.node(node)?;
        }
        let placement = Placement::new(&self.to, self.from.as_ref())?;
        let mut notes = Notes::default();
        let (targets, statuses) = Targets::check(&*self.kernel, &self.selection, &mut notes)?;
        for status in &statuses {
            if let Some((node, allowed)) = forbidden(status, &placement.nodes) {
                return Err(ProcessError::Forbidden { pid: status.tgid, node, allowed });
            }
        }
        // What a sandbox refuses was an error above.
        let kernel_asked = self.kernel.may_ask();
        // The kernel allocates for the caller: it would say that the node has no memory.
        let own = self.kernel.own_status().unwrap_or_default();
        if let Some((node, allowed)) = forbidden(&own, &placement.nodes) {
            return Err(ProcessError::OwnCpuset { node, allowed });
        }
        if let Err(errno) = kernel_asked {
            return Err(ProcessError::NoNuma(errno));
        }
        let control = Arc::new(Control::new(self.cancel));
        let kernel = self.kernel;
        let age = match self.min_age {
            None => None,
            Some(least) => {
                let pages = kernel.idle_pages().map_err(no_idle_pages)?;
                let (targets, filter) = (targets.clone(), self.selection.filter.clone());
                let none = Attention::None;
                let walk = Walk::new(Arc::clone(&kernel), targets, filter, false, none);
                Some(Age { pages, least, walk: Mutex::new(Some(walk)) })
            }
        };
        let attention = match targets.may_be_several() {
            false => Attention::None,
            // Nothing moves: a page has the same frame when the next process that maps it is looked at.
            true if self.dry_run => Attention::Once,
            true => Attention::Told,
        };
        let filter = self.selection.filter;
        let walk = Walk::new(Arc::clone(&kernel), targets, filter, false, attention);
        let most = allowed_cpus().len().clamp(1, DEFAULT_WORKERS);
        let job = Job {
            room: Room::new(Arc::clone(&kernel), &placement.nodes, self.reserve),
            work: Work::new(Arc::clone(&kernel), Arc::clone(&control), walk),
            control: Arc::clone(&control),
            cpus: near(&machine, &placement.nodes),
            placement,
            latency: self.latency,
            retries: self.retries,
            dry_run: self.dry_run,
            age,
            moves_shared: AtomicBool::new(kernel.may_move_shared()),
            rate: self.rate.map(|r| (r, Mutex::new(Rate::new(r, kernel.now())))),
            workers: self.workers.unwrap_or(most),
            priority: self.priority,
            watcher: self.watcher,
            notes,
            kernel,
        };
        Ok((job, control))
    }

    fn check_options(&self) -> Result<(), OptionError> {
        let bad = |option, value: String, reason| OptionError { option, value, reason };
        let latencies = Duration::from_micros(100)..=Duration::from_secs(10);
        if !latencies.contains(&self.latency) {
            return Err(bad("call_latency", format!("{:?}", self.latency), "100 us to 10 s"));
        }
        let ages = Duration::from_millis(1)..=Duration::from_secs(24 * 60 * 60);
        if let Some(age) = self.min_age.filter(|age| !ages.contains(age)) {
            return Err(bad("min_age", format!("{age:?}"), "1 ms to 24 h"));
        }
        if self.retries > 10 {
            return Err(bad("retries", self.retries.to_string(), "0 to 10"));
        }
        let page = pageferry_sys::page_size() as u64;
        if let Some(rate) = self.rate.filter(|r| *r < page) {
            return Err(bad("rate", rate.to_string(), "at least one page per second, in bytes"));
        }
        if let Some(workers) = self.workers.filter(|w| !(1..=256).contains(w)) {
            return Err(bad("workers", workers.to_string(), "1 to 256"));
        }
        match self.priority {
            Priority::Nice(nice) if !(-20..=19).contains(&nice) => {
                Err(bad("priority", nice.to_string(), "a nice value is -20 to 19"))
            }
            _ => Ok(()),
        }
    }
}

/// Why there is no idle information.
fn no_idle_pages(errno: Errno) -> ProcessError {
    match errno.0 {
        libc::ENOENT | libc::ENOTDIR | libc::ENXIO | libc::ENODEV | libc::ENOSYS => {
            ProcessError::NoIdlePages(errno)
        }
        _ => ProcessError::IdlePagesDenied(errno),
    }
}

fn go(job: Job) -> Result<ProcessReport, ProcessError> {
    catch_unwind(AssertUnwindSafe(|| job.run()))
        .map_err(|panic| ProcessError::Panicked(panic_text(&*panic)))
}

/// A node that a process may not have memory on, and those that it may.
fn forbidden(status: &Status, nodes: &[NodeId]) -> Option<(NodeId, String)> {
    let allowed = allowed_nodes(status)?;
    let node = nodes.iter().find(|node| !allowed.contains(**node))?;
    Some((*node, allowed.to_string()))
}

/// The CPUs nearest to the destinations, where that says anything.
fn near(machine: &Machine, nodes: &[NodeId]) -> Option<CpuSet> {
    if machine.nodes().len() < 2 {
        return None;
    }
    let allowed: CpuSet = allowed_cpus().into_iter().collect();
    let near = nodes.iter().filter_map(|n| machine.nearest_cpus(*n).ok());
    let near: CpuSet = near
        .flat_map(|cpus| cpus.iter().map(u32::from).collect::<Vec<_>>())
        .filter(|cpu| allowed.contains(*cpu))
        .collect();
    (!near.is_empty()).then_some(near)
}

/// A move under way. Dropped, the move goes on.
#[derive(Debug)]
pub struct ProcessHandle {
    control: Arc<Control>,
    thread: JoinHandle<Result<ProcessReport, ProcessError>>,
}

impl ProcessHandle {
    /// How far it is.
    pub fn progress(&self) -> ProcessProgress {
        self.control.progress()
    }

    /// Asks it to stop after the calls under way. Pages planned and not moved are reported as
    /// [`Cancelled`](crate::Outcome::Cancelled), those that it had not come to are in no line.
    pub fn cancel(&self) {
        self.control.cancel();
    }

    /// Whether the report is there.
    pub fn is_finished(&self) -> bool {
        self.control.finished.load(Ordering::Relaxed) || self.thread.is_finished()
    }

    /// Waits for the report.
    ///
    /// # Errors
    /// [`ProcessError::Panicked`], which is a bug.
    pub fn wait(self) -> Result<ProcessReport, ProcessError> {
        self.thread.join().unwrap_or_else(|_| Err(ProcessError::Panicked(String::new())))
    }
}
