//! The Linux side (`kernel/`): kernels with our patches and modules, built, and tested in guests.
//!
//! What always holds: what is built is kept outside the checkout in a folder named by its content,
//! so that a second run builds nothing; what is tested is what the checkout says now.

mod tools;
mod tree;

use crate::guest::{self, Kit, Machine};
use crate::stage::{Ran, Stages, say};
use clap::{Args, Subcommand, ValueEnum};
use std::path::{Path, PathBuf};
use tree::Tree;

/// What is done with kernels.
#[derive(Debug, Subcommand)]
pub(crate) enum Kernel {
    /// Build Linux with our patches, and our modules
    Build(Which),
    /// Build them, and run the tests of both in guests
    Test(TestArgs),
    /// Count the instructions of a folio's migration: the kernel as it is, with our patches, and
    /// with our modules (on arm64 the DMA copier's, by part)
    Cost(CostArgs),
    /// A shell in a guest that runs them (Ctrl-A X ends it); the modules lie in /copiers
    Shell(ShellArgs),
}

/// The machines on which a kernel is tested, and what runs there: our modules' tests, and those of
/// moving any process, which must not notice the difference.
const MACHINES: [&str; 2] = ["two", "tier"];
const SUITES: [&str; 6] = [
    "kernel_",
    "process_idle",
    "process_kinds_hugetlb",
    "process_kinds_life",
    "process_kinds_pages",
    "process_nodes",
];

#[derive(Debug, Args)]
pub(crate) struct Which {
    /// For this architecture
    #[arg(long, value_enum, default_value_t = Arch::X86_64)]
    arch: Arch,
    /// With these options and patches
    #[arg(long, value_enum, default_value_t = Variant::Pageferry)]
    variant: Variant,
}

#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    #[command(flatten)]
    which: Which,
    /// On this machine only
    #[arg(long, value_parser = Machine::named)]
    machine: Option<&'static Machine>,
    /// Only tests with this in `binary: name`
    filter: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct CostArgs {
    /// On this architecture
    #[arg(long, value_enum, default_value_t = Arch::X86_64)]
    arch: Arch,
}

#[derive(Debug, Args)]
pub(crate) struct ShellArgs {
    #[command(flatten)]
    which: Which,
    /// The machine
    #[arg(long, default_value = "two", value_parser = Machine::named)]
    machine: &'static Machine,
}

/// An architecture that is built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arch {
    /// A PC.
    #[value(name = "x86_64")]
    X86_64,
    /// An arm64 board with DMA channels.
    Aarch64,
}

impl Arch {
    /// As it is called everywhere but in Linux's makefiles.
    fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// The make variable `ARCH`.
    fn linux(self) -> &'static str {
        match self {
            Self::X86_64 => "x86",
            Self::Aarch64 => "arm64",
        }
    }

    /// The target that makes what is booted.
    fn image(self) -> &'static str {
        match self {
            Self::X86_64 => "bzImage",
            Self::Aarch64 => "Image",
        }
    }
}

/// A kernel of an architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Variant {
    /// With our patches
    Pageferry,
    /// With our patches, and what finds mistakes (lockdep, DEBUG_VM, KASAN)
    Debug,
    /// As it is, to compare with
    Stock,
}

impl Variant {
    fn name(self) -> &'static str {
        match self {
            Self::Pageferry => "pageferry",
            Self::Debug => "debug",
            Self::Stock => "stock",
        }
    }

    /// The fragment that it adds to the configuration.
    fn fragment(self) -> Option<&'static str> {
        (self != Self::Stock).then_some(self.name())
    }
}

/// `cargo xtask kernel`.
pub(crate) fn kernel(what: &Kernel) -> Stages {
    let mut stages = Stages::default();
    stages.run("Kernel", || match what {
        Kernel::Build(which) => build(which),
        Kernel::Test(args) => test(args),
        Kernel::Cost(args) => cost(args.arch),
        Kernel::Shell(args) if args.which.arch == Arch::Aarch64 => {
            guest::shell_aarch64(kit_aarch64(&args.which)?)
        }
        Kernel::Shell(args) => guest::shell_kernel(kit(&args.which)?, args.machine),
    });
    stages
}

/// A kernel that is built, its modules, and what guests call it.
fn built(home: &Path, which: &Which) -> anyhow::Result<(PathBuf, Vec<PathBuf>, String)> {
    let tree = Tree::build(home, which.arch, which.variant)?;
    let modules = match which.variant {
        Variant::Stock => Vec::new(),
        _ => tree.modules(home)?,
    };
    Ok((tree.image(), modules, format!("6.12 ({})", which.variant.name())))
}

/// What is put in place of the guests' own kernel.
fn kit(which: &Which) -> anyhow::Result<impl FnOnce(Kit) -> Kit + use<>> {
    let (image, modules, release) = built(&tree::home()?, which)?;
    Ok(move |kit: Kit| kit.with_kernel(image, modules, release))
}

/// What the arm64 machine boots.
fn kit_aarch64(which: &Which) -> anyhow::Result<Kit> {
    let home = tree::home()?;
    let (image, modules, release) = built(&home, which)?;
    Kit::aarch64(&home.join("tools"), image, modules, release)
}

fn cost(arch: Arch) -> anyhow::Result<Ran> {
    for variant in [Variant::Stock, Variant::Pageferry] {
        let which = Which { arch, variant };
        match arch {
            Arch::X86_64 => guest::cost_kernel(kit(&which)?)?,
            Arch::Aarch64 => guest::cost_aarch64(kit_aarch64(&which)?)?,
        };
    }
    Ok(Ran::Done)
}

/// The stage of `cargo xtask test`: the tests, if a kernel of this content is there.
pub(crate) fn stage(fast: bool) -> anyhow::Result<Ran> {
    if fast {
        return Ok(Ran::Skip("--fast".into()));
    }
    let which = Which { arch: Arch::X86_64, variant: Variant::Pageferry };
    let home = tree::home()?;
    if !Tree::planned(&home, which.arch, which.variant)?.is_built() {
        return Ok(Ran::Skip(
            "no kernel of this content is built, which takes 20 minutes on two CPUs: \
             cargo xtask kernel build"
                .into(),
        ));
    }
    test(&TestArgs { which, machine: None, filter: None })
}

fn test(args: &TestArgs) -> anyhow::Result<Ran> {
    if args.which.arch == Arch::Aarch64 {
        return guest::test_aarch64(kit_aarch64(&args.which)?, args.filter.as_deref());
    }
    let machines = match args.machine {
        Some(machine) => vec![machine],
        None => MACHINES.into_iter().filter_map(|name| Machine::named(name).ok()).collect(),
    };
    guest::test_kernel(kit(&args.which)?, &machines, &SUITES, args.filter.as_deref())
}

fn build(which: &Which) -> anyhow::Result<Ran> {
    let home = tree::home()?;
    let tree = Tree::build(&home, which.arch, which.variant)?;
    say(format_args!("kernel: {}", tree.image().display()));
    if which.variant != Variant::Stock {
        for module in tree.modules(&home)? {
            say(format_args!("module: {}", module.display()));
        }
    }
    Ok(Ran::Done)
}
