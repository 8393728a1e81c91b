//! The syntax of `/etc/hosts`: hosts(5).
//!
//! `system` reads the file. The parser accepts any bytes and skips lines that begin with no
//! address.

use std::collections::HashMap;
use std::net::IpAddr;

/// Addresses of a name that count. A further line costs a comparison with each of them.
pub(super) const ADDRESSES_MAX: usize = 256;

/// Addresses by name in lower case.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct HostsTable(HashMap<String, Vec<IpAddr>>);

// === impl HostsTable ===

impl HostsTable {
    /// Reads the text of the file.
    pub(super) fn parse(text: &str) -> HostsTable {
        let mut table = HostsTable::default();
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_ascii_whitespace();
            let Some(Ok(address)) = words.next().map(str::parse) else { continue };
            for name in words {
                let known = table.0.entry(plain(name)).or_default();
                if known.len() < ADDRESSES_MAX && !known.contains(&address) {
                    known.push(address);
                }
            }
        }
        table
    }

    /// Returns the addresses of a name; empty if the file does not have it. A final dot
    /// does not matter.
    pub(super) fn addresses(&self, name: &str) -> &[IpAddr] {
        match self.0.is_empty() {
            true => &[],
            false => self.0.get(&plain(name)).map_or(&[], Vec::as_slice),
        }
    }
}

fn plain(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_of_several_lines_have_all_addresses() {
        let text = "127.0.0.1 localhost\n# 192.0.2.9 web\n192.0.2.1\tWeb web.example # note\n\
                    2001:db8::1 web\n192.0.2.1 web\nnot-an-address web\n\n";
        let table = HostsTable::parse(text);
        let web: Vec<String> = table.addresses("WEB.").iter().map(IpAddr::to_string).collect();
        assert_eq!(web, ["192.0.2.1", "2001:db8::1"]);
        assert_eq!(table.addresses("web.example").len(), 1);
        assert!(table.addresses("note").is_empty() && table.addresses("").is_empty());
    }

    #[test]
    fn a_name_with_100_000_addresses_costs_no_seconds() {
        let line =
            |number: u32| format!("{} web\n", std::net::Ipv4Addr::from(0x0a00_0000 + number));
        let table = HostsTable::parse(&(0..100_000).map(line).collect::<String>());
        assert_eq!(table.addresses("web").len(), ADDRESSES_MAX);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "([0-9.:#\t\n ]|\\PC)*", name in "\\PC*") {
            let _ = HostsTable::parse(&text).addresses(&name);
        }
    }
}
