//! The connection of a process to its supervisor: sockets and state for a start after a
//! crash.
//!
//! Created by `cli::run`, owned by the control loop. Without a supervisor, it does
//! nothing.
//!
//! - The supervisor keeps copies of all listening sockets.
//! - It also stores snapshots of the backends' states and the operators' intents.
//! - After a crash, the next process gets both.

use super::activation::PassedSockets;
use super::binds::{BindSockets, SocketOwner};
use super::due;
use super::event_log::{EventLog, NewEvent};
use super::given_sockets::GivenSockets;
use super::in_force::InForce;
use super::upgrade::OfferedAdmin;
use serde::{Deserialize, Serialize};
use socket2::Socket;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitStatus;
use std::sync::{Arc, mpsc as sync};
use std::time::{Duration, Instant};
use tidegate_api::names::EventLevelName;
use tidegate_config::Texts;
use tidegate_core::control::Controller;
use tidegate_core::control::handover::{Saved, Saving};
use tidegate_core::model::BindKey;
use tidegate_net::clock;
use tidegate_supervisor::{Link, Store, SupervisorEvent, SupervisorState};
use tokio::sync::mpsc;

/// Smallest time between two snapshots.
const PACE: Duration = Duration::from_secs(1);

/// Snapshots take at most one part in this many of the control thread's time.
const SHARE: u32 = 50;

/// How long the control thread copies state before it handles events again, and how long
/// it then handles events at least.
const SLICE_MAX: Duration = Duration::from_millis(1);

/// Backends copied between two checks of the time.
const SLICE_STEP: usize = 32;

/// From this start attempt in a row on, the state of the crashed process is not used,
/// because it may cause the crashes.
const ATTEMPT_WITHOUT_STATE: u8 = 3;

/// The supervisor of a process, if it has one.
#[derive(Debug, Default)]
pub struct Supervised {
    link: Option<Arc<Link>>,
    given: Option<SupervisorState>,
    pub(super) in_force: InForce,
    /// Heartbeat addresses whose sockets the supervisor keeps.
    heartbeats: Vec<SocketAddr>,
    intents: Option<Store>,
    /// Passes snapshots to the writing thread.
    writer: Option<sync::SyncSender<KeptSnapshot>>,
    /// A complete snapshot that waits because the thread still writes the previous one.
    waiting: Option<KeptSnapshot>,
    /// The unfinished snapshot, and the time it has taken so far.
    saving: Option<(Saving, Duration)>,
    changed: bool,
    next_write: Option<Instant>,
    events: Option<mpsc::UnboundedReceiver<SupervisorEvent>>,
}

/// What the control loop must do.
#[derive(Debug)]
pub(super) enum SupervisedEvent {
    /// A message of the supervisor.
    Supervisor(SupervisorEvent),
    /// [`Supervised::write`] is due.
    Snapshot,
}

/// Names of sockets that the supervisor keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Name {
    /// A bind address.
    Bind(BindKey, SocketOwner),
    /// The admin listener.
    Admin(OfferedAdmin),
    /// An address for heartbeats.
    Heartbeats(SocketAddr),
    /// A socket passed by a service manager, with its name.
    Activated(String),
}

/// The state of all backends, without counts.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct KeptSnapshot {
    /// Digest of the configuration in force.
    pub(super) digest: u64,
    /// When the snapshot was taken, by the monotonic clock of this host; 0 if not known.
    #[serde(default)]
    pub(super) taken_micros: u64,
    pub(super) state: Saved,
}

/// Sockets that the supervisor kept from a crashed process or a service manager.
#[derive(Debug, Default)]
pub(super) struct KeptState {
    pub(super) given: GivenSockets,
    pub(super) activated: Option<PassedSockets>,
}

/// Returns the name under which the supervisor keeps a socket from a service manager.
pub fn activated_name(name: &str) -> String {
    name_of(&Name::Activated(name.to_owned()))
}

// === impl Supervised ===

impl Supervised {
    /// Creates the connection from the supervisor's first message, for a start with the
    /// configuration file at `path`.
    pub fn new(link: Arc<Link>, mut given: SupervisorState, path: &Path) -> Supervised {
        let in_force = InForce::of(&mut given, path);
        Supervised { link: Some(link), given: Some(given), in_force, ..Supervised::default() }
    }

    /// Returns the stored texts, if this process starts with them instead of its files.
    pub fn instead(&self) -> Option<&Texts> {
        self.in_force.instead()
    }

    /// Returns whether this process takes over the sockets of a crashed process.
    pub fn takes_over(&self) -> bool {
        self.given.as_ref().is_some_and(|given| given.before.is_some())
    }

    /// Returns the connection to the supervisor.
    pub(super) fn link(&self) -> Option<&Arc<Link>> {
        self.link.as_ref()
    }

    /// Starts to receive messages, and takes the sockets and the state of a crashed
    /// process. Must be called on the runtime of the control thread, after the sandbox
    /// was applied.
    pub(super) fn begin(
        &mut self,
        log: &EventLog,
    ) -> Result<(KeptState, Option<KeptSnapshot>), String> {
        let (Some(link), Some(given)) = (&self.link, self.given.take()) else {
            return Ok((KeptState::default(), None));
        };
        let no_thread = |error: io::Error| format!("cannot start a thread: {error}");
        let (tell, events) = mpsc::unbounded_channel();
        link.listen(move |one| {
            // Fails only at the end of this process.
            let _ = tell.send(one);
        })
        .map_err(no_thread)?;
        self.events = Some(events);
        if let Some(before) = &given.before {
            let attempt = given.attempt;
            tracing::error!(attempt, reason = %before, "serving process ended; this process replaces it");
            let text = format!("serving process ended; this process replaces it: {before}");
            log.record(NewEvent::of_process(EventLevelName::Bad, text));
        }
        self.in_force.announce();
        let known = given.before.is_some().then(|| known(&given));
        let (writer, snapshots) = sync::sync_channel(1);
        let write = move || write_all(&given.known, &snapshots);
        std::thread::Builder::new().name("snapshot".to_owned()).spawn(write).map_err(no_thread)?;
        (self.writer, self.intents) = (Some(writer), Some(given.intents));
        Ok((KeptState::of(given.held)?, known))
    }

    /// Waits for the next event. Never resolves without a supervisor.
    pub(super) async fn wake(&mut self) -> SupervisedEvent {
        let write_due = self.next_write(clock::now());
        let events = self.events.as_mut().map(mpsc::UnboundedReceiver::recv);
        tokio::select! {
            Some(event) = due::if_any(events) => SupervisedEvent::Supervisor(event),
            () = due::reached(write_due) => SupervisedEvent::Snapshot,
        }
    }

    // --- sockets ---

    /// Passes copies of the sockets of an address to the supervisor.
    pub(super) fn hold(&self, key: &BindKey, group: &BindSockets) {
        if let Some(link) = &self.link {
            let sockets = group.sockets.iter().map(|socket| socket.as_fd());
            link.hold(&name_of(&Name::Bind(key.clone(), group.holder)), sockets);
        }
    }

    /// Makes the supervisor close its copies of an address.
    pub(super) fn release(&self, key: &BindKey, group: &BindSockets) {
        if let Some(link) = &self.link {
            link.release(&name_of(&Name::Bind(key.clone(), group.holder)));
        }
    }

    /// Passes a copy of the admin listener to the supervisor.
    pub(super) fn hold_admin(&self, offered: OfferedAdmin, socket: &OwnedFd) {
        if let Some(link) = &self.link {
            link.hold(&name_of(&Name::Admin(offered)), std::iter::once(socket.as_fd()));
        }
    }

    /// Passes copies of the heartbeat sockets to the supervisor, which closes its copies of
    /// all other heartbeat sockets.
    pub(super) fn hold_heartbeats(&mut self, sockets: &[(SocketAddr, OwnedFd)]) {
        let Some(link) = &self.link else { return };
        let name = |address: SocketAddr| name_of(&Name::Heartbeats(address));
        self.heartbeats.retain(|held| {
            let stays = sockets.iter().any(|(address, _)| address == held);
            if !stays {
                link.release(&name(*held));
            }
            stays
        });
        for (address, socket) in sockets {
            if !self.heartbeats.contains(address) {
                link.hold(&name(*address), std::iter::once(socket.as_fd()));
                self.heartbeats.push(*address);
            }
        }
    }

    // --- state for a start after a crash ---

    /// Schedules a snapshot, because the state has changed.
    pub(super) fn changed(&mut self) {
        self.changed = true;
    }

    fn next_write(&self, now: Instant) -> Option<Instant> {
        let wanted = self.changed || self.saving.is_some() || self.waiting.is_some();
        (self.writer.is_some() && wanted).then(|| self.next_write.unwrap_or(now))
    }

    /// Stores a snapshot with the supervisor. Copying many backends takes several calls.
    /// Changes during that time are in the next snapshot.
    pub(super) fn write(&mut self, digest: u64, controller: &Controller) {
        let begun = clock::now();
        if let Some(waiting) = self.waiting.take() {
            self.pass_on(waiting);
            self.next_write = Some(begun + PACE);
            return;
        }
        // A reload invalidates the unfinished snapshot. Start again.
        let saving = self.saving.take().filter(|(saving, _)| controller.can_continue(saving));
        let (mut saving, spent) = saving.unwrap_or_else(|| {
            self.changed = false;
            (controller.begin_save(begun), Duration::ZERO)
        });
        let complete = loop {
            if !controller.save_on(&mut saving, SLICE_STEP) {
                break true;
            }
            if clock::now().saturating_duration_since(begun) >= SLICE_MAX {
                break false;
            }
        };
        if complete {
            let taken_micros = clock::monotonic_micros();
            let state = controller.end_save(saving);
            self.pass_on(KeptSnapshot { digest, taken_micros, state });
            let now = clock::now();
            let spent = spent + now.saturating_duration_since(begun);
            self.next_write = Some(now + PACE.max(spent * SHARE));
        } else {
            let now = clock::now();
            self.saving = Some((saving, spent + now.saturating_duration_since(begun)));
            self.next_write = Some(now + SLICE_MAX);
        }
    }

    /// Passes a snapshot to the writing thread, or keeps it until the thread is free.
    /// The thread also drops the snapshot, which takes as long as copying it.
    fn pass_on(&mut self, snapshot: KeptSnapshot) {
        let Some(writer) = &self.writer else { return };
        if let Err(sync::TrySendError::Full(snapshot)) = writer.try_send(snapshot) {
            self.waiting = Some(snapshot);
        }
    }

    /// Stores the operators' intents with the supervisor immediately.
    pub(super) fn write_intents(&mut self, controller: &Controller) {
        let Some(store) = &self.intents else { return };
        let intents = controller.save_intents(clock::now());
        let written = serde_json::to_vec(&intents).map_err(io::Error::other);
        if let Err(error) = written.and_then(|text| store.write(&text)) {
            tracing::warn!(%error, "cannot store operator intents with the supervisor; a crash loses them");
        }
    }

    /// Reads the operators' intents that are stored with the supervisor.
    pub(super) fn read_intents(&self) -> Option<Saved> {
        serde_json::from_slice(&self.intents.as_ref()?.read()?).ok()
    }
}

/// Returns the stored state of a crashed process, with the operators' latest intents.
fn known(given: &SupervisorState) -> KeptSnapshot {
    let read = |store: &Store| store.read();
    let text = read(&given.known).filter(|_| given.attempt < ATTEMPT_WITHOUT_STATE);
    let parsed = text.and_then(|text| serde_json::from_slice(&text).ok());
    let mut known: KeptSnapshot = parsed.unwrap_or_default();
    let intents = read(&given.intents).and_then(|text| serde_json::from_slice(&text).ok());
    if let Some(intents) = intents {
        known.state.set_intents(&intents);
    }
    if known.taken_micros > 0 {
        let micros = clock::monotonic_micros().saturating_sub(known.taken_micros);
        known.state.views.add_age(Duration::from_micros(micros));
    }
    known
}

fn write_all(store: &Store, snapshots: &sync::Receiver<KeptSnapshot>) {
    while let Ok(KeptSnapshot { digest, taken_micros, state }) = snapshots.recv() {
        let snapshot = KeptSnapshot { digest, taken_micros, state: state.without_counts() };
        let written = serde_json::to_vec(&snapshot).map_err(io::Error::other);
        if let Err(error) = written.and_then(|text| store.write(&text)) {
            tracing::warn!(%error, "cannot store backend states with the supervisor; a crash loses them");
        }
    }
}

fn name_of(name: &Name) -> String {
    serde_json::to_string(name).unwrap_or_default()
}

// === impl KeptState ===

impl KeptState {
    fn of(held: Vec<(String, Vec<OwnedFd>)>) -> Result<KeptState, String> {
        let mut kept = KeptState::default();
        let mut activated = Vec::new();
        for (name, sockets) in held {
            match serde_json::from_str(&name) {
                Ok(Name::Bind(key, holder)) => {
                    let sockets = sockets.into_iter().map(|fd| Arc::new(Socket::from(fd)));
                    kept.given
                        .binds
                        .insert(key, BindSockets { sockets: sockets.collect(), holder });
                }
                Ok(Name::Admin(offered)) => {
                    kept.given.admin = sockets.into_iter().next().map(|socket| (offered, socket));
                }
                Ok(Name::Heartbeats(address)) => {
                    kept.given
                        .heartbeats
                        .extend(sockets.into_iter().map(|socket| (address, socket)));
                }
                Ok(Name::Activated(name)) => {
                    activated.extend(sockets.into_iter().map(|fd| (name.clone(), fd)));
                }
                // A name of another version of the program. The socket is dropped.
                Err(_) => {}
            }
        }
        if !activated.is_empty() {
            kept.activated = Some(PassedSockets::of(activated).map_err(|why| why.to_string())?);
        }
        Ok(kept)
    }
}

/// Returns the text for the log.
pub(super) fn exit_reason(status: ExitStatus) -> String {
    format!("the new process exited immediately ({status})")
}
