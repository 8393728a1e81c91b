//! The controller: the single writer of everything sessions are routed by.
//!
//! `app` feeds it events with the time and performs the effects it returns.
//! Pure: it does no I/O and reads no clock, so a test drives a year in a
//! millisecond.

use crate::config::{BackendAddress, Config, ProbeSpec};
use crate::health::{ConnectFailure, Intent, Observation, ProbeOutcome, Transition};
use crate::table::Table;
use crate::table::state::{BackendId, BackendState, FrontendState};
use std::sync::Arc;
use std::time::Instant;

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// A validated configuration whose listeners are bound.
    Configure(Arc<Config>),
    /// A probe asked for by [`Effect::Probe`] ended.
    Probed {
        /// Whom it probed.
        backend: BackendId,
        /// How it ended.
        outcome: ProbeOutcome,
    },
    /// A session could not connect, and the backend or its path is to blame.
    ConnectFailed {
        /// To whom.
        backend: BackendId,
        /// How.
        failure: ConnectFailure,
        /// Failures since the last success, this one included.
        in_a_row: u32,
    },
    /// The time named by [`Controller::next_due`] has come.
    Tick,
}

/// Something for the shell to do.
#[derive(Debug)]
pub enum Effect {
    /// New sessions go by this table.
    Publish(Arc<Table>),
    /// Run one probe and report it as [`Event::Probed`].
    Probe {
        /// Whom.
        backend: BackendId,
        /// Where.
        address: BackendAddress,
        /// How.
        spec: Arc<ProbeSpec>,
    },
    /// Write this to the log.
    Log(Transition),
    /// Reset every session of that backend: its removal grace is over.
    CutSessions(BackendId),
}

/// Why an operator's request was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OperatorError {
    /// No pool of that name.
    UnknownPool,
    /// No backend of that name in the pool.
    UnknownBackend,
}

/// A frontend as status shows it.
#[derive(Debug, Clone)]
pub struct FrontendStatus {
    /// Counters and identity.
    pub state: Arc<FrontendState>,
    /// Bind addresses.
    pub binds: Vec<std::net::SocketAddr>,
    /// Pool name.
    pub pool: Arc<str>,
    /// Cap; 0 means none.
    pub connections_max: u32,
}

/// A pool as status shows it.
#[derive(Debug, Clone)]
pub struct PoolStatus {
    /// Pool name.
    pub name: Arc<str>,
    /// Policy name.
    pub balance: &'static str,
    /// In file order.
    pub backends: Vec<BackendStatus>,
}

/// A backend as status shows it.
#[derive(Debug, Clone)]
pub struct BackendStatus {
    /// Counters and identity.
    pub state: Arc<BackendState>,
    /// From the file.
    pub weight: u32,
    /// As balanced by; 0 while it is not eligible.
    pub effective_weight: u32,
    /// From the file.
    pub backup: bool,
    /// Cap; 0 means none.
    pub connections_max: u32,
    /// Operator's wish.
    pub intent: Intent,
    /// Probes' verdict.
    pub observation: Observation,
    /// Passively ejected now.
    pub ejected: bool,
    /// Derived.
    pub eligible: bool,
    /// The newest change, if any.
    pub last_transition: Option<Transition>,
}

/// The whole picture at one moment.
#[derive(Debug, Clone)]
pub struct ControlStatus {
    /// Accepted configurations.
    pub generation: u64,
    /// In file order.
    pub frontends: Vec<FrontendStatus>,
    /// In file order.
    pub pools: Vec<PoolStatus>,
    /// Backends no longer configured that still hold sessions.
    pub leaving: Vec<Arc<BackendState>>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Controller {}

impl Controller {
    /// Nothing configured yet. `workers` sizes the counters' shards; `seed`
    /// drives probe jitter.
    pub fn new(workers: usize, seed: u64) -> Controller {
        let _ = (workers, seed);
        Controller {}
    }

    /// Takes one event and gives what follows from it.
    pub fn apply(&mut self, event: Event, now: Instant) -> Vec<Effect> {
        let _ = (event, now);
        Vec::new()
    }

    /// Sets an operator's intent for one backend.
    pub fn set_intent(
        &mut self,
        pool: &str,
        backend: &str,
        intent: Intent,
        now: Instant,
    ) -> Result<Vec<Effect>, OperatorError> {
        let _ = (pool, backend, intent, now);
        Err(OperatorError::UnknownPool)
    }

    /// When [`Event::Tick`] is wanted next.
    pub fn next_due(&self) -> Option<Instant> {
        None
    }

    /// What status and metrics show.
    pub fn status(&self) -> ControlStatus {
        ControlStatus { generation: 0, frontends: vec![], pools: vec![], leaving: vec![] }
    }
}
