//! Settings of the PROXY protocol: of frontends that receive headers and of pools that send
//! them.
//!
//! `config` builds them. Nothing here reads or writes a header: see
//! [`crate::proxy_protocol`].

use super::text_forms::{self, words};
use crate::limits::access_list::AccessList;
pub use crate::proxy_protocol::ProxyVersion;
use crate::proxy_protocol::tlv;
use ipnet::IpNet;
use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

/// `[frontend.NAME.proxy_protocol]`: the peers that send headers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProxyHeaderSource {
    /// Peers that must send a header, in file order. Empty: only Unix sockets expect headers.
    #[serde(serialize_with = "text_forms::ranges", skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<IpNet>,
    /// The same, for lookups.
    #[serde(skip)]
    pub peers: AccessList,
    /// What happens to all other peers.
    pub others: OtherPeers,
    /// Time from accept to the complete header.
    #[serde(serialize_with = "text_forms::duration")]
    pub timeout: Duration,
}

/// `others = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OtherPeers {
    /// They are reset.
    Refuse,
    /// They are served, and their bytes are never read as a header.
    Direct,
}

/// `[pool.NAME] proxy_protocol = ...`: the header that backends get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyHeaderSpec {
    /// Version of the header. Version 1 has none of the rest.
    pub version: ProxyVersion,
    /// Whether the header has a checksum.
    pub crc32c: bool,
    /// TLVs that the header has if their value is known, in file order.
    pub send: Vec<SentTlv>,
    /// Types of TLVs that are copied from the received header, in file order.
    pub pass: Vec<PassedTlv>,
}

/// An element of `send`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SentTlv {
    /// The received host name.
    Authority,
    /// The received application protocol.
    Alpn,
    /// The received description of the TLS connection.
    Ssl,
    /// The received identifier, else the number of the session.
    UniqueId,
}

/// An element of `pass`: a range of types, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassedTlv {
    /// First type.
    pub first: u8,
    /// Last type, at least `first`.
    pub last: u8,
}

words!(OtherPeers: "refuse" => Refuse, "direct" => Direct);
words!(ProxyVersion: "v1" => V1, "v2" => V2);
words!(
    SentTlv:
    "authority" => Authority,
    "alpn" => Alpn,
    "ssl" => Ssl,
    "unique-id" => UniqueId,
);

// === impl ProxyHeaderSource ===

impl ProxyHeaderSource {
    /// Returns whether this peer must send a header.
    pub fn expects(&self, peer: IpAddr) -> bool {
        self.peers.contains(peer)
    }
}

// === impl ProxyHeaderSpec ===

impl ProxyHeaderSpec {
    /// Returns whether a received TLV of this type is copied into the header.
    pub fn copies(&self, kind: u8) -> bool {
        self.version == ProxyVersion::V2
            && (self.send.iter().any(|sent| sent.kind() == kind)
                || self.pass.iter().any(|passed| (passed.first..=passed.last).contains(&kind)))
    }

    /// Returns whether the header needs an identifier if the received header has none.
    pub fn needs_unique_id(&self) -> bool {
        self.version == ProxyVersion::V2 && self.send.contains(&SentTlv::UniqueId)
    }
}

impl Serialize for ProxyHeaderSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if !self.crc32c && self.send.is_empty() && self.pass.is_empty() {
            return self.version.serialize(serializer);
        }
        let mut table = serializer.serialize_struct("proxy_protocol", 4)?;
        table.serialize_field("version", &self.version)?;
        if self.crc32c {
            table.serialize_field("crc32c", &true)?;
        }
        if !self.send.is_empty() {
            table.serialize_field("send", &self.send)?;
        }
        if !self.pass.is_empty() {
            let pass: Vec<String> = self.pass.iter().map(ToString::to_string).collect();
            table.serialize_field("pass", &pass)?;
        }
        table.end()
    }
}

// === impl SentTlv ===

impl SentTlv {
    /// Type of the TLV.
    pub fn kind(self) -> u8 {
        match self {
            SentTlv::Authority => tlv::AUTHORITY,
            SentTlv::Alpn => tlv::ALPN,
            SentTlv::Ssl => tlv::SSL,
            SentTlv::UniqueId => tlv::UNIQUE_ID,
        }
    }
}

// === impl PassedTlv ===

impl fmt::Display for PassedTlv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PassedTlv { first, last } = self;
        match first == last {
            true => write!(f, "0x{first:02X}"),
            false => write!(f, "0x{first:02X}-0x{last:02X}"),
        }
    }
}
