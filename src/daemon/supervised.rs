//! What a process has of its supervisor: sockets kept from a process before, the way to
//! have some kept, and a place for what the next process is to know if this one crashes.
//!
//! Made by `cli::run`, owned by the control loop. Without a supervisor everything here
//! does nothing.

use super::activation::PassedSockets;
use super::binds::{BindSockets, SocketOwner};
use super::due;
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
use tidegate_config::Texts;
use tidegate_core::control::Controller;
use tidegate_core::control::handover::{Saved, Saving};
use tidegate_core::model::BindKey;
use tidegate_net::clock;
use tidegate_supervisor::{Link, News, Store, SupervisorState};
use tokio::sync::mpsc;

/// What is known is left with the supervisor at most so often, and so that it takes one
/// part in [`SHARE`] of the control thread's time.
const PACE: Duration = Duration::from_secs(1);
const SHARE: u32 = 50;

/// It is gathered for so long before events have their turn, and for this long they
/// have it.
const SLICE_MAX: Duration = Duration::from_millis(1);

/// Backends between two looks at the clock.
const SLICE_STEP: usize = 32;

/// From this start in a row on, what the process before knew is not taken up: it may be
/// what ends them.
const WITHOUT_KNOWLEDGE: u8 = 3;

/// A process's supervisor, if it has one.
#[derive(Debug, Default)]
pub struct Supervised {
    link: Option<Arc<Link>>,
    given: Option<SupervisorState>,
    pub(super) in_force: InForce,
    /// Addresses for heartbeats whose sockets are kept.
    hearts: Vec<SocketAddr>,
    intents: Option<Store>,
    /// Takes what is known to the thread that writes it.
    writer: Option<sync::SyncSender<KeptSnapshot>>,
    /// Gathered and not taken yet: the thread still writes the one before.
    waiting: Option<KeptSnapshot>,
    /// Being gathered, and the time it has taken so far.
    saving: Option<(Saving, Duration)>,
    changed: bool,
    next_write: Option<Instant>,
    news: Option<mpsc::UnboundedReceiver<News>>,
}

/// What there is to do for the supervisor.
#[derive(Debug)]
pub(super) enum SupervisedEvent {
    /// It has something to say.
    News(News),
    /// It is time for [`Supervised::write`].
    Snapshot,
}

/// The names sockets are kept by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Name {
    /// A bind address.
    Bind(BindKey, SocketOwner),
    /// The admin listener.
    Admin(OfferedAdmin),
    /// An address for heartbeats.
    Heartbeats(SocketAddr),
    /// What a service manager has passed, by its word for it.
    Activated(String),
}

/// Everything known, but for counts.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct KeptSnapshot {
    /// Of the configuration in force.
    pub(super) digest: u64,
    pub(super) state: Saved,
}

/// Sockets of a process that has crashed, or of a service manager.
#[derive(Debug, Default)]
pub(super) struct KeptState {
    pub(super) given: GivenSockets,
    pub(super) activated: Option<PassedSockets>,
}

/// What a service manager has passed, for the supervisor to keep.
pub fn activated_name(name: &str) -> String {
    name_of(&Name::Activated(name.to_owned()))
}

// === impl Supervised ===

impl Supervised {
    /// By what the supervisor has said first, for a start with the configuration file at
    /// `path`.
    pub fn new(link: Arc<Link>, mut given: SupervisorState, path: &Path) -> Supervised {
        let in_force = InForce::of(&mut given, path);
        Supervised { link: Some(link), given: Some(given), in_force, ..Supervised::default() }
    }

    /// The texts that this process starts with in the place of its files.
    pub fn instead(&self) -> Option<&Texts> {
        self.in_force.instead()
    }

    /// Whether this process goes on with the sockets of one that has crashed.
    pub fn takes_over(&self) -> bool {
        self.given.as_ref().is_some_and(|given| given.before.is_some())
    }

    /// The way to it.
    pub(super) fn link(&self) -> Option<&Arc<Link>> {
        self.link.as_ref()
    }

    /// Begins to hear from it, and takes what the process before has left. To be called
    /// within the control thread's runtime, once this process is confined.
    pub(super) fn begin(&mut self) -> Result<(KeptState, Option<KeptSnapshot>), String> {
        let (Some(link), Some(given)) = (&self.link, self.given.take()) else {
            return Ok((KeptState::default(), None));
        };
        let no_thread = |error: io::Error| format!("cannot start a thread: {error}");
        let (tell, news) = mpsc::unbounded_channel();
        link.listen(move |one| {
            // Nobody listens any more: this process is ending.
            let _ = tell.send(one);
        })
        .map_err(no_thread)?;
        self.news = Some(news);
        if let Some(before) = &given.before {
            let attempt = given.attempt;
            tracing::error!(attempt, reason = %before, "serving process ended; this process replaces it");
        }
        self.in_force.announce();
        let known = given.before.is_some().then(|| known(&given));
        let (writer, snapshots) = sync::sync_channel(1);
        let write = move || write_all(&given.known, &snapshots);
        std::thread::Builder::new().name("snapshot".to_owned()).spawn(write).map_err(no_thread)?;
        (self.writer, self.intents) = (Some(writer), Some(given.intents));
        Ok((KeptState::of(given.held)?, known))
    }

    /// The next thing to act on; never without a supervisor.
    pub(super) async fn wake(&mut self) -> SupervisedEvent {
        let write_due = self.next_write(clock::now());
        let news = self.news.as_mut().map(mpsc::UnboundedReceiver::recv);
        tokio::select! {
            Some(news) = due::if_any(news) => SupervisedEvent::News(news),
            () = due::reached(write_due) => SupervisedEvent::Snapshot,
        }
    }

    // --- sockets ---

    /// Has copies of an address's sockets kept.
    pub(super) fn hold(&self, key: &BindKey, group: &BindSockets) {
        if let Some(link) = &self.link {
            let sockets = group.sockets.iter().map(|socket| socket.as_fd());
            link.hold(&name_of(&Name::Bind(key.clone(), group.holder)), sockets);
        }
    }

    /// The address is given up.
    pub(super) fn release(&self, key: &BindKey, group: &BindSockets) {
        if let Some(link) = &self.link {
            link.release(&name_of(&Name::Bind(key.clone(), group.holder)));
        }
    }

    /// Has a copy of the admin listener kept.
    pub(super) fn hold_admin(&self, offered: OfferedAdmin, socket: &OwnedFd) {
        if let Some(link) = &self.link {
            link.hold(&name_of(&Name::Admin(offered)), std::iter::once(socket.as_fd()));
        }
    }

    /// Has copies of the sockets for heartbeats kept, those and no others.
    pub(super) fn hold_heartbeats(&mut self, sockets: &[(SocketAddr, OwnedFd)]) {
        let Some(link) = &self.link else { return };
        let name = |address: SocketAddr| name_of(&Name::Heartbeats(address));
        self.hearts.retain(|held| {
            let stays = sockets.iter().any(|(address, _)| address == held);
            if !stays {
                link.release(&name(*held));
            }
            stays
        });
        for (address, socket) in sockets {
            if !self.hearts.contains(address) {
                link.hold(&name(*address), std::iter::once(socket.as_fd()));
                self.hearts.push(*address);
            }
        }
    }

    // --- what the next process is to know ---

    /// Something is known that was not: to be written soon.
    pub(super) fn changed(&mut self) {
        self.changed = true;
    }

    fn next_write(&self, now: Instant) -> Option<Instant> {
        let wanted = self.changed || self.saving.is_some() || self.waiting.is_some();
        (self.writer.is_some() && wanted).then(|| self.next_write.unwrap_or(now))
    }

    /// Leaves everything known with the supervisor. Gathering many backends takes
    /// several calls; what changes meanwhile is in the next snapshot.
    pub(super) fn write(&mut self, digest: u64, controller: &Controller) {
        let begun = clock::now();
        if let Some(waiting) = self.waiting.take() {
            self.hand_over(waiting);
            self.next_write = Some(begun + PACE);
            return;
        }
        // A reload has another digest: it is begun once more.
        let saving = self.saving.take().filter(|(saving, _)| controller.can_go_on(saving));
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
            self.hand_over(KeptSnapshot { digest, state: controller.end_save(saving) });
            let now = clock::now();
            let spent = spent + now.saturating_duration_since(begun);
            self.next_write = Some(now + PACE.max(spent * SHARE));
        } else {
            let now = clock::now();
            self.saving = Some((saving, spent + now.saturating_duration_since(begun)));
            self.next_write = Some(now + SLICE_MAX);
        }
    }

    /// Gives it to the thread that writes, or keeps it until that has time: to drop
    /// thousands of backends takes as long as to gather them.
    fn hand_over(&mut self, snapshot: KeptSnapshot) {
        let Some(writer) = &self.writer else { return };
        if let Err(sync::TrySendError::Full(snapshot)) = writer.try_send(snapshot) {
            self.waiting = Some(snapshot);
        }
    }

    /// Leaves operators' intents there, at once.
    pub(super) fn write_intents(&mut self, controller: &Controller) {
        let Some(store) = &self.intents else { return };
        let intents = controller.save_intents(clock::now());
        let written = serde_json::to_vec(&intents).map_err(io::Error::other);
        if let Err(error) = written.and_then(|text| store.write(&text)) {
            tracing::warn!(%error, "cannot store operator intents with the supervisor; a crash loses them");
        }
    }

    /// Those that another process may have left there since.
    pub(super) fn read_intents(&self) -> Option<Saved> {
        serde_json::from_slice(&self.intents.as_ref()?.read()?).ok()
    }
}

/// All that a process before has left, with operators' last intents.
fn known(given: &SupervisorState) -> KeptSnapshot {
    let read = |store: &Store| store.read();
    let text = read(&given.known).filter(|_| given.attempt < WITHOUT_KNOWLEDGE);
    let parsed = text.and_then(|text| serde_json::from_slice(&text).ok());
    let mut known: KeptSnapshot = parsed.unwrap_or_default();
    let intents = read(&given.intents).and_then(|text| serde_json::from_slice(&text).ok());
    if let Some(intents) = intents {
        known.state.set_intents(&intents);
    }
    known
}

fn write_all(store: &Store, snapshots: &sync::Receiver<KeptSnapshot>) {
    while let Ok(KeptSnapshot { digest, state }) = snapshots.recv() {
        let snapshot = KeptSnapshot { digest, state: state.without_counts() };
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
                // Of another version of this program, and of no use to this one.
                Err(_) => {}
            }
        }
        if !activated.is_empty() {
            kept.activated = Some(PassedSockets::of(activated).map_err(|why| why.to_string())?);
        }
        Ok(kept)
    }
}

/// In words, for the log.
pub(super) fn in_words(status: ExitStatus) -> String {
    format!("the new process exited immediately ({status})")
}
