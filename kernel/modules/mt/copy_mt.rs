// SPDX-License-Identifier: GPL-2.0

//! Copies the folios of a migration batch with several CPUs.
//!
//! The calling thread copies, and so do helpers: works of an unbound workqueue, whose pools are one
//! for each last-level cache. All take chunks of the batch's bytes from one cursor, so that many
//! small folios are spread and few big ones split. A helper that comes late finds the cursor at
//! the end and leaves; nobody waits for it.
//!
//! What always holds:
//! - Each byte is copied once, by whoever took its chunk.
//! - The call returns when every chunk that was taken is done: no folio is touched afterwards. What
//!   a late helper still holds is the batch's own memory, never a folio.
//! - A folio is marked as copied only if all of it was; the others are left to the kernel.
//! - Nothing is allocated that waits for memory.

use core::cell::UnsafeCell;
use core::ffi::{c_int, c_uint};
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use kernel::alloc::flags::{GFP_KERNEL, GFP_NOWAIT};
use kernel::bindings;
use kernel::page::PAGE_SIZE;
use kernel::prelude::*;
use kernel::sync::{new_mutex, Arc, Mutex, UniqueArc};

#[path = "../../../crates/pageferry-copy/src/share.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with userspace")]
mod share;
#[path = "../common/items.rs"]
mod items;
mod shim;

use items::Items;
use shim::Settings;

module! {
    type: CopyMt,
    name: "pageferry_copy_mt",
    author: "pageferry",
    description: "Copies page migration's batches with several CPUs",
    license: "GPL",
}

/// Helpers of a batch at most; the parameter's range, too.
const MOST_HELPERS: usize = 31;
/// The largest chunk in bytes: as in userspace, where it was measured.
const CHUNK: usize = 128 << 10;
/// CPUs that helpers may be on.
const MOST_CPUS: usize = 1024;

/// A helper of a batch.
struct Helper {
    work: UnsafeCell<MaybeUninit<bindings::work_struct>>,
    /// What it helps with: a reference that is its own from queueing to its end.
    batch: UnsafeCell<*const Batch>,
}

/// A batch being copied.
struct Batch {
    items: Items,
    /// Bytes of a claim; settled before the first.
    chunk: AtomicUsize,
    non_temporal: bool,
    /// Bytes given out.
    next: AtomicUsize,
    /// Bytes that are done.
    done: AtomicUsize,
    /// Completed by a helper that does the last chunk.
    all_done: UnsafeCell<bindings::completion>,
    helped: AtomicUsize,
    helper_ns: AtomicU64,
    helpers: [Helper; MOST_HELPERS],
}

// SAFETY: folios are copied under exclusive claims, handed out by `next`; the rest is atomic, a
// completion, or (`helpers`) touched by the queueing thread before and the helper after queueing.
unsafe impl Send for Batch {}
// SAFETY: as above.
unsafe impl Sync for Batch {}

impl Batch {
    /// The folios of two lists.
    ///
    /// # Safety
    /// As `offload_copy` of `struct migrator` has them.
    unsafe fn new(
        dsts: *mut bindings::list_head,
        srcs: *mut bindings::list_head,
        folios: usize,
        settings: &Settings,
    ) -> Result<Arc<Self>> {
        // SAFETY: as promised to us.
        let items = unsafe { Items::take(dsts, srcs, folios)? };
        let batch = UniqueArc::<Self>::new_uninit(GFP_NOWAIT)?;
        let batch = batch.write(Self {
            items,
            chunk: AtomicUsize::new(CHUNK),
            non_temporal: settings.non_temporal != 0,
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            // SAFETY: all zero is a valid completion that nobody waits for; initialised below.
            all_done: UnsafeCell::new(unsafe { core::mem::zeroed() }),
            helped: AtomicUsize::new(0),
            helper_ns: AtomicU64::new(0),
            helpers: [const {
                Helper {
                    work: UnsafeCell::new(MaybeUninit::uninit()),
                    batch: UnsafeCell::new(ptr::null()),
                }
            }; MOST_HELPERS],
        });
        let batch: Arc<Self> = batch.into();
        // SAFETY: ours alone still, and it stays where it is.
        unsafe { shim::pf_init_completion(batch.all_done.get()) };
        Ok(batch)
    }

    /// Takes and copies one chunk; the bytes copied, 0 if all are taken.
    fn chunk(&self) -> usize {
        // Relaxed: the content came with the batch; the cursor only shares it out.
        if self.next.load(Ordering::Relaxed) >= self.items.bytes {
            return 0;
        }
        let chunk = self.chunk.load(Ordering::Relaxed);
        let at = self.next.fetch_add(chunk, Ordering::Relaxed);
        if at >= self.items.bytes {
            return 0;
        }
        let end = self.items.bytes.min(at + chunk);
        self.copy(at, end);
        end - at
    }

    /// Copies bytes `at .. end`, whole pages, which the caller has taken.
    fn copy(&self, at: usize, end: usize) {
        self.items.each(at, end, |item, from, bytes| {
            let (first, pages) = (from / PAGE_SIZE, bytes / PAGE_SIZE);
            // SAFETY: both folios are held by the migration until `offload_copy` returns, which
            // is not before this chunk is counted; these pages of them are taken by us alone.
            let told =
                unsafe { shim::pf_copy(item.dst, item.src, first, pages, self.non_temporal) };
            if told != 0 {
                item.failed.store(true, Ordering::Relaxed);
            }
        });
    }

    /// Counts bytes as done; whether they were the last.
    fn finish(&self, bytes: usize) -> bool {
        // Release: what was copied, and what failed, is told with it. Acquire: so is what others
        // did to whom this makes the last.
        self.done.fetch_add(bytes, Ordering::AcqRel) + bytes == self.items.bytes
    }
}

/// What a helper does.
///
/// # Safety
/// Called by the workqueue with the work of a `Helper` that was queued with a reference.
unsafe extern "C" fn help(work: *mut bindings::work_struct) {
    // SAFETY: the work is the first part of `Helper::work`, which has the layout of its content.
    let helper = unsafe { kernel::container_of!(work, Helper, work) };
    // SAFETY: written before it was queued, and ours since.
    let batch = unsafe { Arc::from_raw(*(*helper).batch.get()) };
    let mut began = shim::thread_ns();
    loop {
        let bytes = batch.chunk();
        if bytes == 0 {
            break;
        }
        let now = shim::thread_ns();
        batch.helped.fetch_add(bytes, Ordering::Relaxed);
        batch.helper_ns.fetch_add(now.wrapping_sub(began), Ordering::Relaxed);
        began = now;
        if batch.finish(bytes) {
            // SAFETY: initialised in `new`; the reference keeps it.
            unsafe { bindings::complete(batch.all_done.get()) };
        }
    }
}

/// The CPUs of a node, in the order in which helpers are put on them, and of each its cache.
struct Node {
    number: u32,
    cpus: KVec<u32>,
    caches: KVec<u32>,
}

/// The CPUs of all nodes that have any.
struct Cpus(KVec<Node>);

impl Cpus {
    fn read() -> Result<Self> {
        let mut lists = [const { KVec::<u32>::new() }; 3];
        for list in &mut lists {
            for _ in 0..MOST_CPUS {
                list.push(0, GFP_KERNEL)?;
            }
        }
        let [cpus, nodes, caches] = &mut lists;
        let count = shim::cpus(cpus, nodes, caches);
        let mut all: KVec<Node> = KVec::new();
        for number in nodes.iter().take(count) {
            if all.iter().any(|known| known.number == *number) {
                continue;
            }
            let (mut mine, mut on) = (KVec::new(), KVec::new());
            let mut order = KVec::new();
            for at in (0..count).filter(|at| nodes[*at] == *number) {
                mine.push(cpus[at], GFP_KERNEL)?;
                on.push(caches[at], GFP_KERNEL)?;
                order.push(0, GFP_KERNEL)?;
            }
            share::spread(&on, &mut order);
            let (mut cpus, mut caches) = (KVec::new(), KVec::new());
            for place in &order {
                cpus.push(mine[*place], GFP_KERNEL)?;
                caches.push(on[*place], GFP_KERNEL)?;
            }
            all.push(Node { number: *number, cpus, caches }, GFP_KERNEL)?;
        }
        Ok(Self(all))
    }

    fn of(&self, node: c_int) -> Option<&Node> {
        self.0.iter().find(|known| known.number as c_int == node)
    }
}

/// What the module keeps while it is loaded.
#[pin_data]
struct State {
    queue: *mut bindings::workqueue_struct,
    #[pin]
    cpus: Mutex<Arc<Cpus>>,
    /// Where the next batch begins to look for idle CPUs.
    turn: AtomicUsize,
}

/// The state; null before it is there and after it has gone.
static STATE: AtomicPtr<State> = AtomicPtr::new(ptr::null_mut());

impl State {
    /// CPUs for helpers of a batch: idle ones of the node, one a cache first.
    fn choose(&self, node: c_int, most: usize, chosen: &mut [u32; MOST_HELPERS]) -> usize {
        let cpus = self.cpus.lock().clone();
        let Some(node) = cpus.of(node) else { return 0 };
        let turn = self.turn.fetch_add(most, Ordering::Relaxed);
        let mut places = [0; MOST_HELPERS];
        let idle = |place: usize| shim::is_idle(node.cpus[place]);
        let count = share::choose(&node.caches, turn, idle, &mut places[..most]);
        for (cpu, place) in chosen.iter_mut().zip(&places[..count]) {
            *cpu = node.cpus[*place];
        }
        count
    }

    /// Puts helpers to work on these CPUs; each holds a reference.
    fn ask(&self, batch: &Arc<Batch>, cpus: &[u32]) {
        for (helper, cpu) in batch.helpers.iter().zip(cpus) {
            let work = helper.work.get().cast::<bindings::work_struct>();
            // SAFETY: the helper is ours until it is queued, once, and the batch keeps it. The
            // queue lives until after the last batch, and goes only when all its works are done.
            unsafe {
                *helper.batch.get() = Arc::into_raw(batch.clone());
                shim::pf_init_work(work, help);
                bindings::queue_work_on(*cpu as c_int, self.queue, work);
            }
        }
    }

    /// Copies a batch.
    ///
    /// # Safety
    /// As `offload_copy` of `struct migrator` has its folios.
    unsafe fn copy(
        &self,
        dsts: *mut bindings::list_head,
        srcs: *mut bindings::list_head,
        folios: usize,
    ) -> Result {
        let settings = shim::settings();
        // SAFETY: passed on.
        let batch = unsafe { Batch::new(dsts, srcs, folios, &settings)? };
        let Some(first) = batch.items.all().first() else { return Ok(()) };
        let node = settings.node(first);
        let least = (settings.least_kib as usize) << 10;
        let most = share::helpers(batch.items.bytes, MOST_HELPERS, settings.helpers as usize, least);
        let mut chosen = [0; MOST_HELPERS];
        let count = if most == 0 { 0 } else { self.choose(node, most, &mut chosen) };
        let chunk = share::chunk(batch.items.bytes, count + 1, CHUNK, PAGE_SIZE);
        batch.chunk.store(chunk, Ordering::Relaxed);
        self.ask(&batch, &chosen[..count]);

        let mut last = false;
        loop {
            let bytes = batch.chunk();
            if bytes == 0 {
                break;
            }
            last = batch.finish(bytes);
        }
        if !last {
            // Chunks that helpers took are not done yet.
            // SAFETY: initialised with the batch; the helper that does the last one completes it.
            unsafe { bindings::wait_for_completion(batch.all_done.get()) };
        }

        // SAFETY: every chunk is done, and we have not returned.
        let failed = unsafe { batch.items.mark() };
        let helped = batch.helped.load(Ordering::Relaxed);
        let ns = batch.helper_ns.load(Ordering::Relaxed);
        shim::account(batch.items.bytes, helped, ns, failed);
        Ok(())
    }
}

/// `offload_copy` of our `struct migrator`.
///
/// # Safety
/// Called by page migration alone, between registration and the end of its removal.
#[no_mangle]
unsafe extern "C" fn pageferry_mt_copy(
    dsts: *mut bindings::list_head,
    srcs: *mut bindings::list_head,
    folios: c_uint,
) -> c_int {
    // SAFETY: there from before registration until after its removal.
    let Some(state) = (unsafe { STATE.load(Ordering::Acquire).as_ref() }) else {
        return ENODEV.to_errno();
    };
    // SAFETY: the caller is page migration.
    match unsafe { state.copy(dsts, srcs, folios as usize) } {
        Ok(()) => 0,
        Err(error) => error.to_errno(),
    }
}

/// CPUs came or went: helpers are put on those that are there now.
#[no_mangle]
extern "C" fn pageferry_mt_cpus_changed() {
    // SAFETY: there from before the calls begin until after they end.
    let Some(state) = (unsafe { STATE.load(Ordering::Acquire).as_ref() }) else { return };
    // Without memory the old list stays: it names CPUs that may be gone, which are never idle.
    if let Ok(cpus) = Cpus::read().and_then(|cpus| Ok(Arc::new(cpus, GFP_KERNEL)?)) {
        *state.cpus.lock() = cpus;
    }
}

/// The module.
struct CopyMt {
    state: Pin<KBox<State>>,
}

// SAFETY: the queue's pointer may be used by any thread; the rest is so by itself.
unsafe impl Send for State {}
// SAFETY: as above.
unsafe impl Sync for State {}

impl kernel::Module for CopyMt {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let cpus = Arc::new(Cpus::read()?, GFP_KERNEL)?;
        shim::measure();
        let queue = shim::Queue::new()?;
        let pointer = queue.pointer();
        let state = KBox::pin_init(
            pin_init!(State {
                queue: pointer,
                cpus <- new_mutex!(cpus),
                turn: AtomicUsize::new(0),
            }),
            GFP_KERNEL,
        )?;
        STATE.store(ptr::from_ref(&*state).cast_mut(), Ordering::Release);
        let registered = shim::watch_cpus().and_then(|()| {
            shim::register().inspect_err(|_| shim::ignore_cpus())
        });
        if let Err(error) = registered {
            STATE.store(ptr::null_mut(), Ordering::Release);
            return Err(error);
        }
        queue.keep();
        Ok(Self { state })
    }
}

impl Drop for CopyMt {
    fn drop(&mut self) {
        // In this order: no new batch; no late helper; nobody who reads the state.
        shim::unregister();
        shim::ignore_cpus();
        // SAFETY: ours, and nobody queues any more. Waits for the works that are left.
        unsafe { bindings::destroy_workqueue(self.state.queue) };
        STATE.store(ptr::null_mut(), Ordering::Release);
    }
}
