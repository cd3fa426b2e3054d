//! The queue that workers take pieces from: new ones from the walk, and those that failed once
//! their time has come.
//!
//! What always holds: the queue is done only when the walk is over, nothing waits to be tried
//! again, nobody works, and no new process has appeared. It never spins: who finds nothing to do
//! sleeps.

use super::control::Control;
use super::piece::Piece;
use super::targets::Process;
use super::walk::Walk;
use crate::sync::{Condvar, Mutex};
use pageferry_sys::process::ProcessKernel;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Spans that wait to be tried again at most, about 3 MiB.
const MOST_SPANS: usize = 1 << 16;
/// The longest sleep before a look at whether the move was cancelled.
const NAP: Duration = Duration::from_millis(20);

#[derive(Debug)]
struct State {
    walk: Walk,
    walked: bool,
    /// By when they are due.
    later: BTreeMap<(Duration, u64), Piece>,
    spans: usize,
    counter: u64,
    busy: usize,
    done: bool,
}

#[derive(Debug)]
pub(super) struct Work {
    kernel: Arc<dyn ProcessKernel>,
    control: Arc<Control>,
    state: Mutex<State>,
    changed: Condvar,
}

/// A piece that is being worked on. The queue is not done before it is dropped.
#[derive(Debug)]
pub(super) struct Taken<'w> {
    pub(super) piece: Piece,
    work: &'w Work,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.work.state.lock().busy -= 1;
        self.work.changed.notify_all();
    }
}

impl Work {
    pub(super) fn new(kernel: Arc<dyn ProcessKernel>, control: Arc<Control>, walk: Walk) -> Self {
        let state = State {
            walk,
            walked: true,
            later: BTreeMap::new(),
            spans: 0,
            counter: 0,
            busy: 0,
            done: false,
        };
        Self { kernel, control, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The next piece; `None`: the move is over.
    pub(super) fn next(&self) -> Option<Taken<'_>> {
        let mut state = self.state.lock();
        loop {
            if state.done || self.control.is_cancelled() {
                return None;
            }
            let now = self.kernel.now();
            let due = state.later.first_key_value().map(|((due, _), _)| *due);
            let mut piece = None;
            if due.is_some_and(|due| due <= now) {
                piece = state.later.pop_first().map(|(_, piece)| piece);
                state.spans -= piece.as_ref().map_or(0, |p| p.spans.len());
            } else if !state.walked {
                piece = state.walk.next_piece();
                state.walked = piece.is_none();
            }
            if let Some(piece) = piece {
                state.busy += 1;
                return Some(Taken { piece, work: self });
            }
            if let Some(due) = due {
                drop(state);
                self.kernel.sleep(due.saturating_sub(now).min(NAP));
                state = self.state.lock();
            } else if state.busy > 0 {
                state = self.changed.wait_for(state, NAP);
            } else if state.walk.find() {
                state.walked = false;
                // Relaxed: a number for display.
                self.control.total.store(state.walk.resident, Ordering::Relaxed);
            } else {
                state.done = true;
                self.changed.notify_all();
            }
        }
    }

    /// Keeps a piece to be tried again; gives it back where there is no room for it.
    pub(super) fn try_later(&self, piece: Piece) -> Result<(), Piece> {
        let mut state = self.state.lock();
        if state.spans + piece.spans.len() > MOST_SPANS {
            return Err(piece);
        }
        state.spans += piece.spans.len();
        state.counter += 1;
        let key = (piece.due, state.counter);
        state.later.insert(key, piece);
        Ok(())
    }

    /// Pages of a process were not there any more: if it has executed another program, that one
    /// is looked at too.
    pub(super) fn look_again(&self, process: &Arc<Process>) {
        if process.is_another() {
            let mut state = self.state.lock();
            state.walk.look_again(process);
            state.walked = false;
        }
    }

    /// Whether nothing more will come.
    pub(super) fn is_done(&self) -> bool {
        self.state.lock().done || self.control.is_cancelled()
    }

    /// Waits until something has changed, or for `time`.
    pub(super) fn wait(&self, time: Duration) {
        let state = self.state.lock();
        if !state.done {
            drop(self.changed.wait_for(state, time));
        }
    }

    /// The pieces that were still to be tried again.
    pub(super) fn drain(&self) -> Vec<Piece> {
        std::mem::take(&mut self.state.lock().later).into_values().collect()
    }

    /// The walk, as far as it came.
    pub(super) fn into_walk(self) -> Walk {
        self.state.into_inner().walk
    }
}
