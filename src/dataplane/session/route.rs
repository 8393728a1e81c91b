//! Picks a backend: at accept, after a wait in the pool's queue, or for a retry.
//!
//! A stage of `session`.
//!
//! - A queued session uses the newest table because no backend has been picked for it. New
//!   backends and raised caps therefore serve the queue.
//! - The queue is first come, first served over all workers.
//! - A client that leaves ends the wait: its reset at once, its FIN within [`FIN_CHECK`].

use super::{Session, TableNumbers, ended};
use crate::accept::wait_queue::QueueTicket;
use crate::relay::ConnectEnd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::model::WhenNoneEligible;
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};
use tidegate_core::table::decide::Picked;
use tidegate_core::table::routes::ConnectionFacts;
use tidegate_core::table::{FrontendRoute, NoBackend, Reservation};
use tidegate_net::clock;

/// Time between two checks of a queued client for a FIN.
const FIN_CHECK: Duration = Duration::from_millis(250);

/// Time after which a session tries backends again that have all failed, if the table has not
/// changed.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// How a session gets its backend. Decided at accept and without waiting: the slot that the
/// listener saw is still free, and the queue keeps the order of arrival.
#[derive(Debug)]
pub(super) enum BackendChoice {
    /// The pick is made; it may have failed.
    Picked(Result<Reservation, NoBackend>),
    /// Wait in the pool's queue. The facts route the session again if the table changes.
    Queued(QueueTicket, ConnectionFacts),
    /// Retry on another backend, because the first reset the connection before any byte.
    /// Holds the end of the session if no other backend is available.
    Retry(SessionEnd),
}

impl Session {
    /// Routes the session and picks a backend of the pool. Joins the pool's queue if all
    /// backends are at their caps, the pool has no probe result yet, clients wait for an
    /// eligible backend, or other clients are queued.
    pub(super) fn choose(&mut self, facts: ConnectionFacts) -> Result<BackendChoice, Cause> {
        self.taken = self.route.route(&facts);
        self.log_routed();
        let (ctx, pool) = (self.ctx(), self.route.pool_of(self.taken).ok_or(Cause::Route)?);
        let (waiters, name) = (&ctx.shared.waiters, &pool.spec.name);
        let mut reason = None;
        if waiters.queued(name) == 0 {
            let now = clock::now();
            match ctx.pick(pool, self.client, &[], now) {
                Err(why) if why.queues() => reason = Some(why),
                pick => {
                    self.keep_decision(picked(&pick), None, now);
                    return Ok(BackendChoice::Picked(pick));
                }
            }
        }
        self.log_queued(reason);
        ctx.counters.queued.add(1);
        if pool.undecided {
            ctx.counters.undecided_waits.add(1);
        }
        Ok(BackendChoice::Queued(waiters.join(name), facts))
    }

    /// Picks a backend that this session has not tried, for a retry. `AtCapacity`: the session
    /// must wait, and the end of the wait leaves the decision.
    pub(super) fn pick_retry(&mut self) -> Result<Reservation, NoBackend> {
        let now = clock::now();
        let pick = self.pick_untried(now);
        if !matches!(pick, Err(NoBackend::AtCapacity)) {
            self.keep_decision(picked(&pick), None, now);
        }
        pick
    }

    fn pick_untried(&self, now: Instant) -> Result<Reservation, NoBackend> {
        self.ctx().pick(self.pool(), self.client, self.tried(), now)
    }

    /// Waits until the client is first in its queue and a backend has a free slot. The limit
    /// is `queue_timeout`, plus `startup_grace` if the pool has no probe result yet.
    pub(super) async fn wait_in_queue(
        &mut self,
        ticket: QueueTicket,
        facts: ConnectionFacts,
    ) -> Result<Result<Reservation, NoBackend>, SessionEnd> {
        self.waits = Some(Phase::Queue);
        let since = clock::now();
        let ctx = Rc::clone(self.ctx());
        let (mut route, mut numbers) = (Arc::clone(&self.route), self.table);
        let mut taken = self.taken;
        let mut serial = None;
        let pick = ticket.wait_until(|| {
            let table = ctx.table();
            if serial != Some(table.serial) {
                serial = Some(table.serial);
                if let Some(newer) = table.frontend(&route.state) {
                    route = Arc::clone(newer);
                    numbers = TableNumbers { generation: table.generation, serial: table.serial };
                    taken = route.route(&facts);
                }
            }
            let Some(pool) = route.pool_of(taken) else {
                return Some(Err(ended(Phase::Queue, Cause::Route)));
            };
            match ctx.pick(pool, facts.client, &[], clock::now()) {
                Err(reason) if reason.queues() => None,
                pick => Some(Ok(pick)),
            }
        });
        let pool = self.pool();
        // The controller normally ends the grace period earlier, by publishing a table.
        let grace = if pool.undecided { pool.spec.startup_grace } else { Duration::ZERO };
        let longest = pool.spec.queue_timeout.saturating_add(grace);
        // All futures only wait for readiness or time, so the losers can be dropped.
        let pick = tokio::select! {
            biased;
            pick = pick => pick,
            end = self.interrupted(Phase::Queue) => Err(end),
            end = self.client_left() => Err(end),
            () = tokio::time::sleep(longest) => Err(ended(Phase::Queue, Cause::QueueTimeout)),
        };
        let rerouted = !Arc::ptr_eq(&self.route, &route);
        (self.route, self.table, self.taken) = (route, numbers, taken);
        if rerouted {
            self.log_routed();
        }
        match &pick {
            Ok(pick) => {
                let now = clock::now();
                self.keep_decision(picked(pick), Some(now - since), now);
                self.waits = None;
            }
            Err(_) => self.keep_fruitless_wait(since),
        }
        pick
    }

    /// Waits up to `queue_timeout` until an untried backend has a slot. Does not join the
    /// pool's queue: the next slot there can be that of a backend this session has tried.
    pub(super) async fn wait_for_slot(&mut self) -> Result<Reservation, SessionEnd> {
        self.waits = Some(Phase::Queue);
        let since = clock::now();
        let waiters = &self.ctx().shared.waiters;
        let slot = waiters.wait_until(|| self.pick_untried(clock::now()).ok());
        // All futures only wait for readiness or time, so the losers can be dropped.
        let reserved = tokio::select! {
            reserved = slot => Ok(reserved),
            end = self.interrupted(Phase::Queue) => Err(end),
            () = tokio::time::sleep(self.pool().spec.queue_timeout) => {
                Err(ended(Phase::Queue, Cause::QueueTimeout))
            }
        };
        let reserved = match reserved {
            Ok(reserved) => reserved,
            Err(end) => {
                self.keep_fruitless_wait(since);
                return Err(end);
            }
        };
        let now = clock::now();
        self.keep_decision(Some(Picked::of(&reserved)), Some(now - since), now);
        self.waits = None;
        Ok(reserved)
    }

    /// Whether the session waits after every backend of its pool has failed.
    pub(super) fn waits_out_failures(&self) -> bool {
        self.pool().spec.when_none_eligible == WhenNoneEligible::Wait
    }

    /// Waits until a newer table changes the pool and a backend is eligible, or tries the
    /// same backends again after [`RETRY_PAUSE`]. Does not join the pool's queue, where it
    /// would stop clients that no backend has failed yet. The limit is `queue_timeout` since
    /// the accept. `why` is the end of the session if its pool is gone.
    pub(super) async fn wait_for_other_table(
        &mut self,
        why: SessionEnd,
    ) -> Result<Reservation, SessionEnd> {
        self.waits = Some(Phase::Queue);
        let since = clock::now();
        let ctx = Rc::clone(self.ctx());
        ctx.counters.queued.add(1);
        let newest = |again: bool| self.pick_in_newest(again).map(|pick| pick.ok_or(why));
        let waiters = &ctx.shared.waiters;
        let pick = async {
            let changed = waiters.wait_until(|| newest(false));
            match tokio::time::timeout(RETRY_PAUSE, changed).await {
                Ok(pick) => pick,
                Err(_) => waiters.wait_until(|| newest(true)).await,
            }
        };
        let deadline = self.started + self.pool().spec.queue_timeout;
        // All futures only wait for readiness or time, so the losers can be dropped.
        let picked = tokio::select! {
            biased;
            pick = pick => pick,
            end = self.interrupted(Phase::Queue) => Err(end),
            () = tokio::time::sleep_until(deadline.into()) => {
                Err(ended(Phase::Queue, Cause::QueueTimeout))
            }
        };
        let (reserved, route, numbers) = match picked {
            Ok(picked) => picked,
            Err(end) => {
                self.keep_fruitless_wait(since);
                return Err(end);
            }
        };
        self.forget_tried();
        (self.route, self.table) = (route, numbers);
        let now = clock::now();
        self.keep_decision(Some(Picked::of(&reserved)), Some(now - since), now);
        self.waits = None;
        Ok(reserved)
    }

    /// Picks a backend in the newest table, if the session's pool differs there or `again` is
    /// set. `None`: no backend yet. `Some(None)`: the session cannot use that table.
    fn pick_in_newest(
        &self,
        again: bool,
    ) -> Option<Option<(Reservation, Arc<FrontendRoute>, TableNumbers)>> {
        let table = self.ctx().table();
        let route = table.frontend(&self.route.state);
        let pool = route.and_then(|route| route.pool_of(self.taken));
        let same = pool.filter(|pool| pool.id == self.pool().id);
        let (Some(route), Some(pool)) = (route, same) else { return Some(None) };
        if !again && std::ptr::eq(Arc::as_ptr(pool), self.pool()) {
            return None;
        }
        match self.ctx().pick(pool, self.client, &[], clock::now()) {
            Ok(reserved) => {
                let (generation, serial) = (table.generation, table.serial);
                Some(Some((reserved, Arc::clone(route), TableNumbers { generation, serial })))
            }
            Err(reason) if reason.queues() => None,
            Err(_) => Some(None),
        }
    }

    /// Resolves when the client has reset its connection or the session is aborted.
    async fn interrupted(&self, phase: Phase) -> SessionEnd {
        match self.relay.interrupted().await {
            ConnectEnd::Aborted(cause) => ended(phase, cause),
            _ => client_reset(phase, libc::ECONNRESET),
        }
    }

    /// Resolves once the client has sent a FIN and no byte. A client that has sent bytes may
    /// have sent its whole request and wait for the answer.
    async fn client_left(&self) -> SessionEnd {
        loop {
            tokio::time::sleep(FIN_CHECK).await;
            if self.relay.client_left_silently() {
                let closed_first = Some(SessionSide::Client);
                return SessionEnd { closed_first, ..ended(Phase::Queue, Cause::ClientLeft) };
            }
        }
    }
}

fn picked(pick: &Result<Reservation, NoBackend>) -> Option<Picked> {
    pick.as_ref().ok().map(Picked::of)
}

pub(super) fn client_reset(phase: Phase, errno: i32) -> SessionEnd {
    let closed_first = Some(SessionSide::Client);
    SessionEnd { errno, closed_first, ..ended(phase, Cause::ClientReset) }
}
