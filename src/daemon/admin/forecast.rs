//! What would happen to a new connection now: `GET /v1/explain?client=ADDR&frontend=NAME`.
//!
//! Called by `questions` on a blocking thread, with the table that the control thread hands
//! over. It runs the code of admission, routing and the pick, and changes nothing: no slot
//! is taken, no connection is counted.

use super::decisions::{figures, skipped};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_api::decision::{
    AccessRuleDoc, AdmissionDoc, AssumedDoc, BackendRefDoc, ForecastDocument, MismatchDoc, PickDoc,
    PoolStepDoc, RefusalDoc, RouteDoc, ShareDoc, SkippedDoc, SourceUsageDoc,
};
use tidegate_api::names::{RouteConditionName, WaitName};
use tidegate_core::balance::PickKey;
use tidegate_core::control::what_if::{AssumedChange, AssumedPools, WhatIf};
use tidegate_core::decision::{Decision, SKIPPED_NAMED, SkipReason};
use tidegate_core::limits::access_list::{Access, longest_range};
use tidegate_core::limits::client_sources::SourceRefused;
use tidegate_core::model::{
    BackendId, ClientAddr, PeerAddr, Policy, RouteConfig, SourceRules, Words,
};
use tidegate_core::outcome::{Cause, Phase};
use tidegate_core::table::build::PoolBuild;
use tidegate_core::table::decide::{Picked, PickedFor};
use tidegate_core::table::routes::{ConnectionFacts, Mismatch, RouteCondition, RouteNumber};
use tidegate_core::table::state::BackendState;
use tidegate_core::table::{FrontendRoute, NoBackend, PoolTable, Table};
use tidegate_dataplane::accept::permit::can_admit;
use tidegate_net::clock;

/// Shares of backends in a document.
const SHARES_MAX: usize = 100;

/// Retries in a document.
const RETRIES_MAX: usize = 3;

/// Rehearsals that have to agree on a retry before the document names it.
const RETRY_DRAWS: u64 = 64;

/// Rehearsals that look for one that meets all candidates.
const ONLY_DRAWS: u32 = 1_000;

/// Ranges or ports of a condition in a document.
const VALUES_MAX: usize = 8;

/// A question about a new connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ForecastQuestion {
    /// The client; its port is not used.
    pub(super) client: SocketAddr,
    /// Name of the frontend.
    pub(super) frontend: String,
    /// The address that the client connects to; `None`: the frontend's first bind.
    pub(super) local: Option<LocalAddr>,
    /// Changes to assume.
    pub(super) assumed: Vec<WhatIf>,
}

/// An address of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LocalAddr {
    /// Without a port: the port of the bind that has this address.
    Ip(IpAddr),
    /// With a port.
    Socket(SocketAddr),
}

/// What the control thread knows that an answer needs.
#[derive(Debug)]
pub struct ForecastBasis {
    /// The published table.
    pub table: Arc<Table>,
    /// The pools that the question changes.
    pub assumed: AssumedPools,
    /// Queued clients by pool, without pools whose queue is empty.
    pub queued: HashMap<Arc<str>, usize>,
    /// Open sessions that count for the cap of the process.
    pub sessions: u32,
    /// The process accepts no clients because it drains.
    pub draining: bool,
}

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ForecastError {
    /// There is no such frontend.
    UnknownFrontend,
    /// The frontend does not listen at that address, or needs one.
    Address(String),
    /// The process accepts no clients because it drains.
    Draining,
}

/// The pool of the connection with its names.
struct Candidates<'a> {
    pool: &'a PoolTable,
    /// States of excluded backends.
    excluded: &'a [Arc<BackendState>],
    session: PickedFor,
    key: PickKey,
}

/// Answers the question with the state at `now`. `seed` chooses the draws.
///
/// # Errors
/// The frontend or the address does not exist, or the process drains.
pub(super) fn forecast(
    question: &ForecastQuestion,
    basis: ForecastBasis,
    (now, seed): (Instant, u64),
) -> Result<ForecastDocument, ForecastError> {
    let ForecastBasis { table, assumed, queued, sessions, draining } = basis;
    if draining {
        return Err(ForecastError::Draining);
    }
    let named = |route: &&Arc<FrontendRoute>| *route.spec.name == *question.frontend;
    let frontend = table.frontends.iter().find(named).ok_or(ForecastError::UnknownFrontend)?;
    let local = local_address(frontend, question.local)?;
    let client = ClientAddr::of_peer(PeerAddr::new(question.client));
    let (admission, refused) = admission(frontend, question.client.ip(), now);
    let mut document = ForecastDocument {
        frontend: question.frontend.clone(),
        client: question.client,
        local,
        table: table.serial,
        assumed: in_effect(&question.assumed).map(assumed_doc).collect(),
        admission,
        route: None,
        pool: None,
        pick: None,
        refusal: refused.map(|cause| refusal(cause, Phase::Admit)),
    };
    if refused.is_some() {
        return Ok(document);
    }
    let (number, mismatches) =
        frontend.route_recorded(&ConnectionFacts { client, local: Some(local) });
    document.route = Some(route_doc(frontend, number, &mismatches));
    let Some(published) = frontend.pool_of(number) else {
        document.refusal = Some(refusal(Cause::Route, Phase::Admit));
        return Ok(document);
    };
    let build = assumed.builds.into_iter().find(|build| build.input.id == published.id);
    let built = build.map(PoolBuild::run);
    let is_excluded = |state: &&Arc<BackendState>| assumed.excluded.contains(&state.id);
    let members = built.iter().flat_map(|built| &built.input.backends).map(|one| &one.state);
    let excluded: Vec<_> = members.filter(is_excluded).cloned().collect();
    let queued = |pool: &PoolTable| queued.get(&pool.spec.name).copied().unwrap_or(0);
    let clients = queued(published);
    let session = PickedFor {
        session: 0,
        client,
        peer: None,
        frontend: frontend.state.id,
        route: number,
        serial: table.serial,
        attempt: 1,
        waited: (clients > 0).then_some(Duration::ZERO),
        now,
        wall_micros: 0,
    };
    let key = PickKey { client: client.hash_ip(), draw: seed, at: clock::millis(now) };
    let candidates = |pool| Candidates { pool, excluded: &excluded, session, key };
    let changed = built.as_ref().map(|built| candidates(&built.table));
    let published = candidates(published);
    let asked = changed.as_ref().unwrap_or(&published);
    let (picked, decision) = asked.likeliest();
    document.pool = Some(asked.pool_doc(&decision, clients));
    if let Some(cap) = cap_reached(frontend, &table, sessions) {
        document.refusal = Some(waits(cap, Duration::ZERO));
        return Ok(document);
    }
    match picked {
        Err(error) => {
            // The frontend accepts clients while any of its pools has room.
            let has_room = |pool: &Arc<PoolTable>| {
                let pool: &PoolTable = if pool.id == asked.pool.id { asked.pool } else { pool };
                can_admit(pool, queued(pool))
            };
            let queues = frontend.preread.is_some() || frontend.pools().any(has_room);
            document.refusal = Some(asked.no_backend(error, queues));
        }
        Ok(likeliest) => {
            let unchanged = changed.is_some().then(|| published.likeliest().0.ok()).flatten();
            let unchanged = unchanged.map(|likeliest| published.backend(likeliest.picked.index));
            document.pick = Some(asked.pick_doc(likeliest, &decision, unchanged));
        }
    }
    Ok(document)
}

/// The pick that happens most often.
struct Likeliest {
    picked: Picked,
    shares: Vec<(usize, u32)>,
    draws: u32,
}

// === impl Candidates ===

impl Candidates<'_> {
    /// Returns the likeliest pick and its decision.
    fn likeliest(&self) -> (Result<Likeliest, NoBackend>, Decision) {
        let forecast = self.pool.forecast(self.key.client, self.key.at, self.key.draw);
        let (mut picked, mut record) = (forecast.picked, forecast.record);
        if let (Some((most, _)), Ok(first)) = (forecast.shares.first(), picked)
            && first.index != *most
        {
            // The figures have to be those of a pick of this backend.
            for draw in 1..u64::from(forecast.draws) {
                let key = PickKey { draw: self.key.draw.wrapping_add(draw), ..self.key };
                let (again, noted) = self.pool.rehearse(key, &[]);
                if again.is_ok_and(|again| again.index == *most) {
                    (picked, record) = (again, noted);
                    break;
                }
            }
        }
        if let ([_], true) = (&*forecast.shares, self.draws_candidates()) {
            // A draw can meet the only free backend before it meets all the others.
            let others = self.pool.serving.len() as u32 - 1;
            for draw in 1..u64::from(forecast.draws.min(ONLY_DRAWS)) {
                if record.passed_over_total() >= others {
                    break;
                }
                let key = PickKey { draw: self.key.draw.wrapping_add(draw), ..self.key };
                let (again, noted) = self.pool.rehearse(key, &[]);
                if again == picked && noted.passed_over_total() > record.passed_over_total() {
                    record = noted;
                }
            }
        }
        let decision = self.pool.decision(&self.session, picked.ok(), &record);
        let (shares, draws) = (forecast.shares, forecast.draws);
        (picked.map(|picked| Likeliest { picked, shares, draws }), decision)
    }

    /// Returns whether the policy draws the candidates that it looks at.
    fn draws_candidates(&self) -> bool {
        matches!(self.pool.spec.balance, Policy::Random | Policy::TwoChoices | Policy::PeakEwma)
    }

    fn pool_doc(&self, decision: &Decision, queued: usize) -> PoolStepDoc {
        let mut list: Vec<SkippedDoc> = Vec::new();
        for state in self.excluded {
            let reason = SkipReason::Excluded.name().into();
            list.push(SkippedDoc { backend: backend_ref(state), reason, seconds: 0 });
        }
        let others = decision.skipped.named().iter();
        let others = others.filter(|one| self.excluded.iter().all(|state| state.id != one.backend));
        list.extend(others.map(|one| skipped(one, |id| self.named(id))));
        // The decision counts an excluded backend, unless it is a backup that is not needed.
        let total = decision.skipped.total().max(list.len() as u32);
        list.truncate(SKIPPED_NAMED);
        PoolStepDoc {
            name: self.pool.spec.name.to_string(),
            policy: self.pool.spec.balance.word().into(),
            tier_shares: super::status::tier_shares(&self.pool.tier_shares()),
            candidates: self.pool.serving.len() as u32,
            queued: queued as u64,
            skipped: list,
            skipped_total: total,
        }
    }

    fn pick_doc(
        &self,
        likeliest: Likeliest,
        decision: &Decision,
        unchanged: Option<BackendRefDoc>,
    ) -> PickDoc {
        let Likeliest { picked, shares, draws } = likeliest;
        let certain = shares.len() < 2;
        let spec = &self.pool.spec;
        let attempts = usize::from(spec.connect_attempts).min(self.pool.serving.len());
        let retries = if certain { self.retries(picked.index, attempts) } else { Vec::new() };
        let percent = |count: u32| f64::from(count) / f64::from(draws.max(1)) * 100.0;
        let share = |(index, count): &(usize, u32)| ShareDoc {
            backend: self.backend(*index),
            percent: (percent(*count) * 10.0).round() / 10.0,
        };
        PickDoc {
            backend: self.backend(picked.index),
            certain,
            why: decision.why.name().into(),
            tier: decision.tier,
            spills: decision.spilled,
            figures: figures(decision.figures, |id| self.named(id)),
            shares: shares.iter().take(SHARES_MAX).map(share).collect(),
            draws,
            unchanged,
            retries: retries.into_iter().map(|index| self.backend(index)).collect(),
            attempts_max: attempts as u8,
            connect_timeout_seconds: spec.connect_timeout.as_secs_f64(),
        }
    }

    /// Returns the backends of the attempts after the first, as far as all rehearsals agree.
    fn retries(&self, first: usize, attempts: usize) -> Vec<usize> {
        let mut tried = vec![first];
        while tried.len() < attempts.min(RETRIES_MAX + 1) {
            let pick = |draw: u64| {
                let key = PickKey { draw: self.key.draw.wrapping_add(draw), ..self.key };
                self.pool.rehearse(key, &tried).0.ok().map(|picked| picked.index)
            };
            match pick(0) {
                Some(next) if (1..RETRY_DRAWS).all(|draw| pick(draw) == Some(next)) => {
                    tried.push(next);
                }
                _ => break,
            }
        }
        tried.split_off(1)
    }

    /// Returns what a client gets if no backend can be picked. `queues`: the frontend accepts
    /// and queues clients while all backends are at their caps.
    fn no_backend(&self, error: NoBackend, queues: bool) -> RefusalDoc {
        let spec = &self.pool.spec;
        let (waits_for, longest) = match error {
            NoBackend::NoneEligible | NoBackend::Exhausted => {
                return refusal(Cause::NoBackend, Phase::Admit);
            }
            NoBackend::Awaited if queues => (WaitName::NoneEligible, spec.queue_timeout),
            NoBackend::AtCapacity if queues => (WaitName::AtCap, spec.queue_timeout),
            NoBackend::AtCapacity | NoBackend::Awaited => (WaitName::ListenQueue, Duration::ZERO),
            NoBackend::Undecided => {
                (WaitName::NoVerdict, spec.queue_timeout.saturating_add(spec.startup_grace))
            }
        };
        waits(waits_for, longest)
    }

    fn backend(&self, index: usize) -> BackendRefDoc {
        backend_ref(&self.pool.serving[index])
    }

    fn named(&self, id: BackendId) -> BackendRefDoc {
        let (serving, left_out) = (&self.pool.serving, self.pool.left_out.named());
        let mut all = serving.iter().chain(left_out).chain(self.excluded);
        all.find(|state| state.id == id).map_or_else(
            || BackendRefDoc {
                pool: self.pool.spec.name.to_string(),
                backend: String::new(),
                address: String::new(),
            },
            |state| backend_ref(state),
        )
    }
}

fn backend_ref(state: &BackendState) -> BackendRefDoc {
    BackendRefDoc {
        pool: state.pool.to_string(),
        backend: state.name.to_string(),
        address: state.address_text.to_string(),
    }
}

fn refusal(cause: Cause, phase: Phase) -> RefusalDoc {
    RefusalDoc {
        cause: cause.name().into(),
        phase: phase.name().into(),
        waits_for: None,
        waits_seconds: 0.0,
    }
}

fn waits(waits_for: WaitName, longest: Duration) -> RefusalDoc {
    RefusalDoc {
        waits_for: Some(waits_for),
        waits_seconds: longest.as_secs_f64(),
        ..refusal(Cause::QueueTimeout, Phase::Queue)
    }
}

/// Returns the cap that keeps new clients of the frontend in the listen queue.
fn cap_reached(frontend: &FrontendRoute, table: &Table, sessions: u32) -> Option<WaitName> {
    let reached = |open: u32, max: u32| max > 0 && open >= max;
    match () {
        () if reached(sessions, table.connections_max) => Some(WaitName::ProcessCap),
        () if reached(frontend.state.in_flight.get(), frontend.spec.connections_max) => {
            Some(WaitName::FrontendCap)
        }
        () => None,
    }
}

/// Returns the changes without those that a later change of the same kind replaces.
fn in_effect(assumed: &[WhatIf]) -> impl Iterator<Item = &WhatIf> {
    let same = |a: &WhatIf, b: &WhatIf| {
        (&a.pool, &a.backend) == (&b.pool, &b.backend)
            && std::mem::discriminant(&a.change) == std::mem::discriminant(&b.change)
    };
    let rest = move |place: usize| assumed[place + 1..].iter();
    assumed
        .iter()
        .enumerate()
        .filter(move |(place, one)| !rest(*place).any(|later| same(later, one)))
        .map(|(_, one)| one)
}

fn assumed_doc(assumed: &WhatIf) -> AssumedDoc {
    AssumedDoc {
        pool: assumed.pool.clone(),
        backend: assumed.backend.clone(),
        weight: match assumed.change {
            AssumedChange::Excluded => None,
            AssumedChange::Weight(weight) => Some(weight),
        },
    }
}

/// Returns the address that the client connects to.
fn local_address(
    frontend: &FrontendRoute,
    asked: Option<LocalAddr>,
) -> Result<SocketAddr, ForecastError> {
    let mut binds = frontend.spec.binds.iter().filter_map(|bind| bind.key.socket_addr());
    let name = &frontend.spec.name;
    let serves = |bind: SocketAddr, ip: IpAddr| {
        bind.ip() == ip || bind.ip().is_unspecified() && bind.is_ipv4() == ip.is_ipv4()
    };
    let found = match asked {
        Some(LocalAddr::Ip(ip)) => binds
            .clone()
            .find(|bind| serves(*bind, ip))
            .map(|bind| SocketAddr::new(ip, bind.port())),
        Some(LocalAddr::Socket(address)) => {
            let same =
                |bind: SocketAddr| serves(bind, address.ip()) && bind.port() == address.port();
            binds.clone().any(same).then_some(address)
        }
        None => {
            let first = binds.next();
            if first.is_some_and(|bind| bind.ip().is_unspecified())
                && frontend.needs_local_address()
            {
                return Err(ForecastError::Address(format!(
                    "address is missing: routes of frontend {name:?} depend on the address that \
                     the client connects to"
                )));
            }
            first
        }
    };
    let text = match asked {
        Some(LocalAddr::Ip(ip)) => ip.to_string(),
        Some(LocalAddr::Socket(address)) => address.to_string(),
        None => "an IP address".to_owned(),
    };
    found.ok_or_else(|| {
        ForecastError::Address(format!(
            "address: frontend {name:?} does not listen at {text}; it listens at {}",
            listed(frontend.spec.binds.iter().map(|bind| bind.key.to_string()))
        ))
    })
}

/// Returns whether the client may connect, and the cause of the rejection if not.
fn admission(
    frontend: &FrontendRoute,
    client: IpAddr,
    now: Instant,
) -> (AdmissionDoc, Option<Cause>) {
    let spec = &frontend.spec;
    let mut document = AdmissionDoc {
        allowed: true,
        rule: None,
        has_rules: false,
        source: None,
        sessions: frontend.state.in_flight.get(),
        connections_max: spec.connections_max,
    };
    let Some(rules) = &spec.sources else { return (document, None) };
    document.has_rules = rules.access.rules() > 0;
    let denied = rules.access.of(client) == Access::Denied;
    document.rule = access_rule(rules, client, !denied);
    let mut refused = denied.then_some(Cause::Denied);
    if !denied && rules.limits.are_any() {
        let limits = &rules.limits;
        let sources = frontend.state.sources.get();
        // Without a table, no client of the frontend has been counted yet.
        let (previewed, connections) =
            sources.map_or((Ok(()), 0), |sources| sources.preview(client, limits, now));
        document.source = Some(SourceUsageDoc {
            source: limits.source_of(client).to_string(),
            connections,
            connections_max: limits.connections_max,
            rate: limits.rate.map(|rate| rate.to_string()),
            exceeded: previewed.is_err(),
        });
        refused = previewed.err().map(|error| match error {
            SourceRefused::TooMany => Cause::SourceConnections,
            SourceRefused::TooFast => Cause::SourceRate,
        });
    }
    document.allowed = refused.is_none();
    (document, refused)
}

/// Returns the range that decided. The ranges of a file are not kept as text: the document
/// then names the file. `None`: no range contains the client.
fn access_rule(rules: &SourceRules, client: IpAddr, allows: bool) -> Option<AccessRuleDoc> {
    if !rules.access.contains(client) {
        return None;
    }
    let (own, others, file) = match allows {
        true => (&rules.allow, &rules.deny, &rules.allow_file),
        false => (&rules.deny, &rules.allow, &rules.deny_file),
    };
    let own = longest_range(own, client);
    let other = longest_range(others, client).map(|range| range.prefix_len());
    let range = match own {
        Some(range) if other.is_none_or(|other| range.prefix_len() >= other) => range.to_string(),
        _ => file.as_ref().map_or_else(String::new, |file| file.display().to_string()),
    };
    Some(AccessRuleDoc { allows, range })
}

fn route_doc(frontend: &FrontendRoute, number: RouteNumber, mismatches: &[Mismatch]) -> RouteDoc {
    let doc = |mismatch: &Mismatch| {
        let route = frontend.spec.routes.get(usize::from(mismatch.position) - 1)?;
        let (condition, values) = condition_doc(route, mismatch.condition);
        Some(MismatchDoc { position: mismatch.position, condition, values })
    };
    RouteDoc {
        position: number.position(),
        routes: frontend.spec.routes.len() as u8,
        mismatches: mismatches.iter().filter_map(doc).collect(),
    }
}

/// Returns the name of a condition and its ranges or ports.
fn condition_doc(route: &RouteConfig, condition: RouteCondition) -> (RouteConditionName, String) {
    match condition {
        RouteCondition::Port => {
            let ports = route.ports.iter().map(|ports| match (ports.start(), ports.end()) {
                (first, last) if first == last => first.to_string(),
                (first, last) => format!("{first}-{last}"),
            });
            (RouteConditionName::Ports, listed(ports))
        }
        RouteCondition::Address => {
            (RouteConditionName::Addresses, listed(route.addresses.iter().map(ToString::to_string)))
        }
        RouteCondition::Source => {
            (RouteConditionName::Sources, listed(route.sources.iter().map(ToString::to_string)))
        }
    }
}

/// Joins values with commas. The text contains the first [`VALUES_MAX`] and the number of
/// the others.
fn listed(values: impl ExactSizeIterator<Item = String>) -> String {
    let more = values.len().saturating_sub(VALUES_MAX);
    let mut text = values.take(VALUES_MAX).collect::<Vec<_>>().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}
