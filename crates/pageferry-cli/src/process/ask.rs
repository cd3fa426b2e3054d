//! Asking programs that use the library to move their regions themselves.
//!
//! What always holds: of a program that has been asked, nothing but the program itself moves
//! anonymous memory. What it has of that is regions, moved, and the frames of its engine's pools,
//! whose nodes the engine relies on. That holds of one that was given up, too: it may still be at it.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use indicatif::ProgressBar;
use pageferry::control::{self, AskError, Request, Summary};
use pageferry::process::Target;
use pageferry_sys::procfs::{self, ProcDir};

use crate::cancel;
use crate::size::size;

/// A program that was asked.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) pid: u32,
    /// What it did, or why it did not.
    pub(super) answer: Result<Summary, String>,
}

/// What came of asking.
#[derive(Debug, Default)]
pub(super) struct Answers {
    pub(super) asked: Vec<Asked>,
    /// Everybody else.
    pub(super) others: Vec<u32>,
    /// Sockets that there are and that could not be used.
    pub(super) remarks: Vec<String>,
}

/// Asks every one of the processes that listens, one after the other.
pub(super) fn all(pids: Vec<u32>, wish: &Request, bar: &ProgressBar) -> Answers {
    let mut answers = Answers::default();
    for pid in pids {
        let progress = |done, total: u64| {
            bar.set_length(total.max(1));
            bar.set_position(done);
            bar.set_message(format!("process {pid} moves its regions, {}", size(total)));
            true
        };
        // Who comes later finds the request to stop by himself.
        if cancel::requested() {
            answers.others.push(pid);
            continue;
        }
        match control::ask_until(pid, wish, cancel::requested_flag(), progress) {
            Ok(Some(summary)) => answers.asked.push(Asked { pid, answer: Ok(summary) }),
            Err(AskError::Refused { why, .. }) => {
                answers.asked.push(Asked { pid, answer: Err(why) });
            }
            Err(
                error @ (AskError::Broken { .. }
                | AskError::Silent { .. }
                | AskError::Cancelled { .. }),
            ) => {
                answers.asked.push(Asked { pid, answer: Err(error.to_string()) });
            }
            Err(error @ (AskError::Socket { .. } | AskError::Impostor { .. })) => {
                answers.remarks.push(format!("{error}; moved from outside"));
                answers.others.push(pid);
            }
            // Most do not listen; one that has ended, or is not ours, is found out about later.
            Ok(None) | Err(_) => answers.others.push(pid),
        }
    }
    answers
}

/// The processes that are meant, and those of them that are known already.
#[derive(Debug)]
pub(super) struct Crowd<'a> {
    targets: &'a [Target],
    children: bool,
    /// When each began: a number may be given to another process.
    known: HashMap<u32, u64>,
}

impl<'a> Crowd<'a> {
    pub(super) fn new(targets: &'a [Target], children: bool) -> Self {
        Self { targets, children, known: HashMap::new() }
    }

    /// Those who were not there at the last look.
    pub(super) fn look(&mut self) -> Vec<u32> {
        let mut pids = everybody(self.targets, self.children);
        pids.retain(|pid| match ProcDir::open(*pid).and_then(|dir| dir.status()) {
            Ok(status) => self.known.insert(*pid, status.started) != Some(status.started),
            // Who has ended is told of once, if it was named.
            Err(_) => self.known.insert(*pid, 0).is_none(),
        });
        pids.into_iter().collect()
    }
}

/// The processes that are meant, as they are now.
fn everybody(targets: &[Target], children: bool) -> BTreeSet<u32> {
    let mut pids = BTreeSet::new();
    for target in targets {
        match target {
            Target::Pid(pid) => {
                pids.insert(*pid);
            }
            Target::Cgroup(path) => pids.extend(members(path)),
            // Another kind of target is not asked.
            _ => {}
        }
    }
    if children {
        let parents = procfs::parents().unwrap_or_default();
        let mut known = 0;
        while known < pids.len() {
            known = pids.len();
            let born = parents.iter().filter(|(_, parent)| pids.contains(parent));
            let born: Vec<u32> = born.map(|(child, _)| *child).collect();
            pids.extend(born);
        }
    }
    pids
}

fn members(path: &Path) -> Vec<u32> {
    let mut pids = Vec::new();
    // The move itself says what is wrong with a group.
    if let Some(group) = procfs::find_group(path) {
        let _ = procfs::members(&group, &mut pids);
    }
    pids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_found_once_and_who_does_not_listen_is_left_to_the_kernel()
    -> Result<(), Box<dyn std::error::Error>> {
        let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
        let me = [Target::Pid(std::process::id())];
        let alone = everybody(&me, false);
        let family = everybody(&me, true);
        let wish =
            Request { version: control::VERSION, from: vec![], to: 0, stall_budget_us: None };
        let mut crowd = Crowd::new(&me, true);
        let answers = all(crowd.look(), &wish, &ProgressBar::hidden());
        let later = std::process::Command::new("sleep").arg("60").spawn();
        let joined = crowd.look();
        child.kill()?;
        child.wait()?;
        let mut later = later?;
        later.kill()?;
        later.wait()?;
        // Other tests have children too.
        assert!(joined.contains(&later.id()) && !joined.contains(&child.id()), "{joined:?}");
        assert!(!alone.contains(&child.id()) && family.contains(&child.id()));
        assert!(answers.asked.is_empty(), "{answers:?}");
        assert!(answers.others.contains(&child.id()), "{answers:?}");
        Ok(())
    }
}
