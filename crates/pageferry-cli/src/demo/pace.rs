//! A common pace: the same steps at the same times, whoever takes them.
//!
//! What is felt of two moves can be compared only if both move as many bytes in as much time. So
//! each step has a moment before which it may not begin; who is faster waits for it. Who falls
//! behind goes on without pauses until it has caught up, and its late steps are counted.

use crate::cancel;
use std::time::{Duration, Instant};

/// How long somebody who waits is deaf to a user who cancels.
const NAP: Duration = Duration::from_millis(50);

/// What steps are timed by, from the first one's moment.
pub(super) trait Clock {
    fn now(&self) -> Duration;
    fn sleep(&self, time: Duration);
}

/// The clock on the wall, from a moment on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wall(pub(super) Instant);

impl Clock for Wall {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// How the pace was kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Kept {
    /// Steps taken.
    pub(super) steps: u64,
    /// Of those, steps that began when the next one was due already.
    pub(super) late: u64,
}

/// Takes step after step, none before it is due (`dues` ascend), until all are taken or the user
/// cancels.
pub(super) fn keep<E>(
    dues: &[Duration],
    clock: &impl Clock,
    mut step: impl FnMut(usize) -> Result<(), E>,
) -> Result<Kept, E> {
    let mut kept = Kept::default();
    for (number, due) in dues.iter().enumerate() {
        let mut now = clock.now();
        while now < *due && !cancel::requested() {
            clock.sleep((*due - now).min(NAP));
            now = clock.now();
        }
        if cancel::requested() {
            break;
        }
        kept.steps += 1;
        kept.late += u64::from(dues.get(number + 1).is_some_and(|next| now >= *next));
        step(number)?;
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::convert::Infallible;

    /// A clock that stands still but for who sleeps or works.
    #[derive(Default)]
    struct Still(Cell<Duration>);

    impl Clock for Still {
        fn now(&self) -> Duration {
            self.0.get()
        }

        fn sleep(&self, time: Duration) {
            self.0.set(self.0.get() + time);
        }
    }

    const MS: Duration = Duration::from_millis(1);

    /// When each step began, and how the pace was kept, by one who needs so long for each step.
    fn taken(work: &[u32]) -> (Vec<u128>, Kept) {
        let (clock, mut began) = (Still::default(), Vec::new());
        let dues: Vec<Duration> = (0..5).map(|n| MS * 10 * n).collect();
        let kept = keep(&dues, &clock, |number| {
            began.push(clock.now().as_millis());
            clock.sleep(MS * work[number]);
            Ok::<_, Infallible>(())
        });
        let Ok(kept) = kept;
        (began, kept)
    }

    #[test]
    fn no_step_begins_before_it_is_due_however_fast_the_steps_are() {
        let fast = taken(&[0; 5]);
        assert_eq!(fast, (vec![0, 10, 20, 30, 40], Kept { steps: 5, late: 0 }));
        assert_eq!(taken(&[9; 5]), fast, "who needs most of the time keeps the same pace");
    }

    #[test]
    fn who_falls_behind_catches_up_without_pauses_and_its_late_steps_are_counted() {
        let (began, kept) = taken(&[35, 1, 1, 1, 1]);
        assert_eq!(began, [0, 35, 36, 37, 40]);
        assert_eq!(kept, Kept { steps: 5, late: 2 });
    }
}
