//! Any bytes as what a client of the admin API says.
//!
//! Called through `crate::fuzz`. The bytes go through the very connection,
//! guard and router that serve clients; only the socket and the control loop are
//! played. Nothing may panic, whatever is answered is HTTP, and what a client
//! may not ask for never reaches the control loop.

use super::guard::Entrance;
use super::routes::{Api, router};
use super::serve::only_connection;
use super::{
    OperatorError, Problem, Readiness, ReloadError, Reloaded, Request, Token, TokenStore,
    UpgradeError, Upgraded,
};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

/// Known to a client exactly where it is in what the client says.
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
        0 => Entrance::Unix,
        1 | 2 => Entrance::Tcp(([127, 0, 0, 1], 9900).into()),
        _ => Entrance::Tcp(([192, 0, 2, 1], 9900).into()),
    };
    let token = (mode & 3 != 1).then(|| Token::new(TOKEN)).flatten();
    let token_known = token.is_some() && said.windows(TOKEN.len()).any(|part| part == TOKEN);
    let (answers, asked) =
        RUNTIME.with(|runtime| runtime.block_on(talk(entrance, token, said, mode)));
    assert!(answers.is_empty() || answers.starts_with(b"HTTP/1."), "{}", answers.escape_ascii());
    for request in asked {
        let Entrance::Tcp(listen) = entrance else { continue };
        let harmless =
            matches!(request, Request::Status(_) | Request::Metrics(_) | Request::Explain { .. });
        assert!(token_known || harmless && listen.ip().is_loopback(), "{request:?}");
        let foreign = matches!(
            &request,
            Request::Upgrade { binary, config, .. } if binary.is_some() || config.is_some()
        );
        assert!(!foreign, "a program named over TCP: {request:?}");
    }
}

/// What was answered, and what the control loop was asked.
async fn talk(
    entrance: Entrance,
    token: Option<Token>,
    said: &[u8],
    mode: u8,
) -> (Vec<u8>, Vec<Request>) {
    let (requests, control) = mpsc::channel(super::REQUESTS_MAX);
    let readiness = Readiness::new();
    if mode & 4 != 0 {
        readiness.set_ready();
    }
    let tokens = Arc::new(TokenStore::new(token));
    let routes = router(Arc::new(Api { entrance, tokens, requests, readiness }));
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
async fn control_loop(mut requests: mpsc::Receiver<Request>, refuses: bool) -> Vec<Request> {
    let mut asked = Vec::new();
    while let Some(request) = requests.recv().await {
        asked.push(answer(request, refuses));
    }
    asked
}

/// A reply that nobody waits for any more.
fn nobody<T>() -> tokio::sync::oneshot::Sender<T> {
    tokio::sync::oneshot::channel().0
}

fn answer(request: Request, refuses: bool) -> Request {
    let unknown = || if refuses { Err(OperatorError::UnknownBackend) } else { Ok(()) };
    match request {
        Request::Status(reply) => {
            let _ = reply.send("{}".to_owned());
            Request::Status(nobody())
        }
        Request::Metrics(reply) => {
            let _ = reply.send(String::new());
            Request::Metrics(nobody())
        }
        #[cfg(debug_assertions)]
        Request::Fault { place, worker, millis, reply } => {
            let _ = reply.send(false);
            Request::Fault { place, worker, millis, reply: nobody() }
        }
        Request::Shutdown(reply) => {
            let _ = reply.send(());
            Request::Shutdown(nobody())
        }
        Request::Explain { pool, backend, reply } => {
            let _ = reply.send(unknown().map(|()| "{}".to_owned()));
            Request::Explain { pool, backend, reply: nobody() }
        }
        Request::SetIntent { pool, backend, intent, reply } => {
            let _ = reply.send(unknown());
            Request::SetIntent { pool, backend, intent, reply: nobody() }
        }
        Request::Reload(reply) => {
            let problem = Problem {
                file: "f".into(),
                line: 1,
                column: 1,
                message: "wrong".to_owned(),
                help: None,
                rendered: "f:1:1: error: wrong".to_owned(),
            };
            let reloaded = Reloaded { generation: 2, changed: true, warnings: Vec::new() };
            let refused = ReloadError::Problems(vec![problem]);
            let _ = reply.send(if refuses { Err(refused) } else { Ok(reloaded) });
            Request::Reload(nobody())
        }
        Request::Upgrade { binary, config, asked_over, reply } => {
            let upgraded = Upgraded { pid: 1, version: "1".to_owned(), generation: 2 };
            let refused = UpgradeError::Refused("not now".to_owned());
            let _ = reply.send(if refuses { Err(refused) } else { Ok(upgraded) });
            Request::Upgrade { binary, config, asked_over, reply: nobody() }
        }
    }
}
