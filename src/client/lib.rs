//! The client of the admin API: finds the running balancer and sends requests.
//!
//! Called by `cli` and `lab`. It never starts a balancer.

pub mod command;
pub mod forward;
pub mod http;
pub mod reach;
