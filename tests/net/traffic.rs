//! A steady stream of short echo sessions from the client's host.
//!
//! Runs while a fault is made, so that a test can count what clients saw of it
//! and when. It never retries: every error a client would see is kept.

use crate::common::{client, ms};
use crate::netns::Namespace;
use socket2::Socket;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// One session: connect, 64 bytes there and back, close.
#[derive(Debug)]
pub struct Session {
    pub began: Instant,
    pub took: Duration,
    pub result: io::Result<()>,
}

/// How much of it.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Sessions at a time.
    pub at_once: usize,
    /// Pause of each client between two sessions.
    pub pause: Duration,
    /// A client waits so long for each step, then gives up: an error.
    pub patience: Duration,
}

/// The stream, until it is stopped or dropped.
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

    /// Sessions that ended so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Every session, in no particular order.
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
        // A refused connect costs nothing: do not make a million.
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
            // Who gives up resets: nothing of it lingers in the balancer.
            let socket = Socket::from(stream);
            socket.set_linger(Some(Duration::ZERO))?;
            Err(error)
        }
    }
}

/// The errors, each with how long after `since` its session began, in seconds.
pub fn errors(sessions: &[Session], since: Instant) -> Vec<String> {
    let signed = |at: Instant| match at.checked_duration_since(since) {
        Some(after) => after.as_secs_f64(),
        None => -(since - at).as_secs_f64(),
    };
    let failed = |one: &Session| match &one.result {
        Ok(()) => None,
        Err(error) => {
            Some(format!("began at {:.3}, took {:?}: {error}", signed(one.began), one.took))
        }
    };
    sessions.iter().filter_map(failed).collect()
}
