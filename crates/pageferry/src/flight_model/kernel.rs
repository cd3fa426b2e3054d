//! What matters of the kernel, for the model of the flight table: see the module above.

use loom::sync::{Condvar, Mutex, MutexGuard};
use pageferry_sys::uffd::Event;
use std::collections::VecDeque;
use std::ops::Range;

pub(super) const PAGE: usize = 4096;
/// Address of page 0; not 0, which means "no flight".
pub(super) const BASE: usize = 1 << 20;
pub(super) const PAGES: usize = 2;

pub(super) fn address(page: usize) -> usize {
    BASE + page * PAGE
}
pub(super) fn index(address: usize) -> usize {
    (address - BASE) / PAGE
}
pub(super) fn range(pages: Range<usize>) -> Range<usize> {
    address(pages.start)..address(pages.end)
}

#[derive(Clone, Copy, Debug, Default)]
struct Page {
    word: Option<u64>,
    protected: bool,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pages: [Page; PAGES],
    /// Where detached pages are.
    slots: [Option<u64>; PAGES],
    /// Messages not yet read, with the number of their sender.
    pub(super) queue: VecDeque<(usize, Event)>,
    /// Who sleeps at which page.
    asleep: Vec<(usize, usize)>,
    senders: usize,
    /// Events under way (`mmap_changing`).
    changing: usize,
    pub(super) stop: bool,
}

impl State {
    /// What an access would have to wait for.
    fn fault(&self, page: usize, write: bool) -> Option<Event> {
        let Page { word, protected } = self.pages[page];
        let addr = address(page);
        match word {
            None => Some(Event::Fault { addr, write, protected: false }),
            Some(_) if write && protected => Some(Event::Fault { addr, write, protected }),
            Some(_) => None,
        }
    }
}

/// `EAGAIN`: an event waits to be read.
#[derive(Debug)]
pub(super) struct Again;

#[derive(Debug, Default)]
pub(super) struct Kernel {
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
}

impl Kernel {
    pub(super) fn new(words: [Option<u64>; PAGES]) -> Self {
        let pages = words.map(|word| Page { word, protected: false });
        Self { state: Mutex::new(State { pages, ..State::default() }), changed: Condvar::new() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics here")
    }
    pub(super) fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).expect("no thread panics here")
    }

    /// A load, or a store of `write`, by the program; returns what is there afterwards.
    pub(super) fn access(&self, page: usize, write: Option<u64>) -> u64 {
        loop {
            let mut state = self.lock();
            let Some(event) = state.fault(page, write.is_some()) else {
                let word = write.or(state.pages[page].word);
                state.pages[page].word = word;
                return word.expect("mapped, or it would fault");
            };
            drop(state);
            let mut state = self.lock();
            state.senders += 1;
            let me = state.senders;
            state.queue.push_back((me, event));
            state.asleep.push((me, page));
            self.changed.notify_all();
            drop(state);
            // The message can be read here, before it turns out that nobody waits.
            let mut state = self.lock();
            if state.fault(page, write.is_some()).is_some() {
                while state.asleep.iter().any(|(who, _)| *who == me) {
                    state = self.wait(state);
                }
            }
            state.asleep.retain(|(who, _)| *who != me);
            state.queue.retain(|(who, _)| *who != me);
        }
    }

    /// `madvise(MADV_DONTNEED)`.
    pub(super) fn discard(&self, page: usize) {
        let mut state = self.lock();
        state.changing += 1;
        state.senders += 1;
        let me = state.senders;
        let Range { start, end } = range(page..page + 1);
        state.queue.push_back((me, Event::Remove { start, end }));
        self.changed.notify_all();
        while state.queue.iter().any(|(who, _)| *who == me) {
            state = self.wait(state);
        }
        state.changing -= 1;
        self.changed.notify_all();
        drop(state);
        self.lock().pages[page] = Page::default();
    }

    /// Waits until no event is under way: what the engine's back-off does.
    pub(super) fn settle(&self) {
        let mut state = self.lock();
        while state.changing > 0 {
            state = self.wait(state);
        }
    }

    pub(super) fn read(&self) -> Vec<Event> {
        let mut state = self.lock();
        let read = state.queue.drain(..).map(|(_, event)| event).collect();
        self.changed.notify_all();
        read
    }

    fn wake_in(&self, state: &mut State, page: usize) {
        let State { asleep, queue, .. } = state;
        asleep.retain(|&(who, at)| {
            if at == page {
                // Whoever is woken takes its message back.
                queue.retain(|(sender, _)| *sender != who);
            }
            at != page
        });
        self.changed.notify_all();
    }

    pub(super) fn wake(&self, page: usize) {
        self.wake_in(&mut self.lock(), page);
    }

    pub(super) fn protect(&self, page: usize, on: bool) -> Result<(), Again> {
        let mut state = self.lock();
        if state.changing > 0 {
            return Err(Again);
        }
        if state.pages[page].word.is_some() {
            state.pages[page].protected = on;
        }
        if !on {
            self.wake_in(&mut state, page);
        }
        Ok(())
    }

    /// False also where something is there already (`EEXIST`).
    pub(super) fn put(&self, page: usize, word: u64) -> Result<bool, Again> {
        let mut state = self.lock();
        if state.changing > 0 {
            return Err(Again);
        }
        if state.pages[page].word.is_some() {
            return Ok(false);
        }
        state.pages[page] = Page { word: Some(word), protected: false };
        self.wake_in(&mut state, page);
        Ok(true)
    }

    /// Moves the page to its slot; false if nothing is there (`ENOENT`).
    pub(super) fn detach(&self, page: usize) -> Result<bool, Again> {
        let mut state = self.lock();
        if state.changing > 0 {
            return Err(Again);
        }
        let Some(word) = state.pages[page].word else { return Ok(false) };
        state.slots[page] = Some(word);
        state.pages[page] = Page::default();
        Ok(true)
    }

    pub(super) fn look(&self, page: usize) -> Option<u64> {
        self.lock().pages[page].word
    }
    pub(super) fn slot(&self, page: usize) -> u64 {
        self.lock().slots[page].expect("detached before")
    }
    pub(super) fn is_missing(&self, address: usize) -> bool {
        self.look(index(address)).is_none()
    }
}
