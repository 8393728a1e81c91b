//! Asks a directory server whether it takes an anonymous bind.
//!
//! Called by probes of kind `ldap`. Protocol: RFC 4511, in BER.

use super::answer_bytes::{ANSWER_BYTES_MAX, AnswerBytes};
use super::{ProbeError, quote, quote_message};
use tidegate_core::health::ProbeAnswer;
use tokio::io::{AsyncRead, AsyncWrite};

/// Message 1: version 3, no name, no password.
const BIND: &[u8] = &[0x30, 12, 2, 1, 1, 0x60, 7, 2, 1, 3, 4, 0, 0x80, 0];

/// Message 2: ends the connection.
const UNBIND: &[u8] = &[0x30, 5, 2, 1, 2, 0x42, 0];

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 2;
const OCTETS: u8 = 4;
const ENUMERATED: u8 = 0x0a;
const BIND_RESPONSE: u8 = 0x61;
/// Tells that the server ends the connection, and why.
const EXTENDED_RESPONSE: u8 = 0x78;

/// Binds and unbinds.
pub(crate) async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    mut answer: AnswerBytes<'_, S>,
) -> Result<ProbeAnswer, ProbeError> {
    answer.send(BIND).await?;
    let message = receive(&mut answer).await?;
    let result = result(&message).ok_or_else(|| foreign(&message));
    if answer.send(UNBIND).await.is_ok() {
        answer.drain().await;
    }
    match result? {
        (BIND_RESPONSE, 0, _) => Ok(ProbeAnswer::Expected),
        (_, code, []) => Err(ProbeError::Backend(format!("the result of the bind is {code}"))),
        (_, code, text) => {
            let text = quote_message(text);
            Err(ProbeError::Backend(format!("the result of the bind is {code}: {text}")))
        }
    }
}

/// Returns the content of the next message.
async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
    answer: &mut AnswerBytes<'_, S>,
) -> Result<Vec<u8>, ProbeError> {
    let header: [u8; 2] = answer.array().await?;
    let length = match header {
        [SEQUENCE, short @ 0..=0x7f] => Some(usize::from(short)),
        [SEQUENCE, long @ 0x81..=0x84] => {
            let bytes = answer.bytes(usize::from(long & 0x7f)).await?;
            Some(bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)))
        }
        _ => None,
    };
    match length.filter(|length| *length <= ANSWER_BYTES_MAX) {
        Some(length) => answer.bytes(length).await,
        None => Err(foreign(&header)),
    }
}

/// Returns the type of the response, the result code and the text of the server.
fn result(message: &[u8]) -> Option<(u8, u8, &[u8])> {
    let (_, rest) = element(message, INTEGER)?;
    let kind = *rest.first()?;
    if kind != BIND_RESPONSE && kind != EXTENDED_RESPONSE {
        return None;
    }
    let (body, _) = element(rest, kind)?;
    let (code, rest) = element(body, ENUMERATED)?;
    let (_, rest) = element(rest, OCTETS)?;
    let (text, _) = element(rest, OCTETS)?;
    match code {
        [code] => Some((kind, *code, text)),
        _ => None,
    }
}

/// Splits off an element with this tag. Returns its content and the rest.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (length, rest) = match bytes.strip_prefix(&[tag])?.split_first()? {
        (short @ 0..=0x7f, rest) => (usize::from(*short), rest),
        (long @ 0x81..=0x84, rest) => {
            let (length, rest) = rest.split_at_checked(usize::from(long & 0x7f))?;
            (length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    rest.split_at_checked(length)
}

fn foreign(got: &[u8]) -> ProbeError {
    ProbeError::Backend(format!("not the protocol of LDAP: got {}", quote(got)))
}
