//! The progress of a move, where it may be shown.

use std::time::Duration;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pageferry::process::{ProcessProgress, Stage};

use crate::output::Context;
use crate::size::{self, size};

/// How often it is brought up to date.
pub(super) const EVERY: Duration = Duration::from_millis(100);

pub(super) fn new(context: &Context) -> anyhow::Result<ProgressBar> {
    let target = match context.progress {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let style = ProgressStyle::with_template("{msg:<44} {wide_bar} {percent:>3} %")
        .context("progress bar")?;
    Ok(ProgressBar::with_draw_target(Some(1), target).with_style(style))
}

/// Shows how far a move by the kernel is.
pub(super) fn show(bar: &ProgressBar, progress: &ProcessProgress) {
    if let Stage::Waiting { left, of } = progress.stage {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        bar.set_length(milliseconds(of).max(1));
        bar.set_position(milliseconds(of.saturating_sub(left)));
        bar.set_message(waiting(left));
        return;
    }
    bar.set_length(progress.bytes_total.max(1));
    bar.set_position(progress.bytes_looked_at);
    bar.set_message(match progress.stage {
        Stage::Marking => "marking pages, to see which are used".into(),
        _ => message(progress.bytes_moved, progress.rate(), progress.eta()),
    });
}

/// `waiting to see which pages are used, 12 s`.
fn waiting(left: Duration) -> String {
    format!("waiting to see which pages are used, {:.0} s", left.as_secs_f64())
}

/// `1.2 GiB moved, 1.80 GB/s, 12 s left`.
fn message(moved: u64, rate: f64, eta: Option<Duration>) -> String {
    let left = eta.map_or_else(String::new, |eta| format!(", {:.0} s left", eta.as_secs_f64()));
    format!("{} moved, {}{left}", size(moved), size::rate(rate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_tells_rate_and_time_left() {
        let left = Some(Duration::from_secs(12));
        assert_eq!(message(3 << 29, 1.8e9, left), "1.5 GiB moved, 1.80 GB/s, 12 s left");
        assert_eq!(message(0, 0.0, None), "0 B moved, 0.0 kB/s");
        assert_eq!(message(1 << 20, 4.2e6, None), "1 MiB moved, 4.2 MB/s");
        assert_eq!(
            waiting(Duration::from_millis(11_900)),
            "waiting to see which pages are used, 12 s"
        );
    }
}
