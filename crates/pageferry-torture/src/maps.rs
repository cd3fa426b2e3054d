//! Which memory of the program may be moved: private, anonymous and writable.

use std::ops::Range;

/// A mapping that could be adopted, if this line of `/proc/self/maps` is one.
pub(crate) fn movable(line: &str) -> Option<Range<usize>> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let rights = fields.next()?;
    let (_offset, _device, inode) = (fields.next()?, fields.next()?, fields.next()?);
    let name = fields.next().unwrap_or("");
    let is_plain = name.is_empty() || name == "[heap]" || name.starts_with("[anon:");
    let fits = rights.starts_with("rw") && rights.ends_with('p') && inode == "0" && is_plain;
    let hex = |text: &str| usize::from_str_radix(text, 16).ok();
    fits.then_some(hex(start)?..hex(end)?)
}

/// Every mapping's addresses, whatever it is.
pub(crate) fn all(text: &str) -> Vec<Range<usize>> {
    let hex = |text: &str| usize::from_str_radix(text, 16).ok();
    let range = |line: &str| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some(hex(start)?..hex(end)?)
    };
    text.lines().filter_map(range).collect()
}

/// Whether no mapping reaches over an end of a range: registered, it would have a border there, over
/// which the program's `mremap` fails.
pub(crate) fn is_whole(text: &str, range: &Range<usize>) -> bool {
    let cuts = |mapping: &Range<usize>, at: usize| mapping.start < at && at < mapping.end;
    !all(text).iter().any(|mapping| cuts(mapping, range.start) || cuts(mapping, range.end))
}

/// What is left of `whole` without any of `parts`.
pub(crate) fn without(whole: Range<usize>, parts: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut left = vec![whole];
    for part in parts {
        let touches = |r: &Range<usize>| r.start < part.end && part.start < r.end;
        if left.iter().any(touches) {
            left = left
                .into_iter()
                .flat_map(|r| [r.start..r.end.min(part.start), r.start.max(part.end)..r.end])
                .filter(|r| r.start < r.end)
                .collect();
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_private_anonymous_writable_memory_is_movable() {
        assert_eq!(movable("1000-3000 rw-p 00000000 00:00 0 "), Some(0x1000..0x3000));
        assert_eq!(movable("1000-3000 rwxp 0 00:00 0  [heap]"), Some(0x1000..0x3000));
        for line in [
            "1000-3000 rw-s 0 00:01 7  /dev/zero (deleted)",
            "1000-3000 rw-p 0 fe:00 9  /usr/lib/x.so",
            "1000-3000 r--p 0 00:00 0",
            "1000-3000 rw-p 0 00:00 0  [stack]",
            "nonsense",
        ] {
            assert_eq!(movable(line), None, "{line}");
        }
        assert_eq!(all("1000-3000 r--p 0 0 0\n5000-6000 rw-s 0"), [0x1000..0x3000, 0x5000..0x6000]);
    }

    #[test]
    fn a_range_whose_ends_lie_within_mappings_is_not_whole() {
        let text = "1000-3000 rw-p 0 0 0\n3000-5000 rw-p 0 0 0\n8000-9000 rw-p 0 0 0";
        for whole in [0x1000..0x3000, 0x1000..0x5000, 0x5000..0x8000, 0x5000..0xa000] {
            assert!(is_whole(text, &whole), "{whole:x?}");
        }
        for cut in [0x2000..0x5000, 0x1000..0x4000, 0x7000..0x8800] {
            assert!(!is_whole(text, &cut), "{cut:x?}");
        }
    }

    #[test]
    fn what_was_there_before_is_cut_out() {
        assert_eq!(without(10..50, &[0..12, 20..30, 29..31, 45..99]), [12..20, 31..45]);
        assert_eq!(without(10..50, &[5..20, 20..50]), []);
        assert_eq!(without(10..50, &[50..60, 0..10]).first(), Some(&(10..50)));
    }
}
