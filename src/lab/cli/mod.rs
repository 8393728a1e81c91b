//! The commands of the lab, one file each: arguments in, exit code out.
//!
//! Called by `cli`. They use a balancer only as clients and operators do.

pub mod backend;
pub mod bench;
pub mod demo;
pub mod selftest;
pub mod streams;
pub(crate) mod threads;

/// Formats text as a TOML basic string. JSON uses the same escapes, except for DEL.
pub(crate) fn quoted(text: &str) -> String {
    let json = serde_json::to_string(text).expect("text always serialises");
    json.replace('\u{7f}', "\\u007f")
}
