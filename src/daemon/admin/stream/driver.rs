//! The task of all streams: asks for a snapshot once a second, and again soon after an
//! event.
//!
//! Runs on the control thread while a stream is open. It only waits. `groups` does the work on
//! a blocking thread.

use super::super::AdminRequest;
use super::super::routes::ApiState;
use super::groups::{StreamGroups, sse_text};
use crate::event_log::EventLog;
use hyper::body::Bytes;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_api::events::EventDoc;
use tidegate_net::clock;
use tokio::time::sleep_until;

/// Time between two deltas.
const DELTA_INTERVAL: Duration = Duration::from_secs(1);

/// Least time between two snapshots of the control loop.
const SNAPSHOT_PAUSE: Duration = Duration::from_millis(200);

/// Events that are sent at once. Of more, only the newest are sent.
const EVENTS_MAX: usize = 256;

/// Runs until no stream is open, or the API closes.
pub(super) async fn drive(api: Arc<ApiState>) {
    let mut closing = api.closing.clone();
    tokio::select! {
        () = follow(&api) => {}
        // Dropping the groups ends their streams.
        _ = closing.wait_for(|closing| *closing) => api.hub.close(),
    }
}

async fn follow(api: &Arc<ApiState>) {
    let hub = &api.hub;
    let mut groups = StreamGroups::new();
    let mut newest = api.events.watch();
    let mut last = *newest.borrow_and_update();
    let (mut delta_at, mut pause_until) = (clock::now(), clock::now());
    // A snapshot is wanted before the next delta.
    let mut early = false;
    loop {
        hub.take_joining().into_iter().for_each(|(selection, viewer)| {
            groups.add(selection, viewer);
            early = true;
        });
        groups.forget_ended();
        if groups.is_empty() && hub.leave_if_idle() {
            return;
        }
        let due = if early { delta_at.min(pause_until) } else { delta_at };
        tokio::select! {
            () = sleep_until(due.into()) => {}
            () = hub.joined.notified() => continue,
            _ = newest.changed() => {
                last = tell_events(&groups, &api.events, last);
                early = true;
                continue;
            }
        }
        let now = clock::now();
        let regular = now >= delta_at;
        if regular {
            delta_at = next_delta(delta_at, now);
        }
        (early, pause_until) = (false, now + SNAPSHOT_PAUSE);
        // Without an answer the control loop is late. The next delta has the changes.
        let ask = |reply| AdminRequest::Observe { latencies: false, reply };
        let Ok(observed) = api.ask(ask).await else { continue };
        let work = move || {
            groups.advance(&observed.snapshot, regular);
            groups
        };
        // After a panic the streams end, and their clients connect again.
        groups = match tokio::task::spawn_blocking(work).await {
            Ok(groups) => groups,
            Err(_) => StreamGroups::new(),
        };
    }
}

fn next_delta(at: Instant, now: Instant) -> Instant {
    let next = at + DELTA_INTERVAL;
    if next > now { next } else { now + DELTA_INTERVAL }
}

/// Sends the events after number `last`. Returns the newest number.
fn tell_events(groups: &StreamGroups, events: &EventLog, last: u64) -> u64 {
    let newer = events.after(last);
    let skipped = newer.events.len().saturating_sub(EVENTS_MAX);
    let texts: Vec<Bytes> = newer.events[skipped..]
        .iter()
        .map(|event: &Arc<EventDoc>| sse_text("event", &**event))
        .collect();
    groups.send_to_all(&texts);
    newer.last
}
