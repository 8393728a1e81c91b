//! Helpers of all commands: exit codes, duration arguments, printing.
//!
//! Called by the commands of `cli` and `lab`. It sends no requests.

use serde::Serialize;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

/// The exit code of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Success.
    Fine = 0,
    /// A configuration or a request was rejected.
    Refused = 1,
    /// Usage error.
    Usage = 2,
    /// Runtime failure, such as an address in use or an unreachable admin API.
    Failed = 3,
}

/// Parses a duration greater than zero in humantime syntax: `20s`, `1m30s`.
///
/// # Errors
/// The text is not a duration, or it is zero.
pub fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("the duration must be greater than zero".to_owned()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(error.to_string()),
    }
}

/// Parses an IP address with a port.
///
/// # Errors
/// The text is something else, such as a host name.
pub fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "expected IP:PORT, for example 127.0.0.1:8080".to_owned())
}

/// Prints to standard output. Errors are ignored, for example if the reader has exited.
pub fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}

/// Prints a document as JSON in one line.
pub fn print_json(document: &impl Serialize) {
    print(&serde_json::to_string(document).expect("plain data always serialises"));
}

// === impl Exit ===

impl Exit {
    /// Converts the exit code of another process of this program.
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
