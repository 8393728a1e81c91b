//! Fuzz target: arbitrary bytes as requests of an admin API client.
//!
//! Called through `crate::fuzz`. The bytes pass the same connection, guard and router
//! that serve clients. Only the socket and the control loop are simulated.
//!
//! - Nothing panics.
//! - Each answer is HTTP.
//! - A request that the client must not make never reaches the control loop.

use super::guard::Transport;
use super::routes::{ApiState, router};
use super::serve::only_connection;
use super::stream::{StreamCounters, StreamHub};
use super::{
    AdminRequest, AskedWorkers, DeferredText, ForecastBasis, OperatorError, ProblemDoc, ReadyState,
    ReloadDoc, ReloadError, SessionRecords, Token, TokenStore, Tokens, UpgradeDoc, UpgradeError,
};
use crate::event_log::EventLog;
use std::collections::HashMap;
use std::sync::Arc;
use tidegate_core::control::names::Names;
use tidegate_core::control::what_if::AssumedPools;
use tidegate_core::decision::rings::Decisions;
use tidegate_core::table::Table;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, mpsc, watch};

/// A client knows the token if its bytes contain it.
const TOKEN: &[u8] = b"sixteen-and-more";

/// Capacity of the simulated connection, in bytes.
const PIPE_BYTES: usize = 16 * 1024;

thread_local! {
    static RUNTIME: Runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime with only timers starts");
}

/// Checks one input. The first byte selects the transport and the answers of the control
/// loop. The client sends the other bytes and then closes its side.
pub fn check(data: &[u8]) {
    let [mode, sent @ ..] = data else { return };
    let mode = *mode;
    let transport = match mode & 3 {
        0 => Transport::Unix,
        1 | 2 => Transport::Tcp(([127, 0, 0, 1], 9900).into()),
        _ => Transport::Tcp(([192, 0, 2, 1], 9900).into()),
    };
    let token = (mode & 3 != 1).then(|| Token::new(TOKEN)).flatten();
    let token_known = token.is_some() && sent.windows(TOKEN.len()).any(|part| part == TOKEN);
    let (answers, asked) =
        RUNTIME.with(|runtime| runtime.block_on(talk(transport, token, sent, mode)));
    assert!(answers.is_empty() || answers.starts_with(b"HTTP/1."), "{}", answers.escape_ascii());
    for request in asked {
        let Transport::Tcp(listen) = transport else { continue };
        let harmless = matches!(
            request,
            AdminRequest::Status(_)
                | AdminRequest::Metrics(_)
                | AdminRequest::Explain { .. }
                | AdminRequest::Observe { .. }
                | AdminRequest::History { .. }
                | AdminRequest::Sessions { .. }
                | AdminRequest::Decisions(_)
                | AdminRequest::Names { .. }
                | AdminRequest::Forecast { .. }
        );
        assert!(token_known || harmless && listen.ip().is_loopback(), "{request:?}");
        let foreign = matches!(
            &request,
            AdminRequest::Upgrade { binary, config, .. } if binary.is_some() || config.is_some()
        );
        assert!(!foreign, "a program named over TCP: {request:?}");
    }
}

/// Returns the answers, and the requests that reached the control loop.
async fn talk(
    transport: Transport,
    token: Option<Token>,
    sent: &[u8],
    mode: u8,
) -> (Vec<u8>, Vec<AdminRequest>) {
    let (requests, control) = mpsc::channel(super::REQUESTS_MAX);
    let readiness = ReadyState::new();
    if mode & 4 != 0 {
        readiness.set_ready();
    }
    let tokens = Arc::new(TokenStore::new(Tokens { full: token, read: None }));
    let (near, far) = duplex(PIPE_BYTES);
    let (_closing, closed) = watch::channel(false);
    // No question waits, so that a check takes no time.
    let (events, waiting, closing) = (EventLog::new(), Semaphore::new(0), closed.clone());
    // No stream opens, because it would not end.
    let hub = StreamHub::new(StreamCounters::full());
    let entrance = transport;
    let state = ApiState { entrance, tokens, requests, readiness, events, waiting, hub, closing };
    let routes = router(Arc::new(state));
    let served = only_connection(far, routes, closed);
    let ((), answers, asked) =
        tokio::join!(served, client(near, sent), control_loop(control, mode & 8 != 0));
    (answers, asked)
}

async fn client(stream: DuplexStream, sent: &[u8]) -> Vec<u8> {
    let (mut read, mut write) = tokio::io::split(stream);
    let send = async move {
        // The write fails if the server has closed the connection early.
        let _ = write.write_all(sent).await;
        let _ = write.shutdown().await;
    };
    let mut answers = Vec::new();
    let (_, read) = tokio::join!(send, read.read_to_end(&mut answers));
    read.expect("memory does not fail");
    answers
}

/// Answers all requests and returns them without their reply channels.
async fn control_loop(
    mut requests: mpsc::Receiver<AdminRequest>,
    rejects: bool,
) -> Vec<AdminRequest> {
    let mut asked = Vec::new();
    while let Some(request) = requests.recv().await {
        asked.push(answer(request, rejects));
    }
    asked
}

/// Returns a reply channel without a receiver.
fn no_receiver<T>() -> tokio::sync::oneshot::Sender<T> {
    tokio::sync::oneshot::channel().0
}

fn answer(request: AdminRequest, rejects: bool) -> AdminRequest {
    let unknown = || if rejects { Err(OperatorError::UnknownBackend) } else { Ok(()) };
    match request {
        AdminRequest::Status(reply) => {
            let _ = reply.send("{}".to_owned());
            AdminRequest::Status(no_receiver())
        }
        AdminRequest::PoolTable { pool, reply } => {
            let _ = reply.send(None);
            AdminRequest::PoolTable { pool, reply: no_receiver() }
        }
        // Without an answer the client gets 503.
        AdminRequest::Observe { latencies, .. } => {
            AdminRequest::Observe { latencies, reply: no_receiver() }
        }
        AdminRequest::History { pool, backend, part, reply } => {
            let told = unknown().map(|()| DeferredText::new(|| "[]".to_owned()));
            let _ = reply.send(told);
            AdminRequest::History { pool, backend, part, reply: no_receiver() }
        }
        AdminRequest::Metrics(reply) => {
            let _ = reply.send(String::new());
            AdminRequest::Metrics(no_receiver())
        }
        #[cfg(debug_assertions)]
        AdminRequest::Fault { place, worker, millis, reply } => {
            let _ = reply.send(false);
            AdminRequest::Fault { place, worker, millis, reply: no_receiver() }
        }
        AdminRequest::Shutdown { who, reply } => {
            let _ = reply.send(());
            AdminRequest::Shutdown { who, reply: no_receiver() }
        }
        AdminRequest::Explain { pool, backend, reply } => {
            let text = || DeferredText::new(|| "{}".to_owned());
            let _ = reply.send(unknown().map(|()| text()));
            AdminRequest::Explain { pool, backend, reply: no_receiver() }
        }
        AdminRequest::Sessions { query, reply } => {
            let _ = reply.send(AskedWorkers { lists: Vec::new(), elsewhere: 0 });
            AdminRequest::Sessions { query, reply: no_receiver() }
        }
        AdminRequest::EndSessions { order, reply } => {
            let _ = reply.send(Vec::new());
            AdminRequest::EndSessions { order, reply: no_receiver() }
        }
        AdminRequest::Decisions(reply) => {
            let decisions = Arc::new(Decisions::new(1));
            let _ = reply.send(SessionRecords { decisions, given_out: 1..65 });
            AdminRequest::Decisions(no_receiver())
        }
        AdminRequest::Names { ids, reply } => {
            let _ = reply.send(Names::default());
            AdminRequest::Names { ids, reply: no_receiver() }
        }
        AdminRequest::Forecast { assumed, reply } => {
            let basis = ForecastBasis {
                table: Arc::new(Table::empty()),
                assumed: AssumedPools::default(),
                queued: HashMap::new(),
                sessions: 0,
                draining: false,
            };
            let _ = reply.send(Ok(basis));
            AdminRequest::Forecast { assumed, reply: no_receiver() }
        }
        AdminRequest::SetIntent { pool, backend, intent, who, reply } => {
            let _ = reply.send(unknown());
            AdminRequest::SetIntent { pool, backend, intent, who, reply: no_receiver() }
        }
        AdminRequest::Reload { who, reply } => {
            let problem = ProblemDoc {
                file: "f".into(),
                line: 1,
                column: 1,
                message: "wrong".to_owned(),
                help: None,
                rendered: "f:1:1: error: wrong".to_owned(),
            };
            let reloaded = ReloadDoc { generation: 2, changed: true, warnings: Vec::new() };
            let refused = ReloadError::Problems(vec![problem]);
            let _ = reply.send(if rejects { Err(refused) } else { Ok(reloaded) });
            AdminRequest::Reload { who, reply: no_receiver() }
        }
        AdminRequest::Upgrade { binary, config, asked_over, who, reply } => {
            let upgraded = UpgradeDoc { pid: 1, version: "1".to_owned(), generation: 2 };
            let refused = UpgradeError::Refused("not now".to_owned());
            let _ = reply.send(if rejects { Err(refused) } else { Ok(upgraded) });
            AdminRequest::Upgrade { binary, config, asked_over, who, reply: no_receiver() }
        }
    }
}
