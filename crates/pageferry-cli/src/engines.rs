//! `pageferry engines`: who copies pages here, in programs that use the library and in the kernel.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use pageferry_copy::Kernel;
use serde::Serialize;

use crate::cli::JsonArg;
use crate::copiers::{Channel, Migrator, Module, OURS};
use crate::exit::Exit;
use crate::host::Host;
use crate::output::{BOLD, Context, DIM};
use crate::size::size;
use crate::table::Table;

#[derive(Debug, Args)]
pub(crate) struct EnginesArgs {
    #[command(flatten)]
    json: JsonArg,

    /// Read sys/ below this directory
    #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
    root: PathBuf,
}

/// The JSON form; the number changes when a field changes its meaning or goes.
#[derive(Debug, Serialize)]
struct Document {
    schema_version: u32,
    /// Copy kernels that programs with the library can use on this CPU.
    cpu_kernels: Vec<String>,
    kernel: InKernel,
}

#[derive(Debug, Serialize)]
struct InKernel {
    /// Whether this kernel lets a module copy a batch.
    batched_copies: bool,
    /// The module that copies; null: the kernel copies folio by folio.
    migrator: Option<String>,
    /// For which reasons to migrate it is asked.
    reasons: Option<String>,
    /// Our modules that are loaded.
    modules: Vec<Module>,
    dma_channels: Vec<Channel>,
}

pub(crate) fn run(args: &EnginesArgs, context: &Context) -> anyhow::Result<Exit> {
    let document = look(&Host::new(&args.root));
    if args.json.json {
        context.print_json(&document)?;
    } else {
        context.print(text(&document))?;
    }
    Ok(Exit::Ok)
}

fn look(host: &Host) -> Document {
    let (batched_copies, migrator, reasons) = match Migrator::of(host) {
        Migrator::Unknown => (false, None, None),
        Migrator::None => (true, None, None),
        Migrator::Module { name, reasons } => (true, Some(name), Some(reasons)),
    };
    let kernel = InKernel {
        batched_copies,
        migrator,
        reasons,
        modules: Module::loaded(host),
        dma_channels: Channel::all(host),
    };
    let cpu_kernels = Kernel::available().iter().map(ToString::to_string).collect();
    Document { schema_version: 1, cpu_kernels, kernel }
}

fn text(document: &Document) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_text(document, &mut out);
    out
}

fn write_text(document: &Document, out: &mut String) -> std::fmt::Result {
    let kernel = &document.kernel;
    writeln!(out, "{BOLD}in programs that use the library{BOLD:#}")?;
    writeln!(out, "  several CPUs, by {}", document.cpu_kernels.join(", "))?;
    writeln!(out, "  {DIM}which is best is measured when an engine is built{DIM:#}")?;
    writeln!(out, "\n{BOLD}in the kernel, for whoever migrates{BOLD:#}")?;
    match (&kernel.migrator, kernel.batched_copies) {
        (Some(name), _) => {
            let reasons = kernel.reasons.as_deref().unwrap_or("none");
            writeln!(out, "  batches are copied by {name}, for these reasons: {reasons}")?;
        }
        (None, true) => {
            writeln!(out, "  one CPU, folio by folio; a module could copy batches: modprobe one")?;
        }
        (None, false) => {
            writeln!(out, "  one CPU, folio by folio; this kernel lets no module copy batches")?;
            writeln!(out, "  {DIM}docs/kernel.md has the patches{DIM:#}")?;
        }
    }
    if kernel.batched_copies {
        for known in OURS {
            match kernel.modules.iter().find(|module| module.name == known.name) {
                Some(module) => write_module(module, out)?,
                None => writeln!(out, "\n  {} ({}): not loaded", known.name, known.with)?,
            }
        }
    }
    if !kernel.dma_channels.is_empty() {
        writeln!(out, "\n{BOLD}channels of DMA engines{BOLD:#}")?;
        let mut table = Table::new(&["channel", "driver", ">node", "in use", ">copied"]);
        for channel in &kernel.dma_channels {
            let node = channel.node.map_or_else(|| "-".to_owned(), |node| node.to_string());
            table.row([
                channel.name.clone(),
                channel.driver.clone().unwrap_or_else(|| "-".to_owned()),
                node,
                if channel.in_use { "yes" } else { "no" }.to_owned(),
                size(channel.copied_bytes),
            ]);
        }
        write!(out, "{table}")?;
    }
    Ok(())
}

fn write_module(module: &Module, out: &mut String) -> std::fmt::Result {
    writeln!(out, "\n  {} ({})", module.name, module.with)?;
    for (what, list) in [("set", &module.parameters), ("so far", &module.sums)] {
        let values: Vec<_> = list
            .iter()
            .map(|p| {
                format!("{} {}", p.name, if p.value.is_empty() { "(not set)" } else { &p.value })
            })
            .collect();
        writeln!(out, "    {DIM}{what}:{DIM:#} {}", values.join(", "))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::tests::host;

    fn told(files: &[(&str, &str)]) -> String {
        let (_dir, host) = host(files);
        let text = text(&look(&host));
        let at = text.find("for whoever migrates").expect("the kernel's part");
        anstream::adapter::strip_str(&text[at..]).to_string()
    }

    #[test]
    fn a_kernel_without_batches_is_told_from_one_without_a_module() {
        assert_eq!(
            told(&[]),
            "for whoever migrates\n  \
             one CPU, folio by folio; this kernel lets no module copy batches\n  \
             docs/kernel.md has the patches\n"
        );
        let migrator = ("sys/kernel/mm/migrate_offload/migrator", "none\n");
        assert_eq!(
            told(&[migrator]),
            "for whoever migrates\n  \
             one CPU, folio by folio; a module could copy batches: modprobe one\n\n  \
             pageferry_copy_mt (several CPUs): not loaded\n\n  \
             pageferry_copy_dma (DMA channels): not loaded\n"
        );
    }

    #[test]
    fn a_module_that_copies_is_shown_with_what_it_was_told_and_what_it_did() {
        let text = told(&[
            ("sys/kernel/mm/migrate_offload/migrator", "pageferry_copy_mt\n"),
            ("sys/kernel/mm/migrate_offload/reasons", "demotion\n"),
            ("sys/module/pageferry_copy_mt/parameters/helpers", "7\n"),
            ("sys/module/pageferry_copy_mt/parameters/bytes", "8192\n"),
            ("sys/class/dma/dma0chan0/in_use", "1\n"),
        ]);
        for part in [
            "batches are copied by pageferry_copy_mt, for these reasons: demotion\n",
            "set: helpers 7\n    so far: bytes 8192\n",
            "pageferry_copy_dma (DMA channels): not loaded",
            "  channel    driver  node  in use  copied\n  dma0chan0  -          -  yes",
        ] {
            assert!(text.contains(part), "{part:?} in {text}");
        }
    }
}
