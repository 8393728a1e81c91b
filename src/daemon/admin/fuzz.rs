//! Any bytes as a request of a client of the admin API.
//!
//! Called through `crate::fuzz`. The bytes go through the very connection,
//! guard and router that serve clients; only the socket and the control loop are
//! simulated. Nothing may panic, each answer is HTTP, and what a client may not ask for
//! never reaches the control loop.

use super::guard::Transport;
use super::routes::{ApiState, router};
use super::serve::only_connection;
use super::{
    AdminRequest, OperatorError, ProblemDoc, ReadyState, ReloadDoc, ReloadError, Token, TokenStore,
    UpgradeDoc, UpgradeError,
};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

/// A client knows it exactly if its bytes hold it.
const TOKEN: &[u8] = b"sixteen-and-more";

/// Bytes that fit between the two ends.
const WIRE: usize = 16 * 1024;

thread_local! {
    static RUNTIME: Runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime of timers alone needs nothing");
}

/// The first byte says where the request comes in and what the control loop
/// answers; the rest is what the client says before it ends its side.
pub fn check(data: &[u8]) {
    let [mode, said @ ..] = data else { return };
    let mode = *mode;
    let entrance = match mode & 3 {
        0 => Transport::Unix,
        1 | 2 => Transport::Tcp(([127, 0, 0, 1], 9900).into()),
        _ => Transport::Tcp(([192, 0, 2, 1], 9900).into()),
    };
    let token = (mode & 3 != 1).then(|| Token::new(TOKEN)).flatten();
    let token_known = token.is_some() && said.windows(TOKEN.len()).any(|part| part == TOKEN);
    let (answers, asked) =
        RUNTIME.with(|runtime| runtime.block_on(talk(entrance, token, said, mode)));
    assert!(answers.is_empty() || answers.starts_with(b"HTTP/1."), "{}", answers.escape_ascii());
    for request in asked {
        let Transport::Tcp(listen) = entrance else { continue };
        let harmless = matches!(
            request,
            AdminRequest::Status(_) | AdminRequest::Metrics(_) | AdminRequest::Explain { .. }
        );
        assert!(token_known || harmless && listen.ip().is_loopback(), "{request:?}");
        let foreign = matches!(
            &request,
            AdminRequest::Upgrade { binary, config, .. } if binary.is_some() || config.is_some()
        );
        assert!(!foreign, "a program named over TCP: {request:?}");
    }
}

/// What was answered, and what the control loop was asked.
async fn talk(
    entrance: Transport,
    token: Option<Token>,
    said: &[u8],
    mode: u8,
) -> (Vec<u8>, Vec<AdminRequest>) {
    let (requests, control) = mpsc::channel(super::REQUESTS_MAX);
    let readiness = ReadyState::new();
    if mode & 4 != 0 {
        readiness.set_ready();
    }
    let tokens = Arc::new(TokenStore::new(token));
    let routes = router(Arc::new(ApiState { entrance, tokens, requests, readiness }));
    let (near, far) = duplex(WIRE);
    let (_closing, closed) = watch::channel(false);
    let served = only_connection(far, routes, closed);
    let ((), answers, asked) =
        tokio::join!(served, client(near, said), control_loop(control, mode & 8 != 0));
    (answers, asked)
}

async fn client(stream: DuplexStream, said: &[u8]) -> Vec<u8> {
    let (mut read, mut write) = tokio::io::split(stream);
    let say = async move {
        // A connection that is closed early takes no more.
        let _ = write.write_all(said).await;
        let _ = write.shutdown().await;
    };
    let mut answers = Vec::new();
    let (_, read) = tokio::join!(say, read.read_to_end(&mut answers));
    read.expect("memory does not fail");
    answers
}

/// Answers everything; gives what it was asked, with the replies taken out.
async fn control_loop(
    mut requests: mpsc::Receiver<AdminRequest>,
    refuses: bool,
) -> Vec<AdminRequest> {
    let mut asked = Vec::new();
    while let Some(request) = requests.recv().await {
        asked.push(answer(request, refuses));
    }
    asked
}

/// A reply without a receiver.
fn nobody<T>() -> tokio::sync::oneshot::Sender<T> {
    tokio::sync::oneshot::channel().0
}

fn answer(request: AdminRequest, refuses: bool) -> AdminRequest {
    let unknown = || if refuses { Err(OperatorError::UnknownBackend) } else { Ok(()) };
    match request {
        AdminRequest::Status(reply) => {
            let _ = reply.send("{}".to_owned());
            AdminRequest::Status(nobody())
        }
        AdminRequest::Metrics(reply) => {
            let _ = reply.send(String::new());
            AdminRequest::Metrics(nobody())
        }
        #[cfg(debug_assertions)]
        AdminRequest::Fault { place, worker, millis, reply } => {
            let _ = reply.send(false);
            AdminRequest::Fault { place, worker, millis, reply: nobody() }
        }
        AdminRequest::Shutdown(reply) => {
            let _ = reply.send(());
            AdminRequest::Shutdown(nobody())
        }
        AdminRequest::Explain { pool, backend, reply } => {
            let _ = reply.send(unknown().map(|()| "{}".to_owned()));
            AdminRequest::Explain { pool, backend, reply: nobody() }
        }
        AdminRequest::SetIntent { pool, backend, intent, reply } => {
            let _ = reply.send(unknown());
            AdminRequest::SetIntent { pool, backend, intent, reply: nobody() }
        }
        AdminRequest::Reload(reply) => {
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
            let _ = reply.send(if refuses { Err(refused) } else { Ok(reloaded) });
            AdminRequest::Reload(nobody())
        }
        AdminRequest::Upgrade { binary, config, asked_over, reply } => {
            let upgraded = UpgradeDoc { pid: 1, version: "1".to_owned(), generation: 2 };
            let refused = UpgradeError::Refused("not now".to_owned());
            let _ = reply.send(if refuses { Err(refused) } else { Ok(upgraded) });
            AdminRequest::Upgrade { binary, config, asked_over, reply: nobody() }
        }
    }
}
