//! Any bytes as a configuration file.
//!
//! Called by the fuzzer and by the mutation test. Nothing may panic; a file that
//! is refused is refused at a place that is in it, in words that fit one line;
//! a file that is taken is written as one that reads the same.

use tidegate_config::{Problems, parse, write};
use tidegate_core::model::Config;

/// More takes the validator too long to learn much in a minute.
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
    assert!(!problems.list.is_empty(), "refused for nothing");
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
        for said in [Some(&problem.message), problem.help.as_ref()].into_iter().flatten() {
            assert!(!said.is_empty() && !said.contains(char::is_control), "{said:?}");
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
