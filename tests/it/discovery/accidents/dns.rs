//! Accidents of a real dnsmasq.

use super::{Accident, MemberRegistry};
use std::net::SocketAddr;
use tidegate_discovery::testing::dnsmasq::Dnsmasq;

pub(super) struct DnsRegistry {
    server: Dnsmasq,
}

// === impl DnsRegistry ===

impl DnsRegistry {
    /// Returns `None` if dnsmasq is not installed.
    pub(super) fn start() -> Option<DnsRegistry> {
        let none: &[&str] = &[];
        Dnsmasq::start("", 1, none).map(|server| DnsRegistry { server })
    }
}

impl MemberRegistry for DnsRegistry {
    fn name(&self) -> &'static str {
        "dns"
    }

    fn tables(&self) -> String {
        format!("[dns]\nservers = [\"{}\"]", self.server.address())
    }

    fn discover(&self, port: u16) -> String {
        format!("kind = \"dns\"\nname = \"db.example.\"\nfamily = \"ipv4\"\nport = {port}")
    }

    fn accidents(&self) -> &'static [Accident] {
        &[Accident::Killed, Accident::Hung, Accident::Missing]
    }

    fn announce(&mut self, members: &[SocketAddr]) {
        let line = |member: &SocketAddr| format!("{} db.example\n", member.ip());
        self.server.change(&members.iter().map(line).collect::<String>());
    }

    fn begin(&mut self, accident: Accident) {
        match accident {
            Accident::Killed => self.server.kill(),
            Accident::Hung => self.server.pause(),
            Accident::Missing => self.server.change(""),
            _ => unreachable!("{accident:?} is not in the list"),
        }
    }

    fn end(&mut self, accident: Accident) {
        match accident {
            Accident::Killed => self.server.start_again(),
            Accident::Hung => self.server.resume(),
            _ => {}
        }
    }
}
