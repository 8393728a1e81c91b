//! Probes that speak the protocol of one service, and the role that such a probe finds.
//!
//! `config` builds the values, `daemon` runs the probes. Nothing here opens a connection.

use super::text_forms::words;
use serde::Serialize;
use std::path::PathBuf;

/// `role = ...`: what a node of a database is for its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeRole {
    /// It takes writes.
    Primary,
    /// It follows a primary and takes reads only.
    Replica,
}

words!(NodeRole: "primary" => Primary, "replica" => Replica);

/// How a probe logs in.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct ProbeLogin {
    /// `None`: the user that the protocol implies, or no login.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// File with the password in one line; it is read for each probe. `None`: no password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
}

/// `kind = "postgres"`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct PostgresProbe {
    /// Without a user, the probe asks only whether the server takes TLS.
    #[serde(flatten)]
    pub login: ProbeLogin,
    /// `None`: the database with the name of the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
}

/// `kind = "dns"`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DnsProbe {
    /// Name that the question is about, without its last dot; `.` is the root.
    pub name: String,
    /// Type of the records that the question asks for.
    pub record: DnsProbeRecord,
    /// How the question travels.
    pub transport: DnsProbeTransport,
    /// The expected code of the answer.
    pub rcode: DnsProbeCode,
}

/// `record = ...` of a `dns` probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DnsProbeRecord {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// Name servers.
    Ns,
    /// Start of authority.
    Soa,
    /// Services.
    Srv,
    /// Texts.
    Txt,
}

words!(DnsProbeRecord: "a" => A, "aaaa" => Aaaa, "ns" => Ns, "soa" => Soa, "srv" => Srv, "txt" => Txt);

/// `transport = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DnsProbeTransport {
    /// Over a connection, as the sessions of the pool.
    Tcp,
    /// In datagrams.
    Udp,
}

words!(DnsProbeTransport: "tcp" => Tcp, "udp" => Udp);

/// `rcode = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DnsProbeCode {
    /// No error, with or without records.
    Noerror,
    /// The name does not exist.
    Nxdomain,
    /// The server does not answer this question for this client.
    Refused,
    /// Any code.
    Any,
}

words!(DnsProbeCode: "noerror" => Noerror, "nxdomain" => Nxdomain, "refused" => Refused, "any" => Any);
