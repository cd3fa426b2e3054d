//! The asking side.

use super::{Answer, Request, Summary, folders, line, read_line, socket_name};
use pageferry_sys::peer::Peer;
use pageferry_sys::procfs::{ProcDir, Status};
use std::io::{BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A listener that says nothing for so long is stuck: while it moves it tells its progress several
/// times a second.
const SILENCE: Duration = Duration::from_secs(30);

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
///
/// # Errors
/// [`AskError`].
pub fn ask(
    pid: u32,
    request: &Request,
    mut progress: impl FnMut(u64, u64) -> bool,
) -> Result<Option<Summary>, AskError> {
    let Some((path, mut stream)) = connect(pid)? else { return Ok(None) };
    let broken = |source| AskError::Broken { pid, source };
    let peer = Peer::of(&stream).map_err(|errno| broken(errno.into()))?;
    if u32::try_from(peer.pid) != Ok(pid) {
        return Err(AskError::Impostor { pid, path, other: peer.pid });
    }
    stream.set_read_timeout(Some(SILENCE)).map_err(broken)?;
    stream.write_all(&line(request).map_err(broken)?).map_err(broken)?;
    let mut reader = BufReader::new(&stream);
    loop {
        match read_line(&mut reader).map_err(broken)? {
            Some(Answer::Progress { bytes_done, bytes_total }) => {
                if !progress(bytes_done, bytes_total) {
                    // Nothing more will be said from here: that is how a move is cancelled.
                    stream.shutdown(std::net::Shutdown::Write).map_err(broken)?;
                }
            }
            Some(Answer::Done(summary)) => return Ok(Some(summary)),
            Some(Answer::Failed(why)) => return Err(AskError::Refused { pid, why }),
            None => return Err(broken(std::io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

fn connect(pid: u32) -> Result<Option<(PathBuf, UnixStream)>, AskError> {
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
        match connect_below(&folder, &path) {
            Ok(stream) => return Ok(Some((path, stream))),
            // Left behind by another process of this number.
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {}
            Err(source) => return Err(AskError::Socket { pid, path, source }),
        }
    }
    Ok(None)
}

/// Connects by way of an open folder: a socket's address has room for 107 bytes only.
fn connect_below(folder: &Path, path: &Path) -> std::io::Result<UnixStream> {
    let folder = std::fs::File::open(folder)?;
    let name = path.file_name().unwrap_or_default();
    UnixStream::connect(Path::new(&format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name))
}
