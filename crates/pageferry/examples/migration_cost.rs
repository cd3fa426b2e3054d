//! What the kernel's migration of a folio costs: time, or instructions where a machine's clock counts
//! those (`cargo xtask kernel cost`).
//!
//! 512 base pages go between two nodes by `move_pages(2)`, again and again; printed is the median of
//! the calls, for each page: as the kernel is, and, where `/copiers` has it, with the module
//! `pageferry_copy_mt`, whose helpers have nothing to do on a machine with one CPU.

use pageferry_sys::mm::Advice;
use pageferry_sys::usage::move_pages;
use pageferry_sys::{Linux, Sys as _, page_size};
use pageferry_topology::Machine;
use std::error::Error;
use std::io::{Write as _, stdout};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// A batch: `NR_MAX_BATCHED_MIGRATION`, mm/migrate.c.
const FOLIOS: usize = 512;
const ROUNDS: usize = 101;
const MODULE: &str = "/copiers/pageferry_copy_mt.ko";

fn main() -> Result<(), Box<dyn Error>> {
    let machine = Machine::read()?;
    let nodes: Vec<i32> = machine
        .memory_nodes()
        .map(|node| i32::try_from(node.id.get()))
        .collect::<Result<_, _>>()?;
    let [first, second, ..] = nodes[..] else {
        return Err("there is one node: nothing to move between".into());
    };
    let bytes = FOLIOS * page_size();
    let start = Linux.map(bytes, bytes)?;
    for advice in [Advice::NoHugePage, Advice::PopulateWrite] {
        // SAFETY: the range is ours, and neither advice gives its content up.
        unsafe { Linux.advise(start, bytes, advice) }?;
    }
    let pages: Vec<usize> = (start..start + bytes).step_by(page_size()).collect();
    let mut out = stdout();
    let plain = median(&pages, [first, second])?;
    writeln!(out, "without a module: {plain:.0} ns a folio")?;
    if Path::new(MODULE).exists() {
        run("insmod", &[MODULE, "least_kib=4"])?;
        let helped = median(&pages, [first, second])?;
        writeln!(
            out,
            "with pageferry_copy_mt: {helped:.0} ns a folio, {:.0} more",
            helped - plain
        )?;
        let batches = std::fs::read_to_string("/sys/module/pageferry_copy_mt/parameters/batches")?;
        if batches.trim() == "0" {
            return Err("the module was never asked".into());
        }
    }
    Ok(())
}

/// The median of the calls' times, in ns for each page.
fn median(pages: &[usize], nodes: [i32; 2]) -> Result<f64, Box<dyn Error>> {
    let mut status = vec![-1; pages.len()];
    let mut times = Vec::new();
    for round in 0..ROUNDS {
        let to = nodes[round % 2];
        let wanted = vec![to; pages.len()];
        let began = Instant::now();
        move_pages(pages, &wanted, &mut status)?;
        // The first brings the pages to where they begin.
        if round > 0 {
            times.push(began.elapsed().as_nanos() as f64 / pages.len() as f64);
        }
        if status.iter().any(|on| *on != to) {
            return Err("pages did not move".into());
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn run(program: &str, args: &[&str]) -> Result<(), Box<dyn Error>> {
    let status = Command::new(program).args(args).status()?;
    if status.success() { Ok(()) } else { Err(format!("{program}: {status}").into()) }
}
