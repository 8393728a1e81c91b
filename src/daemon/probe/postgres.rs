//! Asks a PostgreSQL server whether it takes connections, and for its role.
//!
//! Called by probes of kind `postgres`. Protocol: version 3
//! (<https://www.postgresql.org/docs/current/protocol.html>). It never starts a transaction
//! that writes. A server that starts up, shuts down or has no free connection answers a
//! login with an error.

use super::answer_bytes::{ANSWER_BYTES_MAX, AnswerBytes};
use super::tls::{self, StartTls};
use super::{ProbeError, ProbeStage, exchange_error, password, quote, quote_message};
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use tidegate_core::health::ProbeAnswer;
use tidegate_core::metrics::counters::LocalErrorKind;
use tidegate_core::model::{NodeRole, PostgresProbe};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::Zeroizing;

/// Length 8 and the code of `SSLRequest`.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// Version 3.0.
const VERSION: [u8; 4] = [0, 3, 0, 0];

/// Most rounds of a SCRAM hash. The default of the server is 4,096; these take about 50 ms.
const SCRAM_ROUNDS_MAX: u32 = 100_000;

/// Qualified, because the role may have another `search_path`.
const QUESTION: &str = "SELECT pg_catalog.pg_is_in_recovery()";

/// How a probe logs in.
pub(crate) struct PostgresLogin<'a> {
    pub(crate) user: &'a str,
    pub(crate) password: Option<&'a str>,
    pub(crate) database: Option<&'a str>,
}

/// One message: its type and its body.
struct Message {
    kind: u8,
    body: Vec<u8>,
}

/// Whether the server lets the probe in.
enum LoginResult {
    LoggedIn,
    /// It asks for a password, and the probe has none.
    AskedForPassword,
}

/// Asks for TLS, and with a user logs in and asks for the role.
pub(super) async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    probe: &PostgresProbe,
    tls: StartTls<'_>,
    stage: &mut ProbeStage,
) -> Result<ProbeAnswer, ProbeError> {
    let Some(user) = &probe.login.user else { return answers(stream, tls, stage).await };
    let password = password::read(&probe.login).await?;
    let credentials = PostgresLogin {
        user,
        password: password.as_ref().map(|password| password.as_str()),
        database: probe.database.as_deref(),
    };
    if tls.settings.is_none() {
        return ask(&mut stream, &credentials, stage).await;
    }
    if !takes_tls(&mut stream, stage).await? {
        return Err(ProbeError::Backend("the server takes no TLS".to_owned()));
    }
    *stage = ProbeStage::Handshake;
    let mut stream = tls.handshake(stream).await?;
    let result = ask(&mut stream, &credentials, stage).await;
    tls::end(&mut stream).await;
    result
}

/// Succeeds if the server answers `SSLRequest`. A server that takes TLS logs an error if
/// no handshake follows.
async fn answers<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    tls: StartTls<'_>,
    stage: &mut ProbeStage,
) -> Result<ProbeAnswer, ProbeError> {
    let takes_tls = takes_tls(&mut stream, stage).await?;
    *stage = ProbeStage::Handshake;
    match (takes_tls, tls.settings.is_some()) {
        (true, required) => match tls.handshake(stream).await {
            Ok(mut stream) => tls::end(&mut stream).await,
            Err(error) if required => return Err(error),
            Err(_) => {}
        },
        (false, true) => return Err(ProbeError::Backend("the server takes no TLS".to_owned())),
        (false, false) => {}
    }
    Ok(ProbeAnswer::Expected)
}

/// Reads one byte only: whatever follows it without encryption must not count (CVE-2021-23222).
async fn takes_tls<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    stage: &mut ProbeStage,
) -> Result<bool, ProbeError> {
    *stage = ProbeStage::Sending;
    stream.write_all(&SSL_REQUEST).await.map_err(exchange_error)?;
    stream.flush().await.map_err(exchange_error)?;
    *stage = ProbeStage::Answer;
    match stream.read_u8().await.map_err(exchange_error)? {
        b'S' => Ok(true),
        b'N' => Ok(false),
        other => Err(foreign(&[other])),
    }
}

/// Logs in, asks for the role and logs out.
pub(crate) async fn ask<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    credentials: &PostgresLogin<'_>,
    stage: &mut ProbeStage,
) -> Result<ProbeAnswer, ProbeError> {
    let mut answer = AnswerBytes::new(stream, stage);
    answer.send(&startup(credentials)).await?;
    if let LoginResult::AskedForPassword = log_in(&mut answer, credentials).await? {
        return Ok(ProbeAnswer::Expected);
    }
    let role = role(&mut answer).await;
    if answer.send(&message(b'X', &[])).await.is_ok() {
        answer.drain().await;
    }
    role.map(ProbeAnswer::Role)
}

fn startup(credentials: &PostgresLogin<'_>) -> Vec<u8> {
    let mut body = VERSION.to_vec();
    let database = credentials.database.map(|name| ("database", name));
    let settings = [("user", credentials.user), ("application_name", "tidegate")];
    for (name, value) in settings.into_iter().chain(database) {
        body.extend([name.as_bytes(), &[0], value.as_bytes(), &[0]].concat());
    }
    body.push(0);
    [&length(&body), &*body].concat()
}

/// Answers requests for a password until the server is ready for a query.
async fn log_in<S: AsyncRead + AsyncWrite + Unpin>(
    answer: &mut AnswerBytes<'_, S>,
    credentials: &PostgresLogin<'_>,
) -> Result<LoginResult, ProbeError> {
    loop {
        let Message { kind, body } = receive(answer).await?;
        match kind {
            b'R' => match body.split_first_chunk() {
                Some((&method, rest)) => {
                    if !authenticate(answer, credentials, u32::from_be_bytes(method), rest).await? {
                        return Ok(LoginResult::AskedForPassword);
                    }
                }
                None => return Err(foreign(&body)),
            },
            b'E' => return Err(error_response(&body)),
            b'Z' => return Ok(LoginResult::LoggedIn),
            // A key for cancelling, a parameter, a notice, an older version of the protocol.
            b'K' | b'S' | b'N' | b'v' => {}
            _ => return Err(foreign(&[&[kind], &*body].concat())),
        }
    }
}

/// Answers one request. Returns false if it needs a password that the probe does not have.
async fn authenticate<S: AsyncRead + AsyncWrite + Unpin>(
    answer: &mut AnswerBytes<'_, S>,
    credentials: &PostgresLogin<'_>,
    method: u32,
    rest: &[u8],
) -> Result<bool, ProbeError> {
    if method == 0 {
        return Ok(true);
    }
    let Some(password) = credentials.password else { return Ok(false) };
    match (method, rest) {
        (3, []) => send_password(answer, password).await?,
        (5, salt) => match salt.try_into() {
            Ok(salt) => {
                let hash = md5_hash(credentials.user.as_bytes(), password.as_bytes(), salt);
                send_password(answer, &hash).await?;
            }
            Err(_) => return Err(foreign(rest)),
        },
        (10, offered) => {
            if !offered.split(|byte| *byte == 0).any(|name| name == SCRAM_SHA_256.as_bytes()) {
                let offered = quote(offered);
                let reason = format!("the server offers {offered}, the probe SCRAM-SHA-256");
                return Err(ProbeError::Backend(reason));
            }
            scram(answer, password).await?;
        }
        _ => {
            let reason = format!(
                "the server asks for authentication of type {method}; the probe has a password"
            );
            return Err(ProbeError::Backend(reason));
        }
    }
    Ok(true)
}

async fn send_password<S: AsyncRead + AsyncWrite + Unpin>(
    answer: &mut AnswerBytes<'_, S>,
    password: &str,
) -> Result<(), ProbeError> {
    let body = Zeroizing::new([password.as_bytes(), &[0]].concat());
    answer.send(&Zeroizing::new(message(b'p', &body))).await
}

/// SCRAM-SHA-256 (RFC 5802, RFC 7677) without channel binding. The hash takes milliseconds, so
/// another thread computes it.
async fn scram<S: AsyncRead + AsyncWrite + Unpin>(
    answer: &mut AnswerBytes<'_, S>,
    password: &str,
) -> Result<(), ProbeError> {
    let mut scram = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
    let first = scram.message();
    let name = [SCRAM_SHA_256.as_bytes(), &[0]].concat();
    answer.send(&message(b'p', &[&*name, &be_length(first), first].concat())).await?;
    let challenge = sasl(answer, 11).await?;
    if rounds(&challenge).is_none_or(|rounds| rounds > SCRAM_ROUNDS_MAX) {
        let challenge = quote(&challenge);
        let reason = format!(
            "the server asks for more than {SCRAM_ROUNDS_MAX} rounds of SCRAM: {challenge}"
        );
        return Err(ProbeError::Backend(reason));
    }
    let hashed = tokio::task::spawn_blocking(move || {
        let result = scram.update(&challenge);
        (scram, result)
    });
    let (mut scram, result) = hashed.await.map_err(|_| {
        ProbeError::Local("hashing of the password panicked".to_owned(), LocalErrorKind::Other)
    })?;
    // The text can quote the server.
    let failed = |error: std::io::Error| {
        let text = error.to_string();
        ProbeError::Backend(format!("SCRAM failed: {}", quote_message(text.as_bytes())))
    };
    result.map_err(failed)?;
    answer.send(&message(b'p', scram.message())).await?;
    let last = sasl(answer, 12).await?;
    scram.finish(&last).map_err(failed)
}

/// Returns the data of the next message of an exchange.
async fn sasl<S: AsyncRead + AsyncWrite + Unpin>(
    answer: &mut AnswerBytes<'_, S>,
    method: u32,
) -> Result<Vec<u8>, ProbeError> {
    let Message { kind, body } = receive(answer).await?;
    match (kind, body.split_first_chunk()) {
        (b'R', Some((code, data))) if *code == method.to_be_bytes() => Ok(data.to_vec()),
        (b'E', _) => Err(error_response(&body)),
        _ => Err(foreign(&[&[kind], &*body].concat())),
    }
}

/// Finds `i=4096` in the first message of the server.
fn rounds(challenge: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(challenge).ok()?;
    text.split(',').find_map(|part| part.strip_prefix("i="))?.parse().ok()
}

/// Asks whether the server replays the log of another one.
async fn role<S: AsyncRead + AsyncWrite + Unpin>(
    answer: &mut AnswerBytes<'_, S>,
) -> Result<NodeRole, ProbeError> {
    answer.send(&message(b'Q', &[QUESTION.as_bytes(), &[0]].concat())).await?;
    let mut role = None;
    loop {
        let Message { kind, body } = receive(answer).await?;
        match (kind, &*body) {
            // One column of one byte.
            (b'D', [0, 1, 0, 0, 0, 1, b't']) => role = Some(NodeRole::Replica),
            (b'D', [0, 1, 0, 0, 0, 1, b'f']) => role = Some(NodeRole::Primary),
            (b'E', _) => return Err(error_response(&body)),
            (b'Z', _) => return role.ok_or_else(|| foreign(&body)),
            (b'T' | b'C' | b'N' | b'S', _) => {}
            _ => return Err(foreign(&[&[kind], &*body].concat())),
        }
    }
}

async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
    answer: &mut AnswerBytes<'_, S>,
) -> Result<Message, ProbeError> {
    let header: [u8; 5] = answer.array().await?;
    let [kind, length @ ..] = header;
    let length = usize::try_from(u32::from_be_bytes(length)).ok();
    let length = length.and_then(|length| length.checked_sub(4));
    match length.filter(|length| *length <= ANSWER_BYTES_MAX) {
        Some(length) => Ok(Message { kind, body: answer.bytes(length).await? }),
        None => Err(foreign(&header)),
    }
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    [[kind].as_slice(), &length(body), body].concat()
}

/// Of a message, with the length itself.
fn length(body: &[u8]) -> [u8; 4] {
    u32::try_from(body.len() + 4).unwrap_or(u32::MAX).to_be_bytes()
}

fn be_length(data: &[u8]) -> [u8; 4] {
    u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes()
}

/// Quotes the message and the code of an error.
fn error_response(body: &[u8]) -> ProbeError {
    let field = |kind: u8| {
        let mut fields = body.split(|byte| *byte == 0);
        fields.find_map(|field| field.strip_prefix(&[kind])).unwrap_or_default()
    };
    let (text, code) = (quote_message(field(b'M')), field(b'C').escape_ascii());
    ProbeError::Backend(format!("the server answers {text} ({code})"))
}

fn foreign(got: &[u8]) -> ProbeError {
    ProbeError::Backend(format!("not the protocol of PostgreSQL: got {}", quote(got)))
}
