//! The measured part: rest, move, burn and move one by one, in turn, several times, so that
//! whatever else the machine does falls on all of them alike.

use super::burn::{Control, Watch};
use super::load::Load;
use super::moving::Mover;
use super::progress::Progress;
use super::tally::Phase;
use crate::cancel;
use pageferry::RegionAlloc;
use std::time::{Duration, Instant};

/// Seconds of a round (rest, move, burn, move one by one) at most; there are three at least where
/// there is time for them.
const ROUND: u32 = 4;
/// How long the threads look for their rate.
const WARM_UP: Duration = Duration::from_millis(400);

/// Runs the rounds for about so many seconds, or until the user cancels.
pub(super) fn run(
    load: &Load<'_, RegionAlloc>,
    mover: &mut Mover,
    control: &mut Control,
    seconds: u32,
    progress: &Progress,
) -> anyhow::Result<()> {
    let total = Duration::from_secs(seconds.into());
    let rounds = (seconds / ROUND).max(seconds.min(3));
    let phases = u32::try_from(Phase::MEASURED.len()).unwrap_or(1);
    let slice = total / (rounds * phases);
    let start = Instant::now() + WARM_UP;
    let length = u64::try_from(total.as_millis()).unwrap_or(u64::MAX);
    let bar = progress.begin("warming up", length);
    let glance = || {
        let passed = start.elapsed().as_millis();
        bar.set_position(u64::try_from(passed).unwrap_or(length).min(length));
    };
    rest(WARM_UP, &glance);
    for _ in 0..rounds {
        for phase in Phase::MEASURED {
            if cancel::requested() {
                return Ok(());
            }
            bar.set_message(match phase {
                Phase::Moving => "moving the index",
                Phase::Burning => "burning as much CPU time",
                Phase::OneByOne => "moving it one folio at a time",
                _ => "nothing moves",
            });
            load.enter(phase);
            let watch = Watch::begin(load.cpu());
            let end = Instant::now() + slice;
            match phase {
                Phase::Moving => {
                    mover.move_until(end, glance)?;
                    control.moved(watch.end(load.cpu()));
                }
                Phase::Burning => {
                    control.burn_until(end, || rest(slice, &glance))?;
                    control.burnt(watch.end(load.cpu()));
                }
                Phase::OneByOne => mover.one_by_one_until(end, glance)?,
                _ => rest(slice, &glance),
            }
        }
    }
    bar.finish_and_clear();
    Ok(())
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
