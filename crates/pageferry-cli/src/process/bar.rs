//! The progress of a move, where it may be shown.

use std::time::Duration;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pageferry::process::ProcessProgress;

use crate::output::Context;
use crate::topology::size;

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
    bar.set_length(progress.bytes_total.max(1));
    bar.set_position(progress.bytes_looked_at);
    bar.set_message(message(progress.bytes_moved, progress.rate(), progress.eta()));
}

/// `1.2 GiB moved, 1.80 GB/s, 12 s left`.
fn message(moved: u64, rate: f64, eta: Option<Duration>) -> String {
    let left = eta.map_or_else(String::new, |eta| format!(", {:.0} s left", eta.as_secs_f64()));
    format!("{} moved, {:.2} GB/s{left}", size(moved), rate / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_tells_rate_and_time_left() {
        let left = Some(Duration::from_secs(12));
        assert_eq!(message(3 << 29, 1.8e9, left), "1.5 GiB moved, 1.80 GB/s, 12 s left");
        assert_eq!(message(0, 0.0, None), "0 B moved, 0.00 GB/s");
    }
}
