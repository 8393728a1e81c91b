//! What every engine keeps of a relayed session besides its bytes: timers and
//! the counting.
//!
//! Owned by the shell. Time comes in; nothing here touches a socket.

use super::flow::{Limits, Meter};
use super::verdict::Moved;
use std::time::{Duration, Instant};

/// Sessions younger than this get no keepalive or user timeout on the upstream
/// leg: neither could act earlier, and short sessions save the system calls.
const LIVENESS_AFTER: Duration = Duration::from_secs(10);

/// A session's timers and meter.
#[derive(Debug)]
pub(super) struct Relaying {
    pub(super) limits: Limits,
    pub(super) meter: Meter,
    last_activity: Instant,
    pub(super) first_byte: Option<Instant>,
    /// When keepalive is to be switched on upstream; `None` once it is.
    liveness_due: Option<Instant>,
    /// Hidden progress was asked for since the last activity.
    pub(super) asked: bool,
}

impl Relaying {
    pub(super) fn new(limits: Limits, meter: Meter, now: Instant) -> Relaying {
        Relaying {
            limits,
            meter,
            last_activity: now,
            first_byte: None,
            liveness_due: Some(now + LIVENESS_AFTER),
            asked: false,
        }
    }

    fn limit(&self, half_closed: bool) -> Option<Duration> {
        if half_closed { self.limits.half_closed } else { self.limits.idle }
    }

    /// Whether nothing has moved for as long as is allowed.
    pub(super) fn is_idle(&self, half_closed: bool, now: Instant) -> bool {
        let idle = now.saturating_duration_since(self.last_activity);
        self.limit(half_closed).is_some_and(|limit| idle >= limit)
    }

    /// Whether the upstream's keepalive is to be switched on now; once.
    pub(super) fn take_liveness(&mut self, now: Instant) -> bool {
        self.liveness_due.take_if(|due| *due <= now).is_some()
    }

    /// When to look at the timers next.
    pub(super) fn due(&self, half_closed: bool, now: Instant) -> Instant {
        let idle = self.limit(half_closed).map(|limit| self.last_activity + limit);
        // Both off: look again in a day.
        let never = now + Duration::from_secs(86_400);
        [idle, self.liveness_due].into_iter().flatten().min().unwrap_or(never)
    }

    /// Counts what a turn moved.
    #[inline]
    pub(super) fn account(&mut self, moved: &Moved, now: Instant) {
        let [bytes_in, bytes_out] = moved.received;
        if bytes_in | bytes_out == 0 && !moved.sent && !moved.ended {
            return;
        }
        self.last_activity = now;
        self.asked = false;
        let frontend = self.meter.frontend.counters.of(self.meter.worker);
        let backend = self.meter.backend.counters.of(self.meter.worker);
        if bytes_in != 0 {
            frontend.bytes_in.add(bytes_in);
            backend.bytes_in.add(bytes_in);
        }
        if bytes_out != 0 {
            frontend.bytes_out.add(bytes_out);
            backend.bytes_out.add(bytes_out);
            self.first_byte.get_or_insert(now);
        }
    }
}
