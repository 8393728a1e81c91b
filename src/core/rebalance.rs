//! How many sessions each backend of a pool has above its share. A rebalance closes that many,
//! so that their clients connect again and are spread by the policy.
//!
//! Called by `daemon` with the sessions and the shares of one pool. Pure.

use std::sync::Arc;

/// Sessions and share of a backend that gets new sessions.
#[derive(Debug, Clone, PartialEq)]
pub struct BackendLoad {
    /// Its name.
    pub name: Arc<str>,
    /// Its open sessions.
    pub sessions: u64,
    /// Its share of new sessions over time, from 0 to 1.
    pub share: f64,
}

/// A backend of a rebalance.
#[derive(Debug, Clone, PartialEq)]
pub struct BackendExcess {
    /// Its name.
    pub name: Arc<str>,
    /// Its open sessions.
    pub sessions: u64,
    /// Its share of `total`, in sessions.
    pub target: f64,
    /// Sessions above `target` and the tolerance.
    pub excess: u64,
}

/// Compares every backend with its share of `total` sessions. Up to `target * (1 + tolerance)`
/// sessions, rounded up, are no excess.
///
/// `total` is the number of sessions when the rebalance began. With the current number, the targets
/// would fall with every closed session, and clients that do not connect again would make it close
/// more and more of them.
pub fn excess_of(loads: &[BackendLoad], total: u64, tolerance: f64) -> Vec<BackendExcess> {
    let compare = |load: &BackendLoad| {
        let target = total as f64 * load.share;
        // Without a rounding error, 50 sessions and 10 % are exactly 55.
        let most = (target * (1.0 + tolerance) - 1e-6).ceil() as u64;
        let excess = load.sessions.saturating_sub(most);
        BackendExcess { name: Arc::clone(&load.name), sessions: load.sessions, target, excess }
    };
    loads.iter().map(compare).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loads(sessions: &[u64]) -> Vec<BackendLoad> {
        let share = 1.0 / sessions.len() as f64;
        let load = |(at, sessions): (usize, &u64)| BackendLoad {
            name: format!("b{at}").into(),
            sessions: *sessions,
            share,
        };
        sessions.iter().enumerate().map(load).collect()
    }

    fn excesses(sessions: &[u64], total: u64, tolerance: f64) -> Vec<u64> {
        excess_of(&loads(sessions), total, tolerance).iter().map(|one| one.excess).collect()
    }

    #[test]
    fn backends_above_their_share_and_the_tolerance_have_an_excess() {
        // 2,000 sessions on four of six backends: 333.3 each, up to 367 with 10 %.
        assert_eq!(excesses(&[500, 500, 500, 500, 0, 0], 2_000, 0.1), [133, 133, 133, 133, 0, 0]);
        assert_eq!(excesses(&[367, 366, 334, 333, 300, 300], 2_000, 0.1), [0; 6]);
        assert_eq!(excesses(&[2, 1, 0], 3, 0.0), [1, 0, 0]);
        assert_eq!(excesses(&[], 0, 0.1), [0; 0]);
    }

    #[test]
    fn clients_that_do_not_return_are_not_the_reason_for_more_closed_sessions() {
        let before = excesses(&[100, 0], 100, 0.1);
        assert_eq!(before, [45, 0]);
        // All of them were closed, and no client has connected again.
        assert_eq!(excesses(&[55, 0], 100, 0.1), [0, 0]);
    }

    #[test]
    fn shares_follow_the_weights() {
        let mut two = loads(&[60, 40]);
        (two[0].share, two[1].share) = (0.25, 0.75);
        let excess = excess_of(&two, 100, 0.1);
        assert_eq!((excess[0].target, excess[0].excess, excess[1].excess), (25.0, 32, 0));
    }
}
