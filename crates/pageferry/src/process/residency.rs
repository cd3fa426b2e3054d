//! What memory processes have, and on which nodes.

use super::common::Attention;
use super::error::TargetError;
use super::notes::{Note, Notes};
use super::piece::{Piece, Span};
use super::select::{Kind, Selection};
use super::targets::Targets;
use super::walk::Walk;
use pageferry_sys::Errno;
use pageferry_sys::process::{LinuxProcesses, ProcessKernel, UNTOLD};
use pageferry_sys::procfs::Vma;
use pageferry_topology::NodeId;
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Bytes of one kind and page size on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Holding {
    /// The node.
    pub node: NodeId,
    /// The kind of mapping.
    pub kind: Kind,
    /// Bytes of each page.
    pub page_bytes: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A mapping with much memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct BigMapping {
    /// Its process.
    pub pid: u32,
    /// Addresses.
    pub range: Range<usize>,
    /// Its kind.
    pub kind: Kind,
    /// What the kernel calls it: a path, `[heap]`, or nothing.
    pub name: String,
    /// Present bytes.
    pub bytes: u64,
    /// Of these, by node.
    pub nodes: Vec<(NodeId, u64)>,
}

/// What memory processes have, and where.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct ProcessResidency {
    /// By node, kind and page size. What several mappings have in common of files and shared
    /// memory is counted once; so is anonymous memory that processes have in common (since a fork,
    /// or merged by KSM) where the caller may see which it is (`CAP_SYS_ADMIN`, Linux 6.7): notes say
    /// what was done.
    pub holdings: Vec<Holding>,
    /// Mappings with the most present memory, the largest first.
    pub top: Vec<BigMapping>,
    /// Of the present bytes, anonymous memory that other processes, looked at or not, map too.
    pub shared_anonymous: u64,
    /// Bytes swapped out, by kind.
    pub swapped: Vec<(Kind, u64)>,
    /// Bytes that the page map has among the swapped ones and that are not: markers of guard regions
    /// and userfaultfds, and pages that somebody is migrating at the moment.
    pub markers: u64,
    /// Bytes whose node could not be told; a note says why.
    pub unknown: u64,
    /// Bytes that were there and were given back before their node was asked for. They are not
    /// present any more.
    pub gone: u64,
    /// Processes looked at.
    pub processes: u64,
    /// Mappings looked at.
    pub mappings: u64,
    /// What else is worth knowing.
    pub notes: Notes,
    /// How long looking took.
    pub elapsed: Duration,
}

impl ProcessResidency {
    /// Present bytes.
    pub fn bytes(&self) -> u64 {
        self.holdings.iter().map(|h| h.bytes).sum::<u64>() + self.unknown
    }

    /// Present bytes by node.
    pub fn by_node(&self) -> BTreeMap<NodeId, u64> {
        let mut sums = BTreeMap::new();
        for holding in &self.holdings {
            *sums.entry(holding.node).or_insert(0) += holding.bytes;
        }
        sums
    }
}

/// A look at what memory processes have, and where.
#[derive(Debug)]
#[must_use]
pub struct Where {
    kernel: Arc<dyn ProcessKernel>,
    selection: Selection,
    top: usize,
    cancel: Arc<AtomicBool>,
}

impl Where {
    /// A look at this memory.
    pub fn new(selection: Selection) -> Self {
        Self {
            kernel: Arc::new(LinuxProcesses::default()),
            selection,
            top: 10,
            cancel: Arc::new(AtomicBool::new(false)),
        }
    }

    /// So many of the largest mappings are told (default 10).
    pub fn top(mut self, mappings: usize) -> Self {
        self.top = mappings;
        self
    }

    /// Stops once this becomes true, and tells what was found so far.
    pub fn cancelled_by(mut self, flag: Arc<AtomicBool>) -> Self {
        self.cancel = flag;
        self
    }

    /// Another kernel: the seam for tests.
    pub fn kernel(mut self, kernel: Arc<dyn ProcessKernel>) -> Self {
        self.kernel = kernel;
        self
    }

    /// Looks.
    ///
    /// # Errors
    /// [`TargetError`]: what was named itself cannot be looked at.
    pub fn look(self) -> Result<ProcessResidency, TargetError> {
        let began = Instant::now();
        let mut notes = Notes::default();
        let (targets, _) = Targets::check(&*self.kernel, &self.selection, &mut notes)?;
        let filter = self.selection.filter;
        let mut walk = Walk::new(Arc::clone(&self.kernel), targets, filter, true, Attention::Once);
        let no_numa = self.kernel.may_ask() == Err(Errno(libc::ENOSYS)) && self.kernel.lacks_numa();
        if no_numa {
            notes.add(Note::NoNuma);
        }
        let mut look = Look { top: Top::new(self.top), no_numa, ..Look::default() };
        while walk.find() {
            while let Some(piece) = walk.next_piece() {
                // Relaxed: a request; nothing is published with it.
                if self.cancel.load(Ordering::Relaxed) {
                    break;
                }
                if let Err(errno) = look.piece(&piece) {
                    if piece.process.ended_by(errno) {
                        notes.all(piece.process.note_of_end());
                    } else {
                        let pid = piece.process.pid;
                        notes.add(Note::Unreadable { pid, errno: errno.0 });
                    }
                }
            }
            if self.cancel.load(Ordering::Relaxed) {
                break;
            }
        }
        walk.note_commons(look.common);
        notes.extend(walk.notes);
        look.top.close();
        Ok(ProcessResidency {
            holdings: look.holdings(),
            top: look.top.list,
            shared_anonymous: look.common,
            swapped: walk.absents.swapped,
            markers: walk.absents.markers,
            unknown: look.unknown,
            gone: look.gone,
            processes: walk.processes,
            mappings: walk.mappings,
            notes,
            elapsed: began.elapsed(),
        })
    }
}

#[derive(Debug, Default)]
struct Look {
    addresses: Vec<usize>,
    status: Vec<i32>,
    sums: BTreeMap<(NodeId, Kind, u64), u64>,
    unknown: u64,
    gone: u64,
    common: u64,
    /// Everything is on node 0.
    no_numa: bool,
    top: Top,
}

impl Look {
    fn piece(&mut self, piece: &Piece) -> Result<(), Errno> {
        self.addresses.clear();
        self.addresses.extend(piece.spans.iter().flat_map(Span::addresses));
        self.status.clear();
        self.status.resize(self.addresses.len(), UNTOLD);
        let asked = match self.no_numa {
            true => {
                self.status.fill(0);
                Ok(())
            }
            false => piece.process.view.nodes(&self.addresses, &mut self.status),
        };
        if asked.is_err() {
            self.status.fill(UNTOLD);
        }
        let mut first = 0;
        for span in &piece.spans {
            let status = &self.status[first..first + span.pages()];
            first += span.pages();
            let mapping = usize::try_from(span.mapping).ok().and_then(|i| piece.mappings.get(i));
            // Pages of one node mostly lie together.
            for same in status.chunk_by(|a, b| a == b) {
                let bytes = (same.len() * span.page_bytes) as u64;
                match u32::try_from(same[0]) {
                    Ok(node) => {
                        let node = NodeId::new(node);
                        let key = (node, span.kind, span.page_bytes as u64);
                        *self.sums.entry(key).or_insert(0) += bytes;
                        self.common += if span.common { bytes } else { 0 };
                        if let Some((vma, kind)) = mapping {
                            self.top.add(piece.process.pid, vma, *kind, node, bytes);
                        }
                    }
                    // No page there, or no mapping (`do_pages_stat_array`).
                    Err(_) if [-libc::ENOENT, -libc::EFAULT].contains(&same[0]) => {
                        self.gone += bytes;
                    }
                    Err(_) => self.unknown += bytes,
                }
            }
        }
        asked
    }

    fn holdings(&self) -> Vec<Holding> {
        let all = self.sums.iter();
        all.map(|(&(node, kind, page_bytes), &bytes)| Holding { node, kind, page_bytes, bytes })
            .collect()
    }
}

/// The largest mappings. They come one after the other.
#[derive(Debug, Default)]
struct Top {
    most: usize,
    list: Vec<BigMapping>,
    open: Option<BigMapping>,
}

impl Top {
    fn new(most: usize) -> Self {
        Self { most, ..Self::default() }
    }

    fn add(&mut self, pid: u32, vma: &Vma, kind: Kind, node: NodeId, bytes: u64) {
        let same = |o: &BigMapping| o.pid == pid && o.range.start == vma.start;
        if !self.open.as_ref().is_some_and(same) {
            self.close();
            let (range, name) = (vma.range(), vma.name.clone());
            self.open = Some(BigMapping { pid, range, kind, name, bytes: 0, nodes: Vec::new() });
        }
        let Some(open) = &mut self.open else { return };
        open.bytes += bytes;
        match open.nodes.iter_mut().find(|(n, _)| *n == node) {
            Some((_, sum)) => *sum += bytes,
            None => open.nodes.push((node, bytes)),
        }
    }

    fn close(&mut self) {
        let Some(mut done) = self.open.take() else { return };
        done.nodes.sort_unstable();
        let place = self.list.partition_point(|m| m.bytes >= done.bytes);
        if place < self.most {
            self.list.insert(place, done);
            self.list.truncate(self.most);
        }
    }
}
