//! How much memory the demo may take, and amounts of three digits.

use super::limits::Supply;
use crate::output::Problem;
use crate::size::parse_size;

const MIB: u64 = 1 << 20;

/// Size of the index when nobody says: a few hundred MiB, far beyond every cache.
const USUAL: u64 = 256 * MIB;
/// The smallest index: below, fixed costs are all that a move shows.
const LEAST: u64 = 4 * MIB;
/// The largest index: room for positions is counted in 32 bits.
const MOST: u64 = 64 << 30;
/// Memory that is needed besides the index: the engine's frames, buffers, the program.
pub(super) const BESIDES: u64 = 128 * MIB;

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

/// The size of the index: what was asked for, or what memory and limits suggest.
pub(super) fn size(asked: Option<u64>, queries: u16, sizes: u64) -> Result<u64, Problem> {
    // Where nobody says how much there is, allocation itself will.
    choose(asked, &Supply::all(queries, sizes))
}

fn choose(asked: Option<u64>, supplies: &[Supply]) -> Result<u64, Problem> {
    let short = |size: u64| supplies.iter().find(|s| s.needed(size) > s.left);
    let largest = || {
        let sizes = std::iter::successors(Some(MOST), |size| Some(size / 4 * 3));
        let mut sizes = sizes.take_while(|size| *size >= LEAST).chain([LEAST]);
        sizes.find(|size| short(*size).is_none()).map(|size| size / MIB * MIB)
    };
    let size = asked.unwrap_or(USUAL);
    let Some(supply) = short(size) else { return Ok(size) };
    let largest = largest();
    if let (None, Some(largest)) = (asked, largest) {
        return Ok(largest);
    }
    // Nothing fits: what is short for the least index is what must be mended.
    let (size, supply) = match (asked, short(LEAST)) {
        (None, Some(supply)) => (LEAST, supply),
        _ => (size, supply),
    };
    let (needed, left) = (iec(supply.needed(size)), iec(supply.left));
    let Supply { name, has, remedy, .. } = supply;
    let remedy = match largest {
        Some(largest) => format!("use --size {}M or less, or {remedy}", largest / MIB),
        None => (*remedy).to_owned(),
    };
    Err(Problem::bad_input(
        format!("not enough {name} for an index of {}", iec(size)),
        format!("it takes up to {needed}, and {left} {has}"),
        remedy,
    ))
}

/// Reads the size of an index.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    match (LEAST..=MOST).contains(&size) {
        true => Ok(size),
        false => Err(format!("an index has between {} and {}", iec(LEAST), iec(MOST))),
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
    fn the_index_has_a_least_and_a_largest_size() {
        assert_eq!((parse("4M"), parse("64G")), (Ok(LEAST), Ok(MOST)));
        for refused in ["0", "1K", "4194303", "65G", "M"] {
            assert!(parse(refused).is_err(), "{refused}");
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
        let choose = |asked, left| choose(asked, &[Supply::memory(left)]).ok();
        assert_eq!(super::choose(None, &[]).ok(), Some(USUAL));
        assert_eq!(choose(None, 16 << 30), Some(USUAL));
        let small = choose(None, 300 * MIB);
        let needed = |size| Supply::memory(0).needed(size);
        assert!(small.is_some_and(|s| s >= 32 * MIB && needed(s) <= 300 * MIB), "{small:?}");
        assert_eq!(choose(Some(512 * MIB), 16 << 30), Some(512 * MIB));
    }

    #[test]
    fn what_is_short_is_named_with_a_size_that_would_fit() {
        let memory = Supply::memory(1 << 30);
        let problem = choose(Some(1 << 30), std::slice::from_ref(&memory)).err();
        let problem = problem.map(|p| (p.what, p.remedy)).unwrap_or_default();
        assert_eq!(problem.0, "not enough memory for an index of 1 GiB");
        let size = problem.1.strip_prefix("use --size ").and_then(|r| r.split(' ').next());
        let size = size.and_then(|s| parse(s).ok());
        assert!(size.is_some_and(|s| memory.needed(s) <= 1 << 30), "{size:?}");
    }

    #[test]
    fn where_nothing_fits_the_remedy_is_to_have_more() {
        let limit = Supply {
            name: "address space",
            has: "is left by the limit".into(),
            remedy: "raise the limit",
            left: 50 * MIB,
            fixed: 60 * MIB,
            for_two: 8,
        };
        let problem = choose(None, &[Supply::memory(16 << 30), limit]).err();
        let problem = problem.map(|p| (p.what, p.because, p.remedy)).unwrap_or_default();
        assert_eq!(problem.0, "not enough address space for an index of 4 MiB");
        assert_eq!(problem.1, "it takes up to 76 MiB, and 50 MiB is left by the limit");
        assert_eq!(problem.2, "raise the limit");
    }
}
