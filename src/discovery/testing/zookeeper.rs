//! A real ZooKeeper server for tests: its own port of 127.0.0.1, files and process.
//!
//! Tests of the source and of the whole product start it. It needs java and the package
//! `zookeeper`. Dropping it kills the process by its number. No system service is used.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tidegate_net::clock;

/// Where Debian installs the classes.
const CLASSES: &str = "/usr/share/java";

/// Longest time until a started server answers.
const START_MAX: Duration = Duration::from_secs(60);

/// A server with a tick of 500 ms, so sessions expire after 1 s to 10 s.
#[derive(Debug)]
pub struct ZookeeperServer {
    child: Option<Child>,
    address: SocketAddr,
    dir: PathBuf,
}

// === impl ZookeeperServer ===

impl ZookeeperServer {
    /// Whether the programs are installed. A test without them returns; in a CI it panics.
    pub fn is_available() -> bool {
        let classes = Path::new(CLASSES).join("zookeeper.jar").exists();
        let java = Command::new("java").arg("-version").stderr(Stdio::null()).status();
        let available = classes && java.is_ok_and(|status| status.success());
        if !available {
            assert!(std::env::var_os("CI").is_none(), "install java and zookeeper");
            eprintln!("skipped: java or zookeeper is missing");
        }
        available
    }

    /// Starts a server with its files in `dir`, and waits until it answers.
    ///
    /// # Panics
    /// The server does not answer within 60 s.
    pub fn start(dir: &Path) -> ZookeeperServer {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let address = port.unwrap_or_else(|error| panic!("no port: {error}"));
        let mut server = ZookeeperServer { child: None, address, dir: dir.to_owned() };
        server.restart();
        server
    }

    /// Starts the server again, with its data and its port.
    ///
    /// # Panics
    /// As [`start`](ZookeeperServer::start).
    pub fn restart(&mut self) {
        self.kill();
        let dir = &self.dir;
        let settings = format!(
            "tickTime=500\ndataDir={}\nclientPort={}\nclientPortAddress=127.0.0.1\n\
             admin.enableServer=false\nmaxClientCnxns=0\n4lw.commands.whitelist=*\n",
            dir.join("data").display(),
            self.address.port()
        );
        let file = dir.join("zoo.cfg");
        std::fs::write(&file, settings).unwrap_or_else(|error| panic!("{file:?}: {error}"));
        let log = File::create(dir.join("log")).unwrap_or_else(|error| panic!("log: {error}"));
        let child = Command::new("java")
            .args(["-Xmx256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-XX:-UsePerfData"])
            .args(["-cp", &format!("{CLASSES}/*")])
            .arg("org.apache.zookeeper.server.quorum.QuorumPeerMain")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.child = Some(child.unwrap_or_else(|error| panic!("java: {error}")));
        let deadline = clock::now() + START_MAX;
        while !self.is_serving() {
            assert!(clock::now() < deadline, "the server does not answer; see {dir:?}/log");
            clock::pause(Duration::from_millis(50));
        }
    }

    /// Whether the server has read its data. It answers `ruok` before.
    pub fn is_serving(&self) -> bool {
        self.ask("srvr").is_ok_and(|answer| answer.contains("Mode: "))
    }

    /// Sends a command of four letters.
    ///
    /// # Errors
    /// No connection, or no answer within 2 s.
    pub fn ask(&self, command: &str) -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(command.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its data; a copy made while the server is killed is a backup.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Kills the process at once.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Stops the process, which keeps its connections.
    pub fn stop(&self) {
        self.signal("-STOP");
    }

    /// Continues a stopped process.
    pub fn resume(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        if let Some(child) = &self.child {
            let _ = Command::new("kill").args([signal, &child.id().to_string()]).status();
        }
    }
}

// === impl Drop for ZookeeperServer ===

impl Drop for ZookeeperServer {
    fn drop(&mut self) {
        self.kill();
    }
}
