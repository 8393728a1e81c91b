//! A double of the Kubernetes API server: list and watch of EndpointSlices.
//!
//! It refuses what the real server refuses: wrong tokens (401), other namespaces (403),
//! unknown paths (404), wrong parameters (400) and versions before its history (410). It
//! ignores unknown parameters, as the real server does. kubectl and the watcher of kube-rs
//! check that it is faithful. Tests script its faults. It runs on the runtime of the test, or
//! on a thread that a test kills and stops ([`KubernetesThread`]).

mod objects;
mod requests;
mod store;
mod thread;

pub use objects::{EndpointDocument, SliceDocument};
pub use thread::KubernetesThread;

use objects::{EventDocument, SliceListDocument, StatusDocument, discovery_document};
use requests::{ApiRequest, Selection};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use store::SliceStore;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

/// The double. It ends with the runtime.
#[derive(Debug, Clone)]
pub struct KubernetesDouble {
    shared: Arc<ApiShared>,
    address: SocketAddr,
}

/// What tests script.
#[derive(Debug, Clone)]
pub struct ApiFaults {
    /// The only token that is accepted; empty: any request is.
    pub token: String,
    /// A namespace that the token may not read.
    pub forbidden: String,
    /// Codes with which the next requests are refused.
    pub refuse: VecDeque<u16>,
    /// Watches send neither events nor bookmarks.
    pub silent: bool,
    /// So many next events end in the middle, and with each its connection.
    pub half_events: u32,
    /// A watch from before the history is refused by its status, not in its stream.
    pub gone_by_status: bool,
    /// Time between bookmarks; the real server sends one about once per minute.
    pub bookmark: Duration,
}

#[derive(Debug)]
struct ApiShared {
    store: Mutex<SliceStore>,
    faults: Mutex<ApiFaults>,
    /// A write, or the end of all watches.
    changed: Notify,
    /// Number of the last end of all watches.
    closed: Mutex<u64>,
    /// Request lines.
    requests: Mutex<Vec<String>>,
}

trait ApiStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> ApiStream for S {}

// === impl KubernetesDouble ===

impl KubernetesDouble {
    /// Starts a double, with TLS if there is an acceptor.
    ///
    /// # Errors
    /// No port is free.
    pub async fn start(tls: Option<TlsAcceptor>) -> io::Result<KubernetesDouble> {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let shared = Arc::new(ApiShared {
            store: Mutex::new(SliceStore::new()),
            faults: Mutex::default(),
            changed: Notify::new(),
            closed: Mutex::default(),
            requests: Mutex::default(),
        });
        let mut double = KubernetesDouble { shared, address };
        double.listen(tls).await?;
        Ok(double)
    }

    /// Serves at its address from this runtime.
    async fn listen(&mut self, tls: Option<TlsAcceptor>) -> io::Result<()> {
        let listener = TcpListener::bind(self.address).await?;
        self.address = listener.local_addr()?;
        tokio::spawn(accept(listener, Arc::clone(&self.shared), tls));
        Ok(())
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Writes a slice.
    pub fn put(&self, slice: SliceDocument) {
        locked(&self.shared.store).put(slice);
        self.shared.changed.notify_waiters();
    }

    /// Deletes a slice.
    pub fn delete(&self, namespace: &str, name: &str) {
        locked(&self.shared.store).delete(namespace, name);
        self.shared.changed.notify_waiters();
    }

    /// Forgets the history. Older watches can no longer be continued.
    pub fn compact(&self) {
        locked(&self.shared.store).compact();
    }

    /// Restores an empty backup with this version, and closes all watches.
    pub fn restore(&self, version: u64) {
        locked(&self.shared.store).restore(version);
        self.close_watches();
    }

    /// The version of the last write.
    pub fn version(&self) -> u64 {
        locked(&self.shared.store).version()
    }

    /// Ends all watches, as a restart of the server does.
    pub fn close_watches(&self) {
        *locked(&self.shared.closed) += 1;
        self.shared.changed.notify_waiters();
    }

    /// Changes the faults.
    pub fn script(&self, change: impl FnOnce(&mut ApiFaults)) {
        change(&mut locked(&self.shared.faults));
    }

    /// Returns and forgets the request lines.
    pub fn take_requests(&self) -> Vec<String> {
        std::mem::take(&mut *locked(&self.shared.requests))
    }
}

// === impl Default for ApiFaults ===

impl Default for ApiFaults {
    fn default() -> ApiFaults {
        ApiFaults {
            token: String::new(),
            forbidden: String::new(),
            refuse: VecDeque::new(),
            silent: false,
            half_events: 0,
            gone_by_status: false,
            bookmark: Duration::from_secs(60),
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === connections ===

async fn accept(listener: TcpListener, shared: Arc<ApiShared>, tls: Option<TlsAcceptor>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (shared, tls) = (Arc::clone(&shared), tls.clone());
        tokio::spawn(async move {
            let mut stream: Box<dyn ApiStream> = match tls {
                Some(tls) => match tls.accept(stream).await {
                    Ok(stream) => Box::new(stream),
                    Err(_) => return,
                },
                None => Box::new(stream),
            };
            while let Ok(Some(request)) = read_request(&mut stream).await {
                locked(&shared.requests).push(format!("{} {}", request.method, request.target));
                if !matches!(answer(&shared, &request, &mut stream).await, Ok(true)) {
                    return;
                }
            }
        });
    }
}

async fn read_request(stream: &mut Box<dyn ApiStream>) -> io::Result<Option<ApiRequest>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) if head.len() < 64 * 1024 => head.push(byte),
            _ => return Ok(None),
        }
    }
    Ok(ApiRequest::parse(&String::from_utf8_lossy(&head)))
}

/// Answers a request. Returns whether the connection can be used again.
async fn answer(
    shared: &ApiShared,
    request: &ApiRequest,
    stream: &mut Box<dyn ApiStream>,
) -> io::Result<bool> {
    let answer = match selection(shared, request) {
        Err(status) => Err(status),
        Ok(Selection::Document(text)) => Ok(text.to_owned()),
        Ok(Selection::Watch { .. }) => return watch(shared, request, stream).await.map(|()| false),
        Ok(Selection::List { namespace, service, name }) => {
            list(shared, request, &namespace, service.as_deref(), name.as_deref())
        }
    };
    let (code, text) = match answer {
        Ok(text) => (200, text),
        Err(status) => (status.code, json(&status)),
    };
    let head = format!(
        "HTTP/1.1 {code} Status\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        text.len()
    );
    stream.write_all((head + &text).as_bytes()).await?;
    Ok(true)
}

fn selection(shared: &ApiShared, request: &ApiRequest) -> Result<Selection, StatusDocument> {
    let mut faults = locked(&shared.faults);
    if let Some(code) = faults.refuse.pop_front() {
        return Err(StatusDocument::failure(code, "scripted"));
    }
    if !faults.token.is_empty() && request.token.as_deref() != Some(&*faults.token) {
        return Err(StatusDocument::failure(401, "Unauthorized"));
    }
    if request.method != "GET" {
        let text = "the server does not allow this method on the requested resource";
        return Err(StatusDocument::failure(405, text));
    }
    if let Some(text) = discovery_document(&request.path) {
        return Ok(Selection::Document(text));
    }
    let selection = request.selection()?;
    let verb = if matches!(selection, Selection::Watch { .. }) { "watch" } else { "list" };
    let namespace = match &selection {
        Selection::List { namespace, .. } | Selection::Watch { namespace, .. } => namespace,
        Selection::Document(_) => return Ok(selection),
    };
    if !faults.forbidden.is_empty() && *namespace == faults.forbidden {
        let text = format!(
            "endpointslices.discovery.k8s.io is forbidden: User \"tidegate\" cannot {verb} resource \
             \"endpointslices\" in API group \"discovery.k8s.io\" in the namespace \"{namespace}\""
        );
        return Err(StatusDocument::failure(403, text));
    }
    Ok(selection)
}

// === lists ===

/// Returns a page, or one object.
fn list(
    shared: &ApiShared,
    request: &ApiRequest,
    namespace: &str,
    service: Option<&str>,
    name: Option<&str>,
) -> Result<String, StatusDocument> {
    let store = locked(&shared.store);
    let (version, start) = request.continued()?.unwrap_or((store.version(), String::new()));
    if store.is_compacted(version) {
        let text =
            "The provided continue parameter is too old to display a consistent list result.";
        return Err(StatusDocument::failure(410, text));
    }
    if request.version()?.is_some_and(|wanted| wanted > store.version()) {
        return Err(StatusDocument::failure(504, "Too large resource version"));
    }
    let mut items: Vec<SliceDocument> = store.snapshot(version).into_values().collect();
    items.retain(|slice| requests::matches(slice, namespace, service));
    if let Some(name) = name {
        let found = items.iter().find(|slice| slice.metadata.name == name);
        let missing = format!("endpointslices.discovery.k8s.io \"{name}\" not found");
        return found.map(json).ok_or_else(|| StatusDocument::failure(404, missing));
    }
    items.retain(|slice| slice.metadata.name > start);
    let limit = request.limit()?.unwrap_or(usize::MAX);
    let remaining = items.len().saturating_sub(limit);
    items.truncate(limit);
    let next = match items.last() {
        Some(last) if remaining > 0 => requests::continue_token(version, &last.metadata.name),
        _ => String::new(),
    };
    Ok(json(&SliceListDocument::new(version, items, next, remaining)))
}

// === watches ===

async fn watch(
    shared: &ApiShared,
    request: &ApiRequest,
    stream: &mut Box<dyn ApiStream>,
) -> io::Result<()> {
    let closed = *locked(&shared.closed);
    let (lines, mut version) = match first_lines(shared, request) {
        Ok(first) => first,
        Err(status) => {
            let text = json(&status);
            let head = format!(
                "HTTP/1.1 {} Status\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                status.code,
                text.len()
            );
            return stream.write_all((head + &text).as_bytes()).await;
        }
    };
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\
        transfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    let is_refused = lines.len() == 1 && version == 0;
    for line in lines {
        chunk(stream, &line).await?;
    }
    if is_refused {
        return stream.write_all(b"0\r\n\r\n").await;
    }
    let end = sleep(request.watch_timeout());
    tokio::pin!(end);
    loop {
        let notified = shared.changed.notified();
        tokio::pin!(notified);
        notified.as_mut().enable();
        if *locked(&shared.closed) != closed {
            return stream.write_all(b"0\r\n\r\n").await;
        }
        send_events(shared, request, stream, &mut version).await?;
        let faults = locked(&shared.faults).clone();
        let mut byte = [0];
        tokio::select! {
            () = &mut end => return stream.write_all(b"0\r\n\r\n").await,
            read = stream.read(&mut byte) => return read.map(drop),
            waited = timeout(faults.bookmark, notified) => {
                if waited.is_err() && request.wants_bookmarks() && !faults.silent {
                    let object = SliceDocument::bookmark(version);
                    chunk(stream, &json(&EventDocument { kind: "BOOKMARK", object })).await?;
                }
            }
        }
    }
}

/// Returns the first events and the version after them. Version 0: the watch ends.
fn first_lines(
    shared: &ApiShared,
    request: &ApiRequest,
) -> Result<(Vec<String>, u64), StatusDocument> {
    let store = locked(&shared.store);
    let wanted = request.version()?.unwrap_or(0);
    if wanted == 0 {
        // Without a version, a watch begins with all objects.
        let all = store.snapshot(store.version()).into_values();
        let matching = all.filter(|slice| request.matches(slice));
        let added = matching.map(|object| json(&EventDocument { kind: "ADDED", object }));
        return Ok((added.collect(), store.version()));
    }
    if store.is_compacted(wanted) {
        let text = format!("too old resource version: {wanted} ({})", store.oldest());
        let object = StatusDocument::failure(410, text);
        if locked(&shared.faults).gone_by_status {
            return Err(object);
        }
        return Ok((vec![json(&EventDocument { kind: "ERROR", object })], 0));
    }
    Ok((Vec::new(), wanted))
}

async fn send_events(
    shared: &ApiShared,
    request: &ApiRequest,
    stream: &mut Box<dyn ApiStream>,
    version: &mut u64,
) -> io::Result<()> {
    if locked(&shared.faults).silent {
        return Ok(());
    }
    let (writes, now) = {
        let store = locked(&shared.store);
        (store.after(*version), store.version())
    };
    *version = (*version).max(now);
    for write in writes {
        if !request.matches(&write.slice) {
            continue;
        }
        let line = json(&EventDocument { kind: write.kind, object: &write.slice });
        if take_one(&mut locked(&shared.faults).half_events) {
            let half = &line[..line.len() / 2];
            stream.write_all(format!("{:x}\r\n{half}", half.len()).as_bytes()).await?;
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        chunk(stream, &line).await?;
    }
    Ok(())
}

/// Counts down, and returns false at 0.
fn take_one(count: &mut u32) -> bool {
    let is_left = *count > 0;
    *count = count.saturating_sub(1);
    is_left
}

async fn chunk(stream: &mut Box<dyn ApiStream>, line: &str) -> io::Result<()> {
    let chunk = format!("{:x}\r\n{line}\n\r\n", line.len() + 1);
    stream.write_all(chunk.as_bytes()).await?;
    stream.flush().await
}

fn json(document: &impl serde::Serialize) -> String {
    serde_json::to_string(document).unwrap_or_else(|error| panic!("a document: {error}"))
}
