//! Opens all sockets of the start: bind addresses, admin API and heartbeats.
//!
//! Called by `start`. Sockets from another process or a service manager are used, and
//! the others are bound. During an upgrade, it does not listen on new bind addresses.

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

/// How long a new process waits for an address that the old process is still closing.
const ADDRESS_WAIT_MAX: Duration = Duration::from_secs(1);
const ADDRESS_WAIT_STEP: Duration = Duration::from_millis(20);

/// See the module's documentation.
pub(super) struct Listeners {
    pub(super) admin: AdminListener,
    /// The admin listener is that of the old process.
    pub(super) admin_taken: bool,
    pub(super) binds: Binds,
    /// Addresses whose clients are not accepted yet.
    pub(super) fresh: NewBinds,
    /// Addresses of the old process that this process does not use.
    pub(super) not_taken: Vec<BindKey>,
    pub(super) heartbeats: HeartbeatReceiver,
}

// === impl Listeners ===

impl Listeners {
    /// Opens all sockets for `config`. `kept`: sockets that the supervisor has kept.
    ///
    /// # Errors
    /// An address is in use, or does not exist on this host.
    pub(super) fn open(
        config: &Config,
        origin: &Origin,
        workers: usize,
        environment: &mut ProcessEnvironment,
        mut kept: KeptState,
    ) -> Result<Listeners, Failure> {
        let mut given = match &mut environment.old_process {
            Some(before) => before.take_sockets(),
            None => std::mem::take(&mut kept.given),
        };
        let admin = take_admin(&mut given, config, environment, kept.activated)?;
        let admin_taken = admin.is_ok();
        let admin = admin.or_else(|settled| {
            admin::bind(&settled).map_err(|error| {
                Failure::At(Box::new(origin.error(&Spot::AdminListen, error.to_string(), None)))
            })
        })?;
        let mut binds = Binds::new(workers);
        binds.inherit(given.binds);
        let known = &environment.confined.in_the_way;
        let at =
            |refused: BindError| Failure::At(Box::new(refused.with(known).problem(config, origin)));
        let before = environment.old_process.as_ref();
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

/// Takes the admin listener from the sockets of another process, or returns where to
/// bind it. Sockets passed by a service manager override those that the supervisor kept.
fn take_admin(
    given: &mut GivenSockets,
    config: &Config,
    environment: &mut ProcessEnvironment,
    kept: Option<PassedSockets>,
) -> Result<Result<AdminListener, Admin>, Failure> {
    let upgrade = environment.old_process.is_some();
    let passed = environment.activated.take().or(kept).filter(|_| !upgrade);
    if let Some(mut passed) = passed {
        let admin = passed.take_admin(config);
        given.binds = passed.take_sockets(config)?;
        return match admin {
            Some(admin) => Ok(Ok(admin)),
            None => Ok(Err(admin_settled(config, environment)?)),
        };
    }
    let settled = admin_settled(config, environment)?;
    Ok(given.take_admin(&settled).ok_or(settled))
}

/// Returns where the admin API listens. Logs an unusual address.
fn admin_settled(config: &Config, environment: &mut ProcessEnvironment) -> Result<Admin, Failure> {
    let before = environment.old_process.as_ref().and_then(OldProcess::admin_listen);
    let place = match environment.confined.admin.take() {
        Some(place) => place,
        None => admin_place::settle(&config.admin, before)?,
    };
    if let Some(reason) = &place.reason {
        tracing::info!(address = %place.listen, %reason, "admin API listens in a directory of this user");
    }
    Ok(Admin { listen: place.listen, ..config.admin.clone() })
}

/// Binds the new addresses. Retries while the old process still closes an address.
fn reserve(
    binds: &mut Binds,
    config: &Config,
    before: Option<&OldProcess>,
) -> Result<NewBinds, BindError> {
    let deadline = clock::now() + ADDRESS_WAIT_MAX;
    loop {
        match binds.reserve_new(config) {
            Ok(fresh) => return Ok(fresh),
            Err(refused) if before.is_none() || clock::now() > deadline => return Err(refused),
            Err(_) => clock::pause(ADDRESS_WAIT_STEP),
        }
    }
}
