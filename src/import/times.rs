//! Durations of the sources and of Tidegate.
//!
//! Called by the readers. Pure.

use crate::draft::quoted;

/// Longest duration that Tidegate takes, in milliseconds: 30 days.
pub(crate) const LONGEST: u64 = 30 * 24 * 3_600_000;

/// Returns a duration of Tidegate as TOML, in the largest unit that divides it. 0 is `"off"`.
pub(crate) fn toml_time(milliseconds: u64) -> String {
    if milliseconds == 0 {
        return "\"off\"".to_owned();
    }
    let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s"), (1, "ms")];
    let unit = units.into_iter().find(|(length, _)| milliseconds.is_multiple_of(*length));
    let (length, unit) = unit.unwrap_or((1, "ms"));
    quoted(&format!("{}{unit}", milliseconds / length))
}

/// Parses `NUMBER[UNIT]...` to milliseconds. `default` is the length of a number without unit.
/// Parts of a millisecond count as one.
pub(crate) fn time(text: &str, default: u64) -> Option<u64> {
    let mut rest = text.trim();
    let mut total: u64 = 0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let micros = match rest[..end].trim() {
            "" => default.checked_mul(1_000)?,
            "us" => 1,
            "ms" => 1_000,
            "s" => 1_000_000,
            "m" => 60_000_000,
            "h" => 3_600_000_000,
            "d" => 86_400_000_000,
            "w" => 604_800_000_000,
            "M" => 2_592_000_000_000,
            "y" => 31_536_000_000_000,
            _ => return None,
        };
        total = total.checked_add(number.checked_mul(micros)?)?;
        rest = &rest[end..];
    }
    Some(total.div_ceil(1_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_without_unit_have_the_default_unit() {
        assert_eq!((time("15000", 1), time("15", 1_000)), (Some(15_000), Some(15_000)));
        assert_eq!(
            (time("1m30s", 1), time("500us", 1), time("0", 1)),
            (Some(90_000), Some(1), Some(0))
        );
        assert_eq!(
            (time("", 1), time("s", 1), time("5x", 1), time("-1", 1)),
            (None, None, None, None)
        );
        assert_eq!(time("99999999999999999999", 1), None);
    }

    #[test]
    fn durations_have_one_unit() {
        assert_eq!(
            (&*toml_time(15_000), &*toml_time(1_500), &*toml_time(0)),
            ("\"15s\"", "\"1500ms\"", "\"off\"")
        );
        assert_eq!(&*toml_time(10_800_000), "\"3h\"");
    }
}
