//! The asking side.
//!
//! What always holds: whatever the other end does or leaves undone, asking ends: soon after it is
//! cancelled, and after [`SILENCE`] without a message. Who is given up sees the connection closed,
//! which tells it to stop.

use super::{Answer, LINE, Request, Summary, folders, is_passing, line, read_line, socket_name};
use pageferry_sys::peer::Peer;
use pageferry_sys::procfs::{ProcDir, Status};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// A listener that says nothing for so long is stuck, or serves somebody else: while it moves it
/// tells its progress several times a second.
const SILENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether to stop.
const SLICE: Duration = Duration::from_millis(50);
/// How long a listener that was told to stop may take to say how far it is: it stops between two
/// batches, milliseconds apart.
const GRACE: Duration = Duration::from_millis(200);

/// Why a program could not be asked, or did not do it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// There is no such process, or it is not ours to look at.
    #[error("process {pid}: {source}")]
    Process {
        /// Its number.
        pid: u32,
        /// Why.
        source: std::io::Error,
    },
    /// Its socket is there, but does not let us in.
    #[error("{}: {source}; only the user of process {pid} and root may ask it", path.display())]
    Socket {
        /// Its number.
        pid: u32,
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Somebody else answers at the process's socket.
    #[error("{}: process {other} answers there, not {pid}: it is not believed", path.display())]
    Impostor {
        /// Who was asked for.
        pid: u32,
        /// The socket.
        path: PathBuf,
        /// Who answered.
        other: i32,
    },
    /// The connection broke, or what came is not the protocol.
    #[error("process {pid} broke off: {source}")]
    Broken {
        /// Its number.
        pid: u32,
        /// How.
        source: std::io::Error,
    },
    /// It said nothing for too long: it is stuck, or busy with somebody else's request.
    #[error("process {pid} listens, but said nothing for {seconds} s: is it stopped, or stuck?")]
    Silent {
        /// Its number.
        pid: u32,
        /// For how long.
        seconds: u64,
    },
    /// Asking was cancelled, and it did not say in time how far it was. The closed connection
    /// tells it to stop, if it was asked already.
    #[error("cancelled before process {pid} said how far it was")]
    Cancelled {
        /// Its number.
        pid: u32,
    },
    /// It refused, or failed; all its pages are intact.
    #[error("process {pid} did not move its memory: {why}")]
    Refused {
        /// Its number.
        pid: u32,
        /// What it said.
        why: String,
    },
}

/// Asks a process to move its regions, and waits until it has. `None`: it does not listen, so it
/// can be moved from outside only. `progress` is told bytes done and bytes in all, several times
/// a second; when it returns false, the move is cancelled and its summary comes soon after.
/// [`ask_until`] can be cancelled before the first message, too.
///
/// # Errors
/// [`AskError`].
pub fn ask(
    pid: u32,
    request: &Request,
    progress: impl FnMut(u64, u64) -> bool,
) -> Result<Option<Summary>, AskError> {
    ask_until(pid, request, &AtomicBool::new(false), progress)
}

/// As [`ask`]; once `cancel` becomes true, the process is told to stop, and a fifth of a second
/// later it is no longer waited for.
///
/// # Errors
/// [`AskError`].
pub fn ask_until(
    pid: u32,
    request: &Request,
    cancel: &AtomicBool,
    progress: impl FnMut(u64, u64) -> bool,
) -> Result<Option<Summary>, AskError> {
    Asking { pid, cancel, silence: SILENCE }.ask(request, progress)
}

/// Whom, and for how long.
struct Asking<'a> {
    pid: u32,
    cancel: &'a AtomicBool,
    /// [`SILENCE`], but in tests.
    silence: Duration,
}

impl Asking<'_> {
    fn ask(
        &self,
        request: &Request,
        mut progress: impl FnMut(u64, u64) -> bool,
    ) -> Result<Option<Summary>, AskError> {
        let pid = self.pid;
        let Some((path, mut stream)) = self.connect()? else { return Ok(None) };
        let broken = |source| AskError::Broken { pid, source };
        let peer = Peer::of(&stream).map_err(|errno| broken(errno.into()))?;
        if u32::try_from(peer.pid) != Ok(pid) {
            return Err(AskError::Impostor { pid, path, other: peer.pid });
        }
        stream.set_read_timeout(Some(SLICE)).map_err(broken)?;
        stream.set_write_timeout(Some(GRACE)).map_err(broken)?;
        stream.write_all(&line(request).map_err(broken)?).map_err(broken)?;
        let mut received = Received::default();
        let (mut heard, mut go_on, mut told) = (Instant::now(), true, None);
        loop {
            let ended = match received.more(&stream) {
                Ok(more) => !more,
                Err(error) if is_passing(&error) => false,
                Err(source) => return Err(broken(source)),
            };
            while let Some(answer) = received.answer().map_err(broken)? {
                match answer {
                    Answer::Progress { bytes_done, bytes_total } => {
                        heard = Instant::now();
                        go_on &= progress(bytes_done, bytes_total);
                    }
                    Answer::Done(summary) => return Ok(Some(summary)),
                    Answer::Failed(why) => return Err(AskError::Refused { pid, why }),
                }
            }
            if told.is_none() && (!go_on || self.is_cancelled()) {
                // Nothing more will be said from here: that is how a move is cancelled. Whether
                // there is still anybody is found out by reading.
                let _ = stream.shutdown(std::net::Shutdown::Write);
                told = Some(Instant::now());
            }
            match told {
                Some(at) if ended || at.elapsed() >= GRACE => {
                    return Err(AskError::Cancelled { pid });
                }
                _ if ended => return Err(broken(std::io::ErrorKind::UnexpectedEof.into())),
                _ => self.check(heard)?,
            }
        }
    }

    fn is_cancelled(&self) -> bool {
        // Relaxed: a request; nothing is published with it.
        self.cancel.load(Ordering::Relaxed)
    }

    /// Whether it may be silent still, who was heard last then.
    fn check(&self, heard: Instant) -> Result<(), AskError> {
        if heard.elapsed() < self.silence {
            return Ok(());
        }
        Err(AskError::Silent { pid: self.pid, seconds: self.silence.as_secs() })
    }

    fn connect(&self) -> Result<Option<(PathBuf, UnixStream)>, AskError> {
        let pid = self.pid;
        let status = ProcDir::open(pid).and_then(|dir| dir.status());
        let Status { uid, own_pid, .. } =
            status.map_err(|errno| AskError::Process { pid, source: errno.into() })?;
        let proc = PathBuf::from(format!("/proc/{pid}"));
        for folder in folders(uid) {
            let inside = folder.strip_prefix("/").unwrap_or(&folder);
            let folder = proc.join("root").join(inside);
            let path = folder.join(socket_name(own_pid));
            match std::fs::symlink_metadata(&path) {
                Ok(found) if found.uid() != uid => continue,
                Ok(_) => {}
                Err(_) => continue,
            }
            match self.connect_below(folder, socket_name(own_pid))? {
                Ok(stream) => return Ok(Some((path, stream))),
                // Left behind by another process of this number.
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {}
                Err(source) => return Err(AskError::Socket { pid, path, source }),
            }
        }
        Ok(None)
    }

    /// Connects by way of an open folder: a socket's address has room for 107 bytes only. On a
    /// thread, because opening and connecting have no limit where a file system or the listener's
    /// queue is stuck. A thread that is given up ends when the listener takes or refuses it, or
    /// with this process.
    fn connect_below(
        &self,
        folder: PathBuf,
        name: String,
    ) -> Result<std::io::Result<UnixStream>, AskError> {
        let began = Instant::now();
        let (tell, told) = sync_channel(1);
        let connecting = move || {
            let connected = std::fs::File::open(&folder).and_then(|folder| {
                let folder = format!("/proc/self/fd/{}", folder.as_raw_fd());
                UnixStream::connect(Path::new(&folder).join(name))
            });
            // Nobody waits any longer: it is closed, and nothing was asked.
            let _ = tell.send(connected);
        };
        if let Err(error) = std::thread::Builder::new().name("pf-ask".into()).spawn(connecting) {
            return Ok(Err(error));
        }
        loop {
            match told.recv_timeout(SLICE) {
                Ok(connected) => return Ok(connected),
                Err(RecvTimeoutError::Disconnected) => {
                    return Ok(Err(std::io::ErrorKind::ConnectionAborted.into()));
                }
                Err(RecvTimeoutError::Timeout) if self.is_cancelled() => {
                    return Err(AskError::Cancelled { pid: self.pid });
                }
                Err(RecvTimeoutError::Timeout) => self.check(began)?,
            }
        }
    }
}

/// What has come and was not yet understood.
#[derive(Default)]
struct Received(Vec<u8>);

impl Received {
    /// Takes what comes within a slice. `false`: the other end has closed.
    fn more(&mut self, mut stream: &UnixStream) -> std::io::Result<bool> {
        let mut some = [0; 4096];
        let count = stream.read(&mut some)?;
        self.0.extend_from_slice(&some[..count]);
        Ok(count > 0)
    }

    /// The next answer, if it is complete.
    fn answer(&mut self) -> std::io::Result<Option<Answer>> {
        let Some(end) = self.0.iter().position(|&byte| byte == b'\n') else {
            return match self.0.len() as u64 > LINE {
                true => Err(std::io::Error::other("a line is too long")),
                false => Ok(None),
            };
        };
        let answer = read_line(&mut &self.0[..=end]);
        self.0.drain(..=end);
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::VERSION;
    use std::fs::DirBuilder;
    use std::os::unix::fs::DirBuilderExt as _;
    use std::os::unix::net::UnixListener;

    /// A process has one socket only: one after the other.
    #[test]
    fn who_says_nothing_or_never_ends_is_waited_for_no_longer_than_it_may_be() {
        let uid = pageferry_sys::peer::effective_user();
        let folder = folders(uid).pop().expect("one at least");
        // It may be there already.
        let _ = DirBuilder::new().mode(0o700).create(&folder);
        let path = folder.join(socket_name(std::process::id()));
        // Left behind by another process of this number.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("a socket");
        let request = Request { version: VERSION, from: vec![], to: 0, stall_budget_us: None };
        let cancel = AtomicBool::new(false);
        let ask = |silence, progress: &mut dyn FnMut() -> bool| {
            let pid = std::process::id();
            Asking { pid, cancel: &cancel, silence }.ask(&request, |_, _| progress())
        };
        // Nobody takes the connection, and then nobody cares for it.
        let silent = ask(Duration::ZERO, &mut || true);
        assert!(matches!(silent, Err(AskError::Silent { .. })), "{silent:?}");
        drop(listener.accept().expect("what was given up"));

        let hour = Duration::from_secs(3600);
        std::thread::scope(|scope| {
            // Told to stop, it goes on telling its progress until nobody listens.
            let endless = scope.spawn(|| {
                let (mut stream, _) = listener.accept().expect("a connection");
                let answer = Answer::Progress { bytes_done: 0, bytes_total: 1 };
                let answer = line(&answer).expect("JSON");
                while stream.write_all(&answer).is_ok() {}
            });
            let mut told = 0;
            let cancelled = ask(hour, &mut || {
                told += 1;
                told < 3
            });
            assert!(matches!(cancelled, Err(AskError::Cancelled { .. })), "{cancelled:?}");
            endless.join().expect("it sees that nobody listens");
            cancel.store(true, Ordering::Relaxed);
            let cancelled = ask(hour, &mut || true);
            assert!(matches!(cancelled, Err(AskError::Cancelled { .. })), "{cancelled:?}");
        });
        std::fs::remove_file(&path).expect("ours");
    }

    #[test]
    fn an_answer_is_understood_whatever_pieces_it_comes_in() {
        let mut received = Received::default();
        let lines =
            [Answer::Failed("no".into()), Answer::Progress { bytes_done: 1, bytes_total: 2 }];
        let text: Vec<u8> = lines.iter().flat_map(|l| line(l).expect("JSON")).collect();
        let mut answers = Vec::new();
        for byte in text {
            received.0.push(byte);
            answers.extend(received.answer().expect("well formed"));
        }
        assert_eq!(answers, lines);
        let long = usize::try_from(LINE).expect("64 KiB") + 1;
        received.0.resize(long, b' ');
        assert!(received.answer().is_err());
    }
}
