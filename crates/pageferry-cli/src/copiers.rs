//! Who copies the pages that the kernel moves, as its files tell: docs/kernel.md has the interface.

use std::fs;
use std::path::Path;

use serde::Serialize;

use crate::host::Host;

/// Where a kernel with batched copies says who copies.
const OFFLOAD: &str = "sys/kernel/mm/migrate_offload";
/// dmaengine's channels.
const CHANNELS: &str = "sys/class/dma";

/// Who copies now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Migrator {
    /// This kernel has no batched copies.
    Unknown,
    /// It has, and no module is registered.
    None,
    Module {
        name: String,
        /// For which reasons to migrate it is asked.
        reasons: String,
    },
}

impl Migrator {
    pub(crate) fn of(host: &Host) -> Self {
        let told = |file: &str| host.text(&format!("{OFFLOAD}/{file}"));
        match told("migrator") {
            None => Self::Unknown,
            Some(name) if name == "none" => Self::None,
            Some(name) => Self::Module { name, reasons: told("reasons").unwrap_or_default() },
        }
    }
}

/// A module of this project.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) name: &'static str,
    /// What it copies with.
    pub(crate) with: &'static str,
    /// Parameters that only count.
    sums: &'static [&'static str],
}

/// Several CPUs.
pub(crate) const MT: Known = Known {
    name: "pageferry_copy_mt",
    with: "several CPUs",
    sums: &["batches", "helped_batches", "bytes", "helped_bytes", "helper_ns", "failed_folios"],
};
/// A DMA engine.
pub(crate) const DMA: Known = Known {
    name: "pageferry_copy_dma",
    with: "DMA channels",
    sums: &[
        "batches",
        "bytes",
        "failed_folios",
        "timeouts",
        "retired_channels",
        "kept_folios",
        "lies",
        "gather_ns",
        "map_ns",
        "submit_ns",
        "wait_ns",
        "unmap_ns",
        "finish_ns",
    ],
};
pub(crate) const OURS: [Known; 2] = [MT, DMA];

/// A module that is loaded.
#[derive(Debug, Serialize)]
pub(crate) struct Module {
    pub(crate) name: &'static str,
    #[serde(skip)]
    pub(crate) with: &'static str,
    /// What it was told, by name.
    pub(crate) parameters: Vec<Parameter>,
    /// Sums since it was loaded.
    pub(crate) sums: Vec<Parameter>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) value: String,
}

impl Module {
    /// Of our modules, those that are loaded.
    pub(crate) fn loaded(host: &Host) -> Vec<Self> {
        OURS.into_iter().filter_map(|known| Self::read(host, known)).collect()
    }

    /// One of our modules; `None` if it is not loaded.
    fn read(host: &Host, known: Known) -> Option<Self> {
        let folder = format!("sys/module/{}/parameters", known.name);
        let mut names = files(&host.root().join(&folder))?;
        names.sort();
        let all = names.into_iter().filter_map(|name| {
            // A list that is not set reads as "(null)".
            let value = host.text(&format!("{folder}/{name}"))?;
            let value = if value == "(null)" { String::new() } else { value };
            Some(Parameter { name, value })
        });
        let (sums, parameters) = all.partition(|p: &Parameter| known.sums.contains(&&*p.name));
        Some(Self { name: known.name, with: known.with, parameters, sums })
    }

    /// One of its sums, 0 if it has none of that name.
    pub(crate) fn sum(&self, name: &str) -> u64 {
        let found = self.sums.iter().find(|p| p.name == name);
        found.and_then(|p| p.value.parse().ok()).unwrap_or(0)
    }
}

/// A channel of a DMA engine.
#[derive(Debug, Serialize)]
pub(crate) struct Channel {
    /// `dmaNchanM`.
    pub(crate) name: String,
    /// The driver of its device.
    pub(crate) driver: Option<String>,
    /// The node of its device.
    pub(crate) node: Option<i64>,
    /// Whether somebody has it.
    pub(crate) in_use: bool,
    /// Bytes that it copied from memory to memory, where the driver counts.
    pub(crate) copied_bytes: u64,
}

impl Channel {
    /// All channels, whatever they can do: the kernel tells that to nobody but root, in debugfs.
    pub(crate) fn all(host: &Host) -> Vec<Self> {
        let mut names = files(&host.root().join(CHANNELS)).unwrap_or_default();
        names.sort_by_key(|name| numbers(name));
        names.into_iter().map(|name| Self::read(host, name)).collect()
    }

    fn read(host: &Host, name: String) -> Self {
        let path = format!("{CHANNELS}/{name}");
        let device = host.root().join(&path).join("device");
        let driver = fs::read_link(device.join("driver")).ok();
        Self {
            driver: driver.and_then(|to| Some(to.file_name()?.to_string_lossy().into_owned())),
            node: host.number(&format!("{path}/device/numa_node")).filter(|node| *node >= 0),
            in_use: host.number(&format!("{path}/in_use")).is_some_and(|users| users > 0),
            copied_bytes: host
                .number(&format!("{path}/bytes_transferred"))
                .and_then(|bytes| u64::try_from(bytes).ok())
                .unwrap_or(0),
            name,
        }
    }
}

/// Names in a folder; `None` if there is none.
fn files(folder: &Path) -> Option<Vec<String>> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    Some(entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

/// The numbers in a name: channel 10 comes after channel 9.
fn numbers(name: &str) -> Vec<u64> {
    let parts = name.split(|c: char| !c.is_ascii_digit());
    parts.filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::tests::host;

    #[test]
    fn parameters_are_told_from_sums() {
        let folder = "sys/module/pageferry_copy_dma/parameters";
        let file = |name: &str| format!("{folder}/{name}");
        let (_dir, host) = host(&[
            (&file("enabled"), "Y\n"),
            (&file("devices"), "(null)\n"),
            (&file("bytes"), "4096\n"),
        ]);
        let [module] = &Module::loaded(&host)[..] else { panic!("one is loaded") };
        assert_eq!((module.name, module.sum("bytes")), ("pageferry_copy_dma", 4096));
        let parameters: Vec<_> = module.parameters.iter().map(|p| (&*p.name, &*p.value)).collect();
        assert_eq!(parameters, [("devices", ""), ("enabled", "Y")]);
    }

    #[test]
    fn channels_come_in_the_order_of_their_numbers() {
        let file = |name: &str| format!("sys/class/dma/{name}/in_use");
        let (_dir, host) = host(&[
            (&file("dma0chan10"), "0\n"),
            (&file("dma0chan9"), "1\n"),
            ("sys/class/dma/dma0chan9/bytes_transferred", "7\n"),
            ("sys/class/dma/dma0chan9/device/numa_node", "-1\n"),
        ]);
        let channels = Channel::all(&host);
        let told: Vec<_> = channels.iter().map(|c| (&*c.name, c.in_use, c.copied_bytes)).collect();
        assert_eq!(told, [("dma0chan9", true, 7), ("dma0chan10", false, 0)]);
        assert_eq!(channels[0].node, None);
    }
}
