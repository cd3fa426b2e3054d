//! stress-ng, which verifies what it does.

use super::run::Run;

const STRESSORS: [&[&str]; 8] = [
    &["--vm", "1", "--vm-bytes", "64m"],
    &["--mmap", "1", "--mmap-bytes", "32m"],
    &["--malloc", "1", "--malloc-bytes", "64m"],
    &["--fork", "1"],
    &["--mremap", "1", "--mremap-bytes", "16m"],
    &["--madvise", "1"],
    &["--matrix", "1", "--matrix-size", "512"],
    &["--memcpy", "1"],
];

pub(crate) fn run(run: &Run) -> anyhow::Result<()> {
    let each = (run.share / u32::try_from(STRESSORS.len()).unwrap_or(1)).as_secs().max(1);
    let mut failed = Vec::new();
    for stressor in STRESSORS {
        let mut command = run.tortured("stress-ng")?;
        command.args(stressor).args(["--verify", "--timeout"]).arg(format!("{each}s"));
        command.args(["--temp-path", "."]);
        if let Err(error) = run.finish(command, &format!("stress-ng{}", stressor[0])) {
            failed.push(error.to_string());
        }
    }
    anyhow::ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}
