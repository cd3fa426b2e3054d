//! Machines with several nodes, booted in seconds under QEMU, and the tests that run in them.
//!
//! A guest is the distribution's kernel with a first file system made here: busybox, `init.sh`,
//! the command and statically linked test binaries. Each test is a process of its own, whose result
//! reaches this program over a virtio port and is printed as an ordinary test's.
//!
//! What always holds: every test that was planned has a result, or its absence is a failure; a
//! machine that hangs, panics or ends early is a failure, shown with the end of its console; no
//! QEMU outlives this program. What is measured in an emulated machine is no claim about speed.

mod build;
mod cpio;
mod dtb;
mod kit;
mod machine;
mod qemu;
mod record;
mod run;
mod zcu102;

use crate::needs;
use crate::stage::{Ran, Stages, say, target_dir};
use anyhow::{Context as _, bail};
use build::{Built, Target};
use clap::{Args, Subcommand};
pub(crate) use kit::Kit;
pub(crate) use machine::Machine;
use machine::{COUNTED, Clock, MACHINES};
use qemu::{BOOT, Boot, Cpus};
use record::{Record, Test};
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use zcu102::ZCU102;

/// Seconds that a test may take in a guest.
const TEST_SECONDS: u64 = 300;
/// How long the bench's smoke run may say nothing.
const BENCH: Duration = Duration::from_secs(600);
/// The example that compares with `migrate_pages(2)` what a program feels.
const COMPARISON: &str = "beside_migrate_pages";
/// The example that tells what the kernel's migration of a folio costs.
const COST: &str = "migration_cost";

/// What is done with guests.
#[derive(Debug, Subcommand)]
pub(crate) enum Guest {
    /// Run tests in the guests
    Test(TestArgs),
    /// A shell in a guest (Ctrl-A X ends it)
    Shell(MachineArgs),
    /// The bench's smoke run in a guest, and what a program feels beside `migrate_pages(2)`
    Bench(BenchArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// This machine only
    #[arg(long, value_parser = Machine::named)]
    machine: Option<&'static Machine>,
    /// Only tests with this in `binary: name`
    filter: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct MachineArgs {
    /// The machine
    #[arg(long, default_value = "two", value_parser = Machine::named)]
    machine: &'static Machine,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Both in this machine, instead of the smoke run in "two" and the comparison in "counted"
    #[arg(long, value_parser = Machine::named)]
    machine: Option<&'static Machine>,
}

/// `cargo xtask guest`.
pub(crate) fn guest(what: &Guest) -> Stages {
    let mut stages = Stages::default();
    stages.run("Guests", || match what {
        Guest::Test(args) => test(&Workshop::open()?, args),
        Guest::Shell(args) => shell(&Workshop::open()?, args.machine),
        Guest::Bench(args) => bench(&Workshop::open()?, args.machine),
    });
    stages
}

/// The stage of `cargo xtask test`: all tests on all machines, or why that cannot be here.
pub(crate) fn stage(fast: bool) -> anyhow::Result<Ran> {
    if fast {
        return Ok(Ran::Skip("--fast".into()));
    }
    match Workshop::open() {
        Ok(workshop) => test(&workshop, &TestArgs { machine: None, filter: None }),
        Err(why) => Ok(Ran::Skip(format!("{why:#}"))),
    }
}

/// What every guest needs.
#[derive(Debug)]
struct Workshop {
    kit: Kit,
    /// The folder for initramfs and consoles.
    work: PathBuf,
}

impl Workshop {
    fn open() -> anyhow::Result<Self> {
        if !cfg!(target_arch = "x86_64") {
            bail!("the guests are x86-64 machines that run this machine's programs");
        }
        needs::qemu()?;
        Self::with(Kit::get()?)
    }

    /// For the arm64 machine.
    fn aarch64(kit: Kit) -> anyhow::Result<Self> {
        needs::aarch64()?;
        Self::with(kit)
    }

    fn with(kit: Kit) -> anyhow::Result<Self> {
        let work = target_dir().join("guest");
        std::fs::create_dir_all(&work)
            .with_context(|| format!("cannot create {}", work.display()))?;
        Ok(Self { kit, work })
    }

    /// Writes an initramfs with the command, and the binaries that the plan names.
    fn initramfs(&self, name: &str, built: &Built, plan: &[Test]) -> anyhow::Result<PathBuf> {
        let path = self.work.join(format!("{name}.cpio"));
        self.archive(&path, built, plan)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    fn archive(&self, path: &Path, built: &Built, plan: &[Test]) -> anyhow::Result<()> {
        let read = |path: &Path| {
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
        };
        let mut archive = cpio::Archive::new(BufWriter::new(File::create(path)?));
        for folder in ["bin", "guest", "modules", "tests"] {
            archive.folder(folder)?;
        }
        archive.file("init", 0o755, include_bytes!("init.sh"))?;
        archive.file("bin/busybox", 0o755, &read(&self.kit.busybox())?)?;
        archive.link("bin/sh", "busybox")?;
        if !built.command.as_os_str().is_empty() {
            archive.file("bin/pageferry", 0o755, &read(&built.command)?)?;
        }
        for module in self.kit.modules()? {
            let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
            archive.file(&format!("modules/{name}"), 0o644, &read(&module)?)?;
        }
        if !self.kit.copiers().is_empty() {
            archive.folder("copiers")?;
        }
        for module in self.kit.copiers() {
            let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
            archive.file(&format!("copiers/{name}"), 0o644, &read(module)?)?;
        }
        for binary in &built.binaries {
            if plan.iter().any(|test| test.binary == binary.name) {
                archive.file(&format!("tests/{}", binary.name), 0o755, &read(&binary.path)?)?;
            }
        }
        let lines = |mut lines: Vec<String>| {
            lines.push(String::new());
            lines.join("\n")
        };
        let tests = plan.iter().map(|test| format!("{} {}", test.binary, test.name)).collect();
        archive.file("guest/plan", 0o644, lines(tests).as_bytes())?;
        let folders = vec![built.scratch.display().to_string()];
        archive.file("guest/folders", 0o644, lines(folders).as_bytes())?;
        archive.finish()?;
        Ok(())
    }

    fn cpus(&self, built: &Built) -> anyhow::Result<Cpus> {
        let cpus = match self.kit.target() {
            Target::Here => {
                Cpus::probe(&self.kit, &self.initramfs("probe", built, &[])?, &self.work)
            }
            Target::Aarch64 => Cpus::Emulated("a board of another architecture".into()),
        };
        say(format_args!("guests: Linux {}, CPUs: {cpus}", self.kit.release()));
        Ok(cpus)
    }
}

fn test(workshop: &Workshop, args: &TestArgs) -> anyhow::Result<Ran> {
    let machines: Vec<_> = match args.machine {
        Some(machine) => vec![machine],
        None => MACHINES.iter().collect(),
    };
    test_on(workshop, &machines, Machine::runs, args.filter.as_deref())
}

/// Tests of a kernel of our own: on these machines, the binaries whose names begin so.
pub(crate) fn test_kernel(
    kit: impl FnOnce(Kit) -> Kit,
    machines: &[&'static Machine],
    suites: &[&str],
    filter: Option<&str>,
) -> anyhow::Result<Ran> {
    let mut workshop = Workshop::open()?;
    workshop.kit = kit(workshop.kit);
    let runs = |_: &Machine, binary: &str| suites.iter().any(|start| binary.starts_with(start));
    test_on(&workshop, machines, runs, filter)
}

/// Tests of a kernel for arm64, on the one machine that there is.
pub(crate) fn test_aarch64(kit: Kit, filter: Option<&str>) -> anyhow::Result<Ran> {
    test_on(&Workshop::aarch64(kit)?, &[&ZCU102], Machine::names, filter)
}

/// A shell there.
pub(crate) fn shell_aarch64(kit: Kit) -> anyhow::Result<Ran> {
    shell(&Workshop::aarch64(kit)?, &ZCU102)
}

/// What a folio's migration costs on a kernel of our own, in instructions.
pub(crate) fn cost_kernel(kit: impl FnOnce(Kit) -> Kit) -> anyhow::Result<Ran> {
    let mut workshop = Workshop::open()?;
    workshop.kit = kit(workshop.kit);
    cost_on(&workshop, Machine::named(COUNTED).map_err(anyhow::Error::msg)?)
}

/// The same for arm64.
pub(crate) fn cost_aarch64(kit: Kit) -> anyhow::Result<Ran> {
    cost_on(&Workshop::aarch64(kit)?, &zcu102::COUNTED)
}

fn cost_on(workshop: &Workshop, machine: &'static Machine) -> anyhow::Result<Ran> {
    let cost = build::example(COST, workshop.kit.target())?;
    let built = Built { binaries: vec![cost], ..Built::default() };
    // A machine that counts is never KVM's.
    let cpus = Cpus::Emulated("its clock counts instructions".into());
    say(format_args!("Linux {}", workshop.kit.release()));
    measure(workshop, &built, &cpus, machine, "cost")?;
    Ok(Ran::Done)
}

/// A shell in a machine with a kernel of our own.
pub(crate) fn shell_kernel(
    kit: impl FnOnce(Kit) -> Kit,
    machine: &'static Machine,
) -> anyhow::Result<Ran> {
    let mut workshop = Workshop::open()?;
    workshop.kit = kit(workshop.kit);
    shell(&workshop, machine)
}

fn test_on(
    workshop: &Workshop,
    machines: &[&'static Machine],
    runs: impl Fn(&Machine, &str) -> bool,
    filter: Option<&str>,
) -> anyhow::Result<Ran> {
    let built = build::build(workshop.kit.target())?;
    let plans: Vec<_> = machines
        .iter()
        .map(|m| (*m, built.plan(|binary| runs(m, binary), filter)))
        .filter(|(_, plan)| !plan.is_empty())
        .collect();
    if plans.is_empty() {
        bail!("no test was chosen: nothing was tested");
    }
    let cpus = workshop.cpus(&built)?;
    let mut failed = Vec::new();
    for (machine, plan) in plans {
        let initramfs = workshop.initramfs(machine.name, &built, &plan)?;
        let (kit, seconds) = (&workshop.kit, TEST_SECONDS);
        let boot = Boot { kit, machine, cpus: &cpus, initramfs: &initramfs, mode: "test", seconds };
        let ran = run::run(&boot, &workshop.work, plan)?;
        failed.extend(ran.failed.into_iter().map(|test| format!("{} {test}", machine.name)));
    }
    if !failed.is_empty() {
        bail!("{} failed: {}", failed.len(), failed.join("; "));
    }
    Ok(Ran::Done)
}

fn shell(workshop: &Workshop, machine: &'static Machine) -> anyhow::Result<Ran> {
    let built = build::build(workshop.kit.target())?;
    let cpus = workshop.cpus(&built)?;
    let initramfs = workshop.initramfs(machine.name, &built, &built.plan(|_| true, None))?;
    say(format_args!("machine {machine}\nCtrl-A X ends it; tests lie in /tests"));
    let kit = &workshop.kit;
    Boot { kit, machine, cpus: &cpus, initramfs: &initramfs, mode: "shell", seconds: 0 }
        .interact()?;
    Ok(Ran::Done)
}

fn bench(workshop: &Workshop, given: Option<&'static Machine>) -> anyhow::Result<Ran> {
    let mut built = build::build(Target::Here)?;
    built.binaries.push(build::example(COMPARISON, workshop.kit.target())?);
    let cpus = workshop.cpus(&built)?;
    for (mode, usual) in [("bench", "two"), ("compare", COUNTED)] {
        let machine =
            given.map_or_else(|| Machine::named(usual), Ok).map_err(anyhow::Error::msg)?;
        measure(workshop, &built, &cpus, machine, mode)?;
    }
    Ok(Ran::Done)
}

/// Shows what a machine prints in this mode of init.sh.
fn measure(
    workshop: &Workshop,
    built: &Built,
    cpus: &Cpus,
    machine: &'static Machine,
    mode: &str,
) -> anyhow::Result<()> {
    let examples = [COMPARISON, COST].map(|e| Test { binary: e.into(), name: "all".into() });
    let initramfs = workshop.initramfs(machine.name, built, &examples)?;
    let boot = Boot { kit: &workshop.kit, machine, cpus, initramfs: &initramfs, mode, seconds: 0 };
    let mut guest = boot.start(&workshop.work)?;
    guest.ready(BOOT)?;
    let caution = match (machine.clock, cpus) {
        (Clock::Instructions, _) => {
            "a nanosecond is an instruction here, wherever its memory is: ratios say who waits for \
             how much work, and nothing is a claim about speed"
        }
        (_, Cpus::Kvm) => {
            "the nodes are imagined: all their memory is the host's; no claim about speed"
        }
        (_, Cpus::Emulated(_)) => "emulated: these figures show that it works, not how fast it is",
    };
    say(format_args!("machine {machine}\nCAUTION: {caution}"));
    loop {
        let (line, record) = guest.next(Instant::now() + BENCH)?;
        match record {
            None => say(line),
            Some(Record::End(_, 0)) => break,
            Some(Record::End(_, status)) => bail!("the bench: {}", record::meaning(status)),
            Some(_) => {}
        }
    }
    say(format_args!("CAUTION: {caution}"));
    Ok(())
}
