//! What building Linux with Rust needs: looked for, installed by apt and cargo where that is
//! possible, and named with the command that installs it where not.
//!
//! Versions are pinned: Linux 6.12 says which compilers it knows, and the Rust compiler must be of
//! exactly the version of the library source that it compiles.

use super::Arch;
use crate::needs;
use crate::stage::{finish, say};
use anyhow::{Context as _, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Version of clang, lld and LLVM: the make variable `LLVM=-19`.
pub(super) const LLVM: &str = "19";
/// What turns the kernel's headers into Rust: of this version (Documentation/process/changes.rst
/// gives the oldest; newer ones write other code).
const BINDGEN: &str = "0.71.1";
/// Debian's packages with all the rest.
const PACKAGES: [&str; 13] = [
    "clang-19",
    "lld-19",
    "llvm-19",
    "libclang-19-dev",
    "rustc-web",
    "rust-web-src",
    "ccache",
    "make",
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "xz-utils",
];
/// Debian's Rust compiler, and the library source that belongs to it.
const RUSTC: &str = "/usr/bin/rustc";
const RUSTDOC: &str = "/usr/bin/rustdoc";
const LIBRARY: &str = "/usr/lib/rustlib/src/rust/library";
const LIBCLANG: &str = "/usr/lib/llvm-19/lib";

/// The tools, all there.
#[derive(Debug)]
pub(super) struct Tools {
    bindgen: PathBuf,
    ccache: PathBuf,
}

impl Tools {
    /// The tools, installed if they are not there. `cache` is the folder for what has no package.
    pub(super) fn get(cache: &Path) -> anyhow::Result<Self> {
        let missing = missing();
        if !missing.is_empty() {
            install(&missing)?;
        }
        check_rust()?;
        let home = cache.join("tools");
        let bindgen = home.join("bin/bindgen");
        if !is_bindgen(&bindgen) {
            say(format_args!("building bindgen {BINDGEN} in {}", home.display()));
            let mut cargo = crate::stage::cargo(["install", "--quiet", "--locked", "--force"]);
            cargo.args(["bindgen-cli", "--version", BINDGEN, "--root"]).arg(&home);
            cargo.env_remove("RUSTFLAGS").env_remove("CARGO_TARGET_DIR");
            finish(&mut cargo).context("bindgen is missing and could not be built")?;
        }
        Ok(Self { bindgen, ccache: cache.join("ccache") })
    }

    /// `make` in a tree of the kernel, with all that it is to use.
    pub(super) fn make(&self, tree: &Path, arch: Arch) -> Command {
        let mut make = Command::new("make");
        make.arg("-C").arg(tree).arg(format!("-j{}", jobs()));
        make.arg(format!("ARCH={}", arch.linux()));
        make.arg(format!("LLVM=-{LLVM}")).arg(format!("CC=ccache clang-{LLVM}"));
        // One word: it is also Rust's linker.
        make.arg(format!("HOSTCC=clang-{LLVM}")).arg(format!("HOSTRUSTC={RUSTC}"));
        make.arg(format!("RUSTC={RUSTC}")).arg(format!("RUSTDOC={RUSTDOC}"));
        make.arg(format!("RUST_LIB_SRC={LIBRARY}"));
        make.arg(format!("BINDGEN={}", self.bindgen.display()));
        make.env("LIBCLANG_PATH", LIBCLANG);
        // Trees of other content have other folders; the same file is compiled once.
        make.env("CCACHE_DIR", &self.ccache).env("CCACHE_NOHASHDIR", "1");
        make.env("KBUILD_BUILD_TIMESTAMP", "@0");
        make.env("KBUILD_BUILD_USER", "pageferry").env("KBUILD_BUILD_HOST", "pageferry");
        // cargo's own do not belong in the kernel's build.
        for name in ["RUSTFLAGS", "CARGO", "MAKEFLAGS", "RUSTUP_TOOLCHAIN"] {
            make.env_remove(name);
        }
        make
    }

    /// All versions, for the name of what is built with them.
    pub(super) fn versions() -> String {
        format!("clang {LLVM}, bindgen {BINDGEN}, {}", first_line(RUSTC, "--version"))
    }
}

/// As many as there are CPUs.
fn jobs() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn first_line(program: &str, flag: &str) -> String {
    let out = Command::new(program).arg(flag).stderr(Stdio::null()).output();
    let text = out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

/// Packages of which nothing is there.
fn missing() -> Vec<&'static str> {
    let runs = |program: &str| needs::works(program, &["--version"]);
    let is_there = |package: &str| match package {
        "clang-19" | "ccache" | "make" | "flex" | "bison" | "bc" => runs(package),
        "lld-19" => runs("ld.lld-19"),
        "llvm-19" => runs("llvm-objcopy-19"),
        "libclang-19-dev" => Path::new(LIBCLANG).join("libclang.so").exists(),
        "rustc-web" => runs(RUSTC),
        "rust-web-src" => Path::new(LIBRARY).join("core/src/lib.rs").exists(),
        "libelf-dev" => Path::new("/usr/include/libelf.h").exists(),
        _ => runs("xz"),
    };
    PACKAGES.into_iter().filter(|package| !is_there(package)).collect()
}

fn install(packages: &[&str]) -> anyhow::Result<()> {
    let list = packages.join(" ");
    if !needs::is_root() || !needs::works("apt-get", &["--version"]) {
        bail!("not all that builds Linux is there: sudo apt-get install {list}");
    }
    say(format_args!("installing {list}"));
    let try_it = || {
        let mut apt = Command::new("apt-get");
        apt.args(["install", "-q", "-y", "--no-install-recommends"]).args(packages);
        finish(apt.env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()))
    };
    try_it().or_else(|_| needs::apt_update().and_then(|()| try_it())).with_context(|| {
        format!("not all that builds Linux is there: apt-get install {list} (Debian 12 or newer)")
    })?;
    Ok(())
}

fn is_bindgen(path: &Path) -> bool {
    let path = path.to_string_lossy();
    first_line(&path, "--version") == format!("bindgen {BINDGEN}")
}

/// A compiler for another library source fails late, with an error (E0522) that does not say why.
fn check_rust() -> anyhow::Result<()> {
    let version = |package: &str| {
        let mut ask = Command::new("dpkg-query");
        let out = ask.args(["-W", "-f", "${Version}", package]).stderr(Stdio::null()).output();
        out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default()
    };
    let (compiler, library) = (version("rustc-web"), version("rust-web-src"));
    if compiler != library {
        bail!(
            "the Rust compiler is of version {compiler}, its library source of {library}: \
             apt-get install rustc-web={compiler} rust-web-src={compiler}"
        );
    }
    Ok(())
}
