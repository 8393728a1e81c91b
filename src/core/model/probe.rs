//! `[pool.NAME.probe]`: what one probe asks, where, and how often.
//!
//! `config` builds it, the controller schedules by it, and `daemon` runs it. Nothing here
//! opens a connection.

use super::addresses::SourceAddr;
use super::exec::ExecProbe;
use super::service::{DnsProbe, PostgresProbe, ProbeLogin};
use super::text_forms::{self, words};
use super::{PoolConfig, ProxyVersion};
use regex::bytes::Regex;
use serde::{Serialize, Serializer};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// `[pool.NAME.probe]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProbeSpec {
    /// What one probe does.
    #[serde(flatten)]
    pub kind: ProbeKind,
    /// Where it connects, and how.
    #[serde(flatten)]
    pub target: ProbeTarget,
    /// Time between probes of a backend with a settled state.
    #[serde(serialize_with = "text_forms::duration")]
    pub interval: Duration,
    /// Time between probes while consecutive results are counted towards a state
    /// change.
    #[serde(serialize_with = "text_forms::duration")]
    pub fast_interval: Duration,
    /// Time between probes of a backend that is down, while nothing changes.
    #[serde(serialize_with = "text_forms::duration")]
    pub down_interval: Duration,
    /// Timeout of one probe; at most every interval.
    #[serde(serialize_with = "text_forms::duration")]
    pub timeout: Duration,
    /// Consecutive successes that set a backend to up; at least 1.
    pub rise: u32,
    /// Consecutive failures that set a backend to down; at least 1.
    pub fall: u32,
}

/// Where a probe connects, and how.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct ProbeTarget {
    /// Port; `None`: the backend's port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Address; `None`: the backend's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// `None`: without TLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<ProbeTls>,
    /// Addresses from which probes start; empty: the kernel chooses. The default is the
    /// pool's `source`.
    pub source: Arc<[SourceAddr]>,
    /// `proxy_protocol` of the probe; `None`: a header if the pool sends headers and `port` is
    /// `None`.
    #[serde(rename = "proxy_protocol", skip_serializing_if = "Option::is_none")]
    pub header: Option<ProbeHeader>,
    /// Version of the header that the probe sends. It names no client.
    #[serde(skip)]
    pub header_version: Option<ProxyVersion>,
}

/// Whether a probe sends the PROXY header of its pool, without a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeHeader {
    /// `LOCAL`, or `PROXY UNKNOWN` in version 1.
    Local,
    /// No header.
    Off,
}

words!(ProbeHeader: "local" => Local, "off" => Off);

/// `tls = { ... }` of a probe.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct ProbeTls {
    /// How the certificate of the backend is verified.
    pub verify: TlsVerify,
    /// Name that is sent (SNI) and that the certificate must have; `None`: the address
    /// of the backend, and no SNI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Protocols that are offered (ALPN, RFC 7301); empty: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alpn: Vec<String>,
}

/// `verify = ...`
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TlsVerify {
    /// Against the trusted certificates of the system.
    System,
    /// Not at all: any certificate is accepted.
    Off,
    /// Against the certificates of a PEM file.
    File(PathBuf),
}

/// `kind = ...`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ProbeKind {
    /// Succeeds if the connection is accepted, or the TLS handshake is done.
    Tcp,
    /// Succeeds if the answer to `send` matches `expect`. `send` can be empty.
    SendExpect {
        /// Sent after connecting.
        send: ProbeBytes,
        /// What the answer must contain.
        expect: Expect,
    },
    /// Succeeds if every step succeeds, in this order.
    Steps {
        /// At least one, and at least one `expect`.
        steps: Vec<ProbeStep>,
    },
    /// Succeeds if the status of an HTTP/1 response is in `status`.
    Http(HttpProbe),
    /// Succeeds if a Redis server answers `PING`, and finds its role.
    Redis(ProbeLogin),
    /// Succeeds if a PostgreSQL server takes connections. With a user it finds the role.
    Postgres(PostgresProbe),
    /// Succeeds if a MySQL server takes connections. With a user it finds the role.
    Mysql(ProbeLogin),
    /// Succeeds if a mail server greets and answers `EHLO`.
    Smtp,
    /// Succeeds if a directory server takes an anonymous bind.
    Ldap,
    /// Succeeds if a DNS server answers a question.
    Dns(DnsProbe),
    /// Succeeds if an agent answers with its words, and none of them says down.
    Agent {
        /// Sent after connecting; empty: nothing.
        send: ProbeBytes,
    },
    /// Succeeds if a command exits with a code that means success.
    Exec(ExecProbe),
}

/// An HTTP request and its accepted answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HttpProbe {
    /// Request target; starts with `/`.
    pub path: String,
    /// `Host` header; `None`: the backend's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Request method.
    pub method: String,
    /// Version of the request.
    #[serde(rename = "http")]
    pub version: HttpVersion,
    /// More headers, in file order.
    #[serde(serialize_with = "headers")]
    pub headers: Vec<(String, String)>,
    /// Inclusive ranges, each within 100..=599.
    #[serde(serialize_with = "text_forms::status_ranges")]
    pub status: Vec<(u16, u16)>,
    /// What the body must contain; `None`: the body is not read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expect: Option<Expect>,
}

/// `http = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpVersion {
    /// HTTP/1.0: the answer has no chunks.
    Http10,
    /// HTTP/1.1.
    Http11,
}

text_forms::words!(HttpVersion: "1.0" => Http10, "1.1" => Http11);

/// One entry of `steps = [...]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProbeStep {
    /// Sends these bytes.
    Send(ProbeBytes),
    /// Reads until the answer matches. The next step starts after the match.
    Expect(Expect),
}

/// `expect = ...`: what an answer must contain, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// At its start.
    Starts(ProbeBytes),
    /// Anywhere.
    Contains(ProbeBytes),
    /// Anywhere, by a regular expression over bytes.
    Regex(ProbePattern),
}

/// Bytes that a file writes as a text or as `{ hex = "..." }`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProbeBytes(pub Vec<u8>);

/// A compiled regular expression over bytes. Equal texts are equal patterns.
#[derive(Debug, Clone)]
pub struct ProbePattern(pub Regex);

fn headers<S: Serializer>(list: &[(String, String)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(list.iter().map(|(name, value)| (name, value)))
}

// === impl ProbeSpec ===

impl ProbeSpec {
    /// Returns the settings of a probe whose single result decides.
    pub fn single(kind: ProbeKind, target: ProbeTarget, timeout: Duration) -> ProbeSpec {
        ProbeSpec {
            kind,
            target,
            interval: timeout,
            fast_interval: timeout,
            down_interval: timeout,
            timeout,
            rise: 1,
            fall: 1,
        }
    }

    /// Returns every file that the probe reads.
    pub fn named_files(&self) -> impl Iterator<Item = &PathBuf> {
        let login = self.kind.login().and_then(|login| login.password_file.as_ref());
        self.target.trusted_file().into_iter().chain(login)
    }
}

// === impl ProbeKind ===

impl ProbeKind {
    /// Returns how the probe logs in; `None` if its kind has no login.
    pub fn login(&self) -> Option<&ProbeLogin> {
        match self {
            ProbeKind::Redis(login) | ProbeKind::Mysql(login) => Some(login),
            ProbeKind::Postgres(probe) => Some(&probe.login),
            ProbeKind::Tcp
            | ProbeKind::SendExpect { .. }
            | ProbeKind::Steps { .. }
            | ProbeKind::Http(_)
            | ProbeKind::Smtp
            | ProbeKind::Ldap
            | ProbeKind::Dns(_)
            | ProbeKind::Agent { .. }
            | ProbeKind::Exec(_) => None,
        }
    }

    /// Whether the protocol starts without TLS and asks for it.
    pub fn starts_tls(&self) -> bool {
        match self {
            ProbeKind::Postgres(_) | ProbeKind::Mysql(_) => true,
            ProbeKind::Tcp
            | ProbeKind::SendExpect { .. }
            | ProbeKind::Steps { .. }
            | ProbeKind::Http(_)
            | ProbeKind::Redis(_)
            | ProbeKind::Smtp
            | ProbeKind::Ldap
            | ProbeKind::Dns(_)
            | ProbeKind::Agent { .. }
            | ProbeKind::Exec(_) => false,
        }
    }

    /// Whether the probe finds the role of a backend.
    pub fn finds_roles(&self) -> bool {
        match self {
            ProbeKind::Redis(_) => true,
            ProbeKind::Postgres(PostgresProbe { login, .. }) | ProbeKind::Mysql(login) => {
                login.user.is_some()
            }
            ProbeKind::Tcp
            | ProbeKind::SendExpect { .. }
            | ProbeKind::Steps { .. }
            | ProbeKind::Http(_)
            | ProbeKind::Smtp
            | ProbeKind::Ldap
            | ProbeKind::Dns(_)
            | ProbeKind::Agent { .. }
            | ProbeKind::Exec(_) => false,
        }
    }
}

// === impl ProbeTarget ===

impl ProbeTarget {
    /// Returns a target that differs from the backend's address in nothing.
    pub fn of_pool(pool: &PoolConfig) -> ProbeTarget {
        let header_version = pool.proxy_protocol.as_ref().map(|header| header.version);
        ProbeTarget { source: Arc::clone(&pool.source), header_version, ..ProbeTarget::default() }
    }

    /// Returns the file of trusted certificates.
    pub fn trusted_file(&self) -> Option<&PathBuf> {
        match &self.tls.as_ref()?.verify {
            TlsVerify::File(path) => Some(path),
            TlsVerify::System | TlsVerify::Off => None,
        }
    }
}

// === impl TlsVerify ===

impl Serialize for TlsVerify {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            TlsVerify::System => serializer.serialize_str("system"),
            TlsVerify::Off => serializer.serialize_str("off"),
            TlsVerify::File(path) => path.serialize(serializer),
        }
    }
}

// === impl Expect ===

impl Serialize for Expect {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            // The reader rejects `expect = "200"` in an `http` probe, because it looks like a status.
            Expect::Starts(bytes) => match bytes.text() {
                Some(text) if bytes.0.iter().all(u8::is_ascii_digit) => {
                    serializer.collect_map([("starts", text)])
                }
                _ => bytes.serialize(serializer),
            },
            Expect::Contains(bytes) => match bytes.text() {
                Some(text) => serializer.collect_map([("contains", text)]),
                None => bytes.serialize(serializer),
            },
            Expect::Regex(pattern) => serializer.collect_map([("regex", pattern.0.as_str())]),
        }
    }
}

// === impl ProbeBytes ===

impl ProbeBytes {
    /// Returns the bytes as a text, if they are UTF-8.
    pub fn text(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }
}

impl From<&str> for ProbeBytes {
    fn from(text: &str) -> Self {
        ProbeBytes(text.as_bytes().to_vec())
    }
}

impl Serialize for ProbeBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.text() {
            Some(text) => serializer.serialize_str(text),
            None => {
                let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
                serializer.collect_map([("hex", hex)])
            }
        }
    }
}

// === impl ProbePattern ===

impl PartialEq for ProbePattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for ProbePattern {}
