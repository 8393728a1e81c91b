//! Reads the words of an agent: a small server next to a backend that knows its state.
//!
//! Called by probes of kind `agent`. The wire format is that of HAProxy's `agent-check`: one
//! line of words, separated by spaces, tabs or commas, and a comment after `#`. It applies no
//! word.

use super::{ProbeError, ProbeStage, exchange_error, quote, quote_message};
use tidegate_core::health::ProbeAnswer;
use tidegate_core::health::agent::{AgentReport, AgentVerdict, AgentWish};
use tidegate_core::model::{ProbeBytes, Words};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest answer.
const LINE_BYTES_MAX: usize = 1024;

/// Largest cap that counts; a larger one is the same as this one.
const CAP_MAX: u32 = 10_000_000;

/// Sends `send` and reads one line.
pub(super) async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    send: &ProbeBytes,
    stage: &mut ProbeStage,
) -> Result<ProbeAnswer, ProbeError> {
    if !send.0.is_empty() {
        *stage = ProbeStage::Sending;
        stream.write_all(&send.0).await.map_err(exchange_error)?;
        stream.flush().await.map_err(exchange_error)?;
    }
    *stage = ProbeStage::Answer;
    let line = line(stream).await?;
    let report = report(&line).ok_or_else(|| {
        ProbeError::Backend(format!("no word of an agent in its answer: got {}", quote(&line)))
    })?;
    Ok(ProbeAnswer::Agent(Box::new(report)))
}

/// Reads up to the first end of a line, or up to the end of the connection.
async fn line<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Vec<u8>, ProbeError> {
    let mut line = Vec::with_capacity(LINE_BYTES_MAX);
    loop {
        let remaining = (LINE_BYTES_MAX - line.len()) as u64;
        let count = (&mut *stream).take(remaining).read_buf(&mut line).await;
        let count = count.map_err(exchange_error)?;
        if let Some(end) = line.iter().position(|byte| matches!(byte, b'\r' | b'\n')) {
            line.truncate(end);
            return Ok(line);
        }
        match count {
            0 if line.len() < LINE_BYTES_MAX => return Ok(line),
            0 => {
                let reason = format!("the first line is longer than {LINE_BYTES_MAX} bytes");
                return Err(ProbeError::Backend(reason));
            }
            _ => {}
        }
    }
}

/// Returns what a line says; `None` if it has no known word. Unknown words next to known ones
/// are ignored, as HAProxy does.
pub(super) fn report(line: &[u8]) -> Option<AgentReport> {
    let (words, comment) = match line.iter().position(|byte| *byte == b'#') {
        Some(at) => (&line[..at], line[at + 1..].trim_ascii()),
        None => (line, &[][..]),
    };
    let mut report = AgentReport::default();
    for word in words.split(|byte| matches!(byte, b' ' | b'\t' | b',')) {
        let Ok(word) = std::str::from_utf8(word) else { continue };
        take(word, &mut report);
    }
    if report == AgentReport::default() {
        return None;
    }
    if !comment.is_empty() {
        report.comment = quote_message(comment).to_string();
    }
    Some(report)
}

/// Of several words of one sort, the last one counts.
fn take(word: &str, report: &mut AgentReport) {
    let word = word.to_ascii_lowercase();
    if let Some(wish) = AgentWish::all().find(|wish| wish.word() == word) {
        report.wish = Some(wish);
    } else if let Some(verdict) = AgentVerdict::all().find(|verdict| verdict.word() == word) {
        report.verdict = Some(verdict);
    } else if let Some(share) = word.strip_suffix('%').and_then(number) {
        report.share = Some(share);
    } else if let Some(most) = word.strip_prefix("maxconn:").and_then(number) {
        report.connections_max = Some(most.min(CAP_MAX));
    }
}

/// Reads digits; a number that is too large is the largest one.
fn number(digits: &str) -> Option<u32> {
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| digits.parse().unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(line: &str) -> String {
        report(line.as_bytes()).map_or_else(|| "-".to_owned(), |report| report.to_string())
    }

    #[test]
    fn words_are_read_as_haproxy_documents_them() {
        let cases = [
            ("75%", "agent says 75%"),
            ("0%", "agent says 0%"),
            ("ready up 100%\tmaxconn:30", "agent says up ready 100% maxconn:30"),
            ("UP,Drain", "agent says up drain"),
            ("maint", "agent says maint"),
            ("down#disk full", "agent says down: \"disk full\""),
            ("fail # \u{1b}[2J", "agent says fail: \"\\x1b[2J\""),
            ("stopped #", "agent says stopped"),
            ("up down", "agent says down"),
            ("20% 30%", "agent says 30%"),
            ("99999999999%", "agent says 4294967295%"),
            ("maxconn:99999999999", "agent says maxconn:10000000"),
            ("up wibble weight:3", "agent says up"),
        ];
        for (line, expected) in cases {
            assert_eq!(shown(line), expected, "{line}");
        }
    }

    #[test]
    fn line_without_a_known_word_says_nothing() {
        for line in ["", "# comment", "HTTP/1.1 200 OK", "%", "-5%", "5.5%", "maxconn:", "upp"] {
            assert_eq!(shown(line), "-", "{line}");
        }
        assert_eq!(report(&[0xff, b' ', 0xfe]), None);
    }
}
