//! The views of member sources: what each source of a pool lists now.
//!
//! Called by the controller for [`ControlEvent::Told`](super::ControlEvent::Told) and for
//! the timers that views set, and by `configure`. `core::discovery` decides what an answer
//! changes; `members` merges the lists. This module asks no source.
//!
//! - A view belongs to a pool and to its `discover` table, or to one backend whose address
//!   is a name. It is kept while the configuration has its source.
//! - If a reload changes the question, the members of the old one stay until the first
//!   answer that counts. No share of removals holds that answer back.
//! - Answers of one source are applied at most ten times per second, and the answers of all
//!   sources less often if they cost more than a tenth of the time; the newest one counts.

mod notices;
pub(super) mod saved;
mod sight;
pub(super) mod verification;

use super::backends::BackendEntry;
use super::heartbeats::HeartbeatWatch;
use super::members::{ListedMember, MemberSource, MembersIgnored};
use super::pools::PoolId;
use super::publish::pacer::PACE;
use super::schedule::TimerKind;
use super::state::ControlState;
use crate::discovery::Told;
use crate::discovery::labels::MemberLabels;
use crate::discovery::view::{HeldRemoval, MemberWish, View, ViewStatus};
use crate::model::{
    BackendAddr, BackendConfig, Config, NameRecord, NamedBackend, PoolConfig, SourceKey,
    SourceQuestion, TIER_MAX, ViewGuards, WEIGHT_MAX, Words,
};
use sight::PoolSight;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest wait for a first answer about a name.
const NAME_WAIT_MAX: Duration = Duration::from_secs(2);

/// Identifies a view for its timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ViewId(u32);

/// All views.
#[derive(Debug, Default)]
pub(super) struct MemberViews {
    views: BTreeMap<ViewId, SourceView>,
    ids: HashMap<SourceKey, ViewId>,
    /// By pool name, in order of precedence.
    pools: HashMap<Arc<str>, Vec<ViewId>>,
    last_id: u32,
    /// No answer is applied before this time, because the last ones were expensive.
    not_before: Option<Instant>,
    /// An answer was applied since the last [`MemberViews::take_applied`].
    applied: bool,
    /// A view has changed since the last [`MemberViews::take_unsaved`].
    unsaved: bool,
    /// A view has changed members since the last table.
    unpublished: bool,
}

/// The view of one source of a pool.
#[derive(Debug)]
pub(super) struct SourceView {
    key: SourceKey,
    question: SourceQuestion,
    guards: ViewGuards,
    /// The source in log lines, such as `consul`.
    label: Arc<str>,
    /// The backend of the file whose address is the name.
    named: Option<NamedBackend>,
    view: View,
    /// The members are from another question than the present one.
    moved: bool,
    /// Until this time the pool is undecided without an answer.
    awaited_until: Instant,
    /// The newest answer, until its turn.
    pending: Option<(Told, Instant)>,
    /// No answer is applied before this time.
    not_before: Option<Instant>,
    /// The last time that the view was told.
    last: Option<Instant>,
    /// A source of this process has answered.
    heard: bool,
    members: Vec<ViewedMember>,
}

/// A member of a view as the pool uses it.
#[derive(Debug)]
struct ViewedMember {
    spec: BackendConfig,
    wish: MemberWish,
    raw: Arc<str>,
}

/// The status of one member source.
#[derive(Debug, Clone)]
pub struct SourceStatus {
    /// Which source.
    pub key: SourceKey,
    /// The source in a word: the kind of a registry, `file`, `http`, `dns`, or the name in
    /// an address.
    pub label: Arc<str>,
    /// Whether the members are from another question than the present one, because the
    /// configuration has changed and no answer has arrived since.
    pub moved: bool,
    /// State of its view.
    pub view: ViewStatus,
}

/// What a view has to know about the configuration.
struct ViewSettings {
    question: SourceQuestion,
    guards: ViewGuards,
    named: Option<NamedBackend>,
    first_wait: Duration,
}

// === impl MemberViews ===

impl MemberViews {
    /// Creates, keeps and drops views, so that there is one per source of the
    /// configuration. Returns the dropped ones.
    pub(super) fn configure(&mut self, config: &Config, now: Instant) -> Vec<ViewId> {
        let mut before = std::mem::take(&mut self.ids);
        self.pools.clear();
        for pool in &config.pools {
            let mut sources: Vec<_> = pool.member_sources(&config.dns).collect();
            // Names take precedence.
            sources.sort_by_key(|(key, ..)| key.backend.is_none());
            for (key, question, guards) in sources {
                let settings = ViewSettings::of(pool, &key, question, guards);
                let id = before.remove(&key).unwrap_or_else(|| self.next_id());
                match self.views.get_mut(&id) {
                    Some(view) => view.configure(settings),
                    None => {
                        let view = SourceView::new(key.clone(), settings, now);
                        self.views.insert(id, view);
                    }
                }
                self.pools.entry(Arc::clone(&key.pool)).or_default().push(id);
                self.ids.insert(key, id);
            }
        }
        for id in before.values() {
            self.unsaved = true;
            self.views.remove(id);
        }
        before.into_values().collect()
    }

    fn next_id(&mut self) -> ViewId {
        self.last_id += 1;
        ViewId(self.last_id)
    }

    fn of_pool(&self, pool: &str) -> impl Iterator<Item = &SourceView> {
        let ids = self.pools.get(pool).into_iter().flatten();
        ids.filter_map(|id| self.views.get(id))
    }

    /// Returns the members that the views of a pool list, in order of precedence.
    pub(super) fn listed(&self, pool: &str) -> impl Iterator<Item = ListedMember<'_>> {
        self.of_pool(pool).flat_map(SourceView::listed)
    }

    /// Until when a pool waits for a first answer; `None` if it does not.
    pub(super) fn awaited(&self, pool: &str, now: Instant) -> Option<Instant> {
        let awaited = self.of_pool(pool).filter(|view| !view.view.has_answer());
        awaited.map(|view| view.awaited_until).max().filter(|until| *until > now)
    }

    /// Returns why a backend joins.
    pub(super) fn joined(&self, entry: &BackendEntry) -> String {
        match self.label(entry) {
            Some(label) => format!("added by a member source: {label}"),
            None => "added by a member source".to_owned(),
        }
    }

    /// Returns why a backend leaves.
    pub(super) fn left(&self, entry: &BackendEntry) -> String {
        match self.label(entry) {
            Some(label) => format!("removed by its member source: {label}"),
            None => "removed from every member source".to_owned(),
        }
    }

    /// Returns the label of the source of highest precedence that lists the backend.
    fn label(&self, entry: &BackendEntry) -> Option<Arc<str>> {
        let named = entry.group.is_some();
        let mut views = self.of_pool(&entry.state.pool);
        let found = views.find(|view| match named {
            true => view.key.backend == entry.group,
            false => view.key.backend.is_none() && !entry.origins.is_registered(),
        });
        found.map(|view| Arc::clone(&view.label))
    }

    /// Returns the status of each source of a pool, in order of precedence.
    pub(super) fn status(&self, pool: &str, now: Instant) -> Vec<SourceStatus> {
        self.of_pool(pool).map(|view| view.status(now)).collect()
    }

    /// Returns the views that list a backend, each with its words about it.
    pub(super) fn announced(&self, entry: &BackendEntry, now: Instant) -> Vec<AnnouncedBy> {
        let views = self.of_pool(&entry.state.pool);
        views.filter_map(|view| view.announced(entry, now)).collect()
    }

    /// Whether an answer was applied since the last call.
    pub(super) fn take_applied(&mut self) -> bool {
        std::mem::take(&mut self.applied)
    }

    /// Delays answers until `at`.
    pub(super) fn wait_until(&mut self, at: Instant) {
        self.not_before = Some(at);
    }

    /// Whether views have changed members since the last call.
    pub(super) fn take_unpublished(&mut self) -> bool {
        std::mem::take(&mut self.unpublished)
    }

    /// Whether views have changed members since the last table.
    pub(super) fn is_unpublished(&self) -> bool {
        self.unpublished
    }
}

/// What one source says of a backend.
#[derive(Debug, Clone)]
pub struct AnnouncedBy {
    /// The source.
    pub source: SourceStatus,
    /// What it wishes for the backend.
    pub wish: MemberWish,
    /// The backend's state in the words of the source; empty without one.
    pub raw: Arc<str>,
    /// The labels that the source announces.
    pub labels: MemberLabels,
    /// The weight that counts.
    pub weight: u16,
    /// For how long the source has listed the backend.
    pub listed_for: Duration,
    /// The removal that the guards of the view hold back.
    pub held: Option<HeldRemoval>,
}

// === impl ViewSettings ===

impl ViewSettings {
    fn of(
        pool: &PoolConfig,
        key: &SourceKey,
        question: SourceQuestion,
        guards: ViewGuards,
    ) -> ViewSettings {
        let named = key.backend.as_ref().and_then(|name| {
            let mut all = pool.named.iter();
            all.find(|named| named.name == *name).cloned()
        });
        let first_wait = match (&named, &pool.discover) {
            (None, Some(spec)) => spec.first_wait,
            _ => NAME_WAIT_MAX,
        };
        ViewSettings { question, guards, named, first_wait }
    }
}

// === impl SourceView ===

impl SourceView {
    fn new(key: SourceKey, settings: ViewSettings, now: Instant) -> SourceView {
        SourceView {
            key,
            label: label(&settings.question, settings.named.as_ref()),
            view: View::new(settings.guards.clone()),
            question: settings.question,
            guards: settings.guards,
            named: settings.named,
            moved: false,
            awaited_until: super::schedule::after(now, settings.first_wait),
            pending: None,
            not_before: None,
            last: None,
            heard: false,
            members: Vec::new(),
        }
    }

    /// Applies the settings of a reload.
    fn configure(&mut self, settings: ViewSettings) {
        if !is_same_question(&self.question, &settings.question) {
            self.moved = self.view.has_answer();
            (self.pending, self.heard) = (None, false);
            self.view.forget_answers();
        }
        self.label = label(&settings.question, settings.named.as_ref());
        let named = settings.named != self.named;
        (self.question, self.guards) = (settings.question, settings.guards);
        self.named = settings.named;
        self.view.set_guards(self.guards_in_force());
        if named {
            self.relist();
        }
    }

    /// Returns the guards; those that compare two answers do not apply to answers about two
    /// questions.
    fn guards_in_force(&self) -> ViewGuards {
        let guards = self.guards.clone();
        if self.moved { ViewGuards { max_removed: 100, missing: 1, ..guards } } else { guards }
    }

    /// Lists the members of the view again.
    fn relist(&mut self) {
        let most = self.view.members().map(|member| member.weight).max().unwrap_or(1).max(1);
        let named = self.named.as_ref();
        let members = self.view.members().map(|member| {
            let address = BackendAddr::Tcp(member.address);
            let spec = match named {
                None => BackendConfig {
                    name: Arc::clone(&member.name),
                    address,
                    weight: member.weight.max(1),
                    tier: member.tier,
                    connections_max: 0,
                },
                Some(named) => BackendConfig {
                    name: format!("{}@{}", named.name, member.address).into(),
                    address,
                    weight: weight_of_record(named, member.weight, most),
                    tier: named.tier.saturating_add(member.tier).min(TIER_MAX),
                    connections_max: named.connections_max,
                },
            };
            ViewedMember { spec, wish: member.wish, raw: Arc::clone(&member.raw) }
        });
        self.members = members.collect();
    }

    fn listed(&self) -> impl Iterator<Item = ListedMember<'_>> {
        let group = self.named.as_ref().map(|named| &named.name);
        let source = if group.is_some() { MemberSource::Names } else { MemberSource::Discovery };
        self.members.iter().map(move |member| ListedMember {
            source,
            spec: &member.spec,
            wish: member.wish,
            said: Some((&self.label, &member.raw)),
            group,
        })
    }

    fn status(&self, now: Instant) -> SourceStatus {
        SourceStatus {
            key: self.key.clone(),
            label: Arc::clone(&self.label),
            moved: self.moved,
            view: self.view.status(now),
        }
    }

    fn announced(&self, entry: &BackendEntry, now: Instant) -> Option<AnnouncedBy> {
        let BackendAddr::Tcp(address) = entry.state.address else { return None };
        let place = self.members.iter().position(|member| member.spec.name == entry.state.name)?;
        let mut members = self.view.members();
        let member = members.find(|member| {
            member.address == address && (self.named.is_some() || member.name == entry.state.name)
        })?;
        Some(AnnouncedBy {
            source: self.status(now),
            wish: member.wish,
            raw: Arc::clone(&member.raw),
            labels: member.labels.clone(),
            weight: self.members[place].spec.weight,
            listed_for: now.saturating_duration_since(member.since),
            held: member.held,
        })
    }

    /// Returns when the view has to be looked at, if answers wait at least until `turn`.
    fn next_due(&self, turn: Option<Instant>) -> Option<Instant> {
        let turn = self.not_before.max(turn).filter(|_| self.pending.is_some());
        [turn, self.view.next_due()].into_iter().flatten().min()
    }
}

/// Returns the weight of a member: that of the file; with SRV records, that of the record
/// times that of the file. If the product of the largest weight, `most`, exceeds
/// [`WEIGHT_MAX`], all are scaled down together, so that their ratios stay.
fn weight_of_record(named: &NamedBackend, weight: u16, most: u16) -> u16 {
    if named.question.record == NameRecord::Address {
        return named.weight;
    }
    let product = |weight: u16| u64::from(named.weight) * u64::from(weight);
    let (largest, bound) = (product(most).max(1), u64::from(WEIGHT_MAX));
    let scaled = product(weight) * bound.min(largest) / largest;
    u16::try_from(scaled).unwrap_or(WEIGHT_MAX).max(1)
}

/// Returns the name of a source in log lines.
fn label(question: &SourceQuestion, named: Option<&NamedBackend>) -> Arc<str> {
    match (question, named) {
        (_, Some(named)) => format!("name {}", named.question).into(),
        (SourceQuestion::File { .. }, _) => "file".into(),
        (SourceQuestion::Http { .. }, _) => "http".into(),
        (SourceQuestion::Dns(_), _) => "dns".into(),
        (SourceQuestion::Registry { registry, .. }, _) => registry.kind.word().into(),
    }
}

/// Whether two questions have the same answers: settings of the connection do not count.
fn is_same_question(one: &SourceQuestion, other: &SourceQuestion) -> bool {
    question_text(one) == question_text(other)
}

/// Returns what identifies a question, also in another process.
fn question_text(question: &SourceQuestion) -> String {
    match question {
        SourceQuestion::File { path } => format!("file {}", path.display()),
        SourceQuestion::Http { url, .. } => format!("http {url}"),
        SourceQuestion::Dns(name) => format!("dns {name} {}", name.family.word()),
        SourceQuestion::Registry { registry, query } => {
            let servers: Vec<String> =
                registry.servers.iter().map(|server| server.to_string()).collect();
            format!("{} {} {query:?}", registry.kind.word(), servers.join(" "))
        }
    }
}

// === impl ControlState ===

impl ControlState {
    /// Applies what a source has told `at` this time.
    pub(super) fn told(
        &mut self,
        heartbeats: &mut HeartbeatWatch,
        key: &SourceKey,
        told: Told,
        at: Instant,
        now: Instant,
    ) {
        let Some(id) = self.views.ids.get(key).copied() else {
            let why = match self.pools.named(&key.pool) {
                Some(_) => MembersIgnored::UnknownSource,
                None => MembersIgnored::UnknownPool,
            };
            self.ignored_members[why as usize] += 1;
            return;
        };
        let Some(view) = self.views.views.get_mut(&id) else { return };
        let early = view.not_before.max(self.views.not_before).is_some_and(|turn| turn > now);
        match told {
            Told::Whole(_) if early => {
                view.pending = Some((told, at));
                self.schedule_view(id, now);
                return;
            }
            // The answer that waits says more.
            Told::Alive if view.pending.is_some() => return,
            _ => {}
        }
        if let Some((before, at)) = view.pending.take()
            && !matches!(told, Told::Whole(_))
        {
            self.take_told(heartbeats, id, &before, at, now);
        }
        self.take_told(heartbeats, id, &told, at, now);
    }

    fn take_told(
        &mut self,
        heartbeats: &mut HeartbeatWatch,
        id: ViewId,
        told: &Told,
        at: Instant,
        now: Instant,
    ) {
        let Some(view) = self.views.views.get_mut(&id) else { return };
        let Some(pool) = self.pools.named(&view.key.pool).map(|pool| pool.id) else { return };
        let sight =
            PoolSight { pool, key: &view.key, pools: &self.pools, backends: &self.backends };
        // Answers can wait for each other, but no time goes back.
        let at = view.last.map_or(at, |last| last.max(at)).min(now);
        view.last = Some(at);
        let first = !view.view.has_answer();
        let changed = view.view.take(told, at, &sight);
        if let Told::Whole(set) = told {
            (view.not_before, view.heard) = (Some(now + PACE), true);
            self.views.applied = true;
            if view.moved && set.trusted && !view.view.holds_answer() {
                view.moved = false;
                view.view.set_guards(view.guards.clone());
            }
        }
        let first = first && view.view.has_answer();
        self.view_changed(heartbeats, (id, pool), (changed, first), now);
    }

    /// Looks at a view whose time has come.
    pub(super) fn step_view(&mut self, heartbeats: &mut HeartbeatWatch, id: ViewId, now: Instant) {
        let Some(view) = self.views.views.get_mut(&id) else { return };
        if view.not_before.max(self.views.not_before).is_none_or(|turn| turn <= now)
            && let Some((told, at)) = view.pending.take()
        {
            self.take_told(heartbeats, id, &told, at, now);
        }
        let Some(view) = self.views.views.get_mut(&id) else { return };
        let Some(pool) = self.pools.named(&view.key.pool).map(|pool| pool.id) else { return };
        let sight =
            PoolSight { pool, key: &view.key, pools: &self.pools, backends: &self.backends };
        view.last = Some(now);
        let changed = view.view.step(now, &sight);
        self.view_changed(heartbeats, (id, pool), (changed, false), now);
    }

    /// Follows a view that was told something.
    fn view_changed(
        &mut self,
        heartbeats: &mut HeartbeatWatch,
        (id, pool): (ViewId, PoolId),
        (changed, first): (bool, bool),
        now: Instant,
    ) {
        let Some(view) = self.views.views.get_mut(&id) else { return };
        if changed {
            view.relist();
        }
        self.notice_view(id);
        self.schedule_view(id, now);
        self.views.unsaved |= changed || first;
        if changed && self.fit_members(heartbeats, pool, now) {
            self.views.unpublished = true;
        }
        if first {
            self.first_answer(pool, now);
        }
    }

    /// Sets the timer of a view.
    pub(super) fn schedule_view(&mut self, id: ViewId, now: Instant) {
        let turn = self.views.not_before;
        match self.views.views.get(&id).and_then(|view| view.next_due(turn)) {
            Some(at) => self.schedule.set(TimerKind::View(id), at.max(now)),
            None => self.schedule.cancel(TimerKind::View(id)),
        }
    }

    /// Sets the timers of all views after a reload.
    pub(super) fn schedule_views(&mut self, dropped: Vec<ViewId>, now: Instant) {
        dropped.into_iter().for_each(|id| self.schedule.cancel(TimerKind::View(id)));
        let ids: Vec<ViewId> = self.views.views.keys().copied().collect();
        ids.into_iter().for_each(|id| self.schedule_view(id, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NameFamily, NameQuestion};

    #[test]
    fn srv_weights_keep_their_ratios() {
        let weights = |file: u16, records: [u16; 2]| {
            let question = NameQuestion {
                name: "_pg._tcp.db".into(),
                record: NameRecord::Srv,
                port: None,
                family: NameFamily::Both,
            };
            let name = "pg".into();
            let named = NamedBackend { name, question, weight: file, tier: 0, connections_max: 0 };
            let most = records[0].max(records[1]);
            records.map(|weight| weight_of_record(&named, weight, most))
        };
        assert_eq!(weights(1, [30, 10]), [30, 10]);
        assert_eq!(weights(5, [30, 10]), [150, 50]);
        assert_eq!(weights(100, [30, 10]), [1000, 333]);
        assert_eq!(weights(1000, [1000, 1]), [1000, 1]);
    }
}
