//! The data path: accept, admit, route, pick, connect, relay, close, account.
//!
//! One worker a thread; `app` starts them and feeds them tables and commands.
//! Nothing here knows of files, probes or the admin API: in comes a table, out
//! go counters, reports and access-log records.

pub mod admission;
pub mod close;
mod connect;
pub mod contain;
pub mod context;
pub mod faults;
pub mod gate;
mod life;
mod listener;
pub mod numbers;
mod posts;
mod queue;
pub mod relay;
mod restarts;
mod session;
#[cfg(test)]
mod sim;
mod slots;
pub mod wheel;
pub mod worker;
