//! Tests of the view: each guard by itself. `tests/model.rs` compares it with a model.

mod bounds;
mod kept;
mod keys;
mod model;
mod overlap;
mod pool;
mod removal;
mod window;
mod wishes;

use super::*;
use crate::discovery::{Announced, Wish};
use crate::model::{AnnouncedWeights, CriticalRule, EmptyAnswer};
use std::collections::BTreeSet;
use tidegate_net::clock;

/// What the host knows: addresses that are up, and those that are eligible.
#[derive(Debug, Default, Clone)]
pub(super) struct Seen {
    up: BTreeSet<SocketAddr>,
    eligible: BTreeSet<SocketAddr>,
    /// Addresses that other sources list, too.
    shared: BTreeSet<SocketAddr>,
}

impl LocalSight for Seen {
    fn is_up(&self, address: SocketAddr) -> bool {
        self.up.contains(&address)
    }

    fn is_eligible(&self, address: SocketAddr) -> bool {
        self.eligible.contains(&address)
    }

    fn is_listed_elsewhere(&self, address: SocketAddr) -> bool {
        self.shared.contains(&address)
    }

    fn has_eligible_outside(&self, lists: &dyn Fn(SocketAddr) -> bool) -> bool {
        self.shared.intersection(&self.eligible).any(|address| !lists(*address))
    }
}

/// A view, its time, and what this host sees.
pub(super) struct Bench {
    view: View,
    now: Instant,
    sight: Seen,
}

pub(super) fn guards() -> ViewGuards {
    ViewGuards {
        empty: EmptyAnswer::Confirm,
        max_removed: 50,
        confirm_after: secs(10),
        hold_empty: Duration::ZERO,
        min_backends: 1,
        missing: 1,
        overlap: secs(10),
        stale_for: None,
        backends_max: 1000,
        weight_max: 100,
        weights: AnnouncedWeights::Use,
        addresses: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()],
        critical: CriticalRule::Drain,
    }
}

pub(super) fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// `10.0.0.N:80`
pub(super) fn at(number: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, number], 80))
}

/// Member `N` with the name `sN`.
pub(super) fn one(number: u8) -> Announced {
    Announced {
        name: format!("s{number}").into(),
        address: at(number),
        weight: None,
        tier: 0,
        wish: Wish::Sessions,
        raw: "".into(),
        labels: Default::default(),
    }
}

pub(super) fn with_wish(number: u8, wish: Wish) -> Announced {
    Announced { wish, ..one(number) }
}

pub(super) fn set_of(members: impl IntoIterator<Item = Announced>) -> WholeSet {
    let members = members.into_iter().collect();
    WholeSet {
        members,
        version: "index 1".to_owned(),
        trusted: true,
        unreadable: Unreadable::default(),
        keys: [].into(),
    }
}

impl Bench {
    pub(super) fn new(guards: ViewGuards) -> Bench {
        let now = clock::now();
        Bench { view: View::new(guards), now, sight: Seen::default() }
    }

    /// With members 1..=`count`, all up and eligible, in an accepted view.
    pub(super) fn with(guards: ViewGuards, count: u8) -> Bench {
        let mut bench = Bench::new(guards);
        bench.tell(1..=count);
        bench.up(1..=count);
        bench.pass(secs(1));
        bench.tell(1..=count);
        assert_eq!(bench.addresses(), (1..=count).collect::<Vec<_>>());
        bench
    }

    pub(super) fn up(&mut self, numbers: impl IntoIterator<Item = u8>) {
        for number in numbers {
            self.sight.up.insert(at(number));
            self.sight.eligible.insert(at(number));
        }
    }

    pub(super) fn down(&mut self, numbers: impl IntoIterator<Item = u8>) {
        for number in numbers {
            self.sight.up.remove(&at(number));
            self.sight.eligible.remove(&at(number));
        }
    }

    pub(super) fn take(&mut self, told: &Told) -> bool {
        self.view.take(told, self.now, &self.sight)
    }

    pub(super) fn whole(&mut self, members: impl IntoIterator<Item = Announced>) -> bool {
        self.take(&Told::Whole(set_of(members)))
    }

    /// A trusted set of these members.
    pub(super) fn tell(&mut self, numbers: impl IntoIterator<Item = u8>) -> bool {
        self.whole(numbers.into_iter().map(one))
    }

    /// The same from a source that is not current.
    pub(super) fn tell_untrusted(&mut self, numbers: impl IntoIterator<Item = u8>) -> bool {
        let set = set_of(numbers.into_iter().map(one));
        self.take(&Told::Whole(WholeSet { trusted: false, ..set }))
    }

    pub(super) fn fail(&mut self) -> bool {
        self.take(&Told::Failed { why: SourceFailure::Connect, detail: "refused".to_owned() })
    }

    /// Lets time pass, with a step at each due time.
    pub(super) fn pass(&mut self, time: Duration) -> bool {
        let end = self.now + time;
        let mut changed = false;
        while let Some(due) = self.view.next_due().filter(|due| *due <= end) {
            self.now = due.max(self.now);
            changed |= self.view.step(self.now, &self.sight);
            assert!(self.view.next_due().is_none_or(|next| next > self.now), "it advances");
        }
        self.now = end;
        changed
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.view.members().map(|member| member.name.to_string()).collect()
    }

    /// The last bytes of the members' addresses.
    pub(super) fn addresses(&self) -> Vec<u8> {
        let last = |member: &ViewMember| match member.address.ip() {
            std::net::IpAddr::V4(ip) => ip.octets()[3],
            std::net::IpAddr::V6(ip) => ip.octets()[15],
        };
        self.view.members().map(last).collect()
    }

    pub(super) fn member(&self, number: u8) -> &ViewMember {
        self.view.members().find(|member| member.address == at(number)).unwrap()
    }

    pub(super) fn wish(&self, number: u8) -> MemberWish {
        self.member(number).wish
    }

    pub(super) fn held(&self, number: u8) -> Option<HeldReason> {
        self.member(number).held.map(|held| held.reason)
    }

    pub(super) fn status(&self) -> ViewStatus {
        self.view.status(self.now)
    }

    pub(super) fn notices(&mut self) -> Vec<NoticeKind> {
        self.view.take_notices().into_iter().map(|notice| notice.kind).collect()
    }
}

#[test]
fn a_failure_changes_nothing_and_its_age_is_known() {
    let mut bench = Bench::with(guards(), 3);
    bench.pass(secs(5));
    assert!(!bench.fail());
    bench.pass(secs(86_400));
    assert!(!bench.fail());
    assert_eq!(bench.addresses(), [1, 2, 3]);
    assert_eq!(bench.view.next_due(), None);
    let status = bench.status();
    assert_eq!(status.confirmed, Some(secs(86_405)));
    let word = status.last_word.unwrap();
    assert_eq!((word.failure, &*word.detail), (Some(SourceFailure::Connect), "refused"));
    assert!(!bench.tell([1, 2, 3]), "recovery needs nothing");
    assert_eq!(
        bench.status().answers,
        AnswerCounts { changed: 1, same: 2, failed: 2, ..Default::default() }
    );
}
