//! Sessions that run while member sources fail or change.
//!
//! Each thread opens short sessions one after another and checks the answer. Lasting
//! sessions exchange a message now and then and must stay open. The load counts every
//! failure and never repeats a session.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client;
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Pause of a thread between two short sessions.
const PAUSE: Duration = Duration::from_millis(10);

/// Short sessions from several threads, until [`Load::end`].
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    counts: Arc<Mutex<LoadReport>>,
}

/// What the sessions saw.
#[derive(Debug, Default, Clone)]
pub struct LoadReport {
    /// Sessions by the name that answered.
    pub answers: BTreeMap<String, u64>,
    /// The first failures.
    pub failures: Vec<String>,
    /// All failures.
    pub failed: u64,
}

/// Backends that answer with their names; the position in the list is in the name.
pub struct NamedBackends(pub Vec<ScriptedBackend>);

/// Sessions that stay open.
pub struct LastingSessions(Vec<TcpStream>);

// === impl Load ===

impl Load {
    /// Starts two threads with sessions to `address`.
    pub fn start(address: SocketAddr) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let counts = Arc::new(Mutex::new(LoadReport::default()));
        let thread = || {
            let (stop, counts) = (Arc::clone(&stop), Arc::clone(&counts));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let answer = client::ask(address);
                    counts.lock().unwrap().add(answer);
                    std::thread::sleep(PAUSE);
                }
            })
        };
        let threads = vec![thread(), thread()];
        Load { stop, threads, counts }
    }

    /// Returns the counts so far.
    pub fn report(&self) -> LoadReport {
        self.counts.lock().unwrap().clone()
    }

    /// Ends the threads and checks that no session failed.
    #[track_caller]
    pub fn end(mut self) -> LoadReport {
        self.finish();
        let report = self.report();
        assert_eq!(report.failed, 0, "{report:?}");
        assert!(report.sessions() > 0, "the load has run");
        report
    }

    fn finish(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("the load does not panic");
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

// === impl LoadReport ===

impl LoadReport {
    fn add(&mut self, answer: std::io::Result<String>) {
        match answer {
            Ok(name) if !name.is_empty() => *self.answers.entry(name).or_default() += 1,
            failed => {
                self.failed += 1;
                if self.failures.len() < 5 {
                    self.failures.push(format!("{failed:?}"));
                }
            }
        }
    }

    /// All sessions that were answered.
    pub fn sessions(&self) -> u64 {
        self.answers.values().sum()
    }

    /// Sessions that this backend answered.
    pub fn of(&self, name: &str) -> u64 {
        self.answers.get(name).copied().unwrap_or_default()
    }
}

// === impl NamedBackends ===

impl NamedBackends {
    /// Starts `count` backends with the names `0`, `1` and so on.
    pub fn start(count: usize) -> NamedBackends {
        let start = |number: usize| ScriptedBackend::start(backend::name(&number.to_string()));
        NamedBackends((0..count).map(start).collect())
    }

    /// The address of one backend.
    pub fn address(&self, number: usize) -> SocketAddr {
        self.0[number].socket_address()
    }

    /// The addresses of the backends with these numbers.
    pub fn addresses(&self, numbers: &[usize]) -> Vec<SocketAddr> {
        numbers.iter().map(|number| self.address(*number)).collect()
    }
}

// === impl LastingSessions ===

impl LastingSessions {
    /// Opens `count` sessions through a frontend whose backends echo.
    pub fn open(address: SocketAddr, count: usize) -> LastingSessions {
        let open = |_| {
            let stream = client::connect(address);
            assert_eq!(client::exchange(&stream, b"hello").expect("an echo"), b"hello");
            stream
        };
        LastingSessions((0..count).map(open).collect())
    }

    /// Checks that every session still exchanges messages.
    #[track_caller]
    pub fn assert_alive(&self) {
        for stream in &self.0 {
            let answer = client::exchange(stream, b"still here");
            assert_eq!(answer.expect("the session is open"), b"still here");
        }
    }
}
