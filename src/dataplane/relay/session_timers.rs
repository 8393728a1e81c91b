//! Timeouts and counters of a relayed session.
//!
//! Owned by `engine`, the same for both engines. It touches no socket and reads no clock.

use super::handle::{SessionMeter, SessionTimeouts};
use crate::relay::close_state::TurnBytes;
use std::time::{Duration, Instant};
use tidegate_core::outcome::Cause;

/// Maximum age at which a session gets keepalive and user timeout on its backend connection.
/// Short sessions save these system calls. See [`liveness_after`].
const LIVENESS_AFTER_MAX: Duration = Duration::from_secs(10);

/// Flag in [`SessionTimers::last_queue`].
const PROGRESS_REQUESTED: u32 = 1 << 31;

/// Flag in [`SessionTimers::last_queue`].
const LIVENESS_SET: u32 = 1 << 30;

/// The flags in [`SessionTimers::last_queue`]. The rest is a length.
const QUEUE_FLAGS: u32 = PROGRESS_REQUESTED | LIVENESS_SET;

/// Time without a byte after which a session can be closed for its age before its last tenth
/// is over.
pub(super) const QUIET: Duration = Duration::from_secs(1);

/// Delivery timeout if neither `half_closed_timeout` nor `user_timeout` is set.
const DELIVERY_TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);

/// Timeouts and meter of a session. Idle sessions have one each, in a box.
#[derive(Debug)]
pub(super) struct SessionTimers {
    age: CompactTimeout,
    idle: CompactTimeout,
    half_closed: CompactTimeout,
    stalled: Seconds,
    keepalive: Seconds,
    user_timeout: CompactTimeout,
    pub(super) meter: SessionMeter,
    last_activity: Instant,
    pub(super) answer: FirstByteState,
    /// When the relay began.
    began: Instant,
    /// Length of the send queues at the last check, for sockets that show nothing else. The bit
    /// [`PROGRESS_REQUESTED`] is set if progress was requested since the last activity, and
    /// [`LIVENESS_SET`] once keepalive and user timeout are set on the backend connection.
    last_queue: u32,
}

// glibc's malloc places a box of this size in the gap that the alignment of a session's task
// (tokio: 128 bytes) leaves. With eight bytes more, an idle session used 128 bytes more in
// measurements.
const _: () = assert!(size_of::<SessionTimers>() <= 104);

/// The first bytes of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FirstByteState {
    /// No byte from either side, and how long this can last.
    Idle(CompactTimeout),
    /// The client sent its first byte at this time; the backend has not answered.
    Awaited(Instant),
    /// The backend sent its first byte at this time.
    Answered(Instant),
}

/// A timeout of 1 ms to 49 days in 4 bytes; 0 is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CompactTimeout(u32);

/// A timeout of 1 s to 18 h in 2 bytes, rounded up to seconds; 0 is off.
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

/// Returns the age at which keepalive and user timeout are set: half of the shorter one.
///
/// The kernel checks `TCP_USER_TIMEOUT` only when it retransmits, and it schedules that by the
/// value set at that time (tcp(7)).
fn liveness_after(keepalive: Option<Duration>, user_timeout: Option<Duration>) -> Duration {
    let either = [keepalive, user_timeout].into_iter().flatten();
    either.map(|limit| limit / 2).fold(LIVENESS_AFTER_MAX, Duration::min)
}

impl FirstByteState {
    /// No byte from either side, which can last.
    pub(super) const OFF: FirstByteState = FirstByteState::Idle(CompactTimeout(0));
}

impl SessionTimers {
    pub(super) fn new(limits: SessionTimeouts, meter: SessionMeter, now: Instant) -> SessionTimers {
        SessionTimers {
            age: limits.age.into(),
            idle: limits.idle.into(),
            half_closed: limits.half_closed.into(),
            stalled: limits.stalled.into(),
            keepalive: limits.keepalive.into(),
            user_timeout: limits.user_timeout.into(),
            meter,
            last_activity: now,
            answer: FirstByteState::Idle(limits.first_byte.into()),
            began: now,
            last_queue: 0,
        }
    }

    /// When a byte last moved, or when the relay began.
    pub(super) fn last_activity(&self) -> Instant {
        self.last_activity
    }

    /// Returns the timeout in force and its cause. Once one side has ended, only
    /// `half_closed_timeout` applies.
    fn limit(&self, half_closed: bool) -> Option<(Duration, Cause)> {
        if half_closed {
            return self.half_closed.get().map(|limit| (limit, Cause::HalfClosedTimeout));
        }
        let idle = self.idle.get().map(|limit| (limit, Cause::IdleTimeout));
        let first_byte = match self.answer {
            FirstByteState::Idle(limit) => limit.get(),
            _ => None,
        };
        let first_byte = first_byte.map(|limit| (limit, Cause::FirstByteTimeout));
        [first_byte, idle].into_iter().flatten().min_by_key(|(limit, _)| *limit)
    }

    /// Keepalive and user timeout of the backend connection.
    pub(super) fn liveness(&self) -> (Option<Duration>, Option<Duration>) {
        (self.keepalive.get(), self.user_timeout.get())
    }

    /// The timeout in force; `Duration::MAX` if none is set.
    pub(super) fn limit_now(&self, half_closed: bool) -> Duration {
        self.limit(half_closed).map_or(Duration::MAX, |(limit, _)| limit)
    }

    /// Returns the cause of the timeout that has passed since the last activity.
    pub(super) fn overdue(&self, half_closed: bool, now: Instant) -> Option<Cause> {
        let idle = now.saturating_duration_since(self.last_activity);
        self.limit(half_closed).filter(|(limit, _)| idle >= *limit).map(|(_, cause)| cause)
    }

    /// Returns true once, when keepalive and user timeout are due to be set.
    pub(super) fn take_liveness(&mut self, now: Instant) -> bool {
        let due = self.liveness_due().is_some_and(|due| due <= now);
        self.last_queue |= if due { LIVENESS_SET } else { 0 };
        due
    }

    /// When to set keepalive and user timeout on the backend connection; `None` once set.
    fn liveness_due(&self) -> Option<Instant> {
        let (keepalive, user_timeout) = self.liveness();
        let is_set = self.last_queue & LIVENESS_SET != 0;
        (!is_set).then(|| self.began + liveness_after(keepalive, user_timeout))
    }

    /// Returns when the session is closed for its age: as soon as it is quiet, and at the latest.
    fn ends(&self) -> Option<(Instant, Instant)> {
        let age = self.age.get()?;
        Some((self.began + (age - age / 10), self.began + age))
    }

    /// Whether the session is in the last tenth of its age and no byte has moved for a while.
    pub(super) fn is_quiet_at_end(&self, now: Instant) -> bool {
        let quiet = now.saturating_duration_since(self.last_activity) >= QUIET;
        quiet && self.ends().is_some_and(|(when_quiet, _)| when_quiet <= now)
    }

    /// Whether the session must be closed for its age.
    pub(super) fn is_too_old(&self, now: Instant) -> bool {
        self.is_quiet_at_end(now) || self.ends().is_some_and(|(_, latest)| latest <= now)
    }

    /// Returns when to check the timeouts next.
    pub(super) fn due(&self, half_closed: bool, now: Instant) -> Instant {
        let idle = self.limit(half_closed).map(|(limit, _)| self.last_activity + limit);
        // Check again in a day if all are off.
        let never = now + Duration::from_secs(86_400);
        let old = self
            .ends()
            .map(|(when_quiet, latest)| latest.min(when_quiet.max(self.last_activity + QUIET)));
        [idle, old, self.liveness_due()].into_iter().flatten().min().unwrap_or(never)
    }

    /// Counts the bytes of a turn and records activity and first bytes.
    #[inline]
    pub(super) fn account(&mut self, moved: &TurnBytes, now: Instant) {
        let ([asked, answered], [bytes_in, bytes_out]) = (moved.received, moved.sent);
        if asked | answered | bytes_in | bytes_out == 0 && !moved.ended {
            return;
        }
        self.last_activity = now;
        self.last_queue &= !PROGRESS_REQUESTED;
        self.count(moved);
        // If both sides sent bytes in one turn, their order is unknown.
        if asked != 0 && answered == 0 && matches!(self.answer, FirstByteState::Idle(_)) {
            self.answer = FirstByteState::Awaited(now);
            self.meter.client_spoke();
        }
        if answered != 0 && !matches!(self.answer, FirstByteState::Answered(_)) {
            self.first_byte(now);
        }
    }

    /// Counts sent bytes.
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

    /// Records that a peer acknowledged bytes `ago`. If the peer is `blocked` (full receive
    /// window), it can have read more than it shows.
    pub(super) fn note_acknowledged(
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

    /// Compares the length of a send queue with the last check, for sockets that show nothing
    /// else. Returns whether it has changed, which counts as activity.
    pub(super) fn note_queue(&mut self, queued: u64, now: Instant) -> bool {
        let queued = queued.min((!QUEUE_FLAGS).into()) as u32;
        let moved = self.last_queue & !QUEUE_FLAGS != queued;
        if moved {
            self.last_queue = queued | self.last_queue & LIVENESS_SET;
            self.last_activity = now;
        }
        moved
    }

    /// Whether progress can be requested: once after the last activity.
    pub(super) fn take_progress_request(&mut self) -> bool {
        let first = self.last_queue & PROGRESS_REQUESTED == 0;
        self.last_queue |= PROGRESS_REQUESTED;
        first
    }

    /// Time without progress after which the last bytes of a failed side are given up.
    pub(super) fn delivery_timeout(&self) -> Duration {
        let limits = [self.half_closed.get(), self.user_timeout.get()];
        let least = limits.into_iter().flatten().min().unwrap_or(DELIVERY_TIMEOUT_DEFAULT);
        least + self.grace(least)
    }

    /// Returns how much longer than `limit` a peer with a full receive window can show no
    /// progress.
    ///
    /// The peer's kernel frees received bytes in blocks of 128 KiB and more if the sender was
    /// fast. A reader of 4 kB/s takes half a minute per block. Until then the window is full.
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

    /// Counts a session that ended while the client waited for an answer.
    pub(super) fn ended(&self) {
        if matches!(self.answer, FirstByteState::Awaited(_)) {
            self.meter.backend.count_unanswered(self.meter.worker.into());
        }
    }
}
