//! What a guest boots: a kernel, its modules and busybox, out of Debian's packages.
//!
//! apt fetches the packages (and checks their signatures), `dpkg-deb` unpacks them; nothing is
//! installed. They are kept in `pageferry/guest` of the user's cache folder, in a folder named by
//! the kernel's version, which appears only when it is complete. A kit that is there is used as it
//! is, without apt and without a network; remove the folder to have a newer one.

use super::build::Target;
use crate::cache;
use crate::needs;
use crate::stage::say;
use anyhow::{Context as _, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Packages that name a kernel, first choice first: Debian 12, Debian 13.
const KERNELS: [&str; 2] = ["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"];
const BUSYBOX: &str = "busybox-static";
/// The managed way needs this kernel at least (`UFFDIO_MOVE`).
const OLDEST: (u32, u32) = (6, 8);
/// Swap in memory: what it needs is loaded with it.
const MODULES: [&str; 1] = ["zram"];

/// What is booted.
#[derive(Debug)]
pub(crate) struct Kit {
    /// The fetched kit.
    folder: PathBuf,
    own: Option<Own>,
}

/// A kernel that was built here.
#[derive(Debug)]
struct Own {
    kernel: PathBuf,
    /// Modules that tests load.
    copiers: Vec<PathBuf>,
    release: String,
    target: Target,
}

impl Kit {
    /// The kit in the cache, fetched if there is none.
    pub(crate) fn get() -> anyhow::Result<Self> {
        let cache = cache::folder("guest")?;
        if let Some(folder) = newest(&cache) {
            return Ok(Self { folder, own: None });
        }
        fetch(&cache).with_context(|| {
            format!(
                "there is no guest kernel in {} and none could be fetched \
                 (packages {} and {BUSYBOX} of Debian)",
                cache.display(),
                KERNELS[0],
            )
        })
    }

    /// The same with another kernel, which needs no modules, and modules for tests to load.
    pub(crate) fn with_kernel(
        mut self,
        kernel: PathBuf,
        copiers: Vec<PathBuf>,
        release: String,
    ) -> Self {
        self.own = Some(Own { kernel, copiers, release, target: Target::Here });
        self
    }

    /// A kit of a kernel for arm64, with the busybox in `cache`, fetched if there is none.
    pub(crate) fn aarch64(
        cache: &Path,
        kernel: PathBuf,
        copiers: Vec<PathBuf>,
        release: String,
    ) -> anyhow::Result<Self> {
        let folder = cache.join("aarch64");
        if !folder.join("busybox").exists() {
            fetch_busybox(&folder)
                .with_context(|| format!("{BUSYBOX} for arm64 could not be fetched"))?;
        }
        Ok(Self { folder, own: Some(Own { kernel, copiers, release, target: Target::Aarch64 }) })
    }

    /// What programs for it are built for.
    pub(crate) fn target(&self) -> Target {
        self.own.as_ref().map_or(Target::Here, |own| own.target)
    }

    pub(crate) fn kernel(&self) -> PathBuf {
        self.own.as_ref().map_or_else(|| self.folder.join("vmlinuz"), |own| own.kernel.clone())
    }

    /// Modules for tests to load.
    pub(crate) fn copiers(&self) -> &[PathBuf] {
        self.own.as_ref().map_or(&[], |own| &own.copiers)
    }

    pub(crate) fn busybox(&self) -> PathBuf {
        self.folder.join("busybox")
    }

    /// Modules in the order in which they are loaded.
    pub(crate) fn modules(&self) -> anyhow::Result<Vec<PathBuf>> {
        if self.own.is_some() {
            return Ok(Vec::new());
        }
        let mut found: Vec<_> = entries(&self.folder.join("modules"))?;
        found.sort();
        Ok(found)
    }

    /// The kernel's release.
    pub(crate) fn release(&self) -> String {
        let fetched = || self.folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.own.as_ref().map_or_else(fetched, |own| own.release.clone())
    }
}

/// The kit of the newest kernel.
fn newest(cache: &Path) -> Option<PathBuf> {
    let kits = entries(cache).ok()?.into_iter().filter_map(|path| {
        let release = numbers(path.file_name()?.to_str()?);
        (release.len() >= 2).then_some((release, path))
    });
    kits.max().map(|(_, path)| path)
}

/// The leading numbers of a release: `6.12.117+deb12-cloud-amd64` begins with 6, 12, 117.
fn numbers(release: &str) -> Vec<u32> {
    let end = release.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(release.len());
    release[..end].split('.').map_while(|n| n.parse().ok()).collect()
}

fn entries(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let read = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    read.map(|entry| Ok(entry?.path())).collect()
}

fn fetch(cache: &Path) -> anyhow::Result<Kit> {
    for tool in ["apt-get", "apt-cache", "dpkg-deb"] {
        if !needs::works(tool, &["--version"]) {
            bail!(
                "{tool} is missing: a machine with Debian's apt is needed once to fill the cache"
            );
        }
    }
    fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    // Unpacked beside the kits, then renamed: a kit is complete or not there.
    let work = cache.join(format!(".new-{}", std::process::id()));
    fs::create_dir(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let made = fill(cache, &work);
    // What is left there is of no use, whether this worked or not.
    let _ = fs::remove_dir_all(&work);
    made
}

fn fill(cache: &Path, work: &Path) -> anyhow::Result<Kit> {
    let kernel = match kernel_package() {
        Some(name) => name,
        None if needs::is_root() => {
            needs::apt_update()?;
            kernel_package().context("apt knows no such kernel: is this Debian 12 or newer?")?
        }
        None => bail!("apt knows no such kernel: `sudo apt-get update`, on Debian 12 or newer"),
    };
    say(format_args!("fetching {kernel} and {BUSYBOX} into {}", cache.display()));
    let fetched = download(work, &kernel).or_else(|error| {
        // Lists older than the archive name packages that are gone.
        if !needs::is_root() {
            return Err(error.context("try `sudo apt-get update`, and look at the network"));
        }
        needs::apt_update()?;
        download(work, &kernel)
    });
    fetched?;
    for package in entries(work)? {
        let into = work.join("unpacked");
        run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&into))?;
    }
    let unpacked = work.join("unpacked");
    let release = kernel.trim_start_matches("linux-image-");
    if numbers(release) < vec![OLDEST.0, OLDEST.1] {
        let (major, minor) = OLDEST;
        bail!("{kernel} is older than Linux {major}.{minor}: nothing could be tested on it");
    }
    let kit = work.join("kit");
    fs::create_dir_all(kit.join("modules"))?;
    let copy = |from: PathBuf, to: &str| {
        fs::copy(&from, kit.join(to)).with_context(|| format!("no {}", from.display()))
    };
    copy(unpacked.join("boot").join(format!("vmlinuz-{release}")), "vmlinuz")?;
    copy(unpacked.join("bin/busybox"), "busybox").or_else(|_| {
        // Where /bin is a part of /usr.
        copy(unpacked.join("usr/bin/busybox"), "busybox")
    })?;
    let trees = ["lib/modules", "usr/lib/modules"].map(|t| unpacked.join(t).join(release));
    let tree = trees.iter().find(|t| t.is_dir()).context("the kernel package has no modules")?;
    let mut modules = Modules { busybox: kit.join("busybox"), files: Vec::new(), loaded: vec![] };
    walk(tree, &mut modules.files)?;
    for name in MODULES {
        modules.take(name, &kit.join("modules"))?;
    }
    let home = cache.join(release);
    if let Err(error) = fs::rename(&kit, &home) {
        // Somebody else was faster.
        if !home.is_dir() {
            return Err(error).with_context(|| format!("cannot create {}", home.display()));
        }
    }
    Ok(Kit { folder: home, own: None })
}

/// The package with the kernel itself: what the first known package depends on.
fn kernel_package() -> Option<String> {
    KERNELS.iter().find_map(|name| {
        let out = Command::new("apt-cache").args(["depends", name]).output().ok()?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let mut needs = text.lines().filter_map(|l| l.trim().strip_prefix("Depends: "));
        needs.find(|n| n.starts_with("linux-image-")).map(str::to_owned)
    })
}

fn download(into: &Path, kernel: &str) -> anyhow::Result<()> {
    let mut apt = Command::new("apt-get");
    apt.args(["download", "-q", kernel, BUSYBOX]).current_dir(into);
    if needs::is_root() {
        // apt's own user has no access to a user's cache folder.
        apt.args(["-o", "APT::Sandbox::User=root"]);
    }
    run(&mut apt)
}

/// Another architecture's busybox: apt works in a folder of its own for this, and does not have
/// this system know that architecture.
fn fetch_busybox(folder: &Path) -> anyhow::Result<()> {
    let work = folder.join(format!(".new-{}", std::process::id()));
    fs::create_dir_all(work.join("lists"))
        .with_context(|| format!("cannot create {}", work.display()))?;
    say(format_args!("fetching {BUSYBOX} for arm64 into {}", folder.display()));
    let apt = |words: &[&str]| {
        let mut apt = Command::new("apt-get");
        apt.args(["-q", "-o", "APT::Architecture=arm64", "-o", "APT::Architectures=arm64"]);
        apt.args(["-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=1"]);
        for (name, part) in [("State", ""), ("State::lists", "lists"), ("Cache", "")] {
            apt.arg("-o").arg(format!("Dir::{name}={}/{part}", work.display()));
        }
        apt.args(words).current_dir(&work);
        run(&mut apt)
    };
    let fetch = || {
        apt(&["update"])?;
        apt(&["download", BUSYBOX])?;
        let is_package = |path: &PathBuf| path.extension().is_some_and(|e| e == "deb");
        let package =
            entries(&work)?.into_iter().find(is_package).context("apt fetched nothing")?;
        let into = work.join("unpacked");
        run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&into))?;
        let places = ["bin/busybox", "usr/bin/busybox"].map(|place| into.join(place));
        let found = places.iter().find(|p| p.exists()).context("the package has no busybox")?;
        fs::rename(found, folder.join("busybox"))?;
        Ok(())
    };
    let done = fetch();
    // What is left there is of no use, whether this worked or not.
    let _ = fs::remove_dir_all(&work);
    done
}

/// Runs a command quietly; what it wrote is part of the error.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = command.output().with_context(|| format!("cannot run {name}"))?;
    if !out.status.success() {
        bail!("{name}: {}: {}", out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for path in entries(folder)? {
        if path.is_dir() && !path.is_symlink() {
            walk(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// Kernel modules of a package, taken out with those that they need.
struct Modules {
    busybox: PathBuf,
    files: Vec<PathBuf>,
    loaded: Vec<String>,
}

impl Modules {
    /// Unpacks a module after those that it needs, numbered in this order.
    fn take(&mut self, name: &str, into: &Path) -> anyhow::Result<()> {
        if self.loaded.iter().any(|n| n == name) {
            return Ok(());
        }
        let is = |path: &&PathBuf| {
            let file = path.file_name().unwrap_or_default().to_string_lossy().replace('-', "_");
            file.split_once(".ko").is_some_and(|(stem, _)| stem == name)
        };
        let path = self.files.iter().find(is);
        let path = path.with_context(|| format!("the kernel package has no module {name}"))?;
        let unpack = match path.extension().and_then(|e| e.to_str()) {
            Some("xz") => "xz",
            Some("gz") => "gzip",
            _ => "cat",
        };
        let mut command = Command::new(&self.busybox);
        command.arg(unpack).args((unpack != "cat").then_some("-dc")).arg(path);
        let out = command.output().context("cannot run busybox")?;
        if !out.status.success() || !out.stdout.starts_with(b"\x7fELF") {
            bail!("cannot unpack {}", path.display());
        }
        for other in needed_by(&out.stdout) {
            self.take(&other, into)?;
        }
        let file = into.join(format!("{:02}-{name}.ko", self.loaded.len()));
        fs::write(&file, &out.stdout).with_context(|| format!("no {}", file.display()))?;
        self.loaded.push(name.to_owned());
        Ok(())
    }
}

/// The modules that a module names in its section `.modinfo`.
fn needed_by(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|w| w == key) else { return Vec::new() };
    let rest = &module[at + key.len()..];
    let list = &rest[..rest.iter().position(|&b| b == 0).unwrap_or(0)];
    let list = String::from_utf8_lossy(list).replace('-', "_");
    list.split(',').filter(|n| !n.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_begins_with_numbers_that_can_be_compared() {
        assert_eq!(numbers("6.12.117+deb12-cloud-amd64"), [6, 12, 117]);
        assert!(numbers("6.12.9+deb12-cloud-amd64") < numbers("6.12.117+deb12-cloud-amd64"));
        assert!(numbers("6.1.0-47-cloud-amd64") < vec![OLDEST.0, OLDEST.1]);
        assert!(numbers(".new-17").is_empty());
    }

    #[test]
    fn the_newest_complete_kit_is_taken() {
        let cache = std::env::temp_dir().join(format!("pageferry-kits-{}", std::process::id()));
        for kit in ["6.12.9-a", "6.12.10-a", ".new-7.0.0"] {
            fs::create_dir_all(cache.join(kit)).expect("temporary folder");
        }
        assert_eq!(newest(&cache), Some(cache.join("6.12.10-a")));
        fs::remove_dir_all(&cache).expect("remove");
        assert_eq!(newest(&cache), None);
    }

    #[test]
    fn a_module_names_those_that_it_needs() {
        let module = b"\x7fELF..license=GPL\0depends=zsmalloc,lz4-compress\0name=zram\0";
        assert_eq!(needed_by(module), ["zsmalloc", "lz4_compress"]);
        assert_eq!(needed_by(b"\x7fELF..\0depends=\0name=x\0"), [""; 0]);
        assert_eq!(needed_by(b"\x7fELF"), [""; 0]);
    }
}
