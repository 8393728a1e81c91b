//! Writes changes of standing to the log, and no more of them than can be read.
//!
//! The control loop owns one and gives it every change. What is not written is
//! counted and its number said; nothing is held back from status, metrics or a
//! backend's own history.
//!
//! Each pool has its own budget, and within a pool bad news and other news have
//! one each: neither a neighbour that goes mad nor a thousand newcomers hide a
//! death.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::health::Transition;

/// Lines of one kind for one pool within [`WINDOW`]: more than anybody reads
/// while it happens, little enough for any log.
const LINES_MAX: u32 = 50;

const WINDOW: Duration = Duration::from_secs(1);

const NOT_LOGGED: &str = "backend state changes not logged because of the rate limit per pool";

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct TransitionLog {
    /// One while its second lasts, by pool and by whether the news are bad.
    windows: BTreeMap<(Arc<str>, bool), LogWindow>,
    /// When the oldest of them is over.
    over_at: Option<Instant>,
    unlogged: u64,
}

#[derive(Debug)]
struct LogWindow {
    since: Instant,
    lines: u32,
    more: u64,
}

/// What a pool's second has left out.
#[derive(Debug, PartialEq, Eq)]
struct SuppressedChanges {
    pool: Arc<str>,
    bad: bool,
    count: u64,
}

// === impl TransitionLog ===

impl TransitionLog {
    /// Writes it, if its pool has a line left.
    pub(super) fn log(&mut self, transition: &Transition, now: Instant) {
        self.log_suppressed(now);
        let bad = matches!(transition.to, "down" | "ejected" | "suspect");
        if self.admit(&transition.pool, bad, now) {
            write(transition, bad);
        }
    }

    /// Says what was left out in seconds that are over.
    pub(super) fn log_suppressed(&mut self, now: Instant) {
        for SuppressedChanges { pool, bad, count } in self.over(now) {
            if bad {
                tracing::warn!(%pool, severity = "bad", suppressed = count, "{NOT_LOGGED}");
            } else {
                tracing::info!(%pool, severity = "other", suppressed = count, "{NOT_LOGGED}");
            }
        }
    }

    /// When [`TransitionLog::log_suppressed`] may have something to say.
    pub(super) fn due(&self) -> Option<Instant> {
        self.over_at
    }

    /// Changes not written so far.
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
        let mut said = Vec::new();
        self.windows.retain(|(pool, bad), window| {
            let lasts = now.saturating_duration_since(window.since) < WINDOW;
            if !lasts && window.more > 0 {
                said.push(SuppressedChanges {
                    pool: Arc::clone(pool),
                    bad: *bad,
                    count: window.more,
                });
            }
            lasts
        });
        self.over_at = self.windows.values().map(|window| window.since + WINDOW).min();
        said
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
    fn a_pool_writes_so_many_lines_a_second_and_says_how_many_more_there_were() {
        let (mut log, start) = (TransitionLog::default(), tidegate_net::clock::now());
        for second in 0..3 {
            let now = start + WINDOW * second;
            let said = log.over(now);
            let more = SuppressedChanges {
                pool: "web".into(),
                bad: false,
                count: 1000 - u64::from(LINES_MAX),
            };
            assert_eq!(said, if second == 0 { vec![] } else { vec![more] });
            assert_eq!(admitted(&mut log, "web", false, now), LINES_MAX);
            assert_eq!(log.due(), Some(now + WINDOW));
        }
        assert_eq!(log.unlogged(), 3 * (1000 - u64::from(LINES_MAX)));
    }

    #[test]
    fn newcomers_and_neighbours_hide_no_death() {
        let (mut log, now) = (TransitionLog::default(), tidegate_net::clock::now());
        admitted(&mut log, "web", false, now);
        admitted(&mut log, "mad", true, now);
        assert_eq!(admitted(&mut log, "web", true, now), LINES_MAX);
    }

    #[test]
    fn source_with_nothing_suppressed_logs_nothing_and_is_forgotten() {
        let (mut log, now) = (TransitionLog::default(), tidegate_net::clock::now());
        log.admit(&"web".into(), true, now);
        assert_eq!(log.over(now + WINDOW), []);
        assert_eq!((log.due(), log.windows.len()), (None, 0));
    }
}
