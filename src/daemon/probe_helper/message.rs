//! The messages between the balancer and the probe helper. Numbers are little-endian.
//!
//! Used by `link` and `runner`. Decoding never panics, and rejects missing and excess bytes. The
//! two sides can run different releases after an upgrade without a supervisor, so each message
//! starts with its version, and a runner answers a request of another version with its own.

use std::time::Duration;
use tidegate_core::model::CommandSubject;
use tidegate_net::packets::BYTES_MAX;

/// Version of the messages.
pub(super) const VERSION: u8 = 1;

/// Longest reply. A write of this length to a pipe is atomic (pipe(7), PIPE_BUF).
pub(super) const REPLY_BYTES_MAX: usize = 2048;

/// Longest text of a reply.
pub(super) const TEXT_BYTES_MAX: usize = 1024;

const RUN: u8 = 1;
const REREAD: u8 = 2;

/// A request of the balancer. A request to run carries a pipe for the reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HelperRequest {
    /// Run a command.
    Run(RunCommand),
    /// The balancer has applied its configuration file: read it again.
    Reread,
}

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RunCommand {
    /// Time until the command is killed.
    pub(super) timeout: Duration,
    pub(super) subject: CommandSubject,
    /// The words in the configuration, with placeholders.
    pub(super) command: Vec<String>,
}

/// The answer to a [`RunCommand`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HelperReply {
    /// The command exited. With the first line of its output.
    Exited { code: i32, line: Vec<u8> },
    /// A signal ended the command.
    Signalled { signal: i32, line: Vec<u8> },
    /// The command was killed at its timeout.
    TimedOut { line: Vec<u8> },
    /// The command was not started.
    NotStarted { errno: i32, why: String },
    /// The configuration file does not have the command, or is not readable.
    Rejected { why: String },
    /// The helper uses another version.
    Version(u8),
}

/// Why bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoMessage {
    Version(u8),
    Malformed,
}

/// Reads fields from the front of a message.
struct MessageFields<'b>(&'b [u8]);

// === impl HelperRequest ===

impl HelperRequest {
    /// Encodes the request. `None`: it is too long for a message.
    pub(super) fn encode(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![VERSION];
        match self {
            HelperRequest::Reread => bytes.push(REREAD),
            HelperRequest::Run(RunCommand { timeout, subject, command }) => {
                bytes.push(RUN);
                let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
                bytes.extend(millis.to_le_bytes());
                let CommandSubject { pool, backend, address, port } = subject;
                for text in [pool, backend, address, port] {
                    push_text(&mut bytes, text.as_bytes())?;
                }
                bytes.extend(u16::try_from(command.len()).ok()?.to_le_bytes());
                for word in command {
                    push_text(&mut bytes, word.as_bytes())?;
                }
            }
        }
        (bytes.len() <= BYTES_MAX).then_some(bytes)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<HelperRequest, NoMessage> {
        let mut fields = MessageFields::of(bytes)?;
        let request = || -> Option<HelperRequest> {
            let request = match fields.byte()? {
                RUN => HelperRequest::Run(RunCommand {
                    timeout: Duration::from_millis(u64::from_le_bytes(fields.array()?)),
                    subject: CommandSubject {
                        pool: fields.text()?,
                        backend: fields.text()?,
                        address: fields.text()?,
                        port: fields.text()?,
                    },
                    command: {
                        let count = u16::from_le_bytes(fields.array()?);
                        (0..count).map(|_| fields.text()).collect::<Option<_>>()?
                    },
                }),
                REREAD => HelperRequest::Reread,
                _ => return None,
            };
            fields.0.is_empty().then_some(request)
        }();
        request.ok_or(NoMessage::Malformed)
    }
}

// === impl HelperReply ===

impl HelperReply {
    /// Encodes the reply. Cuts texts that are too long.
    pub(super) fn encode(&self) -> Vec<u8> {
        let cut = |text: &[u8]| text[..text.len().min(TEXT_BYTES_MAX)].to_vec();
        let (kind, number, text) = match self {
            HelperReply::Exited { code, line } => (1, *code, cut(line)),
            HelperReply::Signalled { signal, line } => (2, *signal, cut(line)),
            HelperReply::TimedOut { line } => (3, 0, cut(line)),
            HelperReply::NotStarted { errno, why } => (4, *errno, cut(why.as_bytes())),
            HelperReply::Rejected { why } => (5, 0, cut(why.as_bytes())),
            HelperReply::Version(version) => (6, i32::from(*version), Vec::new()),
        };
        let mut bytes = vec![VERSION, kind];
        bytes.extend(number.to_le_bytes());
        // A cut text always has a length.
        let _ = push_text(&mut bytes, &text);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<HelperReply, NoMessage> {
        let mut fields = MessageFields::of(bytes)?;
        let reply = || -> Option<HelperReply> {
            let (kind, number) = (fields.byte()?, i32::from_le_bytes(fields.array()?));
            let line = fields.bytes()?.to_vec();
            let why = || String::from_utf8_lossy(&line).into_owned();
            let reply = match kind {
                1 => HelperReply::Exited { code: number, line },
                2 => HelperReply::Signalled { signal: number, line },
                3 => HelperReply::TimedOut { line },
                4 => HelperReply::NotStarted { errno: number, why: why() },
                5 => HelperReply::Rejected { why: why() },
                6 => HelperReply::Version(u8::try_from(number).ok()?),
                _ => return None,
            };
            fields.0.is_empty().then_some(reply)
        }();
        reply.ok_or(NoMessage::Malformed)
    }
}

fn push_text(bytes: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    bytes.extend(u16::try_from(text.len()).ok()?.to_le_bytes());
    bytes.extend(text);
    Some(())
}

// === impl MessageFields ===

impl<'b> MessageFields<'b> {
    fn of(bytes: &'b [u8]) -> Result<MessageFields<'b>, NoMessage> {
        match bytes.split_first() {
            Some((&VERSION, rest)) => Ok(MessageFields(rest)),
            Some((other, _)) => Err(NoMessage::Version(*other)),
            None => Err(NoMessage::Malformed),
        }
    }

    fn byte(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }

    fn bytes(&mut self) -> Option<&'b [u8]> {
        let length = usize::from(u16::from_le_bytes(self.array()?));
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }

    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(command: Vec<String>, names: [String; 4]) -> HelperRequest {
        let [pool, backend, address, port] = names;
        let subject = CommandSubject { pool, backend, address, port };
        HelperRequest::Run(RunCommand { timeout: Duration::from_millis(1500), subject, command })
    }

    #[test]
    fn decoded_reply_equals_the_encoded_reply() {
        let line = b"OK - \xff".to_vec();
        for reply in [
            HelperReply::Exited { code: 3, line: line.clone() },
            HelperReply::Signalled { signal: 9, line: Vec::new() },
            HelperReply::TimedOut { line },
            HelperReply::NotStarted { errno: 2, why: "no such file".into() },
            HelperReply::Rejected { why: "not in the file".into() },
            HelperReply::Version(7),
        ] {
            assert_eq!(HelperReply::decode(&reply.encode()), Ok(reply));
        }
        let long = HelperReply::TimedOut { line: vec![b'x'; 70_000] }.encode();
        assert!(long.len() <= REPLY_BYTES_MAX);
        assert!(HelperReply::decode(&long).is_ok());
    }

    #[test]
    fn message_of_another_version_is_recognised() {
        let mut bytes = HelperRequest::Reread.encode().unwrap();
        bytes[0] = 9;
        assert_eq!(HelperRequest::decode(&bytes), Err(NoMessage::Version(9)));
        assert_eq!(HelperReply::decode(&bytes), Err(NoMessage::Version(9)));
    }

    #[test]
    fn command_that_is_too_long_is_not_encoded() {
        let names = || std::array::from_fn(|_| "x".to_owned());
        assert!(run(vec!["x".repeat(BYTES_MAX)], names()).encode().is_none());
        assert!(run(vec!["x".repeat(70_000)], names()).encode().is_none());
    }

    proptest! {
        #[test]
        fn decoded_request_equals_the_encoded_request(
            command in prop::collection::vec(".{0,20}", 0..70),
            names: [String; 4],
        ) {
            let request = run(command, names);
            let Some(bytes) = request.encode() else { return Ok(()) };
            prop_assert_eq!(HelperRequest::decode(&bytes), Ok(request));
            for length in 1..bytes.len() {
                prop_assert_eq!(HelperRequest::decode(&bytes[..length]), Err(NoMessage::Malformed));
            }
            let longer = [&bytes[..], &[0]].concat();
            prop_assert_eq!(HelperRequest::decode(&longer), Err(NoMessage::Malformed));
        }

        #[test]
        fn decoding_arbitrary_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let bytes = [&[VERSION][..], &bytes].concat();
            let _ = (HelperRequest::decode(&bytes), HelperReply::decode(&bytes));
        }
    }
}
