//! Amounts of memory, as people write and read them: numbers with K, M, G or T, powers of 1024,
//! that come to whole bytes. Where this command means powers of 1000 it writes kB, MB and GB, which it therefore does
//! not take for powers of 1024.

/// Reads `4096`, `64K`, `512M`, `1.5G`, `2 GiB`, in capitals or not.
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
    let number = number.trim();
    if number.starts_with('-') {
        return Err("negative, which no amount of memory is; write for example 512M".to_owned());
    }
    let whole = || "not a whole number of bytes; write for example 512M or 2G".to_owned();
    // Exactly, as thousandths and the like: a u128 has room for all that is not refused.
    let (units, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok());
    let [units, parts]: [Option<u64>; 2] = [units, fraction].map(|text| digits(text).flatten());
    let (units, parts) = (units.ok_or_else(whole)?, parts.ok_or_else(whole)?);
    let one = u32::try_from(fraction.len()).ok().and_then(|n| 10u128.checked_pow(n));
    let one = one.ok_or_else(whole)?;
    let parts = u128::from(parts) << shift;
    if parts % one != 0 {
        return Err(whole());
    }
    u64::try_from((u128::from(units) << shift) + parts / one)
        .map_err(|_| "more than an address can say (16777216T); give less".to_owned())
}

/// `1.80 GB/s`, `4.2 MB/s`, `0.3 kB/s`: powers of 1000, as rates are.
pub(crate) fn rate(bytes_per_s: f64) -> String {
    match bytes_per_s {
        rate if rate >= 1e9 => format!("{:.2} GB/s", rate / 1e9),
        rate if rate >= 1e6 => format!("{:.1} MB/s", rate / 1e6),
        rate => format!("{:.1} kB/s", rate / 1e3),
    }
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
            ("1.5G", 3 << 29),
            ("0.25k", 256),
            ("1.000B", 1),
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
            ("-1M", "negative"),
            ("0.1G", "not a whole number"),
            ("1.5", "not a whole number"),
            (".5G", "not a whole number"),
            ("1.G", "not a whole number"),
            ("1.+5G", "not a whole number"),
            ("+1G", "not a whole number"),
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
    fn rates_are_written_in_units_that_fit() {
        let written = [1.8e9, 999.96e6, 65_536.0, 0.0].map(rate);
        assert_eq!(written, ["1.80 GB/s", "1000.0 MB/s", "65.5 kB/s", "0.0 kB/s"]);
    }

    #[test]
    fn sizes_are_written_with_one_digit_of_a_fraction_at_most() {
        let written = [0, 1023, 1536, 20 << 20, (117 << 30) + (410 << 20), 3 << 50].map(size);
        assert_eq!(written, ["0 B", "1023 B", "1.5 KiB", "20 MiB", "117.4 GiB", "3072 TiB"]);
    }
}
