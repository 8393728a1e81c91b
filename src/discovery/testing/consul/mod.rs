//! A double of a Consul agent: registrations, checks and blocking queries as documented,
//! with scripted faults.
//!
//! A test against it proves how this project reads the documentation, not that a real agent
//! works. Where the double differs from an agent, it is stricter. The npm package `consul`
//! is its referee (`tests/consul_referee.rs` of this member). Tests start it with
//! [`ConsulDouble::start`]; `examples/consul_double.rs` of this member runs it as a program.

mod catalog;
mod checks;
mod commands;
mod documents;
mod health;
mod http;
mod routes;

use catalog::DoubleCatalog;
use checks::CheckClocks;
pub use commands::serve;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Notify;

/// Most requests that the double remembers.
const REQUESTS_MAX: usize = 10_000;

/// A running double. It stops when it is dropped.
#[derive(Debug)]
pub struct ConsulDouble {
    address: SocketAddr,
    shared: Arc<DoubleShared>,
    thread: Option<JoinHandle<()>>,
}

/// What the double does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ConsulFault {
    /// Nothing.
    #[default]
    None,
    /// Health queries fail with status 500 and `No cluster leader`.
    NoLeader,
    /// Health queries give an empty list, status 200 and `X-Consul-KnownLeader: false`.
    EmptyWithoutLeader,
    /// Health queries do not wait, and their index is 0.
    IndexZero,
    /// Health queries fail with this status.
    Status(u16),
    /// Half of the body arrives, then the connection closes.
    HalfAnswer,
    /// One byte arrives per duration.
    SlowDrip(Duration),
    /// Requests get no answer.
    Hang,
    /// Each request gets a reset.
    Reset,
}

/// What a token permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DoubleRights {
    /// `service:read` and `node:read`.
    pub read: bool,
    /// `service:write`.
    pub write: bool,
}

/// Settings of a double.
#[derive(Debug, Clone, Copy)]
pub struct DoubleSettings {
    /// Where it listens; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Lower bound of `DeregisterCriticalServiceAfter`; 1 minute in Consul.
    pub deregister_min: Duration,
    /// The first index.
    pub index: u64,
}

#[derive(Debug)]
struct DoubleShared {
    settings: DoubleSettings,
    state: Mutex<DoubleState>,
    /// After each change, so that blocked queries look again.
    changed: Notify,
    stopped: Notify,
}

#[derive(Debug)]
struct DoubleState {
    catalog: DoubleCatalog,
    clocks: CheckClocks,
    fault: ConsulFault,
    /// `None`: access control is off.
    tokens: Option<BTreeMap<String, DoubleRights>>,
    last_contact: Duration,
    /// Connections of an older epoch close.
    epoch: u64,
    /// Restores of a snapshot; each ends the blocked queries.
    restores: u64,
    requests: Vec<String>,
}

// === impl ConsulDouble ===

impl ConsulDouble {
    /// Starts a double on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// No free port or thread.
    pub fn start() -> io::Result<ConsulDouble> {
        ConsulDouble::start_with(DoubleSettings::default())
    }

    /// Starts a double.
    ///
    /// # Errors
    /// The address is in use, or no free thread.
    pub fn start_with(settings: DoubleSettings) -> io::Result<ConsulDouble> {
        let state = DoubleState {
            catalog: DoubleCatalog::new(settings.index),
            clocks: CheckClocks::default(),
            fault: ConsulFault::None,
            tokens: None,
            last_contact: Duration::ZERO,
            epoch: 0,
            restores: 0,
            requests: Vec::new(),
        };
        let (changed, stopped) = (Notify::new(), Notify::new());
        let shared =
            Arc::new(DoubleShared { settings, state: Mutex::new(state), changed, stopped });
        let listener = std::net::TcpListener::bind(settings.listen)?;
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let own = Arc::clone(&shared);
        let serve = move || runtime.block_on(accept(listener, own));
        let thread = std::thread::Builder::new().name("consul-double".to_owned()).spawn(serve)?;
        Ok(ConsulDouble { address, shared, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until the double stops, which only a failure of its thread causes.
    pub fn wait(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    /// Begins a fault. Blocked queries notice it.
    pub fn set_fault(&self, fault: ConsulFault) {
        self.shared.change(|state| state.fault = fault);
    }

    /// The age of the data in all answers from now on (`X-Consul-LastContact`).
    pub fn set_last_contact(&self, age: Duration) {
        self.shared.change(|state| state.last_contact = age);
    }

    /// Makes all indexes small again, as the restore of an old snapshot does.
    pub fn restart_indexes(&self, index: u64) {
        self.shared.change(|state| {
            state.catalog.restart_indexes(index);
            state.restores += 1;
        });
    }

    /// Restarts the agent without its data: connections close, all services are lost, and
    /// indexes start at `index`.
    pub fn restart_empty(&self, index: u64) {
        self.shared.change(|state| {
            state.catalog = DoubleCatalog::new(index);
            state.clocks = CheckClocks::default();
            state.epoch += 1;
        });
    }

    /// Closes all connections with a reset.
    pub fn close_connections(&self) {
        self.shared.change(|state| state.epoch += 1);
    }

    /// Creates a token. From the first one on, requests without a token have no rights.
    pub fn create_token(&self, token: &str, rights: DoubleRights) {
        self.shared.change(|state| {
            state.tokens.get_or_insert_default().insert(token.to_owned(), rights);
        });
    }

    /// Revokes a token: its requests fail with 403. Blocked queries end, as those of an
    /// agent do after the next change.
    pub fn revoke_token(&self, token: &str) {
        self.shared.change(|state| {
            state.tokens.get_or_insert_default().remove(token);
            state.epoch += 1;
        });
    }

    /// Puts many instances of a service into the catalog, as `COUNT` nodes would.
    pub fn fill(&self, service: &str, count: u32) {
        self.shared.change(|state| {
            for number in 0..count {
                let [_, a, b, c] = number.to_be_bytes();
                let node = format!("node-{}", number / 100);
                state.catalog.put_node(&node, &format!("10.200.{a}.{b}"));
                let text = format!(
                    r#"{{"ID":"{service}-{number}","Name":"{service}","Tags":["v1"],
                    "Address":"10.{}.{b}.{c}","Port":8080}}"#,
                    100 + u16::from(a)
                );
                if let Ok(one) = serde_json::from_str::<documents::DoubleRegistration>(&text) {
                    state.catalog.put_service(one.service(&node));
                }
            }
        });
    }

    /// Methods and paths of the requests, with their queries, oldest first; at most 10,000.
    pub fn requests(&self) -> Vec<String> {
        self.shared.lock().requests.clone()
    }
}

impl Drop for ConsulDouble {
    fn drop(&mut self) {
        self.shared.stopped.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(listener: std::net::TcpListener, shared: Arc<DoubleShared>) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    tokio::spawn(checks::watch(Arc::clone(&shared)));
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let _ = stream.set_nodelay(true);
                    tokio::spawn(http::serve(stream, Arc::clone(&shared)));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            () = shared.stopped.notified() => return,
        }
    }
}

// === impl DoubleSettings ===

impl Default for DoubleSettings {
    fn default() -> DoubleSettings {
        DoubleSettings {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            deregister_min: Duration::from_secs(60),
            index: 10,
        }
    }
}

// === impl DoubleShared ===

impl DoubleShared {
    fn lock(&self) -> MutexGuard<'_, DoubleState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes the blocked queries.
    fn change<T>(&self, change: impl FnOnce(&mut DoubleState) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_waiters();
        result
    }

    fn fault(&self) -> ConsulFault {
        self.lock().fault
    }

    fn epoch(&self) -> u64 {
        self.lock().epoch
    }

    /// Waits until the connections of this epoch must close.
    async fn closed_since(&self, epoch: u64) {
        loop {
            let changed = self.changed.notified();
            if self.epoch() != epoch {
                return;
            }
            changed.await;
        }
    }

    fn note(&self, request: &http::DoubleRequest) {
        let query: Vec<String> =
            request.query.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let text = format!("{} /{}?{}", request.method, request.path.join("/"), query.join("&"));
        let mut state = self.lock();
        if state.requests.len() < REQUESTS_MAX {
            state.requests.push(text);
        }
    }
}

#[cfg(test)]
mod tests;
