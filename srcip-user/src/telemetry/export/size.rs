//! Sizes as people write them: `100MiB`.

use std::num::NonZeroU64;

const UNITS: [(&str, u64); 4] = [("", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

/// Parses a number of bytes, or one with KiB, MiB or GiB.
pub fn parse_size(text: &str) -> Result<NonZeroU64, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = unit.trim_start();
    let factor =
        UNITS.into_iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, factor)| factor);
    let bytes = factor.and_then(|factor| digits.parse::<u64>().ok()?.checked_mul(factor));
    bytes.and_then(NonZeroU64::new).ok_or_else(|| {
        let hint = match unit.to_ascii_lowercase().as_str() {
            "k" | "kb" => "; did you mean KiB, which is 1024 bytes?",
            "m" | "mb" => "; did you mean MiB, which is 1024 KiB?",
            "g" | "gb" => "; did you mean GiB, which is 1024 MiB?",
            _ if bytes == Some(0) => "; 0 would rotate without ever writing",
            _ => "",
        };
        format!(
            "{text:?} is not a size: expected a number of bytes, or a number with KiB, MiB or GiB, such as \
             100MiB{hint}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("1", 1), ("4096", 4096), ("10KiB", 10_240), ("100MiB", 104_857_600), ("1 gib", 1 << 30)]
        {
            assert_eq!(parse_size(text).map(NonZeroU64::get), Ok(bytes), "{text}");
        }
        for bad in ["", "KiB", "0", "-1", "1.5MiB", "1TiB", "99999999999999GiB", "1 0"] {
            assert!(parse_size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn errors_teach() {
        assert!(parse_size("100MB").unwrap_err().contains("did you mean MiB"));
        assert!(parse_size("0").unwrap_err().contains("without ever writing"));
        assert!(parse_size("lots").unwrap_err().contains("such as 100MiB"));
    }
}
