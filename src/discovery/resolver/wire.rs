//! DNS messages (RFC 1035): a question to bytes, and the bytes of an answer to records.
//!
//! `exchange` calls it. The crate simple-dns reads the messages; this file bounds its work
//! and turns each of its errors, and a panic, into [`BadMessage`]. Nothing here does I/O.

use simple_dns::rdata::{OPT, RData};
use simple_dns::{CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, Question, ResourceRecord, TYPE};
use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

/// Most records of a message, over all sections.
pub(super) const RECORDS_MAX: usize = 10_000;
/// Most aliases (CNAME) between a name and its records.
pub(super) const ALIASES_MAX: usize = 8;
/// Largest datagram that a server may send, in bytes: below every usual path MTU
/// (RFC 9715).
const DATAGRAM_MAX: u16 = 1232;
const HEADER_BYTES: usize = 12;

/// An absolute name in lower case, without the final dot, that fits into a message.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct DnsName(Arc<str>);

/// A type of record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum RecordKind {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// Services (RFC 2782).
    Srv,
}

/// What a server is asked; also the key of the cache.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct RecordQuestion {
    pub(super) name: DnsName,
    pub(super) kind: RecordKind,
}

/// An answer to the question that was sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct DnsReply {
    pub(super) code: ReplyCode,
    pub(super) records: RecordSet,
}

/// RCODE of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReplyCode(pub(super) u8);

/// The records of one question.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct RecordSet {
    /// Sorted, without repetitions.
    pub(super) addresses: Vec<IpAddr>,
    /// In the order of the answer.
    pub(super) services: Vec<ServiceRecord>,
    /// Addresses of the services' targets that the answer has, too.
    pub(super) additional: Vec<(DnsName, IpAddr)>,
    /// The smallest of all records above.
    pub(super) ttl: Duration,
    /// Records of the right type that cannot be used, such as the address 0.0.0.0.
    pub(super) unusable: u32,
}

/// An SRV record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServiceRecord {
    pub(crate) priority: u16,
    pub(crate) weight: u16,
    pub(crate) port: u16,
    /// `None`: `.`, the service is not available.
    pub(crate) target: Option<DnsName>,
}

/// Why a message is no answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BadMessage {
    /// It does not belong to the question: another id or another question.
    Foreign,
    /// It is cut; the whole answer needs TCP.
    Truncated,
    /// It has the right id but cannot be read.
    Malformed(String),
}

/// Returns the message that asks the question. With `edns` it accepts datagrams of 1,232
/// bytes (RFC 6891), else of 512.
pub(super) fn encode(
    question: &RecordQuestion,
    id: u16,
    edns: bool,
) -> Result<Vec<u8>, simple_dns::SimpleDnsError> {
    let mut packet = Packet::new_query(id);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    let name = Name::new(question.name.as_str())?;
    let kind = QTYPE::TYPE(question.kind.code());
    packet.questions.push(Question::new(name, kind, QCLASS::CLASS(CLASS::IN), false));
    if edns {
        *packet.opt_mut() =
            Some(OPT { opt_codes: Vec::new(), udp_packet_size: DATAGRAM_MAX, version: 0 });
    }
    packet.build_bytes_vec()
}

/// Reads an answer to `question` that was asked with `id`.
pub(super) fn decode(
    bytes: &[u8],
    id: u16,
    question: &RecordQuestion,
) -> Result<DnsReply, BadMessage> {
    let header: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(BadMessage::Foreign)?;
    let is_answer = header[2] & 0xf8 == 0x80;
    if header[..2] != id.to_be_bytes() || !is_answer {
        return Err(BadMessage::Foreign);
    }
    if header[2] & 0x02 != 0 {
        return Err(BadMessage::Truncated);
    }
    let counts =
        header[4..].chunks_exact(2).map(|pair| usize::from(pair[0]) << 8 | usize::from(pair[1]));
    if counts.sum::<usize>() > RECORDS_MAX {
        return Err(malformed(format!("more than {RECORDS_MAX} records")));
    }
    let code = ReplyCode(header[3] & 0x0f);
    // The crate has no known panic; an unknown one must not end the thread of all sources.
    let read = std::panic::catch_unwind(|| read_packet(bytes, code, question));
    read.unwrap_or_else(|_| Err(malformed("the decoder panicked".to_owned())))
}

fn read_packet(
    bytes: &[u8],
    code: ReplyCode,
    question: &RecordQuestion,
) -> Result<DnsReply, BadMessage> {
    let packet = Packet::parse(bytes).map_err(|error| malformed(error.to_string()))?;
    let name = Name::new(question.name.as_str()).map_err(|error| malformed(error.to_string()))?;
    let echoed = match &packet.questions[..] {
        // A server that does not read the question does not repeat it.
        [] => !code.is_decided(),
        [echo] => {
            echo.qname == name
                && echo.qtype == QTYPE::TYPE(question.kind.code())
                && echo.qclass == QCLASS::CLASS(CLASS::IN)
        }
        _ => false,
    };
    if !echoed {
        return Err(BadMessage::Foreign);
    }
    let records = match code {
        ReplyCode::NO_ERROR => records(&packet, &name, question.kind)?,
        _ => RecordSet::default(),
    };
    Ok(DnsReply { code, records })
}

/// Follows the aliases from `name` and collects the records at their end.
fn records(
    packet: &Packet<'_>,
    name: &Name<'_>,
    kind: RecordKind,
) -> Result<RecordSet, BadMessage> {
    let mut set = RecordSet::default();
    let mut ttl = u32::MAX;
    let mut owner = name;
    for aliases in 0.. {
        let mut found = packet.answers.iter().filter(|record| is_of(record, owner));
        let alias = found.find_map(|record| match &record.rdata {
            RData::CNAME(alias) => Some((&alias.0, record.ttl)),
            _ => None,
        });
        let Some((next, alias_ttl)) = alias else { break };
        if aliases == ALIASES_MAX {
            return Err(malformed(format!(
                "more than {ALIASES_MAX} aliases, or a loop of aliases"
            )));
        }
        (owner, ttl) = (next, ttl.min(clean_ttl(alias_ttl)));
    }
    for record in packet.answers.iter().filter(|record| is_of(record, owner)) {
        if record.rdata.type_code() == kind.code() {
            ttl = ttl.min(clean_ttl(record.ttl));
            set.add(&record.rdata);
        }
    }
    if kind == RecordKind::Srv && !set.services.is_empty() {
        ttl = ttl.min(set.add_additional(packet));
    }
    set.addresses.sort_unstable();
    set.addresses.dedup();
    set.ttl = Duration::from_secs(ttl.into());
    Ok(set)
}

fn is_of(record: &ResourceRecord<'_>, owner: &Name<'_>) -> bool {
    record.class == CLASS::IN && record.name == *owner
}

/// A TTL with the highest bit set is 0 (RFC 2181, section 8).
fn clean_ttl(ttl: u32) -> u32 {
    i32::try_from(ttl).map_or(0, |_| ttl)
}

fn malformed(what: String) -> BadMessage {
    BadMessage::Malformed(what)
}

/// Returns the address of the record, if a member can have it.
fn usable_address(data: &RData<'_>) -> Option<IpAddr> {
    let address = match data {
        RData::A(a) => IpAddr::V4(Ipv4Addr::from(a.address)),
        RData::AAAA(a) => IpAddr::V6(Ipv6Addr::from(a.address)),
        _ => return None,
    };
    let is_broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
    let unusable = address.is_unspecified() || address.is_multicast() || is_broadcast;
    (!unusable).then_some(address)
}

// === impl RecordSet ===

impl RecordSet {
    /// Whether no record can be used.
    pub(super) fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.services.is_empty()
    }

    fn add(&mut self, data: &RData<'_>) {
        let service = match data {
            RData::SRV(srv) => ServiceRecord::read(srv),
            _ => None,
        };
        match (service, usable_address(data)) {
            (Some(service), _) => self.services.push(service),
            (None, Some(address)) => self.addresses.push(address),
            (None, None) => self.unusable += 1,
        }
    }

    /// Adds the addresses of the additional section and returns their smallest TTL.
    fn add_additional(&mut self, packet: &Packet<'_>) -> u32 {
        let mut ttl = u32::MAX;
        let targets: HashSet<&DnsName> =
            self.services.iter().filter_map(|service| service.target.as_ref()).collect();
        for record in packet.additional_records.iter().filter(|record| record.class == CLASS::IN) {
            let name = || DnsName::parse(&record.name.to_string()).ok();
            let Some((address, name)) =
                usable_address(&record.rdata).and_then(|a| Some((a, name()?)))
            else {
                continue;
            };
            if targets.contains(&name) {
                ttl = ttl.min(clean_ttl(record.ttl));
                self.additional.push((name, address));
            }
        }
        ttl
    }
}

// === impl ServiceRecord ===

impl ServiceRecord {
    fn read(srv: &simple_dns::rdata::SRV<'_>) -> Option<ServiceRecord> {
        let target = match srv.target.get_labels() {
            [] => None,
            _ => Some(DnsName::parse(&srv.target.to_string()).ok()?),
        };
        let usable = target.is_none() || srv.port != 0;
        let (priority, weight, port) = (srv.priority, srv.weight, srv.port);
        usable.then_some(ServiceRecord { priority, weight, port, target })
    }
}

// === impl DnsName ===

impl DnsName {
    /// Reads an absolute name; the final dot is optional.
    ///
    /// # Errors
    /// What is wrong with the name, in words.
    pub(super) fn parse(text: &str) -> Result<DnsName, String> {
        let name = text.strip_suffix('.').unwrap_or(text);
        if name.is_empty() || name.len() > 253 {
            return Err(format!("the name {:.80} has not 1 to 253 characters", text));
        }
        if name.split('.').any(|label| label.is_empty() || label.len() > 63) {
            return Err(format!("a part of the name {text:.80} has not 1 to 63 characters"));
        }
        if !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'\\') {
            return Err(format!("the name {text:.80} has a character that is not printable ASCII"));
        }
        Ok(DnsName(name.to_ascii_lowercase().into()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl RecordKind ===

impl RecordKind {
    fn code(self) -> TYPE {
        match self {
            RecordKind::A => TYPE::A,
            RecordKind::Aaaa => TYPE::AAAA,
            RecordKind::Srv => TYPE::SRV,
        }
    }
}

impl fmt::Display for RecordKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RecordKind::A => "A",
            RecordKind::Aaaa => "AAAA",
            RecordKind::Srv => "SRV",
        })
    }
}

impl fmt::Display for RecordQuestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.kind)
    }
}

// === impl ReplyCode ===

impl ReplyCode {
    pub(super) const NO_ERROR: ReplyCode = ReplyCode(0);
    pub(super) const FORMAT_ERROR: ReplyCode = ReplyCode(1);
    pub(super) const SERVER_FAILURE: ReplyCode = ReplyCode(2);
    pub(super) const NO_NAME: ReplyCode = ReplyCode(3);
    pub(super) const REFUSED: ReplyCode = ReplyCode(5);

    /// Whether the server knows the answer: the records, or that the name does not exist.
    pub(super) fn is_decided(self) -> bool {
        matches!(self, ReplyCode::NO_ERROR | ReplyCode::NO_NAME)
    }
}

impl fmt::Display for ReplyCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("NOERROR"),
            1 => f.write_str("FORMERR"),
            2 => f.write_str("SERVFAIL"),
            3 => f.write_str("NXDOMAIN"),
            4 => f.write_str("NOTIMP"),
            5 => f.write_str("REFUSED"),
            code => write!(f, "code {code}"),
        }
    }
}
