//! What every command shares: its exit code, durations among its arguments, printing.
//!
//! Called by the commands of `cli` and `lab`. It asks and runs nothing.

use serde::Serialize;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

/// How a command ended, as scripts see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// All went well.
    Fine = 0,
    /// A configuration or a request was refused.
    Refused = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// Trouble while running: an address taken, the admin API unreachable.
    Failed = 3,
}

/// Parses a duration above zero, as humantime writes it: `20s`, `1m30s`.
///
/// # Errors
/// What is wrong with it.
pub fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("the duration must be greater than zero".to_owned()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(error.to_string()),
    }
}

/// Prints to standard output; a reader that has gone is no failure.
pub fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}

/// Prints a document in one line.
pub fn print_json(document: &impl Serialize) {
    print(&serde_json::to_string(document).expect("plain data always serialises"));
}

// === impl Exit ===

impl Exit {
    /// Of a process of this program that has ended with `code`.
    pub fn of(code: u8) -> Exit {
        match code {
            0 => Exit::Fine,
            1 => Exit::Refused,
            2 => Exit::Usage,
            _ => Exit::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}
