//! The real balancer inside the demo's process: started as `run` starts it, and
//! asked through the channel its admin API uses.
//!
//! Used by the demo alone. What it tells comes from the status and metrics
//! texts that anybody could fetch with curl.

use super::backends::Backend;
use super::place::{NAME, Place};
use crate::admin::Request;
use crate::app::{self, Failure, Options, Running};
use serde_json::Value;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use tokio::sync::{mpsc, oneshot};

/// Somebody may take a port between its choice and its use, now and then.
const STARTS_MAX: usize = 5;

/// The running balancer and where it is reached.
#[derive(Debug)]
pub(super) struct Balancer {
    running: Running,
    requests: mpsc::Sender<Request>,
    pub(super) frontend: SocketAddr,
    pub(super) admin: SocketAddr,
}

/// What status said at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Seen {
    pub(super) engine: String,
    pub(super) engine_reason: String,
    pub(super) workers: u64,
    pub(super) generation: u64,
    /// Of the table: any change of anybody's standing makes a new one.
    pub(super) serial: u64,
    /// Connections the frontend has accepted.
    pub(super) sessions: u64,
    /// Sessions open.
    pub(super) open: u64,
    pub(super) backends: Vec<SeenBackend>,
}

/// What status said of one backend.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct SeenBackend {
    pub(super) name: String,
    pub(super) weight: u64,
    /// 0 while it is not eligible.
    pub(super) effective: u64,
    pub(super) intent: String,
    /// The newest change: to what, why, how many seconds ago.
    pub(super) changed: Option<(String, String, f64)>,
}

/// The metrics text.
#[derive(Debug)]
pub(super) struct Metrics(String);

// === impl Balancer ===

impl Balancer {
    /// Starts it on free loopback ports in front of `backends`.
    pub(super) fn start(place: &Place, backends: &[Backend]) -> Result<Balancer, String> {
        let mut why = String::new();
        for _ in 0..STARTS_MAX {
            let ports = free_addresses().map_err(|error| format!("no free port: {error}"))?;
            let [frontend, admin] = ports;
            place
                .write_config(frontend, admin, backends)
                .map_err(|error| format!("cannot write the configuration: {error}"))?;
            let options = Options { config: place.config(), signals: false, logging: false };
            match app::start(options) {
                Ok(running) => {
                    let requests = running.requests();
                    return Ok(Balancer { running, requests, frontend, admin });
                }
                Err(Failure::Config(problems)) => return Err(problems.render(false)),
                Err(failure @ (Failure::Runtime(_) | Failure::At(_))) => why = failure.to_string(),
            }
        }
        Err(format!("the balancer does not start: {why}"))
    }

    /// What status says; `None` once the balancer has ended.
    pub(super) async fn seen(&self) -> Option<Seen> {
        let text = self.ask(Request::Status).await?;
        Some(Seen::read(&serde_json::from_str(&text).ok()?))
    }

    /// What the metrics say.
    pub(super) async fn metrics(&self) -> Option<Metrics> {
        self.ask(Request::Metrics).await.map(Metrics)
    }

    /// Asks it to drain and exit; returns once it has begun to.
    pub(super) async fn shut_down(&self) {
        // No answer means that it has ended already.
        let _ = self.ask(Request::Shutdown).await;
    }

    /// Waits for its end.
    pub(super) fn wait(self) -> app::Exit {
        self.running.wait()
    }

    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Request) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(make(reply)).await.ok()?;
        answer.await.ok()
    }
}

/// Two ports nobody has now.
fn free_addresses() -> std::io::Result<[SocketAddr; 2]> {
    let one = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok([one.local_addr()?, other.local_addr()?])
}

// === impl Seen ===

impl Seen {
    fn read(status: &Value) -> Seen {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        let named = |list: &'static str| {
            let all = status[list].as_array().into_iter().flatten();
            all.filter(|one| one["name"] == NAME).collect::<Vec<_>>()
        };
        let backend = |value: &Value| SeenBackend {
            name: text(&value["name"]),
            weight: number(&value["weight"]),
            // What is left of a suspect's is not nothing.
            effective: value["effective_weight"].as_f64().unwrap_or_default().ceil() as u64,
            intent: text(&value["intent"]),
            changed: value["last_transition"].as_object().map(|change| {
                let ago = change["seconds_ago"].as_f64().unwrap_or_default();
                (text(&change["to"]), text(&change["reason"]), ago)
            }),
        };
        let backends = named("pools")
            .into_iter()
            .flat_map(|pool| pool["backends"].as_array().into_iter().flatten())
            .map(backend)
            .collect();
        Seen {
            engine: text(&status["engine"]),
            engine_reason: text(&status["engine_reason"]),
            workers: number(&status["workers"]),
            generation: number(&status["generation"]),
            serial: number(&status["table_serial"]),
            sessions: named("frontends").iter().map(|one| number(&one["sessions_total"])).sum(),
            open: number(&status["connections_active"]),
            backends,
        }
    }

    /// The backend of that name.
    pub(super) fn backend(&self, name: &str) -> Option<&SeenBackend> {
        self.backends.iter().find(|backend| backend.name == name)
    }

    /// Whether all of them take sessions at their full weight.
    pub(super) fn all_serve(&self) -> bool {
        !self.backends.is_empty() && self.backends.iter().all(SeenBackend::serves)
    }
}

// === impl SeenBackend ===

impl SeenBackend {
    /// At its full weight.
    pub(super) fn serves(&self) -> bool {
        self.weight > 0 && self.effective == self.weight
    }
}

// === impl Metrics ===

impl Metrics {
    /// The value of one series, written as in the text; 0 where it is absent.
    pub(super) fn count(&self, series: &str) -> u64 {
        let value = |line: &str| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok();
        self.0.lines().find_map(value).unwrap_or_default()
    }

    /// Ended sessions: `cause in phase` and how many, without the zeros.
    pub(super) fn session_ends(&self) -> Vec<(String, u64)> {
        let cell = |line: &str| {
            let labels = line.strip_prefix("tidegate_session_end_total{cause=\"")?;
            let (cause, rest) = labels.split_once("\",phase=\"")?;
            let (phase, count) = rest.split_once("\"} ")?;
            let count = count.parse().ok().filter(|count| *count > 0)?;
            Some((format!("{cause} ({phase})"), count))
        };
        self.0.lines().filter_map(cell).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_ends_are_read_from_the_text_without_zeros() {
        let metrics = Metrics(
            "tidegate_session_end_total{cause=\"finished\",phase=\"closed\"} 12\n\
             tidegate_session_end_total{cause=\"no-backend\",phase=\"admit\"} 0\n\
             tidegate_connect_retries_total 3\ntidegate_connect_retries_total_x 9\n"
                .to_owned(),
        );
        assert_eq!(metrics.session_ends(), [("finished (closed)".to_owned(), 12)]);
        assert_eq!(metrics.count("tidegate_connect_retries_total"), 3);
        assert_eq!(metrics.count("tidegate_absent"), 0);
    }
}
