//! The rise/fall detector: turns probe results into *up* or *down*.
//!
//! The controller owns one per backend of a pool with probes. It passes in probe
//! results and rows of failed session connects. The detector reads no clock and does
//! not decide which backend is eligible: [`super`] derives that.
//!
//! - `fall` failures in a row make the backend *down*; `rise` successes in a row make
//!   it *up* (the rule of HAProxy). One opposite result ends the row.
//! - The first result decides alone, and so does the verdict of an agent.

use super::Observation;
use super::agent::{AgentReport, AgentState};
use super::role::SeenRole;
use crate::model::NodeRole;
use std::time::{Duration, Instant};

/// State of a detector, with the current row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeState {
    /// No result yet.
    Unknown,
    /// Works; the sum of both rows is below `fall`.
    Up {
        /// Failed probes in a row.
        probes: u32,
        /// Failed session connects in a row, as of the last report. Successful
        /// connects are not reported.
        connects: u32,
    },
    /// Does not work; the row is below `rise`.
    Down {
        /// Successful probes in a row.
        successes: u32,
    },
}

/// One result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeEvidence {
    /// A probe succeeded.
    Success,
    /// A probe failed.
    Failure,
    /// This many session connects have failed in a row; at least 1.
    ConnectsFailed(u32),
}

/// A change of the observation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeTransition {
    /// The observation before.
    pub from: Observation,
    /// The observation now.
    pub to: Observation,
    /// Probes in the row that caused the change.
    pub probes: u32,
    /// Session connects in that row.
    pub connects: u32,
    /// How long the observation before had lasted.
    pub lasted: Duration,
}

/// See the module documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeDetector {
    rise: u32,
    fall: u32,
    state: ProbeState,
    since: Instant,
    connect_row: ConnectFailureRow,
    /// The newest role that a probe has found. A failed probe does not change it.
    role: Option<SeenRole>,
    /// What the agent of the backend has said. A failed probe does not change it.
    agent: AgentState,
    /// When the agent last changed whether it wants new sessions.
    agent_since: Instant,
}

/// Measures rows of connect failures from the count that all workers share.
///
/// A failure increments the shared count and a success sets it to zero. Other events
/// also end a row here but do not change the count: a successful probe, the end of an
/// ejection. Reports can arrive out of order or get lost. The row is then too short. It
/// is too long by at most the distance between the reordered reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectFailureRow {
    /// The shared count just before the row began; `None`: the next report begins a
    /// row.
    base: Option<u32>,
}

// === impl ProbeState ===

impl ProbeState {
    /// Returns the state after `evidence`.
    ///
    /// Connect failures do not change *unknown*. An unknown backend gets sessions only
    /// while its pool has no probe results. One refused connect would then remove the
    /// backend, and no probe would return it.
    pub fn next(self, evidence: ProbeEvidence, rise: u32, fall: u32) -> ProbeState {
        let up = ProbeState::Up { probes: 0, connects: 0 };
        let down = ProbeState::Down { successes: 0 };
        let weighed = |probes: u32, connects: u32| {
            if probes.saturating_add(connects) >= fall {
                down
            } else {
                ProbeState::Up { probes, connects }
            }
        };
        match (self, evidence) {
            (ProbeState::Unknown, ProbeEvidence::Success) => up,
            (ProbeState::Unknown, ProbeEvidence::Failure) => down,
            (ProbeState::Unknown, ProbeEvidence::ConnectsFailed(_)) => ProbeState::Unknown,
            (ProbeState::Up { .. }, ProbeEvidence::Success) => up,
            (ProbeState::Up { probes, connects }, ProbeEvidence::Failure) => {
                weighed(probes.saturating_add(1), connects)
            }
            (ProbeState::Up { probes, .. }, ProbeEvidence::ConnectsFailed(row)) => {
                weighed(probes, row)
            }
            (ProbeState::Down { successes }, ProbeEvidence::Success) => {
                let successes = successes.saturating_add(1);
                if successes >= rise { up } else { ProbeState::Down { successes } }
            }
            (
                ProbeState::Down { .. },
                ProbeEvidence::Failure | ProbeEvidence::ConnectsFailed(_),
            ) => down,
        }
    }

    /// Returns the state without the row.
    pub fn observation(self) -> Observation {
        match self {
            ProbeState::Unknown => Observation::Unknown,
            ProbeState::Up { .. } => Observation::Up,
            ProbeState::Down { .. } => Observation::Down,
        }
    }

    /// Whether a row has begun.
    pub fn changing(self) -> bool {
        match self {
            ProbeState::Unknown => false,
            ProbeState::Up { probes, connects } => probes > 0 || connects > 0,
            ProbeState::Down { successes } => successes > 0,
        }
    }
}

// === impl ProbeDetector ===

impl ProbeDetector {
    /// Returns a detector without a result. `rise` and `fall` are at least 1.
    pub fn new(rise: u32, fall: u32, now: Instant) -> ProbeDetector {
        ProbeDetector {
            rise,
            fall,
            state: ProbeState::Unknown,
            since: now,
            connect_row: ConnectFailureRow::new(),
            role: None,
            agent: AgentState::default(),
            agent_since: now,
        }
    }

    /// Restores an observation that the old process handed over. Restarts the row.
    pub fn restore(&mut self, observation: Observation, since: Instant) {
        self.connect_row.restart();
        self.since = since;
        self.state = match observation {
            Observation::Unknown => ProbeState::Unknown,
            Observation::Up | Observation::Suspect => ProbeState::Up { probes: 0, connects: 0 },
            Observation::Down => ProbeState::Down { successes: 0 },
        };
    }

    /// Records the result of a probe.
    pub fn observe(&mut self, success: bool, now: Instant) -> Option<ProbeTransition> {
        if success {
            self.connect_row.restart();
        }
        let evidence = if success { ProbeEvidence::Success } else { ProbeEvidence::Failure };
        self.step(evidence, (self.rise, self.fall), now)
    }

    /// Records the verdict of an agent. It decides alone.
    pub fn decide(&mut self, up: bool, now: Instant) -> Option<ProbeTransition> {
        self.connect_row.restart();
        let evidence = if up { ProbeEvidence::Success } else { ProbeEvidence::Failure };
        self.step(evidence, (1, 1), now)
    }

    /// Records an answer of the agent. Returns the state before it.
    pub fn hear_agent(&mut self, report: &AgentReport, now: Instant) -> AgentState {
        let before = self.agent;
        self.set_agent(before.after(report), now);
        before
    }

    /// Sets what the agent has said until `now`.
    pub fn set_agent(&mut self, agent: AgentState, now: Instant) {
        if agent.serves() != self.agent.serves() {
            self.agent_since = now;
        }
        self.agent = agent;
    }

    /// Returns what the agent has said.
    pub fn agent(&self) -> AgentState {
        self.agent
    }

    /// Returns when the agent last changed whether it wants new sessions.
    pub fn agent_since(&self) -> Instant {
        self.agent_since
    }

    /// Records the role that a probe has found. Returns the role before it if this one is
    /// another one.
    pub fn see_role(&mut self, role: NodeRole, now: Instant) -> Option<SeenRole> {
        let before = self.role.replace(SeenRole::next(self.role, role, now));
        before.filter(|before| before.role != role)
    }

    /// Returns the newest role that a probe has found.
    pub fn role(&self) -> Option<SeenRole> {
        self.role
    }

    /// Sets what is known about the role.
    pub fn set_role(&mut self, role: Option<SeenRole>) {
        self.role = role;
    }

    /// Records a session's failed connect. `in_a_row` is the count that all workers
    /// share.
    pub fn connect_failed(&mut self, in_a_row: u32, now: Instant) -> Option<ProbeTransition> {
        let row = self.connect_row.measure(in_a_row);
        self.step(ProbeEvidence::ConnectsFailed(row), (self.rise, self.fall), now)
    }

    /// Discards the row of failed connects, because the backend was ejected in between.
    pub fn forget_connects(&mut self) {
        self.connect_row.restart();
        if let ProbeState::Up { connects, .. } = &mut self.state {
            *connects = 0;
        }
    }

    /// Sets new thresholds. Keeps the observation and restarts the row.
    pub fn retune(&mut self, rise: u32, fall: u32) {
        self.rise = rise;
        self.fall = fall;
        self.connect_row.restart();
        self.state = match self.state {
            ProbeState::Unknown => ProbeState::Unknown,
            ProbeState::Up { .. } => ProbeState::Up { probes: 0, connects: 0 },
            ProbeState::Down { .. } => ProbeState::Down { successes: 0 },
        };
    }

    /// Returns the state without the row.
    pub fn observation(&self) -> Observation {
        self.state.observation()
    }

    /// Returns the state with the current row.
    pub fn state(&self) -> ProbeState {
        self.state
    }

    /// Returns when the observation last changed.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Whether a row has begun. Probes then run at `fast_interval`.
    pub fn changing(&self) -> bool {
        self.state.changing()
    }

    fn step(
        &mut self,
        evidence: ProbeEvidence,
        (rise, fall): (u32, u32),
        now: Instant,
    ) -> Option<ProbeTransition> {
        let before = self.state;
        self.state = before.next(evidence, rise, fall);
        let (from, to) = (before.observation(), self.state.observation());
        if from == to {
            return None;
        }
        let (probes, connects) = match (before, evidence) {
            (ProbeState::Unknown, _) => (1, 0),
            (ProbeState::Up { probes, connects }, ProbeEvidence::Failure) => (probes + 1, connects),
            (ProbeState::Up { probes, .. }, ProbeEvidence::ConnectsFailed(row)) => (probes, row),
            (ProbeState::Up { .. }, ProbeEvidence::Success) => (0, 0),
            (ProbeState::Down { successes }, _) => (successes + 1, 0),
        };
        let lasted = now.saturating_duration_since(self.since);
        self.since = now;
        Some(ProbeTransition { from, to, probes, connects, lasted })
    }
}

// === impl ConnectFailureRow ===

impl ConnectFailureRow {
    /// Returns an empty row at a shared count of zero.
    pub fn new() -> ConnectFailureRow {
        ConnectFailureRow { base: Some(0) }
    }

    /// Records a failure's report of the shared count, and returns the length of the row.
    pub fn measure(&mut self, in_a_row: u32) -> u32 {
        let base = match self.base {
            Some(base) if in_a_row > base => base,
            // A success reset the count, or this failure begins the row.
            _ => in_a_row.saturating_sub(1),
        };
        self.base = Some(base);
        in_a_row.saturating_sub(base).max(1)
    }

    /// Returns the length of the row at this shared count; 0 if no report began it.
    pub fn length(&self, in_a_row: u32) -> u32 {
        self.base.map_or(0, |base| in_a_row.saturating_sub(base))
    }

    /// Ends the row after an event other than a successful connect.
    pub fn restart(&mut self) {
        self.base = None;
    }
}

impl Default for ConnectFailureRow {
    fn default() -> Self {
        ConnectFailureRow::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;
    use std::fmt::Write;

    fn start() -> Instant {
        tidegate_net::clock::now()
    }

    fn show(state: ProbeState) -> String {
        match state {
            ProbeState::Unknown => "unknown".into(),
            ProbeState::Up { probes: 0, connects: 0 } => "up".into(),
            ProbeState::Up { probes, connects } => format!("up-{probes}p{connects}c"),
            ProbeState::Down { successes: 0 } => "down".into(),
            ProbeState::Down { successes } => format!("down+{successes}"),
        }
    }

    #[test]
    fn every_state_and_result_with_rise_2_fall_3() {
        let mut states = vec![ProbeState::Unknown];
        for probes in 0..3 {
            states.extend((0..3 - probes).map(|connects| ProbeState::Up { probes, connects }));
        }
        states.extend((0..2).map(|successes| ProbeState::Down { successes }));
        let mut out = String::from("state    success failure 1-connect 2-connects 3-connects\n");
        for state in states {
            let next = |e| show(state.next(e, 2, 3));
            let line = format!(
                "{:<8} {:<7} {:<7} {:<9} {:<10} {}",
                show(state),
                next(ProbeEvidence::Success),
                next(ProbeEvidence::Failure),
                next(ProbeEvidence::ConnectsFailed(1)),
                next(ProbeEvidence::ConnectsFailed(2)),
                next(ProbeEvidence::ConnectsFailed(3)),
            );
            writeln!(out, "{line}").unwrap();
        }
        expect![[r#"
            state    success failure 1-connect 2-connects 3-connects
            unknown  up      down    unknown   unknown    unknown
            up       up      up-1p0c up-0p1c   up-0p2c    down
            up-0p1c  up      up-1p1c up-0p1c   up-0p2c    down
            up-0p2c  up      down    up-0p1c   up-0p2c    down
            up-1p0c  up      up-2p0c up-1p1c   down       down
            up-1p1c  up      down    up-1p1c   down       down
            up-2p0c  up      down    down      down       down
            down     down+1  down    down      down       down
            down+1   up      down    down      down       down
        "#]]
        .assert_eq(&out);
    }

    #[test]
    fn first_result_decides_alone() {
        let now = start();
        let mut detector = ProbeDetector::new(3, 3, now);
        let change = detector.observe(true, now + Duration::from_secs(1)).unwrap();
        assert_eq!((change.from, change.to), (Observation::Unknown, Observation::Up));
        assert_eq!(change.lasted, Duration::from_secs(1));

        let mut detector = ProbeDetector::new(3, 3, now);
        assert_eq!(detector.observe(false, now).unwrap().to, Observation::Down);
    }

    #[test]
    fn one_success_ends_a_row_of_failures() {
        let now = start();
        let mut detector = ProbeDetector::new(2, 3, now);
        let results = [true, false, false, true, false, false];
        let changes = results.iter().filter_map(|ok| detector.observe(*ok, now)).count();
        assert_eq!(changes, 1, "only unknown -> up");
        assert!(detector.changing());
        let change = detector.observe(false, now).unwrap();
        assert_eq!((change.to, change.probes), (Observation::Down, 3));
        assert!(!detector.changing(), "no row after a change");
    }

    #[test]
    fn one_failure_ends_a_row_of_successes() {
        let now = start();
        let mut detector = ProbeDetector::new(2, 3, now);
        for ok in [false, true, false, true] {
            detector.observe(ok, now);
        }
        assert_eq!(detector.observation(), Observation::Down);
        assert!(detector.changing());
        assert_eq!(detector.observe(true, now).unwrap().to, Observation::Up);
    }

    #[test]
    fn connect_failures_with_successes_between_do_not_add_up() {
        let now = start();
        let mut detector = ProbeDetector::new(2, 3, now);
        detector.observe(true, now);
        for _ in 0..1000 {
            assert_eq!(detector.connect_failed(1, now), None);
        }
    }

    #[test]
    fn failed_connects_and_failed_probes_in_a_row_add_up() {
        let now = start();
        let mut detector = ProbeDetector::new(2, 3, now);
        detector.observe(true, now);
        assert_eq!(detector.connect_failed(1, now), None);
        assert_eq!(detector.connect_failed(2, now), None);
        let change = detector.observe(false, now).unwrap();
        assert_eq!((change.to, change.probes, change.connects), (Observation::Down, 1, 2));
    }

    #[test]
    fn burst_of_failures_out_of_order_is_one_transition() {
        let now = start();
        let mut detector = ProbeDetector::new(2, 3, now);
        detector.observe(true, now);
        let changes = (0..400u32).filter_map(|i| detector.connect_failed((i ^ 1) + 1, now)).count();
        assert_eq!(changes, 1);
        assert_eq!(detector.observation(), Observation::Down);
    }

    #[test]
    fn probe_success_ends_a_row_of_connect_failures_at_any_shared_count() {
        let now = start();
        let mut detector = ProbeDetector::new(1, 3, now);
        detector.observe(true, now);
        detector.connect_failed(2, now);
        detector.observe(true, now);
        assert_eq!(detector.connect_failed(801, now), None);
        assert_eq!(detector.connect_failed(800, now), None, "a late report adds no length");
        assert_eq!(detector.observation(), Observation::Up);
    }

    #[test]
    fn new_thresholds_keep_the_observation_and_restart_the_row() {
        let now = start();
        let mut detector = ProbeDetector::new(2, 3, now);
        for ok in [true, false, false] {
            detector.observe(ok, now);
        }
        detector.retune(2, 2);
        assert!(!detector.changing());
        assert_eq!(detector.observation(), Observation::Up);
        assert_eq!(detector.observe(false, now), None);
        assert_eq!(detector.observe(false, now).unwrap().to, Observation::Down);
    }
}
