//! Starts of connections for tests of the PROXY protocol.
//!
//! The tests of the codec read the same file.

/// One start of a connection.
#[derive(Debug, Clone)]
pub struct HeaderVector {
    pub name: &'static str,
    /// `client ADDRESS`, `socket`, `local`, `missing`, `malformed`, `crc` or `incomplete`.
    pub expected: &'static str,
    pub bytes: Vec<u8>,
}

/// Every vector of the file.
pub fn headers() -> Vec<HeaderVector> {
    let text = include_str!("vectors/proxy_headers.txt");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(vector).collect()
}

fn vector(line: &'static str) -> HeaderVector {
    let (name, rest) = line.split_once(": ").expect("a name");
    let (expected, hex) = rest.rsplit_once(':').expect("bytes");
    let (hex, times) = hex.trim().split_once('*').unwrap_or((hex.trim(), "1"));
    let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("two digits");
    let mut bytes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
    if let Some(last) = bytes.last().copied() {
        let times: usize = times.parse().expect("a number");
        bytes.extend(std::iter::repeat_n(last, times - 1));
    }
    HeaderVector { name, expected, bytes }
}
