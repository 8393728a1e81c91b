//! The receiver of heartbeats: started, changed and stopped with the
//! configuration.
//!
//! Owned by the control loop, which feeds what arrives to the controller. What
//! can fail (an address that cannot be bound) happens in [`HeartbeatReceiver::prepare`]
//! and changes nothing; what follows cannot.

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

/// Heartbeats taken in one turn of the control loop; the rest wait for the next,
/// so that the admin API is answered in between.
const TURN_MAX: usize = 4096;

/// The receiver, where there is one.
#[derive(Debug, Default)]
pub(super) struct HeartbeatReceiver {
    receiver: Option<Receiver>,
    /// Of its losses, what the controller knows already.
    told: u64,
    /// Sockets of the process before, until the first receiver takes them.
    inherited: Vec<(SocketAddr, OwnedFd)>,
    /// Counted by the processes before.
    before: SavedReceiver,
    /// Counted to the end, once the next process receives.
    ended: Option<SavedReceiver>,
}

/// What has been received, for the next process to count on from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct SavedReceiver {
    accepted: u64,
    /// By name of the reason.
    rejected: BTreeMap<String, u64>,
    kernel_drops: u64,
}

/// What a configuration asks for, with its addresses bound.
#[derive(Debug)]
pub(super) enum ReceiverChange {
    /// Nobody listens, before or after.
    Keep,
    /// Nobody listens any more.
    Stop,
    /// From now on.
    Start(Receiver),
    /// Elsewhere, or by other keys.
    Update(PreparedSockets, KeyRing),
}

// === impl HeartbeatReceiver ===

impl HeartbeatReceiver {
    /// Binds what `config` wants; changes nothing yet.
    ///
    /// # Errors
    /// In words; the first address that cannot be bound.
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
                let gate = Verifier::new(keys, VerifierLimits::default(), fastrand::u64(..));
                Ok(ReceiverChange::Start(
                    Receiver::start_with(listen, inherited, gate).map_err(refused)?,
                ))
            }
        }
    }

    /// Goes on with sockets of the process before, by the addresses it was asked to
    /// listen on.
    pub(super) fn inherit(&mut self, sockets: Vec<(SocketAddr, OwnedFd)>) {
        self.inherited = sockets;
    }

    /// For the next process to go on with.
    pub(super) fn share(&self) -> io::Result<Vec<(SocketAddr, OwnedFd)>> {
        self.receiver.as_ref().map_or(Ok(Vec::new()), Receiver::share)
    }

    /// Receives no more: the next process does. The sockets stay open.
    pub(super) fn step_down(&mut self) {
        self.inherited = self.share().unwrap_or_default();
        self.ended = Some(self.save());
        self.receiver = None;
    }

    /// That process has lived long enough: lets go of the sockets.
    pub(super) fn hand_over(&mut self) {
        self.inherited = Vec::new();
    }

    /// That process has ended: receives again.
    ///
    /// # Errors
    /// In words, as of [`HeartbeatReceiver::prepare`].
    pub(super) fn go_on(&mut self, config: &Config) -> Result<(), String> {
        if let Some(before) = self.ended.take() {
            self.before = before;
        }
        let change = self.prepare(config)?;
        self.told = 0;
        self.adopt(change);
        Ok(())
    }

    /// Everything counted by all the processes so far.
    pub(super) fn save(&self) -> SavedReceiver {
        if let Some(ended) = &self.ended {
            return ended.clone();
        }
        let HeartbeatCounts { accepted, rejected, kernel_drops, .. } = self.counts();
        let rejected = rejected.into_iter().map(|(reason, n)| (reason.to_owned(), n)).collect();
        SavedReceiver { accepted, rejected, kernel_drops }
    }

    /// Counts on from the process before; may be called again with something newer.
    pub(super) fn restore_counts(&mut self, before: &SavedReceiver) {
        self.before = before.clone();
    }

    /// Puts in force what was prepared.
    pub(super) fn adopt(&mut self, change: ReceiverChange) {
        match change {
            ReceiverChange::Keep => {}
            ReceiverChange::Stop => {
                self.receiver = None;
                self.told = 0;
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

    /// Resolves when something may have arrived; never where nobody listens.
    pub(super) async fn arrived(&self) {
        due::if_any(self.receiver.as_ref().map(Receiver::arrived)).await;
    }

    /// What has arrived, oldest first, and what was lost here; at most
    /// [`TURN_MAX`] events and one. Logs what there is to say of the rejected.
    pub(super) fn take(&mut self) -> Vec<ControlEvent> {
        let Some(receiver) = &self.receiver else { return Vec::new() };
        while let Some(warning) = receiver.pop_warning() {
            warn(&warning);
        }
        let mut events = Vec::new();
        let dropped = receiver.dropped();
        if dropped > self.told {
            events.push(ControlEvent::HeartbeatsLost(dropped - self.told));
            self.told = dropped;
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

    /// What was rejected in the name of one backend.
    pub(super) fn rejection(&self, pool: &str, name: &str) -> Option<Rejection> {
        self.receiver.as_ref().and_then(|receiver| receiver.rejection(pool, name))
    }

    /// For status and metrics.
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

    /// Whether the thread that should be receiving has ended.
    pub(super) fn has_exited(&self) -> bool {
        self.receiver.as_ref().is_some_and(Receiver::is_finished)
    }
}

impl Control {
    /// Has the supervisor keep what this process receives on.
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
