//! Sends heartbeats. The library for services written in Rust, and for
//! `tidegate heartbeat`.
//!
//! A service starts a [`Sender`], sets its state and load when they change, and closes it
//! before it exits. The sender has one thread and needs no runtime. It never waits for the
//! network and never fails because no balancer receives.
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

/// Number of `stopping` heartbeats at the end. If all are lost, the balancer detects the
/// missing heartbeats.
pub const STOPPING_COUNT: u32 = 3;

/// Pause after each of them, so that a full buffer does not drop all.
const STOPPING_GAP: Duration = Duration::from_millis(10);

/// Shortest interval.
const INTERVAL_MIN: Duration = Duration::from_millis(1);

/// The settings of a sender.
#[derive(Debug, Clone)]
pub struct SenderSettings {
    /// The balancers. Each gets every heartbeat.
    pub to: Vec<SocketAddr>,
    /// The backend.
    pub identity: SenderIdentity,
    /// The ID of the secret at the balancers.
    pub key_id: u32,
    /// The secret that signs heartbeats.
    pub secret: Secret,
    /// Interval, 1 ms to 1 h. Values outside are set to the nearest bound.
    pub interval: Duration,
}

/// A running sender. On close or drop it reports the state `stopping`.
#[derive(Debug)]
pub struct Sender {
    shared: Arc<SenderShared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct SenderShared {
    fields: Mutex<SenderFields>,
    changed: Condvar,
}

/// The content of the next heartbeat, and the results of earlier sends.
#[derive(Debug)]
struct SenderFields {
    state: SenderState,
    weight: u16,
    load: u16,
    in_flight: u32,
    /// The state has changed after the last heartbeat.
    state_changed: bool,
    closing: bool,
    sent: u64,
    failed: u64,
    last_error: Option<(SocketAddr, i32)>,
}

/// The state of the thread.
struct SendLoop {
    settings: SenderSettings,
    /// For IPv4 and IPv6 peers. `None`: no peer of that family.
    sockets: [Option<UdpSocket>; 2],
    shared: Arc<SenderShared>,
    incarnation: u64,
    sequence: u64,
}

fn now_ms() -> u64 {
    // Every balancer rejects a heartbeat with the time 0.
    clock::wall().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Makes a non-blocking socket for peers of the same family.
fn socket_for(peer: SocketAddr) -> io::Result<UdpSocket> {
    let own: SocketAddr = match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(own)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Returns the first time after `now` that is a multiple of the interval after `due`.
/// Missed heartbeats are not sent later.
fn next_due(due: Instant, now: Instant, interval: Duration) -> Instant {
    let late = now.saturating_duration_since(due).as_nanos();
    let missed = late / interval.as_nanos().max(1);
    let skipped = interval.saturating_mul(u32::try_from(missed).unwrap_or(u32::MAX));
    due.checked_add(skipped).unwrap_or(now) + interval
}

// === impl Sender ===

impl Sender {
    /// Starts sending. The first heartbeat is sent immediately, with the state `starting`,
    /// weight 1, load 0 and no connections.
    ///
    /// # Errors
    /// A socket or the thread cannot be made.
    pub fn start(mut settings: SenderSettings) -> io::Result<Sender> {
        settings.interval = settings.interval.clamp(INTERVAL_MIN, INTERVAL_MAX);
        let mut sockets = [None, None];
        for to in &settings.to {
            let socket = &mut sockets[usize::from(to.is_ipv6())];
            if socket.is_none() {
                *socket = Some(socket_for(*to)?);
            }
        }
        let fields = SenderFields {
            state: SenderState::Starting,
            weight: 1,
            load: 0,
            in_flight: 0,
            state_changed: false,
            closing: false,
            sent: 0,
            failed: 0,
            last_error: None,
        };
        let shared = Arc::new(SenderShared { fields: Mutex::new(fields), changed: Condvar::new() });
        let send_loop = SendLoop {
            settings,
            sockets,
            shared: Arc::clone(&shared),
            incarnation: now_ms(),
            sequence: 0,
        };
        let builder = std::thread::Builder::new().name("heartbeat-sender".to_owned());
        let thread = builder.spawn(move || send_loop.run())?;
        Ok(Sender { shared, thread: Some(thread) })
    }

    /// Sets the state of the backend. A change is sent immediately, in addition to the
    /// regular heartbeats.
    pub fn set_state(&self, state: SenderState) {
        let mut fields = self.shared.lock();
        if fields.state != state {
            (fields.state, fields.state_changed) = (state, true);
            drop(fields);
            self.shared.changed.notify_one();
        }
    }

    /// Sets the requested weight, 1 to 1000. It is sent with the next heartbeat.
    pub fn set_weight(&self, weight: u16) {
        self.shared.lock().weight = weight.clamp(1, SHARE_MAX);
    }

    /// Sets the load of the backend, 0 to 1000. It is sent with the next heartbeat.
    pub fn set_load(&self, load: u16) {
        self.shared.lock().load = load.min(SHARE_MAX);
    }

    /// Sets the number of open connections. It is sent with the next heartbeat.
    pub fn set_in_flight(&self, in_flight: u32) {
        self.shared.lock().in_flight = in_flight;
    }

    /// Returns the number of datagrams that the kernel accepted. Each heartbeat is one
    /// datagram per balancer.
    pub fn sent(&self) -> u64 {
        self.shared.lock().sent
    }

    /// Returns the number of datagrams that the kernel rejected, and the last error.
    pub fn failed(&self) -> (u64, Option<(SocketAddr, io::Error)>) {
        let fields = self.shared.lock();
        let error = |(to, errno)| (to, io::Error::from_raw_os_error(errno));
        (fields.failed, fields.last_error.map(error))
    }

    /// Sends [`STOPPING_COUNT`] heartbeats with the state `stopping` and ends the thread.
    /// Takes about 30 ms.
    pub fn close(self) {
        drop(self);
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was already reported on standard error.
            let _ = thread.join();
        }
    }
}

// === impl SenderShared ===

impl SenderShared {
    /// Locks the fields. A poisoned lock is used as it is, because no code panics between
    /// two writes to the fields.
    fn lock(&self) -> MutexGuard<'_, SenderFields> {
        self.fields.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Waits until `due` or a change of the state. Returns false if the sender is closing.
    fn wait_until(&self, due: Instant) -> bool {
        let mut fields = self.shared.lock();
        loop {
            let left = due.saturating_duration_since(clock::now());
            if fields.closing {
                return false;
            }
            if fields.state_changed || left.is_zero() {
                fields.state_changed = false;
                return true;
            }
            let waited = self.shared.changed.wait_timeout(fields, left);
            fields = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn send(&mut self) {
        self.sequence += 1;
        let fields = self.shared.lock();
        let draft = HeartbeatFields {
            identity: &self.settings.identity,
            key_id: self.settings.key_id,
            incarnation: self.incarnation,
            sequence: self.sequence,
            sent: now_ms(),
            interval: self.settings.interval,
            state: fields.state,
            weight: fields.weight,
            in_flight: fields.in_flight,
            load: fields.load,
        };
        drop(fields);
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
        let mut fields = self.shared.lock();
        fields.sent += sent;
        fields.failed += failed;
        fields.last_error = last_error.or(fields.last_error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedule_does_not_drift_or_send_missed_heartbeats() {
        let (began, ms) = (clock::now(), Duration::from_millis);
        let next = |now| next_due(began, began + now, ms(100)) - began;
        assert_eq!(next(ms(0)), ms(100));
        assert_eq!(next(ms(7)), ms(100));
        assert_eq!(next(ms(99)), ms(100));
        assert_eq!(next(ms(100)), ms(200));
        assert_eq!(next(ms(12_345)), ms(12_400));
    }
}
