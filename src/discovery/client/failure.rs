//! Why a request gave no answer that counts.
//!
//! The client creates these values, and sources tell them with [`HttpFailure::told`].
//! Errors of this host are separate from errors of the server.

use rustix::io::Errno;
use std::error::Error;
use std::fmt;
use std::io;
use tidegate_core::discovery::{SourceFailure, Told};

/// Longest detail, in bytes. A server chooses part of the text.
pub const DETAIL_BYTES_MAX: usize = 512;

/// A request without a usable answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpFailure {
    /// The class.
    pub why: SourceFailure,
    /// What happened, with the server's address; at most [`DETAIL_BYTES_MAX`] bytes.
    pub detail: String,
}

// === impl HttpFailure ===

impl HttpFailure {
    /// A failure of this class. Cuts the detail and replaces its control characters.
    pub fn new(why: SourceFailure, detail: impl fmt::Display) -> HttpFailure {
        HttpFailure { why, detail: short_text(&detail.to_string(), DETAIL_BYTES_MAX) }
    }

    /// An answer that cannot be read.
    pub fn protocol(detail: impl fmt::Display) -> HttpFailure {
        HttpFailure::new(SourceFailure::Protocol, detail)
    }

    /// An error of this host.
    pub fn local(detail: impl fmt::Display) -> HttpFailure {
        HttpFailure::new(SourceFailure::Local, detail)
    }

    /// What a source tells.
    pub fn told(self) -> Told {
        Told::Failed { why: self.why, detail: self.detail }
    }

    /// Puts the server in front of the detail.
    pub(crate) fn at(self, server: impl fmt::Display) -> HttpFailure {
        HttpFailure::new(self.why, format_args!("{server}: {}", self.detail))
    }
}

impl fmt::Display for HttpFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.why, self.detail)
    }
}

impl Error for HttpFailure {}

/// Returns the class of a failed connect or of a failed connection. `otherwise` applies to
/// errors of the server and of the path.
///
/// ENETUNREACH and EADDRNOTAVAIL are errors of this host: it has no route or no free port
/// (connect(2)). EHOSTUNREACH is not: a neighbour did not answer.
pub fn failure_of_io(error: &io::Error, otherwise: SourceFailure) -> SourceFailure {
    if error.kind() == io::ErrorKind::TimedOut {
        return SourceFailure::Timeout;
    }
    match Errno::from_io_error(error) {
        Some(
            Errno::MFILE
            | Errno::NFILE
            | Errno::NOBUFS
            | Errno::NOMEM
            | Errno::ADDRNOTAVAIL
            | Errno::NETUNREACH
            | Errno::NETDOWN
            | Errno::AFNOSUPPORT
            | Errno::ACCESS
            | Errno::PERM,
        ) => SourceFailure::Local,
        _ => otherwise,
    }
}

/// Cuts a text after `bytes_max` bytes and replaces control characters by spaces. Texts of
/// servers pass through it before they are logged.
pub fn short_text(text: &str, bytes_max: usize) -> String {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut short = text[..end].replace(char::is_control, " ");
    if end < text.len() {
        short.push('…');
    }
    short
}

/// Returns an error and its sources, without repetitions.
pub(super) fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

/// Returns the I/O error among the causes.
pub(super) fn io_cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a io::Error> {
    let mut at = Some(error);
    while let Some(cause) = at {
        if let Some(io) = cause.downcast_ref::<io::Error>() {
            return Some(io);
        }
        at = cause.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_this_host_are_not_the_servers() {
        let of = |errno: Errno| failure_of_io(&errno.into(), SourceFailure::Connect);
        for errno in [Errno::MFILE, Errno::NETUNREACH, Errno::ADDRNOTAVAIL, Errno::ACCESS] {
            assert_eq!(of(errno), SourceFailure::Local);
        }
        for errno in [Errno::CONNREFUSED, Errno::HOSTUNREACH, Errno::CONNRESET, Errno::NOENT] {
            assert_eq!(of(errno), SourceFailure::Connect);
        }
        assert_eq!(of(Errno::TIMEDOUT), SourceFailure::Timeout);
    }

    #[test]
    fn texts_of_servers_are_short_and_on_one_line() {
        assert_eq!(short_text("a\nb\u{1b}[0m", 99), "a b [0m");
        assert_eq!(short_text("äöü", 3), "ä…");
        let failure = HttpFailure::protocol("x".repeat(9999));
        assert!(failure.detail.len() <= DETAIL_BYTES_MAX + '…'.len_utf8());
    }
}
