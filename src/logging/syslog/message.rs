//! One syslog message: the header before a log line, and the bounds of a message.
//!
//! Used for the log and the access log. It does no I/O and reads no clock.

use std::fmt::Display;
use std::io::Write;

/// Most bytes of a message. RFC 5424 asks receivers for 2,048; rsyslog takes 8,192 by default.
pub const MESSAGE_MAX: usize = 8_192;

/// The end of a message that was longer than [`MESSAGE_MAX`].
const CUT: &[u8] = b" [cut]";

/// The name that receivers show.
const APPLICATION: &str = "tidegate";

/// The parts of the header that all messages of one log share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyslogHeader {
    /// How the receiver reads the header.
    pub form: SyslogForm,
    /// Number of the facility, 0 to 23.
    pub facility: u8,
    /// Name of this host.
    pub host: String,
    /// Process ID.
    pub pid: u32,
    /// Kind of the messages: `log` or `access`.
    pub kind: &'static str,
}

/// The form of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyslogForm {
    /// RFC 5424.
    Rfc5424,
    /// The form of the C function `syslog`, without a time: journald and rsyslog expect it on
    /// the socket of the host, and take the time of arrival.
    Local,
}

/// Severities that Tidegate uses, with their numbers in RFC 5424.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum SyslogSeverity {
    Error = 3,
    Warning = 4,
    Info = 6,
    Debug = 7,
}

// === impl SyslogHeader ===

impl SyslogHeader {
    /// Appends the header of a message. `time` is in the form of RFC 3339.
    pub fn append(&self, severity: SyslogSeverity, time: &dyn Display, to: &mut Vec<u8>) {
        let SyslogHeader { form, facility, host, pid, kind } = self;
        let priority = u32::from(*facility) * 8 + severity as u32;
        // Writing to a vector cannot fail.
        let _ = match form {
            SyslogForm::Rfc5424 => {
                let host = host_field(host);
                write!(to, "<{priority}>1 {time} {host} {APPLICATION} {pid} {kind} - ")
            }
            SyslogForm::Local => write!(to, "<{priority}>{APPLICATION}[{pid}]: "),
        };
    }
}

/// The field HOSTNAME: at most 255 printable ASCII characters, `-` if there is no name.
fn host_field(host: &str) -> String {
    let name: String = host.chars().filter(char::is_ascii_graphic).take(255).collect();
    if name.is_empty() { "-".to_owned() } else { name }
}

/// Cuts a message to [`MESSAGE_MAX`] bytes, at the end of a character, and marks the cut.
pub(super) fn bounded(message: &mut Vec<u8>) {
    if message.len() <= MESSAGE_MAX {
        return;
    }
    let mut end = MESSAGE_MAX - CUT.len();
    // Bytes 0b10xxxxxx continue a character of UTF-8.
    while end > 0 && message[end] & 0xc0 == 0x80 {
        end -= 1;
    }
    message.truncate(end);
    message.extend_from_slice(CUT);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(form: SyslogForm, host: &str) -> String {
        let header =
            SyslogHeader { form, facility: 16, host: host.to_owned(), pid: 77, kind: "access" };
        let mut text = Vec::new();
        header.append(SyslogSeverity::Info, &"2026-12-01T01:02:03.000004Z", &mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn header_has_the_fields_of_rfc_5424_or_of_the_local_socket() {
        let text = header(SyslogForm::Rfc5424, "lb1.example.org");
        let fields = "2026-12-01T01:02:03.000004Z lb1.example.org tidegate 77 access - ";
        assert_eq!(text, format!("<134>1 {fields}"));
        assert_eq!(header(SyslogForm::Local, "lb1"), "<134>tidegate[77]: ");
    }

    #[test]
    fn name_of_the_host_cannot_add_a_field() {
        assert!(header(SyslogForm::Rfc5424, "a b\n\u{e9}").contains("Z ab tidegate "));
        assert!(header(SyslogForm::Rfc5424, "").contains("Z - tidegate "));
        let long = header(SyslogForm::Rfc5424, &"h".repeat(400));
        assert!(long.contains(&format!("Z {} tidegate ", "h".repeat(255))), "{long}");
    }

    #[test]
    fn long_message_is_cut_at_the_end_of_a_character() {
        for shift in 0..4 {
            let mut message = ("x".repeat(shift) + &"\u{1f600}".repeat(3_000)).into_bytes();
            bounded(&mut message);
            assert!((MESSAGE_MAX - 3..=MESSAGE_MAX).contains(&message.len()), "{}", message.len());
            assert!(String::from_utf8(message).unwrap().ends_with("\u{1f600} [cut]"));
        }
        let mut fits = vec![b'x'; MESSAGE_MAX];
        bounded(&mut fits);
        assert_eq!(fits, vec![b'x'; MESSAGE_MAX]);
    }
}
