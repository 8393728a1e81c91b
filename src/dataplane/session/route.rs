//! Choosing a backend: at accept, after a wait in the pool's queue, or again after a
//! failed connect.
//!
//! A stage of `session`. A client that waits in the queue goes by the newest table, as no
//! backend was chosen for it: a new backend or a raised cap serves it. It is served in the
//! order of arrival over all workers, and it is asked before each pick whether it is still
//! there.

use super::{Session, ended};
use crate::accept::wait_queue::QueueTicket;
use crate::relay::ConnectEnd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};
use tidegate_core::table::routes::ConnectionFacts;
use tidegate_core::table::{NoBackend, Reservation};

/// How often a waiting client is looked at for its FIN. A reset is noticed at
/// once.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How a session gets its backend. Made before it could wait for anything, so that a
/// pool's free slot is what the listener saw, and its queue the order of arrival.
#[derive(Debug)]
pub(super) enum BackendChoice {
    /// Picked already, or there is none.
    Picked(Result<Reservation, NoBackend>),
    /// After a wait in the pool's queue; the facts are for routes that change meanwhile.
    Queued(QueueTicket, ConnectionFacts),
    /// Another one: the backend it had reset the connection before a byte was sent. How
    /// the session ends where there is no other.
    Retry(SessionEnd),
}

impl Session {
    /// A backend of the pool that the route leads to, or a place in the queue for one (or
    /// for the pool's first verdict).
    pub(super) fn choose(&mut self, facts: ConnectionFacts) -> Result<BackendChoice, Cause> {
        self.taken = self.route.route(&facts);
        let (ctx, pool) = (self.ctx(), self.route.pool_of(self.taken).ok_or(Cause::Route)?);
        let (waiters, name) = (&ctx.shared.waiters, &pool.spec.name);
        if waiters.queued(name) == 0 {
            match pool.pick(ctx.pick_key(self.client), &[]) {
                Err(NoBackend::AtCapacity | NoBackend::Undecided) => {}
                pick => return Ok(BackendChoice::Picked(pick)),
            }
        }
        ctx.counters.queued.add(1);
        if pool.undecided {
            ctx.counters.undecided_waits.add(1);
        }
        Ok(BackendChoice::Queued(waiters.join(name), facts))
    }

    /// A backend that was not tried yet.
    pub(super) fn pick_untried(&self) -> Result<Reservation, NoBackend> {
        self.pool().pick(self.ctx().pick_key(self.client), self.tried())
    }

    /// Waits until the client is first in its queue and a backend has a free slot: at most
    /// for the pool's `queue_timeout`, and before that for a first verdict until
    /// `startup_grace` is over.
    pub(super) async fn wait_in_queue(
        &mut self,
        ticket: QueueTicket,
        facts: ConnectionFacts,
    ) -> Result<Result<Reservation, NoBackend>, SessionEnd> {
        self.waits = Some(Phase::Queue);
        let ctx = Rc::clone(self.ctx());
        let (mut route, mut generation) = (Arc::clone(&self.route), self.generation);
        let mut taken = self.taken;
        let mut serial = None;
        let pick = ticket.wait_until(|| {
            let table = ctx.table();
            if serial != Some(table.serial) {
                serial = Some(table.serial);
                if let Some(newer) = table.frontend(&route.state) {
                    (route, generation) = (Arc::clone(newer), table.generation);
                    taken = route.route(&facts);
                }
            }
            let Some(pool) = route.pool_of(taken) else {
                return Some(Err(ended(Phase::Queue, Cause::Route)));
            };
            match pool.pick(ctx.pick_key(facts.client), &[]) {
                Err(NoBackend::AtCapacity | NoBackend::Undecided) => None,
                pick => Some(Ok(pick)),
            }
        });
        let pool = self.pool();
        // The controller ends the wait for a verdict; this is only its latest end.
        let grace = if pool.undecided { pool.spec.startup_grace } else { Duration::ZERO };
        let longest = pool.spec.queue_timeout.saturating_add(grace);
        // All are readiness futures: dropping the losers loses nothing.
        let pick = tokio::select! {
            biased;
            pick = pick => pick,
            end = self.interrupted(Phase::Queue) => return Err(end),
            end = self.client_left() => return Err(end),
            () = tokio::time::sleep(longest) => {
                return Err(ended(Phase::Queue, Cause::QueueTimeout));
            }
        };
        (self.route, self.generation, self.taken) = (route, generation, taken);
        self.waits = None;
        pick
    }

    /// Waits until some untried backend has a slot: beside the queue of those that
    /// have not tried any, because the queue's next slot can be of one that was tried.
    pub(super) async fn wait_for_slot(&mut self) -> Result<Reservation, SessionEnd> {
        self.waits = Some(Phase::Queue);
        let waiters = &self.ctx().shared.waiters;
        let slot = waiters.wait_until(|| self.pick_untried().ok());
        // All three are readiness futures: dropping the losers loses nothing.
        let reserved = tokio::select! {
            reserved = slot => reserved,
            end = self.interrupted(Phase::Queue) => return Err(end),
            () = tokio::time::sleep(self.pool().spec.queue_timeout) => {
                return Err(ended(Phase::Queue, Cause::QueueTimeout));
            }
        };
        self.waits = None;
        Ok(reserved)
    }

    /// Resolves when the client has reset its connection or the session is aborted.
    async fn interrupted(&self, phase: Phase) -> SessionEnd {
        match self.relay.interrupted().await {
            ConnectEnd::Aborted(cause) => ended(phase, cause),
            _ => client_reset(phase, libc::ECONNRESET),
        }
    }

    /// Resolves once the client has ended its side and has sent nothing. One that has sent
    /// something may have sent all it wants to, and wait for the answer.
    async fn client_left(&self) -> SessionEnd {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if self.relay.client_left_silently() {
                let closed_first = Some(SessionSide::Client);
                return SessionEnd { closed_first, ..ended(Phase::Queue, Cause::ClientLeft) };
            }
        }
    }
}

pub(super) fn client_reset(phase: Phase, errno: i32) -> SessionEnd {
    let closed_first = Some(SessionSide::Client);
    SessionEnd { errno, closed_first, ..ended(phase, Cause::ClientReset) }
}
