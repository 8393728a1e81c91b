//! A real ZooKeeper server for tests: its own port of 127.0.0.1, files and process.
//!
//! Tests of the source and of the whole product start it. It needs java and the package
//! `zookeeper`. Dropping it kills the process by its number. No system service is used.

use crate::resolver::Resolver;
use crate::zookeeper::session::{ZkAnswer, ZkProblem, ZkSession};
use crate::zookeeper::wire::{ZkReply, ZkRequest};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tidegate_core::model::{DnsConfig, RegistryConfig, RegistryKind, ServerAddr};
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
    /// More lines of its settings.
    settings: String,
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
        ZookeeperServer::start_with(dir, "")
    }

    /// As [`start`](ZookeeperServer::start), with more lines of settings.
    ///
    /// # Panics
    /// As [`start`](ZookeeperServer::start).
    pub fn start_with(dir: &Path, settings: &str) -> ZookeeperServer {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let address = port.unwrap_or_else(|error| panic!("no port: {error}"));
        let mut server = ZookeeperServer {
            child: None,
            address,
            dir: dir.to_owned(),
            settings: settings.to_owned(),
        };
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
             admin.enableServer=false\nmaxClientCnxns=0\n4lw.commands.whitelist=*\n{}\n",
            dir.join("data").display(),
            self.address.port(),
            self.settings
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

    /// Its data; a copy made while the server is killed or stopped is a backup.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Copies the data while the server is stopped for a moment.
    pub fn back_up(&self) {
        self.stop();
        copy(&self.data(), &self.dir.join("backup"));
        self.resume();
    }

    /// Kills the server and starts it with the data of the backup: older transactions, and
    /// no session of today.
    pub fn restore(&mut self) {
        self.kill();
        copy(&self.dir.join("backup"), &self.data());
        self.restart();
    }

    /// Creates `path` if it is missing, and gives it these children and no other.
    ///
    /// # Panics
    /// The server refuses, or does not answer within 10 s.
    pub fn set_children(&self, path: &str, wanted: &BTreeMap<String, String>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.unwrap_or_else(|error| panic!("no runtime: {error}"));
        runtime.block_on(async {
            let session =
                ZkSession::open(self.registry().into(), Resolver::new(DnsConfig::default()));
            let set = replace_children(&session, path, wanted).await;
            set.unwrap_or_else(|problem| panic!("{path}: {problem:?}"));
        });
    }

    fn registry(&self) -> RegistryConfig {
        RegistryConfig {
            name: "writer".into(),
            kind: RegistryKind::Zookeeper,
            servers: [ServerAddr::Ip(self.address)].into(),
            timeout: Duration::from_secs(10),
            tls: None,
            token_file: None,
            user: None,
            password_file: None,
            kubeconfig: None,
        }
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

/// Replaces a directory by a copy of another one.
fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    // The log of transactions is sparse.
    let copied = Command::new("cp").args(["-r", "--sparse=always"]).args([from, to]).status();
    assert!(copied.is_ok_and(|status| status.success()), "cannot copy {from:?}");
}

async fn replace_children(
    session: &ZkSession,
    path: &str,
    wanted: &BTreeMap<String, String>,
) -> Result<(), ZkProblem> {
    let create = |path: String, data: &str| {
        let data = data.as_bytes().to_vec();
        session.call(ZkRequest::Create { path, data, ephemeral: false, owned: false })
    };
    let existing = |answer: Result<ZkAnswer, ZkProblem>| match answer {
        Ok(_) => Ok(false),
        Err(ZkProblem::NodeExists) => Ok(true),
        Err(problem) => Err(problem),
    };
    existing(create(path.to_owned(), "").await)?;
    let list = ZkRequest::Children { path: path.to_owned(), watch: false };
    if let ZkReply::Children(names, _) = session.call(list).await?.reply {
        for name in names.iter().filter(|name| !wanted.contains_key(*name)) {
            session.call(ZkRequest::Delete { path: format!("{path}/{name}") }).await?;
        }
    }
    for (name, data) in wanted {
        let path = format!("{path}/{name}");
        if existing(create(path.clone(), data).await)? {
            let data = data.as_bytes().to_vec();
            session.call(ZkRequest::SetData { path, data }).await?;
        }
    }
    Ok(())
}

// === impl Drop for ZookeeperServer ===

impl Drop for ZookeeperServer {
    fn drop(&mut self) {
        self.kill();
    }
}
