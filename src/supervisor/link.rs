//! The connection of a serving process to its supervisor.
//!
//! `cli::run` makes it first in the process. All parts of `daemon` that send messages to
//! the supervisor share it. A separate thread reads the orders of the supervisor. It never
//! decides what to do with an order.

use super::manager::ServiceNotice;
use super::message::{ChildReport, SuccessorChanges, SupervisorOrder};
use super::store::{STORES, Store};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;
use tidegate_net::fd_channel;
use tidegate_net::packets::{FDS_MAX, Packet, Packets};

/// Environment variable with the number of the descriptor of the link.
pub(super) const MARK: &str = "TIDEGATE_SUPERVISOR";

/// Longest wait for an answer of the supervisor.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// The connection to the supervisor.
#[derive(Debug)]
pub struct Link {
    packets: Packets,
    /// Where orders about a new process go, while this process waits for them.
    asking: Mutex<Option<mpsc::Sender<SupervisorOrder>>>,
}

/// The sockets and stores that a process gets from its supervisor at the start.
#[derive(Debug)]
pub struct SupervisorState {
    /// Sockets that an earlier process left with the supervisor, by their names.
    pub held: Vec<(String, Vec<OwnedFd>)>,
    /// The operators' intents.
    pub intents: Store,
    /// The remaining state of an earlier process.
    pub known: Store,
    /// The texts of the configuration in force. `None`: the supervisor is older than this
    /// store.
    pub texts: Option<Store>,
    /// How the previous process ended, if this process replaces one that crashed.
    pub before: Option<String>,
    /// Number of this start in a row of failed starts, from 1.
    pub attempt: u8,
}

/// An event that this process must act on.
#[derive(Debug)]
pub enum SupervisorEvent {
    /// The supervisor has exited.
    SupervisorExited,
    /// The new process has ended within a second, so this process must resume the service.
    Resume(ExitStatus),
}

/// A new process that the supervisor has started.
#[derive(Debug)]
pub struct Successor {
    /// Process ID.
    pub pid: u32,
    link: Arc<Link>,
    orders: mpsc::Receiver<SupervisorOrder>,
    ended: Option<ExitStatus>,
}

// === impl Link ===

impl Link {
    /// Returns the link and the state from the supervisor. `None`: no supervisor has started
    /// this process.
    ///
    /// Call it before other code opens descriptors.
    ///
    /// # Errors
    /// The environment variable or a message is malformed, or the supervisor has exited.
    pub fn from_environment() -> io::Result<Option<(Arc<Link>, SupervisorState)>> {
        let Some(number) = std::env::var_os(MARK) else { return Ok(None) };
        let number = number.to_str().and_then(|text| text.parse().ok());
        let number = number.ok_or_else(|| io::Error::other(format!("{MARK} is not a number")))?;
        let packets = Packets::from(fd_channel::take_inherited(number)?);
        let given = given(&packets)?;
        Ok(Some((Arc::new(Link { packets, asking: Mutex::default() }), given)))
    }

    /// Sends copies of sockets to the supervisor, which holds them under this name.
    pub fn hold<'a>(&self, name: &str, sockets: impl Iterator<Item = BorrowedFd<'a>>) {
        let sockets: Vec<BorrowedFd<'_>> = sockets.collect();
        for some in sockets.chunks(FDS_MAX) {
            self.tell(&ChildReport::Hold(name.to_owned()), some);
        }
    }

    /// Requests that the supervisor closes the sockets under this name.
    pub fn release(&self, name: &str) {
        self.tell(&ChildReport::Release(name.to_owned()), &[]);
    }

    /// Sends a notice about the service. A main process is always the new process that this
    /// process requested.
    pub fn notify(&self, notice: ServiceNotice) {
        let report = match notice {
            ServiceNotice::Ready => ChildReport::Ready,
            ServiceNotice::Reloading => ChildReport::Reloading,
            ServiceNotice::Stopping => ChildReport::Stopping,
            ServiceNotice::MainProcess(_) => ChildReport::Serves,
            ServiceNotice::Alive => {
                // The next notice has the same content, so a full buffer is ignored.
                let _ = self.packets.try_send(&ChildReport::Alive.encode());
                return;
            }
        };
        self.tell(&report, &[]);
    }

    /// Reports that this process has closed its listening sockets and cannot resume.
    pub fn sockets_closed(&self) {
        self.tell(&ChildReport::SocketsClosed, &[]);
    }

    /// Reports that this process serves again after [`SupervisorEvent::Resume`].
    pub fn resumed(&self) {
        self.tell(&ChildReport::Resumed, &[]);
    }

    /// Requests a new process with `channel` as its standard input and `stderr` as its
    /// standard error.
    ///
    /// Changes of the program or configuration need `asked_over`, the admin connection
    /// of the request. Its peer must be root or the user of the supervisor.
    ///
    /// # Errors
    /// The supervisor starts no process. The error is its reason.
    pub fn start(
        self: &Arc<Link>,
        channel: &OwnedFd,
        stderr: &OwnedFd,
        changes: SuccessorChanges,
        asked_over: Option<&OwnedFd>,
    ) -> io::Result<Successor> {
        let (tell, orders) = mpsc::channel();
        *self.asking() = Some(tell);
        let mut fds = vec![channel.as_fd(), stderr.as_fd()];
        fds.extend(asked_over.map(AsFd::as_fd));
        self.packets.send(&ChildReport::Start(changes).encode(), &fds)?;
        match orders.recv_timeout(ANSWER_MAX) {
            Ok(SupervisorOrder::Started(pid)) => {
                Ok(Successor { pid, link: Arc::clone(self), orders, ended: None })
            }
            Ok(SupervisorOrder::Refused(why)) => Err(io::Error::other(why)),
            _ => Err(io::Error::other("the supervisor does not answer")),
        }
    }

    /// Starts a thread that reads the orders of the supervisor and calls `tell` for each
    /// event.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn listen(
        self: &Arc<Link>,
        tell: impl Fn(SupervisorEvent) + Send + 'static,
    ) -> io::Result<std::thread::JoinHandle<()>> {
        let link = Arc::clone(self);
        std::thread::Builder::new().name("supervisor".to_owned()).spawn(move || {
            while let Ok(Some(packet)) = link.packets.receive() {
                match SupervisorOrder::decode(&packet.bytes) {
                    Some(SupervisorOrder::Resume(status)) => {
                        tell(SupervisorEvent::Resume(ExitStatus::from_raw(status)))
                    }
                    Some(order) => {
                        // If the upgrade has ended, the order has no receiver.
                        let _ = link.asking().as_ref().map(|asking| asking.send(order));
                    }
                    None => {}
                }
            }
            tell(SupervisorEvent::SupervisorExited);
        })
    }

    fn tell(&self, report: &ChildReport, fds: &[BorrowedFd<'_>]) {
        if let Err(error) = self.packets.send(&report.encode(), fds)
            && error.kind() == io::ErrorKind::WouldBlock
        {
            tracing::warn!("the supervisor does not accept messages; is it stopped?");
        }
    }

    fn asking(&self) -> MutexGuard<'_, Option<mpsc::Sender<SupervisorOrder>>> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn given(packets: &Packets) -> io::Result<SupervisorState> {
    let mut held: Vec<(String, Vec<OwnedFd>)> = Vec::new();
    loop {
        let gone = || io::Error::other("the supervisor has exited");
        let Packet { bytes, fds } = packets.receive()?.ok_or_else(gone)?;
        match SupervisorOrder::decode(&bytes) {
            Some(SupervisorOrder::Held(name)) => match held.last_mut() {
                Some((last, sockets)) if *last == name => sockets.extend(fds),
                _ => held.push((name, fds)),
            },
            Some(SupervisorOrder::Begin(attempt, before)) => {
                let mut fds = fds.into_iter();
                let mut store = || Some(Store::of([fds.next()?, fds.next()?]));
                let all: [_; STORES] = [store(), store(), store()];
                let [Some(intents), Some(known), texts] = all else {
                    return Err(io::Error::other(
                        "the supervisor did not pass the descriptors of its stores",
                    ));
                };
                let before = Some(before).filter(|before| !before.is_empty());
                return Ok(SupervisorState { held, intents, known, texts, before, attempt });
            }
            _ => {}
        }
    }
}

// === impl Successor ===

impl Successor {
    /// Waits at most `limit` for the end of the new process. Returns its exit status.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        if self.ended.is_none()
            && let Ok(SupervisorOrder::Ended(status)) = self.orders.recv_timeout(limit)
        {
            self.ended = Some(ExitStatus::from_raw(status));
        }
        self.ended
    }

    /// Kills the new process and waits for its end.
    pub fn kill(&mut self) {
        self.link.tell(&ChildReport::End, &[]);
        self.wait(ANSWER_MAX);
    }
}
