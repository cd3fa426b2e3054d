//! The listening side, in the program whose memory it is.
//!
//! It is one thread, which serves one request after the other; a move that a request asks for runs
//! on a thread of its own, as any other move. Nothing that a peer sends or leaves undone keeps the
//! thread for longer than a second but a move that it asked for, and dropping the listener ends
//! that.

use super::{
    Answer, LINE, Request, Summary, TICK, VERSION, folders, is_passing, line, read_line,
    socket_name,
};
use crate::Rights;
use crate::engine::Engine;
use crate::request::{Handle, Part};
use pageferry_sys::fork;
use pageferry_sys::peer::{Peer, effective_user};
use pageferry_topology::NodeId;
use std::fs::{DirBuilder, Permissions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a peer may take to send its request, or to take an answer.
const PATIENCE: Duration = Duration::from_secs(1);
const EXAMPLE: &str = r#"{"version":1,"to":0}"#;

/// Why a program cannot be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The engine sees faults of user code only.
    #[error(
        "an engine in user-mode-only form cannot listen: somebody else would begin a move at any \
         time, also while a system call has memory of a region; build the engine with full rights"
    )]
    UserModeOnly,
    /// The engine stayed with the parent.
    #[error("this engine belongs to the parent process: build a new one after fork")]
    AfterFork,
    /// No folder for the socket.
    #[error(
        "no folder for the control socket: {tried}; make one of them, owned by this user, mode 0700"
    )]
    NoFolder {
        /// What was tried, and why not.
        tried: String,
    },
    /// The socket cannot be made.
    #[error("cannot listen on {}: {source}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// While it is there, the program can be asked to move its regions. See the
/// [module](crate::control).
#[derive(Debug)]
pub struct Listener {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// The process that listens.
    home: u64,
}

impl Listener {
    pub(crate) fn new(engine: Engine) -> Result<Self, ListenError> {
        if engine.rights() == Rights::UserModeOnly {
            return Err(ListenError::UserModeOnly);
        }
        if !engine.inner.is_at_home() {
            return Err(ListenError::AfterFork);
        }
        let path = folder()?.join(socket_name(std::process::id()));
        let failed = |source| ListenError::Socket { path: path.clone(), source };
        let socket = bind(&path).map_err(failed)?;
        let stop = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&stop);
        let thread =
            pageferry_sys::thread::spawn("pf-control", move || serve(&engine, &socket, &theirs))
                .map_err(failed)?;
        Ok(Self { path, stop, thread: Some(thread), home: fork::generation() })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // A forked child has neither the thread nor the socket's name.
        if self.home != fork::generation() {
            return;
        }
        self.stop.store(true, Ordering::Release);
        // The thread looks once a tick, whoever comes.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The first folder that is ours alone.
fn folder() -> Result<PathBuf, ListenError> {
    let uid = effective_user();
    let mut tried = Vec::new();
    for folder in folders(uid) {
        let made = DirBuilder::new().mode(0o700).create(&folder);
        let checked = match made {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(e.to_string()),
            _ => is_ours(&folder, uid),
        };
        match checked {
            Ok(()) => return Ok(folder),
            Err(why) => tried.push(format!("{} ({why})", folder.display())),
        }
    }
    Err(ListenError::NoFolder { tried: tried.join(", ") })
}

fn is_ours(folder: &Path, uid: u32) -> Result<(), String> {
    // Not followed: in /tmp somebody else could have put a link there.
    let found = std::fs::symlink_metadata(folder).map_err(|e| e.to_string())?;
    match () {
        () if !found.is_dir() => Err("not a folder".into()),
        () if found.uid() != uid => Err(format!("belongs to user {}", found.uid())),
        () if found.mode() & 0o077 != 0 => Err(format!("mode {:o}", found.mode() & 0o777)),
        () => Ok(()),
    }
}

fn bind(path: &Path) -> std::io::Result<UnixListener> {
    let socket = match UnixListener::bind(path) {
        // Left behind by a process that had our number. A second listener of this process would
        // answer.
        Err(e) if e.kind() == ErrorKind::AddrInUse && UnixStream::connect(path).is_err() => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        bound => bound?,
    };
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn serve(engine: &Engine, socket: &UnixListener, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        match socket.accept() {
            Ok((stream, _)) => {
                if let Err(error) = converse(engine, &stream, stop) {
                    tracing::debug!(%error, "a control connection broke off");
                }
            }
            Err(_) => std::thread::sleep(TICK),
        }
    }
}

fn converse(engine: &Engine, mut stream: &UnixStream, stop: &AtomicBool) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let peer = Peer::of(stream)?;
    let us = effective_user();
    if peer.uid != us && peer.uid != 0 {
        let why = format!("user {} may not move the memory of user {us}", peer.uid);
        return stream.write_all(&line(&Answer::Failed(why))?);
    }
    let request = match receive(stream, stop) {
        Ok(Some(request)) => request,
        Ok(None) => return Ok(()),
        Err(why) => {
            let why = format!("not a request: {why}; one line of JSON is, such as {EXAMPLE}");
            return stream.write_all(&line(&Answer::Failed(why))?);
        }
    };
    stream.set_read_timeout(Some(TICK))?;
    let answer = match carry_out(engine, stream, &request, stop) {
        Ok(summary) => Answer::Done(summary),
        Err(why) => Answer::Failed(why),
    };
    stream.write_all(&line(&answer)?)
}

/// Reads the request, which has [`PATIENCE`] to come. `None`: there is none.
fn receive(mut stream: &UnixStream, stop: &AtomicBool) -> std::io::Result<Option<Request>> {
    let late = Instant::now() + PATIENCE;
    let (mut text, mut some) = (Vec::new(), [0; 4096]);
    stream.set_read_timeout(Some(TICK))?;
    while !text.contains(&b'\n') {
        match stream.read(&mut some) {
            Ok(0) => break,
            Ok(count) => text.extend_from_slice(&some[..count]),
            Err(e) if is_passing(&e) => {}
            Err(e) => return Err(e),
        }
        if text.len() as u64 > LINE {
            return Err(std::io::Error::other("the line is too long"));
        }
        if Instant::now() > late || stop.load(Ordering::Acquire) {
            return Err(std::io::Error::other("the line did not end in time"));
        }
    }
    read_line(&mut &text[..])
}

/// Moves region after region.
fn carry_out(
    engine: &Engine,
    stream: &UnixStream,
    request: &Request,
    stop: &AtomicBool,
) -> Result<Summary, String> {
    if request.version != VERSION {
        return Err(format!(
            "version {} of the control protocol is not spoken here, {VERSION} is: use the \
             `pageferry` that belongs to this program's library",
            request.version
        ));
    }
    let to = NodeId::new(request.to);
    engine.machine().memory_node(to).map_err(|e| e.to_string())?;
    for &node in &request.from {
        engine.machine().node(NodeId::new(node)).map_err(|e| e.to_string())?;
    }
    let parts: Vec<Part> = engine.inner.regions.lock().iter().map(|p| p.toward(to)).collect();
    let total: u64 = parts.iter().map(Part::bytes).sum();
    let (mut done, mut summary) = (0, Summary::default());
    for part in parts {
        let bytes = part.bytes();
        let part = if request.from.is_empty() {
            Some(part)
        } else {
            part.on(engine, &request.from).map_err(|e| e.to_string())?
        };
        if let Some(part) = part {
            let mut migration = engine.migrate(part);
            if let Some(us) = request.stall_budget_us {
                migration = migration.stall_budget(Duration::from_micros(us));
            }
            let handle = match migration.start() {
                Ok(handle) => handle,
                // Dropped meanwhile: nothing is there to be moved.
                Err(crate::MigrateError::RegionGone) => continue,
                Err(error) => return Err(error.to_string()),
            };
            follow(stream, &handle, done, total, stop);
            match handle.wait() {
                Ok(report) => summary.add(&report),
                Err(crate::MigrateError::RegionGone) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        done += bytes;
        if summary.cancelled {
            break;
        }
    }
    Ok(summary)
}

/// Tells the progress of a move; cancels it when nobody listens or when it is time to stop.
fn follow(mut stream: &UnixStream, handle: &Handle, before: u64, total: u64, stop: &AtomicBool) {
    let mut byte = [0];
    while !handle.is_finished() {
        // Waits for a tick: the peer has nothing more to say.
        let hung_up = match stream.read(&mut byte) {
            Ok(count) => count == 0,
            Err(e) => !is_passing(&e),
        };
        let bytes_done = before + handle.progress().bytes_done;
        let told = line(&Answer::Progress { bytes_done, bytes_total: total })
            .and_then(|line| stream.write_all(&line));
        if hung_up || told.is_err() || stop.load(Ordering::Acquire) {
            handle.cancel();
            // Not asked again in haste: a closed connection answers at once.
            std::thread::sleep(TICK / 10);
        }
    }
}
