//! `tidegate check`: every problem of a file with its place, or one line.
//!
//! Called by `cli`. It binds nothing and changes nothing.

use super::{CheckArgs, Exit};
use crate::config::{self, Loaded};
use std::io::{IsTerminal, Write};

/// Validates a file: problems and warnings on standard error, a summary of a
/// good file on standard output.
pub fn main(args: CheckArgs) -> Exit {
    let colour = std::io::stderr().is_terminal();
    match config::load(&args.config) {
        Ok(loaded) => {
            for warning in &loaded.warnings {
                eprintln!("{}", warning.render(colour));
            }
            // A reader that has gone away needs no summary.
            let _ = writeln!(std::io::stdout(), "{}: {}", args.config.display(), summary(&loaded));
            Exit::Fine
        }
        Err(problems) => {
            eprintln!("{}", problems.render(colour));
            Exit::Refused
        }
    }
}

fn summary(loaded: &Loaded) -> String {
    let config = &loaded.config;
    let backends: usize = config.pools.iter().map(|pool| pool.backends.len()).sum();
    let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let mut text = format!(
        "ok: {}, {}, {}",
        count(config.frontends.len(), "frontend"),
        count(config.pools.len(), "pool"),
        count(backends, "backend"),
    );
    if !loaded.warnings.is_empty() {
        text.push_str(", ");
        text.push_str(&count(loaded.warnings.len(), "warning"));
    }
    text
}
