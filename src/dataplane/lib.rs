//! The data path: accept, admit, route, pick, connect, relay, close, account.
//!
//! One thread per worker. `daemon` starts the workers and sends them tables and commands. The
//! workers return counters, reports and access-log records. The data path knows no
//! configuration files, no probes and no admin API.

pub mod accept;
pub mod access_log;
pub mod fault_points;
pub mod local_errors;
mod relay;
mod session;
#[cfg(all(test, feature = "sim"))]
mod sim;
pub mod timer_wheel;
pub mod worker;
