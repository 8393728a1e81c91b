//! Sends heartbeats: the library for services written in Rust, and what
//! `tidegate heartbeat` runs on.
//!
//! A service starts a [`Sender`], sets what changes, and closes it before it
//! goes. It needs no runtime, only one thread; it never waits for the network
//! and never fails because nobody listens.
//!
//! ```no_run
//! use std::time::Duration;
//! use tidegate_heartbeat::sender::{Sender, SenderSettings};
//! use tidegate_heartbeat::{SenderState, key_file, wire::SenderIdentity};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let sender = Sender::start(SenderSettings {
//!     to: vec!["10.0.0.5:7946".parse()?],
//!     identity: SenderIdentity::new("web", "a", "10.0.0.11:8080".parse()?)?,
//!     key_id: 1,
//!     secret: key_file::read("/etc/tidegate/hb.key".as_ref())?,
//!     interval: Duration::from_millis(100),
//! })?;
//! sender.set_state(SenderState::Ready);
//! sender.set_in_flight(12);
//! sender.set_state(SenderState::Draining);
//! sender.close();
//! # Ok(())
//! # }
//! ```

use super::SenderState;
use super::keys::Secret;
use super::wire::{HeartbeatFields, INTERVAL_MAX, SHARE_MAX, SenderIdentity, encode};
use crate::clock;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, UNIX_EPOCH};

/// How often a sender says that it stops: three losses in a row are rare, and
/// the silence that follows says the same a little later.
pub const STOPPING_COUNT: u32 = 3;

/// Between them, so that one full buffer does not swallow all.
const STOPPING_GAP: Duration = Duration::from_millis(10);

/// A shorter interval would be load, not news.
const INTERVAL_MIN: Duration = Duration::from_millis(1);

/// What is sent where.
#[derive(Debug, Clone)]
pub struct SenderSettings {
    /// Balancers; each gets every heartbeat.
    pub to: Vec<SocketAddr>,
    /// Who sends.
    pub identity: SenderIdentity,
    /// The number balancers know the secret by.
    pub key_id: u32,
    /// What heartbeats are signed with.
    pub secret: Secret,
    /// How often, 1 ms to an hour; what is outside is taken as the bound.
    pub interval: Duration,
}

/// A running sender. Closing or dropping it tells the balancers that the
/// backend stops.
#[derive(Debug)]
pub struct Sender {
    shared: Arc<SenderShared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct SenderShared {
    says: Mutex<SenderFields>,
    changed: Condvar,
}

/// What the next heartbeat says, and what became of the last.
#[derive(Debug)]
struct SenderFields {
    state: SenderState,
    weight: u16,
    load: u16,
    in_flight: u32,
    /// The state has changed since the last heartbeat.
    news: bool,
    closing: bool,
    sent: u64,
    failed: u64,
    last_error: Option<(SocketAddr, i32)>,
}

/// The thread's side.
struct SendLoop {
    settings: SenderSettings,
    /// For IPv4 and IPv6 peers; `None` where there are none.
    sockets: [Option<UdpSocket>; 2],
    shared: Arc<SenderShared>,
    incarnation: u64,
    sequence: u64,
}

fn now_ms() -> u64 {
    // A clock before 1970 is refused by every balancer, as it should be.
    clock::wall().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// A socket to send to peers such as that one from. It never waits for room.
fn socket_for(peer: SocketAddr) -> io::Result<UdpSocket> {
    let own: SocketAddr = match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(own)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The first moment after `now` that lies whole intervals after `due`: what was
/// missed meanwhile is not made up for.
fn next_due(due: Instant, now: Instant, interval: Duration) -> Instant {
    let late = now.saturating_duration_since(due).as_nanos();
    let missed = late / interval.as_nanos().max(1);
    let skipped = interval.saturating_mul(u32::try_from(missed).unwrap_or(u32::MAX));
    due.checked_add(skipped).unwrap_or(now) + interval
}

// === impl Sender ===

impl Sender {
    /// Starts sending: the first heartbeat goes out at once and says
    /// `starting`, weight 1, no load, nothing in flight.
    ///
    /// # Errors
    /// No socket or no thread to be had.
    pub fn start(mut settings: SenderSettings) -> io::Result<Sender> {
        settings.interval = settings.interval.clamp(INTERVAL_MIN, INTERVAL_MAX);
        let mut sockets = [None, None];
        for to in &settings.to {
            let socket = &mut sockets[usize::from(to.is_ipv6())];
            if socket.is_none() {
                *socket = Some(socket_for(*to)?);
            }
        }
        let says = SenderFields {
            state: SenderState::Starting,
            weight: 1,
            load: 0,
            in_flight: 0,
            news: false,
            closing: false,
            sent: 0,
            failed: 0,
            last_error: None,
        };
        let shared = Arc::new(SenderShared { says: Mutex::new(says), changed: Condvar::new() });
        let beat = SendLoop {
            settings,
            sockets,
            shared: Arc::clone(&shared),
            incarnation: now_ms(),
            sequence: 0,
        };
        let builder = std::thread::Builder::new().name("heartbeat-sender".to_owned());
        let thread = builder.spawn(move || beat.run())?;
        Ok(Sender { shared, thread: Some(thread) })
    }

    /// What the backend says of itself from now on; a change is sent at once,
    /// beside the regular heartbeats.
    pub fn set_state(&self, state: SenderState) {
        let mut says = self.shared.lock();
        if says.state != state {
            (says.state, says.news) = (state, true);
            drop(says);
            self.shared.changed.notify_one();
        }
    }

    /// The share of traffic asked for, 1 to 1000; goes out with the next
    /// heartbeat.
    pub fn set_weight(&self, weight: u16) {
        self.shared.lock().weight = weight.clamp(1, SHARE_MAX);
    }

    /// How busy the backend is, 0 to 1000; goes out with the next heartbeat.
    pub fn set_load(&self, load: u16) {
        self.shared.lock().load = load.min(SHARE_MAX);
    }

    /// Connections it is serving; goes out with the next heartbeat.
    pub fn set_in_flight(&self, in_flight: u32) {
        self.shared.lock().in_flight = in_flight;
    }

    /// Datagrams handed to the kernel so far, one for each balancer.
    pub fn sent(&self) -> u64 {
        self.shared.lock().sent
    }

    /// Datagrams the kernel did not take, and why not the last of them.
    pub fn failed(&self) -> (u64, Option<(SocketAddr, io::Error)>) {
        let says = self.shared.lock();
        let error = |(to, errno)| (to, io::Error::from_raw_os_error(errno));
        (says.failed, says.last_error.map(error))
    }

    /// Says `stopping` [`STOPPING_COUNT`] times and ends the thread; takes some
    /// 30 ms.
    pub fn close(self) {
        drop(self);
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // Its panic has been reported on standard error already.
            let _ = thread.join();
        }
    }
}

// === impl SenderShared ===

impl SenderShared {
    /// Nothing done under the lock can fail half-way.
    fn lock(&self) -> MutexGuard<'_, SenderFields> {
        self.says.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl SendLoop ===

impl SendLoop {
    fn run(mut self) {
        let mut due = clock::now();
        while self.wait_until(due) {
            self.send();
            let now = clock::now();
            if now >= due {
                due = next_due(due, now, self.settings.interval);
            }
        }
        for _ in 0..STOPPING_COUNT {
            self.shared.lock().state = SenderState::Stopping;
            self.send();
            std::thread::park_timeout(STOPPING_GAP);
        }
    }

    /// Until it is time, or there is news; false when it is over.
    fn wait_until(&self, due: Instant) -> bool {
        let mut says = self.shared.lock();
        loop {
            let left = due.saturating_duration_since(clock::now());
            if says.closing {
                return false;
            }
            if says.news || left.is_zero() {
                says.news = false;
                return true;
            }
            let waited = self.shared.changed.wait_timeout(says, left);
            says = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn send(&mut self) {
        self.sequence += 1;
        let says = self.shared.lock();
        let draft = HeartbeatFields {
            identity: &self.settings.identity,
            key_id: self.settings.key_id,
            incarnation: self.incarnation,
            sequence: self.sequence,
            sent: now_ms(),
            interval: self.settings.interval,
            state: says.state,
            weight: says.weight,
            in_flight: says.in_flight,
            load: says.load,
        };
        drop(says);
        let datagram = encode(&draft, &self.settings.secret);
        let (mut sent, mut failed, mut last_error) = (0, 0, None);
        for to in &self.settings.to {
            let Some(socket) = &self.sockets[usize::from(to.is_ipv6())] else { continue };
            match socket.send_to(&datagram, to) {
                Ok(_) => sent += 1,
                Err(error) => {
                    failed += 1;
                    last_error = Some((*to, error.raw_os_error().unwrap_or_default()));
                }
            }
        }
        let mut says = self.shared.lock();
        says.sent += sent;
        says.failed += failed;
        says.last_error = last_error.or(says.last_error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedule_neither_drifts_nor_bursts() {
        let (began, ms) = (clock::now(), Duration::from_millis);
        let next = |now| next_due(began, began + now, ms(100)) - began;
        assert_eq!(next(ms(0)), ms(100));
        assert_eq!(next(ms(7)), ms(100));
        assert_eq!(next(ms(99)), ms(100));
        assert_eq!(next(ms(100)), ms(200));
        assert_eq!(next(ms(12_345)), ms(12_400));
    }
}
