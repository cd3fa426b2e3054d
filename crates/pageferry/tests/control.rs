//! A program that can be asked to move its regions, and who may ask.

mod support;

use pageferry::control::{AskError, ListenError, Request, VERSION, ask};
use pageferry::{Engine, Folios};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A process has one socket, and these tests share a process.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn request(engine: &Engine) -> Request {
    // Where there are two nodes, memory is touched first on the first one.
    let to = engine.machine().memory_nodes().last().expect("a node with memory").id.get();
    Request { version: VERSION, from: Vec::new(), to, stall_budget_us: None }
}

/// A process that does nothing, and ends with the test.
struct Idle(Child);

impl Idle {
    fn start() -> Self {
        Self(Command::new("sleep").arg("60").spawn().expect("sleep"))
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_listening_program_moves_all_its_regions_when_asked_and_accounts_for_every_byte() {
    let _alone = alone();
    let Some(engine) = support::engine() else { return };
    let listener = engine.listen().expect("a folder for the socket");
    let regions: Vec<_> = [8 << 20, 3 << 20]
        .map(|bytes| engine.map(bytes).folios(Folios::Base).build().expect("a region"))
        .into();
    for region in &regions {
        // SAFETY: the region is mapped, writable, and ours.
        unsafe { region.as_ptr().write_bytes(7, region.len()) };
    }
    let request = request(&engine);
    let mut told = 0;
    let summary = ask(std::process::id(), &request, |done, total| {
        assert!(done <= total && total == 11 << 20, "{done} of {total}");
        told += 1;
        true
    });
    let summary = summary.expect("it answers").expect("it listens");
    assert_eq!(summary.regions, 2);
    assert_eq!(summary.shares.iter().map(|s| s.bytes).sum::<u64>(), 11 << 20, "{summary:?}");
    assert!(summary.shares.iter().all(|s| s.settled) && !summary.cancelled, "{summary:?}");
    for region in &regions {
        let on: Vec<_> =
            region.residency().expect("it is ours").iter().map(|r| r.node.get()).collect();
        assert_eq!(on, [request.to]);
    }
    let path = listener.path().to_owned();
    let mode = |path| std::fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert_eq!(mode(path.as_path()), 0o600);
    assert_eq!(mode(path.parent().expect("a folder")), 0o700);
    drop(listener);
    assert!(!path.exists());
    let silent = ask(std::process::id(), &request_of(4095), |_, _| true);
    assert!(matches!(silent, Ok(None)), "{silent:?}");
}

fn request_of(to: u32) -> Request {
    Request { version: VERSION, from: Vec::new(), to, stall_budget_us: None }
}

#[test]
fn a_request_that_cannot_be_met_is_refused_with_the_reason_and_the_next_one_is_served() {
    let _alone = alone();
    let Some(engine) = support::engine() else { return };
    let listener = engine.listen().expect("a folder for the socket");
    let _region = engine.map(1 << 20).build().expect("a region");
    let good = request(&engine);
    let refused = |request: &Request| match ask(std::process::id(), request, |_, _| true) {
        Err(AskError::Refused { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    assert!(refused(&request_of(4095)).contains("4095"));
    assert!(refused(&Request { version: 99, ..good.clone() }).contains("99"));
    let budget = Some(1);
    assert!(refused(&Request { stall_budget_us: budget, ..good.clone() }).contains("stall_budget"));

    let elsewhere = Request { from: vec![4095], ..good.clone() };
    assert!(refused(&elsewhere).contains("4095"));

    // Nonsense, a line without end, and one that comes too slowly.
    let slow = [b' '; 20];
    for sent in [&b"nonsense\n"[..], br#"{"version":1,"to":-1}"#, &[b'x'; 100_000], &slow] {
        let mut stream = UnixStream::connect(listener.path()).expect("it listens");
        for piece in sent.chunks(if sent == slow { 1 } else { sent.len() }) {
            // It hangs up before it has read all of that.
            let _ = stream.write_all(piece);
            std::thread::sleep(Duration::from_millis(if sent == slow { 100 } else { 0 }));
        }
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        // What was not read when it hung up resets the connection; else it says why.
        if BufReader::new(stream).read_line(&mut answer).is_ok() {
            assert!(answer.contains("not a request"), "{answer}");
        }
    }
    // Silence is no request.
    let mut stream = UnixStream::connect(listener.path()).expect("it listens");
    stream.shutdown(std::net::Shutdown::Write).expect("connected");
    let mut answer = String::new();
    assert_eq!(stream.read_to_string(&mut answer).expect("hung up"), 0);

    let summary = ask(std::process::id(), &good, |_, _| true).expect("it answers");
    assert_eq!(summary.expect("it listens").regions, 1);
}

#[test]
fn only_the_process_itself_is_believed() {
    let _alone = alone();
    let Some(engine) = support::engine() else { return };
    let listener = engine.listen().expect("a folder for the socket");
    let idle = Idle::start();
    let request = request(&engine);
    let silent = ask(idle.0.id(), &request, |_, _| true);
    assert!(matches!(silent, Ok(None)), "{silent:?}");

    // Somebody else listens in its place.
    let path = listener.path().with_file_name(format!("{}.sock", idle.0.id()));
    let fake = UnixListener::bind(&path).expect("our folder");
    let caught = ask(idle.0.id(), &request, |_, _| true);
    drop(fake);
    let dead = ask(idle.0.id(), &request, |_, _| true);
    std::fs::remove_file(&path).expect("our folder");
    assert!(matches!(caught, Err(AskError::Impostor { .. })), "{caught:?}");
    // Left behind: as if nobody had ever listened.
    assert!(matches!(dead, Ok(None)), "{dead:?}");

    let nobody = ask(u32::MAX >> 1, &request, |_, _| true);
    assert!(matches!(nobody, Err(AskError::Process { .. })), "{nobody:?}");
}

#[test]
fn one_listener_a_process_and_none_in_user_mode_only_form() {
    let _alone = alone();
    let Some(engine) = support::engine() else { return };
    let first = engine.listen().expect("a folder for the socket");
    let second = engine.listen();
    assert!(matches!(second, Err(ListenError::Socket { .. })), "{second:?}");
    drop(first);
    drop(engine.listen().expect("the first one has gone"));

    let user = Engine::builder().user_mode_only(true).build().expect("any user may");
    let refused = user.listen();
    assert!(matches!(refused, Err(ListenError::UserModeOnly)), "{refused:?}");
}
