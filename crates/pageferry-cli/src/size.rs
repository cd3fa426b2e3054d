//! Amounts of memory, as people write and read them: whole numbers with K, M, G or T, powers of
//! 1024. Where this command means powers of 1000 it writes kB, MB and GB, which it therefore does
//! not take for powers of 1024.

/// Reads `4096`, `64K`, `512M`, `2 GiB`, in capitals or not.
///
/// # Errors
/// The reason and the remedy, for clap to name the option and the text before it.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[number.len()..];
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(format!("unknown unit '{unit}'; use K, M, G or T, powers of 1024")),
    };
    let number: u64 = number
        .trim()
        .parse()
        .map_err(|_| "not a whole number of bytes; write for example 512M or 2G".to_owned())?;
    let bytes = number.checked_mul(1 << shift);
    bytes.ok_or_else(|| "more than an address can say (16777216T); give less".to_owned())
}

/// `117.4 GiB`; whole numbers without a fraction.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() == 0.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("8192K", 8 << 20),
            ("512M", 512 << 20),
            ("16mib", 16 << 20),
            (" 1 G ", 1 << 30),
            ("2GiB", 2 << 30),
            ("16777215t", 16_777_215 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_reason_and_remedy() {
        for (text, reason) in [
            ("", "not a whole number"),
            ("M", "not a whole number"),
            ("lots", "unknown unit 'lots'"),
            ("-1M", "not a whole number"),
            ("1.5G", "not a whole number"),
            ("12Q", "unknown unit 'Q'"),
            ("12MB", "unknown unit 'MB'"),
            ("99999999999999999999", "not a whole number"),
            ("16777216T", "more than an address can say"),
        ] {
            let refused = parse_size(text).expect_err(text);
            assert!(refused.contains(reason) && refused.contains("; "), "{text}: {refused}");
        }
    }

    #[test]
    fn sizes_are_written_with_one_digit_of_a_fraction_at_most() {
        let written = [0, 1023, 1536, 20 << 20, (117 << 30) + (410 << 20), 3 << 50].map(size);
        assert_eq!(written, ["0 B", "1023 B", "1.5 KiB", "20 MiB", "117.4 GiB", "3072 TiB"]);
    }
}
