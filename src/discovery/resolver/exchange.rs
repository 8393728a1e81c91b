//! One question to one DNS server: over UDP, and over TCP if the answer does not fit.
//!
//! `lookup` calls it for each server and round. Every question has its own connected
//! socket, so the kernel chooses a random port and drops datagrams of other hosts. A
//! datagram with another id or another question is counted and ignored.

use super::ResolverCounters;
use super::wire::{self, BadMessage, DnsReply, RecordQuestion, ReplyCode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;
use tidegate_core::discovery::SourceFailure;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// Foreign datagrams after which the question is asked over TCP: they are a sign of forgery.
const FOREIGN_MAX: u32 = 16;
/// Larger than the size that the question allows. A longer datagram is cut and thus
/// unreadable, and TCP brings the answer.
const DATAGRAM_BUFFER: usize = 2048;
/// A longer answer is read on another thread: hostile names in it can cost 100 ms.
const READ_HERE_MAX: usize = 16 * 1024;

/// Why one server gave no answer.
#[derive(Debug)]
pub(super) struct ExchangeFailure {
    pub(super) why: SourceFailure,
    pub(super) what: String,
}

/// An answer over UDP, or the reason to use TCP.
enum OverUdp {
    Answer(DnsReply),
    Incomplete,
}

/// Asks `server`. Over UDP and over TCP it waits for at most `limit` each. With `edns` it
/// allows large datagrams, and it repeats the question without EDNS after FORMERR.
pub(super) async fn ask(
    server: SocketAddr,
    question: &RecordQuestion,
    edns: bool,
    limit: Duration,
    counters: &ResolverCounters,
) -> Result<DnsReply, ExchangeFailure> {
    let udp = timeout(limit, over_udp(server, question, edns, counters));
    let reply = match udp.await.map_err(|_| no_answer(limit))?? {
        OverUdp::Answer(reply) => reply,
        OverUdp::Incomplete => {
            counters.add(&counters.over_tcp);
            let tcp = timeout(limit, over_tcp(server, question, counters));
            tcp.await.map_err(|_| no_answer(limit))??
        }
    };
    Ok(reply)
}

async fn over_udp(
    server: SocketAddr,
    question: &RecordQuestion,
    edns: bool,
    counters: &ResolverCounters,
) -> Result<OverUdp, ExchangeFailure> {
    let socket = connected(server)?;
    let (mut edns, mut foreign) = (edns, 0);
    let mut id = send(&socket, question, edns, counters)?;
    // The first question leaves before the runtime knows the socket, which saves a wake-up.
    let socket = UdpSocket::from_std(socket.into())?;
    let mut datagram = Vec::with_capacity(DATAGRAM_BUFFER);
    loop {
        datagram.clear();
        socket.recv_buf(&mut datagram).await?;
        match wire::decode(&datagram, id, question) {
            Ok(reply) if edns && reply.code == ReplyCode::FORMAT_ERROR => {
                edns = false;
                id = send(&socket, question, edns, counters)?;
            }
            Ok(reply) => return Ok(OverUdp::Answer(reply)),
            Err(BadMessage::Foreign) => {
                counters.add(&counters.ignored);
                foreign += 1;
                if foreign >= FOREIGN_MAX {
                    return Ok(OverUdp::Incomplete);
                }
            }
            Err(BadMessage::Truncated) => return Ok(OverUdp::Incomplete),
            Err(BadMessage::Malformed(_)) => {
                counters.add(&counters.malformed);
                return Ok(OverUdp::Incomplete);
            }
        }
    }
}

/// Returns a socket that receives only from `server`. The kernel chooses a random port.
fn connected(server: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = match server {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None)?;
    rustix::net::connect(&socket, &server)?;
    Ok(socket)
}

/// Sends the question. A full send buffer is an error, because the socket is new.
fn send(
    socket: impl AsFd,
    question: &RecordQuestion,
    edns: bool,
    counters: &ResolverCounters,
) -> Result<u16, ExchangeFailure> {
    let id = fastrand::u16(..);
    counters.add(&counters.questions);
    rustix::net::send(socket, &encode(question, id, edns)?, SendFlags::empty())?;
    Ok(id)
}

async fn over_tcp(
    server: SocketAddr,
    question: &RecordQuestion,
    counters: &ResolverCounters,
) -> Result<DnsReply, ExchangeFailure> {
    let id = fastrand::u16(..);
    let message = encode(question, id, false)?;
    let length = u16::try_from(message.len()).map_err(|_| protocol("the question is too long"))?;
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&[&length.to_be_bytes()[..], &message].concat()).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    let read = match answer.len() {
        ..=READ_HERE_MAX => wire::decode(&answer, id, question),
        _ => {
            let question = question.clone();
            let read = move || wire::decode(&answer, id, &question);
            tokio::task::spawn_blocking(read).await.map_err(|_| protocol("the reader panicked"))?
        }
    };
    read.map_err(|bad| {
        counters.add(&counters.malformed);
        match bad {
            BadMessage::Foreign => protocol("the answer over TCP belongs to another question"),
            BadMessage::Truncated => protocol("the answer over TCP is truncated"),
            BadMessage::Malformed(what) => protocol(&format!("the answer is malformed: {what}")),
        }
    })
}

fn encode(question: &RecordQuestion, id: u16, edns: bool) -> Result<Vec<u8>, ExchangeFailure> {
    wire::encode(question, id, edns).map_err(|error| protocol(&error.to_string()))
}

fn no_answer(limit: Duration) -> ExchangeFailure {
    let what = format!("no answer within {} s", limit.as_secs());
    ExchangeFailure { why: SourceFailure::Timeout, what }
}

fn protocol(what: &str) -> ExchangeFailure {
    ExchangeFailure { why: SourceFailure::Protocol, what: what.to_owned() }
}

// === impl ExchangeFailure ===

impl From<Errno> for ExchangeFailure {
    fn from(error: Errno) -> ExchangeFailure {
        io::Error::from(error).into()
    }
}

impl From<io::Error> for ExchangeFailure {
    fn from(error: io::Error) -> ExchangeFailure {
        use io::ErrorKind as Kind;
        let why = match error.kind() {
            Kind::ConnectionRefused
            | Kind::ConnectionReset
            | Kind::ConnectionAborted
            | Kind::BrokenPipe
            | Kind::HostUnreachable => SourceFailure::Connect,
            Kind::TimedOut => SourceFailure::Timeout,
            Kind::UnexpectedEof => SourceFailure::Protocol,
            // No descriptor, no port, no route, no permission.
            _ => SourceFailure::Local,
        };
        ExchangeFailure { why, what: error.to_string() }
    }
}
