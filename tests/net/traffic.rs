//! A steady stream of short echo sessions from the client's host.
//!
//! It runs during a fault, so that a test can count the effects on clients and their times. It
//! never retries, and it records every error.

use crate::common::{client, ms};
use crate::netns::Namespace;
use socket2::Socket;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// One session: connect, 64 bytes in each direction, close.
#[derive(Debug)]
pub struct Session {
    pub began: Instant,
    pub took: Duration,
    pub result: io::Result<()>,
}

/// The load.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Number of concurrent clients.
    pub at_once: usize,
    /// Pause of each client between two sessions.
    pub pause: Duration,
    /// The timeout of each step of a client.
    pub patience: Duration,
}

/// The stream. It runs until it is stopped or dropped.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Vec<Session>>>,
}

impl Traffic {
    pub fn start(from: &Namespace, to: SocketAddr, pace: Pace) -> Traffic {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let threads = from.run(|| {
            let start = |_| {
                let (stop, done) = (stop.clone(), done.clone());
                std::thread::spawn(move || sessions(to, pace, &stop, &done))
            };
            (0..pace.at_once).map(start).collect()
        });
        Traffic { stop, done, threads }
    }

    /// Number of sessions that have ended.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Stops the stream and returns every session, in no particular order.
    pub fn stop(mut self) -> Vec<Session> {
        self.stop.store(true, Ordering::Relaxed);
        let threads = std::mem::take(&mut self.threads);
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic in there")).collect()
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn sessions(to: SocketAddr, pace: Pace, stop: &AtomicBool, done: &AtomicU64) -> Vec<Session> {
    let mut sessions = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let result = session(to, pace.patience);
        sessions.push(Session { began, took: began.elapsed(), result });
        done.fetch_add(1, Ordering::Relaxed);
        // A refused connect returns immediately, so the loop must not spin.
        std::thread::sleep(pace.pause.max(ms(1)));
    }
    sessions
}

fn session(to: SocketAddr, patience: Duration) -> io::Result<()> {
    let stream = TcpStream::connect_timeout(&to, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_nodelay(true)?;
    let request = [0x55; 64];
    match client::exchange(&stream, &request) {
        Ok(answer) if answer == request => Ok(()),
        Ok(_) => Err(io::Error::other("another answer")),
        Err(error) => {
            // Resets the connection after a timeout, so that the session also ends in Tidegate.
            let socket = Socket::from(stream);
            socket.set_linger(Some(Duration::ZERO))?;
            Err(error)
        }
    }
}

/// Returns the errors, each with the start of its session in seconds after `since`.
pub fn errors(sessions: &[Session], since: Instant) -> Vec<String> {
    let signed = |at: Instant| match at.checked_duration_since(since) {
        Some(after) => after.as_secs_f64(),
        None => -(since - at).as_secs_f64(),
    };
    let failed = |session: &Session| match &session.result {
        Ok(()) => None,
        Err(error) => {
            Some(format!("began at {:.3}, took {:?}: {error}", signed(session.began), session.took))
        }
    };
    sessions.iter().filter_map(failed).collect()
}
