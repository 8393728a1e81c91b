//! The pure part of the balancer: model, limits, outcomes, policies, tables, health and
//! the controller.
//!
//! All other parts use it. Time and randomness are arguments, effects are return
//! values. Nothing here does I/O, reads a clock or starts a thread.

pub mod balance;
pub mod control;
pub mod decision;
pub mod discovery;
pub mod finding;
pub mod health;
pub mod limits;
pub mod metrics;
pub mod model;
pub mod outcome;
pub mod proxy_protocol;
pub mod rebalance;
pub mod sessions;
pub mod suspicion;
pub mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod traffic;
