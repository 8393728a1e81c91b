//! The commands of the lab, one file each: arguments in, exit code out.
//!
//! Called by `cli`. They talk to a balancer as any client does.

pub mod backend;
pub mod bench;
pub mod demo;
pub mod selftest;
pub mod streams;
pub(crate) mod threads;

/// Text as a TOML basic string, whose escapes are JSON's (and DEL's).
pub(crate) fn quoted(text: &str) -> String {
    let json = serde_json::to_string(text).expect("text always serialises");
    json.replace('\u{7f}', "\\u007f")
}
