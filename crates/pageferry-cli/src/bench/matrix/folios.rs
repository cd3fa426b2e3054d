//! Memory of folios of one size, which the kernel moves between two nodes.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use pageferry_sys::mm::PreferringNode;
use pageferry_sys::usage::move_pages;
use pageferry_sys::{Linux, Sys as _, page_size};

use crate::bench::content::Content;
use crate::bench::probe::{Buffer, Words};

/// Filled memory.
pub(super) struct Folios {
    buffer: Buffer,
    content: Content,
    /// Bytes of a folio.
    folio: usize,
}

/// What a move did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    pub(super) wall: Duration,
    /// Folios that are where they were to go.
    pub(super) folios: usize,
}

impl Folios {
    /// `bytes` of memory on a node; the setting for folios of that size is in force.
    pub(super) fn new(bytes: usize, folio: usize, node: u32) -> anyhow::Result<Self> {
        let before = made(folio);
        let buffer = {
            let _policy = PreferringNode::new(node)
                .map_err(|errno| anyhow::anyhow!("memory of node {node}: {errno}"))?;
            Buffer::new(bytes, folio > page_size())
                .map_err(|errno| anyhow::anyhow!("cannot map {bytes} bytes: {errno}"))?
        };
        if let (Some(before), Some(now)) = (before, made(folio)) {
            let (made, wanted) = (now.saturating_sub(before), bytes / folio);
            if made < wanted as u64 {
                bail!("of {wanted} folios the kernel made {made} that large");
            }
        }
        let threads = pageferry_sys::affinity::allowed_cpus().len();
        let content = Content { seed: 0x9e37_79b9_7f4a_7c15, threads };
        content.fill(Words::of_buffer(&buffer));
        Ok(Self { buffer, content, folio })
    }

    /// One call of `move_pages(2)`, which names each folio once.
    pub(super) fn move_to(&self, node: u32) -> anyhow::Result<Moved> {
        let range = self.buffer.addr()..self.buffer.addr() + self.buffer.len();
        let pages: Vec<usize> = range.step_by(self.folio).collect();
        let wanted = i32::try_from(node).context("a node's number")?;
        let nodes = vec![wanted; pages.len()];
        let mut status = vec![i32::MIN; pages.len()];
        let began = Instant::now();
        let left = move_pages(&pages, &nodes, &mut status);
        let wall = began.elapsed();
        left.map_err(|errno| anyhow::anyhow!("move_pages(2) to node {node}: {errno}"))?;
        let folios = status.iter().filter(|on| **on == wanted).count();
        Ok(Moved { wall, folios })
    }

    /// Looks at every word, and at where every page is.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let words = Words::of_buffer(&self.buffer);
        self.content.check(words, 0..words.len()).map_err(|wrong| anyhow::anyhow!("{wrong}"))
    }

    /// How many base pages are on a node.
    pub(super) fn pages_on(&self, node: u32) -> anyhow::Result<usize> {
        let range = self.buffer.addr()..self.buffer.addr() + self.buffer.len();
        let pages: Vec<usize> = range.step_by(page_size()).collect();
        let mut on = vec![i32::MIN; pages.len()];
        Linux.page_nodes(&pages, &mut on).map_err(|errno| anyhow::anyhow!("nodes: {errno}"))?;
        Ok(on.iter().filter(|on| u32::try_from(**on) == Ok(node)).count())
    }
}

/// Anonymous folios of a size that faults have made so far; `None`: the kernel does not count, or
/// does not count base pages (Documentation/admin-guide/mm/transhuge.rst, Linux 6.10).
fn made(folio: usize) -> Option<u64> {
    let folder = "/sys/kernel/mm/transparent_hugepage";
    let file = format!("{folder}/hugepages-{}kB/stats/anon_fault_alloc", folio >> 10);
    fs::read_to_string(file).ok()?.trim().parse().ok()
}
