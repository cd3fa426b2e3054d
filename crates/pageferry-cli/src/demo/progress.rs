//! The progress bar: one stage after another.

use crate::output::Context;
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Makes the bar of each stage, where progress may be shown.
pub(super) struct Progress {
    shown: bool,
    style: ProgressStyle,
}

impl Progress {
    pub(super) fn new(context: &Context) -> anyhow::Result<Self> {
        let style = ProgressStyle::with_template("{msg:<30} {wide_bar} {percent:>3} %")
            .context("progress bar")?;
        Ok(Self { shown: context.progress, style })
    }

    /// The bar of a stage, at its beginning. Each stage has a new one: a bar that is used again
    /// shows what is left of the last stage, and one without a length is full.
    pub(super) fn begin(&self, what: &'static str, length: u64) -> ProgressBar {
        let target =
            if self.shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(length.max(1)), target);
        let bar = bar.with_style(self.style.clone()).with_message(what);
        bar.tick();
        bar
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_begins_with_nothing_done() -> anyhow::Result<()> {
        let progress = Progress::new(&Context { progress: false })?;
        for length in [0, 10] {
            let bar = progress.begin("testing", length);
            assert_eq!((bar.position(), bar.length()), (0, Some(length.max(1))));
            assert!(!bar.is_finished());
            bar.finish_and_clear();
        }
        Ok(())
    }
}
