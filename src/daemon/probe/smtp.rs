//! Asks a mail server whether it takes mail.
//!
//! Called by probes of kind `smtp`. Protocol: RFC 5321. It starts no mail transaction.

use super::answer_bytes::AnswerBytes;
use super::{ProbeError, quote, quote_message};
use tidegate_core::health::ProbeAnswer;
use tokio::io::{AsyncRead, AsyncWrite};

/// Expects a greeting, says hello and leaves.
pub(crate) async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    mut answer: AnswerBytes<'_, S>,
) -> Result<ProbeAnswer, ProbeError> {
    let result = hello(&mut answer).await;
    if matches!(result, Ok(()) | Err(Failed::Reply(_))) && answer.send(b"QUIT\r\n").await.is_ok() {
        answer.drain().await;
    }
    match result {
        Ok(()) => Ok(ProbeAnswer::Expected),
        Err(Failed::Reply(error) | Failed::Connection(error)) => Err(error),
    }
}

/// Whether the connection can still end in order.
enum Failed {
    Reply(ProbeError),
    Connection(ProbeError),
}

async fn hello<S: AsyncRead + AsyncWrite + Unpin>(
    answer: &mut AnswerBytes<'_, S>,
) -> Result<(), Failed> {
    expect(answer, "the greeting", b"220").await?;
    answer.send(b"EHLO localhost\r\n").await.map_err(Failed::Connection)?;
    expect(answer, "the answer to EHLO", b"250").await
}

/// Reads a reply of one or more lines.
async fn expect<S: AsyncRead + AsyncWrite + Unpin>(
    answer: &mut AnswerBytes<'_, S>,
    what: &str,
    code: &[u8; 3],
) -> Result<(), Failed> {
    loop {
        let line = answer.line().await.map_err(Failed::Connection)?;
        match line.split_first_chunk::<3>() {
            Some((found, rest)) if found.iter().all(u8::is_ascii_digit) => {
                let last = match rest {
                    [b'-', ..] => false,
                    [] | [b' ', ..] => true,
                    _ => return Err(Failed::Connection(foreign(&line))),
                };
                if found != code {
                    let reason = format!("{what} is {}", quote_message(&line));
                    return Err(Failed::Reply(ProbeError::Backend(reason)));
                }
                if last {
                    return Ok(());
                }
            }
            _ => return Err(Failed::Connection(foreign(&line))),
        }
    }
}

fn foreign(got: &[u8]) -> ProbeError {
    ProbeError::Backend(format!("not the protocol of SMTP: got {}", quote(got)))
}
