//! The pure part of the balancer: the model, limits, outcomes, policies, the table,
//! health and the controller.
//!
//! Every other part uses it. Time and randomness come in as arguments, effects go out
//! as values; nothing here does I/O, reads a clock or starts a thread.

pub mod balance;
pub mod control;
pub mod decision;
pub mod health;
pub mod limits;
pub mod metrics;
pub mod model;
pub mod outcome;
pub mod suspicion;
pub mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
