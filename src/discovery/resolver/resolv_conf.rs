//! The syntax of `/etc/resolv.conf`: resolv.conf(5).
//!
//! `system` reads the file. The parser accepts any bytes: it skips lines and values that it
//! does not know, as the C library does.

use super::wire::DnsName;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

const DNS_PORT: u16 = 53;
/// MAXNS of the C library.
const SERVERS_MAX: usize = 3;
const SEARCH_MAX: usize = 32;

/// What Tidegate uses of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ResolvConf {
    /// At least one, at most 3.
    pub(super) servers: Vec<SocketAddr>,
    /// Domains for relative names, at most 32.
    pub(super) search: Vec<DnsName>,
    /// A name with as many dots is first asked as it is; 0..=15.
    pub(super) ndots: usize,
    /// Wait for one server; 1 s to 30 s.
    pub(super) timeout: Duration,
    /// Rounds over all servers; 1..=5.
    pub(super) attempts: u32,
}

// === impl ResolvConf ===

impl Default for ResolvConf {
    fn default() -> ResolvConf {
        ResolvConf {
            servers: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, DNS_PORT))],
            search: Vec::new(),
            ndots: 1,
            timeout: Duration::from_secs(2),
            attempts: 2,
        }
    }
}

impl ResolvConf {
    /// Reads the text of the file. Without `nameserver` the server is 127.0.0.1:53.
    pub(super) fn parse(text: &str) -> ResolvConf {
        let mut conf = ResolvConf::default();
        let mut servers = Vec::new();
        for line in text.lines().filter(|line| !line.starts_with(['#', ';'])) {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => servers.extend(words.next().and_then(server)),
                // The last of these lines counts.
                Some("domain" | "search") => {
                    conf.search = words
                        .filter_map(|word| DnsName::parse(word).ok())
                        .take(SEARCH_MAX)
                        .collect();
                }
                Some("options") => words.for_each(|option| conf.set_option(option)),
                _ => {}
            }
        }
        servers.truncate(SERVERS_MAX);
        if !servers.is_empty() {
            conf.servers = servers;
        }
        conf
    }

    fn set_option(&mut self, option: &str) {
        let Some((name, value)) = option.split_once(':') else { return };
        let Ok(value) = value.parse::<u32>() else { return };
        match name {
            "ndots" => self.ndots = value.min(15) as usize,
            "timeout" => self.timeout = Duration::from_secs(value.clamp(1, 30).into()),
            "attempts" => self.attempts = value.clamp(1, 5),
            _ => {}
        }
    }
}

/// Reads the address of a server. The scope of a link-local address is the number of the
/// interface; a name of an interface is not known here, and the line is skipped.
fn server(word: &str) -> Option<SocketAddr> {
    if let Ok(address) = word.parse::<IpAddr>() {
        return Some((address, DNS_PORT).into());
    }
    let (address, scope) = word.split_once('%')?;
    Some(SocketAddrV6::new(address.parse().ok()?, DNS_PORT, 0, scope.parse().ok()?).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_known_line_is_read() {
        let text = "# comment\n; comment\nnameserver 192.0.2.1\nnameserver 2001:db8::1\n\
                    nameserver fe80::1%3\nnameserver 192.0.2.9\ndomain old.example\n\
                    search Corp.Example. example.net\noptions ndots:5 timeout:1 attempts:3 rotate\n\
                    sortlist 192.0.2.0\n";
        let conf = ResolvConf::parse(text);
        let servers: Vec<String> = conf.servers.iter().map(SocketAddr::to_string).collect();
        assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:53", "[fe80::1%3]:53"]);
        let search: Vec<&str> = conf.search.iter().map(DnsName::as_str).collect();
        assert_eq!(search, ["corp.example", "example.net"]);
        assert_eq!((conf.ndots, conf.timeout.as_secs(), conf.attempts), (5, 1, 3));
    }

    #[test]
    fn values_that_are_not_valid_are_skipped_or_bounded() {
        let text = "nameserver\nnameserver here\nnameserver fe80::1%eth0\nsearch\n\
                    options ndots:99 timeout:0 attempts:x attempts:9 :\n";
        let conf = ResolvConf::parse(text);
        let expected = ResolvConf {
            ndots: 15,
            timeout: Duration::from_secs(1),
            attempts: 5,
            ..ResolvConf::default()
        };
        assert_eq!(conf, expected);
        assert_eq!(ResolvConf::parse(""), ResolvConf::default());
    }

    proptest! {
        #[test]
        fn any_text_gives_values_in_bounds(text in "(nameserver|search|options|[ \t\n:.%0-9a-f]|\\PC)*") {
            let conf = ResolvConf::parse(&text);
            prop_assert!((1..=SERVERS_MAX).contains(&conf.servers.len()));
            prop_assert!(conf.search.len() <= SEARCH_MAX && conf.ndots <= 15);
            prop_assert!((1..=5).contains(&conf.attempts));
        }
    }
}
