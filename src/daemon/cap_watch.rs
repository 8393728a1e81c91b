//! Notices when a cap on sessions is reached, and when it is no longer reached.
//!
//! Called by the control loop once a second. A cap that is reached for less than a second can be
//! missed; `tidegate_accept_held_at_cap_total` counts all. It never changes a cap.

use super::control_loop::Control;
use super::event_log::NewEvent;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tidegate_api::names::{EventKindName, EventLevelName};
use tidegate_net::clock;

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// How long a cap is not reached until that is an event, so that a busy cap causes two events
/// and not two per session.
const QUIET: Duration = Duration::from_secs(10);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct CapWatch {
    next: Option<Instant>,
    /// The caps that are reached, by subject; at most one for the process, each frontend and
    /// each pool.
    reached: BTreeMap<String, ReachedCap>,
}

#[derive(Debug)]
struct ReachedCap {
    /// The first and the last look that found it.
    since: Instant,
    last: Instant,
    over: &'static str,
}

/// A cap that a look has found reached.
#[derive(Debug)]
struct FoundCap {
    subject: String,
    text: String,
    /// The text of the event when it is over.
    over: &'static str,
}

impl CapWatch {
    fn observe(&mut self, found: Vec<FoundCap>, now: Instant) -> Vec<NewEvent> {
        let mut events = Vec::new();
        for FoundCap { subject, text, over } in found {
            if let Some(known) = self.reached.get_mut(&subject) {
                known.last = now;
                continue;
            }
            events.push(NewEvent::new(EventKindName::Limit, EventLevelName::Warn, &*subject, text));
            self.reached.insert(subject, ReachedCap { since: now, last: now, over });
        }
        self.reached.retain(|subject, ReachedCap { since, last, over }| {
            let reached = now.saturating_duration_since(*last) < QUIET;
            if !reached {
                let lasted = last.saturating_duration_since(*since).as_secs();
                let text = format!("{over} for {} s, after {lasted} s", QUIET.as_secs());
                events.push(NewEvent::new(
                    EventKindName::Limit,
                    EventLevelName::Good,
                    &**subject,
                    text,
                ));
            }
            reached
        });
        events
    }
}

impl Control {
    /// Records caps that were reached or left, if a look is due.
    pub(super) fn watch_caps(&mut self) {
        let now = clock::now();
        if self.caps.next.is_some_and(|next| now < next) {
            return;
        }
        self.caps.next = Some(now + LOOK);
        let found = self.reached_caps();
        for event in self.caps.observe(found, now) {
            self.telemetry.events.record(event);
        }
    }

    fn reached_caps(&self) -> Vec<FoundCap> {
        let (table, context) = (self.controller.current_table(), self.workers.context());
        let mut found = Vec::new();
        let mut add = |active: u32, max: u32, subject: &dyn Fn() -> String| {
            if max > 0 && active >= max {
                let text =
                    format!("{active} of {max} sessions: new clients wait in the listen queue");
                found.push(FoundCap { subject: subject(), text, over: "below connections_max" });
            }
        };
        add(context.in_flight.get(), table.connections_max, &|| "tidegate".to_owned());
        for frontend in &table.frontends {
            let (active, max) = (frontend.state.in_flight.get(), frontend.spec.connections_max);
            add(active, max, &|| format!("frontend {}", frontend.spec.name));
        }
        for (pool, queued) in context.waiters.all_queued() {
            let text = format!("{queued} clients wait in the queue of the pool for a backend");
            let (subject, over) = (pool.to_string(), "no client in the queue");
            found.push(FoundCap { subject, text, over });
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(subjects: &[&str]) -> Vec<FoundCap> {
        let cap = |subject: &&str| FoundCap {
            subject: (*subject).to_owned(),
            text: "full".to_owned(),
            over: "below",
        };
        subjects.iter().map(cap).collect()
    }

    #[test]
    fn cap_that_is_reached_again_within_10_s_is_one_episode() {
        let (mut watch, start) = (CapWatch::default(), clock::now());
        let mut events = |at: u64, subjects: &[&str]| {
            watch.observe(found(subjects), start + Duration::from_secs(at)).len()
        };
        assert_eq!(events(0, &["tidegate", "web"]), 2, "two caps were reached");
        assert_eq!(events(1, &["tidegate"]), 0);
        assert_eq!(events(9, &["tidegate", "web"]), 0);
        assert_eq!(events(18, &[]), 0);
        assert_eq!(events(19, &["web"]), 1, "only the process has been below its cap for 10 s");
        assert_eq!(events(29, &[]), 1);
        assert_eq!(events(60, &[]), 0);
        assert_eq!(events(61, &["web"]), 1);
    }
}
