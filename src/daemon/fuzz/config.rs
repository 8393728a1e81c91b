//! Fuzz target: arbitrary bytes as a configuration file.
//!
//! Called by the fuzzer and by the mutation test. It checks:
//!
//! - Parsing never panics.
//! - Each problem of a rejected file has a position in the file and a text of one line.
//! - An accepted file, written and parsed again, gives the same configuration.

use tidegate_config::{Problems, parse, write};
use tidegate_core::model::Config;

/// Longest input. Validation of a longer input is too slow for fuzzing.
const LEN_MAX: usize = 64 * 1024;

/// See the module's documentation.
pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(&data[..data.len().min(LEN_MAX)]) else { return };
    match parse(text, "a file") {
        Ok(config) => check_written(&config),
        Err(problems) => check_problems(text, &problems),
    }
}

fn check_problems(text: &str, problems: &Problems) {
    assert!(!problems.list.is_empty(), "rejected without a problem");
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut before = (0, 0);
    for problem in &problems.list {
        let place = (problem.line, problem.column);
        assert!(place >= before, "{place:?} after {before:?}");
        before = place;
        let line = text.split('\n').nth(problem.line.wrapping_sub(1));
        let line = line.unwrap_or_else(|| panic!("no line {}", problem.line));
        let columns = 1..=line.chars().count() + 1;
        assert!(columns.contains(&problem.column), "no column {place:?}: {}", problem.message);
        for text in [Some(&problem.message), problem.help.as_ref()].into_iter().flatten() {
            assert!(!text.is_empty() && !text.contains(char::is_control), "{text:?}");
        }
        problem.render(true);
    }
    assert!(problems.render(false).contains("error"), "{problems:?}");
}

fn check_written(config: &Config) {
    let text = write(config);
    let again = parse(&text, "a file");
    let again = again.unwrap_or_else(|problems| panic!("{}", problems.render(false)));
    assert!(again == *config, "{again:#?}\nis not {config:#?}");
    assert_eq!(write(&again), text);
}
