//! Lists the open sessions of a worker, and ends those that an operator has chosen.
//!
//! Called for commands of the control thread. It examines [`SLICE`] sessions per turn, so that
//! a list of a million sessions delays no other session. It chooses no session.

use super::context::WorkerContext;
use crate::relay::SessionView;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tidegate_core::model::FrontendId;
use tidegate_core::sessions::{
    SessionFacts, SessionFigures, SessionList, SessionQuery, SessionSelection, SessionsEnded,
    SessionsToEnd,
};
use tidegate_net::clock;

/// Places of sessions that are examined without a pause: about 30 µs.
const SLICE: u32 = 256;

/// Selects the sessions that match. Sessions that begin or end during the scan can be missing.
pub(super) async fn list(ctx: Rc<WorkerContext>, query: Arc<SessionQuery>) -> SessionList {
    let mut selection = SessionSelection::new(query, ctx.id);
    let names = frontend_names(&ctx);
    let removed: Arc<str> = "".into();
    let mut start = 0;
    loop {
        let now = clock::now();
        let more = ctx.engine.visit(start..start + SLICE, &mut |session| {
            let named = names.get(&session.identity.frontend).unwrap_or(&removed);
            selection.offer(&facts(session, named, now));
        });
        start += SLICE;
        if !more {
            return selection.finish();
        }
        tokio::task::yield_now().await;
    }
}

/// Ends the sessions of an order.
pub(super) async fn end(ctx: Rc<WorkerContext>, order: Arc<SessionsToEnd>) -> SessionsEnded {
    let mut all = SessionsEnded::default();
    let mut start = 0;
    loop {
        let done = ctx.engine.end_some(start..start + SLICE, &order);
        all.ended += done.ended;
        all.busy += done.busy;
        all.spoke += done.spoke;
        start += SLICE;
        if !done.more {
            return all;
        }
        tokio::task::yield_now().await;
    }
}

/// The names of the current frontends. A session of a removed one has its name in its meter once
/// it is relayed.
fn frontend_names(ctx: &WorkerContext) -> HashMap<FrontendId, Arc<str>> {
    let table = ctx.table();
    let frontends = table.frontends.iter();
    frontends.map(|one| (one.state.id, Arc::clone(&one.state.name))).collect()
}

fn facts<'s>(session: &'s SessionView<'_>, named: &'s Arc<str>, now: Instant) -> SessionFacts<'s> {
    let relayed = session.relayed.as_ref();
    let frontend = relayed.map_or(named, |relayed| &relayed.meter.frontend.name);
    let backend = relayed.map(|relayed| &relayed.meter.backend);
    let last = relayed.map_or(session.accepted, |relayed| relayed.last_activity);
    let [bytes_in, bytes_out] = relayed.map_or([0; 2], |relayed| relayed.bytes);
    SessionFacts {
        number: session.identity.number,
        client: session.identity.client,
        frontend,
        backend: backend.map(|backend| (&backend.pool, &backend.name)),
        phase: relayed.map(|relayed| relayed.phase),
        figures: SessionFigures {
            age: now.saturating_duration_since(session.accepted),
            idle: now.saturating_duration_since(last),
            bytes_in,
            bytes_out,
        },
    }
}
