//! What the kernel's migration of a folio costs: time, or instructions where a machine's clock counts
//! those (`cargo xtask kernel cost`).
//!
//! 512 base pages go between two nodes by `move_pages(2)`, again and again; printed is the median of
//! the calls, for each page: as the kernel is, and with the modules that `/copiers` has. On a machine
//! with one CPU `pageferry_copy_mt` has no helper; `pageferry_copy_dma` needs channels, and tells the
//! parts of a batch.

use pageferry_sys::mm::Advice;
use pageferry_sys::usage::move_pages;
use pageferry_sys::{Linux, Sys as _, page_size};
use pageferry_topology::Machine;
use std::error::Error;
use std::fs;
use std::io::{Write as _, stdout};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// A batch: `NR_MAX_BATCHED_MIGRATION`, mm/migrate.c.
const FOLIOS: usize = 512;
const ROUNDS: usize = 101;
const MODULES: &str = "/copiers";
const PARTS: [&str; 6] = ["gather", "map", "submit", "wait", "unmap", "finish"];

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
    if Path::new(MODULES).exists() {
        let module = Module::load("pageferry_copy_mt", &["least_kib=4"])?;
        let helped = median(&pages, [first, second])?;
        writeln!(out, "with {}: {helped:.0} ns a folio, {:+.0}", module.0, helped - plain)?;
        module.was_asked()?;
    }
    if Path::new(MODULES).exists() && fs::read_dir("/sys/class/dma")?.next().is_some() {
        for channels in [1, 4] {
            let asked = [format!("channels={channels}"), "least_kib=4".into()];
            let module = Module::load("pageferry_copy_dma", &asked.each_ref().map(String::as_str))?;
            let copied = median(&pages, [first, second])?;
            writeln!(
                out,
                "with {}, {channels} channels: {copied:.0} ns a folio, {:+.0}",
                module.0,
                copied - plain
            )?;
            module.was_asked()?;
            let (batches, bytes) = (module.number("batches")?, module.number("bytes")?);
            let folios = bytes / page_size() as f64;
            for part in PARTS {
                let ns = module.number(&format!("{part}_ns"))?;
                writeln!(
                    out,
                    "  {part:<6} {:>9.0} ns a batch {:>6.0} ns a folio",
                    ns / batches,
                    ns / folios
                )?;
            }
            if module.number("failed_folios")? > 0.0 {
                return Err("the kernel had to copy folios".into());
            }
        }
    }
    Ok(())
}

/// A module that is loaded, until this is dropped.
struct Module(&'static str);

impl Module {
    fn load(name: &'static str, parameters: &[&str]) -> Result<Self, Box<dyn Error>> {
        let file = format!("{MODULES}/{name}.ko");
        run("insmod", &[&[&*file], parameters].concat())?;
        Ok(Self(name))
    }

    fn parameter(&self, name: &str) -> String {
        format!("/sys/module/{}/parameters/{name}", self.0)
    }

    fn number(&self, name: &str) -> Result<f64, Box<dyn Error>> {
        Ok(fs::read_to_string(self.parameter(name))?.trim().parse()?)
    }

    fn was_asked(&self) -> Result<(), Box<dyn Error>> {
        let never = || format!("{} was never asked", self.0).into();
        if self.number("batches")? > 0.0 { Ok(()) } else { Err(never()) }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // What does not work here fails the next load.
        let _ = fs::write(self.parameter("enabled"), "0");
        let _ = run("rmmod", &[self.0]);
    }
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
