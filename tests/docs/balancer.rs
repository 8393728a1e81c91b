//! A balancer in the test process that has served one session. Its backend sends heartbeats,
//! and a list of members also contains it.
//!
//! Used by the modules that generate tables from metrics, documents and log lines.

use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;
use tidegate_daemon::admin::AdminRequest;
use tidegate_daemon::{self as daemon, Options, RunningBalancer};
use tidegate_heartbeat::SenderState;
use tidegate_heartbeat::keys::Secret;
use tidegate_heartbeat::sender::{Sender, SenderSettings};
use tidegate_heartbeat::wire::SenderIdentity;
use tokio::sync::oneshot;

/// Timeout of `eventually`.
const SOON: Duration = Duration::from_secs(10);

/// A balancer in this process that has served one session.
pub(crate) struct Balancer {
    running: Option<RunningBalancer>,
    directory: tempfile::TempDir,
    _sender: Sender,
}

impl Balancer {
    pub(crate) fn after_one_session() -> Balancer {
        let directory = tempfile::tempdir().unwrap();
        let backend = TcpListener::bind("127.0.0.1:0").unwrap();
        let frontend = free_address();
        let path = directory.path().join("tidegate.toml");
        let file = |name: &str| directory.path().join(name).display().to_string();
        let (socket, access) = (file("admin.sock"), file("access.log"));
        let to = backend.local_addr().unwrap();
        let key = directory.path().join("hb.key");
        fs::write(&key, [7; 32]).unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        let members = file("members.json");
        fs::write(&members, format!("[\"{to}\"]")).unwrap();
        let heartbeats = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let text = format!(
            "[process]\nworkers = 1\npin = false\n\
             [admin]\nlisten = \"unix:{socket}\"\n\
             [log]\naccess = \"{access}\"\n\
             [frontend.web]\nbind = [\"{frontend}\"]\npool = \"web\"\n\
             [heartbeat]\nlisten = \"{heartbeats}\"\n\
             [[heartbeat.key]]\nid = 1\nfile = \"{}\"\npools = [\"web\"]\n\
             addresses = [\"127.0.0.0/8\"]\n\
             [pool.web.heartbeat]\n\
             [pool.web.discover]\nkind = \"file\"\npath = \"{members}\"\n\
             addresses = [\"127.0.0.0/8\"]\n\
             [[pool.web.backend]]\naddress = \"{to}\"\n",
            key.display()
        );
        fs::write(&path, text).unwrap();
        std::thread::spawn(move || serve_one(&backend));
        let options = Options { config: path, signals: false, logging: false };
        let running = daemon::start(options).unwrap();
        let identity = SenderIdentity::new("web", &to.to_string(), to).unwrap();
        let secret = Secret::new(&[7; 32]).unwrap();
        let interval = Duration::from_millis(100);
        let settings =
            SenderSettings { to: vec![heartbeats], identity, key_id: 1, secret, interval };
        talk_once(frontend);
        // After the session, because the first heartbeat starts a probe of the backend.
        let sender = Sender::start(settings).unwrap();
        sender.set_state(SenderState::Ready);
        Balancer { running: Some(running), directory, _sender: sender }
    }

    /// Waits until the metrics contain these series, and returns the metrics.
    pub(crate) fn metrics_with(&self, series: &[&str]) -> String {
        let requests = self.running.as_ref().unwrap().requests();
        eventually(|| {
            let (reply, answer) = oneshot::channel();
            requests.blocking_send(AdminRequest::Metrics(reply)).unwrap();
            Some(answer.blocking_recv().unwrap())
                .filter(|text| series.iter().all(|series| text.contains(series)))
        })
    }

    /// The answer to `GET /metrics` over the admin socket.
    pub(crate) fn scrape(&self) -> String {
        let mut socket = UnixStream::connect(self.directory.path().join("admin.sock")).unwrap();
        socket
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 ") && !head.contains("chunked"), "{head}");
        body.to_owned()
    }

    /// The document of `/v1/status`.
    pub(crate) fn status(&self) -> Value {
        let (reply, answer) = oneshot::channel();
        self.ask(AdminRequest::Status(reply));
        serde_json::from_str(&answer.blocking_recv().unwrap()).unwrap()
    }

    /// The explanation of its backend.
    pub(crate) fn explanation(&self) -> Value {
        let status = self.status();
        let name = status["pools"][0]["backends"][0]["name"].as_str().unwrap().to_owned();
        let (reply, answer) = oneshot::channel();
        self.ask(AdminRequest::Explain { pool: "web".to_owned(), backend: name, reply });
        serde_json::from_str(&answer.blocking_recv().unwrap().unwrap().write()).unwrap()
    }

    fn ask(&self, request: AdminRequest) {
        self.running.as_ref().unwrap().requests().blocking_send(request).unwrap();
    }

    pub(crate) fn access_log_line(&self) -> String {
        let path: &Path = &self.directory.path().join("access.log");
        eventually(|| fs::read_to_string(path).ok().filter(|text| text.ends_with('\n')))
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            let (reply, _) = oneshot::channel();
            // The balancer can have failed already.
            let _ = running
                .requests()
                .blocking_send(AdminRequest::Shutdown { who: "test".to_owned(), reply });
            running.wait();
        }
    }
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Answers the first message of the first connection.
fn serve_one(listener: &TcpListener) {
    let (mut client, _) = listener.accept().unwrap();
    let mut word = [0u8; 4];
    client.read_exact(&mut word).unwrap();
    client.write_all(b"pong").unwrap();
}

fn talk_once(frontend: SocketAddr) {
    let mut stream = TcpStream::connect(frontend).unwrap();
    stream.write_all(b"ping").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "pong");
}

pub(crate) fn eventually<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let (_keep, never) = mpsc::channel::<()>();
    let deadline = tidegate_net::clock::now() + SOON;
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(tidegate_net::clock::now() < deadline, "not within {SOON:?}");
        let _ = never.recv_timeout(Duration::from_millis(10));
    }
}
