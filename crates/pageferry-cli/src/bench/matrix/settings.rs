//! The machine's settings that the matrix changes, and puts back.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::copiers::{DMA, Known, MT};
use crate::exit::Exit;
use crate::host::chosen;
use crate::output::{Context, Problem};

/// Sizes of transparent huge pages, each with a setting (Linux 6.8).
const THP: &str = "/sys/kernel/mm/transparent_hugepage";
const BALANCING: &str = "/proc/sys/kernel/numa_balancing";

/// Who copies in a cell of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "copier", content = "count", rename_all = "snake_case")]
pub(super) enum Copier {
    /// The kernel, folio by folio, on the CPU that asked.
    Kernel,
    /// So many CPUs, the one that asked among them.
    Threads(u32),
    /// So many channels.
    Channels(u32),
}

impl Copier {
    /// In the order of the columns.
    pub(super) fn all() -> Vec<Self> {
        let counts = [1, 2, 4, 8, 16];
        let threads = counts.map(Self::Threads);
        let channels = counts.map(Self::Channels);
        [Self::Kernel].into_iter().chain(threads).chain(channels).collect()
    }

    /// The module that copies so.
    pub(super) fn module(self) -> Option<Known> {
        match self {
            Self::Kernel => None,
            Self::Threads(_) => Some(MT),
            Self::Channels(_) => Some(DMA),
        }
    }
}

fn parameter(module: Known, name: &str) -> PathBuf {
    PathBuf::from(format!("/sys/module/{}/parameters/{name}", module.name))
}

/// Whether a module is loaded.
pub(super) fn is_loaded(module: Known) -> bool {
    parameter(module, "enabled").exists()
}

/// What has been changed; put back when this is dropped.
#[derive(Debug)]
pub(super) struct Settings {
    context: Context,
    /// Files, and what they said before.
    before: Vec<(PathBuf, String)>,
}

impl Settings {
    pub(super) fn new(context: &Context) -> Self {
        Self { context: *context, before: Vec::new() }
    }

    /// Writes a setting.
    fn set(&mut self, file: &Path, value: &str) -> anyhow::Result<()> {
        if !self.before.iter().any(|(known, _)| known == file) {
            let text = fs::read_to_string(file).map_err(|error| failed("read", file, &error))?;
            // Of a choice the word in force, of others all of it.
            let value = chosen(&text).unwrap_or(text.trim());
            self.before.push((file.to_owned(), value.to_owned()));
        }
        fs::write(file, value).map_err(|error| failed("write", file, &error).into())
    }

    /// NUMA balancing would move pages back.
    pub(super) fn still(&mut self) -> anyhow::Result<()> {
        let file = Path::new(BALANCING);
        if file.exists() { self.set(file, "0") } else { Ok(()) }
    }

    /// From now on, memory that asks for huge pages gets folios of this size and no others. False:
    /// this kernel has none of that size.
    pub(super) fn folios_of(&mut self, bytes: usize) -> anyhow::Result<bool> {
        let wanted = Path::new(THP).join(format!("hugepages-{}kB/enabled", bytes >> 10));
        if !wanted.exists() {
            return Ok(false);
        }
        let sizes = fs::read_dir(THP).map_err(|error| failed("read", Path::new(THP), &error))?;
        for size in sizes.flatten() {
            let file = size.path().join("enabled");
            let is_size = size.file_name().to_string_lossy().starts_with("hugepages-");
            if is_size && file.exists() && file != wanted {
                self.set(&file, "never")?;
            }
        }
        self.set(&wanted, "madvise")?;
        Ok(true)
    }

    /// From now on, this is who copies.
    pub(super) fn copier(&mut self, copier: Copier) -> anyhow::Result<()> {
        // One at a time: the other lets go first.
        for module in [MT, DMA] {
            if is_loaded(module) && copier.module() != Some(module) {
                self.set(&parameter(module, "enabled"), "0")?;
            }
        }
        let (module, name, value) = match copier {
            Copier::Kernel => return Ok(()),
            Copier::Threads(n) => (MT, "helpers", n - 1),
            Copier::Channels(n) => (DMA, "channels", n),
        };
        self.set(&parameter(module, name), &value.to_string())?;
        // As many as are asked for, however small the batch.
        self.set(&parameter(module, "least_kib"), "1")?;
        self.set(&parameter(module, "reasons"), "all")?;
        self.set(&parameter(module, "enabled"), "1")
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        // Nothing more can be done about a setting that does not go back than to say so.
        for module in [MT, DMA].into_iter().filter(|module| is_loaded(*module)) {
            let _ = fs::write(parameter(module, "enabled"), "0");
        }
        for (file, value) in self.before.iter().rev() {
            if let Err(error) = fs::write(file, value) {
                let file = file.display();
                self.context.note(format!("{file} stays changed, it was {value}: {error}"));
            }
        }
    }
}

fn failed(what: &str, file: &Path, error: &std::io::Error) -> Problem {
    Problem {
        what: format!("cannot {what} {}", file.display()),
        because: error.to_string(),
        remedy: "run as root, outside of containers".to_owned(),
        exit: Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_is_put_back_in_turn() {
        let folder = tempfile::tempdir().expect("a folder");
        let (choice, number) = (folder.path().join("choice"), folder.path().join("number"));
        fs::write(&choice, "always [inherit] never\n").expect("a file");
        fs::write(&number, "7\n").expect("a file");
        let mut settings = Settings::new(&Context::new(clap::ColorChoice::Never, true));
        for value in ["never", "always"] {
            settings.set(&choice, value).expect("writable");
        }
        settings.set(&number, "0").expect("writable");
        assert_eq!(fs::read_to_string(&choice).expect("there"), "always");
        drop(settings);
        assert_eq!(fs::read_to_string(&choice).expect("there"), "inherit");
        assert_eq!(fs::read_to_string(&number).expect("there"), "7");
    }

    #[test]
    fn columns_are_the_kernel_threads_and_channels() {
        let all = Copier::all();
        assert_eq!(
            (all[0], all[1], all[10]),
            (Copier::Kernel, Copier::Threads(1), Copier::Channels(16))
        );
    }
}
