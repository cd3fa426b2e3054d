//! `move` of a program that listens, and of who joins while that is asked. The listener is made up:
//! it says when it is asked, and moves nothing.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pageferry::control::{Answer, Request, Summary};
use pageferry_topology::Machine;
use serde_json::Value;

mod support;

use support::{command, pageferry, send, stderr, stdout};

/// A process has one socket, and these tests share a process.
static ALONE: Mutex<()> = Mutex::new(());

/// The socket of this process, in the last of the folders that are looked into.
struct Socket(PathBuf, #[allow(dead_code, reason = "held")] MutexGuard<'static, ()>);

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn listen() -> (UnixListener, Socket) {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: no preconditions.
    let folder = PathBuf::from(format!("/tmp/pageferry-{}", unsafe { libc::getuid() }));
    match fs::DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => panic!("{error}"),
        _ => {}
    }
    let socket = Socket(folder.join(format!("{}.sock", std::process::id())), alone);
    let _ = fs::remove_file(&socket.0);
    (UnixListener::bind(&socket.0).expect("a socket"), socket)
}

#[test]
fn who_joins_after_a_program_was_asked_is_moved_too() {
    let machine = Machine::read().expect("a machine");
    let node = machine.memory_nodes().next().expect("a node").id.to_string();
    let (listener, socket) = listen();
    // Answers once; by then it has a child that nobody has seen.
    let asked = std::thread::spawn(move || -> std::io::Result<(Request, Child)> {
        let (mut stream, _) = listener.accept()?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        let child = Command::new("sleep").arg("600").spawn()?;
        let mut answer = serde_json::to_vec(&Answer::Done(Summary::default()))?;
        answer.push(b'\n');
        stream.write_all(&answer)?;
        Ok((serde_json::from_str(&line)?, child))
    });
    let me = std::process::id().to_string();
    let args = ["move", "--pid", &me, "--children", "--to", &node, "--only", "stack,anonymous"];
    let moved = pageferry(&[&args[..], &["--json"]].concat());
    drop(socket);
    let error = stderr(&moved);
    if error.contains("this kernel does not move pages") {
        // The thread waits for ever, and ends with the test.
        return eprintln!("skipped: {error}");
    }
    let (request, mut child) = asked.join().expect("no panic").expect("a connection");
    child.kill().expect("ours");
    child.wait().expect("ours");
    let told: Value = serde_json::from_str(&stdout(&moved)).expect("JSON");
    assert_eq!(request.to.to_string(), node);
    assert_eq!(told["asked"].as_array().map(Vec::len), Some(1), "{told}");
    assert_eq!(told["asked"][0]["pid"].to_string(), me, "{told}");
    // The command itself, which is a child too, the rest of the listener, and who joined.
    assert_eq!(told["processes"], 3, "{told}");
    let remarks = told["remarks"].to_string();
    assert!(remarks.contains("1 more joined meanwhile"), "{told}");
}

/// What a listener does that is of no use.
#[derive(Clone, Copy, Debug)]
enum Stubborn {
    /// It takes the request, and says nothing.
    Silent,
    /// It tells its progress, and never ends.
    Endless,
    /// It takes no connection, and its queue is full.
    Full,
}

/// A connection by the command. `None`: that has ended.
fn connection(listener: &UnixListener, child: &mut Child) -> Option<UnixStream> {
    listener.set_nonblocking(true).expect("a socket");
    loop {
        match listener.accept() {
            Ok((stream, _)) => return Some(stream),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        if child.try_wait().expect("our child").is_some() {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the command tries to connect; `None`: it has ended.
fn connecting(child: &mut Child) -> Option<()> {
    loop {
        let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).into_iter().flatten();
        let mut names = tasks.flatten().map(|task| fs::read_to_string(task.path().join("comm")));
        if names.any(|name| name.is_ok_and(|name| name == "pf-ask\n")) {
            return Some(());
        }
        if child.try_wait().expect("our child").is_some() {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_signal_ends_a_move_whatever_a_listener_does_or_leaves_undone() {
    let machine = Machine::read().expect("a machine");
    let node = machine.memory_nodes().next().expect("a node").id.to_string();
    let me = std::process::id().to_string();
    let (listener, socket) = listen();
    let cases = [(Stubborn::Silent, "INT"), (Stubborn::Endless, "TERM"), (Stubborn::Full, "INT")];
    for (stubborn, signal) in cases {
        if matches!(stubborn, Stubborn::Full) {
            // SAFETY: no preconditions; the socket listens already, and its queue gets shorter.
            assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
            // One may wait, and this one does.
            drop(UnixStream::connect(&socket.0).expect("room for one"));
        }
        let mut child = command(&["move", "--pid", &me, "--to", &node, "--json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let stream = match stubborn {
            Stubborn::Full => connecting(&mut child).map(|()| None),
            _ => connection(&listener, &mut child).map(Some),
        };
        let Some(stream) = stream else {
            let output = child.wait_with_output().expect("it has ended");
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(error.contains("this kernel does not move pages"), "{stubborn:?}: {error}");
            return eprintln!("skipped: {error}");
        };
        let mut request = String::new();
        if let Some(stream) = &stream {
            BufReader::new(stream).read_line(&mut request).expect("a request");
        }
        let endless = matches!(stubborn, Stubborn::Endless).then(|| {
            let mut stream = stream.as_ref().expect("connected").try_clone().expect("a socket");
            let answer = Answer::Progress { bytes_done: 0, bytes_total: 1 };
            let answer = serde_json::to_string(&answer).expect("JSON") + "\n";
            std::thread::spawn(move || while stream.write_all(answer.as_bytes()).is_ok() {})
        });
        send(signal, &child);
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(130), "{stubborn:?}: {output:?}");
        let told: Value = serde_json::from_slice(&output.stdout).expect("it reports");
        assert_eq!(told["cancelled"], true, "{stubborn:?}: {told}");
        let error = told["asked"][0]["error"].as_str().unwrap_or_default();
        assert!(error.contains("cancelled before process"), "{stubborn:?}: {told}");
        if let Some(endless) = endless {
            endless.join().expect("it sees that nobody listens");
        }
    }
}
