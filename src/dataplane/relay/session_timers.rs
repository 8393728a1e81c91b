//! What every engine keeps of a relayed session besides its bytes: timers and
//! the counting.
//!
//! Owned by `engine`. Time comes in; nothing here touches a socket.

use super::handle::{SessionMeter, SessionTimeouts};
use crate::relay::close_state::TurnBytes;
use std::time::{Duration, Instant};
use tidegate_core::outcome::Cause;

/// Sessions younger than this get no keepalive or user timeout on the upstream
/// leg, for short sessions save the system calls; unless one of the two could
/// act earlier, see [`liveness_after`].
const LIVENESS_AFTER_MAX: Duration = Duration::from_secs(10);

/// See [`SessionTimers::looked`].
const ASKED: u32 = 1 << 31;

/// How long last words may stand still on their way where neither the half-closed nor
/// the user timeout is on.
const PATIENCE_DEFAULT: Duration = Duration::from_secs(60);

/// A session's timers and meter. Idle sessions have one each, in a box.
#[derive(Debug)]
pub(super) struct SessionTimers {
    first_byte: CompactTimeout,
    idle: CompactTimeout,
    half_closed: CompactTimeout,
    stalled: Seconds,
    keepalive: Seconds,
    user_timeout: CompactTimeout,
    pub(super) meter: SessionMeter,
    last_activity: Instant,
    pub(super) answer: FirstByteState,
    /// When keepalive is to be switched on upstream; `None` once it is.
    liveness_due: Option<Instant>,
    /// How long the queue was, at the last look, of sockets that tell no more; and in
    /// the bit [`ASKED`], whether progress was asked for since the last activity.
    looked: u32,
}

// With these sizes, glibc's malloc places it in the room that the alignment of a
// session's task (tokio: 128 bytes) leaves before the next: eight bytes more
// measured 128 more for each idle session.
const _: () = assert!(size_of::<SessionTimers>() <= 104);

/// Who has spoken, as far as it says something of the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FirstByteState {
    /// Nobody yet.
    Idle,
    /// The client, then; the backend has not answered.
    Awaited(Instant),
    /// The backend, then, with its first byte.
    Answered(Instant),
}

/// A time limit in a quarter of the space: whole milliseconds, at least one;
/// 0 is off. The longest is 49 days.
#[derive(Debug, Clone, Copy)]
struct CompactTimeout(u32);

/// A time limit of whole seconds, rounded up, in half of that space; 0 is off. The
/// longest is 18 hours.
#[derive(Debug, Clone, Copy)]
struct Seconds(u16);

impl From<Option<Duration>> for Seconds {
    fn from(limit: Option<Duration>) -> Seconds {
        let up = |limit: Duration| limit.as_millis().div_ceil(1000).max(1);
        Seconds(limit.map_or(0, |limit| u16::try_from(up(limit)).unwrap_or(u16::MAX)))
    }
}

impl Seconds {
    fn get(self) -> Option<Duration> {
        (self.0 != 0).then(|| Duration::from_secs(self.0.into()))
    }
}

impl From<Option<Duration>> for CompactTimeout {
    fn from(limit: Option<Duration>) -> CompactTimeout {
        let millis = |limit: Duration| u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
        CompactTimeout(limit.map_or(0, |limit| millis(limit).max(1)))
    }
}

impl CompactTimeout {
    fn get(self) -> Option<Duration> {
        (self.0 != 0).then(|| Duration::from_millis(self.0.into()))
    }
}

/// When the upstream leg's limits are to be set: in time for either to act as
/// soon as it may. Half of it, for the kernel looks only when it sends again,
/// and is told when to look by the limit it knows of (tcp(7), `TCP_USER_TIMEOUT`).
fn liveness_after(limits: &SessionTimeouts) -> Duration {
    let either = [limits.keepalive, limits.user_timeout].into_iter().flatten();
    either.map(|limit| limit / 2).fold(LIVENESS_AFTER_MAX, Duration::min)
}

impl SessionTimers {
    pub(super) fn new(limits: SessionTimeouts, meter: SessionMeter, now: Instant) -> SessionTimers {
        SessionTimers {
            first_byte: limits.first_byte.into(),
            idle: limits.idle.into(),
            half_closed: limits.half_closed.into(),
            stalled: limits.stalled.into(),
            keepalive: limits.keepalive.into(),
            user_timeout: limits.user_timeout.into(),
            meter,
            last_activity: now,
            answer: FirstByteState::Idle,
            liveness_due: Some(now + liveness_after(&limits)),
            looked: 0,
        }
    }

    /// How long nothing may move, and what it is called when that is over. Who
    /// has ended its side is not one that keeps its first byte back.
    fn limit(&self, half_closed: bool) -> Option<(Duration, Cause)> {
        if half_closed {
            return self.half_closed.get().map(|limit| (limit, Cause::HalfClosedTimeout));
        }
        let idle = self.idle.get().map(|limit| (limit, Cause::IdleTimeout));
        let first_byte = self.first_byte.get().filter(|_| self.answer == FirstByteState::Idle);
        let first_byte = first_byte.map(|limit| (limit, Cause::FirstByteTimeout));
        [first_byte, idle].into_iter().flatten().min_by_key(|(limit, _)| *limit)
    }

    /// The upstream leg's keepalive and user timeout.
    pub(super) fn liveness(&self) -> (Option<Duration>, Option<Duration>) {
        (self.keepalive.get(), self.user_timeout.get())
    }

    /// How long nothing may move now; for ever where all timers are off.
    pub(super) fn limit_now(&self, half_closed: bool) -> Duration {
        self.limit(half_closed).map_or(Duration::MAX, |(limit, _)| limit)
    }

    /// The time limit that is over: nothing has moved for as long as is allowed.
    pub(super) fn overdue(&self, half_closed: bool, now: Instant) -> Option<Cause> {
        let idle = now.saturating_duration_since(self.last_activity);
        self.limit(half_closed).filter(|(limit, _)| idle >= *limit).map(|(_, cause)| cause)
    }

    /// Whether the upstream's keepalive is to be switched on now; once.
    pub(super) fn take_liveness(&mut self, now: Instant) -> bool {
        self.liveness_due.take_if(|due| *due <= now).is_some()
    }

    /// When to look at the timers next.
    pub(super) fn due(&self, half_closed: bool, now: Instant) -> Instant {
        let idle = self.limit(half_closed).map(|(limit, _)| self.last_activity + limit);
        // Both off: look again in a day.
        let never = now + Duration::from_secs(86_400);
        [idle, self.liveness_due].into_iter().flatten().min().unwrap_or(never)
    }

    /// Counts what a turn moved.
    #[inline]
    pub(super) fn account(&mut self, moved: &TurnBytes, now: Instant) {
        let ([asked, answered], [bytes_in, bytes_out]) = (moved.received, moved.sent);
        if asked | answered | bytes_in | bytes_out == 0 && !moved.ended {
            return;
        }
        self.last_activity = now;
        self.looked &= !ASKED;
        self.count(moved);
        // What both sides said in one turn shows no order: no question then.
        if asked != 0 && answered == 0 && self.answer == FirstByteState::Idle {
            self.answer = FirstByteState::Awaited(now);
            self.meter.client_spoke();
        }
        if answered != 0 && !matches!(self.answer, FirstByteState::Answered(_)) {
            self.first_byte(now);
        }
    }

    /// Counts what was sent on.
    #[inline]
    pub(super) fn count(&self, moved: &TurnBytes) {
        let [bytes_in, bytes_out] = moved.sent;
        let frontend = self.meter.frontend.counters.of(self.meter.worker.into());
        let backend = self.meter.backend.counters.of(self.meter.worker.into());
        if bytes_in != 0 {
            frontend.bytes_in.add(bytes_in);
            backend.bytes_in.add(bytes_in);
        }
        if bytes_out != 0 {
            frontend.bytes_out.add(bytes_out);
            backend.bytes_out.add(bytes_out);
        }
    }

    /// The kernels have passed bytes on since: the last so long ago, and there may be
    /// more that does not show where the peer is `blocked`.
    pub(super) fn moved_unseen(
        &mut self,
        ago: Duration,
        blocked: bool,
        limit: Duration,
        now: Instant,
    ) {
        let ago = if blocked { ago.saturating_sub(self.grace(limit)) } else { ago };
        if let Some(at) = now.checked_sub(ago) {
            self.last_activity = self.last_activity.max(at);
        }
    }

    /// Whether a queue, of which only the length is known, is another than at the last
    /// look; if so, something has moved just now.
    pub(super) fn looks_moved(&mut self, queued: u64, now: Instant) -> bool {
        let queued = queued.min((!ASKED).into()) as u32;
        let moved = self.looked & !ASKED != queued;
        if moved {
            (self.looked, self.last_activity) = (queued, now);
        }
        moved
    }

    /// Whether progress that does not show may be asked for: once after the last
    /// activity.
    pub(super) fn may_ask(&mut self) -> bool {
        let may = self.looked & ASKED == 0;
        self.looked |= ASKED;
        may
    }

    /// How long the last words of a side that failed may stand still on their way to
    /// the other before they are given up.
    pub(super) fn patience(&self) -> Duration {
        let limits = [self.half_closed.get(), self.user_timeout.get()];
        let least = limits.into_iter().flatten().min().unwrap_or(PATIENCE_DEFAULT);
        least + self.grace(least)
    }

    /// How much longer than `limit` a peer without room may show nothing.
    ///
    /// Its kernel frees what a reader has read in lumps, as it came in: 128 KiB and more
    /// where the sender was quick, for which a reader of 4 kB a second takes half a
    /// minute. Until then all it says is that there is no room.
    fn grace(&self, limit: Duration) -> Duration {
        self.stalled.get().unwrap_or_default().saturating_sub(limit)
    }

    #[cold]
    fn first_byte(&mut self, now: Instant) {
        let after = match self.answer {
            FirstByteState::Awaited(since) => Some(now.saturating_duration_since(since)),
            _ => None,
        };
        self.answer = FirstByteState::Answered(now);
        self.meter.backend_answered(after, now);
    }

    /// The session is over.
    pub(super) fn over(&self) {
        if matches!(self.answer, FirstByteState::Awaited(_)) {
            self.meter.backend.count_unanswered(self.meter.worker.into());
        }
    }
}
