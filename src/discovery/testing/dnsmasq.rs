//! A real dnsmasq for tests, whose names a test changes.
//!
//! Tests of names use it, here and in the whole program. It listens on a free port of
//! 127.0.0.1.

#![allow(clippy::unwrap_used)]

use rustix::process::{Pid, Signal, kill_process};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tidegate_net::clock;

/// A dnsmasq that knows the names of a hosts file below `example`, and no other.
#[derive(Debug)]
pub struct Dnsmasq {
    child: Child,
    address: SocketAddr,
    arguments: Vec<String>,
    dir: tempfile::TempDir,
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Dnsmasq {
    /// Starts the server. Returns `None` if the program is missing; with the environment
    /// variable `CI` that is an error.
    pub fn start(hosts: &str, ttl: u32, arguments: &[impl AsRef<str>]) -> Option<Dnsmasq> {
        if Command::new("dnsmasq").arg("--version").output().is_err() {
            assert!(std::env::var_os("CI").is_none(), "dnsmasq is missing");
            eprintln!("skipped: dnsmasq is missing");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("hosts"), hosts).unwrap();
        let mut all: Vec<String> = arguments.iter().map(|text| text.as_ref().to_owned()).collect();
        all.push(format!("--local-ttl={ttl}"));
        all.push(format!("--addn-hosts={}", dir.path().join("hosts").display()));
        // dnsmasq cannot choose a port; another program can take the free one first.
        (0..5)
            .find_map(|_| {
                let address =
                    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
                spawn(address, &all).map(|child| (child, address))
            })
            .map(|(child, address)| Dnsmasq { child, address, arguments: all, dir })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Replaces the hosts file and makes the server read it.
    pub fn change(&self, hosts: &str) {
        std::fs::write(self.dir.path().join("hosts"), hosts).unwrap();
        self.signal(Signal::HUP);
    }

    /// Stops the process without ending it; it answers nothing.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Continues after [`Dnsmasq::pause`].
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Ends the process.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts again after [`Dnsmasq::kill`], at the same address.
    pub fn start_again(&mut self) {
        let start = clock::now();
        loop {
            if let Some(child) = spawn(self.address, &self.arguments) {
                self.child = child;
                return;
            }
            assert!(clock::now() - start < Duration::from_secs(10));
        }
    }
}

/// Starts dnsmasq and waits until it accepts connections.
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
        .unwrap();
    let start = clock::now();
    while clock::now() - start < Duration::from_secs(5) {
        if TcpStream::connect(address).is_ok() && child.try_wait().unwrap().is_none() {
            return Some(child);
        }
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        clock::pause(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}
