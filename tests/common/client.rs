//! Plain blocking clients.
//!
//! Thin wrappers over sockets with deadlines. A hang in Tidegate then fails one test
//! with its name instead of blocking the suite. The clients retry nothing.

use super::{patience, secs};
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

/// Connects, with deadlines of 20 s on every later call.
#[track_caller]
pub fn connect(address: SocketAddr) -> TcpStream {
    try_connect(address).unwrap_or_else(|error| panic!("connect to {address}: {error}"))
}

/// Connects like [`connect`] and returns errors.
pub fn try_connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, patience(secs(10)))?;
    with_deadlines(&stream)?;
    Ok(stream)
}

/// Connects from the address `source`.
pub fn connect_from(source: IpAddr, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.bind(&SockAddr::from(SocketAddr::new(source, 0)))?;
    socket.connect_timeout(&address.into(), patience(secs(10)))?;
    let stream = TcpStream::from(socket);
    with_deadlines(&stream)?;
    Ok(stream)
}

/// Reads text until the peer's FIN. Any other end is an error.
pub fn read_text(mut stream: &TcpStream) -> io::Result<String> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Runs one whole session: connects, sends FIN, and returns everything the backend sent.
pub fn ask(address: SocketAddr) -> io::Result<String> {
    let stream = try_connect(address)?;
    stream.shutdown(Shutdown::Write)?;
    read_text(&stream)
}

/// Sends `request` and reads an answer of the same length.
pub fn exchange(mut stream: &TcpStream, request: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(request)?;
    let mut answer = vec![0; request.len()];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

/// Checks that the session is open, with a backend that echoes.
#[track_caller]
pub fn echoes(client: &TcpStream) {
    assert_eq!(exchange(client, b"hello").expect("an open session"), b"hello");
}

/// Closes with a RST instead of a FIN (SO_LINGER of zero, socket(7)).
pub fn reset(stream: TcpStream) {
    let socket = Socket::from(stream);
    socket.set_linger(Some(Duration::ZERO)).expect("set SO_LINGER");
}

/// How the peer ended this direction.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// FIN after this many bytes.
    Fin(u64),
    /// RST after this many bytes.
    Reset(u64),
    /// No end before the deadline, after this many bytes.
    Silence(u64),
}

/// Reads until the stream ends and returns how it ended.
#[track_caller]
pub fn read_to_end(mut stream: &TcpStream) -> End {
    let mut buffer = vec![0; 64 * 1024];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return End::Fin(total),
            Ok(n) => total += n as u64,
            Err(error) => match error.kind() {
                io::ErrorKind::ConnectionReset => return End::Reset(total),
                io::ErrorKind::WouldBlock => return End::Silence(total),
                io::ErrorKind::Interrupted => {}
                _ => panic!("read: {error}"),
            },
        }
    }
}

/// Connects and reads until the stream ends. An immediate reset can already fail the
/// connect.
#[track_caller]
pub fn connect_and_read_to_end(address: SocketAddr) -> End {
    match try_connect(address) {
        Ok(stream) => read_to_end(&stream),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => End::Reset(0),
        Err(error) => panic!("connect to {address}: {error}"),
    }
}

fn with_deadlines(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(patience(secs(20))))?;
    stream.set_write_timeout(Some(patience(secs(20))))?;
    stream.set_nodelay(true)
}
