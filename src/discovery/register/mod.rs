//! Registration of a local service in a registry, and its removal.
//!
//! The command `tidegate register` calls [`keep`]. It announces the service after the first
//! successful check, renews the registration three times per TTL, repeats the announcement
//! if the registry lost it, and removes it before the process exits. A registry that does
//! not answer ends nothing: each error is reported and retried.

pub mod check;
pub mod consul;
pub mod etcd;
pub mod zookeeper;

use crate::backoff::Pause;
use crate::client::HttpFailure;
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tidegate_net::clock;
use tokio::sync::watch;
use tokio::time::{sleep_until, timeout};

/// Shortest TTL. An etcd cluster grants at least 2 s.
pub const TTL_MIN: Duration = Duration::from_secs(3);

/// Longest TTL.
pub const TTL_MAX: Duration = Duration::from_secs(3600);

/// Longest time for the removal before the process exits.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A service of this host, as the registry announces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// Name of the service.
    pub service: String,
    /// Unique in the service.
    pub id: String,
    /// Where clients reach it.
    pub address: SocketAddr,
    /// `None`: the registry's default.
    pub weight: Option<u16>,
    /// Further keys and values.
    pub labels: BTreeMap<String, String>,
    /// The registry removes the registration after this time without a renewal;
    /// [`TTL_MIN`] to [`TTL_MAX`].
    pub ttl: Duration,
    /// What the registry announces while the check fails.
    pub on_down: WhenDown,
}

/// What the registry announces while the check fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenDown {
    /// The service in state `critical`. Balancers decide what it means.
    #[default]
    Mark,
    /// Nothing.
    Remove,
}

/// What the checks say about the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ServiceHealth {
    /// No check succeeded or failed often enough. Nothing is announced.
    #[default]
    Unknown,
    /// The service answers.
    Up,
    /// The service does not answer.
    Down,
}

/// State of the service in an announcement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegisteredState {
    /// It accepts sessions.
    Ready,
    /// Its check fails.
    Critical,
}

/// The result of a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RenewalResult {
    /// The registration is valid for another TTL.
    Renewed,
    /// The registry has no such registration.
    Lost,
}

/// What happens to a registration, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegisterNote {
    /// The registry announces the service in this state.
    Announced(RegisteredState),
    /// The registry no longer announces the service, because its check fails.
    Removed,
    /// The registry lost the registration. It is announced again.
    Lost,
    /// A request failed. It is repeated.
    Failed(HttpFailure),
    /// Requests succeed again.
    Recovered,
    /// The registration was removed before the exit.
    Left,
    /// The removal failed. The registration ends after its TTL.
    Stays(HttpFailure),
}

/// Writes one registration to a registry.
pub trait Registrar: Send {
    /// Announces the service in a state, for one TTL. It replaces a former announcement.
    fn announce(
        &mut self,
        registration: &Registration,
        state: RegisteredState,
    ) -> impl Future<Output = Result<(), HttpFailure>> + Send;

    /// Extends the registration by one TTL.
    fn renew(
        &mut self,
        registration: &Registration,
    ) -> impl Future<Output = Result<RenewalResult, HttpFailure>> + Send;

    /// Removes the registration. A registration that is gone is no error.
    fn remove(
        &mut self,
        registration: &Registration,
    ) -> impl Future<Output = Result<(), HttpFailure>> + Send;
}

/// Keeps a service registered until `stop` is ready, then removes it. Returns whether
/// nothing of it is left in the registry.
pub async fn keep<R: Registrar>(
    registrar: R,
    registration: &Registration,
    mut health: watch::Receiver<ServiceHealth>,
    stop: impl Future<Output = ()>,
    note: &mut impl FnMut(RegisterNote),
) -> bool {
    let next = clock::now();
    let mut kept = Kept {
        registrar,
        registration,
        announced: None,
        may_exist: false,
        pause: Pause::new(),
        next,
    };
    let mut stop = std::pin::pin!(stop);
    loop {
        let wanted = registration.state_of(*health.borrow_and_update());
        tokio::select! {
            () = &mut stop => break,
            () = kept.step(wanted, note) => {}
        }
        tokio::select! {
            () = &mut stop => break,
            () = sleep_until(kept.next.into()) => {}
            changed = health.changed() => if changed.is_err() {
                // The checks ended; the last result holds.
                tokio::select! {
                    () = &mut stop => break,
                    () = sleep_until(kept.next.into()) => {}
                }
            }
        }
    }
    kept.leave(note).await
}

/// A registration and what the registry knows of it.
struct Kept<'a, R> {
    registrar: R,
    registration: &'a Registration,
    /// The state that the registry announces.
    announced: Option<RegisteredState>,
    /// The registry can have a registration: a request that failed can have succeeded.
    may_exist: bool,
    pause: Pause,
    /// Time of the next request.
    next: Instant,
}

// === impl Registration ===

impl Registration {
    /// The state to announce; `None`: nothing is announced.
    fn state_of(&self, health: ServiceHealth) -> Option<RegisteredState> {
        match (health, self.on_down) {
            (ServiceHealth::Up, _) => Some(RegisteredState::Ready),
            (ServiceHealth::Down, WhenDown::Mark) => Some(RegisteredState::Critical),
            (ServiceHealth::Unknown, _) | (ServiceHealth::Down, WhenDown::Remove) => None,
        }
    }
}

// === impl Kept ===

impl<R: Registrar> Kept<'_, R> {
    /// Sends what the state needs: an announcement, a renewal, a removal or nothing.
    async fn step(&mut self, wanted: Option<RegisteredState>, note: &mut impl FnMut(RegisterNote)) {
        self.pause.begin();
        let result = match wanted {
            Some(state) if self.announced == wanted => self.renew(state, note).await,
            Some(state) => self.announce(state, note).await,
            None if self.may_exist => self.withdraw(note).await,
            None => Ok(()),
        };
        match result {
            Ok(()) => {
                if self.pause.failures() > 0 {
                    note(RegisterNote::Recovered);
                }
                self.pause.succeeded();
                self.next = clock::now() + self.registration.ttl / 3;
            }
            Err(failure) => {
                // The log has the first of several failures in a row.
                if self.pause.failures() == 0 {
                    note(RegisterNote::Failed(failure));
                }
                self.next = clock::now() + self.pause.delay_after_failure().min(self.retry_max());
            }
        }
    }

    /// Longest delay after a failure: several attempts fit into a TTL.
    fn retry_max(&self) -> Duration {
        self.registration.ttl / 6
    }

    async fn announce(
        &mut self,
        state: RegisteredState,
        note: &mut impl FnMut(RegisterNote),
    ) -> Result<(), HttpFailure> {
        self.may_exist = true;
        self.registrar.announce(self.registration, state).await?;
        self.announced = Some(state);
        note(RegisterNote::Announced(state));
        Ok(())
    }

    async fn renew(
        &mut self,
        state: RegisteredState,
        note: &mut impl FnMut(RegisterNote),
    ) -> Result<(), HttpFailure> {
        if self.registrar.renew(self.registration).await? == RenewalResult::Lost {
            self.announced = None;
            note(RegisterNote::Lost);
            self.announce(state, note).await?;
        }
        Ok(())
    }

    async fn withdraw(&mut self, note: &mut impl FnMut(RegisterNote)) -> Result<(), HttpFailure> {
        self.announced = None;
        self.registrar.remove(self.registration).await?;
        self.may_exist = false;
        note(RegisterNote::Removed);
        Ok(())
    }

    /// Removes the registration, with several attempts. Returns whether nothing is left.
    async fn leave(mut self, note: &mut impl FnMut(RegisterNote)) -> bool {
        if !self.may_exist {
            return true;
        }
        let (mut failure, mut pause) = (None, Pause::new());
        let removal = async {
            loop {
                pause.begin();
                match self.registrar.remove(self.registration).await {
                    Ok(()) => break,
                    Err(why) => failure = Some(why),
                }
                pause.failed().await;
            }
        };
        if timeout(REMOVE_TIMEOUT, removal).await.is_ok() {
            note(RegisterNote::Left);
            return true;
        }
        let timed_out = || HttpFailure::local("the registry did not answer in time");
        note(RegisterNote::Stays(failure.unwrap_or_else(timed_out)));
        false
    }
}

// === impl RegisteredState ===

impl RegisteredState {
    /// The word in announcements.
    pub fn name(self) -> &'static str {
        match self {
            RegisteredState::Ready => "ready",
            RegisteredState::Critical => "critical",
        }
    }
}

// === impl RegisterNote ===

impl RegisterNote {
    /// Whether an operator should look.
    pub fn is_problem(&self) -> bool {
        matches!(self, RegisterNote::Failed(_) | RegisterNote::Stays(_) | RegisterNote::Lost)
    }
}

impl fmt::Display for RegisterNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegisterNote::Announced(state) => write!(f, "registered as {}", state.name()),
            RegisterNote::Removed => f.write_str("removed from the registry; the check fails"),
            RegisterNote::Lost => f.write_str("the registry lost the registration; repeating it"),
            RegisterNote::Failed(failure) => {
                write!(f, "cannot update the registry: {failure}; retrying")
            }
            RegisterNote::Recovered => f.write_str("the registry answers again"),
            RegisterNote::Left => f.write_str("removed from the registry"),
            RegisterNote::Stays(failure) => {
                write!(f, "cannot remove the registration: {failure}; it expires after the TTL")
            }
        }
    }
}

#[cfg(test)]
mod tests;
