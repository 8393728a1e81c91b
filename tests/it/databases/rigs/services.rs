//! A directory server, a mail server and a DNS server.

use crate::common::ports::free_port;
use crate::common::servers::{Running, find};
use crate::common::{eventually, secs};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};

/// A server of a service without data of its own.
pub struct Service {
    pub address: SocketAddr,
    running: Option<Running>,
    command: Command,
    _dir: tempfile::TempDir,
}

impl Service {
    /// OpenLDAP with this configuration and without data.
    pub fn ldap(lines: &str) -> Service {
        let (dir, address) = (directory(), address());
        let file = dir.path().join("slapd.conf");
        std::fs::write(&file, lines).expect("write slapd.conf");
        let mut command = program("slapd");
        command.args(["-d", "0", "-h", &format!("ldap://{address}"), "-f"]).arg(file);
        Service::running(command, address, dir)
    }

    /// aiosmtpd.
    pub fn smtp() -> Service {
        let (dir, address) = (directory(), address());
        // The module can be missing in the first python3 of PATH.
        let mut command = program("aiosmtpd");
        command.args(["-n", "-l", &address.to_string()]);
        Service::running(command, address, dir)
    }

    /// dnsmasq, which knows `www.example.com`, and nothing else in `example.com`.
    pub fn dns() -> Service {
        let (dir, address) = (directory(), address());
        let mut command = program("dnsmasq");
        command.args(["-k", "-C", "/dev/null", "-R", "-h", "-u", "root", "-i", "lo", "-I", "eth0"]);
        command.args(["-z", "-a", "127.0.0.1", "-p", &address.port().to_string()]);
        command.args(["--local=/example.com/", "--host-record=www.example.com,192.0.2.1"]);
        command.arg(format!("--pid-file={}", dir.path().join("pid").display()));
        Service::running(command, address, dir)
    }

    fn running(command: Command, address: SocketAddr, dir: tempfile::TempDir) -> Service {
        let mut service = Service { address, running: None, command, _dir: dir };
        service.start();
        service
    }

    pub fn start(&mut self) {
        self.command.stdout(Stdio::null()).stderr(Stdio::null());
        self.running = Some(Running::start(&mut self.command));
        eventually(secs(10), "the service listens", || TcpStream::connect(self.address).is_ok());
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self) {
        self.running = None;
    }
}

fn program(name: &str) -> Command {
    Command::new(find(name).expect("the test checked for the program"))
}

fn directory() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("tg-service-").tempdir_in("/tmp").expect("directory")
}

fn address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}
