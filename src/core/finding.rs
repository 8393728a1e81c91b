//! What is wrong, in words, worst first: the findings that the page, the terminal and
//! `status` show.
//!
//! Called by `daemon` with a copy of the controller's state. Pure. A finding groups the
//! backends of a pool that have the same state for the same reason.

use crate::control::shown::ShownState;
use crate::control::{BackendStatus, ControlStatus, PoolStatus};
use crate::model::BackendAddr;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most findings that are returned. The worst come first.
pub const FINDINGS_MAX: usize = 50;

/// Characters of a reason that a finding quotes.
const QUOTED_MAX: usize = 400;

/// Smallest group whose place is looked for.
const LEAD_BACKENDS_MIN: usize = 3;

/// Rejected clients per second from which a frontend has a problem.
const REFUSED_MIN: f64 = 0.5;

/// An event counts as what happened just before, if it is at most this old.
pub const LEAD_WITHIN: Duration = Duration::from_secs(120);

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FindingSeverity {
    /// Something may become worse.
    Notice = 1,
    /// Backends do not serve.
    Bad = 2,
    /// Clients are not served.
    Outage = 3,
}

/// What a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FindingKind {
    /// A pool has no eligible backend.
    NoneEligible,
    /// A guard holds silent backends in rotation.
    Frozen,
    /// Backends are down, ejected or suspect.
    Backends,
    /// Clients wait in a queue.
    Queue,
    /// A frontend rejects clients.
    Refused,
    /// The process is near its cap.
    Cap,
    /// The last reload was rejected.
    Reload,
    /// A warning of the status.
    Warning,
}

/// One finding.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// What it is about.
    pub kind: FindingKind,
    /// How bad it is.
    pub severity: FindingSeverity,
    /// State of the backends; `None` if it is not about backends.
    pub state: Option<ShownState>,
    /// What, in a few words that fit into a list.
    pub short: String,
    /// What, in one clause.
    pub title: String,
    /// Why, what the backends have in common, and what happened just before. Can be empty.
    pub why: String,
    /// What it does to traffic. Can be empty.
    pub effect: String,
    /// Its age; `None` if that is not known.
    pub since: Option<Duration>,
    /// The pool, if it is about one.
    pub pool: Option<Arc<str>>,
    /// The backend, if it is about one.
    pub backend: Option<Arc<str>>,
    /// Number of backends.
    pub backends: usize,
}

/// Rejected clients of a frontend.
#[derive(Debug, Clone)]
pub struct RefusedRate {
    /// Name of the frontend.
    pub frontend: Arc<str>,
    /// The reason, as in metrics.
    pub reason: &'static str,
    /// The reason in words.
    pub text: &'static str,
    /// Clients per second.
    pub rate: f64,
}

/// An event that can have caused a problem.
#[derive(Debug, Clone)]
pub struct LeadEvent {
    /// What happened, as a clause without a full stop, such as `generation 7 by uid 0`.
    pub text: String,
    /// Time from the event to the beginning of the problem.
    pub before: Duration,
}

/// What is looked at.
pub struct FindingFacts<'a> {
    /// Pools and backends.
    pub control: &'a ControlStatus,
    /// The time of `control`.
    pub now: Instant,
    /// Queued clients by pool.
    pub queued: &'a HashMap<Arc<str>, usize>,
    /// Rejected clients.
    pub refused: &'a [RefusedRate],
    /// Open sessions and their cap.
    pub connections: (u32, u32),
    /// Why the last reload was rejected, and its age; `None` if it was not.
    pub rejected_reload: Option<(String, Duration)>,
    /// Warnings in one sentence each.
    pub warnings: Vec<String>,
    /// Returns the newest event of the configuration, of an operator or of the process in the
    /// [`LEAD_WITHIN`] before a problem of this age began.
    pub lead: &'a dyn Fn(Duration) -> Option<LeadEvent>,
}

/// Backends of one pool with one state and one reason.
struct BackendGroup<'a> {
    state: ShownState,
    pool: &'a PoolStatus,
    backends: Vec<&'a BackendStatus>,
}

/// Returns all findings, worst first, at most [`FINDINGS_MAX`].
pub fn find(facts: &FindingFacts<'_>) -> Vec<Finding> {
    let mut found: Vec<Finding> =
        facts.control.pools.iter().flat_map(|pool| of_pool(pool, facts)).collect();
    found.extend(facts.refused.iter().filter(|one| one.rate >= REFUSED_MIN).map(refusal));
    found.extend(near_cap(facts.connections));
    found.extend(facts.rejected_reload.as_ref().map(rejected_reload));
    found.extend(facts.warnings.iter().map(|warning| warning_of(warning)));
    found.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    found.truncate(FINDINGS_MAX);
    found
}

fn of_pool(pool: &PoolStatus, facts: &FindingFacts<'_>) -> Vec<Finding> {
    let eligible = pool.backends.iter().filter(|backend| backend.eligible).count();
    let mut found = Vec::new();
    if eligible == 0 && !pool.backends.is_empty() && !pool.undecided {
        found.push(none_eligible(pool));
    }
    if let Some(frozen) = &pool.frozen {
        let title = format!("Pool {} is frozen", pool.name);
        let mut finding = Finding::of_pool(pool, FindingKind::Frozen, FindingSeverity::Bad, title);
        finding.short = format!("{} is frozen", pool.name);
        finding.why = sentence(&frozen.reason);
        finding.effect = "Silent backends stay in rotation.".to_owned();
        finding.since = Some(frozen.lasted);
        found.push(finding);
    }
    let all: u64 = pool.backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let mut grouped_before = false;
    for group in groups(pool) {
        let mut finding = group.finding(facts, eligible, all.max(1));
        if group.backends.len() > 1 && grouped_before {
            finding.short = format!("{} are {}", grouped(group.backends.len()), group.state.name());
        }
        grouped_before = true;
        found.push(finding);
    }
    let queued = facts.queued.get(&pool.name).copied().unwrap_or_default();
    if queued > 0 {
        let clients = few(queued, "client");
        let title = format!("{clients} {} in the queue of {}", waits(queued), pool.name);
        let mut finding =
            Finding::of_pool(pool, FindingKind::Queue, FindingSeverity::Notice, title.clone());
        finding.short = title;
        finding.why = match eligible {
            0 => "No backend is eligible.".to_owned(),
            _ => "Every eligible backend is at its cap.".to_owned(),
        };
        found.push(finding);
    }
    found
}

fn waits(clients: usize) -> &'static str {
    if clients == 1 { "waits" } else { "wait" }
}

fn none_eligible(pool: &PoolStatus) -> Finding {
    let title = format!("Pool {} has no eligible backend", pool.name);
    let mut finding =
        Finding::of_pool(pool, FindingKind::NoneEligible, FindingSeverity::Outage, title);
    finding.short = format!("{} has no eligible backend", pool.name);
    finding.state = Some(ShownState::Down);
    finding.backends = pool.backends.len();
    finding.why = match pool.backends.len() {
        1 => "Its only backend gets no new sessions.".to_owned(),
        count => format!("None of its {} gets new sessions.", few(count, "backend")),
    };
    finding.effect = match pool.none_eligible {
        Some("try-all") => "Every backend is tried (when_none_eligible = \"try-all\").",
        Some("queue" | "wait") => "New clients wait in its queue.",
        Some("former") => "Backends that a reload has removed serve new clients.",
        _ => "New clients are reset at once (when_none_eligible = \"refuse\").",
    }
    .to_owned();
    finding
}

/// Groups the backends with a problem, in the order of the pool.
fn groups(pool: &PoolStatus) -> Vec<BackendGroup<'_>> {
    let mut places: HashMap<(ShownState, String), usize> = HashMap::new();
    let mut groups: Vec<BackendGroup<'_>> = Vec::new();
    for backend in &pool.backends {
        let state = ShownState::of(backend);
        if !matches!(state, ShownState::Down | ShownState::Ejected | ShownState::Suspect) {
            continue;
        }
        let place = *places.entry((state, masked(reason(backend)))).or_insert(groups.len());
        if place == groups.len() {
            groups.push(BackendGroup { state, pool, backends: Vec::new() });
        }
        groups[place].backends.push(backend);
    }
    groups
}

fn reason(backend: &BackendStatus) -> &str {
    backend.last_transition.as_ref().map_or("", |transition| &transition.reason)
}

/// Replaces each row of digits by one `#`.
fn masked(reason: &str) -> String {
    let mut text = String::with_capacity(reason.len());
    for letter in reason.chars() {
        match letter.is_ascii_digit() {
            true if text.ends_with('#') => {}
            true => text.push('#'),
            false => text.push(letter),
        }
    }
    text
}

fn refusal(refused: &RefusedRate) -> Finding {
    let RefusedRate { frontend, reason, text, rate } = refused;
    let title = format!("{frontend} refuses {} clients/s", one_decimal(*rate));
    Finding {
        why: sentence(text),
        effect: format!("The reason in metrics and log is {reason}."),
        ..Finding::plain(FindingKind::Refused, FindingSeverity::Notice, title)
    }
}

fn near_cap((active, cap): (u32, u32)) -> Option<Finding> {
    if f64::from(active) <= f64::from(cap) * 0.9 {
        return None;
    }
    let title = "Open sessions are near the cap".to_owned();
    let mut finding = Finding::plain(FindingKind::Cap, FindingSeverity::Notice, title);
    finding.short = "sessions are near the cap".to_owned();
    let (active, cap) = (grouped(active as usize), grouped(cap as usize));
    finding.why = format!("{active} of {cap}; at the cap new clients wait in the listen queue.");
    Some(finding)
}

fn rejected_reload((why, since): &(String, Duration)) -> Finding {
    let title = "The last reload was rejected".to_owned();
    let mut finding = Finding::plain(FindingKind::Reload, FindingSeverity::Notice, title);
    finding.short = "the last reload was rejected".to_owned();
    finding.why = sentence(why);
    finding.effect = "Correct the file: a restart would fail with it.".to_owned();
    finding.since = Some(*since);
    finding
}

fn warning_of(warning: &str) -> Finding {
    let mut finding =
        Finding::plain(FindingKind::Warning, FindingSeverity::Notice, "Warning".to_owned());
    finding.short = "a warning".to_owned();
    finding.why = sentence(warning);
    finding
}

// === impl FindingKind ===

impl FindingKind {
    /// Returns the name in documents.
    pub fn name(self) -> &'static str {
        match self {
            FindingKind::NoneEligible => "none-eligible",
            FindingKind::Frozen => "frozen",
            FindingKind::Backends => "backends",
            FindingKind::Queue => "queue",
            FindingKind::Refused => "refused",
            FindingKind::Cap => "cap",
            FindingKind::Reload => "reload",
            FindingKind::Warning => "warning",
        }
    }
}

// === impl Finding ===

impl Finding {
    fn plain(kind: FindingKind, severity: FindingSeverity, title: String) -> Finding {
        Finding {
            kind,
            severity,
            state: None,
            short: title.clone(),
            title,
            why: String::new(),
            effect: String::new(),
            since: None,
            pool: None,
            backend: None,
            backends: 0,
        }
    }

    fn of_pool(
        pool: &PoolStatus,
        kind: FindingKind,
        severity: FindingSeverity,
        title: String,
    ) -> Finding {
        Finding { pool: Some(Arc::clone(&pool.name)), ..Finding::plain(kind, severity, title) }
    }
}

// === impl BackendGroup ===

impl BackendGroup<'_> {
    fn finding(&self, facts: &FindingFacts<'_>, eligible: usize, all_weights: u64) -> Finding {
        let (pool, count) = (self.pool, self.backends.len());
        let first = self.backends[0];
        let subject = match count {
            1 => format!("{}/{}", pool.name, first.state.name),
            _ => format!("{} of {}", few(count, "backend"), pool.name),
        };
        let is = if count == 1 { "is" } else { "are" };
        let age = |backend: &&BackendStatus| Some(backend.last_transition.as_ref()?.at);
        let since = self.backends.iter().filter_map(age).min();
        let since = since.map(|at| facts.now.saturating_duration_since(at));
        let lead = since.and_then(|since| (facts.lead)(since)).map(|lead| lead.sentence());
        let parts = [Some(sentence(reason(first))), self.place(), lead];
        let why: Vec<String> = parts.into_iter().flatten().filter(|p| !p.is_empty()).collect();
        let severity = match self.state {
            ShownState::Suspect => FindingSeverity::Notice,
            _ => FindingSeverity::Bad,
        };
        let title = format!("{subject} {is} {}", self.state.name());
        Finding {
            state: Some(self.state),
            why: why.join(" "),
            effect: self.effect(eligible, all_weights),
            since,
            backend: (count == 1).then(|| Arc::clone(&first.state.name)),
            backends: count,
            ..Finding::of_pool(pool, FindingKind::Backends, severity, title)
        }
    }

    fn effect(&self, eligible: usize, all_weights: u64) -> String {
        let one = self.backends.len() == 1;
        if self.state == ShownState::Suspect {
            return match one {
                true => "It gets a tenth of its weight until it is up again.".to_owned(),
                false => "They get a tenth of their weight until they are up again.".to_owned(),
            };
        }
        if eligible == 0 {
            return String::new();
        }
        let weight: u64 = self.backends.iter().map(|backend| u64::from(backend.weight)).sum();
        let share = percent(weight as f64 / all_weights as f64);
        let whose = if one { "Its" } else { "Their" };
        let rest = match eligible {
            1 => "the one that is left".to_owned(),
            _ => format!("the other {}", grouped(eligible)),
        };
        let open = |backend: &&BackendStatus| backend.state.in_flight.get() as usize;
        let sessions = match self.backends.iter().map(open).sum() {
            0 => String::new(),
            open => format!("; {} still open may hang", few(open, "session")),
        };
        format!("{whose} {share} of new sessions goes to {rest}{sessions}.")
    }

    /// Returns the range of addresses that the backends share, if it is no chance.
    fn place(&self) -> Option<String> {
        let count = self.backends.len();
        if count < LEAD_BACKENDS_MIN {
            return None;
        }
        let sick: Option<Vec<Ipv4Addr>> = self.backends.iter().map(|b| ipv4(b)).collect();
        let sick = sick?;
        let (low, high) = (sick.iter().min()?, sick.iter().max()?);
        let well = self.pool.backends.iter().filter(|one| ShownState::of(one) == ShownState::Up);
        let (mut inside, mut outside) = (0, 0);
        for backend in well {
            match ipv4(backend) {
                Some(address) if address >= *low && address <= *high => inside += 1,
                _ => outside += 1,
            }
        }
        if outside == 0 || inside > count {
            return None;
        }
        let rest = match inside {
            0 => "and no backend there is up".to_owned(),
            1 => "where 1 more is up".to_owned(),
            more => format!("where {} more are up", grouped(more)),
        };
        Some(format!("All {} lie in {low}–{high}, {rest}.", grouped(count)))
    }
}

// === impl LeadEvent ===

impl LeadEvent {
    fn sentence(self) -> String {
        let after = duration(self.before.max(Duration::from_secs(1)));
        format!("It began {after} after {}.", self.text)
    }
}

fn ipv4(backend: &BackendStatus) -> Option<Ipv4Addr> {
    match &backend.state.address {
        BackendAddr::Tcp(address) | BackendAddr::ClientPort(address, _) => match address.ip() {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        },
        BackendAddr::Unix(_) => None,
    }
}

/// Returns the text as a sentence: a capital letter and a full stop.
fn sentence(text: &str) -> String {
    let cut: String = text.chars().take(QUOTED_MAX).collect();
    let mut letters = cut.chars();
    match letters.next() {
        None => String::new(),
        Some(first) => {
            let text = format!("{}{}", first.to_uppercase(), letters.as_str());
            if text.ends_with(['.', '…']) { text } else { text + "." }
        }
    }
}

/// Returns a count and its noun.
fn few(count: usize, noun: &str) -> String {
    format!("{} {noun}{}", grouped(count), if count == 1 { "" } else { "s" })
}

/// Returns a number with a comma between thousands.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn one_decimal(rate: f64) -> String {
    if rate < 9.95 { format!("{rate:.1}") } else { grouped(rate.round() as usize) }
}

fn percent(share: f64) -> String {
    let percent = share * 100.0;
    match percent {
        _ if percent < 0.995 => format!("{percent:.2}%"),
        _ if percent < 9.95 => format!("{percent:.1}%"),
        _ => format!("{percent:.0}%"),
    }
}

fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        _ if seconds < 99.5 => format!("{seconds:.0} s"),
        _ if seconds < 5_940.0 => format!("{:.0} min", seconds / 60.0),
        _ if seconds < 172_800.0 => format!("{:.0} h", seconds / 3_600.0),
        _ => format!("{:.0} d", seconds / 86_400.0),
    }
}

#[cfg(test)]
mod tests;
