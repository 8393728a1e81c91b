//! Parses the text of one configuration value: durations, shares, status ranges, names.
//!
//! Called by `validate`, which knows the place of the text. Pure: it never reads a clock,
//! a file or a name server, and it never panics on any text.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use tidegate_core::model::{
    OnDown, OnRecover, OnRemoval, SIZE_UNITS, Words, show_duration, show_size,
};

/// An error in a value, and its correction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ValueError {
    pub(super) message: String,
    pub(super) help: Option<String>,
}

/// Shortest and longest value of a duration.
pub(super) type DurationRange = RangeInclusive<Duration>;

/// Slots of a hash table. The largest table takes 10 MB, at 2 bytes per slot.
pub(super) const HASH_SLOTS: RangeInclusive<u32> = 251..=5_000_011;

/// Durations in general. Timers have a resolution of 1 ms.
pub(super) const TIME: DurationRange =
    Duration::from_millis(1)..=Duration::from_secs(30 * 24 * 3600);

/// `upgrade_timeout`. The answer must be sent before the admin connection ends, after a
/// minute.
pub(super) const UPGRADE: DurationRange = Duration::from_secs(1)..=Duration::from_secs(50);

/// `TCP_KEEPIDLE` counts whole seconds up to 32,767 (tcp(7), MAX_TCP_KEEPIDLE).
pub(super) const KEEPALIVE: DurationRange = Duration::from_secs(1)..=Duration::from_secs(32_767);

/// `stalled_timeout`. Sessions store it as seconds in 16 bits.
pub(super) const STALLED: DurationRange = Duration::from_secs(1)..=Duration::from_secs(32_767);

/// `TCP_USER_TIMEOUT` is a C int of milliseconds, so under 24.9 days.
pub(super) const USER_TIMEOUT: DurationRange =
    Duration::from_millis(1)..=Duration::from_secs(24 * 24 * 3600);

/// `spin`. A longer time would keep a core busy without work.
pub(super) const SPIN: DurationRange = Duration::from_micros(1)..=Duration::from_millis(1);

/// `slow_start`.
pub(super) const SLOW_START: DurationRange = Duration::from_millis(100)..=Duration::from_secs(3600);

/// Heartbeat interval. Shorter intervals are a load, longer ones delay detection.
pub(super) const HEARTBEAT_INTERVAL: DurationRange =
    Duration::from_millis(20)..=Duration::from_secs(10);

/// `slow_first_byte`. Backends are evaluated every 200 ms.
pub(super) const SLOW_FIRST_BYTE: DurationRange = Duration::from_millis(100)..=*TIME.end();

/// Longest name of a frontend, pool or backend.
pub(super) const NAME_CHARS_MAX: usize = 64;

/// Most ranges in one `status`.
const STATUS_RANGES_MAX: usize = 32;

/// Longest text of a duration. With [`DURATION_DIGITS_MAX`] it keeps every sum far below
/// the largest `Duration`.
const DURATION_BYTES_MAX: usize = 64;
const DURATION_DIGITS_MAX: usize = 12;

/// Longest part of a wrong value that a message repeats.
const SHOWN_CHARS_MAX: usize = 60;

/// Most candidates that are compared for a suggestion, so that a wrong name among
/// thousands takes microseconds.
const SUGGESTION_CANDIDATES_MAX: usize = 2_000;

/// `buffers_max`. The first bulk stream of a worker takes about 1 MiB.
pub(super) const BUFFERS: RangeInclusive<u64> = 1 << 20..=1 << 40;

/// Shortest text that is suggested as a part of a candidate.
const PART_CHARS_MIN: usize = 5;

/// Parses a duration such as `250ms` or `1m30s`.
pub(super) fn duration(text: &str, range: DurationRange) -> Result<Duration, ValueError> {
    let value = read_duration(text)?;
    if value.is_zero() {
        return Err(ValueError::new("a duration of zero")
            .help(format!("the shortest allowed here is {}", show_duration(*range.start()))));
    }
    if !range.contains(&value) {
        return Err(ValueError::new(format!(
            "{} is outside {} to {}",
            shown(text),
            show_duration(*range.start()),
            show_duration(*range.end())
        )));
    }
    Ok(value)
}

/// Parses a duration or `off`.
pub(super) fn duration_or_off(
    text: &str,
    range: DurationRange,
) -> Result<Option<Duration>, ValueError> {
    if text == "off" {
        return Ok(None);
    }
    match duration(text, range) {
        Err(complaint) if complaint.message.starts_with("a duration of zero") => {
            Err(complaint.help("to switch it off, write \"off\""))
        }
        other => other.map(Some),
    }
}

/// Parses a size such as `64KiB`. Returns bytes.
pub(super) fn size(text: &str, range: RangeInclusive<u64>) -> Result<u64, ValueError> {
    let wrong = || {
        ValueError::new(format!("{} is not a size", shown(text)))
            .help("write a whole number and a unit (B, KiB, MiB, GiB), such as \"64MiB\"")
    };
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(unit_at);
    let (_, shift) = SIZE_UNITS.into_iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
    if number.is_empty() {
        return Err(wrong());
    }
    let value = number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    value.filter(|value| range.contains(value)).ok_or_else(|| {
        let (min, max) = (show_size(*range.start()), show_size(*range.end()));
        ValueError::new(format!("{} is outside {min} to {max}", shown(text)))
    })
}

/// `download_rate` and `upload_rate`, in bytes per second.
const BYTE_RATES: RangeInclusive<u64> = 1 << 10..=1 << 40;

/// Parses bytes per second such as `1MiB/s`, or `off`.
pub(super) fn byte_rate(text: &str) -> Result<Option<u64>, ValueError> {
    if text == "off" {
        return Ok(None);
    }
    let Some(bytes) = text.strip_suffix("/s") else {
        return Err(ValueError::new(format!("{} is not a rate", shown(text)))
            .help("write a size per second such as \"1MiB/s\", or \"off\""));
    };
    size(bytes, BYTE_RATES).map(Some)
}

/// Parses a keepalive time in whole seconds, or `off`.
pub(super) fn keepalive(text: &str) -> Result<Option<Duration>, ValueError> {
    let value = duration_or_off(text, KEEPALIVE)?;
    match value {
        Some(time) if time.subsec_nanos() != 0 => {
            Err(ValueError::new(format!("{} is not a whole number of seconds", shown(text)))
                .help("the kernel counts keepalive in seconds"))
        }
        other => Ok(other),
    }
}

fn read_duration(text: &str) -> Result<Duration, ValueError> {
    if text == "off" {
        return Err(ValueError::new("this timer cannot be switched off"));
    }
    let wrong = |why: String| {
        ValueError::new(format!("{} is not a duration: {why}", shown(text)))
            .help("write a number and a unit, such as \"250ms\", \"5s\" or \"1m30s\"")
    };
    let digits = text.split(|c: char| !c.is_ascii_digit()).map(str::len).max();
    if text.len() > DURATION_BYTES_MAX || digits > Some(DURATION_DIGITS_MAX) {
        return Err(wrong("the number is too large".to_owned()));
    }
    for unit in text.split(|c: char| !c.is_alphabetic()) {
        if unit.starts_with('M') || unit.starts_with("mon") || unit.starts_with('y') {
            return Err(wrong(format!("{} has no fixed length", shown(unit))));
        }
    }
    humantime::parse_duration(text).map_err(|error| {
        wrong(match error {
            humantime::DurationError::Empty => "it is empty".to_owned(),
            humantime::DurationError::UnknownUnit { unit, .. } if unit.is_empty() => {
                "the unit is missing".to_owned()
            }
            humantime::DurationError::UnknownUnit { unit, .. } => {
                format!("unknown unit {}", shown(&unit))
            }
            humantime::DurationError::NumberOverflow => {
                "the number is too large or finer than a nanosecond".to_owned()
            }
            _ => "a number is expected first".to_owned(),
        })
    })
}

/// Parses a share such as `50%`. Returns 0 to 100.
pub(super) fn percent(text: &str) -> Result<u8, ValueError> {
    let number = text.strip_suffix('%').filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
    match number.map(str::parse::<u8>) {
        Some(Ok(value)) if value <= 100 => Ok(value),
        _ => Err(ValueError::new(format!("{} is not a share", shown(text)))
            .help("write a whole number from 0 to 100 and a percent sign, such as \"50%\"")),
    }
}

/// Parses status codes such as `200-399` or `200,204,300-302`.
pub(super) fn status_ranges(text: &str) -> Result<Vec<(u16, u16)>, ValueError> {
    if text.split(',').count() > STATUS_RANGES_MAX {
        return Err(ValueError::new(format!(
            "more than {STATUS_RANGES_MAX} ranges of status codes"
        )));
    }
    text.split(',').map(|part| status_range(part.trim())).collect()
}

fn status_range(part: &str) -> Result<(u16, u16), ValueError> {
    let (low, high) = part.split_once('-').unwrap_or((part, part));
    let code = |text: &str| {
        let text = text.trim();
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match text.parse::<u16>() {
            Ok(code) if plain && (100..=599).contains(&code) => Ok(code),
            _ => Err(ValueError::new(format!("{} is not an HTTP status code", shown(text)))
                .help("codes are 100 to 599; write \"200-399\" or \"200,204,300-302\"")),
        }
    };
    let (low, high) = (code(low)?, code(high)?);
    if low > high {
        return Err(ValueError::new(format!("the range {low}-{high} ends before it starts"))
            .help(format!("write \"{high}-{low}\"")));
    }
    if high < 200 && !(low..=high).contains(&101) {
        let message = format!("no final status is in {low}-{high}, so no probe could succeed");
        let help = "after a 1xx response other than 101, the status of the final response counts";
        return Err(ValueError::new(message).help(help));
    }
    Ok((low, high))
}

/// Parses `keep` or `close-after DURATION`.
pub(super) fn on_removal(text: &str) -> Result<OnRemoval, ValueError> {
    if text == "keep" {
        return Ok(OnRemoval::Keep);
    }
    match text.strip_prefix("close-after ") {
        Some(rest) => duration(rest.trim(), TIME).map(OnRemoval::CloseAfter),
        None => Err(ValueError::new(format!("{} is not a known value", shown(text)))
            .help("write \"keep\" or \"close-after 30s\"")),
    }
}

/// Parses `keep` or `close-after DURATION`.
pub(super) fn on_recover(text: &str) -> Result<OnRecover, ValueError> {
    on_removal(text).map(|rule| match rule {
        OnRemoval::Keep => OnRecover::Keep,
        OnRemoval::CloseAfter(time) => OnRecover::CloseAfter(time),
    })
}

/// Parses `keep`, `reset` or `close-after DURATION`.
pub(super) fn on_down(text: &str) -> Result<OnDown, ValueError> {
    match text.strip_prefix("close-after ") {
        Some(rest) => duration(rest.trim(), TIME).map(OnDown::CloseAfter),
        None if text == "keep" => Ok(OnDown::Keep),
        None if text == "reset" => Ok(OnDown::Reset),
        None => Err(ValueError::new(format!("{} is not a known value", shown(text)))
            .help("write \"keep\", \"reset\" or \"close-after 5s\"")),
    }
}

/// Checks a name, which must need no escaping as a metric label or a path segment.
pub(super) fn name(text: &str) -> Result<(), ValueError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let help = format!("names are 1 to {NAME_CHARS_MAX} of the characters A-Z a-z 0-9 . _ -");
    if text.is_empty() {
        return Err(ValueError::new("the name is empty").help(help));
    }
    if let Some(wrong) = text.chars().find(|c| !allowed(*c)) {
        let wrong = shown(&wrong.to_string());
        return Err(ValueError::new(format!("{wrong} is not allowed in a name")).help(help));
    }
    if text.len() > NAME_CHARS_MAX {
        let message = format!("the name has {} characters", text.len());
        return Err(ValueError::new(message).help(help));
    }
    if text.chars().all(|c| c == '.') {
        return Err(
            ValueError::new(format!("{} is a directory, not a name", shown(text))).help(help)
        );
    }
    Ok(())
}

/// Parses a word of a closed set.
pub(super) fn choice<T: Words>(text: &str) -> Result<T, ValueError> {
    let words = T::WORDS;
    if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
        return Ok(*value);
    }
    let complaint = ValueError::new(format!("{} is not a known value", shown(text)));
    let all: Vec<String> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
    let all = format!("known values: {}", all.join(", "));
    Err(complaint.help(match nearest(text, words.iter().map(|(word, _)| *word)) {
        Some(near) => format!("did you mean \"{near}\"? {all}"),
        None => all,
    }))
}

/// Returns `did you mean "..."?` if a candidate is near, else the result of `otherwise`.
pub(super) fn did_you_mean_or<'c>(
    text: &str,
    candidates: impl Iterator<Item = &'c str>,
    otherwise: impl FnOnce() -> String,
) -> String {
    match nearest(text, candidates) {
        Some(near) => format!("did you mean \"{near}\"?"),
        None => otherwise(),
    }
}

/// Returns the candidate nearest to `text`.
///
/// At most a third of the letters and at most four may differ; two swapped letters count
/// as one difference. A candidate that contains `text` is also near; hyphens do not count.
pub(super) fn nearest<'c>(
    text: &str,
    candidates: impl Iterator<Item = &'c str>,
) -> Option<&'c str> {
    let length = text.chars().take(NAME_CHARS_MAX + 1).count();
    if length > NAME_CHARS_MAX {
        return None;
    }
    let like = |word: &str| word.to_ascii_lowercase().replace('_', "-");
    let joined = |word: &str| word.replace('-', "");
    let plain = like(text);
    let candidates = candidates
        .take(SUGGESTION_CANDIDATES_MAX)
        .filter(|candidate| candidate.len() <= 2 * NAME_CHARS_MAX);
    candidates
        .filter_map(|candidate| {
            let other = like(candidate);
            let distance = strsim::osa_distance(&plain, &other);
            let slip = distance <= (length / 3).clamp(1, 4) && distance < length;
            let part = length >= PART_CHARS_MIN && joined(&other).contains(&joined(&plain));
            (slip || part).then_some((distance, candidate))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Returns the text in quotes on one line, cut, with control characters escaped.
pub(super) fn shown(text: &str) -> String {
    format!("\"{}\"", cut(text))
}

/// Returns the text on one line, cut to [`SHOWN_CHARS_MAX`], with control characters
/// escaped.
pub(super) fn cut(text: &str) -> String {
    let mut short: String =
        text.chars().take(SHOWN_CHARS_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN_CHARS_MAX).is_some() {
        short.push_str("...");
    }
    // escape_debug also escapes single quotes. They need no escape in double quotes.
    short.replace("\\'", "'")
}

/// Checks that `number` is a prime. Only then does the preference list of each backend
/// hold every slot of the hash table.
pub(super) fn prime(number: u32) -> Result<(), ValueError> {
    if is_prime(number) {
        return Ok(());
    }
    let below = (*HASH_SLOTS.start()..number).rev().find(|other| is_prime(*other));
    let near: Vec<String> =
        below.into_iter().chain([prime_from(number)]).map(|prime| prime.to_string()).collect();
    Err(ValueError::new(format!("hash_slots must be a prime, not {number}"))
        .help(format!("primes near it: {}", near.join(", "))))
}

/// Returns the first prime from `number` to the end of [`HASH_SLOTS`], which is a prime.
pub(super) fn prime_from(number: u32) -> u32 {
    let end = *HASH_SLOTS.end();
    (number..=end).find(|other| is_prime(*other)).unwrap_or(end)
}

fn is_prime(number: u32) -> bool {
    let divides = |divisor: u32| number.is_multiple_of(divisor);
    number >= 2 && !(2..).take_while(|divisor| divisor * divisor <= number).any(divides)
}

// === impl ValueError ===

impl ValueError {
    pub(super) fn new(message: impl Into<String>) -> Self {
        ValueError { message: message.into(), help: None }
    }

    pub(super) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Puts the name of the key before the message.
    pub(super) fn named(self, key: &str) -> Self {
        ValueError { message: format!("{key}: {}", self.message), help: self.help }
    }
}

impl fmt::Display for ValueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_add_up_their_parts() {
        let read = |text| duration(text, TIME).map(|time| time.as_millis()).ok();
        assert_eq!(read("250ms"), Some(250));
        assert_eq!(read("1m30s"), Some(90_000));
        assert_eq!(read("1h 1.5s"), Some(3_601_500));
        assert_eq!(read("30d"), Some(30 * 86_400_000));
        for wrong in
            ["", "5", "s", "5 months", "1M", "1y", "31d", "1us", "0s", "-1s", "1e3s", "off"]
        {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn sizes_are_whole_numbers_with_a_binary_unit() {
        let read = |text| size(text, BUFFERS).ok();
        assert_eq!(read("1MiB"), Some(1 << 20));
        assert_eq!(read("2048KiB"), Some(2 << 20));
        assert_eq!(read("1TiB"), Some(1 << 40));
        for wrong in ["", "5", "MiB", "64MB", "1.5GiB", "-1MiB", "1 MiB", "1023KiB", "2TiB"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        assert_eq!(read("99999999999999999999GiB"), None);
    }

    #[test]
    fn sums_beyond_the_largest_duration_are_rejected() {
        for text in
            ["18446744073709551615s 1000000000ns", "999999999999d999999999999d", "99999999999999h"]
        {
            assert!(duration(text, TIME).is_err());
        }
    }

    #[test]
    fn suggestions_have_few_different_letters_or_contain_the_text() {
        let near = |text| nearest(text, ["weight", "address", "weighted-round-robin"].into_iter());
        assert_eq!(near("wieght"), Some("weight"));
        assert_eq!(near("Weight"), Some("weight"));
        assert_eq!(near("round_robin"), Some("weighted-round-robin"));
        assert_eq!(near("robi"), None);
        assert_eq!(near("colour"), None);
        assert_eq!(near(""), None);
        assert_eq!(near(&"weight".repeat(1_000_000)), None);
    }

    #[test]
    fn shown_text_is_cut_and_escaped() {
        assert_eq!(shown("it's \u{1b}[31m"), "\"it's \\u{1b}[31m\"");
        assert_eq!(shown(&"x".repeat(100)).len(), SHOWN_CHARS_MAX + 5);
    }
}
