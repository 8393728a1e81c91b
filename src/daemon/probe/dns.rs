//! Sends a question to a DNS server.
//!
//! Called by probes of kind `dns`, over UDP or over a connection. Protocol: RFC 1035. It
//! judges the code of the answer, not its records.

use super::answer_bytes::AnswerBytes;
use super::{ProbeError, ProbeStage, connect_error, exchange_error, quote, sources};
use simple_dns::{CLASS, Name, PacketFlag, Question, RCODE, TYPE};
use std::net::SocketAddr;
use std::time::Duration;
use tidegate_core::health::ProbeAnswer;
use tidegate_core::metrics::counters::LocalErrorKind;
use tidegate_core::model::{DnsProbe, DnsProbeCode, DnsProbeRecord, SourceAddr, Words};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UdpSocket;

/// Longest answer over UDP that is read.
const DATAGRAM_BYTES_MAX: usize = 4096;

/// A lost datagram is sent again after this part of the timeout.
const SENT_TIMES: u32 = 3;

/// A question that was sent.
pub(crate) struct ProbeQuestion<'p> {
    pub(crate) probe: &'p DnsProbe,
    pub(crate) id: u16,
}

/// What an answer says.
enum DnsAnswer {
    /// It answers another question.
    Foreign,
    Code(RCODE),
}

/// Asks over a connection: a length precedes each message.
pub(super) async fn over_stream<S: AsyncRead + AsyncWrite + Unpin>(
    mut answer: AnswerBytes<'_, S>,
    probe: &DnsProbe,
) -> Result<ProbeAnswer, ProbeError> {
    let sent = ProbeQuestion { probe, id: fastrand::u16(..) };
    let question = sent.bytes()?;
    let length = u16::try_from(question.len()).unwrap_or(u16::MAX).to_be_bytes();
    answer.send(&[length.as_slice(), &question].concat()).await?;
    let length = usize::from(u16::from_be_bytes(answer.array().await?));
    let received = answer.bytes(length).await?;
    match sent.judge(&received)? {
        Some(answer) => Ok(answer),
        None => Err(ProbeError::Backend("the answer is to another question".to_owned())),
    }
}

/// Asks over UDP from `source`. Ignores datagrams that answer another question.
pub(super) async fn over_udp(
    (sources, turn): (&[SourceAddr], usize),
    to: SocketAddr,
    (probe, timeout): (&DnsProbe, Duration),
    stage: &mut ProbeStage,
) -> Result<ProbeAnswer, ProbeError> {
    let source = sources::of_turn((sources, turn), to);
    let socket = UdpSocket::bind(SocketAddr::new(source, 0)).await.map_err(connect_error)?;
    socket.connect(to).await.map_err(connect_error)?;
    let sent = ProbeQuestion { probe, id: fastrand::u16(..) };
    let question = sent.bytes()?;
    let mut received = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        *stage = ProbeStage::Sending;
        socket.send(&question).await.map_err(refused)?;
        *stage = ProbeStage::Answer;
        let answer = async {
            loop {
                let count = socket.recv(&mut received).await.map_err(refused)?;
                if let Some(answer) = sent.judge(&received[..count]).transpose() {
                    return answer;
                }
            }
        };
        if let Ok(result) = tokio::time::timeout(timeout / SENT_TIMES, answer).await {
            return result;
        }
    }
}

/// An ICMP message arrives as an error of the socket.
fn refused(error: std::io::Error) -> ProbeError {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => connect_error(error),
        _ => exchange_error(error),
    }
}

// === impl ProbeQuestion ===

impl ProbeQuestion<'_> {
    fn bytes(&self) -> Result<Vec<u8>, ProbeError> {
        let local = |error: &dyn std::fmt::Display| {
            ProbeError::Local(format!("no DNS question: {error}"), LocalErrorKind::Other)
        };
        let name =
            Name::new(self.probe.name.trim_end_matches('.')).map_err(|error| local(&error))?;
        let record = match self.probe.record {
            DnsProbeRecord::A => TYPE::A,
            DnsProbeRecord::Aaaa => TYPE::AAAA,
            DnsProbeRecord::Ns => TYPE::NS,
            DnsProbeRecord::Soa => TYPE::SOA,
            DnsProbeRecord::Srv => TYPE::SRV,
            DnsProbeRecord::Txt => TYPE::TXT,
        };
        let mut packet = simple_dns::Packet::new_query(self.id);
        packet.set_flags(PacketFlag::RECURSION_DESIRED);
        packet.questions.push(Question::new(name, record.into(), CLASS::IN.into(), false));
        packet.build_bytes_vec().map_err(|error| local(&error))
    }

    /// Returns `None` for the answer to another question.
    pub(crate) fn judge(&self, received: &[u8]) -> Result<Option<ProbeAnswer>, ProbeError> {
        let code = match self.read(received)? {
            DnsAnswer::Foreign => return Ok(None),
            DnsAnswer::Code(code) => code,
        };
        let expected = match self.probe.rcode {
            DnsProbeCode::Noerror => RCODE::NoError,
            DnsProbeCode::Nxdomain => RCODE::NameError,
            DnsProbeCode::Refused => RCODE::Refused,
            DnsProbeCode::Any => code,
        };
        if code == expected {
            return Ok(Some(ProbeAnswer::Expected));
        }
        let (found, expected) = (code_name(code), self.probe.rcode.word().to_uppercase());
        Err(ProbeError::Backend(format!("the code of the answer is {found}, expected {expected}")))
    }

    fn read(&self, received: &[u8]) -> Result<DnsAnswer, ProbeError> {
        let packet = simple_dns::Packet::parse(received).map_err(|_| {
            ProbeError::Backend(format!("not a DNS message: got {}", quote(received)))
        })?;
        let own = self.bytes()?;
        // The question follows the 12 bytes of the header. Its name keeps its letters.
        let same = match own.get(12..) {
            Some(question) => received.get(12..12 + question.len()) == Some(question),
            None => false,
        };
        // A server that does not read the question may leave it out.
        let without = packet.questions.is_empty() && packet.rcode() != RCODE::NoError;
        let answers = packet.has_flags(PacketFlag::RESPONSE) && packet.id() == self.id;
        Ok(match answers && (same || without) {
            true => DnsAnswer::Code(packet.rcode()),
            false => DnsAnswer::Foreign,
        })
    }
}

fn code_name(code: RCODE) -> String {
    match code {
        RCODE::NoError => "NOERROR".to_owned(),
        RCODE::FormatError => "FORMERR".to_owned(),
        RCODE::ServerFailure => "SERVFAIL".to_owned(),
        RCODE::NameError => "NXDOMAIN".to_owned(),
        RCODE::NotImplemented => "NOTIMP".to_owned(),
        RCODE::Refused => "REFUSED".to_owned(),
        other => format!("{other:?}"),
    }
}
