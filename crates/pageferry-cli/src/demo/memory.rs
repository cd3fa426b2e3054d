//! How much memory the demo may take, and amounts as people write them.

use crate::output::Problem;
use std::path::Path;

const MIB: u64 = 1 << 20;

/// Size of the index when nobody says: a few hundred MiB, far beyond every cache.
const USUAL: u64 = 256 * MIB;
/// The smallest index: below, fixed costs are all that a move shows.
const LEAST: u64 = 4 * MIB;
/// The largest index: room for positions is counted in 32 bits.
const MOST: u64 = 64 << 30;
/// What is needed besides the index: the engine's frames, buffers, the program.
const BESIDES: u64 = 96 * MIB;

/// Bytes of text that are read for an index of `size` bytes. With 1.5 bytes of index for a byte of
/// text (measured on documentation) a text this long goes in about one and a half times.
pub(super) fn text_bytes(size: u64) -> u64 {
    size / 2
}

/// Bytes of address space for an index of `size` bytes: its tables and lists grow by doubling, and
/// what they leave behind serves only others of the same size.
pub(super) fn region_bytes(size: u64) -> u64 {
    (size * 2).next_multiple_of(2 * MIB)
}

/// Memory needed for an index of `size` bytes: it and its reference, each with half as much again
/// for what growing leaves behind, and the words of the text.
fn needed(size: u64) -> u64 {
    2 * (size + size / 2) + size / 2 + BESIDES
}

/// The size of the index: what was asked for, or what this machine's memory suggests.
pub(super) fn size(asked: Option<u64>) -> Result<u64, Problem> {
    choose(asked, available())
}

fn choose(asked: Option<u64>, available: Option<u64>) -> Result<u64, Problem> {
    // Where nobody says how much memory there is, allocation itself will.
    let available = available.unwrap_or(u64::MAX);
    let fits = |size: &u64| needed(*size) <= available;
    let largest = || {
        let sizes = std::iter::successors(Some(MOST), |size| Some(size / 4 * 3));
        sizes.take_while(|size| *size >= LEAST).find(fits).map(|size| size / MIB * MIB)
    };
    let too_little = |size: u64, remedy: String| {
        Problem::bad_input(
            format!("not enough memory for an index of {}", iec(size)),
            format!("it takes {}, and {} is available", iec(needed(size)), iec(available)),
            remedy,
        )
    };
    match (asked, largest()) {
        (Some(size), _) if fits(&size) => Ok(size),
        (None, Some(largest)) => Ok(largest.min(USUAL)),
        (Some(size), Some(largest)) => {
            let largest = largest / MIB;
            Err(too_little(size, format!("use --size {largest}M or less, or free some memory")))
        }
        (_, None) => {
            let size = asked.unwrap_or(LEAST);
            Err(too_little(size, "free some memory, or raise the memory limit".to_owned()))
        }
    }
}

/// Memory that this process can have without swapping: what the kernel estimates
/// (`MemAvailable`, proc(5)) or what the limits of its cgroups leave, if that is less.
fn available() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or_default();
    Some(cgroup_left(Path::new("/sys/fs/cgroup"), own).map_or(kib * 1024, |b| b.min(kib * 1024)))
}

/// What `memory.max` leaves in the cgroup `own` and those above it (cgroup v2).
fn cgroup_left(root: &Path, own: &str) -> Option<u64> {
    let number = |folder: &Path, file: &str| -> Option<u64> {
        std::fs::read_to_string(folder.join(file)).ok()?.trim().parse().ok()
    };
    let left = |folder: &Path| {
        // "max" is no number: no limit here.
        let max = number(folder, "memory.max")?;
        let used = number(folder, "memory.current")?;
        Some(max.saturating_sub(used))
    };
    let own = root.join(own);
    own.ancestors().take_while(|folder| folder.starts_with(root)).filter_map(left).min()
}

/// Reads an amount: a number with K, M or G (powers of 1024), between the bounds of an index.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let upper = text.trim().to_ascii_uppercase();
    let number = upper.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &upper[number.len()..] {
        "" | "B" => 1,
        "K" | "KB" | "KIB" => 1024,
        "M" | "MB" | "MIB" => MIB,
        "G" | "GB" | "GIB" => 1024 * MIB,
        unit => return Err(format!("{unit} is no unit of bytes; write for example 256M or 1G")),
    };
    let number: u64 = number
        .trim()
        .parse()
        .map_err(|_| "not a whole number of bytes; write for example 256M or 1G".to_owned())?;
    match number.checked_mul(factor) {
        Some(bytes) if (LEAST..=MOST).contains(&bytes) => Ok(bytes),
        _ => Err(format!("an index has between {} and {}", iec(LEAST), iec(MOST))),
    }
}

/// An amount in powers of 1024, three digits.
#[allow(clippy::cast_precision_loss, reason = "for people to read")]
pub(super) fn iec(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1023.5 {
            return three_digits(value, unit);
        }
        value /= 1024.0;
    }
    three_digits(value, "TiB")
}

/// An amount in powers of 1000, three digits.
#[allow(clippy::cast_precision_loss, reason = "for people to read")]
pub(super) fn si(count: u64, unit: &str) -> String {
    let mut value = count as f64;
    for prefix in ["", "k", "M", "G"] {
        if value < 999.5 {
            return three_digits(value, &format!("{prefix}{unit}"));
        }
        value /= 1000.0;
    }
    three_digits(value, &format!("T{unit}"))
}

fn three_digits(value: f64, unit: &str) -> String {
    let digits =
        if value.fract() == 0.0 || value >= 99.95 { 0 } else { 1 + usize::from(value < 9.995) };
    format!("{value:.digits$} {unit}").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_people_write_them() {
        assert_eq!(parse("16M"), Ok(16 * MIB));
        assert_eq!(parse("16mib"), Ok(16 * MIB));
        assert_eq!(parse(" 1 G "), Ok(1024 * MIB));
        assert_eq!(parse("8192K"), Ok(8 * MIB));
        assert_eq!(parse("4194304"), Ok(LEAST));
        for nonsense in ["", "M", "-1M", "1.5G", "12Q", "0", "1K", "65G", "99999999999999999G"] {
            assert!(parse(nonsense).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn amounts_are_written_with_three_digits() {
        let written = [0, 999, 1536, 20 * MIB, 256 * MIB, 1023 * MIB + MIB / 2, 3 << 30].map(iec);
        assert_eq!(written, ["0 B", "999 B", "1.50 KiB", "20 MiB", "256 MiB", "1.00 GiB", "3 GiB"]);
        assert_eq!([0, 1234, 157_288_015].map(|n| si(n, "B")), ["0 B", "1.23 kB", "157 MB"]);
        assert_eq!(si(24_710_514, ""), "24.7 M");
    }

    #[test]
    fn the_index_is_as_large_as_memory_allows() {
        assert_eq!(choose(None, None).ok(), Some(USUAL));
        assert_eq!(choose(None, Some(16 << 30)).ok(), Some(USUAL));
        let small = choose(None, Some(300 * MIB)).ok();
        assert!(small.is_some_and(|s| s >= 32 * MIB && needed(s) <= 300 * MIB), "{small:?}");
        assert_eq!(choose(Some(512 * MIB), Some(16 << 30)).ok(), Some(512 * MIB));
    }

    #[test]
    fn too_little_memory_is_named_with_a_size_that_would_fit() {
        let problem = choose(Some(1 << 30), Some(1 << 30)).err();
        let problem = problem.map(|p| (p.what, p.remedy)).unwrap_or_default();
        assert_eq!(problem.0, "not enough memory for an index of 1 GiB");
        let size = problem.1.strip_prefix("use --size ").and_then(|r| r.split(' ').next());
        let size = size.and_then(|s| parse(s).ok());
        assert!(size.is_some_and(|s| needed(s) <= 1 << 30), "{size:?}");
        assert!(choose(None, Some(50 * MIB)).is_err());
    }

    #[test]
    fn the_tightest_cgroup_above_counts() -> std::io::Result<()> {
        let root = tempfile::tempdir()?;
        let inner = root.path().join("a/b");
        std::fs::create_dir_all(&inner)?;
        let write = |path: &Path, max: &str, current: &str| {
            std::fs::write(path.join("memory.max"), max)?;
            std::fs::write(path.join("memory.current"), current)
        };
        write(&inner, "max\n", "5\n")?;
        assert_eq!(cgroup_left(root.path(), "a/b"), None);
        write(&root.path().join("a"), "1000\n", "400\n")?;
        assert_eq!(cgroup_left(root.path(), "a/b"), Some(600));
        write(&inner, "100\n", "400\n")?;
        assert_eq!(cgroup_left(root.path(), "a/b"), Some(0));
        Ok(())
    }
}
