//! The kernel's source with our patches, configured and built, in a folder named by its content.
//!
//! What always holds: a folder without its stamp is not complete and is made anew; two contents
//! never share a folder, but ccache knows what they have in common.

use super::tools::Tools;
use super::{Arch, Variant};
use crate::cache;
use crate::needs;
use crate::stage::{root, say};
use anyhow::{Context as _, bail};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Debian's package with the source, and the archive in it.
const PACKAGE: &str = "linux-source-6.12";
const STAMP: &str = ".pageferry-built";
/// Lines of a failed build that are shown.
const TAIL: usize = 30;

/// A kernel that is built.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) folder: PathBuf,
    pub(super) arch: Arch,
}

impl Tree {
    /// Where the kernel of this content is, or will be.
    pub(super) fn planned(cache: &Path, arch: Arch, variant: Variant) -> anyhow::Result<Self> {
        let mut hash = DefaultHasher::new();
        Tools::versions().hash(&mut hash);
        source(cache).map(|s| s.display().to_string()).hash(&mut hash);
        for file in patches(variant)?.iter().chain(&fragments(arch, variant)) {
            let content = fs::read(file).with_context(|| format!("no {}", file.display()))?;
            content.hash(&mut hash);
        }
        let name = format!("{}-{}-{:016x}", arch.name(), variant.name(), hash.finish());
        Ok(Self { folder: cache.join("trees").join(name), arch })
    }

    pub(super) fn is_built(&self) -> bool {
        self.folder.join(STAMP).exists()
    }

    /// Builds it, unless it is there.
    pub(super) fn build(cache: &Path, arch: Arch, variant: Variant) -> anyhow::Result<Self> {
        let tools = Tools::get(cache)?;
        if source(cache).is_none() {
            fetch(cache)?;
        }
        let tree = Self::planned(cache, arch, variant)?;
        if tree.is_built() {
            return Ok(tree);
        }
        let source = source(cache).context("the source that was unpacked is gone")?;
        let began = Instant::now();
        say(format_args!(
            "building {} {} in {}",
            arch.name(),
            variant.name(),
            tree.folder.display()
        ));
        let _ = fs::remove_dir_all(&tree.folder);
        fs::create_dir_all(cache.join("trees"))?;
        // Hard links: patch(1) replaces files, and the build writes new ones.
        quietly(Command::new("cp").arg("-al").arg(&source).arg(&tree.folder))?;
        for patch in patches(variant)? {
            quietly(
                Command::new("patch")
                    .args(["-p1", "--no-backup-if-mismatch", "-s", "-i"])
                    .arg(&patch)
                    .current_dir(&tree.folder),
            )?;
        }
        tree.make(&tools, &["tinyconfig"])?;
        let mut merge = Command::new("scripts/kconfig/merge_config.sh");
        merge.args(["-m", ".config"]).args(fragments(arch, variant)).current_dir(&tree.folder);
        quietly(&mut merge)?;
        tree.make(&tools, &["olddefconfig"])?;
        tree.check_config(&fragments(arch, variant))?;
        let available = tree.make(&tools, &["rustavailable"]);
        available.context("these tools cannot build this kernel's Rust")?;
        tree.make(&tools, &[arch.image(), "modules"])?;
        fs::write(tree.folder.join(STAMP), Tools::versions())?;
        say(format_args!("built in {:.0} s", began.elapsed().as_secs_f64()));
        Ok(tree)
    }

    /// The kernel to boot.
    pub(super) fn image(&self) -> PathBuf {
        self.folder.join(match self.arch {
            Arch::X86_64 => "arch/x86/boot/bzImage",
            Arch::Aarch64 => "arch/arm64/boot/Image",
        })
    }

    /// Builds our modules for it; where they are.
    pub(super) fn modules(&self, cache: &Path) -> anyhow::Result<Vec<PathBuf>> {
        let tools = Tools::get(cache)?;
        // A copy: the build writes beside its sources.
        let mut name = self.folder.file_name().unwrap_or_default().to_os_string();
        name.push("-modules");
        let copy = cache.join("trees").join(name);
        let _ = fs::remove_dir_all(&copy);
        for part in ["kernel/modules", "crates/pageferry-copy/src"] {
            let into = copy.join(part);
            fs::create_dir_all(&into)?;
            quietly(Command::new("cp").arg("-rT").arg(root().join(part)).arg(&into))?;
        }
        let folder = copy.join("kernel/modules");
        let mut make = tools.make(&self.folder, self.arch);
        make.arg(format!("M={}", folder.display())).args(["PAGEFERRY_TEST=1", "modules"]);
        run(&mut make, &folder.join("build.log"))?;
        let files = fs::read_dir(&folder)?.map(|entry| Ok(entry?.path()));
        let all: Vec<PathBuf> = files.collect::<anyhow::Result<_>>()?;
        Ok(all.into_iter().filter(|f| f.extension().is_some_and(|e| e == "ko")).collect())
    }

    fn make(&self, tools: &Tools, targets: &[&str]) -> anyhow::Result<()> {
        let mut make = tools.make(&self.folder, self.arch);
        run(make.args(targets), &self.folder.join("build.log"))
    }

    /// What a fragment asks for and the configuration has not: an option that this kernel does not
    /// know, or whose dependencies are missing, is dropped without a word.
    fn check_config(&self, fragments: &[PathBuf]) -> anyhow::Result<()> {
        let config = fs::read_to_string(self.folder.join(".config"))?;
        let mut wanted = String::new();
        for fragment in fragments {
            wanted += &fs::read_to_string(fragment)?;
        }
        let dropped = dropped(&wanted, &config);
        if !dropped.is_empty() {
            bail!("the configuration does not have {}", dropped.join(", "));
        }
        Ok(())
    }
}

/// Options of `wanted` that `config` has not; the last word on an option counts.
fn dropped(wanted: &str, config: &str) -> Vec<String> {
    let option = |line: &str| {
        line.strip_prefix("CONFIG_")?.split_once('=').map(|(o, v)| (o.to_owned(), v.to_owned()))
    };
    let mut options = std::collections::BTreeMap::new();
    options.extend(wanted.lines().filter_map(option));
    let has = |(name, value): &(String, String)| match value.as_str() {
        "n" => !config.lines().any(|l| l.starts_with(&format!("CONFIG_{name}="))),
        value => config.lines().any(|l| l == format!("CONFIG_{name}={value}")),
    };
    let missing = options.into_iter().filter(|o| !has(o));
    missing.map(|(name, value)| format!("CONFIG_{name}={value}")).collect()
}

/// The newest source in the cache.
fn source(cache: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(cache).ok()?.flatten().map(|entry| entry.path());
    let of_package = |path: &PathBuf| {
        path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&format!("{PACKAGE}_")))
    };
    entries.filter(of_package).max()
}

/// Fetches and unpacks the source, into a folder with its version in the name.
fn fetch(cache: &Path) -> anyhow::Result<()> {
    let work = cache.join(format!(".new-{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    say(format_args!("fetching {PACKAGE} into {}", cache.display()));
    let unpack = || {
        let download = || {
            let mut apt = Command::new("apt-get");
            apt.args(["download", "-q", PACKAGE]).current_dir(&work);
            if needs::is_root() {
                apt.args(["-o", "APT::Sandbox::User=root"]);
            }
            quietly(&mut apt)
        };
        download().or_else(|error| {
            if !needs::is_root() {
                return Err(error.context("try `sudo apt-get update`, and look at the network"));
            }
            needs::apt_update().and_then(|()| download())
        })?;
        let deb = fs::read_dir(&work)?.flatten().next().context("apt fetched nothing")?.path();
        let name = deb.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let files = work.join("files");
        quietly(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&files))?;
        let archive = files.join("usr/src").join(format!("{PACKAGE}.tar.xz"));
        quietly(Command::new("tar").arg("-xf").arg(&archive).current_dir(&work))?;
        fs::rename(work.join(PACKAGE), cache.join(name))?;
        Ok(())
    };
    let done = unpack();
    let _ = fs::remove_dir_all(&work);
    done
}

/// The patches, in their order; none for the kernel as it is.
fn patches(variant: Variant) -> anyhow::Result<Vec<PathBuf>> {
    if variant == Variant::Stock {
        return Ok(Vec::new());
    }
    let folder = root().join("kernel/patches");
    let entries = fs::read_dir(&folder).with_context(|| format!("no {}", folder.display()))?;
    let mut all: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    all.sort();
    Ok(all)
}

/// The fragments of a configuration; later ones have the last word.
fn fragments(arch: Arch, variant: Variant) -> Vec<PathBuf> {
    let folder = root().join("kernel/config");
    let mut names = vec!["common", arch.name()];
    names.extend(variant.fragment());
    names.into_iter().map(|name| folder.join(format!("{name}.config"))).collect()
}

/// Runs a command quietly; what it wrote is part of the error.
fn quietly(command: &mut Command) -> anyhow::Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {name}"))?;
    if !out.status.success() {
        let (told, error) =
            (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        bail!("{name}: {}: {} {}", out.status, told.trim(), error.trim());
    }
    Ok(())
}

/// Runs a command with its output in a file, of which the end is shown if it fails.
fn run(command: &mut Command, log: &Path) -> anyhow::Result<()> {
    let file = fs::File::create(log).with_context(|| format!("no {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let status = command.status().context("cannot run make")?;
    if !status.success() {
        let text = fs::read(log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<_> = text.lines().collect();
        say(lines[lines.len().saturating_sub(TAIL)..].join("\n"));
        bail!("make: {status}; all of it is in {}", log.display());
    }
    Ok(())
}

/// The folder of everything about kernels.
pub(super) fn home() -> anyhow::Result<PathBuf> {
    let home = cache::folder("kernel")?;
    fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
    Ok(home)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_were_dropped_are_named_and_the_last_word_counts() {
        let wanted = "# text\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_C=8\nCONFIG_D=n\nCONFIG_D=y\n";
        assert_eq!(dropped(wanted, "CONFIG_A=y\nCONFIG_C=8\nCONFIG_D=y\n"), [""; 0]);
        assert_eq!(
            dropped(wanted, "CONFIG_B=y\nCONFIG_C=80\n"),
            ["CONFIG_A=y", "CONFIG_B=n", "CONFIG_C=8", "CONFIG_D=y"]
        );
    }
}
