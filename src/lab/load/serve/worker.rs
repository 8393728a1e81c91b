//! One thread of a server: its listeners, its connections and its event loop.
//!
//! Run by `serve`. It accepts, passes readiness to the connections and closes them. Of
//! the behaviour it handles only what depends on time.

use super::peer::{NextAction, ServeShared, ServedConnection};
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

/// First token of the listeners. Connections have lower tokens.
const LISTENER: u64 = 1 << 32;

/// Maximum number of connections that are accepted in a row.
const ACCEPT_MAX: usize = 64;

/// Maximum number of bytes per receive.
const BUFFER: usize = 256 * 1024;

/// Maximum sleep of a thread, so that it checks the stop flag.
const SLEEP_MAX: Duration = Duration::from_millis(50);

/// Pause of the listeners after an accept error (usually: no descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// Read interval of slow readers.
const TICK: Duration = Duration::from_millis(10);

struct ServeThread {
    with: ServeShared,
    listeners: Vec<Socket>,
    peers: Slab<ServedConnection>,
    /// Listeners are not watched until this time.
    accept_paused_until: Option<Instant>,
}

/// Serves until stopped, or for the duration of the service.
pub(super) fn run(
    service: &Service,
    handle: &ThreadHandle,
    listeners: Vec<Socket>,
) -> io::Result<ServeReport> {
    let mut worker = ServeThread::new(service, listeners)?;
    let began = clock::now();
    let until = service.duration.map(|duration| began + duration);
    let mut batch = EpollBatch::new();
    let mut last = began;
    handle.gauge().started.store(true, Relaxed);
    while !handle.stopped() {
        let now = clock::now();
        if until.is_some_and(|until| now >= until) {
            break;
        }
        worker.pause(handle, now.duration_since(began));
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
        worker.show(handle);
    }
    worker.with.served.open = worker.peers.len() as u64;
    Ok(worker.with.served)
}

// === impl ServeThread ===

impl ServeThread {
    fn new(service: &Service, listeners: Vec<Socket>) -> io::Result<ServeThread> {
        let epoll = Epoll::new()?;
        for (listener, token) in listeners.iter().zip(LISTENER..) {
            epoll.watch_for(listener, token, EpollInterest::WhileReadable)?;
        }
        let behaviour = service.behaviour;
        let with = ServeShared {
            behaviour,
            skip: service.skip,
            epoll,
            served: ServeReport::default(),
            buffer: vec![0; BUFFER].into(),
            filler: vec![b'y'; behaviour.filler()].into(),
        };
        Ok(ServeThread {
            with,
            listeners,
            peers: Slab::with_capacity(1024),
            accept_paused_until: None,
        })
    }

    fn sleep(&self) -> Duration {
        match self.with.behaviour {
            Behaviour::SlowRead { .. } => TICK,
            _ if self.accept_paused_until.is_some() => ACCEPT_PAUSE,
            _ => SLEEP_MAX,
        }
    }

    fn accept(&mut self, listener: usize, now: Instant) -> io::Result<()> {
        if self.accept_paused_until.is_some() {
            return Ok(());
        }
        for _ in 0..ACCEPT_MAX {
            match listen::accept(&self.listeners[listener]) {
                Ok((socket, _)) => self.add(ServedConnection::new(socket)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if accept_can_continue(&error) => {}
                Err(_) => {
                    // A watched listener with a non-empty queue would wake the loop
                    // continuously.
                    self.with.served.refused += 1;
                    self.accept_paused_until = Some(now + ACCEPT_PAUSE);
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
        if self.accept_paused_until.is_some_and(|until| now >= until) {
            self.accept_paused_until = None;
            self.watch_listeners(EpollInterest::WhileReadable)?;
        }
        Ok(())
    }

    fn add(&mut self, peer: ServedConnection) {
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
        // A socket is reported once per batch, so the key still belongs to it.
        let Some(peer) = self.peers.get_mut(key) else { return };
        let next = peer.ready(&mut self.with, readiness);
        self.apply(key, next);
    }

    fn apply(&mut self, key: usize, next: io::Result<NextAction>) {
        match next {
            Ok(NextAction::Keep) => {}
            Ok(NextAction::Close) => drop(self.peers.remove(key)),
            Ok(NextAction::Reset) => {
                self.with.served.reset += 1;
                stream::reset(self.peers.remove(key).into_socket());
            }
            Err(_) => {
                self.with.served.failed += 1;
                drop(self.peers.remove(key));
            }
        }
    }

    /// Sleeps if the behaviour pauses now.
    fn pause(&self, handle: &ThreadHandle, running: Duration) {
        let Behaviour::Hiccup { pause, every } = self.with.behaviour else { return };
        // The first pause starts after the first `every`.
        let into = running.as_nanos() % every.as_nanos();
        if running < every || into >= pause.as_nanos() {
            return;
        }
        let until = clock::now() + (pause - Duration::from_nanos(into as u64));
        loop {
            let left = until.saturating_duration_since(clock::now());
            if left.is_zero() || handle.stopped() {
                return;
            }
            std::thread::park_timeout(left.min(SLEEP_MAX));
        }
    }

    /// Reads from every slow reader what has become due since `last`.
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
            self.apply(key, next);
        }
    }

    fn show(&self, handle: &ThreadHandle) {
        let (gauge, served) = (handle.gauge(), &self.with.served);
        let units = if served.requests > 0 { served.requests } else { served.accepted };
        gauge.units.store(units, Relaxed);
        gauge.bytes.store(served.bytes_in + served.bytes_out, Relaxed);
        gauge.errors.store(served.failed, Relaxed);
        gauge.open.store(self.peers.len() as u64, Relaxed);
    }
}
