//! The admin API beside the control loop: serving it, ending it, and handing its
//! socket to the next process.
//!
//! Owned by the control loop, which answers the requests. It answers nothing itself.

use super::upgrade::OfferedAdmin;
use crate::admin::{
    self, AdminListener, AdminRequest, DroppedConnections, ReadyState, SocketFileLock, Token,
    TokenStore,
};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::Admin;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// How long answers under way may take to go out at the end: a little longer than
/// the API gives them.
const END_MAX: Duration = Duration::from_millis(1500);

/// The API while it is served.
#[derive(Debug)]
pub(super) struct AdminApi {
    /// `None` once the next process has it.
    socket: Option<OwnedFd>,
    listen: String,
    file: SocketFileLock,
    dropped: DroppedConnections,
    requests: mpsc::Sender<AdminRequest>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

/// The API, whether it is served or not, and the requests that have come over it.
#[derive(Debug)]
pub(super) struct AdminEndpoint {
    api: Option<AdminApi>,
    tokens: Arc<TokenStore>,
    requests: mpsc::Receiver<AdminRequest>,
}

// === impl AdminApi ===

impl AdminApi {
    /// Serves on the current runtime.
    pub(super) fn serve(
        listener: AdminListener,
        listen: String,
        tokens: Arc<TokenStore>,
        requests: mpsc::Sender<AdminRequest>,
        readiness: ReadyState,
        counters: Arc<WorkerCounters>,
    ) -> io::Result<AdminApi> {
        let (socket, file) = (Some(listener.share()?), listener.file());
        let dropped = listener.dropped();
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async {
            // Without anybody to stop it, it goes on to the end of the runtime.
            if stopped.await.is_err() {
                std::future::pending().await
            }
        };
        let own = requests.clone();
        let serving = admin::serve(listener, tokens, requests, readiness, counters, stopped);
        let task = tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, "admin API stopped; restart or upgrade the process to get it back");
            }
        });
        Ok(AdminApi { socket, listen, file, dropped, requests: own, stop: Some(stop), task })
    }

    /// What another process needs to go on with it.
    fn offer(&self) -> io::Result<(OfferedAdmin, OwnedFd)> {
        let gone = || io::Error::other("the admin socket is in use by another process");
        let socket = self.socket.as_ref().ok_or_else(gone)?.try_clone()?;
        let offered = OfferedAdmin { listen: self.listen.clone(), file: self.file.identity() };
        Ok((offered, socket))
    }

    /// The file is this process's to remove at the end.
    fn own_file(&self) {
        self.file.own();
    }

    /// Another process answers from now on: takes no more connections, and leaves
    /// the file alone.
    fn step_down(&mut self) {
        self.file.hold_lock();
        if let Some(stop) = self.stop.take() {
            // It has ended by itself then.
            let _ = stop.send(());
        }
    }
}

// === impl AdminEndpoint ===

impl AdminEndpoint {
    /// Not served yet: requests that come over `requests` are answered all the same.
    pub(super) fn new(token: Option<Token>, requests: mpsc::Receiver<AdminRequest>) -> Self {
        AdminEndpoint { api: None, tokens: Arc::new(TokenStore::new(token)), requests }
    }

    /// The next request.
    pub(super) async fn wake(&mut self) -> AdminRequest {
        match self.requests.recv().await {
            Some(request) => request,
            None => std::future::pending().await,
        }
    }

    /// What requests are admitted by.
    pub(super) fn tokens(&self) -> &Arc<TokenStore> {
        &self.tokens
    }

    /// Answers from now on.
    pub(super) fn serve(&mut self, api: AdminApi) {
        api.own_file();
        self.api = Some(api);
    }

    /// The socket and what another process needs to go on with it; nothing before it is
    /// served.
    ///
    /// # Errors
    /// Another process has the socket.
    pub(super) fn offer(&self) -> io::Result<Option<(OfferedAdmin, OwnedFd)>> {
        self.api.as_ref().map(AdminApi::offer).transpose()
    }

    /// Connections closed to make room for newer ones.
    pub(super) fn crowded(&self) -> u64 {
        self.api.as_ref().map_or(0, |api| api.dropped.count())
    }

    /// Another process answers from now on.
    pub(super) fn step_down(&mut self) {
        if let Some(api) = &mut self.api {
            api.step_down();
        }
    }

    /// The next process has lived long enough to keep the socket.
    pub(super) fn hand_over(&mut self) {
        if let Some(api) = &mut self.api {
            api.step_down();
            api.socket = None;
        }
    }

    /// Answers again after [`AdminEndpoint::step_down`]: the process that was to has
    /// ended. `admin` is where.
    pub(super) fn serve_again(
        &mut self,
        admin: &Admin,
        readiness: ReadyState,
        counters: Arc<WorkerCounters>,
    ) {
        let Some(before) = self.api.take() else { return };
        let listener = match before.offer() {
            Ok((offered, socket)) => admin::take_over(admin, socket, offered.file),
            Err(_) => None,
        };
        // It may have removed the socket's file as it ended.
        let listener = listener.map_or_else(|| admin::bind(admin), Ok);
        let (listen, requests) = (before.listen.clone(), before.requests.clone());
        let tokens = Arc::clone(&self.tokens);
        let served = listener.map_err(io::Error::other).and_then(|listener| {
            AdminApi::serve(listener, listen, tokens, requests, readiness, counters)
        });
        match served {
            Ok(api) => self.serve(api),
            Err(error) => {
                tracing::error!(%error, "cannot serve the admin API again; restart or upgrade the process to get it back")
            }
        }
    }

    /// Waits for answers under way, where the API was told to stop.
    pub(super) async fn finish(&mut self) {
        if let Some(api) = self.api.take()
            && api.stop.is_none()
        {
            let _ = tokio::time::timeout(END_MAX, api.task).await;
        }
    }
}
