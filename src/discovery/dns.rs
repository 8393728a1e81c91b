//! The source of members from DNS: the addresses or the services of one name.
//!
//! The discovery thread runs [`run`] for each question. What each answer of DNS tells:
//!
//! | DNS | told |
//! |---|---|
//! | addresses | a whole set |
//! | NXDOMAIN, or only the SRV target `.` | a whole set without members; the guards of the view decide how often it must come |
//! | NOERROR without records, SERVFAIL, REFUSED, no answer, a malformed answer | a failure |
//! | addresses of one family, a failure for the other | a whole set with the last known addresses of the other family, then the failure |
//!
//! In the last case, the set is not trusted if no addresses of the other family are known
//! since the start: it can add members but not remove any. If a server never answers
//! questions about AAAA, addresses leave only with `family = "ipv4"`.
//!
//! Each trusted set comes from records that were all asked after the set before it, so two
//! sets are two pieces of evidence. The source never removes a member itself.

use crate::resolver::{
    AddressAnswer, AddressOutcome, AnswerDates, PartialAnswer, Resolver, ServiceAnswer,
    ServiceOutcome, ServiceRecord, ServiceSet, no_records,
};
use crate::tell::Teller;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::control::MEMBERS_MAX;
use tidegate_core::discovery::labels::MemberLabels;
use tidegate_core::discovery::{Announced, SourceFailure, Told, Unreadable, WholeSet, Wish};
use tidegate_core::model::{NameQuestion, NameRecord, TIER_MAX, WEIGHT_MAX};
use tidegate_net::clock;
use tokio::time::sleep_until;

/// Least time between two questions of one source, if `ttl_min` is not shorter.
const PAUSE_MIN: Duration = Duration::from_secs(1);

/// What one question to DNS gave.
struct NameRound {
    members: Option<NamedMembers>,
    failure: Option<(SourceFailure, String)>,
    dates: AnswerDates,
}

#[derive(Default)]
struct NamedMembers {
    members: BTreeMap<SocketAddr, Announced>,
    /// Whether the set removes no member because of a failure.
    complete: bool,
    unreadable: u32,
}

/// Asks for the members of `question` and tells them, for the lifetime of the task. The
/// next question follows after the smallest TTL of the answer, within `ttl_min` and
/// `ttl_max`; after a failure and while the name does not exist, after 1 s to 5 s.
pub async fn run(question: NameQuestion, resolver: Resolver, teller: Teller) {
    let mut changes = resolver.changes();
    let (mut trusted_at, mut all_due) = (None, true);
    loop {
        let newer_than = trusted_at.filter(|_| all_due);
        let round = match question.record {
            NameRecord::Address => addresses(&question, &resolver, newer_than).await,
            NameRecord::Srv => services(&question, &resolver, newer_than).await,
        };
        let (now, dates) = (clock::now(), round.dates);
        if round.tell(trusted_at, &teller) {
            trusted_at = Some(now);
        }
        let pause_min = changes.borrow_and_update().ttl_min.min(PAUSE_MIN);
        let due = dates.due.max(now + pause_min);
        let changed = async {
            // The resolver keeps the sender, so an error cannot occur.
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = sleep_until(due.into()) => {}
            () = changed => {}
        }
        all_due = clock::now() >= dates.all_due;
    }
}

async fn addresses(
    question: &NameQuestion,
    resolver: &Resolver,
    newer_than: Option<Instant>,
) -> NameRound {
    let answer = resolver.addresses(&question.name, question.family, newer_than).await;
    let dates = answer.dates;
    let not_found = |detail| (SourceFailure::NotFound, detail);
    let (members, failure) = match &answer.outcome {
        AddressOutcome::Whole(_) | AddressOutcome::NoName => (true, None),
        AddressOutcome::Nothing => (false, Some(not_found(no_records(&question.name, "address")))),
        AddressOutcome::Part(PartialAnswer { fresh, failure, .. }) => {
            (!fresh.is_empty(), Some((failure.why, failure.detail.clone())))
        }
    };
    let set = || {
        let mut set = NamedMembers { complete: true, ..NamedMembers::default() };
        for address in set.take(&answer) {
            // The configuration requires a port.
            let address = SocketAddr::new(address, question.port.unwrap_or_default());
            set.add(member(address, None, 0));
        }
        set
    };
    NameRound { members: members.then(set), failure, dates }
}

async fn services(
    question: &NameQuestion,
    resolver: &Resolver,
    newer_than: Option<Instant>,
) -> NameRound {
    let ServiceAnswer { outcome, dates } = resolver.services(&question.name, newer_than).await;
    match outcome {
        ServiceOutcome::Services(set) => targets(question, resolver, newer_than, &set, dates).await,
        ServiceOutcome::NoName => {
            let set = NamedMembers { complete: true, ..NamedMembers::default() };
            NameRound { members: Some(set), failure: None, dates }
        }
        ServiceOutcome::Failed(failure) => {
            NameRound { members: None, failure: Some((failure.why, failure.detail)), dates }
        }
    }
}

/// Resolves the targets of the services, all at the same time.
async fn targets(
    question: &NameQuestion,
    resolver: &Resolver,
    newer_than: Option<Instant>,
    services: &ServiceSet,
    dates: AnswerDates,
) -> NameRound {
    let with_target = |record: &'_ ServiceRecord| record.target.is_some();
    let records: Vec<&ServiceRecord> =
        services.services().iter().filter(|record| with_target(record)).collect();
    let start = |target| resolver.start_target(target, question.family, newer_than, services);
    let asked: Vec<_> =
        records.iter().filter_map(|record| record.target.as_ref().map(start)).collect();
    let scale = ServiceScale::of(&records);
    let unreadable = services.unusable();
    let mut round = NameRound { members: None, failure: None, dates };
    let mut set = NamedMembers { complete: true, unreadable, ..NamedMembers::default() };
    let mut due = dates;
    for (record, pending) in records.iter().zip(asked) {
        let answer = pending.answer().await;
        due = due.and(answer.dates);
        match &answer.outcome {
            AddressOutcome::Whole(_) => round.dates = round.dates.and(answer.dates),
            AddressOutcome::Part(PartialAnswer { failure, .. }) => {
                round.dates = round.dates.and(answer.dates);
                round.failure = Some((failure.why, failure.detail.clone()));
            }
            // The target is asked again together with the others.
            AddressOutcome::NoName | AddressOutcome::Nothing => set.unreadable += 1,
        }
        let port = question.port.unwrap_or(record.port);
        let (weight, tier) = scale.of_record(record);
        for address in set.take(&answer) {
            set.add(member(SocketAddr::new(address, port), Some(weight), tier));
        }
    }
    if records.is_empty() || !set.members.is_empty() {
        round.members = Some(set);
    } else {
        round.dates = due;
        let detail =
            format!("none of the {} targets of {} has an address", records.len(), question.name);
        round.failure = round.failure.or(Some((SourceFailure::NotFound, detail)));
    }
    round
}

fn member(address: SocketAddr, weight: Option<u16>, tier: u8) -> Announced {
    let name: Arc<str> = address.to_string().into();
    let (wish, raw, labels) = (Wish::Sessions, "".into(), MemberLabels::default());
    Announced { name, address, weight, tier, wish, raw, labels }
}

// === impl NameRound ===

impl NameRound {
    /// Tells the set and the failure. Returns whether the set is trusted: complete, and
    /// all of its records were asked after `trusted_at`.
    fn tell(self, trusted_at: Option<Instant>, teller: &Teller) -> bool {
        let is_new = trusted_at.is_none_or(|time| self.dates.asked > time);
        let trusted = is_new && self.members.as_ref().is_some_and(|set| set.complete);
        if let Some(set) = self.members {
            teller.tell(Told::Whole(set.whole(trusted)));
        }
        if let Some((why, detail)) = self.failure {
            teller.tell(Told::Failed { why, detail });
        }
        trusted
    }
}

// === impl NamedMembers ===

impl NamedMembers {
    /// Returns the addresses of an answer and notes what it lacks.
    fn take(&mut self, answer: &AddressAnswer) -> Vec<IpAddr> {
        self.unreadable += answer.unusable;
        match &answer.outcome {
            AddressOutcome::Whole(addresses) => addresses.clone(),
            AddressOutcome::NoName | AddressOutcome::Nothing => Vec::new(),
            AddressOutcome::Part(PartialAnswer { fresh, kept, complete, .. }) => {
                self.complete &= complete;
                fresh.iter().chain(kept).copied().collect()
            }
        }
    }

    /// Adds a member. Of two with one address, the lower tier counts, then the larger weight.
    fn add(&mut self, member: Announced) {
        let rank = |member: &Announced| (Reverse(member.tier), member.weight);
        let known = self.members.get(&member.address);
        if known.is_none_or(|known| rank(known) < rank(&member)) {
            self.members.insert(member.address, member);
        }
    }

    fn whole(self, trusted: bool) -> WholeSet {
        let refused = self.members.len().saturating_sub(MEMBERS_MAX);
        let members: Vec<Announced> = self.members.into_values().take(MEMBERS_MAX).collect();
        let mut unreadable = Unreadable::unnamed(self.unreadable);
        unreadable.add_unnamed(u32::try_from(refused).unwrap_or(u32::MAX));
        WholeSet {
            members: members.into(),
            version: String::new(),
            trusted,
            unreadable,
            keys: [].into(),
        }
    }
}

/// Weights of SRV records: relative to each other within one priority (RFC 2782).
struct ServiceScale {
    /// The largest weight of each priority. The rank of a priority is the tier of its members.
    largest: BTreeMap<u16, u16>,
}

// === impl ServiceScale ===

impl ServiceScale {
    fn of(records: &[&ServiceRecord]) -> ServiceScale {
        let mut largest = BTreeMap::new();
        for record in records {
            let weight = largest.entry(record.priority).or_insert(record.weight);
            *weight = record.weight.max(*weight);
        }
        ServiceScale { largest }
    }

    /// Returns the weight, 1..=1000, and the tier. Weights above 1000 are scaled down
    /// together. Weight 0 becomes 1, because a member cannot have 0. From the tenth priority
    /// on, all have the highest tier.
    fn of_record(&self, record: &ServiceRecord) -> (u16, u8) {
        let largest = self.largest.get(&record.priority).copied().unwrap_or_default();
        let scaled = match largest > WEIGHT_MAX {
            true => u32::from(record.weight) * u32::from(WEIGHT_MAX) / u32::from(largest),
            false => u32::from(record.weight),
        };
        let weight = u16::try_from(scaled).unwrap_or(WEIGHT_MAX).max(1);
        let rank = self.largest.range(..record.priority).count();
        (weight, u8::try_from(rank).unwrap_or(TIER_MAX).min(TIER_MAX))
    }
}

#[cfg(test)]
mod tests;
