//! What a move would cost, for a dry run: measured with a little memory of this process's own.

use super::report::ProcessReport;
use crate::report::Outcome;
use crate::units::HUGE;
use pageferry_sys::mm::Advice;
use pageferry_sys::usage::move_pages;
use pageferry_sys::{Errno, Linux, Sys, page_size};
use pageferry_topology::NodeId;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Memory that is moved to measure, of each page size: a few milliseconds.
const SAMPLE: usize = 4 << 20;

/// Time that one thread of the kernel takes to move a page from one node to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Cost {
    /// A base page.
    pub base_page: Duration,
    /// A huge page of 2 MiB; where the kernel gives none, as many base pages.
    pub huge_page: Duration,
}

impl Cost {
    /// Measures it, with 8 MiB on `from`, given back afterwards.
    ///
    /// # Errors
    /// `EBUSY`: the sample was not where it was to be, or did not move (one of the nodes is full,
    /// or both are the same); else what the call said: `ENOMEM`, `EACCES` (cpuset), `ENOSYS`.
    pub fn measure(from: NodeId, to: NodeId) -> Result<Self, Errno> {
        if from == to {
            return Err(Errno(libc::EBUSY));
        }
        let base = sample(from, to, page_size(), Advice::NoHugePage)?;
        // A kernel without huge pages refuses the advice, or moves base pages all the same.
        let pages = u32::try_from(HUGE / page_size()).unwrap_or(u32::MAX);
        let huge = sample(from, to, HUGE, Advice::HugePage).unwrap_or(base * pages);
        Ok(Self { base_page: base, huge_page: huge })
    }

    /// How long one thread will take for what a dry run says would be moved.
    pub fn of(&self, dry_run: &ProcessReport) -> Duration {
        let lines = dry_run.lines.iter().filter(|l| l.outcome == Outcome::WouldMove);
        let nanoseconds: f64 = lines
            .map(|line| {
                let (page, bytes) = match usize::try_from(line.page_bytes) {
                    Ok(bytes) if bytes < HUGE => (self.base_page, page_size()),
                    _ => (self.huge_page, HUGE),
                };
                line.bytes as f64 / bytes as f64 * page.as_nanos() as f64
            })
            .sum();
        Duration::try_from_secs_f64(nanoseconds / 1e9).unwrap_or(Duration::MAX)
    }
}

/// A mapping of our own, unmapped when dropped.
struct Scratch(usize);

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: mapped by `sample`, which hands it to nobody. That it stays mapped if this
        // fails harms nobody.
        let _ = unsafe { Linux.unmap(self.0, SAMPLE) };
    }
}

/// The time for one page.
fn sample(from: NodeId, to: NodeId, page: usize, advice: Advice) -> Result<Duration, Errno> {
    let scratch = Scratch(Linux.map(SAMPLE, HUGE)?);
    Linux.prefer_node(scratch.0, SAMPLE, from.get())?;
    for advice in [advice, Advice::PopulateWrite] {
        // SAFETY: the range is ours, and neither advice gives its content up.
        unsafe { Linux.advise(scratch.0, SAMPLE, advice) }?;
    }
    let pages: Vec<usize> = (scratch.0..scratch.0 + SAMPLE).step_by(page).collect();
    let number = |node: NodeId| i32::try_from(node.get()).map_err(|_| Errno(libc::EINVAL));
    let (from, to) = (number(from)?, number(to)?);
    let mut status = vec![-1; pages.len()];
    Linux.page_nodes(&pages, &mut status)?;
    if status.iter().any(|node| *node != from) {
        return Err(Errno(libc::EBUSY));
    }
    let began = Instant::now();
    let left = move_pages(&pages, &vec![to; pages.len()], &mut status)?;
    let took = began.elapsed();
    if left > 0 || status.iter().any(|node| *node != to) {
        return Err(Errno(libc::EBUSY));
    }
    Ok(took / u32::try_from(pages.len()).unwrap_or(u32::MAX))
}
