//! A supervised process's way to its supervisor.
//!
//! Made by `cli::run` first thing, shared by everything in `daemon` that has something to
//! say. What the supervisor says is read by a thread of its own. It decides nothing.

use super::manager::ServiceNotice;
use super::message::{ChildReport, SupervisorOrder, Wish};
use super::store::{STORES, Store};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;
use tidegate_net::fd_channel;
use tidegate_net::packets::{FDS_MAX, Packet, Packets};

/// Names the descriptor that leads to the supervisor.
pub(super) const MARK: &str = "TIDEGATE_SUPERVISOR";

/// How long the supervisor, which does little, may take for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// See the module's documentation.
#[derive(Debug)]
pub struct Link {
    packets: Packets,
    /// Who waits for news of a successor.
    asking: Mutex<Option<mpsc::Sender<SupervisorOrder>>>,
}

/// What a process was started with by its supervisor.
#[derive(Debug)]
pub struct SupervisorState {
    /// Sockets that it or another process had kept there, by the names they gave.
    pub held: Vec<(String, Vec<OwnedFd>)>,
    /// Operators' intents.
    pub intents: Store,
    /// All else that was known.
    pub known: Store,
    /// The texts of the configuration in force; a supervisor of an older program has no
    /// place for them.
    pub texts: Option<Store>,
    /// It takes the place of a process that has ended by itself: how, in words.
    pub before: Option<String>,
    /// Starts in a row that came to nothing, this one included.
    pub attempt: u8,
}

/// Something to act on.
#[derive(Debug)]
pub enum News {
    /// The supervisor has died.
    Alone,
    /// The successor has ended so soon that this process is to go on.
    GoOn(ExitStatus),
}

/// A successor that the supervisor has started.
#[derive(Debug)]
pub struct Successor {
    /// Its number.
    pub pid: u32,
    link: Arc<Link>,
    news: mpsc::Receiver<SupervisorOrder>,
    ended: Option<ExitStatus>,
}

// === impl Link ===

impl Link {
    /// The way to the supervisor, where one has started this process, and what it has
    /// given. To be called before anything opens a descriptor.
    ///
    /// # Errors
    /// What was given is not understood.
    pub fn from_environment() -> io::Result<Option<(Arc<Link>, SupervisorState)>> {
        let Some(number) = std::env::var_os(MARK) else { return Ok(None) };
        let number = number.to_str().and_then(|text| text.parse().ok());
        let number = number.ok_or_else(|| io::Error::other(format!("{MARK} is not a number")))?;
        let packets = Packets::from(fd_channel::take_inherited(number)?);
        let given = given(&packets)?;
        Ok(Some((Arc::new(Link { packets, asking: Mutex::default() }), given)))
    }

    /// Has the supervisor keep copies of these sockets under that name.
    pub fn hold<'a>(&self, name: &str, sockets: impl Iterator<Item = BorrowedFd<'a>>) {
        let sockets: Vec<BorrowedFd<'_>> = sockets.collect();
        for some in sockets.chunks(FDS_MAX) {
            self.tell(&ChildReport::Hold(name.to_owned()), some);
        }
    }

    /// Has it close what it keeps under that name.
    pub fn release(&self, name: &str) {
        self.tell(&ChildReport::Release(name.to_owned()), &[]);
    }

    /// Tells it of the service; a main process is the successor that it has started.
    pub fn notify(&self, notice: ServiceNotice) {
        let report = match notice {
            ServiceNotice::Ready => ChildReport::Ready,
            ServiceNotice::Reloading => ChildReport::Reloading,
            ServiceNotice::Stopping => ChildReport::Stopping,
            ServiceNotice::MainProcess(_) => ChildReport::Serves,
            ServiceNotice::Alive => {
                // Not worth waiting for room.
                let _ = self.packets.try_send(&ChildReport::Beat.encode());
                return;
            }
        };
        self.tell(&report, &[]);
    }

    /// This process has closed its sockets after that.
    pub fn let_go(&self) {
        self.tell(&ChildReport::LetGo, &[]);
    }

    /// It serves again after [`News::GoOn`].
    pub fn goes_on(&self) {
        self.tell(&ChildReport::GoesOn, &[]);
    }

    /// Has a successor started, with `channel` as its standard input and `stderr`;
    /// another program or configuration only where `asked_over` shows that root or the
    /// supervisor's own user wants it.
    ///
    /// # Errors
    /// There will be none; why.
    pub fn start(
        self: &Arc<Link>,
        channel: &OwnedFd,
        stderr: &OwnedFd,
        wish: Wish,
        asked_over: Option<&OwnedFd>,
    ) -> io::Result<Successor> {
        let (tell, news) = mpsc::channel();
        *self.asking() = Some(tell);
        let mut fds = vec![channel.as_fd(), stderr.as_fd()];
        fds.extend(asked_over.map(AsFd::as_fd));
        self.packets.send(&ChildReport::Start(wish).encode(), &fds)?;
        match news.recv_timeout(ANSWER_MAX) {
            Ok(SupervisorOrder::Started(pid)) => {
                Ok(Successor { pid, link: Arc::clone(self), news, ended: None })
            }
            Ok(SupervisorOrder::Refused(why)) => Err(io::Error::other(why)),
            _ => Err(io::Error::other("the supervisor does not answer")),
        }
    }

    /// Reads what the supervisor says, on a thread of its own.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn listen(
        self: &Arc<Link>,
        tell: impl Fn(News) + Send + 'static,
    ) -> io::Result<std::thread::JoinHandle<()>> {
        let link = Arc::clone(self);
        std::thread::Builder::new().name("supervisor".to_owned()).spawn(move || {
            while let Ok(Some(packet)) = link.packets.receive() {
                match SupervisorOrder::decode(&packet.bytes) {
                    Some(SupervisorOrder::GoOn(status)) => {
                        tell(News::GoOn(ExitStatus::from_raw(status)))
                    }
                    Some(order) => {
                        // An upgrade that has ended asks for no news.
                        let _ = link.asking().as_ref().map(|asking| asking.send(order));
                    }
                    None => {}
                }
            }
            tell(News::Alone);
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
                    return Err(io::Error::other("the supervisor did not pass its files"));
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
    /// Its exit status, once it has ended; waits so long for it.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        if self.ended.is_none()
            && let Ok(SupervisorOrder::Ended(status)) = self.news.recv_timeout(limit)
        {
            self.ended = Some(ExitStatus::from_raw(status));
        }
        self.ended
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        self.link.tell(&ChildReport::End, &[]);
        self.wait(ANSWER_MAX);
    }
}
