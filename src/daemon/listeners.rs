//! Everything that clients, operators and senders of heartbeats connect to, at the start:
//! what this process was given is taken, the rest is bound.
//!
//! Called by `start`. No client gets in here.

use super::binds::{Binds, NewBinds};
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
        let received = match &mut surroundings.predecessor {
            Some(before) => before.take_heartbeats(),
            None => kept.take_heartbeats(),
        };
        let mut binds = Binds::new(workers);
        let given = take_given(&mut binds, config, surroundings, kept)?;
        let admin_taken = given.is_ok();
        let admin = given.or_else(|settled| {
            admin::bind(&settled).map_err(|error| {
                Failure::At(Box::new(origin.error(&Spot::AdminListen, error.to_string(), None)))
            })
        })?;
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
        heartbeats.inherit(received);
        let change = heartbeats.prepare(config).map_err(Failure::Runtime)?;
        heartbeats.adopt(change);
        Ok(Listeners { admin, admin_taken, binds, fresh, not_taken, heartbeats })
    }
}

/// Has `binds` find what this process was given; gives the admin listener, where that is
/// among it, or else where to bind it.
fn take_given(
    binds: &mut Binds,
    config: &Config,
    surroundings: &mut ProcessEnvironment,
    mut kept: KeptState,
) -> Result<Result<AdminListener, Admin>, Failure> {
    let mut passed = surroundings.activated.take().or_else(|| kept.activated.take());
    let activated = passed.as_mut().and_then(|passed| passed.take_admin(config));
    let settled = match &activated {
        Some(_) => config.admin.clone(),
        None => admin_settled(config, surroundings)?,
    };
    let admin = if let Some(before) = &mut surroundings.predecessor {
        binds.inherit(before.take_sockets());
        before.take_admin(&settled)
    } else if let Some(passed) = passed {
        binds.inherit(passed.take_sockets(config)?);
        activated
    } else {
        binds.inherit(kept.take_binds());
        kept.take_admin(&settled)
    };
    Ok(admin.ok_or(settled))
}

/// Where the admin API listens; a line in the log if that is not the usual place.
fn admin_settled(config: &Config, surroundings: &mut ProcessEnvironment) -> Result<Admin, Failure> {
    let before = surroundings.predecessor.as_ref().and_then(OldProcess::admin_listen);
    let place = match surroundings.confined.admin.take() {
        Some(place) => place,
        None => admin_place::settle(&config.admin, before)?,
    };
    if let Some(reason) = &place.reason {
        tracing::info!(address = %place.listen, %reason, "admin API listens in this user's own directory");
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
