//! `move` of a program that listens, and of who joins while that is asked. The listener is made up:
//! it says when it is asked, and moves nothing.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command};

use pageferry::control::{Answer, Request, Summary};
use pageferry_topology::Machine;
use serde_json::Value;

mod support;

use support::{pageferry, stderr, stdout};

/// The socket of this process, in the last of the folders that are looked into.
struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn listen() -> (UnixListener, Socket) {
    // SAFETY: no preconditions.
    let folder = PathBuf::from(format!("/tmp/pageferry-{}", unsafe { libc::getuid() }));
    match fs::DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => panic!("{error}"),
        _ => {}
    }
    let socket = Socket(folder.join(format!("{}.sock", std::process::id())));
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
