//! Being asked by others: a socket on which a program that uses this library can be told to move
//! its regions, with the library's own copies and within a stall budget, instead of having them
//! moved from outside by `move_pages(2)`.
//!
//! A program opts in with [`Engine::listen`](crate::Engine::listen). Who asks uses [`ask`] or [`ask_until`]; the
//! command `pageferry move --pid` does.
//!
//! # The socket
//! A stream socket `PID.sock` (the number that the process has in its own namespace) in the first
//! of these folders that is there or can be made, and that belongs to the process's user, with no
//! access for anybody else: `/run/pageferry` (root only), `/run/user/UID/pageferry`,
//! `/tmp/pageferry-UID`. The socket has mode 0600, and the listener answers only its own user and
//! root (`SO_PEERCRED`). Who asks looks below `/proc/PID/root`, so that containers are reached, and
//! believes an answer only if the process at the other end is the one asked for.
//!
//! # The protocol
//! One request a connection, as a line of JSON ([`Request`]); the answers are lines of JSON
//! ([`Answer`]): progress a few times a second, then a summary or an error. Closing the connection
//! cancels the move between two batches. Lines are at most [`LINE`] bytes.

mod client;
mod server;

pub use client::{AskError, ask, ask_until};
pub use server::{ListenError, Listener};

use crate::report::Report;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Read as _};
use std::path::PathBuf;
use std::time::Duration;

/// The version of the protocol spoken here. A listener refuses others.
pub const VERSION: u32 = 1;
/// Bytes of a line at most.
pub const LINE: u64 = 64 << 10;
/// How often progress is told.
const TICK: Duration = Duration::from_millis(100);

/// What is asked of a program: to move all its regions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// Only pages on these nodes; none given: on whichever.
    #[serde(default)]
    pub from: Vec<u32>,
    /// The node to go to.
    pub to: u32,
    /// How long an access may wait, in microseconds (10 to 10,000,000); none: the default.
    #[serde(default)]
    pub stall_budget_us: Option<u64>,
}

/// What a program answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// How far it is.
    Progress {
        /// Bytes looked after so far.
        bytes_done: u64,
        /// Bytes in all.
        bytes_total: u64,
    },
    /// The move has ended.
    Done(Summary),
    /// It did not begin, or broke off; all pages are intact.
    Failed(String),
}

/// Bytes with the same outcome.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// What became of them, in words.
    pub outcome: String,
    /// They have been moved.
    pub moved: bool,
    /// They are where they were to go, or there is nothing to move.
    pub settled: bool,
    /// How many.
    pub bytes: u64,
}

/// What a move of all regions came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Regions looked at.
    pub regions: u32,
    /// Bytes by outcome, the most first.
    pub shares: Vec<Share>,
    /// Time that it took, in seconds.
    pub elapsed_s: f64,
    /// CPU time that it took, in seconds.
    pub cpu_s: f64,
    /// Holes (from detach to attach, when accesses wait).
    pub holes: u64,
    /// Their 99th percentile, in microseconds: the worst of the regions.
    pub hole_p99_us: f64,
    /// The longest, in microseconds.
    pub hole_max_us: f64,
    /// It was cancelled.
    pub cancelled: bool,
}

impl Summary {
    /// Bytes moved.
    pub fn bytes_moved(&self) -> u64 {
        self.shares.iter().filter(|share| share.moved).map(|share| share.bytes).sum()
    }

    fn add(&mut self, report: &Report) {
        let us = |d: Duration| d.as_secs_f64() * 1e6;
        self.regions += 1;
        for (outcome, bytes) in report.by_outcome() {
            let name = outcome.to_string();
            match self.shares.iter_mut().find(|share| share.outcome == name) {
                Some(share) => share.bytes += bytes,
                None => self.shares.push(Share {
                    outcome: name,
                    moved: outcome == crate::Outcome::Moved,
                    settled: outcome.is_settled(),
                    bytes,
                }),
            }
        }
        self.shares.sort_by_key(|share| std::cmp::Reverse(share.bytes));
        self.elapsed_s += report.elapsed.as_secs_f64();
        self.cpu_s += report.cpu_time().as_secs_f64();
        self.holes += report.holes.count();
        self.hole_p99_us = self.hole_p99_us.max(us(report.holes.quantile(0.99)));
        self.hole_max_us = self.hole_max_us.max(us(report.holes.longest));
        self.cancelled |= report.cancelled;
    }
}

/// Where the socket of a process of this user may be, in the order in which they are tried.
fn folders(uid: u32) -> Vec<PathBuf> {
    let system = (uid == 0).then(|| PathBuf::from("/run/pageferry"));
    let own = [format!("/run/user/{uid}/pageferry"), format!("/tmp/pageferry-{uid}")];
    system.into_iter().chain(own.map(PathBuf::from)).collect()
}

fn socket_name(pid: u32) -> String {
    format!("{pid}.sock")
}

/// Reads a line of JSON. `None`: the other end has closed.
fn read_line<T: serde::de::DeserializeOwned>(
    reader: &mut impl BufRead,
) -> std::io::Result<Option<T>> {
    let mut line = Vec::new();
    reader.take(LINE).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(std::io::Error::other("a line is cut short, or too long"));
    }
    serde_json::from_slice(&line).map(Some).map_err(std::io::Error::other)
}

fn line(message: &impl Serialize) -> std::io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// Whether a read that failed may be tried again.
fn is_passing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | Interrupted)
}
