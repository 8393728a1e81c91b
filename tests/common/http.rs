//! A minimal HTTP/1.1 client for the admin API and for HTTP backends.
//!
//! Called by the proxy handle and by tests. It sends one request per connection with
//! `Connection: close` and reads the whole answer. An answer that does not parse is an
//! error.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

impl Answer {
    /// The body as JSON. Panics and prints the body if it is not JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body)
            .unwrap_or_else(|error| panic!("not JSON ({error}): {:?}", self.body))
    }
}

/// One request over a Unix socket.
pub fn over_unix(path: &Path, method: &str, target: &str) -> io::Result<Answer> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(super::patience(Duration::from_secs(30))))?;
    exchange(stream, method, target)
}

/// One request over a new TCP connection.
pub fn over_tcp(address: SocketAddr, target: &str) -> io::Result<Answer> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(super::patience(Duration::from_secs(10))))?;
    exchange(stream, "GET", target)
}

fn exchange(mut stream: impl Read + Write, method: &str, target: &str) -> io::Result<Answer> {
    let request = format!(
        "{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes())?;
    let mut raw = Vec::new();
    stream.read_to_end(&mut raw)?;
    parse(&raw).ok_or_else(|| {
        let text = String::from_utf8_lossy(&raw).into_owned();
        io::Error::new(io::ErrorKind::InvalidData, format!("no HTTP answer: {text:?}"))
    })
}

fn parse(raw: &[u8]) -> Option<Answer> {
    let split = raw.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&raw[..split]).ok()?.to_ascii_lowercase();
    let body = &raw[split + 4..];
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let body = if head.contains("transfer-encoding: chunked") {
        dechunk(body)?
    } else if let Some(length) = length {
        // A body shorter than its declared length is an error.
        body.get(..length.trim().parse().ok()?)?.to_vec()
    } else {
        body.to_vec()
    };
    Some(Answer { status, body: String::from_utf8_lossy(&body).into_owned() })
}

fn dechunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|window| window == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).ok()?, 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(end + 2..end + 2 + size)?);
        rest = rest.get(end + 2 + size + 2..)?;
    }
}
