//! Everything that clients, operators and senders of heartbeats connect to, at the start:
//! what this process was given is taken, the rest is bound.
//!
//! Called by `start`. No client gets in here.

use super::activation::PassedSockets;
use super::binds::{Binds, NewBinds};
use super::given_sockets::GivenSockets;
use super::heartbeats::HeartbeatReceiver;
use super::preflight::try_sources;
use super::refused::BindError;
use super::supervised::KeptState;
use super::{Failure, OldProcess, ProcessEnvironment, admin_place};
use crate::admin::{self, AdminListener};
use std::time::Duration;
use tidegate_config::{Origin, Spot};
use tidegate_core::model::{Admin, BindKey, Config};
use tidegate_net::clock;

/// How long a new process waits for an address that the one before has just given
/// up, and is still closing.
const GIVEN_UP_MAX: Duration = Duration::from_secs(1);
const GIVEN_UP_STEP: Duration = Duration::from_millis(20);

/// See the module's documentation.
pub(super) struct Listeners {
    pub(super) admin: AdminListener,
    /// It is the one of the process before.
    pub(super) admin_taken: bool,
    pub(super) binds: Binds,
    /// No client gets in yet.
    pub(super) fresh: NewBinds,
    /// Of the process before.
    pub(super) not_taken: Vec<BindKey>,
    pub(super) heartbeats: HeartbeatReceiver,
}

// === impl Listeners ===

impl Listeners {
    /// Opens everything for `config`. `kept` is what a supervisor has held.
    ///
    /// # Errors
    /// An address is taken, or does not exist on this host.
    pub(super) fn open(
        config: &Config,
        origin: &Origin,
        workers: usize,
        surroundings: &mut ProcessEnvironment,
        mut kept: KeptState,
    ) -> Result<Listeners, Failure> {
        let mut given = match &mut surroundings.predecessor {
            Some(before) => before.take_sockets(),
            None => std::mem::take(&mut kept.given),
        };
        let admin = take_admin(&mut given, config, surroundings, kept.activated)?;
        let admin_taken = admin.is_ok();
        let admin = admin.or_else(|settled| {
            admin::bind(&settled).map_err(|error| {
                Failure::At(Box::new(origin.error(&Spot::AdminListen, error.to_string(), None)))
            })
        })?;
        let mut binds = Binds::new(workers);
        binds.inherit(given.binds);
        let known = &surroundings.confined.in_the_way;
        let at =
            |refused: BindError| Failure::At(Box::new(refused.with(known).problem(config, origin)));
        let before = surroundings.predecessor.as_ref();
        let mut fresh = reserve(&mut binds, config, before).map_err(at)?;
        if before.is_none() {
            fresh.start().map_err(at)?;
        }
        let not_taken = binds.release(&fresh);
        try_sources(config).map_err(|(source, why)| {
            Failure::At(Box::new(origin.error(&Spot::Source(source), why, None)))
        })?;
        let mut heartbeats = HeartbeatReceiver::default();
        heartbeats.inherit(given.heartbeats);
        let change = heartbeats.prepare(config).map_err(Failure::Runtime)?;
        heartbeats.adopt(change);
        Ok(Listeners { admin, admin_taken, binds, fresh, not_taken, heartbeats })
    }
}

/// The admin listener, where it is among what this process was given, or else where to
/// bind it. What a service manager has passed takes the place of what was kept.
fn take_admin(
    given: &mut GivenSockets,
    config: &Config,
    surroundings: &mut ProcessEnvironment,
    kept: Option<PassedSockets>,
) -> Result<Result<AdminListener, Admin>, Failure> {
    let upgrade = surroundings.predecessor.is_some();
    let passed = surroundings.activated.take().or(kept).filter(|_| !upgrade);
    if let Some(mut passed) = passed {
        let admin = passed.take_admin(config);
        given.binds = passed.take_sockets(config)?;
        return match admin {
            Some(admin) => Ok(Ok(admin)),
            None => Ok(Err(admin_settled(config, surroundings)?)),
        };
    }
    let settled = admin_settled(config, surroundings)?;
    Ok(given.take_admin(&settled).ok_or(settled))
}

/// Where the admin API listens; a line in the log if that is not the usual place.
fn admin_settled(config: &Config, surroundings: &mut ProcessEnvironment) -> Result<Admin, Failure> {
    let before = surroundings.predecessor.as_ref().and_then(OldProcess::admin_listen);
    let place = match surroundings.confined.admin.take() {
        Some(place) => place,
        None => admin_place::settle(&config.admin, before)?,
    };
    if let Some(reason) = &place.reason {
        tracing::info!(address = %place.listen, %reason, "admin API listens in a directory of this user");
    }
    Ok(Admin { listen: place.listen, ..config.admin.clone() })
}

/// Binds what is new. The process before may be about to close an address.
fn reserve(
    binds: &mut Binds,
    config: &Config,
    before: Option<&OldProcess>,
) -> Result<NewBinds, BindError> {
    let deadline = clock::now() + GIVEN_UP_MAX;
    loop {
        match binds.reserve_new(config) {
            Ok(fresh) => return Ok(fresh),
            Err(refused) if before.is_none() || clock::now() > deadline => return Err(refused),
            Err(_) => clock::pause(GIVEN_UP_STEP),
        }
    }
}
