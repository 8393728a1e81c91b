//! The data path: accept, admit, route, pick, connect, relay, close, account.

pub mod close;
