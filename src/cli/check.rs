//! `tidegate check`: validates a configuration file.
//!
//! Called by the command line. It makes the same checks as `run`, on this host and as this
//! user, and changes nothing.

use super::{CheckArgs, resolve};
use std::io::{IsTerminal, Write};
use tidegate_client::command::Exit;
use tidegate_config::{self as config, Loaded, Severity};
use tidegate_daemon as daemon;

/// Validates a file. Prints problems and warnings to standard error, and the summary of a
/// valid file to standard output.
pub fn main(args: &CheckArgs) -> Exit {
    let colour = std::io::stderr().is_terminal();
    let path = args.config.path();
    match config::load(path) {
        Ok(mut loaded) => {
            loaded.warnings.extend(daemon::preflight(&loaded));
            for problem in &loaded.warnings {
                eprintln!("{}", problem.render(colour));
            }
            if loaded.warnings.iter().any(|problem| problem.severity == Severity::Error) {
                return Exit::Refused;
            }
            // If standard output is closed, the summary is lost.
            let _ = writeln!(std::io::stdout(), "{}: {}", path.display(), summary(&loaded));
            if args.resolve && !resolve::print_all(&loaded.config) {
                return Exit::Failed;
            }
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
