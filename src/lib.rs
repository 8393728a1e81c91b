//! Tidegate: a layer-4 load balancer.

pub mod admin;
pub mod app;
pub mod balance;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod health;
pub mod load;
pub mod net;
pub mod proxy;
pub mod table;
pub mod telemetry;
