//! A steady stream of short HTTP sessions that records the start and the result of each.
//!
//! Tests run it while they change Tidegate or its backends. They can then separate
//! sessions that were open during the change from later sessions.

use super::http;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// One session: a new connection, one request, the whole answer.
#[derive(Debug)]
pub struct Attempt {
    pub began: Instant,
    /// The name of the answering backend, or the error.
    pub result: Result<String, std::io::Error>,
}

/// The stream. It runs until it is stopped or dropped.
pub struct Steady {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<Attempt>>>,
}

impl Steady {
    /// Starts a stream with `threads` concurrent sessions.
    pub fn start(address: SocketAddr, threads: usize) -> Steady {
        Steady::paced(address, threads, f64::INFINITY)
    }

    /// Starts a stream with `threads` concurrent sessions and at most `rate` new sessions per
    /// second.
    pub fn paced(address: SocketAddr, threads: usize, rate: f64) -> Steady {
        let stop = Arc::new(AtomicBool::new(false));
        let (begin, next) = (Instant::now(), Arc::new(AtomicU64::new(0)));
        let run = move |stop: Arc<AtomicBool>, next: Arc<AtomicU64>| {
            let mut attempts = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let due = begin + Duration::from_secs_f64(number as f64 / rate);
                // Waits for the requested pace.
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                let began = Instant::now();
                let result = http::over_tcp(address, "/").and_then(|answer| match answer.status {
                    200 => Ok(answer.body),
                    status => Err(std::io::Error::other(format!("status {status}"))),
                });
                if result.is_err() {
                    // A refused connect returns immediately, so the loop must not spin.
                    std::thread::sleep(super::ms(1));
                }
                attempts.push(Attempt { began, result });
            }
            attempts
        };
        let threads = (0..threads).map(|_| {
            let (stop, next) = (stop.clone(), next.clone());
            std::thread::spawn(move || run(stop, next))
        });
        Steady { threads: threads.collect(), stop }
    }

    /// Stops the stream and returns every session, in no particular order.
    pub fn stop(mut self) -> Vec<Attempt> {
        self.stop.store(true, Ordering::Relaxed);
        let threads = std::mem::take(&mut self.threads);
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic in there")).collect()
    }
}

impl Drop for Steady {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Returns the failures among the sessions that began at or after `since`.
pub fn failures_since(attempts: &[Attempt], since: Instant) -> Vec<&Attempt> {
    attempts.iter().filter(|session| session.began >= since && session.result.is_err()).collect()
}

/// Returns the number of sessions that the backend `name` answered.
pub fn answered_by(attempts: &[Attempt], name: &str) -> usize {
    attempts
        .iter()
        .filter(|session| session.result.as_deref().is_ok_and(|from| from == name))
        .count()
}
