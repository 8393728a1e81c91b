//! The one state under which operators see a backend, and the spans of the last hour in
//! which a backend had each state.
//!
//! Called by `daemon` for the admin API, and by `crate::finding`. It changes nothing.

use super::BackendStatus;
use crate::health::{Intent, Observation, Transition};
use std::time::{Duration, Instant};

/// The state of a backend in one word. The first variant that applies is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ShownState {
    /// Probes or heartbeats found it down.
    Down,
    /// Ejected after failures.
    Ejected,
    /// An operator drains it or has put it into maintenance.
    Draining,
    /// Suspect.
    Suspect,
    /// Without a result, and not eligible.
    Unknown,
    /// In slow start.
    Joining,
    /// A backup that gets no sessions.
    Standby,
    /// None of the others.
    Up,
}

/// A time in which a backend had one state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateSpan {
    /// The name of the state.
    pub state: &'static str,
    /// Age of its begin.
    pub from: Duration,
    /// Age of its end; zero if it lasts.
    pub to: Duration,
    /// Why it began; empty if that is not known.
    pub reason: String,
}

/// Time that spans cover.
pub const SPANS_FOR: Duration = Duration::from_secs(3_600);

/// What transitions change.
#[derive(Debug, Clone, Copy)]
struct Facts {
    observation: &'static str,
    ejected: bool,
    drained: bool,
}

// === impl ShownState ===

impl ShownState {
    /// Every state.
    pub const ALL: [ShownState; 8] = [
        ShownState::Down,
        ShownState::Ejected,
        ShownState::Draining,
        ShownState::Suspect,
        ShownState::Unknown,
        ShownState::Joining,
        ShownState::Standby,
        ShownState::Up,
    ];

    /// Returns the state of a backend.
    pub fn of(backend: &BackendStatus) -> ShownState {
        match backend.observation {
            Observation::Down => ShownState::Down,
            _ if backend.ejected => ShownState::Ejected,
            _ if backend.intent != Intent::Ready => ShownState::Draining,
            Observation::Suspect => ShownState::Suspect,
            Observation::Unknown if !backend.eligible => ShownState::Unknown,
            _ if backend.ramp_percent < 100 => ShownState::Joining,
            _ if backend.tier > 0 && !backend.serves => ShownState::Standby,
            _ => ShownState::Up,
        }
    }

    /// Returns the state with this name.
    pub fn named(name: &str) -> Option<ShownState> {
        ShownState::ALL.into_iter().find(|state| state.name() == name)
    }

    /// Returns the word that operators read.
    pub fn name(self) -> &'static str {
        match self {
            ShownState::Down => "down",
            ShownState::Ejected => "ejected",
            ShownState::Draining => "draining",
            ShownState::Suspect => "suspect",
            ShownState::Unknown => "unknown",
            ShownState::Joining => "joining",
            ShownState::Standby => "standby",
            ShownState::Up => "up",
        }
    }

    /// Returns the code in a map of one byte per backend.
    pub fn code(self) -> u8 {
        match self {
            ShownState::Up => 0,
            ShownState::Down => 1,
            ShownState::Ejected => 2,
            ShownState::Suspect => 3,
            ShownState::Joining => 4,
            ShownState::Draining => 5,
            ShownState::Standby => 6,
            ShownState::Unknown => 7,
        }
    }
}

// === impl Facts ===

impl Facts {
    /// Returns the facts before the first of these transitions (oldest first), as far as
    /// they show it.
    fn before(transitions: &[&Transition], backend: &BackendStatus) -> Facts {
        let first = |known: fn(&str) -> bool| transitions.iter().find(|one| known(one.to));
        let observed = first(|to| observation(to).is_some()).and_then(|one| observation(one.from));
        let drained = first(is_intent).map(|one| one.from != "ready");
        Facts {
            observation: observed.unwrap_or_else(|| match transitions.is_empty() {
                true => backend.observation.name(),
                false => "unknown",
            }),
            ejected: transitions.first().is_some_and(|one| one.from == "ejected"),
            drained: drained.unwrap_or(backend.intent != Intent::Ready),
        }
    }

    fn apply(&mut self, transition: &Transition) {
        if transition.to == "ejected" {
            self.ejected = true;
        } else if matches!(transition.from, "ejected" | "trial") {
            self.ejected = false;
        }
        if let Some(observation) = observation(transition.to) {
            self.observation = observation;
        } else if is_intent(transition.to) {
            self.drained = transition.to != "ready";
        }
    }

    fn key(self) -> &'static str {
        match self {
            Facts { observation: "down", .. } => ShownState::Down.name(),
            Facts { ejected: true, .. } => ShownState::Ejected.name(),
            Facts { drained: true, .. } => ShownState::Draining.name(),
            Facts { observation, .. } => observation,
        }
    }
}

/// Returns the name if it is that of an observation.
fn observation(name: &str) -> Option<&'static str> {
    ["unknown", "up", "suspect", "down"].into_iter().find(|known| *known == name)
}

fn is_intent(name: &str) -> bool {
    matches!(name, "ready" | "draining" | "maintenance" | "starting" | "stopping")
}

/// Returns the states of the last [`SPANS_FOR`], oldest first. `history` is newest first, and
/// the states begin with its oldest transition. `ramp` is the age of the running slow start.
pub fn state_spans(
    backend: &BackendStatus,
    history: &[Transition],
    ramp: Option<Duration>,
    now: Instant,
) -> Vec<StateSpan> {
    let transitions: Vec<&Transition> = history.iter().rev().collect();
    let mut facts = Facts::before(&transitions, backend);
    let age = |at: Instant| now.saturating_duration_since(at).min(SPANS_FOR);
    let begins = transitions.first().map_or(SPANS_FOR, |one| {
        (now.saturating_duration_since(one.at) + one.lasted).min(SPANS_FOR)
    });
    let span = |state, from, reason| StateSpan { state, from, to: Duration::ZERO, reason };
    let mut spans = vec![span(facts.key(), begins, String::new())];
    for transition in &transitions {
        facts.apply(transition);
        if spans.last().is_some_and(|last| last.state != facts.key()) {
            spans.push(span(facts.key(), age(transition.at), transition.reason.clone()));
        }
    }
    let shown = ShownState::of(backend).name();
    if let Some(last) = spans.last_mut()
        && last.state != shown
    {
        let since = ramp.filter(|since| *since < last.from);
        match since {
            Some(since) => spans.push(span(shown, since, "slow start".to_owned())),
            None => last.state = shown,
        }
    }
    for place in 1..spans.len() {
        spans[place - 1].to = spans[place].from;
    }
    // What ended more than an hour ago is empty after the cut.
    spans.retain(|span| span.from > span.to || span.to.is_zero());
    spans
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{BackendAddr, BackendId};
    use crate::table::state::BackendState;

    fn spans(
        transitions: &[(u64, u64, &'static str, &'static str)],
        change: impl Fn(&mut BackendStatus),
        ramp: Option<u64>,
    ) -> Vec<(&'static str, u64, u64)> {
        let now = tidegate_net::clock::now();
        let ago = |seconds| now.checked_sub(Duration::from_secs(seconds)).expect("not at boot");
        let (name, address) = ("a".into(), BackendAddr::Unix("/run/a.sock".into()));
        let state = BackendState::new(BackendId(1), "web".into(), name, address, 1);
        let mut backend =
            BackendStatus { observation: Observation::Up, ..BackendStatus::plain(state, now) };
        change(&mut backend);
        let transition = |(at, lasted, from, to): &(u64, u64, &'static str, &'static str)| {
            let (at, lasted) = (ago(*at), Duration::from_secs(*lasted));
            let (pool, backend, reason) = ("web".into(), "a".into(), format!("now {to}"));
            Transition { pool, backend, from, to, reason, at, lasted }
        };
        let history: Vec<Transition> = transitions.iter().rev().map(transition).collect();
        let spans = state_spans(&backend, &history, ramp.map(Duration::from_secs), now);
        spans.iter().map(|one| (one.state, one.from.as_secs(), one.to.as_secs())).collect()
    }

    #[test]
    fn spans_follow_the_transitions_of_all_kinds() {
        let transitions = [
            (900, 20, "unknown", "up"),
            (600, 300, "up", "down"),
            (500, 100, "down", "up"),
            (400, 100, "up", "ejected"),
            (390, 10, "ejected", "trial"),
            (380, 10, "trial", "up"),
            (100, 800, "ready", "draining"),
        ];
        let drained = |backend: &mut BackendStatus| backend.intent = Intent::Draining;
        let expected = [
            ("unknown", 920, 900),
            ("up", 900, 600),
            ("down", 600, 500),
            ("up", 500, 400),
            ("ejected", 400, 390),
            ("up", 390, 100),
            ("draining", 100, 0),
        ];
        assert_eq!(spans(&transitions, drained, None), expected);
    }

    #[test]
    fn only_the_last_hour_is_shown() {
        let transitions = [(8_000, 100, "unknown", "up"), (5_000, 3_000, "up", "down")];
        let down = |backend: &mut BackendStatus| backend.observation = Observation::Down;
        assert_eq!(spans(&transitions, down, None), [("down", 3_600, 0)]);
        assert_eq!(spans(&[], |_| (), None), [("up", 3_600, 0)]);
    }

    #[test]
    fn slow_start_and_standby_are_the_newest_state() {
        let transitions = [(50, 10, "unknown", "up")];
        let joins = |backend: &mut BackendStatus| backend.ramp_percent = 40;
        let expected = [("unknown", 60, 50), ("up", 50, 12), ("joining", 12, 0)];
        assert_eq!(spans(&transitions, joins, Some(12)), expected);
        let standby = |backend: &mut BackendStatus| {
            (backend.tier, backend.serves) = (1, false);
        };
        assert_eq!(spans(&transitions, standby, None)[1], ("standby", 50, 0));
    }

    #[test]
    fn every_state_is_found_by_its_name_and_has_a_code_of_its_own() {
        let codes: std::collections::HashSet<u8> =
            ShownState::ALL.into_iter().map(ShownState::code).collect();
        assert_eq!(codes.len(), ShownState::ALL.len());
        for state in ShownState::ALL {
            assert_eq!(ShownState::named(state.name()), Some(state));
        }
        assert_eq!(ShownState::named("well"), None);
    }
}
