//! Probes of databases and pools by role, with real servers.

mod failover;
mod mariadb;
mod pgbench;
mod postgres;
mod redis;
mod rigs;
mod services;
