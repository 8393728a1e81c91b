//! One thread of a server: its listeners, its connections, its loop.
//!
//! Run by `serve`. It accepts, hands readiness to the connections and closes
//! them; it knows a behaviour only where that is a matter of time.

use super::peer::{ConnectionFate, ServeShared, ServedConnection};
use super::{Behaviour, ServeReport, Service};
use crate::load::threads::ThreadHandle;
use slab::Slab;
use socket2::Socket;
use std::io::{self, ErrorKind};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tidegate_dataplane::local_errors::accept_can_continue;
use tidegate_net::clock;
use tidegate_net::epoll::{Epoll, EpollBatch, EpollEvent, EpollInterest};
use tidegate_net::{listen, stream};

/// Tokens from here on are listeners; connections stay far below.
const LISTENER: u64 = 1 << 32;

/// Connections accepted in one go.
const ACCEPT_MAX: usize = 64;

/// Received at once at most.
const BUFFER: usize = 256 * 1024;

/// A thread never sleeps longer: it looks at the stop flag.
const SLEEP_MAX: Duration = Duration::from_millis(50);

/// After a failure to accept (no descriptors, mostly) the listener rests.
const ACCEPT_REST: Duration = Duration::from_millis(10);

/// Slow readers read this often.
const TICK: Duration = Duration::from_millis(10);

struct ServeThread {
    with: ServeShared,
    listeners: Vec<Socket>,
    peers: Slab<ServedConnection>,
    /// Listeners are not watched until then.
    resting: Option<Instant>,
}

/// Serves until told to stop, or for the service's time.
pub(super) fn run(
    service: &Service,
    place: &ThreadHandle,
    listeners: Vec<Socket>,
) -> io::Result<ServeReport> {
    let mut worker = ServeThread::new(service.behaviour, listeners)?;
    let began = clock::now();
    let until = service.duration.map(|duration| began + duration);
    let mut batch = EpollBatch::new();
    let mut last = began;
    place.gauge().started.store(true, Relaxed);
    while !place.stopped() {
        let now = clock::now();
        if until.is_some_and(|until| now >= until) {
            break;
        }
        worker.pause(place, now.duration_since(began));
        worker.slow_reads(now, &mut last);
        worker.resume_accepting(now)?;
        let left = until.map_or(SLEEP_MAX, |until| until.duration_since(now));
        worker.with.epoll.wait(&mut batch, worker.sleep().min(left))?;
        for index in 0..batch.len() {
            let readiness = batch.get(index);
            match readiness.token.checked_sub(LISTENER) {
                Some(listener) => worker.accept(listener as usize, now)?,
                None => worker.serve(readiness),
            }
        }
        worker.show(place);
    }
    worker.with.served.open = worker.peers.len() as u64;
    Ok(worker.with.served)
}

// === impl ServeThread ===

impl ServeThread {
    fn new(behaviour: Behaviour, listeners: Vec<Socket>) -> io::Result<ServeThread> {
        let epoll = Epoll::new()?;
        for (listener, token) in listeners.iter().zip(LISTENER..) {
            epoll.watch_for(listener, token, EpollInterest::WhileReadable)?;
        }
        let with = ServeShared {
            behaviour,
            epoll,
            served: ServeReport::default(),
            buffer: vec![0; BUFFER].into(),
            filler: vec![b'y'; behaviour.filler()].into(),
        };
        Ok(ServeThread { with, listeners, peers: Slab::with_capacity(1024), resting: None })
    }

    fn sleep(&self) -> Duration {
        match self.with.behaviour {
            Behaviour::SlowRead { .. } => TICK,
            _ if self.resting.is_some() => ACCEPT_REST,
            _ => SLEEP_MAX,
        }
    }

    fn accept(&mut self, listener: usize, now: Instant) -> io::Result<()> {
        if self.resting.is_some() {
            return Ok(());
        }
        for _ in 0..ACCEPT_MAX {
            match listen::accept(&self.listeners[listener]) {
                Ok((socket, _)) => self.welcome(ServedConnection::new(socket)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if accept_can_continue(&error) => {}
                Err(_) => {
                    // Watched, it would keep us awake for nothing.
                    self.with.served.refused += 1;
                    self.resting = Some(now + ACCEPT_REST);
                    return self.watch_listeners(EpollInterest::EdgeReadable);
                }
            }
        }
        Ok(())
    }

    fn watch_listeners(&self, interest: EpollInterest) -> io::Result<()> {
        for (listener, token) in self.listeners.iter().zip(LISTENER..) {
            self.with.epoll.change(listener, token, interest)?;
        }
        Ok(())
    }

    fn resume_accepting(&mut self, now: Instant) -> io::Result<()> {
        if self.resting.is_some_and(|until| now >= until) {
            self.resting = None;
            self.watch_listeners(EpollInterest::WhileReadable)?;
        }
        Ok(())
    }

    fn welcome(&mut self, peer: ServedConnection) {
        self.with.served.accepted += 1;
        if self.with.behaviour == (Behaviour::Reset { after: 0 }) {
            self.with.served.reset += 1;
            return stream::reset(peer.into_socket());
        }
        let entry = self.peers.vacant_entry();
        let interest = self.with.behaviour.interest();
        match self.with.epoll.watch_for(peer.socket(), entry.key() as u64, interest) {
            Ok(()) => {
                entry.insert(peer);
            }
            Err(_) => self.with.served.failed += 1,
        }
    }

    fn serve(&mut self, readiness: EpollEvent) {
        let key = readiness.token as usize;
        // A socket tells once in a batch, so the key is still its own.
        let Some(peer) = self.peers.get_mut(key) else { return };
        let next = peer.ready(&mut self.with, readiness);
        self.settle(key, next);
    }

    fn settle(&mut self, key: usize, next: io::Result<ConnectionFate>) {
        match next {
            Ok(ConnectionFate::Keep) => {}
            Ok(ConnectionFate::Close) => drop(self.peers.remove(key)),
            Ok(ConnectionFate::Reset) => {
                self.with.served.reset += 1;
                stream::reset(self.peers.remove(key).into_socket());
            }
            Err(_) => {
                self.with.served.failed += 1;
                drop(self.peers.remove(key));
            }
        }
    }

    /// Does nothing at all for as long as the behaviour has it.
    fn pause(&self, place: &ThreadHandle, running: Duration) {
        let Behaviour::Hiccup { pause, every } = self.with.behaviour else { return };
        // The first pause comes after the first `every`.
        let into = running.as_nanos() % every.as_nanos();
        if running < every || into >= pause.as_nanos() {
            return;
        }
        let until = clock::now() + (pause - Duration::from_nanos(into as u64));
        loop {
            let left = until.saturating_duration_since(clock::now());
            if left.is_zero() || place.stopped() {
                return;
            }
            std::thread::park_timeout(left.min(SLEEP_MAX));
        }
    }

    /// Has every slow reader take what has come due since `last`.
    fn slow_reads(&mut self, now: Instant, last: &mut Instant) {
        let Behaviour::SlowRead { rate } = self.with.behaviour else { return };
        let due = rate as f64 * now.duration_since(*last).as_secs_f64();
        if due < 1.0 {
            return;
        }
        *last += Duration::from_secs_f64(due.floor() / rate as f64);
        let keys: Vec<usize> = self.peers.iter().map(|(key, _)| key).collect();
        for key in keys {
            let next = self.peers[key].discard(&mut self.with, due as usize);
            self.settle(key, next);
        }
    }

    fn show(&self, place: &ThreadHandle) {
        let (gauge, served) = (place.gauge(), &self.with.served);
        let units = if served.requests > 0 { served.requests } else { served.accepted };
        gauge.units.store(units, Relaxed);
        gauge.bytes.store(served.bytes_in + served.bytes_out, Relaxed);
        gauge.errors.store(served.failed, Relaxed);
        gauge.open.store(self.peers.len() as u64, Relaxed);
    }
}
