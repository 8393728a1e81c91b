//! A real dnsmasq whose names a test changes.
//!
//! Used by the tests of names. It listens on a free port of 127.0.0.1 and knows the names of
//! its hosts file below `example`, and no other.

use crate::common::{have, ports, proc, secs, within};
use rustix::process::Signal;
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

pub struct NameServer {
    child: Child,
    address: SocketAddr,
    arguments: Vec<String>,
    dir: TempDir,
}

// === impl NameServer ===

impl NameServer {
    /// Starts the server with these lines of its hosts file. Returns `None` without the
    /// program.
    pub fn start(hosts: &str, ttl: u32, arguments: &[String]) -> Option<NameServer> {
        if !have(&["dnsmasq"]) {
            return None;
        }
        let dir = tempfile::tempdir().expect("temp dir");
        let file = dir.path().join("hosts");
        std::fs::write(&file, hosts).expect("a writable directory");
        let mut all =
            vec![format!("--local-ttl={ttl}"), format!("--addn-hosts={}", file.display())];
        all.extend_from_slice(arguments);
        let start = || {
            let address = SocketAddr::from(([127, 0, 0, 1], ports::free_port()));
            Some((spawn(address, &all)?, address))
        };
        // Another program can take the free port first.
        let (child, address) = (0..5).find_map(|_| start()).expect("dnsmasq starts");
        Some(NameServer { child, address, arguments: all, dir })
    }

    /// `[dns]` with this server.
    pub fn table(&self, keys: &str) -> String {
        format!("[dns]\nservers = [\"{}\"]\n{keys}", self.address)
    }

    /// Replaces the hosts file and makes the server read it.
    pub fn change(&self, hosts: &str) {
        std::fs::write(self.dir.path().join("hosts"), hosts).expect("a writable file");
        proc::signal(self.child.id(), Signal::HUP);
    }

    /// Stops the process without ending it; it answers nothing.
    pub fn hang(&self) {
        proc::signal(self.child.id(), Signal::STOP);
    }

    /// Continues after [`NameServer::hang`].
    pub fn resume(&self) {
        proc::signal(self.child.id(), Signal::CONT);
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts again after [`NameServer::kill`], on the same port.
    pub fn start_again(&mut self) {
        let child = within(secs(5), || spawn(self.address, &self.arguments));
        self.child = child.expect("dnsmasq starts again");
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(address: SocketAddr, arguments: &[String]) -> Option<Child> {
    let mut child = Command::new("dnsmasq")
        .args(["--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--user=root"])
        .args(["--no-resolv", "--no-hosts", "--bind-interfaces", "--local=/example/"])
        .arg(format!("--listen-address={}", address.ip()))
        .arg(format!("--port={}", address.port()))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("dnsmasq is installed");
    let answers = within(secs(5), || match child.try_wait().expect("a child") {
        Some(_) => Some(false),
        None => TcpStream::connect(address).is_ok().then_some(true),
    });
    if answers == Some(true) {
        return Some(child);
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}
