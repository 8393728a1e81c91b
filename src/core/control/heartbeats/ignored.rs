//! Accepted heartbeats that do not match the configuration.
//!
//! Called by `heartbeats`. This module counts them, lists them by sender, and warns at most
//! once per minute and sender. They change nothing else.

use super::HeartbeatWatch;
use crate::control::state::ControlState;
use crate::control::{ControlEffect, Notice, NoticeFields, NoticeLevel};
use crate::suspicion::rejections::Rejected;
use std::sync::Arc;
use std::time::Instant;
use tidegate_heartbeat::Heartbeat;

/// Why an accepted heartbeat was ignored; the label of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeartbeatIgnored {
    /// No pool of this name has heartbeats.
    UnknownPool,
    /// No backend has this name, and the pool does not allow registration.
    UnknownBackend,
    /// The file lists a backend of this name at another address.
    ConfiguredName,
    /// The file lists a backend of another name at this address.
    ConfiguredAddress,
    /// A sender that started later uses the name or the address.
    OlderSender,
    /// The address is a bind of Tidegate: sessions would loop.
    OwnAddress,
    /// The pool has reached `backends_max` registered backends.
    PoolFull,
}

// === impl HeartbeatIgnored ===

impl HeartbeatIgnored {
    /// All reasons.
    pub const ALL: [HeartbeatIgnored; 7] = [
        HeartbeatIgnored::UnknownPool,
        HeartbeatIgnored::UnknownBackend,
        HeartbeatIgnored::ConfiguredName,
        HeartbeatIgnored::ConfiguredAddress,
        HeartbeatIgnored::OlderSender,
        HeartbeatIgnored::OwnAddress,
        HeartbeatIgnored::PoolFull,
    ];

    /// Returns the label value in metrics.
    pub fn name(self) -> &'static str {
        match self {
            HeartbeatIgnored::UnknownPool => "unknown-pool",
            HeartbeatIgnored::UnknownBackend => "unknown-backend",
            HeartbeatIgnored::ConfiguredName => "configured-name",
            HeartbeatIgnored::ConfiguredAddress => "configured-address",
            HeartbeatIgnored::OlderSender => "older-sender",
            HeartbeatIgnored::OwnAddress => "own-address",
            HeartbeatIgnored::PoolFull => "pool-full",
        }
    }

    /// Returns what the operator can do about it.
    pub fn help(self) -> &'static str {
        match self {
            HeartbeatIgnored::UnknownPool => {
                "no pool of this name accepts heartbeats; stop the sender"
            }
            HeartbeatIgnored::UnknownBackend => {
                "the pool has no backend of this name at this address; add it, allow \
                 register, or stop the sender"
            }
            HeartbeatIgnored::ConfiguredName => "the file has this name at another address",
            HeartbeatIgnored::ConfiguredAddress => "the file has this address under another name",
            HeartbeatIgnored::OlderSender => {
                "a sender that started later has this name or address; stop one of the two"
            }
            HeartbeatIgnored::OwnAddress => "the address is a bind of Tidegate itself",
            HeartbeatIgnored::PoolFull => "raise backends_max of the pool, or stop senders",
        }
    }
}

// === impl HeartbeatWatch ===

impl HeartbeatWatch {
    /// Counts an ignored heartbeat, and warns if a warning is due.
    pub(in crate::control) fn ignore(
        &mut self,
        state: &mut ControlState,
        why: HeartbeatIgnored,
        heartbeat: &Heartbeat,
        now: Instant,
    ) {
        self.ignored[why as usize] += 1;
        let rejected = Rejected {
            claim: Some((&heartbeat.pool, &heartbeat.name)),
            signed: true,
            from: None,
            key_id: Some(heartbeat.key_id),
            reason: why.name(),
            help: why.help(),
            skew: None,
            // `check_capacity` logs its own notice.
            warns: why != HeartbeatIgnored::PoolFull,
        };
        let Some(warning) = self.rejections.add(&rejected, now) else { return };
        let fields = NoticeFields {
            reason: Some(why.name().to_owned()),
            address: Some(heartbeat.address.to_string()),
            rejected: Some(warning.rejection.count),
            suppressed: Some(warning.suppressed),
            help: why.help(),
            ..NoticeFields::default()
        };
        state.pending.effects.push(ControlEffect::Notice(Box::new(Notice {
            level: NoticeLevel::Warn,
            pool: Arc::clone(&heartbeat.pool),
            backend: Some(Arc::clone(&heartbeat.name)),
            message: "heartbeats rejected; they count as missing",
            fields,
        })));
    }
}
