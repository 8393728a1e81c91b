//! The roles of the nodes of a database, and which of several primaries is in force.
//!
//! Called by the controller. Probes find the role of a node, and a pool with
//! `role = "primary"` or `"replica"` needs one. A node whose role is unknown has none.
//!
//! # Several primaries
//!
//! Writes to two primaries make two histories of the data, of which one is lost. So at most
//! one primary is in force:
//!
//! 1. The node that this process has seen change from replica to primary last. A failover
//!    manager has promoted it. A former primary that returns as a primary, before the manager
//!    demotes it, has kept the age of its role and is not in force.
//! 2. If none was seen to be promoted: the node that was the first one seen as primary, if it was
//!    the only one for the pool's `startup_grace`. A new node that starts as an empty
//!    primary is not in force.
//! 3. Otherwise none.

use crate::model::NodeRole;
use std::time::{Duration, Instant};

/// The role of a node, as probes have seen it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeenRole {
    /// The newest role.
    pub role: NodeRole,
    /// When a probe found this role first, without another role since then.
    pub since: Instant,
    /// Another role was seen before.
    pub changed: bool,
}

/// The role that the pool of a backend needs, and the rank of the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoleFit {
    /// Role that the pool needs; `None`: any.
    pub needed: Option<NodeRole>,
    /// It is a primary, but not the one in force.
    pub outranked: bool,
}

/// Returns the position of the primary in force among `primaries`, which are the nodes of
/// one pool that are seen as primary and are not down.
pub fn in_force(primaries: &[SeenRole], startup_grace: Duration) -> Option<usize> {
    if primaries.len() < 2 {
        return primaries.first().map(|_| 0);
    }
    let numbered = || primaries.iter().enumerate();
    let promoted = numbered().filter(|(_, one)| one.changed).max_by_key(|(_, one)| one.since);
    if let Some((place, last)) = promoted {
        let alone = numbered()
            .all(|(other, one)| other == place || !one.changed || one.since != last.since);
        return alone.then_some(place);
    }
    let (place, first) = numbered().min_by_key(|(_, one)| one.since)?;
    let settled = |one: &SeenRole| one.since.duration_since(first.since) >= startup_grace;
    numbered().all(|(other, one)| other == place || settled(one)).then_some(place)
}

// === impl SeenRole ===

impl SeenRole {
    /// Returns what is known after a probe has found `role`.
    pub fn next(before: Option<SeenRole>, role: NodeRole, now: Instant) -> SeenRole {
        match before {
            Some(same) if same.role == role => same,
            other => SeenRole { role, since: now, changed: other.is_some() },
        }
    }
}

// === impl RoleFit ===

impl RoleFit {
    /// Whether a backend with this role has the one that its pool needs.
    pub fn fits(&self, seen: Option<SeenRole>) -> bool {
        let has = |role| seen.is_some_and(|seen| seen.role == role) && !self.outranked;
        self.needed.is_none_or(has)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(3);

    fn primary(now: Instant, at: u64, changed: bool) -> SeenRole {
        SeenRole { role: NodeRole::Primary, since: now + Duration::from_secs(at), changed }
    }

    #[test]
    fn only_primary_is_in_force() {
        let now = tidegate_net::clock::now();
        assert_eq!(in_force(&[], GRACE), None);
        assert_eq!(in_force(&[primary(now, 0, false)], GRACE), Some(0));
    }

    #[test]
    fn primary_that_was_promoted_last_is_in_force() {
        let now = tidegate_net::clock::now();
        let former = primary(now, 0, false);
        let (first, second) = (primary(now, 50, true), primary(now, 60, true));
        assert_eq!(in_force(&[former, first], GRACE), Some(1), "a former primary returned");
        assert_eq!(in_force(&[second, first, former], GRACE), Some(0));
        assert_eq!(in_force(&[second, second], GRACE), None, "neither was promoted later");
        let newcomer = primary(now, 99, false);
        assert_eq!(in_force(&[newcomer, first], GRACE), Some(1), "a new node starts as primary");
    }

    #[test]
    fn of_primaries_never_seen_promoted_only_the_settled_one_is_in_force() {
        let now = tidegate_net::clock::now();
        let (old, near, late) =
            (primary(now, 0, false), primary(now, 2, false), primary(now, 3, false));
        assert_eq!(in_force(&[old, near], GRACE), None, "both were primaries at the start");
        assert_eq!(in_force(&[late, old], GRACE), Some(1));
        assert_eq!(in_force(&[late, old, near], GRACE), None);
    }

    #[test]
    fn role_keeps_its_age_until_another_role_is_seen() {
        let now = tidegate_net::clock::now();
        let later = now + GRACE;
        let first = SeenRole::next(None, NodeRole::Replica, now);
        assert_eq!(SeenRole::next(Some(first), NodeRole::Replica, later), first);
        let promoted = SeenRole::next(Some(first), NodeRole::Primary, later);
        assert_eq!((promoted.since, promoted.changed), (later, true));
    }

    #[test]
    fn backend_of_unknown_role_fits_no_role() {
        let now = tidegate_net::clock::now();
        let seen = Some(primary(now, 0, false));
        let mut fit = RoleFit::default();
        assert!(fit.fits(None), "the pool needs no role");
        fit.needed = Some(NodeRole::Primary);
        assert!(!fit.fits(None));
        assert!(fit.fits(seen));
        fit.outranked = true;
        assert!(!fit.fits(seen));
        fit.needed = None;
        assert!(fit.fits(seen), "a pool without a role ignores the rank");
    }
}
