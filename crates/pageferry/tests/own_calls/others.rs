//! Another process at the memory: it runs this test binary in the role [`ROLE`] and does what it is
//! told, line by line.

use super::call::{Call, differs, said, sys};
use super::stage::{Spot, digest};
use crate::support::siege::{again, ptr};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStdout, Stdio};
use std::sync::{Mutex, PoisonError};

pub(crate) const ROLE: &str = "another process";

/// The process, and what it answers.
static OTHER: Mutex<Option<(Child, BufReader<ChildStdout>)>> = Mutex::new(None);

/// Ends the process when it goes.
pub(crate) struct Other;

impl Other {
    /// Starts it; `test` is the one whose function calls [`serve`].
    pub(crate) fn start(test: &str) -> Self {
        let mut command = again(test, ROLE);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("this binary runs again");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        *OTHER.lock().unwrap_or_else(PoisonError::into_inner) = Some((child, answers));
        // Only what this process lets trace it may (where Yama restricts that).
        sys!(libc::SYS_prctl, 0x5961_6D61, usize::MAX); // PR_SET_PTRACER, any
        Self
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let other = OTHER.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((mut child, _)) = other {
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }
}

/// Has the other process do something at the spot: the answers are numbers.
fn ask(what: &str, s: &Spot) -> Vec<i64> {
    let mut other = OTHER.lock().unwrap_or_else(PoisonError::into_inner);
    let (child, answers) = other.as_mut().expect("started");
    let input = child.stdin.as_mut().expect("piped");
    writeln!(input, "{what} {} {} {}", std::process::id(), s.at, s.len).expect("it listens");
    loop {
        let mut line = String::new();
        assert_ne!(answers.read_line(&mut line).expect("text"), 0, "the other process has ended");
        // The test's name and the like come first.
        if let Some((_, numbers)) = line.split_once('=') {
            return numbers.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        }
    }
}

/// Does what it is told, until nothing more comes.
pub(crate) fn serve() {
    for line in std::io::stdin().lines() {
        let line = line.expect("text");
        let words: Vec<&str> = line.split(' ').collect();
        let [what, numbers @ ..] = words.as_slice() else { continue };
        let numbers: Vec<usize> = numbers.iter().filter_map(|n| n.parse().ok()).collect();
        let &[pid, at, len] = numbers.as_slice() else { continue };
        let pid = i32::try_from(pid).expect("a process id");
        let answers = act(what, pid, at, len);
        let answers: Vec<String> = answers.iter().map(i64::to_string).collect();
        let mut output = std::io::stdout();
        writeln!(output, "={}", answers.join(" ")).expect("somebody listens");
        output.flush().expect("somebody listens");
    }
}

fn act(what: &str, pid: i32, at: usize, len: usize) -> Vec<i64> {
    let mut bytes = vec![0x55u8; len];
    let buffer = bytes.as_mut_ptr();
    let done = match what {
        "vm_readv" | "vm_writev" => {
            let local = libc::iovec { iov_base: buffer.cast(), iov_len: len };
            let remote = libc::iovec { iov_base: ptr(at), iov_len: len };
            let read = what == "vm_readv";
            let number =
                if read { libc::SYS_process_vm_readv } else { libc::SYS_process_vm_writev };
            sys!(number, pid, &raw const local, 1, &raw const remote, 1, 0)
        }
        "mem_read" | "mem_write" => {
            let path = format!("/proc/{pid}/mem");
            let file = std::fs::File::options().read(true).write(true).open(path);
            let Ok(file) = file else { return vec![-13] };
            let number = if what == "mem_read" { libc::SYS_pread64 } else { libc::SYS_pwrite64 };
            sys!(number, file.as_raw_fd(), buffer, len, at)
        }
        // The test's main thread, which waits for the others, is stopped for it.
        "peek" | "poke" => {
            let trace = |request: u32, addr: usize, data: usize| {
                // SAFETY: attaches to the process that asked, and reads or writes its spot.
                said(unsafe { libc::ptrace(request, pid, addr, data) })
            };
            if trace(libc::PTRACE_SEIZE, 0, 0) < 0 {
                return vec![-1];
            }
            trace(libc::PTRACE_INTERRUPT, 0, 0);
            let mut status = 0;
            // SAFETY: waits for the thread that stops; the kernel writes the status.
            unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
            let done = if what == "peek" {
                let mut word = 0usize;
                let told = sys!(libc::SYS_ptrace, libc::PTRACE_PEEKDATA, pid, at, &raw mut word);
                if told == 0 { digest(&word.to_ne_bytes()) } else { told }
            } else {
                trace(libc::PTRACE_POKEDATA, at, 0x55)
            };
            trace(libc::PTRACE_DETACH, 0, 0);
            done
        }
        _ => -1,
    };
    vec![done, digest(&bytes)]
}

/// What it answers where the kernel does not wait for a page; its buffer is as it was.
fn io_error(s: &Spot) -> Vec<i64> {
    vec![-5, digest(&vec![0x55; s.len])]
}

/// Nothing is written to protected pages, either.
const fn fails(name: &'static str, act: fn(&Spot) -> Vec<i64>) -> Call {
    Call::new(name, differs(io_error), act).once()
}

pub(crate) const OTHERS: &[Call] = &[
    Call::waits("process_vm_readv from another process", |s| ask("vm_readv", s)),
    Call::waits("process_vm_writev from another process", |s| ask("vm_writev", s)),
    fails("/proc/PID/mem, read by another process", |s| ask("mem_read", s)),
    fails("/proc/PID/mem, written by another process", |s| ask("mem_write", s))
        .protected(differs(io_error)),
    fails("ptrace PEEKDATA", |s| ask("peek", s)),
    fails("ptrace POKEDATA", |s| ask("poke", s)).protected(differs(io_error)),
];
