//! The data path: accept, admit, route, pick, connect, relay, close, account.
//!
//! One worker a thread; `daemon` starts them and feeds them tables and commands.
//! Nothing here knows of files, probes or the admin API: in comes a table, out
//! go counters, reports and access-log records.

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
