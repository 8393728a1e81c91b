//! The two ends of one session, both controlled by the test.
//!
//! The sockets are non-blocking, and steps set what to send and how to read. Every byte has its
//! place in an endless stream of noise and is checked on arrival. A [`BothEnds`] moves bytes only
//! while a step waits. This module compares nothing with a scene.

use super::{Act, Ended, STEP_MAX};
use crate::common::patience;
use crate::netns::Namespace;
use socket2::{Domain, SockRef, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Two streams of noise. Their length is a prime, so that a lost or duplicated block whose size
/// is a power of two is detected.
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
    /// This many bytes, then a pause.
    Slow(usize, Duration),
}

/// Both ends of one candidate's session.
pub struct BothEnds {
    pub client: End,
    pub backend: End,
    /// The backend's listener. `None` if the backend does not listen.
    pub listener: Option<TcpListener>,
    frontend: SocketAddr,
    pub marked: Instant,
    /// The first step that timed out.
    pub stuck: Option<String>,
}

/// One end.
pub struct End {
    stream: Option<TcpStream>,
    connected: bool,
    /// Index of the noise stream that this end sends.
    sends: usize,
    sent: u64,
    to_send: u64,
    /// Largest number of bytes per write.
    write_most: usize,
    fin_asked: bool,
    fin_sent: bool,
    received: u64,
    /// Position of the first wrong byte.
    wrong_at: Option<u64>,
    reading: Reading,
    reads_at: Instant,
    /// This end has reset the connection.
    gone: bool,
    /// A write has returned the reset of the other end.
    reset_reported: bool,
    end: Option<(Ended, Instant)>,
}

// === impl BothEnds ===

impl BothEnds {
    pub fn new(frontend: SocketAddr, listener: TcpListener) -> BothEnds {
        BothEnds {
            client: End::new(0),
            backend: End::new(1),
            listener: Some(listener),
            frontend,
            marked: Instant::now(),
            stuck: None,
        }
    }

    /// Connects the client.
    pub fn dial(&mut self, from: &Namespace) {
        let connected = from.run(|| TcpStream::connect_timeout(&self.frontend, patience(STEP_MAX)));
        match connected {
            Ok(stream) => self.client.take(stream),
            // The connection was reset right after it was established.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                self.client.connected = true;
                self.client.end = Some((Ended::Reset, Instant::now()));
            }
            Err(error) => self.note_stuck(format!("connect: {error}")),
        }
    }

    /// Waits until the backend has accepted the connection.
    pub fn accept(&mut self) {
        self.wait("accept", STEP_MAX, |ends| {
            let Some(listener) = &ends.listener else { return true };
            if let Ok((stream, _)) = listener.accept() {
                ends.backend.take(stream);
            }
            ends.backend.connected
        });
    }

    /// Performs an action at one end.
    pub fn act(&mut self, end: fn(&mut BothEnds) -> &mut End, act: Act) {
        let one = end(self);
        match act {
            Act::Send(bytes) => (one.to_send, one.write_most) = (one.to_send + bytes, usize::MAX),
            Act::SendByteByByte(bytes) => (one.to_send, one.write_most) = (one.to_send + bytes, 1),
            Act::Fin => one.fin_asked = true,
            Act::Reset => one.reset(),
            Act::Reads(how) => one.reading = how,
            Act::SendUrgent => {
                self.wait("send all", STEP_MAX, |ends| end(ends).to_send == 0);
                end(self).send_urgent();
            }
            Act::Acknowledged => {
                self.wait("acknowledged", STEP_MAX, |ends| end(ends).all_acknowledged());
            }
            Act::Receives(bytes) => self.wait(&format!("{bytes} bytes"), STEP_MAX, |ends| {
                end(ends).received >= bytes || end(ends).end.is_some()
            }),
            Act::SeesTheEnd => self.wait("an end", STEP_MAX, |ends| end(ends).end.is_some()),
        }
        // Actions that can complete immediately are complete when the step ends.
        self.turn();
    }

    /// Moves bytes for the given time.
    pub fn pass(&mut self, time: Duration) {
        let until = Instant::now() + time;
        self.run_until(until, |_| false);
    }

    /// Moves bytes until `done` is true. Records a timeout as stuck.
    pub fn wait(&mut self, what: &str, most: Duration, done: impl FnMut(&mut BothEnds) -> bool) {
        if self.stuck.is_some() {
            return;
        }
        if !self.run_until(Instant::now() + patience(most), done) {
            self.note_stuck(format!("timed out: {what}"));
        }
    }

    fn run_until(&mut self, until: Instant, mut done: impl FnMut(&mut BothEnds) -> bool) -> bool {
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

    /// Returns the time from the mark to the first end.
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
            reset_reported: false,
            end: None,
        }
    }

    pub fn take(&mut self, stream: TcpStream) {
        stream.set_nonblocking(true).expect("a stream can be non-blocking");
        stream.set_nodelay(true).expect("a TCP stream");
        (self.stream, self.connected) = (Some(stream), true);
    }

    /// Returns the next bytes to send, for callers that send them without a step.
    pub fn next_bytes(&self, count: usize) -> Vec<u8> {
        let noise = NOISE[self.sends].iter().cycle();
        noise.skip(self.sent as usize).take(count).copied().collect()
    }

    /// Takes over a connection on which `sent` bytes have already been sent.
    pub fn take_midway(&mut self, stream: TcpStream, sent: usize) {
        self.sent += sent as u64;
        self.take(stream);
    }

    /// Number of bytes that steps have requested to send.
    pub fn asked_to_send(&self) -> u64 {
        self.sent + self.to_send
    }

    pub fn received(&self) -> u64 {
        self.received
    }

    /// Position of the first wrong byte, if any.
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

    /// Closes the socket as the exit of a process does.
    pub fn close(&mut self) {
        self.stream = None;
    }

    fn reset(&mut self) {
        if let Some(stream) = self.stream.take() {
            let linger = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            linger.expect("a socket supports SO_LINGER");
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
                    // The kernel returns the error once. A later read then returns 0 as after a
                    // FIN.
                    self.reset_reported |= error.kind() == io::ErrorKind::ConnectionReset;
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
            Ok(0) if self.reset_reported => self.end = Some((Ended::Reset, now)),
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

/// Opens a listener on a host.
pub fn listen(on: &Namespace, address: SocketAddr, buffer: Option<usize>) -> TcpListener {
    let open = || -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        // Before listen(2), because it fixes the window scale (tcp(7)).
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
