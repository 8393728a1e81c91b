//! Which open sessions an operator asks for, and what the answer shows of each.
//!
//! `daemon` passes a [`SessionQuery`] to each worker. The worker offers its sessions to a
//! [`SessionSelection`], and `daemon` merges the [`SessionList`]s. Pure.

use crate::model::ClientAddr;
use crate::outcome::{Cause, Phase};
use ipnet::IpNet;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Most sessions of one answer.
pub const SESSION_LIST_MAX: usize = 1_000;

/// Which sessions, in which order, and how many of them.
#[derive(Debug, Clone, Default)]
pub struct SessionQuery {
    /// Which sessions match.
    pub filter: SessionFilter,
    /// Which of them are listed first.
    pub order: SessionOrder,
    /// How many are listed, at most [`SESSION_LIST_MAX`].
    pub limit: usize,
}

/// Conditions on a session. All must hold; a missing one holds for every session.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SessionFilter {
    /// Name of the frontend.
    pub frontend: Option<String>,
    /// Name of the pool.
    pub pool: Option<String>,
    /// Name of the backend.
    pub backend: Option<String>,
    /// Names of backends.
    pub backends: Option<HashSet<String>>,
    /// Range of the client's address.
    pub client: Option<IpNet>,
    /// Smallest age.
    pub older: Option<Duration>,
    /// Smallest time without a byte.
    pub idle: Option<Duration>,
    /// Smallest number of bytes, both directions together.
    pub bytes: Option<u64>,
    /// Numbers of sessions.
    pub numbers: Option<HashSet<u64>>,
}

/// Which sessions are listed first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SessionOrder {
    /// The oldest.
    #[default]
    Age,
    /// Those without a byte for the longest time.
    Idle,
    /// Those with the most bytes.
    Bytes,
}

/// An open session, as far as its conditions and its order need it.
#[derive(Debug, Clone, Copy)]
pub struct SessionFacts<'s> {
    /// Its number.
    pub number: u64,
    /// Its client, announced by a PROXY header if there is one.
    pub client: ClientAddr,
    /// Name of its frontend.
    pub frontend: &'s Arc<str>,
    /// Names of its pool and its backend; `None` before it is connected.
    pub backend: Option<(&'s Arc<str>, &'s Arc<str>)>,
    /// Its phase; `None` before it is connected.
    pub phase: Option<Phase>,
    /// Its figures.
    pub figures: SessionFigures,
}

/// Ages and bytes of a session.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionFigures {
    /// Time since its accept.
    pub age: Duration,
    /// Time since its last byte, or since its accept.
    pub idle: Duration,
    /// Bytes from the client.
    pub bytes_in: u64,
    /// Bytes to the client.
    pub bytes_out: u64,
}

/// A listed session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedSession {
    /// See [`SessionFacts`].
    pub number: u64,
    /// Number of its worker.
    pub worker: usize,
    /// See [`SessionFacts`].
    pub client: ClientAddr,
    /// See [`SessionFacts`].
    pub frontend: Arc<str>,
    /// See [`SessionFacts`].
    pub backend: Option<(Arc<str>, Arc<str>)>,
    /// See [`SessionFacts`].
    pub phase: Option<Phase>,
    /// See [`SessionFacts`].
    pub figures: SessionFigures,
}

/// The answer of a worker, or of all.
#[derive(Debug, Default)]
pub struct SessionList {
    /// Open sessions that were examined.
    pub open: u64,
    /// Those that match.
    pub matched: u64,
    /// The first of them, in the order of the query.
    pub sessions: Vec<ListedSession>,
}

/// Sessions that an operator wants to end, for all workers.
#[derive(Debug)]
pub struct SessionsToEnd {
    /// Their numbers.
    pub numbers: HashSet<u64>,
    /// The cause of their end.
    pub cause: Cause,
    /// Only sessions without a byte for this time are ended.
    pub idle: Duration,
    /// How many of them are still to be ended.
    left: AtomicU64,
}

/// What ended of the sessions that an operator wants to end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionsEnded {
    /// Sessions that were ended.
    pub ended: u64,
    /// Sessions that stay, because bytes are on their way or no backend is connected.
    pub busy: u64,
    /// Sessions that stay, because they are no longer idle.
    pub spoke: u64,
    /// Whether sessions are left to examine.
    pub more: bool,
}

/// Selects the first sessions of a query, one session after the other.
#[derive(Debug)]
pub struct SessionSelection {
    query: Arc<SessionQuery>,
    worker: usize,
    open: u64,
    matched: u64,
    /// At most `query.limit`; the last one in the order of the query is on top.
    first: BinaryHeap<Reverse<RankedSession>>,
}

#[derive(Debug)]
struct RankedSession {
    rank: Rank,
    session: ListedSession,
}

/// A session's place: by the order of the query, then by number.
type Rank = (u128, Reverse<u64>);

// === impl SessionFilter ===

impl SessionFilter {
    /// Whether a session fulfils every condition.
    pub fn matches(&self, session: &SessionFacts<'_>) -> bool {
        let names = |wanted: &Option<String>, name: Option<&Arc<str>>| {
            wanted.as_ref().is_none_or(|wanted| name.is_some_and(|name| **name == **wanted))
        };
        let (pool, backend) = session.backend.unzip();
        self.numbers.as_ref().is_none_or(|numbers| numbers.contains(&session.number))
            && self.older.is_none_or(|least| session.figures.age >= least)
            && self.idle.is_none_or(|least| session.figures.idle >= least)
            && self.bytes.is_none_or(|least| session.figures.bytes() >= least)
            && self
                .client
                .is_none_or(|range| session.client.ip().is_some_and(|ip| range.contains(&ip)))
            && names(&self.frontend, Some(session.frontend))
            && names(&self.pool, pool)
            && names(&self.backend, backend)
            && self
                .backends
                .as_ref()
                .is_none_or(|wanted| backend.is_some_and(|name| wanted.contains(&**name)))
    }
}

// === impl SessionFigures ===

impl SessionFigures {
    fn bytes(&self) -> u64 {
        self.bytes_in.saturating_add(self.bytes_out)
    }

    fn rank(&self, order: SessionOrder, number: u64) -> Rank {
        let by = match order {
            SessionOrder::Age => self.age.as_nanos(),
            SessionOrder::Idle => self.idle.as_nanos(),
            SessionOrder::Bytes => self.bytes().into(),
        };
        (by, Reverse(number))
    }
}

// === impl ListedSession ===

impl ListedSession {
    fn new(facts: &SessionFacts<'_>, worker: usize) -> ListedSession {
        let SessionFacts { number, client, frontend, backend, phase, figures } = *facts;
        let backend = backend.map(|(pool, name)| (Arc::clone(pool), Arc::clone(name)));
        let frontend = Arc::clone(frontend);
        ListedSession { number, worker, client, frontend, backend, phase, figures }
    }
}

// === impl SessionsToEnd ===

impl SessionsToEnd {
    /// Any `most` of these sessions.
    pub fn new(numbers: HashSet<u64>, cause: Cause, most: u64) -> SessionsToEnd {
        SessionsToEnd { numbers, cause, idle: Duration::ZERO, left: AtomicU64::new(most) }
    }

    /// Only those without a byte for this time.
    pub fn idle_for(self, idle: Duration) -> SessionsToEnd {
        SessionsToEnd { idle, ..self }
    }

    /// Counts a session that is being ended. Returns false if enough are.
    pub fn take(&self) -> bool {
        let fewer = |left: u64| left.checked_sub(1);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer).is_ok()
    }
}

// === impl SessionSelection ===

impl SessionSelection {
    /// Returns a selection of the sessions of a worker.
    pub fn new(query: Arc<SessionQuery>, worker: usize) -> SessionSelection {
        SessionSelection { query, worker, open: 0, matched: 0, first: BinaryHeap::new() }
    }

    /// Examines a session.
    pub fn offer(&mut self, session: &SessionFacts<'_>) {
        self.open += 1;
        if !self.query.filter.matches(session) {
            return;
        }
        self.matched += 1;
        let rank = session.figures.rank(self.query.order, session.number);
        let limit = self.query.limit.min(SESSION_LIST_MAX);
        if self.first.len() >= limit {
            match self.first.peek() {
                Some(Reverse(last)) if last.rank < rank => self.first.pop(),
                _ => return,
            };
        }
        let session = ListedSession::new(session, self.worker);
        self.first.push(Reverse(RankedSession { rank, session }));
    }

    /// Returns the selected sessions, the first one first.
    pub fn finish(self) -> SessionList {
        let SessionSelection { open, matched, first, .. } = self;
        // The greatest rank has the smallest `Reverse`, so it is first.
        let sorted = first.into_sorted_vec();
        let sessions = sorted.into_iter().map(|Reverse(ranked)| ranked.session).collect();
        SessionList { open, matched, sessions }
    }
}

// === impl SessionList ===

impl SessionList {
    /// Joins the lists of all workers.
    pub fn merge(
        lists: impl IntoIterator<Item = SessionList>,
        query: &SessionQuery,
    ) -> SessionList {
        let mut all = SessionList::default();
        for SessionList { open, matched, sessions } in lists {
            all.open += open;
            all.matched += matched;
            all.sessions.extend(sessions);
        }
        all.sessions
            .sort_by_key(|session| Reverse(session.figures.rank(query.order, session.number)));
        all.sessions.truncate(query.limit.min(SESSION_LIST_MAX));
        all
    }
}

impl PartialEq for RankedSession {
    fn eq(&self, other: &RankedSession) -> bool {
        self.rank == other.rank
    }
}

impl Eq for RankedSession {}

impl PartialOrd for RankedSession {
    fn partial_cmp(&self, other: &RankedSession) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for RankedSession {
    fn cmp(&self, other: &RankedSession) -> std::cmp::Ordering {
        self.rank.cmp(&other.rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn client(text: &str) -> ClientAddr {
        ClientAddr::announced(text.parse().unwrap())
    }

    fn facts<'s>(number: u64, frontend: &'s Arc<str>, pool: &'s Arc<str>) -> SessionFacts<'s> {
        SessionFacts {
            number,
            client: client("10.1.2.3:4000"),
            frontend,
            backend: Some((pool, pool)),
            phase: Some(Phase::Data),
            figures: SessionFigures {
                age: Duration::from_secs(number),
                idle: Duration::from_secs(5),
                bytes_in: 10,
                bytes_out: 20,
            },
        }
    }

    #[test]
    fn every_condition_of_a_filter_must_hold() {
        let (web, pool): (Arc<str>, Arc<str>) = ("web".into(), "app".into());
        let session = facts(60, &web, &pool);
        let name = |name: &str| Some(name.to_owned());
        let all = SessionFilter {
            frontend: name("web"),
            pool: name("app"),
            backends: Some(HashSet::from(["app".to_owned(), "other".to_owned()])),
            backend: name("app"),
            client: Some("10.1.0.0/16".parse().unwrap()),
            older: Some(Duration::from_secs(60)),
            idle: Some(Duration::from_secs(5)),
            bytes: Some(30),
            numbers: Some(HashSet::from([60])),
        };
        assert!(all.matches(&session) && SessionFilter::default().matches(&session));
        let wrong = [
            SessionFilter { frontend: name("x"), ..all.clone() },
            SessionFilter { pool: name("x"), ..all.clone() },
            SessionFilter { backend: name("x"), ..all.clone() },
            SessionFilter { client: Some("10.2.0.0/16".parse().unwrap()), ..all.clone() },
            SessionFilter { older: Some(Duration::from_secs(61)), ..all.clone() },
            SessionFilter { idle: Some(Duration::from_secs(6)), ..all.clone() },
            SessionFilter { bytes: Some(31), ..all.clone() },
            SessionFilter { numbers: Some(HashSet::from([61])), ..all.clone() },
        ];
        assert!(wrong.iter().all(|filter| !filter.matches(&session)));
        let connecting = SessionFacts { backend: None, phase: None, ..session };
        assert!(!all.matches(&connecting), "a session without a backend is in no pool");
    }

    proptest! {
        #[test]
        fn workers_together_list_the_first_sessions_in_order(
            workers in prop::collection::vec(prop::collection::vec((0u64..50, 0u64..50, 0u64..50), 0..30), 1..4),
            limit in 0usize..40,
            order in prop::sample::select(vec![SessionOrder::Age, SessionOrder::Idle, SessionOrder::Bytes]),
        ) {
            let (web, pool): (Arc<str>, Arc<str>) = ("web".into(), "app".into());
            let filter = SessionFilter { older: Some(Duration::from_secs(10)), ..SessionFilter::default() };
            let query = Arc::new(SessionQuery { filter, order, limit });
            let (mut all, mut lists, mut number) = (Vec::new(), Vec::new(), 0);
            for (worker, sessions) in workers.iter().enumerate() {
                let mut selection = SessionSelection::new(Arc::clone(&query), worker);
                for (age, idle, bytes) in sessions {
                    number += 1;
                    let figures = SessionFigures {
                        age: Duration::from_secs(*age),
                        idle: Duration::from_secs(*idle),
                        bytes_in: *bytes,
                        bytes_out: 0,
                    };
                    let one = SessionFacts { figures, ..facts(number, &web, &pool) };
                    selection.offer(&one);
                    all.push((match order {
                        SessionOrder::Age => *age,
                        SessionOrder::Idle => *idle,
                        SessionOrder::Bytes => *bytes,
                    }, *age, number));
                }
                lists.push(selection.finish());
            }
            let open = all.len() as u64;
            all.retain(|(_, age, _)| *age >= 10);
            all.sort_by_key(|(by, _, number)| (Reverse(*by), *number));
            let merged = SessionList::merge(lists, &query);
            prop_assert_eq!((merged.open, merged.matched), (open, all.len() as u64));
            let listed: Vec<u64> = merged.sessions.iter().map(|one| one.number).collect();
            let wanted: Vec<u64> = all.iter().take(limit).map(|(.., number)| *number).collect();
            prop_assert_eq!(listed, wanted);
        }
    }
}
