//! Starts, changes and stops the heartbeat receiver with the configuration.
//!
//! Owned by `evidence`. The control loop feeds received heartbeats to the controller.
//! [`HeartbeatReceiver::prepare`] can fail, for example if an address cannot be bound,
//! and changes nothing. [`HeartbeatReceiver::adopt`] cannot fail.

use super::control_loop::Control;
use super::due;
use crate::admin::HeartbeatCounts;
use crate::heartbeat::receive::{PreparedSockets, Receiver};
use crate::heartbeat::verify::{RejectReason, Verifier, VerifierLimits};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use tidegate_core::control::ControlEvent;
use tidegate_core::model::{Config, HeartbeatConfig};
use tidegate_core::suspicion::rejections::{Rejection, RejectionWarning, skew_words};
use tidegate_heartbeat::keys::{HeartbeatKey, KeyRing};

/// Heartbeats taken per turn of the control loop. The rest waits for the next turn, so
/// that the admin API is answered in between.
const TURN_MAX: usize = 4096;

/// The receiver, if the configuration has one.
#[derive(Debug, Default)]
pub(super) struct HeartbeatReceiver {
    receiver: Option<Receiver>,
    /// Local drops that the controller already knows.
    reported: u64,
    /// Sockets of the old process, until the first receiver takes them.
    inherited: Vec<(SocketAddr, OwnedFd)>,
    /// Counts of old processes.
    before: SavedReceiver,
    /// Final counts of this process, after a new process has started to receive.
    ended: Option<SavedReceiver>,
}

/// Counts that an upgrade passes to the new process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct SavedReceiver {
    accepted: u64,
    /// Key: name of the reason.
    rejected: BTreeMap<String, u64>,
    kernel_drops: u64,
}

/// A prepared change of the receiver, with its addresses bound.
#[derive(Debug)]
pub(super) enum ReceiverChange {
    /// No receiver before and after.
    Keep,
    /// The receiver stops.
    Stop,
    /// A receiver starts.
    Start(Receiver),
    /// Addresses or keys change.
    Update(PreparedSockets, KeyRing),
}

// === impl HeartbeatReceiver ===

impl HeartbeatReceiver {
    /// Binds the addresses of `config` without using them yet.
    ///
    /// # Errors
    /// An address cannot be bound. The error is the text for the log.
    pub(super) fn prepare(&mut self, config: &Config) -> Result<ReceiverChange, String> {
        let inherited = std::mem::take(&mut self.inherited);
        let Some(heartbeats) = &config.heartbeat else {
            return Ok(if self.receiver.is_some() {
                ReceiverChange::Stop
            } else {
                ReceiverChange::Keep
            });
        };
        let keys = key_ring(heartbeats)?;
        let listen = &heartbeats.listen;
        let refused = |error| {
            let all: Vec<String> = listen.iter().map(ToString::to_string).collect();
            format!("cannot listen for heartbeats on {}: {error}", all.join(", "))
        };
        match &self.receiver {
            Some(receiver) => {
                Ok(ReceiverChange::Update(receiver.prepare(listen).map_err(refused)?, keys))
            }
            None => {
                let verifier = Verifier::new(keys, VerifierLimits::default(), fastrand::u64(..));
                Ok(ReceiverChange::Start(
                    Receiver::start_with(listen, inherited, verifier).map_err(refused)?,
                ))
            }
        }
    }

    /// Sets the sockets of the old process, with their configured addresses.
    pub(super) fn inherit(&mut self, sockets: Vec<(SocketAddr, OwnedFd)>) {
        self.inherited = sockets;
    }

    /// Duplicates the sockets, with their configured addresses, for a new process.
    pub(super) fn share(&self) -> io::Result<Vec<(SocketAddr, OwnedFd)>> {
        self.receiver.as_ref().map_or(Ok(Vec::new()), Receiver::share)
    }

    /// Stops to receive, because the new process receives. The sockets stay open.
    pub(super) fn step_down(&mut self) {
        self.inherited = self.share().unwrap_or_default();
        self.ended = Some(self.save());
        self.receiver = None;
    }

    /// Completes the handover: closes the sockets.
    pub(super) fn hand_over(&mut self) {
        self.inherited = Vec::new();
    }

    /// Receives again, because the new process has exited.
    ///
    /// # Errors
    /// Those of [`HeartbeatReceiver::prepare`].
    pub(super) fn resume(&mut self, config: &Config) -> Result<(), String> {
        if let Some(before) = self.ended.take() {
            self.before = before;
        }
        let change = self.prepare(config)?;
        self.reported = 0;
        self.adopt(change);
        Ok(())
    }

    /// Returns the counts of this process and of old processes.
    pub(super) fn save(&self) -> SavedReceiver {
        if let Some(ended) = &self.ended {
            return ended.clone();
        }
        let HeartbeatCounts { accepted, rejected, kernel_drops, .. } = self.counts();
        let rejected = rejected.into_iter().map(|(reason, n)| (reason.to_owned(), n)).collect();
        SavedReceiver { accepted, rejected, kernel_drops }
    }

    /// Sets the counts of old processes. A later call replaces them.
    pub(super) fn restore_counts(&mut self, before: &SavedReceiver) {
        self.before = before.clone();
    }

    /// Commits a prepared change. Cannot fail.
    pub(super) fn adopt(&mut self, change: ReceiverChange) {
        match change {
            ReceiverChange::Keep => {}
            ReceiverChange::Stop => {
                self.receiver = None;
                self.reported = 0;
            }
            ReceiverChange::Start(receiver) => self.receiver = Some(receiver),
            ReceiverChange::Update(prepared, keys) => {
                if let Some(receiver) = &self.receiver {
                    receiver.commit(prepared);
                    receiver.set_keys(keys);
                }
            }
        }
    }

    /// Resolves when heartbeats may have arrived. Never resolves without a receiver.
    pub(super) async fn arrived(&self) {
        due::if_any(self.receiver.as_ref().map(Receiver::arrived)).await;
    }

    /// Takes received heartbeats, oldest first, and the number of local drops; at most
    /// [`TURN_MAX`] events and one. Logs warnings about rejected heartbeats.
    pub(super) fn take(&mut self) -> Vec<ControlEvent> {
        let Some(receiver) = &self.receiver else { return Vec::new() };
        while let Some(warning) = receiver.pop_warning() {
            warn(&warning);
        }
        let mut events = Vec::new();
        let dropped = receiver.dropped();
        if dropped > self.reported {
            events.push(ControlEvent::HeartbeatsLost(dropped - self.reported));
            self.reported = dropped;
        }
        let arrived = std::iter::from_fn(|| receiver.pop()).take(TURN_MAX);
        events.extend(arrived.map(|arrived| {
            let (pool, backend) = (&arrived.heartbeat.pool, &arrived.heartbeat.name);
            tracing::trace!(%pool, %backend, sequence = arrived.heartbeat.sequence, "heartbeat");
            ControlEvent::Heartbeat {
                heartbeat: arrived.heartbeat,
                at: arrived.at,
                stands_for: arrived.stands_for,
            }
        }));
        events
    }

    /// Returns the rejections of one backend's heartbeats.
    pub(super) fn rejection(&self, pool: &str, name: &str) -> Option<Rejection> {
        self.receiver.as_ref().and_then(|receiver| receiver.rejection(pool, name))
    }

    /// Returns the counts for status and metrics.
    pub(super) fn counts(&self) -> HeartbeatCounts {
        let Some(receiver) = &self.receiver else { return HeartbeatCounts::default() };
        let counts = receiver.counts();
        let rejected = |why: RejectReason| {
            let before = self.before.rejected.get(why.name()).copied().unwrap_or_default();
            counts.rejected(why).saturating_add(before)
        };
        HeartbeatCounts {
            listen: receiver.addresses(),
            accepted: counts.accepted().saturating_add(self.before.accepted),
            rejected: RejectReason::ALL.map(|why| (why.name(), rejected(why))).to_vec(),
            kernel_drops: counts.kernel_drops().saturating_add(self.before.kernel_drops),
            rejections: receiver.rejections(),
        }
    }

    /// Returns whether the receiving thread has ended unexpectedly.
    pub(super) fn has_exited(&self) -> bool {
        self.receiver.as_ref().is_some_and(Receiver::is_finished)
    }
}

impl Control {
    /// Passes copies of the heartbeat sockets to the supervisor.
    pub(super) fn hold_heartbeats(&mut self) {
        match self.evidence.heartbeats.share() {
            Ok(sockets) => self.supervised.hold_heartbeats(&sockets),
            Err(error) => {
                tracing::warn!(%error, "cannot share the heartbeat sockets with the supervisor; a crash loses heartbeats")
            }
        }
    }
}

fn warn(warning: &RejectionWarning) {
    let rejection = &warning.rejection;
    let (pool, backend) = match &rejection.claim {
        Some((pool, name)) => (&**pool, &**name),
        None => ("", ""),
    };
    tracing::warn!(
        pool,
        backend,
        from = rejection.from.map(tracing::field::display),
        key = rejection.key_id,
        reason = rejection.reason,
        skew = rejection.skew.map(skew_words),
        signed = rejection.signed,
        rejected = rejection.count,
        suppressed = warning.suppressed,
        help = rejection.help,
        "heartbeats rejected; they count as missing"
    );
}

fn key_ring(heartbeats: &HeartbeatConfig) -> Result<KeyRing, String> {
    let mut keys = Vec::with_capacity(heartbeats.keys.len());
    for key in &heartbeats.keys {
        let unread = || format!("heartbeat key file {} was not read", key.file.display());
        let secret = key.secret.clone().ok_or_else(unread)?;
        keys.push(HeartbeatKey {
            id: key.id,
            secret,
            pools: key.pools.clone(),
            addresses: key.addresses.clone(),
        });
    }
    KeyRing::new(keys).map_err(|repeated| repeated.to_string())
}
