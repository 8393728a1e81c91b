//! Verification of members that names and registries list, in pools without probes: the
//! first session waits for one connect that succeeds.
//!
//! Called by `members` when a member joins, and by the controller for timers and results.
//! A failed connect is repeated, at growing intervals. If no backend of the pool is eligible
//! and `startup_grace` has passed since its first member joined, unverified members fail
//! open. This module judges no backend that has been verified.

use crate::control::backends::BackendEntry;
use crate::control::handover::SavedBackend;
use crate::control::pools::PoolId;
use crate::control::probing::{
    FIRST_PROBES_SPACING_MAX, FIRST_PROBES_SPREAD_MAX, PROBE_LOST_MARGIN,
};
use crate::control::schedule::{Schedule, TimerKind, after};
use crate::control::state::ControlState;
use crate::control::{ControlEffect, NoticeFields, ProbeLane, ProbeToken};
use crate::health::ProbeOutcome;
use crate::model::{PoolConfig, ProbeKind, ProbeSpec, ProbeTarget};
use crate::table::state::BackendId;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Wait after the first failed connect. It doubles with each further one.
const RETRY_MIN: Duration = Duration::from_millis(200);

/// Longest wait after a failed connect.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Shortest time between two notices about members of a pool that cannot be verified.
const NOTICE_INTERVAL: Duration = Duration::from_secs(10);

/// The connects that verify a member.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::control) struct Verification {
    /// The running connect.
    token: Option<ProbeToken>,
    /// Failed connects.
    failures: u32,
}

/// State of a pool with unverified members.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::control) struct PoolVerification {
    /// When the first member joined.
    first_joined: Option<Instant>,
    /// Unverified members fail open.
    pub(in crate::control) fails_open: bool,
    noticed: Option<Instant>,
    /// Failures that were not logged since `noticed`.
    suppressed: u64,
}

/// Returns the connect that verifies a member of the pool.
pub(in crate::control) fn verifying(pool: &PoolConfig) -> Arc<ProbeSpec> {
    Arc::new(ProbeSpec::single(ProbeKind::Tcp, ProbeTarget::of_pool(pool), pool.connect_timeout))
}

/// Returns the wait after this many failed connects.
fn retry_after(failures: u32) -> Duration {
    RETRY_MIN.saturating_mul(1 << failures.saturating_sub(1).min(8)).min(RETRY_MAX)
}

// === impl ControlState ===

impl ControlState {
    /// Begins to verify a member that joins, if its pool has no probes and only names and
    /// registries list it. It is number `index` of `count` that join together.
    pub(in crate::control) fn begin_verification(
        &mut self,
        entry: &mut BackendEntry,
        pool: &PoolConfig,
        (index, count): (u32, u32),
        now: Instant,
    ) {
        if pool.probe.is_some() || pool.of.is_some() || !entry.origins.is_discovered() {
            self.end_verification(entry);
            return;
        }
        entry.health.unverified = true;
        entry.verification = Some(Verification::default());
        let spacing = (FIRST_PROBES_SPREAD_MAX / count.max(1)).min(FIRST_PROBES_SPACING_MAX);
        self.schedule.set(TimerKind::Verify(entry.state.id), now + spacing * index);
        let Some(pool) = self.pools.observe(entry.pool) else { return };
        entry.health.fails_open = pool.verification.fails_open;
        let grace = TimerKind::GraceEnds(pool.id);
        if pool.verification.first_joined.is_none() {
            pool.verification.first_joined = Some(now);
            self.schedule.set(grace, after(now, pool.spec.startup_grace));
        }
    }

    /// Sets the timer of the grace of unverified members again, after a reload.
    pub(in crate::control) fn arm_grace(&mut self, id: PoolId, now: Instant) {
        let Some(pool) = self.pool(id).filter(|pool| pool.spec.probe.is_none()) else { return };
        let unverified =
            |id: &BackendId| self.backends.get(*id).is_some_and(|entry| entry.health.unverified);
        if !pool.members().iter().any(unverified) {
            return;
        }
        let first = pool.verification.first_joined.unwrap_or(now);
        let at = after(first, pool.spec.startup_grace);
        if at > now {
            self.schedule.set(TimerKind::GraceEnds(id), at);
        }
        if let Some(pool) = self.pools.observe(id) {
            pool.verification.first_joined = Some(first);
        }
    }

    /// Lets a member serve without a connect, because its address was verified before.
    pub(in crate::control) fn trust(&mut self, id: BackendId) {
        let Some(entry) = self.backends.touch_later(id) else { return };
        (entry.health.unverified, entry.health.fails_open) = (false, false);
        self.schedule.end_verified(entry);
    }

    /// Ends the verification without a result.
    pub(in crate::control) fn end_verification(&mut self, entry: &mut BackendEntry) {
        if entry.health.unverified {
            (entry.health.unverified, entry.health.fails_open) = (false, false);
        }
        if entry.verification.take().is_some() {
            self.schedule.cancel(TimerKind::Verify(entry.state.id));
        }
    }

    /// Requests the due connect, or counts a missing result as a failure.
    pub(in crate::control) fn verify(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(verification) = &mut entry.verification else { return };
        if verification.token.take().is_some() {
            self.unverified(id, "no result", now);
            return;
        }
        let Some(pool) = self.pools.get(entry.pool) else { return };
        let token = self.probes.next_token();
        verification.token = Some(token);
        let spec = Arc::clone(&pool.verifying);
        let lost_at = after(now, spec.timeout) + PROBE_LOST_MARGIN;
        self.schedule.set(TimerKind::Verify(id), lost_at);
        self.pending.effects.push(ControlEffect::Probe {
            lane: ProbeLane { pool: pool.id.0, urgent: true },
            backend: id,
            token,
            names: entry.state.names(),
            address: entry.state.address.clone(),
            spec,
        });
    }

    /// Applies the result of a connect. Returns false if the token belongs to none.
    pub(in crate::control) fn verification_result(
        &mut self,
        id: BackendId,
        token: ProbeToken,
        outcome: &ProbeOutcome,
        now: Instant,
    ) -> bool {
        let Some(entry) = self.backends.observe(id) else { return false };
        let Some(verification) = &mut entry.verification else { return false };
        if verification.token.take_if(|running| *running == token).is_none() {
            return false;
        }
        entry.note_probe(outcome, true, now);
        match outcome {
            ProbeOutcome::Success { .. } => self.verified(id),
            ProbeOutcome::Failure { reason, .. } => self.unverified(id, reason, now),
            ProbeOutcome::Undecided { .. } => self.retry_verification(id, now),
            ProbeOutcome::Local { reason } => {
                self.note_local_error(id, reason, now);
                self.retry_verification(id, now);
            }
        }
        true
    }

    fn verified(&mut self, id: BackendId) {
        let Some(entry) = self.backends.touch(id) else { return };
        (entry.health.unverified, entry.health.fails_open) = (false, false);
        entry.verification = None;
        self.schedule.cancel(TimerKind::Verify(id));
        let Some(pool) = self.pools.observe(entry.pool) else { return };
        if !std::mem::take(&mut pool.verification.fails_open) {
            return;
        }
        // Members whose connects have failed no longer serve once another member answers.
        for member in pool.members().to_vec() {
            let failed = |entry: &BackendEntry| {
                entry.health.fails_open && entry.verification.is_some_and(|it| it.failures > 0)
            };
            if self.backends.get(member).is_some_and(failed)
                && let Some(entry) = self.backends.touch(member)
            {
                entry.health.fails_open = false;
            }
        }
    }

    fn unverified(&mut self, id: BackendId, reason: &str, now: Instant) {
        self.retry_verification(id, now);
        let Some(entry) = self.backends.observe(id) else { return };
        let (state, pool) = (Arc::clone(&entry.state), entry.pool);
        let Some(pool) = self.pools.observe(pool) else { return };
        if entry.health.fails_open && !pool.verification.fails_open {
            let touched = self.backends.touch(id);
            touched.into_iter().for_each(|entry| entry.health.fails_open = false);
        }
        let verification = &mut pool.verification;
        let quiet = |at: Instant| now.saturating_duration_since(at) < NOTICE_INTERVAL;
        if verification.noticed.is_some_and(quiet) {
            verification.suppressed += 1;
        } else {
            verification.noticed = Some(now);
            let suppressed = std::mem::take(&mut verification.suppressed);
            let fields = NoticeFields {
                reason: Some(reason.to_owned()),
                address: Some(state.address_text.to_string()),
                suppressed: (suppressed > 0).then_some(suppressed),
                help: "check that the announced address accepts connections from this host",
                ..NoticeFields::default()
            };
            let message = "no connect to a new member has succeeded yet; it gets no sessions";
            self.warn_of(&state, message, fields);
        }
        let pool = self.backends.get(id).map(|entry| entry.pool);
        self.open_unverified(pool, now);
    }

    fn retry_verification(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(verification) = &mut entry.verification else { return };
        verification.failures += 1;
        let wait = retry_after(verification.failures);
        self.schedule.set(TimerKind::Verify(id), now + wait);
    }

    /// Makes unverified members fail open if no backend of the pool is eligible and
    /// `startup_grace` is over.
    pub(in crate::control) fn open_unverified(&mut self, pool: Option<PoolId>, now: Instant) {
        let Some(pool) = pool.and_then(|id| self.pools.get(id)) else { return };
        let over = |at| after(at, pool.spec.startup_grace) <= now;
        let waits = pool.verification.first_joined.is_none_or(|at| !over(at));
        if pool.spec.probe.is_some() || pool.in_service_since.is_some() || waits {
            return;
        }
        let grace = humantime::format_duration(pool.spec.startup_grace).to_string();
        let (id, name) = (pool.id, Arc::clone(&pool.spec.name));
        if self.fail_open(id) {
            let fields = NoticeFields {
                startup_grace: Some(grace),
                help: "check that this host can connect to the members of the pool",
                ..NoticeFields::default()
            };
            let message = "no backend is eligible and no connect to a new member has succeeded \
                           within startup_grace; failing open";
            self.warn(name, message, fields);
        }
    }

    /// Makes all unverified members of a pool fail open. Returns whether there are any.
    pub(in crate::control) fn fail_open(&mut self, pool: PoolId) -> bool {
        let Some(entry) = self.pools.observe(pool) else { return false };
        let waiting = |id: &BackendId| {
            let entry = self.backends.get(*id);
            entry.is_some_and(|entry| entry.health.unverified && !entry.health.fails_open)
        };
        let waiting: Vec<BackendId> = entry.members().iter().copied().filter(waiting).collect();
        entry.verification.fails_open |= !waiting.is_empty();
        for id in &waiting {
            if let Some(entry) = self.backends.touch(*id) {
                entry.health.fails_open = true;
            }
        }
        !waiting.is_empty()
    }
}

// === impl BackendEntry ===

impl BackendEntry {
    /// Applies what another process knows. A connect of this process is newer.
    pub(in crate::control) fn adopt_verification(&mut self, saved: &SavedBackend) {
        if self.health.unverified {
            self.health.unverified = saved.unverified;
            self.health.fails_open = saved.unverified && saved.fails_open;
        }
    }
}

// === impl Schedule ===

impl Schedule {
    /// Ends the connects of a backend that is verified.
    pub(in crate::control) fn end_verified(&mut self, entry: &mut BackendEntry) {
        if !entry.health.unverified && entry.verification.take().is_some() {
            self.cancel(TimerKind::Verify(entry.state.id));
        }
    }
}
