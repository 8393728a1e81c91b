//! Logs state changes of backends, with a rate limit per pool.
//!
//! Owned by `telemetry`, which passes it every change. The number of suppressed changes is
//! logged after each second. Status, metrics and the history of a backend contain all
//! changes.
//!
//! Each pool has two limits: one for changes to `down`, `ejected` or `suspect`, and one
//! for all others. So neither another pool nor many new backends suppress the log line of
//! a failure.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::health::Transition;

/// Lines of one kind per pool and [`WINDOW`].
const LINES_MAX: u32 = 50;

const WINDOW: Duration = Duration::from_secs(1);

const NOT_LOGGED: &str = "backend state changes not logged because of the rate limit per pool";

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct TransitionLog {
    /// The current windows. Key: pool, and whether the change is a failure.
    windows: BTreeMap<(Arc<str>, bool), LogWindow>,
    /// When the oldest window ends.
    over_at: Option<Instant>,
    unlogged: u64,
}

#[derive(Debug)]
struct LogWindow {
    since: Instant,
    lines: u32,
    more: u64,
}

/// Changes that were not logged in a window.
#[derive(Debug, PartialEq, Eq)]
struct SuppressedChanges {
    pool: Arc<str>,
    bad: bool,
    count: u64,
}

// === impl TransitionLog ===

impl TransitionLog {
    /// Logs a change; at level `debug` if the limit of its pool is reached.
    pub(super) fn log(&mut self, transition: &Transition, now: Instant) {
        self.log_suppressed(now);
        let bad = matches!(transition.to, "down" | "ejected" | "suspect");
        if self.admit(&transition.pool, bad, now) {
            write(transition, bad);
        } else {
            let Transition { pool, backend, from, to, reason, .. } = transition;
            tracing::debug!(%pool, %backend, from, to, reason, "backend state changed");
        }
    }

    /// Logs the number of suppressed changes of ended windows.
    pub(super) fn log_suppressed(&mut self, now: Instant) {
        for SuppressedChanges { pool, bad, count } in self.over(now) {
            if bad {
                tracing::warn!(%pool, severity = "bad", suppressed = count, "{NOT_LOGGED}");
            } else {
                tracing::info!(%pool, severity = "other", suppressed = count, "{NOT_LOGGED}");
            }
        }
    }

    /// Returns when [`TransitionLog::log_suppressed`] is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.over_at
    }

    /// Returns the total number of suppressed changes.
    pub(super) fn unlogged(&self) -> u64 {
        self.unlogged
    }

    fn admit(&mut self, pool: &Arc<str>, bad: bool, now: Instant) -> bool {
        let fresh = LogWindow { since: now, lines: 0, more: 0 };
        let window = self.windows.entry((Arc::clone(pool), bad)).or_insert(fresh);
        self.over_at.get_or_insert(window.since + WINDOW);
        if window.lines < LINES_MAX {
            window.lines += 1;
            return true;
        }
        window.more += 1;
        self.unlogged += 1;
        false
    }

    fn over(&mut self, now: Instant) -> Vec<SuppressedChanges> {
        if self.over_at.is_none_or(|at| now < at) {
            return Vec::new();
        }
        let mut ended = Vec::new();
        self.windows.retain(|(pool, bad), window| {
            let lasts = now.saturating_duration_since(window.since) < WINDOW;
            if !lasts && window.more > 0 {
                ended.push(SuppressedChanges {
                    pool: Arc::clone(pool),
                    bad: *bad,
                    count: window.more,
                });
            }
            lasts
        });
        self.over_at = self.windows.values().map(|window| window.since + WINDOW).min();
        ended
    }
}

fn write(transition: &Transition, bad: bool) {
    let Transition { pool, backend, from, to, reason, lasted, .. } = transition;
    let lasted = humantime::format_duration(Duration::from_millis(lasted.as_millis() as u64));
    if bad {
        tracing::warn!(%pool, %backend, from, to, reason, after = %lasted, "backend state changed");
    } else {
        tracing::info!(%pool, %backend, from, to, reason, after = %lasted, "backend state changed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admitted(log: &mut TransitionLog, pool: &str, bad: bool, now: Instant) -> u32 {
        let pool: Arc<str> = pool.into();
        (0..1000).map(|_| u32::from(log.admit(&pool, bad, now))).sum()
    }

    #[test]
    fn pool_logs_50_lines_per_second_and_the_number_of_suppressed_changes() {
        let (mut log, start) = (TransitionLog::default(), tidegate_net::clock::now());
        for second in 0..3 {
            let now = start + WINDOW * second;
            let ended = log.over(now);
            let more = SuppressedChanges {
                pool: "web".into(),
                bad: false,
                count: 1000 - u64::from(LINES_MAX),
            };
            assert_eq!(ended, if second == 0 { vec![] } else { vec![more] });
            assert_eq!(admitted(&mut log, "web", false, now), LINES_MAX);
            assert_eq!(log.due(), Some(now + WINDOW));
        }
        assert_eq!(log.unlogged(), 3 * (1000 - u64::from(LINES_MAX)));
    }

    #[test]
    fn failure_is_logged_despite_many_new_backends_and_other_pools() {
        let (mut log, now) = (TransitionLog::default(), tidegate_net::clock::now());
        admitted(&mut log, "web", false, now);
        admitted(&mut log, "other", true, now);
        assert_eq!(admitted(&mut log, "web", true, now), LINES_MAX);
    }

    #[test]
    fn window_without_suppressed_changes_ends_without_a_log_line() {
        let (mut log, now) = (TransitionLog::default(), tidegate_net::clock::now());
        log.admit(&"web".into(), true, now);
        assert_eq!(log.over(now + WINDOW), []);
        assert_eq!((log.due(), log.windows.len()), (None, 0));
    }
}
