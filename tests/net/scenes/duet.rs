//! The two ends of one session, both in the test's hand.
//!
//! Non-blocking sockets that a step tells what to send and how to read; every
//! byte has its place in an endless stream of noise and is checked as it comes.
//! A [`Duet`] moves bytes only while a step waits on it. It judges nothing.

use super::{Act, Ended, STEP_MAX};
use crate::common::patience;
use crate::netns::Namespace;
use socket2::{Domain, SockRef, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Two streams of noise; their length is a prime, so that no power of two lost
/// or doubled goes unseen.
static NOISE: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
    [1, 2].map(|seed| {
        let mut noise = vec![0; 65_521];
        fastrand::Rng::with_seed(seed).fill(&mut noise);
        noise
    })
});

/// How an end reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    Eager,
    Never,
    /// So many bytes, then a pause.
    Slow(usize, Duration),
}

/// Both ends at one candidate.
pub struct Duet {
    pub client: End,
    pub backend: End,
    /// Where the backend listens; `None` once it does not.
    pub listener: Option<TcpListener>,
    frontend: SocketAddr,
    pub marked: Instant,
    /// The first step that waited in vain.
    pub stuck: Option<String>,
}

/// One end.
pub struct End {
    stream: Option<TcpStream>,
    connected: bool,
    /// Which of the streams of noise it sends.
    sends: usize,
    sent: u64,
    to_send: u64,
    /// Bytes a write may take.
    write_most: usize,
    fin_asked: bool,
    fin_sent: bool,
    received: u64,
    /// Where the first wrong byte came.
    wrong_at: Option<u64>,
    reading: Reading,
    reads_at: Instant,
    /// It has reset.
    gone: bool,
    /// A write was told of the other end's reset.
    reset_told: bool,
    end: Option<(Ended, Instant)>,
}

// === impl Duet ===

impl Duet {
    pub fn new(frontend: SocketAddr, listener: TcpListener) -> Duet {
        Duet {
            client: End::new(0),
            backend: End::new(1),
            listener: Some(listener),
            frontend,
            marked: Instant::now(),
            stuck: None,
        }
    }

    /// The client connects.
    pub fn dial(&mut self, from: &Namespace) {
        let connected = from.run(|| TcpStream::connect_timeout(&self.frontend, patience(STEP_MAX)));
        match connected {
            Ok(stream) => self.client.take(stream),
            // It stood, and was reset before we looked.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                self.client.connected = true;
                self.client.end = Some((Ended::Reset, Instant::now()));
            }
            Err(error) => self.note_stuck(format!("connect: {error}")),
        }
    }

    /// Waits until the backend has the connection.
    pub fn accept(&mut self) {
        self.wait("accept", STEP_MAX, |duet| {
            let Some(listener) = &duet.listener else { return true };
            if let Ok((stream, _)) = listener.accept() {
                duet.backend.take(stream);
            }
            duet.backend.connected
        });
    }

    /// Has one end do something.
    pub fn act(&mut self, end: fn(&mut Duet) -> &mut End, act: Act) {
        let one = end(self);
        match act {
            Act::Send(bytes) => (one.to_send, one.write_most) = (one.to_send + bytes, usize::MAX),
            Act::SendByteByByte(bytes) => (one.to_send, one.write_most) = (one.to_send + bytes, 1),
            Act::Fin => one.fin_asked = true,
            Act::Reset => one.reset(),
            Act::Reads(how) => one.reading = how,
            Act::SendUrgent => {
                self.wait("send all", STEP_MAX, |duet| end(duet).to_send == 0);
                end(self).send_urgent();
            }
            Act::Acknowledged => {
                self.wait("acknowledged", STEP_MAX, |duet| end(duet).all_acknowledged());
            }
            Act::Receives(bytes) => self.wait(&format!("{bytes} bytes"), STEP_MAX, |duet| {
                end(duet).received >= bytes || end(duet).end.is_some()
            }),
            Act::SeesTheEnd => self.wait("an end", STEP_MAX, |duet| end(duet).end.is_some()),
        }
        // What can be done at once is done when the step is over.
        self.turn();
    }

    /// Goes on for that long.
    pub fn pass(&mut self, time: Duration) {
        let until = Instant::now() + time;
        self.run_until(until, |_| false);
    }

    /// Goes on until `done`; notes it where that is in vain.
    pub fn wait(&mut self, what: &str, most: Duration, done: impl FnMut(&mut Duet) -> bool) {
        if self.stuck.is_some() {
            return;
        }
        if !self.run_until(Instant::now() + patience(most), done) {
            self.note_stuck(format!("waited in vain: {what}"));
        }
    }

    fn run_until(&mut self, until: Instant, mut done: impl FnMut(&mut Duet) -> bool) -> bool {
        loop {
            let moved = self.turn();
            if done(self) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            if !moved {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn turn(&mut self) -> bool {
        self.client.turn() | self.backend.turn()
    }

    fn note_stuck(&mut self, what: String) {
        self.stuck.get_or_insert(what);
    }

    /// How long after the mark the first end came.
    pub fn first_end(&self) -> Option<Duration> {
        let ends = [&self.client, &self.backend].into_iter().filter_map(|end| end.end);
        ends.filter_map(|(_, at)| at.checked_duration_since(self.marked)).min()
    }
}

// === impl End ===

impl End {
    fn new(sends: usize) -> End {
        End {
            stream: None,
            connected: false,
            sends,
            sent: 0,
            to_send: 0,
            write_most: usize::MAX,
            fin_asked: false,
            fin_sent: false,
            received: 0,
            wrong_at: None,
            reading: Reading::Eager,
            reads_at: Instant::now(),
            gone: false,
            reset_told: false,
            end: None,
        }
    }

    pub fn take(&mut self, stream: TcpStream) {
        stream.set_nonblocking(true).expect("a stream can be non-blocking");
        stream.set_nodelay(true).expect("a TCP stream");
        (self.stream, self.connected) = (Some(stream), true);
    }

    /// The next bytes it is to send; for sends in other ways than by a step.
    pub fn next_bytes(&self, count: usize) -> Vec<u8> {
        let noise = NOISE[self.sends].iter().cycle();
        noise.skip(self.sent as usize).take(count).copied().collect()
    }

    /// Goes on with a connection on which so many bytes are sent already.
    pub fn take_midway(&mut self, stream: TcpStream, sent: usize) {
        self.sent += sent as u64;
        self.take(stream);
    }

    /// Whatever it was told to send.
    pub fn asked_to_send(&self) -> u64 {
        self.sent + self.to_send
    }

    pub fn received(&self) -> u64 {
        self.received
    }

    /// Where the first wrong byte came, if one did.
    pub fn wrong_at(&self) -> Option<u64> {
        self.wrong_at
    }

    pub fn ended(&self) -> Ended {
        match self.end {
            _ if self.gone => Ended::Gone,
            Some((end, _)) => end,
            None if self.connected => Ended::Open,
            None => Ended::Never,
        }
    }

    /// Lets go of the socket as a process that ends does.
    pub fn close(&mut self) {
        self.stream = None;
    }

    fn reset(&mut self) {
        if let Some(stream) = self.stream.take() {
            let linger = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            linger.expect("a socket can be told to reset");
            self.gone = true;
        }
    }

    fn send_urgent(&mut self) {
        let noise = &NOISE[self.sends];
        let byte = [noise[self.sent as usize % noise.len()]];
        if let Some(stream) = &self.stream
            && SockRef::from(stream).send_out_of_band(&byte).is_ok()
        {
            self.sent += 1;
        }
    }

    fn all_acknowledged(&self) -> bool {
        let Some(stream) = &self.stream else { return true };
        self.to_send == 0 && tidegate_net::stream::unacknowledged(stream) == 0
    }

    fn turn(&mut self) -> bool {
        self.write() | self.read()
    }

    fn write(&mut self) -> bool {
        let Some(mut stream) = self.stream.as_ref() else { return false };
        let noise = &NOISE[self.sends];
        let mut moved = false;
        while self.to_send > 0 {
            let rest = &noise[self.sent as usize % noise.len()..];
            let most = rest.len().min(self.write_most).min(self.to_send as usize);
            match stream.write(&rest[..most]) {
                Ok(sent) => {
                    (self.sent, self.to_send) =
                        (self.sent + sent as u64, self.to_send - sent as u64);
                    moved = true;
                }
                Err(error) => {
                    // The error is told once: reading finds an end in order.
                    self.reset_told |= error.kind() == io::ErrorKind::ConnectionReset;
                    return moved;
                }
            }
        }
        if self.fin_asked && !self.fin_sent {
            let _ = stream.shutdown(Shutdown::Write);
            self.fin_sent = true;
        }
        moved
    }

    fn read(&mut self) -> bool {
        let mut buffer = [0; 64 * 1024];
        let now = Instant::now();
        let most = match self.reading {
            Reading::Eager => buffer.len(),
            Reading::Slow(bytes, _) if now >= self.reads_at => bytes,
            Reading::Slow(..) | Reading::Never => return false,
        };
        let Some(stream) = self.stream.as_mut().filter(|_| self.end.is_none()) else {
            return false;
        };
        match stream.read(&mut buffer[..most]) {
            Ok(0) if self.reset_told => self.end = Some((Ended::Reset, now)),
            Ok(0) => self.end = Some((Ended::Fin, now)),
            Ok(read) => {
                self.check(&buffer[..read]);
                if let Reading::Slow(_, pause) = self.reading {
                    self.reads_at = now + pause;
                }
            }
            Err(error) if is_would_block(&error) => return false,
            Err(_) => self.end = Some((Ended::Reset, now)),
        }
        true
    }

    fn check(&mut self, bytes: &[u8]) {
        let noise = &NOISE[1 - self.sends];
        for byte in bytes {
            if *byte != noise[self.received as usize % noise.len()] {
                self.wrong_at.get_or_insert(self.received);
            }
            self.received += 1;
        }
    }
}

fn is_would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// A listener of the backend's host.
pub fn listen(on: &Namespace, address: SocketAddr, buffer: Option<usize>) -> TcpListener {
    let open = || -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        // Before listen(2), or the window scale is settled without it (tcp(7)).
        if let Some(buffer) = buffer {
            socket.set_recv_buffer_size(buffer)?;
        }
        socket.bind(&address.into())?;
        socket.listen(128)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    };
    on.run(open).unwrap_or_else(|error| panic!("listen on {address}: {error}"))
}
