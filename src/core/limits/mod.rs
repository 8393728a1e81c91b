//! What may be refused before a backend is picked: addresses and rates of clients.
//!
//! Called by the data plane for each accepted connection. Nothing here counts
//! refusals or closes sockets.

pub mod access_list;
pub mod client_sources;
