//! The file in which the figures of [`super::calibrate`] are remembered.
//!
//! A file is trusted only if it is for this very machine and version (its key is inside it),
//! names only kernels that run here, and holds sensible figures. It is written whole under
//! another name and renamed, so a reader never sees half of one.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    calibrate::{CacheFolder, KernelRate},
    kernel::Kernel,
};

/// A remembered calibration's place and key.
pub(super) struct File {
    path: PathBuf,
    key: String,
}

#[derive(Serialize, Deserialize)]
struct Content {
    key: String,
    rates: Vec<KernelRate>,
}

/// The file for this machine with so many copiers, if there is a folder for it.
pub(super) fn file(folder: &CacheFolder, copiers: usize) -> Option<File> {
    let folder = match folder {
        CacheFolder::None => return None,
        CacheFolder::At(folder) => folder.clone(),
        CacheFolder::User => user_folder()?,
    };
    let key = key(copiers);
    // One file per key: a home directory may be shared by different machines.
    let path = folder.join(format!("copy-{:016x}.json", fnv1a(&key)));
    Some(File { path, key })
}

impl File {
    /// The figures, if they are there, whole, and for this machine.
    pub(super) fn read(&self) -> Option<Vec<KernelRate>> {
        let text = fs::read(&self.path).ok()?;
        let content = serde_json::from_slice::<Content>(&text)
            .inspect_err(|error| {
                tracing::debug!(path = %self.path.display(), %error, "damaged calibration file");
            })
            .ok()?;
        let sensible = |rate: f64| rate.is_finite() && rate > 0.0;
        let usable = content.key == self.key
            && (content.rates.iter()).all(|rate| sensible(rate.one) && sensible(rate.all))
            && (content.rates.iter().map(|rate| rate.kernel)).eq(Kernel::available());
        usable.then_some(content.rates)
    }

    /// Remembers the figures. A failure only means that they are measured again next time.
    pub(super) fn write(&self, rates: &[KernelRate]) {
        if let Err(error) = self.try_write(rates) {
            tracing::debug!(path = %self.path.display(), %error, "calibration not remembered");
        }
    }

    fn try_write(&self, rates: &[KernelRate]) -> io::Result<()> {
        let content = Content { key: self.key.clone(), rates: rates.to_vec() };
        let text = serde_json::to_vec_pretty(&content)?;
        fs::create_dir_all(self.path.parent().unwrap_or(Path::new("")))?;
        let part = (self.path).with_extension(format!("json.{}", std::process::id()));
        fs::write(&part, text)?;
        fs::rename(&part, &self.path).inspect_err(|_| {
            let _ = fs::remove_file(&part);
        })
    }
}

/// The user's cache directory (XDG Base Directory Specification: relative paths are ignored).
fn user_folder() -> Option<PathBuf> {
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    (env::var_os("XDG_CACHE_HOME").map(PathBuf::from).and_then(absolute))
        .or_else(|| {
            let home = env::var_os("HOME").map(PathBuf::from).and_then(absolute)?;
            Some(home.join(".cache"))
        })
        .map(|folder| folder.join("pageferry"))
}

/// What the figures depend on.
fn key(copiers: usize) -> String {
    // proc_pid(5): one block per CPU; the first stands for all. arm64 has the second set.
    const FIELDS: [&str; 9] = [
        "vendor_id",
        "model name",
        "cpu family",
        "model",
        "stepping",
        "CPU implementer",
        "CPU variant",
        "CPU part",
        "CPU revision",
    ];
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut key: Vec<String> = (info.lines().take_while(|line| !line.is_empty()))
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| FIELDS.contains(&name.trim()))
        .map(|(name, value)| format!("{}={}", name.trim(), value.trim()))
        .collect();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    key.push(format!("kernel={}", release.trim()));
    key.push(format!("copiers={copiers}"));
    key.push(format!("version={}", env!("CARGO_PKG_VERSION")));
    key.join(" ")
}

/// The FNV-1a hash (Fowler, Noll, Vo; 64 bits): the same in every build, as a file name must be.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
