//! One exchange with one DNS server: questions over one UDP socket, or one question over TCP.
//!
//! `lookup` calls it. Every exchange has its own connected socket, so the kernel chooses a
//! random port and drops datagrams of other hosts. Each question has its own random id. A
//! datagram with another id or another question is counted and ignored.

use super::counters::{QuestionResult, ResolverCounters};
use super::wire::{self, BadMessage, DnsReply, RecordQuestion, ReplyCode};
use crate::tasks;
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

/// Foreign datagrams after which the questions are asked over TCP: they are a sign of forgery.
/// A server can repeat its answers, so one more is allowed for each answer.
const FOREIGN_MAX: u32 = 16;
/// Larger than the size that the question allows. A longer datagram is cut and thus
/// unreadable, and TCP brings the answer.
const DATAGRAM_BUFFER: usize = 2048;
/// A longer answer is read on another thread: hostile names in it can cost 100 ms.
const READ_HERE_MAX: usize = 16 * 1024;

/// Why one server gave no answer.
#[derive(Debug, Clone)]
pub(super) struct ExchangeFailure {
    pub(super) why: SourceFailure,
    pub(super) what: String,
}

/// What one server said to one question.
pub(super) type ExchangeResult = Result<DnsReply, ExchangeFailure>;

/// How one question over UDP ended.
pub(super) enum UdpEnd {
    Ended(ExchangeResult),
    /// The whole answer needs TCP.
    Incomplete,
}

/// The questions over UDP.
struct UdpExchange<'a> {
    counters: &'a ResolverCounters,
    /// Those without an answer.
    open: Vec<SentQuestion<'a>>,
    /// Foreign datagrams that are still allowed.
    foreign_left: u32,
}

#[derive(Clone, Copy)]
struct SentQuestion<'a> {
    /// Position in the list of the caller.
    at: usize,
    question: &'a RecordQuestion,
    id: u16,
    edns: bool,
}

/// Asks `server` and waits for at most `limit`. With `edns` it allows large datagrams, and it
/// repeats a question without EDNS after FORMERR. It calls `ended` once for each question,
/// with its position, as soon as the result is known.
pub(super) async fn over_udp(
    server: SocketAddr,
    questions: &[&RecordQuestion],
    edns: bool,
    limit: Duration,
    counters: &ResolverCounters,
    mut ended: impl FnMut(usize, UdpEnd),
) {
    let open = questions.iter().copied().enumerate();
    let open = open.map(|(at, question)| SentQuestion { at, question, id: 0, edns }).collect();
    let mut udp = UdpExchange { counters, open, foreign_left: FOREIGN_MAX };
    let answered = timeout(limit, udp.run(server, &mut ended)).await;
    if let Err(failure) = answered.unwrap_or_else(|_| Err(no_answer(limit))) {
        for sent in udp.open {
            ended(sent.at, UdpEnd::Ended(counted(Err(failure.clone()), counters)));
        }
    }
}

/// Asks `server` over TCP and waits for at most `limit`.
pub(super) async fn over_tcp(
    server: SocketAddr,
    question: &RecordQuestion,
    limit: Duration,
    counters: &ResolverCounters,
) -> ExchangeResult {
    counters.add(&counters.over_tcp);
    let reply = timeout(limit, ask_over_tcp(server, question, counters)).await;
    counted(reply.unwrap_or_else(|_| Err(no_answer(limit))), counters)
}

fn counted(result: ExchangeResult, counters: &ResolverCounters) -> ExchangeResult {
    let counted = match &result {
        Ok(reply) => Some(QuestionResult::of_reply(reply)),
        Err(failure) => QuestionResult::of_failure(failure.why),
    };
    counted.into_iter().for_each(|result| counters.note(result));
    result
}

// === impl UdpExchange ===

impl UdpExchange<'_> {
    /// Returns when each question has an answer or needs TCP. Their results are in `ended`.
    async fn run(
        &mut self,
        server: SocketAddr,
        ended: &mut impl FnMut(usize, UdpEnd),
    ) -> Result<(), ExchangeFailure> {
        let socket = connected(server)?;
        for sent in &mut self.open {
            sent.send(&socket, self.counters)?;
        }
        // The questions leave before the runtime knows the socket, which saves a wake-up.
        let socket = UdpSocket::from_std(socket.into())?;
        let mut datagram = Vec::with_capacity(DATAGRAM_BUFFER);
        while !self.open.is_empty() {
            datagram.clear();
            socket.recv_buf(&mut datagram).await?;
            self.take(&datagram, &socket, ended)?;
        }
        Ok(())
    }

    fn take(
        &mut self,
        datagram: &[u8],
        socket: impl AsFd,
        ended: &mut impl FnMut(usize, UdpEnd),
    ) -> Result<(), ExchangeFailure> {
        let of = |sent: &SentQuestion<'_>| match wire::decode(datagram, sent.id, sent.question) {
            Err(BadMessage::Foreign) => None,
            read => Some(read),
        };
        let found = self.open.iter().enumerate().find_map(|(at, sent)| Some((at, of(sent)?)));
        let Some((at, read)) = found else {
            self.counters.note(QuestionResult::Foreign);
            self.foreign_left -= 1;
            if self.foreign_left == 0 {
                self.open.drain(..).for_each(|sent| ended(sent.at, UdpEnd::Incomplete));
            }
            return Ok(());
        };
        self.foreign_left += 1;
        match read {
            Ok(reply) if self.open[at].edns && reply.code == ReplyCode::FORMAT_ERROR => {
                self.open[at].edns = false;
                self.open[at].send(socket, self.counters)?;
            }
            Ok(reply) => {
                let reply = counted(Ok(reply), self.counters);
                ended(self.open.swap_remove(at).at, UdpEnd::Ended(reply));
            }
            Err(bad) => {
                self.counters.note(bad.result());
                ended(self.open.swap_remove(at).at, UdpEnd::Incomplete);
            }
        }
        Ok(())
    }
}

// === impl SentQuestion ===

impl SentQuestion<'_> {
    /// Sends the question with a new id. A full send buffer is an error, because the socket
    /// is new.
    fn send(
        &mut self,
        socket: impl AsFd,
        counters: &ResolverCounters,
    ) -> Result<(), ExchangeFailure> {
        self.id = fastrand::u16(..);
        counters.add(&counters.questions);
        let message = encode(self.question, self.id, self.edns)?;
        rustix::net::send(socket, &message, SendFlags::empty())?;
        Ok(())
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

async fn ask_over_tcp(
    server: SocketAddr,
    question: &RecordQuestion,
    counters: &ResolverCounters,
) -> ExchangeResult {
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
            tasks::blocking(read).await.map_err(|_| protocol("the reader panicked"))?
        }
    };
    read.map_err(|bad| {
        counters.note(bad.result());
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

// === impl BadMessage ===

impl BadMessage {
    fn result(&self) -> QuestionResult {
        match self {
            BadMessage::Foreign => QuestionResult::Foreign,
            BadMessage::Truncated => QuestionResult::Truncated,
            BadMessage::Malformed(_) => QuestionResult::Malformed,
        }
    }
}
