//! A connection to one ZooKeeper server: connect, log in, frames, pings.
//!
//! `session` owns it. Every wait has a deadline. The password file is read for each
//! connection, and again after the server denied access. Nothing here knows what a request
//! means.

use super::frames::FrameBuffer;
use super::wire::{self, ZkIdentity};
use crate::client::{ByteStream, HttpEndpoint, HttpFailure, failure_of_io, open_stream};
use crate::secret::SecretFile;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::{RegistryConfig, ServerAddr};
use tidegate_net::clock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use zeroize::Zeroizing;

/// A connection with a session.
pub(super) struct ZkLink {
    registry: Arc<RegistryConfig>,
    server: ServerAddr,
    stream: Box<dyn ByteStream>,
    frames: FrameBuffer,
    /// The session timeout that the server grants.
    session_timeout: Duration,
    /// When the last bytes were sent.
    sent: Instant,
    /// When the last frame arrived.
    heard: Instant,
    /// Whether the password must be read and sent again.
    log_in: bool,
}

// === impl ZkLink ===

impl ZkLink {
    /// Connects to a server and continues the session of `identity`, or opens another one.
    pub(super) async fn connect(
        registry: &Arc<RegistryConfig>,
        endpoint: &HttpEndpoint,
        server: &ServerAddr,
        session_timeout: Duration,
        identity: &mut ZkIdentity,
    ) -> Result<ZkLink, HttpFailure> {
        let late = |_| HttpFailure::new(SourceFailure::Timeout, "no connection in time");
        // The server closes the connection after it refused an old session.
        for _ in 0..2 {
            let attempt = ZkLink::attempt(registry, endpoint, server, session_timeout, identity);
            if let Some(mut link) = timeout(registry.timeout, attempt).await.map_err(late)?? {
                link.log_in().await?;
                return Ok(link);
            }
        }
        Err(HttpFailure::protocol("the server refuses a new session"))
    }

    /// Returns `None` if the server no longer knows the session.
    async fn attempt(
        registry: &Arc<RegistryConfig>,
        endpoint: &HttpEndpoint,
        server: &ServerAddr,
        session_timeout: Duration,
        identity: &mut ZkIdentity,
    ) -> Result<Option<ZkLink>, HttpFailure> {
        let stream = open_stream(endpoint, server).await?;
        let now = clock::now();
        let mut link = ZkLink {
            registry: Arc::clone(registry),
            server: server.clone(),
            stream,
            frames: FrameBuffer::default(),
            session_timeout,
            sent: now,
            heard: now,
            log_in: false,
        };
        let mut out = Vec::new();
        let millis = i32::try_from(session_timeout.as_millis()).unwrap_or(i32::MAX);
        wire::put_connect(&mut out, millis, *identity);
        link.send(&out).await?;
        let frame = loop {
            if let Some(frame) = link.next_frame()? {
                break frame;
            }
            link.receive().await?;
        };
        let welcome = wire::read_welcome(&frame).map_err(HttpFailure::protocol)?;
        let Some(granted) = u64::try_from(welcome.timeout_millis).ok().filter(|time| *time > 0)
        else {
            *identity = ZkIdentity::default();
            return Ok(None);
        };
        *identity = welcome.identity;
        link.session_timeout = Duration::from_millis(granted);
        Ok(Some(link))
    }

    pub(super) fn server(&self) -> &ServerAddr {
        &self.server
    }

    /// Sends user and password, if the registry has them.
    async fn log_in(&mut self) -> Result<(), HttpFailure> {
        self.log_in = false;
        let (Some(user), Some(file)) = (&self.registry.user, &self.registry.password_file) else {
            return Ok(());
        };
        let password = SecretFile::new(file).line().map_err(HttpFailure::local)?;
        let both = Zeroizing::new(format!("{user}:{}", *password));
        let mut out = Zeroizing::new(Vec::with_capacity(both.len() + 64));
        wire::put_auth(&mut out, both.as_bytes());
        self.send(&out).await
    }

    /// The server denied access: the password file can have other content.
    pub(super) fn password_rejected(&mut self) {
        self.log_in = self.registry.user.is_some();
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), HttpFailure> {
        self.sent = clock::now();
        let sent = timeout(self.registry.timeout, self.stream.write_all(bytes)).await;
        let sent = sent.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        sent.map_err(|error| lost(&error))
    }

    /// Waits for bytes. Dropping the future loses none.
    pub(super) async fn receive(&mut self) -> Result<(), HttpFailure> {
        match self.stream.read_buf(self.frames.space()).await {
            Ok(0) => {
                Err(HttpFailure::new(SourceFailure::Connect, "the server closed the connection"))
            }
            Ok(_) => Ok(()),
            Err(error) => Err(lost(&error)),
        }
    }

    /// Returns the next complete frame.
    pub(super) fn next_frame(&mut self) -> Result<Option<Vec<u8>>, HttpFailure> {
        let frame = self.frames.next().map_err(HttpFailure::protocol)?;
        if frame.is_some() {
            self.heard = clock::now();
        }
        Ok(frame)
    }

    /// When [`keep_alive`](ZkLink::keep_alive) must be called: a ping after a third of the
    /// session timeout, the end after two thirds of silence.
    pub(super) fn due(&self) -> Instant {
        if self.log_in {
            return self.sent;
        }
        let third = self.session_timeout / 3;
        (self.sent + third).min(self.heard + 2 * third)
    }

    pub(super) async fn keep_alive(&mut self, now: Instant) -> Result<(), HttpFailure> {
        if self.log_in {
            return self.log_in().await;
        }
        let third = self.session_timeout / 3;
        if self.heard + 2 * third <= now {
            let detail = format!("the server was silent for {:?}", 2 * third);
            return Err(HttpFailure::new(SourceFailure::Timeout, detail));
        }
        if self.sent + third > now {
            return Ok(());
        }
        let mut out = Vec::new();
        wire::put_ping(&mut out);
        self.send(&out).await
    }

    /// Ends the session.
    pub(super) async fn close(&mut self, last_xid: i32) {
        let mut out = Vec::new();
        wire::put_close(&mut out, last_xid.checked_add(1).unwrap_or(1));
        let _ = self.send(&out).await;
        let _ = self.stream.shutdown().await;
    }
}

fn lost(error: &io::Error) -> HttpFailure {
    HttpFailure::new(
        failure_of_io(error, SourceFailure::Connect),
        format_args!("connection lost: {error}"),
    )
}
