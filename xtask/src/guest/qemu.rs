//! A machine under QEMU: started, listened to, and ended whatever happens.
//!
//! QEMU dies with this process, and when its [`Running`] is dropped. It runs at a low priority:
//! a machine's CPUs are threads that never rest.

use super::build::Target;
use super::kit::Kit;
use super::machine::{Clock, Machine};
use super::record::{self, Record};
use super::zcu102;
use crate::needs::QEMU;
use anyhow::{Context as _, bail};
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// How long a machine may take to come up. Emulated, on a quiet machine, it takes 4 s; with a kernel
/// that looks for mistakes, on a busy one, a minute and a half.
pub(crate) const BOOT: Duration = Duration::from_secs(240);
/// With KVM it takes one second.
const PROBE: Duration = Duration::from_secs(15);
/// Lines of the console that are shown when something went wrong.
const TAIL: usize = 40;
/// Of `/proc/PID/stat`, in a second (`USER_HZ`).
const TICKS: f64 = 100.0;
/// Below what others run at.
const NICENESS: i32 = 10;

/// Who runs the machine's CPUs.
#[derive(Clone, Debug)]
pub(crate) enum Cpus {
    /// This machine's own, by KVM.
    Kvm,
    /// QEMU's translation, and why not KVM.
    Emulated(String),
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm => f.write_str("KVM"),
            Self::Emulated(why) => write!(f, "emulated ({why})"),
        }
    }
}

impl Cpus {
    /// KVM if a guest comes up with it. `/dev/kvm` alone says little: where this machine is itself
    /// a guest, it may be there and fail at the first instruction that it must emulate.
    pub(crate) fn probe(kit: &Kit, initramfs: &Path, work: &Path) -> Self {
        let open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
        if let Err(error) = open {
            return Self::Emulated(format!("/dev/kvm: {error}"));
        }
        let Ok(machine) = Machine::named("one") else { return Self::Kvm };
        let boot = Boot { kit, machine, cpus: &Self::Kvm, initramfs, mode: "probe", seconds: 0 };
        let tried = boot.start(work).and_then(|mut guest| guest.ready(PROBE));
        match tried {
            Ok(_) => Self::Kvm,
            Err(error) => Self::Emulated(format!("KVM does not work here: {error:#}")),
        }
    }
}

/// What is to be booted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Boot<'a> {
    pub(crate) kit: &'a Kit,
    pub(crate) machine: &'a Machine,
    pub(crate) cpus: &'a Cpus,
    pub(crate) initramfs: &'a Path,
    /// What init.sh is to do.
    pub(crate) mode: &'a str,
    /// Seconds that a test may take.
    pub(crate) seconds: u64,
}

impl Boot<'_> {
    /// Starts the machine; its console goes to a file in `work`.
    pub(crate) fn start(&self, work: &Path) -> anyhow::Result<Running> {
        let console = work.join(format!("{}.console", self.machine.name));
        let serial = format!("file:{}", console.display());
        // A file, not QEMU's stdio: that one hangs up when there is nothing to read from.
        let mut command = self.command(&serial, "file,path=/dev/stdout")?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            command.spawn().with_context(|| format!("cannot start {}", name(&command)))?;
        let (events, receiver) = channel();
        if let Some(out) = child.stdout.take() {
            let events = events.clone();
            std::thread::spawn(move || listen(out, &events, Event::Line, true));
        }
        if let Some(err) = child.stderr.take() {
            std::thread::spawn(move || listen(err, &events, Event::Complaint, false));
        }
        Ok(Running { child, events: receiver, console, complaint: None })
    }

    /// Runs the machine with this terminal as its console, to its end.
    pub(crate) fn interact(&self) -> anyhow::Result<()> {
        // A port that nobody has opened on this side would hold up whoever writes to it.
        let mut command = self.command("mon:stdio", "file,path=/dev/null")?;
        let status = command.status();
        let status = status.with_context(|| format!("cannot start {}", name(&command)))?;
        if !status.success() {
            bail!("{}: {status}", name(&command));
        }
        Ok(())
    }

    fn command(&self, serial: &str, results: &str) -> anyhow::Result<Command> {
        let mut command = match self.kit.target() {
            Target::Here => self.pc(serial, results),
            Target::Aarch64 => zcu102::command(self, serial, results)?,
        };
        // SAFETY: between fork and exec only async-signal-safe calls are made: prctl(2), by which
        // the kernel kills QEMU when the thread that starts it (the main thread) ends, and
        // setpriority(2), which concerns only the new process.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS);
                Ok(())
            });
        }
        Ok(command)
    }

    /// An x86-64 machine.
    fn pc(&self, serial: &str, results: &str) -> Command {
        let mut command = Command::new(QEMU);
        command.args(["-nodefaults", "-display", "none", "-no-reboot"]);
        match (self.machine.clock, self.cpus) {
            (Clock::Time, Cpus::Kvm) => command.args(["-accel", "kvm", "-cpu", "host"]),
            // Four levels of page tables: what most machines have, and faster here.
            (Clock::Time, Cpus::Emulated(_)) => {
                command.args(["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"])
            }
            // Nothing comes from the host, neither time nor random numbers.
            (Clock::Instructions, _) => command
                .args(["-accel", "tcg,thread=single", "-cpu", "max,la57=off", "-seed", "1"])
                .args(["-icount", "shift=0,sleep=off", "-rtc", "clock=vm"]),
        };
        command.args(self.machine.words());
        command.arg("-kernel").arg(self.kit.kernel()).arg("-initrd").arg(self.initramfs);
        // The instruction counter is the best clock there, though no such CPU says so of its own.
        let clock = if self.machine.clock == Clock::Time { "" } else { " tsc=reliable" };
        // Pages stay where they were put; an oops ends the machine at once, and QEMU with it. Where
        // the host is busy, an emulated timer may be too late for the test that Linux makes of it.
        command.arg("-append").arg(format!(
            "console=ttyS0 quiet oops=panic panic=-1 numa_balancing=disable random.trust_cpu=on \
             no_timer_check{clock} guest={} guest.hugetlb={} guest.seconds={}",
            self.mode, self.machine.hugetlb, self.seconds
        ));
        command.args(["-serial", serial, "-device", "virtio-serial-pci"]);
        command.args(["-chardev", &format!("{results},id=results")]);
        command.args(["-device", "virtserialport,chardev=results,name=results"]);
        command
    }
}

#[derive(Debug)]
enum Event {
    Line(String),
    Complaint(String),
    Ended,
}

/// Of a command, its program.
fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// Sends what is read, line by line. Output of tests need not be UTF-8.
fn listen(from: impl Read, to: &Sender<Event>, event: fn(String) -> Event, tell_end: bool) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        let text = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(&line));
        if to.send(event(text.into_owned())).is_err() {
            return;
        }
        line.clear();
    }
    if tell_end {
        let _ = to.send(Event::Ended);
    }
}

/// A machine that runs; ended when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    events: Receiver<Event>,
    console: PathBuf,
    complaint: Option<String>,
}

impl Running {
    /// The next line: output, and the record in it.
    ///
    /// # Errors
    /// The machine ended, or said nothing until `deadline`.
    pub(crate) fn next(&mut self, deadline: Instant) -> anyhow::Result<(String, Option<Record>)> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Line(line)) => {
                    let (text, record) = record::split(&line);
                    return Ok((text.to_owned(), record));
                }
                // It has stopped the machine and waits for a debugger.
                Ok(Event::Complaint(text)) if text.contains("KVM internal error") => bail!(text),
                Ok(Event::Complaint(text)) => self.complaint = Some(text),
                Ok(Event::Ended) | Err(RecvTimeoutError::Disconnected) => {
                    // What QEMU complained of may arrive after the end.
                    while let Ok(event) = self.events.recv_timeout(Duration::from_millis(200)) {
                        if let Event::Complaint(text) = event {
                            self.complaint = Some(text);
                        }
                    }
                    match self.complaint.take() {
                        Some(text) => bail!("the machine ended; QEMU said: {text}"),
                        None => bail!("the machine ended"),
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("the machine hangs"),
            }
        }
    }

    /// Waits until it is up; returns its kernel's release.
    pub(crate) fn ready(&mut self, within: Duration) -> anyhow::Result<String> {
        let deadline = Instant::now() + within;
        loop {
            if let (_, Some(Record::Ready(release))) = self.next(deadline)? {
                return Ok(release);
            }
        }
    }

    /// Seconds of this machine's CPUs that it has had, however long it waited for them.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        stat.ok().and_then(|stat| ticks(&stat)).map_or(0.0, |ticks| ticks as f64 / TICKS)
    }

    /// The last lines of its console.
    pub(crate) fn console(&self) -> String {
        let bytes = std::fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL)..].join("\n")
    }
}

/// utime and stime of `/proc/PID/stat` (proc_pid_stat(5)); what is before them may contain anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut numbers = rest.split_whitespace().skip(11).map_while(|n| n.parse::<u64>().ok());
    Some(numbers.next()? + numbers.next()?)
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let stat = "17 (a) R (b) S 1 17 17 0 -1 4194304 106 0 3 0 250 50 7 8 20 0 1 0 99 0";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("17 (a) S 1"), None);
        assert_eq!(ticks(""), None);
    }
}
