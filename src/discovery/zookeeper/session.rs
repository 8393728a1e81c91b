//! One session with the servers of a ZooKeeper registry, shared by all its questions.
//!
//! [`ZkSession::open`] starts a task that owns the connection. The task connects when a
//! call waits, and only then, so the callers' back-off is the only back-off. It sends pings,
//! fails over to the next server, and continues the session on the next connection if the
//! server still knows it. It never repeats a call: after a lost connection each caller
//! reads everything again, because the watches are lost too.

use super::link::ZkLink;
use super::watches::{ZkWatch, ZkWatches};
use super::wire::{self, ZkHeader, ZkIdentity, ZkReply, ZkRequest};
use crate::backoff::Pause;
use crate::client::{HttpEndpoint, HttpFailure};
use crate::resolver::Resolver;
use crate::tasks::{self, TaskKind, panic_point};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::RegistryConfig;
use tidegate_net::clock;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep_until;

/// Session timeout that sources request. ZooKeeper bounds it to 2..20 ticks of the server.
pub(crate) const SESSION_TIMEOUT: Duration = Duration::from_secs(15);

/// Calls that wait for their answers at one time. A server reads at most 1,000
/// unanswered requests (globalOutstandingLimit).
pub(crate) const CALLS_AT_ONCE: usize = 500;

/// A handle; the session ends with the last one.
#[derive(Debug, Clone)]
pub struct ZkSession {
    calls: mpsc::UnboundedSender<ZkCall>,
    watches: Arc<ZkWatches>,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct ZkAnswer {
    /// The last transaction that the server had applied.
    pub(crate) zxid: i64,
    /// Number of the session.
    pub(crate) session: i64,
    pub(crate) reply: ZkReply,
}

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ZkProblem {
    /// The node does not exist.
    NoNode,
    /// The node exists.
    NodeExists,
    /// No connection, or an error that says nothing about the node.
    Failed(HttpFailure),
}

#[derive(Debug)]
struct ZkCall {
    request: ZkRequest,
    answer: oneshot::Sender<Result<ZkAnswer, ZkProblem>>,
}

/// A sent call.
struct WaitingCall {
    xid: i32,
    sent: Instant,
    call: ZkCall,
}

/// The task.
struct SessionTask {
    registry: Arc<RegistryConfig>,
    endpoint: HttpEndpoint,
    timeout: Duration,
    identity: ZkIdentity,
    /// The server to try first.
    server: usize,
    calls: mpsc::UnboundedReceiver<ZkCall>,
    waiting: VecDeque<WaitingCall>,
    watches: Arc<ZkWatches>,
    xid: i32,
}

// === impl ZkSession ===

impl ZkSession {
    /// Starts the task of a session. It connects at the first call.
    pub fn open(registry: Arc<RegistryConfig>, resolver: Resolver) -> ZkSession {
        ZkSession::with_timeout(registry, resolver, SESSION_TIMEOUT)
    }

    /// As [`open`](ZkSession::open), with another session timeout: the time after which a
    /// server deletes the ephemeral nodes of a client that it no longer hears.
    pub fn with_timeout(
        registry: Arc<RegistryConfig>,
        resolver: Resolver,
        timeout: Duration,
    ) -> ZkSession {
        let (sender, calls) = mpsc::unbounded_channel();
        let watches = Arc::<ZkWatches>::default();
        let task = SessionTask {
            endpoint: HttpEndpoint::of(&registry, resolver),
            server: fastrand::usize(..registry.servers.len().max(1)),
            registry,
            timeout,
            identity: ZkIdentity::default(),
            calls,
            waiting: VecDeque::new(),
            watches: Arc::clone(&watches),
            xid: 0,
        };
        tokio::spawn(task.run());
        ZkSession { calls: sender, watches }
    }

    /// Sends a request and waits for its answer.
    pub(crate) async fn call(&self, request: ZkRequest) -> Result<ZkAnswer, ZkProblem> {
        let (answer, answered) = oneshot::channel();
        let ended = || ZkProblem::Failed(HttpFailure::local("the session's task has ended"));
        self.calls.send(ZkCall { request, answer }).map_err(|_| ended())?;
        answered.await.unwrap_or_else(|_| Err(ended()))
    }

    /// Sends up to [`CALLS_AT_ONCE`] requests at once; the answers have their order.
    pub(crate) async fn call_all(
        &self,
        requests: impl IntoIterator<Item = ZkRequest>,
    ) -> Vec<Result<ZkAnswer, ZkProblem>> {
        let send = |request| {
            let (answer, answered) = oneshot::channel();
            let _ = self.calls.send(ZkCall { request, answer });
            answered
        };
        let sent: Vec<_> = requests.into_iter().map(send).collect();
        let mut answers = Vec::with_capacity(sent.len());
        for answered in sent {
            let ended = HttpFailure::local("the session's task has ended");
            answers.push(answered.await.unwrap_or(Err(ZkProblem::Failed(ended))));
        }
        answers
    }

    /// Collects the events of a node and of its children.
    pub(crate) fn watch(&self, path: &str) -> Arc<ZkWatch> {
        self.watches.watch(path)
    }
}

// === impl SessionTask ===

impl SessionTask {
    /// Runs until no handle is left. A panic fails all calls.
    async fn run(mut self) {
        let mut pause = Pause::new();
        loop {
            pause.begin();
            if tasks::caught(TaskKind::Session, self.serve_calls()).await.is_ok() {
                return;
            }
            let registry = &self.registry.name;
            tracing::error!(%registry, "session of a ZooKeeper registry panicked; restarting it");
            self.fail_all(&HttpFailure::local(tasks::PANICKED));
            pause.failed().await;
        }
    }

    async fn serve_calls(&mut self) {
        while let Some(call) = self.calls.recv().await {
            panic_point(TaskKind::Session);
            let failure = match self.connect().await {
                Ok(mut link) => match self.serve(&mut link, call).await {
                    Ok(()) => return link.close(self.xid).await,
                    Err(failure) => failure.at(link.server()),
                },
                Err(failure) => {
                    let _ = call.answer.send(Err(ZkProblem::Failed(failure.clone())));
                    failure
                }
            };
            self.fail_all(&failure);
        }
    }

    /// Tries each server once.
    async fn connect(&mut self) -> Result<ZkLink, HttpFailure> {
        let servers = self.registry.servers.len();
        let mut failure = HttpFailure::local("the registry has no servers");
        for _ in 0..servers {
            let server = &self.registry.servers[self.server % servers];
            let (registry, identity) = (&self.registry, &mut self.identity);
            let link = ZkLink::connect(registry, &self.endpoint, server, self.timeout, identity);
            match Box::pin(link).await {
                Ok(link) => return Ok(link),
                Err(problem) => failure = problem.at(server),
            }
            self.server = (self.server + 1) % servers;
        }
        Err(failure)
    }

    /// Returns when no handle is left.
    async fn serve(&mut self, link: &mut ZkLink, first: ZkCall) -> Result<(), HttpFailure> {
        self.send(link, first).await?;
        loop {
            let due = self.waiting.front().map(|call| call.sent + self.registry.timeout);
            let due = due.map_or(link.due(), |due| due.min(link.due()));
            tokio::select! {
                call = self.calls.recv(), if self.waiting.len() < 2 * CALLS_AT_ONCE => match call {
                    Some(call) => self.send(link, call).await?,
                    None => return Ok(()),
                },
                received = link.receive() => {
                    received?;
                    self.take_frames(link)?;
                }
                () = sleep_until(due.into()) => self.check_times(link).await?,
            }
        }
    }

    /// Sends this call and those behind it.
    async fn send(&mut self, link: &mut ZkLink, first: ZkCall) -> Result<(), HttpFailure> {
        let mut out = Vec::new();
        let mut next = Some(first);
        while let Some(call) = next {
            // Positive and never 0 again: a session of years must not reach reserved numbers.
            self.xid = self.xid.checked_add(1).unwrap_or(1);
            wire::put_request(&mut out, self.xid, &call.request);
            self.waiting.push_back(WaitingCall { xid: self.xid, sent: clock::now(), call });
            let full = self.waiting.len() >= 2 * CALLS_AT_ONCE;
            next = if full { None } else { self.calls.try_recv().ok() };
        }
        link.send(&out).await
    }

    fn take_frames(&mut self, link: &mut ZkLink) -> Result<(), HttpFailure> {
        while let Some(frame) = link.next_frame()? {
            let (header, rest) = wire::read_header(&frame).map_err(HttpFailure::protocol)?;
            match header.xid {
                wire::XID_PING => {}
                wire::XID_AUTH if header.error == 0 => {}
                wire::XID_AUTH => return Err(failure_of_code(header.error)),
                wire::XID_EVENT => {
                    let event = wire::read_event(rest).map_err(HttpFailure::protocol)?;
                    self.watches.event(&event);
                }
                _ => self.answer(link, header, rest)?,
            }
        }
        Ok(())
    }

    /// Hands an answer to the oldest call: the server answers in order.
    fn answer(
        &mut self,
        link: &mut ZkLink,
        header: ZkHeader,
        rest: &[u8],
    ) -> Result<(), HttpFailure> {
        if self.waiting.front().is_none_or(|oldest| oldest.xid != header.xid) {
            return Err(HttpFailure::protocol("an answer to another request than the oldest"));
        }
        let Some(WaitingCall { call, .. }) = self.waiting.pop_front() else { return Ok(()) };
        let mut broken = Ok(());
        let outcome = match header.error {
            0 => match wire::read_reply(&call.request, rest) {
                Ok(reply) => {
                    let (zxid, session) = (header.zxid, self.identity.session);
                    Ok(ZkAnswer { zxid, session, reply })
                }
                Err(bad) => {
                    let failure = HttpFailure::protocol(bad).at(link.server());
                    broken = Err(failure.clone());
                    Err(ZkProblem::Failed(failure))
                }
            },
            NO_NODE => Err(ZkProblem::NoNode),
            NODE_EXISTS => Err(ZkProblem::NodeExists),
            code => Err(ZkProblem::Failed(failure_of_code(code).at(call.request.path()))),
        };
        if header.error == NO_AUTH {
            link.password_rejected();
        }
        // The caller may no longer wait.
        let _ = call.answer.send(outcome);
        broken
    }

    async fn check_times(&mut self, link: &mut ZkLink) -> Result<(), HttpFailure> {
        let now = clock::now();
        if self.waiting.front().is_some_and(|call| call.sent + self.registry.timeout <= now) {
            let detail = format!("no answer for {:?}", self.registry.timeout);
            return Err(HttpFailure::new(SourceFailure::Timeout, detail));
        }
        link.keep_alive(now).await
    }

    fn fail_all(&mut self, failure: &HttpFailure) {
        let sent = self.waiting.drain(..).map(|waiting| waiting.call);
        let queued = std::iter::from_fn(|| self.calls.try_recv().ok());
        for call in sent.chain(queued) {
            let _ = call.answer.send(Err(ZkProblem::Failed(failure.clone())));
        }
        self.watches.lost();
    }
}

/// Error codes of answers (KeeperException.java).
const NO_NODE: i32 = -101;
const NO_AUTH: i32 = -102;
const NODE_EXISTS: i32 = -110;

fn failure_of_code(code: i32) -> HttpFailure {
    let (why, text) = match code {
        NO_AUTH => (SourceFailure::Auth, "the server denies access"),
        -115 => (SourceFailure::Auth, "the server rejects user and password"),
        -124 => (SourceFailure::Auth, "the server requires SASL"),
        -112 | -118 => (SourceFailure::Connect, "the session has expired"),
        -4 => (SourceFailure::Connect, "the server lost its leader"),
        -7 => (SourceFailure::Timeout, "the server's quorum gave no answer"),
        _ => (SourceFailure::Protocol, "the server reports an error"),
    };
    HttpFailure::new(why, format_args!("{text} (code {code})"))
}
