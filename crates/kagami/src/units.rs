//! Sizes, rates and durations as people write them, and as we print them.
//!
//! `K M G T P` and `KiB MiB ...` are powers of 1024 (as qemu, rbd and lvm read them), `KB MB GB ...` are powers of
//! 1000, a bare number is bytes. Decimals are allowed where the result is a whole number of bytes.

use std::time::Duration;

/// Why a size or a duration was not understood. The text is for the user.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UnitError {
    /// Not a number with a known unit.
    #[error(
        "\"{0}\" is no size: write 10G, 1.5T, 512MiB or 10GB (K M G T P are powers of 1024, KB MB GB of 1000)"
    )]
    Size(String),
    /// More bytes than 64 bits can count.
    #[error("\"{0}\" is too large")]
    TooLarge(String),
    /// The number of bytes is not whole.
    #[error("\"{0}\" is no whole number of bytes")]
    Fraction(String),
    /// Not a number with a known unit of time.
    #[error("\"{0}\" is no duration: write 500ms, 30s, 15m, 2h or 7d")]
    Duration(String),
    /// Bare small numbers are a habit from rbd (MiB) and lvm (MiB).
    #[error("{0} means {0} bytes here: write {0}M for MiB or {0}G for GiB")]
    BareSmall(u64),
    /// Not a multiple of the unit of allocation.
    #[error("{found} bytes is no multiple of {unit}: the nearest legal sizes are {below} and {above}")]
    Multiple {
        /// What was asked for, in bytes.
        found: u64,
        /// The unit, in bytes.
        unit: u64,
        /// Next smaller legal size, in bytes.
        below: u64,
        /// Next larger legal size, in bytes.
        above: u64,
    },
}

/// Powers of 1024 from K on.
const LETTERS: &str = "KMGTPE";

/// Bytes in `10G`, `1.5TiB`, `100MB`, `4096`.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let wrong = || UnitError::Size(text.to_owned());
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
    let (number, unit) = (&trimmed[..split], trimmed[split..].trim_start());
    let factor = unit_factor(unit).ok_or_else(wrong)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || number.ends_with('.') || fraction.contains('.') || fraction.len() > 18 {
        return Err(wrong());
    }
    let too_large = || UnitError::TooLarge(text.to_owned());
    let whole: u128 = whole.parse().map_err(|_| too_large())?;
    let mut bytes = whole.checked_mul(u128::from(factor)).ok_or_else(too_large)?;
    if !fraction.is_empty() {
        let scale = 10_u128.pow(fraction.len() as u32);
        let part = fraction.parse::<u128>().map_err(|_| wrong())? * u128::from(factor);
        if factor == 1 && part != 0 {
            return Err(UnitError::Fraction(text.to_owned()));
        }
        bytes += part / scale;
    }
    u64::try_from(bytes).map_err(|_| too_large())
}

fn unit_factor(unit: &str) -> Option<u64> {
    let upper = unit.to_ascii_uppercase();
    if upper.is_empty() || upper == "B" {
        return Some(1);
    }
    let (base, letter): (u64, &str) = match upper.strip_suffix("IB") {
        Some(letter) => (1024, letter),
        None => match upper.strip_suffix('B') {
            Some(letter) => (1000, letter),
            None => (1024, upper.as_str()),
        },
    };
    let mut chars = letter.chars();
    let power = LETTERS.find(chars.next()?)? as u32 + 1;
    if chars.next().is_some() {
        return None;
    }
    base.checked_pow(power)
}

/// The size of a new LUN or disk: at least 1 MiB (a bare small number is a mistake), a multiple of `unit` bytes.
pub fn parse_disk_size(text: &str, unit: u64) -> Result<u64, UnitError> {
    let bytes = parse_size(text)?;
    if bytes < 1 << 20 && text.trim().bytes().all(|b| b.is_ascii_digit()) {
        return Err(UnitError::BareSmall(bytes));
    }
    if !bytes.is_multiple_of(unit) || bytes == 0 {
        let below = bytes / unit * unit;
        let above = (bytes / unit + 1).saturating_mul(unit);
        return Err(UnitError::Multiple { found: bytes, unit, below: below.max(unit), above });
    }
    Ok(bytes)
}

/// `10.0 GiB`, `512 B`: for people.
pub fn show_size(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = None;
    for letter in LETTERS.chars() {
        // 1023.95 would print as "1024.0": go on to the next unit before that.
        if value < 1023.95 || (unit.is_none() && bytes < 1024) {
            break;
        }
        value /= 1024.0;
        unit = Some(letter);
    }
    match unit {
        None => format!("{bytes} B"),
        Some(letter) => format!("{value:.1} {letter}iB"),
    }
}

/// `123.4 MiB/s`; nothing sensible for no time at all.
pub fn show_rate(bytes: u64, time: Duration) -> String {
    if time.is_zero() {
        return "-".into();
    }
    format!("{}/s", show_size((bytes as f64 / time.as_secs_f64()) as u64))
}

/// `30s`, `15m`, `2h`, `7d`, `500ms`; a bare number is seconds.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let wrong = || UnitError::Duration(text.to_owned());
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let number: u64 = trimmed[..split].parse().map_err(|_| wrong())?;
    let milliseconds: u64 = match trimmed[split..].trim_start() {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(milliseconds).map(Duration::from_millis).ok_or_else(wrong)
}

/// `850 us`, `12.3 ms`, `4.2 s`, `3m 20s`: for people.
pub fn show_duration(time: Duration) -> String {
    let micros = time.as_micros();
    match micros {
        0..1000 => format!("{micros} us"),
        1000..1_000_000 => format!("{:.1} ms", micros as f64 / 1e3),
        1_000_000..120_000_000 => format!("{:.1} s", micros as f64 / 1e6),
        _ => format!("{}m {}s", time.as_secs() / 60, time.as_secs() % 60),
    }
}

/// `1,234,567`.
pub fn show_count(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        let good = [
            ("4096", 4096),
            ("10G", 10 << 30),
            ("10g", 10 << 30),
            ("10GiB", 10 << 30),
            ("10 GiB", 10 << 30),
            ("10GB", 10_000_000_000),
            ("1.5T", 3 << 39),
            ("0.5K", 512),
            ("64T", 64 << 40),
            ("2P", 2 << 50),
            ("100 B", 100),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "10X", "1..5G", ".5G", "5.G", "-1G", "10Gi", "1e9", "10GG", "0x10", "1.5"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert!(matches!(parse_size("99999999T"), Err(UnitError::TooLarge(_))));
        assert!(matches!(
            parse_size("999999999999999999999999999999999999999999"),
            Err(UnitError::TooLarge(_))
        ));
    }

    #[test]
    fn habits_from_rbd_and_lvm_are_caught() {
        assert_eq!(parse_disk_size("10240", 4096), Err(UnitError::BareSmall(10240)));
        let error = parse_disk_size("1000001", 4096).unwrap_err();
        assert!(error.to_string().contains("1000001M for MiB"), "{error}");
        assert_eq!(parse_disk_size("10G", 4096), Ok(10 << 30));
        let error = parse_disk_size("10000001", 4096).unwrap_err();
        let expected =
            UnitError::Multiple { found: 10_000_001, unit: 4096, below: 9_998_336, above: 10_002_432 };
        assert_eq!(error, expected);
        assert!(parse_disk_size("0K", 4096).is_err());
    }

    #[test]
    fn printing() {
        let sizes = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (10 << 30, "10.0 GiB"),
            ((1 << 30) - 1, "1.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (bytes, text) in sizes {
            assert_eq!(show_size(bytes), text);
        }
        assert_eq!(show_rate(100 << 20, Duration::from_secs(2)), "50.0 MiB/s");
        assert_eq!(show_count(1_234_567), "1,234,567");
        assert_eq!(show_count(999), "999");
        assert_eq!(show_duration(Duration::from_micros(12_340)), "12.3 ms");
        assert_eq!(show_duration(Duration::from_secs(200)), "3m 20s");
    }

    #[test]
    fn durations() {
        for (text, seconds) in [("30s", 30), ("15m", 900), ("2h", 7200), ("7d", 604_800), ("5", 5)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        for text in ["", "s", "7w", "1.5h", "-1s", "99999999999999999999d", "999999999999999999d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
