//! An admin API on a separate thread with a simulated control loop, and a client that sends
//! exactly the given bytes.

use std::future::pending;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::questions::Questioned;
use tidegate_core::control::OperatorError;
use tidegate_core::health::Intent;
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::{Admin, AdminListen};
use tidegate_daemon::admin::{
    self, AdminRequest, DeferredText, Observables, ProblemDoc, ReadyState, ReloadDoc, ReloadError,
    Token, TokenStore, Tokens, UpgradeDoc, UpgradeError,
};
use tidegate_net::clock;
use tokio::sync::{mpsc, oneshot};

pub(crate) const TOKEN: &str = "a-token-of-fair-length";

/// How the simulated control loop behaves.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Control {
    Answers,
    RejectsTheFile,
    Drains,
    Hangs,
    HasEnded,
}

pub(crate) struct Api {
    pub(crate) address: AdminListen,
    pub(crate) readiness: ReadyState,
    pub(crate) dropped: admin::DroppedConnections,
    pub(crate) tokens: Arc<TokenStore>,
    pub(crate) shut_down: Arc<AtomicBool>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    pub(crate) dir: tempfile::TempDir,
}

/// The configuration of an API without tokens.
pub(crate) fn endpoint(listen: AdminListen) -> Admin {
    Admin { listen, token_file: None, read_token_file: None, backend_metrics_max: 0 }
}

impl Api {
    pub(crate) fn unix(control: Control) -> Api {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        Api::start(AdminListen::Unix(path), None, control, dir)
    }

    pub(crate) fn tcp(listen: &str, token: Option<&str>) -> Api {
        let listen = AdminListen::Tcp(listen.parse().unwrap());
        Api::start(listen, token, Control::Answers, tempfile::tempdir().unwrap())
    }

    fn start(
        listen: AdminListen,
        token: Option<&str>,
        control: Control,
        dir: tempfile::TempDir,
    ) -> Api {
        let listener = admin::bind(&endpoint(listen)).unwrap();
        let (address, dropped) = (listener.address(), listener.dropped());
        let full = token.map(|token| Token::new(token.as_bytes()).unwrap());
        let tokens = Arc::new(TokenStore::new(Tokens { full, read: None }));
        let (readiness, shut_down) = (ReadyState::new(), Arc::new(AtomicBool::new(false)));
        let (stop, stopped) = oneshot::channel::<()>();
        let served = (Arc::clone(&tokens), readiness.clone(), Arc::clone(&shut_down));
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (tokens, readiness, shut_down) = served;
            let (requests, inbox) = mpsc::channel(admin::REQUESTS_MAX);
            runtime.spawn(run_control_loop(control, inbox, shut_down));
            let stop = async { drop(stopped.await) };
            let counters = Arc::new(WorkerCounters::new(1, 1));
            let serve = admin::serve(
                listener,
                tokens,
                requests,
                readiness,
                counters,
                Observables::default(),
                stop,
            );
            runtime.block_on(serve).unwrap();
        });
        Api {
            address,
            dropped,
            readiness,
            tokens,
            shut_down,
            stop: Some(stop),
            thread: Some(thread),
            dir,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        let AdminListen::Unix(path) = &self.address else { panic!("not a Unix socket") };
        path
    }

    pub(crate) fn to(&self) -> SocketAddr {
        let AdminListen::Tcp(to) = self.address else { panic!("not TCP") };
        SocketAddr::from(([127, 0, 0, 1], to.port()))
    }

    pub(crate) fn connect(&self) -> Box<dyn Stream> {
        let patience = Some(Duration::from_secs(30));
        match &self.address {
            AdminListen::Unix(path) => {
                let stream = UnixStream::connect(path).unwrap();
                stream.set_read_timeout(patience).unwrap();
                Box::new(stream)
            }
            AdminListen::Tcp(_) => {
                let stream = TcpStream::connect(self.to()).unwrap();
                stream.set_read_timeout(patience).unwrap();
                Box::new(stream)
            }
        }
    }

    /// Sends one request with these header lines. `Host` is included only if given.
    pub(crate) fn raw(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Answer {
        let mut stream = self.connect();
        let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
        for header in headers {
            head.push_str(&format!("{header}\r\n"));
        }
        head.push_str("\r\n");
        // The server can answer before it has read a large head or body.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        Answer::read(&mut stream)
    }

    pub(crate) fn ask(&self, method: &str, path: &str) -> Answer {
        self.raw(method, path, &["Host: localhost", "Content-Length: 0"], b"")
    }

    pub(crate) fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    /// Runs the program's client against this API.
    pub(crate) fn cli(&self, arguments: &[&str]) -> Output {
        let admin = self.address.to_string();
        Command::new(env!("CARGO_BIN_EXE_tidegate"))
            .args(arguments)
            .args(["--admin", &admin])
            .output()
            .unwrap()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.stop();
    }
}

pub(crate) trait Stream: Read + Write {}
impl<S: Read + Write> Stream for S {}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn read(stream: &mut dyn Stream) -> Answer {
        let mut raw = Vec::new();
        // A reset after the answer, because of an unread body, is no error.
        let _ = stream.read_to_end(&mut raw);
        let text = String::from_utf8(raw).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        assert!(self.head.contains("content-type: application/json"), "{self:?}");
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Returns the status and the `error` of a well-formed error answer.
    pub(crate) fn error(&self) -> (u16, String) {
        let value = self.json();
        assert!(value["detail"].is_string(), "{self:?}");
        (self.status, value["error"].as_str().unwrap().to_owned())
    }
}

async fn run_control_loop(
    control: Control,
    mut inbox: mpsc::Receiver<AdminRequest>,
    shut_down: Arc<AtomicBool>,
) {
    if control == Control::HasEnded {
        return;
    }
    let questioned = Questioned::new();
    while let Some(request) = inbox.recv().await {
        if control == Control::Hangs {
            pending::<()>().await;
        }
        match request {
            #[cfg(debug_assertions)]
            AdminRequest::Fault { reply, .. } => drop(reply),
            AdminRequest::Status(reply) => drop(reply.send(STATUS.to_owned())),
            AdminRequest::Metrics(reply) => drop(reply.send("tidegate_x 1\n".to_owned())),
            AdminRequest::Reload { reply, .. } => drop(reply.send(match control {
                Control::RejectsTheFile => Err(rejected_file()),
                Control::Drains => Err(ReloadError::NotNow("this process is draining")),
                _ => Ok(ReloadDoc {
                    generation: 4,
                    changed: true,
                    warnings: vec!["process.workers waits for a restart".to_owned()],
                }),
            })),
            AdminRequest::Explain { pool, backend, reply } => {
                drop(reply.send(match (pool.as_str(), backend.as_str()) {
                    ("web", "a") => Ok(DeferredText::new(|| EXPLANATION.to_owned())),
                    ("web", _) => Err(OperatorError::UnknownBackend),
                    _ => Err(OperatorError::UnknownPool),
                }));
            }
            AdminRequest::Observe { reply, .. } => drop(reply),
            AdminRequest::History { pool, reply, .. } => drop(reply.send(match &*pool {
                "web" => Ok(DeferredText::new(|| "[1,2]".to_owned())),
                _ => Err(OperatorError::UnknownPool),
            })),
            AdminRequest::Sessions { reply, .. } => drop(reply),
            AdminRequest::EndSessions { reply, .. } => drop(reply),
            AdminRequest::PoolTable { reply, .. } => drop(reply.send(None)),
            AdminRequest::Decisions(reply) => drop(reply.send(questioned.records())),
            AdminRequest::Names { ids, reply } => {
                drop(reply.send(questioned.controller.names_of(&ids)));
            }
            AdminRequest::Forecast { assumed, reply } => {
                drop(reply.send(questioned.basis(&assumed)));
            }
            AdminRequest::SetIntent { pool, backend, intent, reply, .. } => {
                let known = ["a", "10.0.0.1:80", "[::1]:80", "unix:/run/b.sock", "é"];
                drop(reply.send(match (pool.as_str(), known.contains(&backend.as_str())) {
                    ("web", true) => {
                        assert!(matches!(intent, Intent::Draining | Intent::Ready));
                        Ok(())
                    }
                    ("web", false) => Err(OperatorError::UnknownBackend),
                    _ => Err(OperatorError::UnknownPool),
                }));
            }
            AdminRequest::Upgrade { binary, config, reply, .. } => {
                let word = binary.map(|path| path.display().to_string());
                drop(reply.send(match (word.as_deref(), config) {
                    (Some("/broken one"), _) => Err(UpgradeError::Failed("it said: no".to_owned())),
                    (Some(_), None) => Err(UpgradeError::Refused("not now".to_owned())),
                    _ => Ok(UpgradeDoc { pid: 77, version: "9".to_owned(), generation: 5 }),
                }));
            }
            AdminRequest::Shutdown { reply, .. } => {
                shut_down.store(true, Ordering::Relaxed);
                let _ = reply.send(());
            }
        }
    }
}

pub(crate) const STATUS: &str = concat!(
    r#"{"version":"0.1.0","generation":3,"table_serial":9,"engine":"epoll","#,
    r#""engine_reason":"configured","workers":2,"stalled":[],"worker_panics_total":0,"#,
    r#""worker_restarts_total":0,"uptime_seconds":1.5,"state":"serving","connections_active":0,"#,
    r#""connections_max":100,"warnings":[],"confinement":[],"heartbeat":null,"frontends":[],"#,
    r#""pools":[],"leaving":[]}"#
);

/// A document with fewer fields than a client of this version expects.
pub(crate) const EXPLANATION: &str = r#"{"pool":"web","backend":"a","eligible":true}"#;

fn rejected_file() -> ReloadError {
    let problem = |line, message: &str| ProblemDoc {
        file: "t.toml".into(),
        line,
        column: 7,
        message: message.to_owned(),
        help: (line == 9).then(|| "did you mean \"weight\"?".to_owned()),
        rendered: format!("t.toml:{line}:7: error: {message}"),
    };
    ReloadError::Problems(vec![problem(3, "no such pool"), problem(9, "unknown key")])
}

pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = clock::now() + Duration::from_secs(20);
    while !holds() {
        assert!(clock::now() < deadline, "never: {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

pub(crate) fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}")
}
