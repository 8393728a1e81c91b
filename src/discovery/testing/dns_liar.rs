//! A DNS server whose every answer a test scripts, over UDP and TCP on one port of
//! 127.0.0.1.
//!
//! The script gets each question and returns the steps of the answer. It can lie: other
//! ids, other questions, cut messages, loops, bytes one at a time.

#![allow(missing_docs, clippy::unwrap_used, reason = "only for tests")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinHandle;
use tokio::time::sleep;

pub const TYPE_A: u16 = 1;
pub const TYPE_CNAME: u16 = 5;
pub const TYPE_AAAA: u16 = 28;
pub const TYPE_SRV: u16 = 33;
const TYPE_OPT: u16 = 41;

/// The server. It stops when it is dropped.
pub struct DnsLiar {
    pub address: SocketAddr,
    state: Arc<Mutex<LiarState>>,
    tasks: [JoinHandle<()>; 2],
}

type LiarScript = Box<dyn FnMut(&LiarQuestion) -> Vec<LiarStep> + Send>;

struct LiarState {
    script: LiarScript,
    seen: Vec<LiarQuestion>,
}

/// What the server was asked.
#[derive(Debug, Clone)]
pub struct LiarQuestion {
    pub id: u16,
    /// Lower case, without the final dot.
    pub name: String,
    pub kind: u16,
    pub edns: bool,
    pub tcp: bool,
    /// Port of the client.
    pub port: u16,
}

/// One step of an answer.
#[derive(Debug, Clone)]
pub enum LiarStep {
    /// A message; over TCP with its length.
    Send(Vec<u8>),
    /// Bytes without a length, each after a pause; only over TCP.
    Drip(Vec<u8>, Duration),
    Wait(Duration),
}

/// A message that is about to be sent.
#[derive(Debug, Clone)]
pub struct LiarReply {
    id: u16,
    flags: u16,
    question: Vec<u8>,
    answers: Vec<Vec<u8>>,
    additional: Vec<Vec<u8>>,
}

/// The data of a record.
#[derive(Debug, Clone)]
pub enum LiarData<'a> {
    Address(IpAddr),
    Alias(&'a str),
    Service { priority: u16, weight: u16, port: u16, target: &'a str },
    Raw(u16, Vec<u8>),
}

// === impl DnsLiar ===

impl DnsLiar {
    /// Starts a server on a free port.
    pub async fn start(
        script: impl FnMut(&LiarQuestion) -> Vec<LiarStep> + Send + 'static,
    ) -> DnsLiar {
        loop {
            let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let address = udp.local_addr().unwrap();
            let Ok(tcp) = TcpListener::bind(address).await else { continue };
            let state = LiarState { script: Box::new(script), seen: Vec::new() };
            let state = Arc::new(Mutex::new(state));
            let tasks = [
                tokio::spawn(serve_udp(udp, Arc::clone(&state))),
                tokio::spawn(serve_tcp(tcp, Arc::clone(&state))),
            ];
            return DnsLiar { address, state, tasks };
        }
    }

    /// Everything that it was asked, in order.
    pub fn seen(&self) -> Vec<LiarQuestion> {
        self.state.lock().unwrap().seen.clone()
    }

    /// Number of questions about one type of record.
    pub fn count(&self, kind: u16) -> usize {
        self.seen().iter().filter(|question| question.kind == kind).count()
    }
}

impl Drop for DnsLiar {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

async fn serve_udp(socket: UdpSocket, state: Arc<Mutex<LiarState>>) {
    let socket = Arc::new(socket);
    let mut buffer = vec![0; 4096];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        let steps = ask(&state, &buffer[..length], false, from.port());
        let socket = Arc::clone(&socket);
        tokio::spawn(async move {
            for step in steps {
                match step {
                    LiarStep::Send(message) => drop(socket.send_to(&message, from).await),
                    LiarStep::Wait(time) => sleep(time).await,
                    LiarStep::Drip(..) => panic!("datagrams do not drip"),
                }
            }
        });
    }
}

async fn serve_tcp(listener: TcpListener, state: Arc<Mutex<LiarState>>) {
    loop {
        let Ok((stream, from)) = listener.accept().await else { continue };
        tokio::spawn(serve_connection(stream, Arc::clone(&state), from.port()));
    }
}

async fn serve_connection(
    mut stream: TcpStream,
    state: Arc<Mutex<LiarState>>,
    port: u16,
) -> std::io::Result<()> {
    let mut message = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut message).await?;
    for step in ask(&state, &message, true, port) {
        match step {
            LiarStep::Send(message) => {
                stream.write_u16(message.len().try_into().unwrap()).await?;
                stream.write_all(&message).await?;
            }
            LiarStep::Wait(time) => sleep(time).await,
            LiarStep::Drip(bytes, pause) => {
                for byte in bytes {
                    stream.write_u8(byte).await?;
                    sleep(pause).await;
                }
            }
        }
    }
    Ok(())
}

fn ask(state: &Mutex<LiarState>, message: &[u8], tcp: bool, port: u16) -> Vec<LiarStep> {
    let question = LiarQuestion::read(message, tcp, port);
    let mut state = state.lock().unwrap();
    state.seen.push(question.clone());
    (state.script)(&question)
}

// === impl LiarQuestion ===

impl LiarQuestion {
    fn read(message: &[u8], tcp: bool, port: u16) -> LiarQuestion {
        let number = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
        assert_eq!((number(2), number(4)), (0x0100, 1), "RD, and one question");
        let (mut name, mut at) = (Vec::new(), 12);
        while message[at] != 0 {
            let end = at + 1 + usize::from(message[at]);
            name.push(String::from_utf8(message[at + 1..end].to_vec()).unwrap());
            at = end;
        }
        let edns = number(10) == 1 && number(at + 6) == TYPE_OPT;
        let kind = number(at + 1);
        LiarQuestion { id: number(0), name: name.join("."), kind, edns, tcp, port }
    }

    /// An answer with id and question as they should be, without records.
    pub fn reply(&self) -> LiarReply {
        let mut question = encode_name(&self.name);
        question.extend([self.kind.to_be_bytes(), 1u16.to_be_bytes()].concat());
        let (answers, additional) = (Vec::new(), Vec::new());
        LiarReply { id: self.id, flags: 0x8180, question, answers, additional }
    }

    /// An answer with these addresses, as far as they are of the type asked for.
    pub fn addresses(&self, ttl: u32, addresses: &[&str]) -> LiarReply {
        let addresses = addresses.iter().map(|address| address.parse::<IpAddr>().unwrap());
        let asked = addresses.filter(|address| address.is_ipv4() == (self.kind == TYPE_A));
        asked.fold(self.reply(), |reply, address| {
            reply.record(&self.name, ttl, LiarData::Address(address))
        })
    }
}

// === impl LiarReply ===

impl LiarReply {
    pub fn id(mut self, id: u16) -> LiarReply {
        self.id = id;
        self
    }

    pub fn code(mut self, code: u16) -> LiarReply {
        self.flags |= code;
        self
    }

    pub fn truncated(mut self) -> LiarReply {
        self.flags |= 0x0200;
        self
    }

    /// Another question than the one that was asked; `None`: no question.
    pub fn question(mut self, question: Option<(&str, u16)>) -> LiarReply {
        self.question = question.map_or_else(Vec::new, |(name, kind)| {
            [&encode_name(name)[..], &kind.to_be_bytes(), &1u16.to_be_bytes()].concat()
        });
        self
    }

    pub fn record(mut self, name: &str, ttl: u32, data: LiarData<'_>) -> LiarReply {
        self.answers.push(encode_record(name, ttl, data));
        self
    }

    pub fn additional(mut self, name: &str, ttl: u32, data: LiarData<'_>) -> LiarReply {
        self.additional.push(encode_record(name, ttl, data));
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let count = |records: &[Vec<u8>]| u16::try_from(records.len()).unwrap();
        let questions = u16::from(!self.question.is_empty());
        let numbers =
            [self.id, self.flags, questions, count(&self.answers), 0, count(&self.additional)];
        let mut message = numbers.map(u16::to_be_bytes).concat();
        message.extend(&self.question);
        message.extend(self.answers.iter().chain(&self.additional).flatten());
        message
    }

    /// The steps of a server that sends only this message.
    pub fn send(&self) -> Vec<LiarStep> {
        vec![LiarStep::Send(self.bytes())]
    }
}

fn encode_record(name: &str, ttl: u32, data: LiarData<'_>) -> Vec<u8> {
    let (kind, data) = match data {
        LiarData::Address(IpAddr::V4(address)) => (TYPE_A, address.octets().to_vec()),
        LiarData::Address(IpAddr::V6(address)) => (TYPE_AAAA, address.octets().to_vec()),
        LiarData::Alias(name) => (TYPE_CNAME, encode_name(name)),
        LiarData::Service { priority, weight, port, target } => {
            let numbers = [priority, weight, port].map(u16::to_be_bytes).concat();
            (TYPE_SRV, [numbers, encode_name(target)].concat())
        }
        LiarData::Raw(kind, data) => (kind, data),
    };
    let length = u16::try_from(data.len()).unwrap();
    let head = [kind, 1].map(u16::to_be_bytes).concat();
    [encode_name(name), head, ttl.to_be_bytes().to_vec(), length.to_be_bytes().to_vec(), data]
        .concat()
}

/// The name without compression; `.` and the empty text are the root.
fn encode_name(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).unwrap());
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes
}
