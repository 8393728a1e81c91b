//! Admission by client address: access lists, and limits per client source.
//!
//! Called by the data plane for each accepted connection, before a backend is picked.
//! Nothing here counts rejections or closes sockets.

pub mod access_list;
pub mod client_sources;
