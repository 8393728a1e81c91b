//! Asks a MySQL or MariaDB server whether it takes connections, and for its role.
//!
//! Called by probes of kind `mysql`. Protocol: handshake version 10
//! (<https://dev.mysql.com/doc/dev/mysql-server/latest/PAGE_PROTOCOL.html>). A connection that
//! ends during the handshake counts towards `max_connect_errors`, and at that count the server
//! blocks this host. So the probe always logs in: without a user as one that need not exist,
//! because a rejected login does not count.

use super::answer_bytes::AnswerBytes;
use super::tls::{self, StartTls};
use super::{ProbeError, ProbeStage, password, quote, quote_message};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use tidegate_core::health::ProbeAnswer;
use tidegate_core::model::{NodeRole, ProbeLogin};
use tokio::io::{AsyncRead, AsyncWrite};
use zeroize::Zeroizing;

/// The user name of a probe without `user`.
const DEFAULT_USER: &str = "tidegate";

/// Codes of rejected logins: `ER_ACCESS_DENIED_ERROR`, `ER_ACCESS_DENIED_NO_PASSWORD_ERROR`,
/// `ER_NOT_SUPPORTED_AUTH_MODE`, `ER_MUST_CHANGE_PASSWORD_LOGIN`, `ER_ACCOUNT_HAS_BEEN_LOCKED`.
const REJECTED: [u16; 5] = [1045, 1698, 1251, 1862, 3118];

/// `CLIENT_LONG_PASSWORD`, `CLIENT_PROTOCOL_41`, `CLIENT_TRANSACTIONS`,
/// `CLIENT_SECURE_CONNECTION`, `CLIENT_PLUGIN_AUTH`.
const CAPABILITIES: u32 = 0x1 | 0x200 | 0x2000 | 0x8000 | 0x0008_0000;

/// `CLIENT_SSL`
const TLS: u32 = 0x800;

/// utf8mb4_general_ci
const CHARSET: u8 = 45;

const NATIVE: &[u8] = b"mysql_native_password";
const CACHING_SHA2: &[u8] = b"caching_sha2_password";

/// `super_read_only` implies it, and only superusers write while it is on.
const QUESTION: &[u8] = b"SELECT @@global.read_only";

/// How a probe logs in.
pub(crate) struct MysqlLogin<'a> {
    /// `None`: the probe expects that its login is rejected.
    pub(crate) user: Option<&'a str>,
    pub(crate) password: Option<&'a str>,
}

/// What the server asks for: a method and random bytes.
struct Challenge {
    method: Vec<u8>,
    nonce: Vec<u8>,
}

/// A packet: its number and its payload.
struct MysqlPacket {
    number: u8,
    payload: Vec<u8>,
}

/// The first packet of a server.
struct Greeting {
    takes_tls: bool,
    challenge: Challenge,
}

/// Reads the greeting, logs in and asks for the role.
pub(super) async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    login: &ProbeLogin,
    tls: StartTls<'_>,
    stage: &mut ProbeStage,
) -> Result<ProbeAnswer, ProbeError> {
    let password = password::read(login).await?;
    let login = MysqlLogin {
        user: login.user.as_deref(),
        password: password.as_ref().map(|password| password.as_str()),
    };
    if tls.settings.is_none() {
        return ask(&mut stream, &login, stage).await;
    }
    let greeting = {
        let mut answer = AnswerBytes::new(&mut stream, stage);
        let greeting = greeting(&mut answer).await?;
        if !greeting.takes_tls {
            return Err(ProbeError::Backend("the server takes no TLS".to_owned()));
        }
        answer.send(&packet(1, &head(CAPABILITIES | TLS))).await?;
        // Bytes that came without encryption must not count.
        answer.nothing_left()?;
        greeting
    };
    *stage = ProbeStage::Handshake;
    let mut stream = tls.handshake(stream).await?;
    let mut session =
        MysqlSession { answer: AnswerBytes::new(&mut stream, stage), encrypted: true };
    let result = session.ask(&login, greeting.challenge, 2).await;
    tls::end(&mut stream).await;
    result
}

/// Asks a server without TLS.
pub(crate) async fn ask<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    login: &MysqlLogin<'_>,
    stage: &mut ProbeStage,
) -> Result<ProbeAnswer, ProbeError> {
    let mut answer = AnswerBytes::new(stream, stage);
    let greeting = greeting(&mut answer).await?;
    MysqlSession { answer, encrypted: false }.ask(login, greeting.challenge, 1).await
}

async fn greeting<S: AsyncRead + AsyncWrite + Unpin>(
    answer: &mut AnswerBytes<'_, S>,
) -> Result<Greeting, ProbeError> {
    let MysqlPacket { payload, .. } = receive(answer).await?;
    if payload.first() == Some(&0xff) {
        return Err(error_packet(&payload).1);
    }
    parse_greeting(&payload).ok_or_else(|| foreign(&payload))
}

/// Returns `None` if the packet is not one of version 10 with `CLIENT_PLUGIN_AUTH`.
fn parse_greeting(payload: &[u8]) -> Option<Greeting> {
    let rest = payload.strip_prefix(&[10])?;
    let version = rest.iter().position(|byte| *byte == 0)?;
    let (nonce, rest) = rest.get(version + 5..)?.split_at_checked(8)?;
    let [0, low_a, low_b, _, _, _, high_a, high_b, _, rest @ ..] = rest else { return None };
    let capabilities = u32::from_le_bytes([*low_a, *low_b, *high_a, *high_b]);
    // Ten reserved bytes, the other 12 random bytes, a zero, and the name.
    let (more, method) = rest.get(10..)?.split_at_checked(12)?;
    let method = method.strip_prefix(&[0])?;
    let method = method.split(|byte| *byte == 0).next()?.to_vec();
    let challenge = Challenge { method, nonce: [nonce, more].concat() };
    Some(Greeting { takes_tls: capabilities & TLS != 0, challenge })
}

/// A connection after the greeting.
struct MysqlSession<'s, S> {
    answer: AnswerBytes<'s, S>,
    encrypted: bool,
}

// === impl MysqlSession ===

impl<S: AsyncRead + AsyncWrite + Unpin> MysqlSession<'_, S> {
    /// `number`: of the packet that is sent next.
    async fn ask(
        &mut self,
        login: &MysqlLogin<'_>,
        challenge: Challenge,
        number: u8,
    ) -> Result<ProbeAnswer, ProbeError> {
        if let Some(answer) = self.log_in(login, challenge, number).await? {
            return Ok(answer);
        }
        let role = match login.user {
            Some(_) => self.role().await.map(ProbeAnswer::Role),
            None => Ok(ProbeAnswer::Expected),
        };
        // COM_QUIT
        if self.answer.send(&packet(0, &[1])).await.is_ok() {
            self.answer.drain().await;
        }
        role
    }

    /// Returns an answer if the server has ended the connection.
    async fn log_in(
        &mut self,
        login: &MysqlLogin<'_>,
        challenge: Challenge,
        number: u8,
    ) -> Result<Option<ProbeAnswer>, ProbeError> {
        let flags = if self.encrypted { CAPABILITIES | TLS } else { CAPABILITIES };
        // A server with another default method asks for a change.
        let known = [NATIVE, CACHING_SHA2].contains(&&*challenge.method);
        let method = if known { &*challenge.method } else { NATIVE };
        let scrambled = scramble(method, login.password, &challenge.nonce);
        let user = login.user.unwrap_or(DEFAULT_USER).as_bytes();
        let length = [u8::try_from(scrambled.len()).unwrap_or(0)];
        let body = [&head(flags), user, &[0], &length, &scrambled, method, &[0]].concat();
        self.answer.send(&packet(number, &body)).await?;
        loop {
            let MysqlPacket { number, payload } = receive(&mut self.answer).await?;
            match &*payload {
                [0, ..] => return Ok(None),
                [0xff, ..] => {
                    return match error_packet(&payload) {
                        (code, _) if login.user.is_none() && REJECTED.contains(&code) => {
                            Ok(Some(ProbeAnswer::Expected))
                        }
                        (_, error) => Err(error),
                    };
                }
                [0xfe, switch @ ..] => {
                    let (method, nonce) = parse_switch(switch);
                    if ![NATIVE, CACHING_SHA2].contains(&method) {
                        let reason = format!(
                            "the server asks for {}, the probe logs in by mysql_native_password \
                             and caching_sha2_password",
                            quote(method)
                        );
                        return Err(ProbeError::Backend(reason));
                    }
                    let scrambled = scramble(method, login.password, nonce);
                    self.answer.send(&packet(number.wrapping_add(1), &scrambled)).await?;
                }
                [1, 3] => {}
                [1, 4] => self.send_password(login, number.wrapping_add(1)).await?,
                _ => return Err(foreign(&payload)),
            }
        }
    }

    /// The server of caching_sha2_password has no hash of the password yet.
    async fn send_password(
        &mut self,
        login: &MysqlLogin<'_>,
        number: u8,
    ) -> Result<(), ProbeError> {
        if !self.encrypted {
            let reason = "caching_sha2_password: the server has no hash of the password in its \
                          cache and asks for the password; set tls";
            return Err(ProbeError::Backend(reason.to_owned()));
        }
        let password = login.password.unwrap_or_default().as_bytes();
        let body = Zeroizing::new([password, &[0]].concat());
        self.answer.send(&Zeroizing::new(packet(number, &body))).await
    }

    async fn role(&mut self) -> Result<NodeRole, ProbeError> {
        // COM_QUERY
        self.answer.send(&packet(0, &[&[3], QUESTION].concat())).await?;
        let columns = receive(&mut self.answer).await?.payload;
        match &*columns {
            [1] => {}
            [0xff, ..] => return Err(error_packet(&columns).1),
            _ => return Err(foreign(&columns)),
        }
        // The description of the column, and the end of the descriptions.
        receive(&mut self.answer).await?;
        receive(&mut self.answer).await?;
        let row = receive(&mut self.answer).await?.payload;
        receive(&mut self.answer).await?;
        // A length and a text. MariaDB from 12 has names of its own for stricter levels.
        match row.split_first() {
            Some((&length, text)) if usize::from(length) == text.len() => {
                let writes = matches!(text, b"0" | b"OFF");
                Ok(if writes { NodeRole::Primary } else { NodeRole::Replica })
            }
            _ => Err(foreign(&row)),
        }
    }
}

/// Returns the method and the random bytes.
fn parse_switch(switch: &[u8]) -> (&[u8], &[u8]) {
    let end = switch.iter().position(|byte| *byte == 0).unwrap_or(switch.len());
    let (method, data) = switch.split_at(end);
    let data = data.strip_prefix(&[0]).unwrap_or(data);
    (method, data.strip_suffix(&[0]).unwrap_or(data))
}

/// Proves the knowledge of the password. No password: no bytes.
fn scramble(method: &[u8], password: Option<&str>, nonce: &[u8]) -> Vec<u8> {
    let Some(password) = password.filter(|password| !password.is_empty()) else {
        return Vec::new();
    };
    let xor = |a: &[u8], b: &[u8]| a.iter().zip(b).map(|(a, b)| a ^ b).collect();
    if method == CACHING_SHA2 {
        let once = Zeroizing::new(<[u8; 32]>::from(Sha256::digest(password)));
        let twice = Sha256::digest(once.as_slice());
        let mask = Sha256::new().chain_update(twice).chain_update(nonce);
        return xor(once.as_slice(), &mask.finalize());
    }
    let once = Zeroizing::new(<[u8; 20]>::from(Sha1::digest(password)));
    let twice = Sha1::digest(once.as_slice());
    xor(once.as_slice(), &Sha1::new().chain_update(nonce).chain_update(twice).finalize())
}

/// What a login and a request for TLS begin with.
fn head(flags: u32) -> Vec<u8> {
    const PACKET_BYTES_MAX: u32 = 1 << 24;
    let (flags, most) = (flags.to_le_bytes(), PACKET_BYTES_MAX.to_le_bytes());
    [flags.as_slice(), &most, &[CHARSET], &[0; 23]].concat()
}

fn packet(number: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(0).to_le_bytes();
    [&length[..3], &[number], payload].concat()
}

async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
    answer: &mut AnswerBytes<'_, S>,
) -> Result<MysqlPacket, ProbeError> {
    let [a, b, c, number] = answer.array().await?;
    let length = usize::try_from(u32::from_le_bytes([a, b, c, 0])).unwrap_or(usize::MAX);
    if length > super::answer_bytes::ANSWER_BYTES_MAX {
        return Err(foreign(&[a, b, c, number]));
    }
    Ok(MysqlPacket { number, payload: answer.bytes(length).await? })
}

/// Returns the code, and the error with its text.
fn error_packet(payload: &[u8]) -> (u16, ProbeError) {
    let [0xff, a, b, text @ ..] = payload else { return (0, foreign(payload)) };
    let code = u16::from_le_bytes([*a, *b]);
    // `#` and five characters of SQLSTATE are missing before the login.
    let text = match text {
        [b'#', _, _, _, _, _, text @ ..] => text,
        text => text,
    };
    let reason = format!("the server answers {} ({code})", quote_message(text));
    (code, ProbeError::Backend(reason))
}

fn foreign(got: &[u8]) -> ProbeError {
    ProbeError::Backend(format!("not the protocol of MySQL: got {}", quote(got)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn scrambles_equal_those_of_other_clients() {
        // From the tests of go-sql-driver/mysql.
        let nonce =
            [10, 47, 74, 111, 75, 73, 34, 48, 88, 76, 114, 74, 37, 13, 3, 80, 82, 2, 23, 21];
        assert_eq!(
            hex(&scramble(CACHING_SHA2, Some("secret"), &nonce)),
            "f490e76f66d9d86665ce54d98c78d0acfe2fb0b08b423da807144873d30b312c"
        );
        assert!(scramble(CACHING_SHA2, Some(""), &nonce).is_empty());
        assert!(scramble(NATIVE, None, &nonce).is_empty());
    }
}
