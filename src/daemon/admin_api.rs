//! Starts and stops the server of the admin API, and hands over its socket.
//!
//! Owned by the control loop, which answers the requests (see `requests`). This module
//! answers no request.

use super::upgrade::OfferedAdmin;
use crate::admin::{
    self, AdminListener, AdminRequest, DroppedConnections, Observables, ReadyState, SocketFileLock,
    TokenStore, Tokens,
};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::Admin;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// How long the process waits at its end until pending answers are sent. Slightly longer
/// than the timeout of the server itself.
const END_MAX: Duration = Duration::from_millis(1500);

/// A running server of the admin API.
#[derive(Debug)]
pub(super) struct AdminApi {
    /// `None` after the handover.
    socket: Option<OwnedFd>,
    listen: String,
    file: SocketFileLock,
    dropped: DroppedConnections,
    requests: mpsc::Sender<AdminRequest>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

/// The admin API, with or without a running server, and its received requests.
#[derive(Debug)]
pub(super) struct AdminEndpoint {
    api: Option<AdminApi>,
    tokens: Arc<TokenStore>,
    observables: Observables,
    requests: mpsc::Receiver<AdminRequest>,
}

// === impl AdminApi ===

impl AdminApi {
    /// Starts the server on the current runtime.
    pub(super) fn serve(
        listener: AdminListener,
        listen: String,
        tokens: Arc<TokenStore>,
        requests: mpsc::Sender<AdminRequest>,
        readiness: ReadyState,
        counters: Arc<WorkerCounters>,
        observables: Observables,
    ) -> io::Result<AdminApi> {
        let (socket, file) = (Some(listener.share()?), listener.file());
        let dropped = listener.dropped();
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async {
            // If the sender is dropped, the server runs until the runtime ends.
            if stopped.await.is_err() {
                std::future::pending().await
            }
        };
        let own = requests.clone();
        let serving =
            admin::serve(listener, tokens, requests, readiness, counters, observables, stopped);
        let task = tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(%error, "admin API stopped; restart or upgrade the process to get it back");
            }
        });
        Ok(AdminApi { socket, listen, file, dropped, requests: own, stop: Some(stop), task })
    }

    /// Returns the socket and what a new process needs to use it.
    fn offer(&self) -> io::Result<(OfferedAdmin, OwnedFd)> {
        let in_use = || io::Error::other("the admin socket is in use by another process");
        let socket = self.socket.as_ref().ok_or_else(in_use)?.try_clone()?;
        let offered = OfferedAdmin { listen: self.listen.clone(), file: self.file.identity() };
        Ok((offered, socket))
    }

    /// Makes this process the owner of the socket file. The owner removes the file at its
    /// end.
    fn own_file(&self) {
        self.file.own();
    }

    /// Stops the server, because the new process serves. Keeps the socket file.
    fn step_down(&mut self) {
        self.file.hold_lock();
        if let Some(stop) = self.stop.take() {
            // Fails if the server has already ended.
            let _ = stop.send(());
        }
    }
}

// === impl AdminEndpoint ===

impl AdminEndpoint {
    /// Creates an API without a server. Requests from `requests` are answered.
    pub(super) fn new(
        tokens: Tokens,
        observables: Observables,
        requests: mpsc::Receiver<AdminRequest>,
    ) -> Self {
        let tokens = Arc::new(TokenStore::new(tokens));
        AdminEndpoint { api: None, tokens, observables, requests }
    }

    /// Waits for the next request.
    pub(super) async fn wake(&mut self) -> AdminRequest {
        match self.requests.recv().await {
            Some(request) => request,
            None => std::future::pending().await,
        }
    }

    /// Returns the tokens that authorize requests.
    pub(super) fn tokens(&self) -> &Arc<TokenStore> {
        &self.tokens
    }

    /// Sets the running server.
    pub(super) fn serve(&mut self, api: AdminApi) {
        api.own_file();
        self.api = Some(api);
    }

    /// Returns the socket and what a new process needs to use it; `None` without a
    /// running server.
    ///
    /// # Errors
    /// Another process already has the socket.
    pub(super) fn offer(&self) -> io::Result<Option<(OfferedAdmin, OwnedFd)>> {
        self.api.as_ref().map(AdminApi::offer).transpose()
    }

    /// Returns the number of connections closed in favour of newer connections.
    pub(super) fn dropped(&self) -> u64 {
        self.api.as_ref().map_or(0, |api| api.dropped.count())
    }

    /// Stops the server, because the new process serves.
    pub(super) fn step_down(&mut self) {
        if let Some(api) = &mut self.api {
            api.step_down();
        }
    }

    /// Completes the handover: closes the socket.
    pub(super) fn hand_over(&mut self) {
        if let Some(api) = &mut self.api {
            api.step_down();
            api.socket = None;
        }
    }

    /// Serves again after [`AdminEndpoint::step_down`], because the new process has
    /// exited. `admin`: the address.
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
        // The new process may have removed the socket file.
        let listener = listener.map_or_else(|| admin::bind(admin), Ok);
        let (listen, requests) = (before.listen.clone(), before.requests.clone());
        let (tokens, observables) = (Arc::clone(&self.tokens), self.observables.clone());
        let served = listener.map_err(io::Error::other).and_then(|listener| {
            AdminApi::serve(listener, listen, tokens, requests, readiness, counters, observables)
        });
        match served {
            Ok(api) => self.serve(api),
            Err(error) => {
                tracing::error!(%error, "cannot serve the admin API again; restart or upgrade the process to get it back")
            }
        }
    }

    /// Waits for pending answers if the server was stopped.
    pub(super) async fn finish(&mut self) {
        if let Some(api) = self.api.take()
            && api.stop.is_none()
        {
            let _ = tokio::time::timeout(END_MAX, api.task).await;
        }
    }
}
