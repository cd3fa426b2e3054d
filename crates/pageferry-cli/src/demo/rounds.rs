//! The measured part, in rounds: both ways at full speed; then, for what is felt, nothing moves,
//! moves, burns and moves one by one. Every other round goes backwards, so that whatever drifts
//! falls on all of them alike.

use super::burn::{Control, Watch};
use super::load::{Job, Load, Schedule};
use super::moving::{Followed, Mover, Plan, Way};
use super::progress::Progress;
use super::tally::{Phase, Tally};
use crate::cancel;
use anyhow::Context as _;
use pageferry::RegionAlloc;
use std::time::{Duration, Instant};

/// Seconds of a pair of rounds at most, there and back.
const PAIR: u32 = 6;
/// How long the threads look for their rate.
const WARM_UP: Duration = Duration::from_millis(400);

/// What a phase was in one round.
#[derive(Debug)]
pub(super) struct Slice {
    pub(super) phase: Phase,
    pub(super) tally: Tally,
    pub(super) followed: Option<Followed>,
}

/// What was the same in all slices.
#[derive(Debug, Default)]
pub(super) struct Equal {
    /// Operations of a slice, of all threads of a kind ([`super::tally::Kind::ALL`]).
    pub(super) operations: [u64; 2],
    pub(super) plan: Plan,
}

/// Runs rounds for about so many seconds, or until the user cancels; `each` is given the slices of
/// every round that was done in whole.
pub(super) fn run(
    load: &Load<'_, RegionAlloc>,
    threads: [usize; 2],
    mover: &mut Mover,
    control: &mut Control,
    (seconds, progress): (u32, &Progress),
    mut each: impl FnMut(Vec<Slice>) -> anyhow::Result<()>,
) -> anyhow::Result<Equal> {
    let total = Duration::from_secs(seconds.into());
    let pairs = seconds.div_ceil(PAIR);
    // What is felt is measured for twice as long as full speed: a pair is 2 * (2 + 4 * 2) shares.
    let share = total / pairs / 20;
    let start = Instant::now();
    let length = u64::try_from(total.as_millis()).unwrap_or(u64::MAX);
    let bar = progress.begin("warming up", length);
    let glance = || {
        let passed = start.elapsed().as_millis();
        bar.set_position(u64::try_from(passed).unwrap_or(length).min(length));
    };
    let warm = || {
        rest(WARM_UP, &glance);
        Ok(())
    };
    let ((), warm_up) = load.slice(Job::WarmUp, warm)?;
    let Some(warm_up) = warm_up else { return Ok(Equal::default()) };
    let schedule = |shares| Schedule::new(&warm_up, share * shares);
    let (short, long) = (schedule(1), schedule(2));
    // Beside the load as it will be.
    let usual = Job::Slice { schedule: short, seed: 0 };
    let (pace, _) = load.slice(usual, || mover.find_pace(glance))?;
    let plan = mover.plan(share * 2, pace)?;
    for pair in 0..pairs {
        // A slow machine takes longer for the same work, so it does fewer rounds.
        if pair > 0 && start.elapsed() >= total {
            break;
        }
        for backwards in [false, true] {
            let mut phases = Phase::ALL;
            if backwards {
                phases.reverse();
            }
            let seed = u64::from(pair) * 2 + u64::from(backwards) + 1;
            let mut round = Vec::with_capacity(phases.len());
            for phase in phases {
                bar.set_message(match phase {
                    Phase::FullSpeed => "moving the index at full speed",
                    Phase::FullSpeedOneByOne => "one folio at a time, full speed",
                    Phase::Still => "nothing moves",
                    Phase::Moving => "moving the index",
                    Phase::Burning => "burning as much CPU time",
                    Phase::OneByOne => "moving it one folio at a time",
                });
                let is_short = matches!(phase, Phase::FullSpeed | Phase::FullSpeedOneByOne);
                let job = Job::Slice { schedule: if is_short { short } else { long }, seed };
                let watch = Watch::begin(load.cpu());
                let (followed, tally) = load.slice(job, || {
                    let busy = || load.is_busy();
                    match phase {
                        Phase::FullSpeed => mover.full_speed(busy, glance)?,
                        Phase::FullSpeedOneByOne => mover.full_speed_one_by_one(busy, glance)?,
                        Phase::Still => {}
                        Phase::Burning => control.burn(&plan.dues)?,
                        Phase::Moving => return mover.follow(&plan, Way::Engine, glance).map(Some),
                        Phase::OneByOne => {
                            return mover.follow(&plan, Way::OneByOne, glance).map(Some);
                        }
                    }
                    Ok(None)
                })?;
                match phase {
                    Phase::Moving => control.moved(watch.end(load.cpu())),
                    Phase::Burning => control.burnt(watch.end(load.cpu())),
                    _ => {}
                }
                glance();
                let Some(tally) = tally else {
                    return Ok(equal(threads, long, plan));
                };
                round.push(Slice { phase, tally, followed });
            }
            each(round).context("adding up a round")?;
        }
    }
    bar.finish_and_clear();
    Ok(equal(threads, long, plan))
}

fn equal(threads: [usize; 2], long: Schedule, plan: Plan) -> Equal {
    let all = |kind: usize| threads[kind] as u64 * u64::from(long.operations[kind]);
    Equal { operations: [all(0), all(1)], plan }
}

/// Lets time pass, in steps short enough to notice that the user cancels.
fn rest(time: Duration, glance: &impl Fn()) {
    const STEP: Duration = Duration::from_millis(50);
    let end = Instant::now() + time;
    while !cancel::requested() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        std::thread::sleep(left.min(STEP));
        glance();
    }
}
