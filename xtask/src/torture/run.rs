//! Running a program with the library and without, within a time limit.

use crate::stage::say;
use anyhow::{Context as _, bail};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What takes longer beyond its share hangs. Generous: an emulated machine is slow.
const LIMIT: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(20);

/// One program's run.
#[derive(Debug)]
pub(crate) struct Run {
    /// Where it works; other users may, too.
    pub(crate) folder: PathBuf,
    /// What the library writes.
    pub(crate) log: PathBuf,
    /// How long it is to go on.
    pub(crate) share: Duration,
    moved: &'static str,
    library: PathBuf,
    seed: u64,
}

/// A program in PATH, or where Debian keeps those of postgres.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<_> = std::env::split_paths(&path).collect();
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    folders.extend(versions.map(|version| version.path().join("bin")));
    folders.iter().map(|folder| folder.join(program)).find(|file| file.is_file())
}

impl Run {
    pub(crate) fn new(
        name: &str,
        moved: &'static str,
        library: PathBuf,
        share: Duration,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let unique = format!("pageferry-torture-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(unique);
        let make = || -> std::io::Result<Self> {
            fs::create_dir(&folder)?;
            fs::set_permissions(&folder, fs::Permissions::from_mode(0o1777))?;
            let log = folder.join("moved.log");
            File::create(&log)?.set_permissions(fs::Permissions::from_mode(0o666))?;
            // Where another user can read it.
            let near = folder.join("libpageferry_torture.so");
            fs::copy(&library, &near)?;
            Ok(Self { folder: folder.clone(), log, share, moved, library: near, seed })
        };
        make().with_context(|| format!("cannot set up {}", folder.display()))
    }

    /// Removes what the run has left.
    pub(crate) fn clean(&self) {
        let _ = fs::remove_dir_all(&self.folder);
    }

    /// A command in the folder.
    pub(crate) fn command(&self, program: &str) -> anyhow::Result<Command> {
        let file = find(program).with_context(|| format!("there is no {program}"))?;
        let mut command = Command::new(file);
        command.current_dir(&self.folder).stdin(Stdio::null()).process_group(0);
        command.env("LC_ALL", "C");
        Ok(command)
    }

    /// The same, and its memory is moved.
    pub(crate) fn tortured(&self, program: &str) -> anyhow::Result<Command> {
        let mut command = self.command(program)?;
        command
            .env("LD_PRELOAD", &self.library)
            .env("PAGEFERRY_TORTURE", &self.log)
            .env("PAGEFERRY_TORTURE_PROGRAMS", self.moved)
            .env("PAGEFERRY_TORTURE_SEED", self.seed.to_string())
            // Not measured anew by each process.
            .env("PAGEFERRY_KERNEL", "memcpy");
        Ok(command)
    }

    /// Starts a command whose output goes to `name`.out and `name`.err.
    pub(crate) fn start(&self, mut command: Command, name: &str) -> anyhow::Result<Started<'_>> {
        let file = |end: &str| File::create(self.folder.join(format!("{name}.{end}")));
        command.stdout(file("out")?).stderr(file("err")?);
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Started { run: self, name: name.to_owned(), child, ended: None })
    }

    /// Runs a command to its end, which is success; what it prints.
    pub(crate) fn finish(&self, command: Command, name: &str) -> anyhow::Result<String> {
        let mut started = self.start(command, name)?;
        let status = started.wait()?;
        let read = |end: &str| fs::read(self.folder.join(format!("{name}.{end}")));
        let (out, err) = (read("out")?, read("err")?);
        if !status.success() {
            let text = [out, err].concat();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<_> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(30)..].join("\n");
            bail!("{name}: {status}\n{tail}");
        }
        Ok(String::from_utf8_lossy(&out).into_owned())
    }
}

/// A program that runs. Dropped, it is killed with its children.
#[derive(Debug)]
pub(crate) struct Started<'r> {
    run: &'r Run,
    name: String,
    child: Child,
    ended: Option<ExitStatus>,
}

impl Started<'_> {
    /// Waits for the end; a program that hangs is an error that shows where.
    pub(crate) fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        self.until("end", |_| Ok(false))?;
        self.ended.context("it has ended")
    }

    /// Waits until `done`, or the program's end.
    pub(crate) fn until(
        &mut self,
        what: &str,
        mut done: impl FnMut(&Run) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        loop {
            self.ended = self.child.try_wait()?;
            if self.ended.is_some() || done(self.run)? {
                return Ok(());
            }
            if started.elapsed() > LIMIT + self.run.share {
                let file = self.run.folder.join(format!("{}.hang", self.name));
                fs::write(&file, self.threads())?;
                bail!("{} hangs: it does not {what}; see {}", self.name, file.display());
            }
            std::thread::sleep(POLL);
        }
    }

    /// An error if it has ended.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            self.ended = Some(status);
            bail!("{} has ended: {status}; signal {:?}", self.name, status.signal());
        }
        Ok(())
    }

    /// Asks it to end, and waits until it has.
    pub(crate) fn end(&mut self, signal: i32) -> anyhow::Result<ExitStatus> {
        // SAFETY: its process has not been waited for, so the number is its own.
        unsafe { libc::kill(self.pid(), signal) };
        self.wait()
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(i32::MAX)
    }

    /// It and its descendants.
    fn family(&self) -> Vec<i32> {
        let mut family = vec![self.pid()];
        let stats: Vec<_> = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok())
            .collect();
        let parsed: Vec<[i32; 3]> = stats
            .iter()
            .filter_map(|stat| {
                let (pid, _) = stat.split_once(' ')?;
                let mut rest = stat.rsplit_once(") ")?.1.split(' ').skip(1);
                let mut number = || rest.next()?.parse().ok();
                Some([pid.parse().ok()?, number()?, number()?])
            })
            .collect();
        loop {
            let found = parsed.iter().find(|[pid, parent, group]| {
                !family.contains(pid) && (family.contains(parent) || *group == self.pid())
            });
            match found {
                Some([pid, ..]) => family.push(*pid),
                None => return family,
            }
        }
    }

    /// Where each thread waits.
    fn threads(&self) -> String {
        let mut text = String::new();
        for pid in self.family() {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            for task in tasks {
                text += &format!("== {}\n", task.path().display());
                for file in ["comm", "wchan", "stack", "syscall", "status"] {
                    let content = fs::read_to_string(task.path().join(file)).unwrap_or_default();
                    text += &format!("-- {file}\n{content}\n");
                }
            }
        }
        text
    }
}

impl Drop for Started<'_> {
    fn drop(&mut self) {
        if self.ended.is_some() || matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        for pid in self.family() {
            // SAFETY: our child, not waited for, and what descends from it.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        if let Err(error) = self.child.wait() {
            say(format_args!("{}: {error}", self.name));
        }
    }
}

/// Whether `folder` has `file`.
pub(crate) fn has(folder: &Path, file: &str) -> bool {
    folder.join(file).exists()
}
