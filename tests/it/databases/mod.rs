//! Probes of databases and pools by role, with real servers.

mod redis;
