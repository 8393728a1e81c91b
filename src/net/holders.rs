//! The listening TCP sockets of this host and the processes that hold them, read from
//! /proc (proc_pid_net(5)).
//!
//! Used by `daemon` before it binds, and to explain a failed bind. It never opens or
//! changes a socket.

use rustix::fs::fstat;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::Path;

/// `TCP_LISTEN` in the column `st`.
const LISTEN: &str = "0A";

/// Most processes that are searched for the holder of a socket.
const PROCESSES_MAX: usize = 20_000;

/// A listening socket of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListeningSocket {
    /// Its local address.
    pub address: SocketAddr,
    /// Its inode number; see [`number_of`].
    pub socket: u64,
    /// User ID of its owner.
    pub user: u32,
}

/// A process that has a socket open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Process ID.
    pub pid: u32,
    /// Its name, as ps(1) shows it.
    pub program: String,
}

/// Returns every listening TCP socket of this network namespace.
///
/// # Errors
/// /proc is not readable.
pub fn listening() -> io::Result<Vec<ListeningSocket>> {
    let mut all = Vec::new();
    read("/proc/self/net/tcp", &mut all)?;
    match read("/proc/self/net/tcp6", &mut all) {
        // The kernel has no IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        result => result?,
    }
    Ok(all)
}

/// Returns the inode number of the socket that listens at the path, or at `@` and a name in the
/// abstract namespace. `None`: no process of this network namespace listens there.
pub fn listening_at(path: &Path) -> Option<u64> {
    /// `__SO_ACCEPTCON` in the column `Flags`: the socket listens.
    const ACCEPTS: u32 = 1 << 16;
    let file = BufReader::new(File::open("/proc/self/net/unix").ok()?);
    file.lines().skip(1).map_while(Result::ok).find_map(|line| {
        // Number, references, protocol, flags, type, state, inode number, path.
        let words: Vec<&str> = line.splitn(7, ' ').collect();
        let flags = u32::from_str_radix(words.get(3)?, 16).ok()?;
        let (socket, name) = words.get(6)?.trim_start().split_once(' ')?;
        let same = flags & ACCEPTS != 0 && Path::new(name) == path;
        same.then(|| socket.parse().ok())?
    })
}

/// Reads the listening sockets, which come first in these files.
fn read(path: &str, into: &mut Vec<ListeningSocket>) -> io::Result<()> {
    for line in BufReader::new(File::open(path)?).lines().skip(1) {
        let line = line?;
        let mut words = line.split_ascii_whitespace().skip(1);
        let (address, state) = (words.next(), words.nth(1));
        if state != Some(LISTEN) {
            break;
        }
        let (user, socket) = (words.nth(3), words.nth(1));
        let parsed = || {
            Some(ListeningSocket {
                address: parse(address?)?,
                socket: socket?.parse().ok()?,
                user: user?.parse().ok()?,
            })
        };
        into.extend(parsed());
    }
    Ok(())
}

/// Parses an address such as `0100007F:1F90`: words in host byte order, then the port.
fn parse(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| {
        let word = u32::from_str_radix(ip.get(at * 8..at * 8 + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        _ => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(words).ok()?))
        }
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// Returns the inode number of a socket, which is the same in every process that holds
/// the socket.
pub fn number_of(socket: impl AsFd) -> io::Result<u64> {
    Ok(fstat(socket)?.st_ino)
}

/// Returns whether sockets on both addresses can get the same connection. IPv6 wildcards
/// are assumed to accept no IPv4.
pub fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let wide = one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() == other.port()
        && one.is_ipv4() == other.is_ipv4()
        && (wide || one.ip() == other.ip())
}

/// Returns a process that holds the socket, if this process may read its descriptors.
pub fn holder(socket: u64) -> Option<Holder> {
    let link = format!("socket:[{socket}]");
    let processes = fs::read_dir("/proc").ok()?.flatten().take(PROCESSES_MAX);
    for process in processes {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if has_open(&process.path(), &link) {
            let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(Holder { pid, program: program.trim_end().to_owned() });
        }
    }
    None
}

fn has_open(process: &Path, link: &str) -> bool {
    let Ok(fds) = fs::read_dir(process.join("fd")) else { return false };
    fds.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == link))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listen;

    #[test]
    fn listening_sockets_are_found_with_their_holder() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let socket = listen::bind(address.parse().unwrap(), 1).unwrap().remove(0);
            let address = socket.local_addr().unwrap().as_socket().unwrap();
            let number = number_of(&socket).unwrap();
            let found = listening().unwrap();
            let found = found.iter().find(|one| one.socket == number).expect("it listens");
            assert_eq!(found.address, address);
            assert_eq!(found.user, rustix::process::getuid().as_raw());
            assert_eq!(holder(number).unwrap().pid, std::process::id());
        }
    }

    #[test]
    fn equal_addresses_and_wildcards_of_the_same_family_overlap() {
        let overlap = |one: &str, other: &str| {
            let (one, other) = (one.parse().unwrap(), other.parse().unwrap());
            assert_eq!(super::overlap(one, other), super::overlap(other, one));
            super::overlap(one, other)
        };
        assert!(overlap("0.0.0.0:80", "127.0.0.1:80"));
        assert!(overlap("[::]:80", "[::1]:80"));
        assert!(overlap("127.0.0.1:80", "127.0.0.1:80"));
        assert!(!overlap("127.0.0.2:80", "127.0.0.1:80"));
        assert!(!overlap("0.0.0.0:80", "[::1]:80"));
        assert!(!overlap("0.0.0.0:80", "127.0.0.1:81"));
    }
}
