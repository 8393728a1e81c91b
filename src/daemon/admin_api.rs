//! The admin API beside the control loop: serving it, ending it, and handing its
//! socket to the next process.
//!
//! Owned by the control loop. It answers nothing itself.

use super::control_loop::Control;
use super::upgrade::OfferedAdmin;
use crate::admin::{
    self, AdminListener, AdminRequest, DroppedConnections, ReadyState, SocketFileLock, TokenStore,
};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::metrics::counters::WorkerCounters;
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
    crowding: DroppedConnections,
    requests: mpsc::Sender<AdminRequest>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
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
        let crowding = listener.crowding();
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
                tracing::error!(%error, "the admin API has ended");
            }
        });
        Ok(AdminApi { socket, listen, file, crowding, requests: own, stop: Some(stop), task })
    }

    /// Connections closed to make room for newer ones.
    pub(super) fn crowded(&self) -> u64 {
        self.crowding.count()
    }

    /// What another process needs to go on with it.
    pub(super) fn offer(&self) -> io::Result<(OfferedAdmin, OwnedFd)> {
        let gone = || io::Error::other("the admin socket is another process's already");
        let socket = self.socket.as_ref().ok_or_else(gone)?.try_clone()?;
        let offered = OfferedAdmin { listen: self.listen.clone(), file: self.file.identity() };
        Ok((offered, socket))
    }

    /// The file is this process's to remove at the end.
    pub(super) fn own_file(&self) {
        self.file.own();
    }

    /// The next process has lived long enough to keep the socket.
    pub(super) fn hand_over(&mut self) {
        self.step_down();
        self.socket = None;
    }

    /// Another process answers from now on: takes no more connections, and leaves
    /// the file alone.
    pub(super) fn step_down(&mut self) {
        self.file.hold_lock();
        if let Some(stop) = self.stop.take() {
            // It has ended by itself then.
            let _ = stop.send(());
        }
    }

    /// Waits for answers under way, where the API was told to stop.
    pub(super) async fn ended(self) {
        if self.stop.is_none() {
            let _ = tokio::time::timeout(END_MAX, self.task).await;
        }
    }
}

impl Control {
    /// Answers again after [`AdminApi::step_down`]: the process that was to has ended.
    pub(super) fn serve_admin_again(&mut self) {
        let Some(before) = self.admin.take() else { return };
        let admin = &self.started_with.admin;
        let listener = match before.offer() {
            Ok((offered, socket)) => admin::take_over(admin, socket, offered.file),
            Err(_) => None,
        };
        // It may have removed the socket's file as it ended.
        let listener = listener.map_or_else(|| admin::bind(admin), Ok);
        let (tokens, readiness) = (Arc::clone(&self.tokens), self.readiness.clone());
        let (listen, local) = (before.listen.clone(), Arc::clone(&self.local));
        let served = listener.map_err(io::Error::other).and_then(|listener| {
            AdminApi::serve(listener, listen, tokens, before.requests.clone(), readiness, local)
        });
        match served {
            Ok(api) => {
                api.own_file();
                self.admin = Some(api);
            }
            Err(error) => tracing::error!(%error, "the admin API cannot be served again"),
        }
    }
}
