//! The kernel's settings for local ports: the range for connections, its reserved ports,
//! and the reuse of closed connections.
//!
//! `daemon` reads them periodically. The files are opened once, so that reading works
//! even if the process is out of descriptors. It never changes a setting.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::str::FromStr;

/// ip(7), `ip_local_port_range` and `ip_local_reserved_ports`. They also apply to IPv6.
const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// tcp(7), `tcp_tw_reuse`.
const REUSE: &str = "/proc/sys/net/ipv4/tcp_tw_reuse";

/// Most bytes that are read of a file. Reserved ports beyond it are not counted.
const BYTES_MAX: usize = 64 * 1024;

/// The default range of the kernel, used if the file is not readable.
const USUAL: (u16, u16) = (32_768, 60_999);

/// The settings at the last successful read.
#[derive(Debug)]
pub struct LocalPorts {
    range: Option<File>,
    reserved: Option<File>,
    reuse: Option<File>,
    /// Number of ports per pair of source address and peer.
    pub count: u32,
    /// `tcp_tw_reuse`: 0, 1 or 2.
    pub tw_reuse: u8,
}

// === impl LocalPorts ===

impl LocalPorts {
    /// Opens the files and reads them.
    pub fn open() -> LocalPorts {
        let open = |path| File::open(path).ok();
        let mut ports = LocalPorts {
            range: open(RANGE),
            reserved: open(RESERVED),
            reuse: open(REUSE),
            count: count(USUAL, ""),
            tw_reuse: 2,
        };
        ports.read();
        ports
    }

    /// Reads the settings again.
    pub fn read(&mut self) {
        let range = self.range.as_ref().and_then(text).and_then(|text| range(&text));
        let reserved = self.reserved.as_ref().and_then(text).unwrap_or_default();
        if let Some(range) = range {
            self.count = count(range, &reserved);
        }
        let reuse = self.reuse.as_ref().and_then(text).and_then(|text| text.trim().parse().ok());
        self.tw_reuse = reuse.unwrap_or(self.tw_reuse);
    }
}

/// Returns the current content of the file. A read at offset 0 gives the current value.
fn text(file: &File) -> Option<String> {
    let mut bytes = vec![0; BYTES_MAX];
    let len = file.read_at(&mut bytes, 0).ok()?;
    bytes.truncate(len);
    String::from_utf8(bytes).ok()
}

fn range(text: &str) -> Option<(u16, u16)> {
    let mut words = text.split_whitespace().map(u16::from_str);
    Some((words.next()?.ok()?, words.next()?.ok()?))
}

/// Returns the number of ports of the range without `reserved` (`8080,9000-9010`).
fn count((low, high): (u16, u16), reserved: &str) -> u32 {
    let pieces = reserved.trim().split(',').filter_map(|piece| {
        let (from, to) = piece.split_once('-').unwrap_or((piece, piece));
        let (from, to) = (from.parse::<u16>().ok()?.max(low), to.parse::<u16>().ok()?.min(high));
        (from <= to).then(|| u32::from(to - from) + 1)
    });
    // The kernel's list has no overlaps.
    (u32::from(high.saturating_sub(low)) + 1).saturating_sub(pieces.sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_ports_are_not_counted() {
        assert_eq!(range("32768\t60999\n"), Some((32_768, 60_999)));
        assert_eq!(range("x"), None);
        assert_eq!(count(USUAL, ""), 28_232);
        assert_eq!(count((1000, 1099), "80,1000-1009,1050,1095-2000\n"), 100 - 10 - 1 - 5);
        assert_eq!(count((1000, 1000), "\n"), 1);
    }

    #[test]
    fn settings_of_this_host_are_readable() {
        let mut ports = LocalPorts::open();
        let before = ports.count;
        ports.read();
        assert!(before > 0 && ports.count == before && ports.tw_reuse <= 2);
    }
}
