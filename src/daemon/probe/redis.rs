//! Asks a Redis server, or one with its protocol, whether it works and for its role.
//!
//! Called by probes of kind `redis`. Protocol: RESP2
//! (<https://redis.io/docs/latest/develop/reference/protocol-spec/>). A server that loads
//! its data (`LOADING`) or that refuses reads because it has lost its primary
//! (`MASTERDOWN`) answers `PING` with an error.

use super::answer_bytes::AnswerBytes;
use super::{ProbeError, quote};
use tidegate_core::health::ProbeAnswer;
use tidegate_core::model::NodeRole;
use tokio::io::{AsyncRead, AsyncWrite};
use zeroize::Zeroizing;

/// One reply.
enum Reply {
    /// `+OK`
    Status(Vec<u8>),
    /// `-ERR ...`
    Error(Vec<u8>),
    /// `$5 ...`
    Bulk(Vec<u8>),
}

/// Logs in if there is a password, sends `PING` and asks for the role.
pub(super) async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    mut answer: AnswerBytes<'_, S>,
    user: Option<&str>,
    password: Option<&str>,
) -> Result<ProbeAnswer, ProbeError> {
    let mut request = Zeroizing::new(Vec::new());
    if let Some(password) = password {
        let login: Vec<&str> = ["AUTH"].into_iter().chain(user).chain([password]).collect();
        command(&mut request, &login);
    }
    command(&mut request, &["PING"]);
    command(&mut request, &["INFO", "replication"]);
    command(&mut request, &["QUIT"]);
    answer.send(&request).await?;
    if password.is_some() {
        match reply(&mut answer).await? {
            Reply::Status(_) => {}
            Reply::Error(text) | Reply::Bulk(text) => return Err(unexpected("AUTH", &text)),
        }
    }
    match reply(&mut answer).await? {
        Reply::Status(text) if text == b"PONG" => {}
        Reply::Status(text) | Reply::Error(text) | Reply::Bulk(text) => {
            return Err(unexpected("PING", &text));
        }
    }
    let role = match reply(&mut answer).await? {
        Reply::Bulk(info) => role(&info),
        // The user may not ask; the server works.
        Reply::Error(_) | Reply::Status(_) => None,
    };
    answer.drain().await;
    Ok(role.map_or(ProbeAnswer::Expected, ProbeAnswer::Role))
}

/// Adds a command as an array of bulk strings.
fn command(to: &mut Vec<u8>, words: &[&str]) {
    to.extend(format!("*{}\r\n", words.len()).bytes());
    for word in words {
        to.extend(format!("${}\r\n", word.len()).bytes());
        to.extend(word.bytes());
        to.extend(b"\r\n");
    }
}

async fn reply<S: AsyncRead + AsyncWrite + Unpin>(
    answer: &mut AnswerBytes<'_, S>,
) -> Result<Reply, ProbeError> {
    let line = answer.line().await?;
    match line.split_first() {
        Some((b'+', text)) => Ok(Reply::Status(text.to_vec())),
        Some((b'-', text)) => Ok(Reply::Error(text.to_vec())),
        Some((b'$', length)) => {
            let length = std::str::from_utf8(length).ok().and_then(|text| text.parse().ok());
            let length: usize = length.ok_or_else(|| foreign(&line))?;
            let text = answer.bytes(length).await?;
            match answer.array().await? {
                [b'\r', b'\n'] => Ok(Reply::Bulk(text)),
                _ => Err(foreign(&text)),
            }
        }
        _ => Err(foreign(&line)),
    }
}

/// Finds `role:master` in the answer to `INFO`.
fn role(info: &[u8]) -> Option<NodeRole> {
    let lines = info.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let role = lines.filter_map(|line| line.strip_prefix(b"role:")).next()?;
    match role {
        b"master" => Some(NodeRole::Primary),
        b"slave" | b"replica" => Some(NodeRole::Replica),
        _ => None,
    }
}

fn unexpected(command: &str, text: &[u8]) -> ProbeError {
    ProbeError::Backend(format!("the answer to {command} is {}", quote(text)))
}

fn foreign(got: &[u8]) -> ProbeError {
    ProbeError::Backend(format!("not the protocol of Redis: got {}", quote(got)))
}
