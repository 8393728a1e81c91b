//! Values that the table of keys describes in words, as JSON Schema.
//!
//! A key that is not listed here is a text. A test validates the samples of every key, so a key
//! of another type cannot be forgotten.

use super::inline;
use crate::keys::{ConfigKey, Values};
use serde_json::{Value, json};

/// Most steps of a probe, and most ports.
const STEPS_MAX: usize = 32;

/// Returns the schema of a key's value.
pub(super) fn form(header: &str, key: &ConfigKey) -> Value {
    let Values::Form(words) = key.values else { return json!({}) };
    match (header, key.name) {
        ("[frontend.NAME]", "bind") => {
            let one = json!({ "anyOf": [{ "type": "string" }, inline("bind")] });
            either([json!({ "type": "string" }), inline("bind"), list(one)])
        }
        ("[pool.NAME]", "proxy_protocol") => {
            either([json!({ "enum": ["off", "v1", "v2"] }), inline("proxy_protocol")])
        }
        ("[pool.NAME]", "ejection") => json!({ "enum": ["off"] }),
        ("[pool.NAME.probe]", "tls") => either([json!({ "type": "boolean" }), inline("tls")]),
        ("[pool.NAME.probe]", "expect") => expect(),
        ("[pool.NAME.probe]", "send") => send(),
        ("[pool.NAME.probe]", "steps") => {
            let step = |name: &str, of: Value| {
                json!({ "type": "object", "properties": { name: of }, "required": [name],
                        "additionalProperties": false })
            };
            let steps = either([step("send", send()), step("expect", expect())]);
            json!({ "type": "array", "items": steps, "minItems": 1, "maxItems": STEPS_MAX })
        }
        ("[pool.NAME.probe]", "command") => {
            json!({ "type": "array", "items": { "type": "string" }, "minItems": 1, "maxItems": 64 })
        }
        ("[pool.NAME.probe]", "headers") => {
            json!({ "type": "object", "additionalProperties": { "type": "string" } })
        }
        ("proxy_protocol", "send") => {
            json!({ "type": "array",
                    "items": { "enum": ["authority", "alpn", "ssl", "unique-id"] } })
        }
        ("proxy_protocol", "pass") => list(either([integer(0, 255), text("")])),
        ("[pool.NAME.discover]", "port") => either([integer(1, 65_535), text("")]),
        ("[[frontend.NAME.route]]", "ports") => {
            let one = || either([integer(1, 65_535), text("")]);
            either([integer(1, 65_535), text(""), list(one())])
        }
        _ if takes_a_list(words) => either([text(""), list(text(""))]),
        _ => text(words),
    }
}

fn takes_a_list(words: &str) -> bool {
    words.contains("list") || words.starts_with("up to ")
}

fn expect() -> Value {
    either([json!({ "type": "string", "minLength": 1 }), inline("expect")])
}

fn send() -> Value {
    let hex = json!({ "type": "object", "properties": { "hex": { "type": "string" } },
                      "required": ["hex"], "additionalProperties": false });
    either([json!({ "type": "string" }), hex])
}

fn either<const N: usize>(all: [Value; N]) -> Value {
    json!({ "anyOf": all.to_vec() })
}

fn list(of: Value) -> Value {
    json!({ "type": "array", "items": of })
}

fn integer(min: u64, max: u64) -> Value {
    json!({ "type": "integer", "minimum": min, "maximum": max })
}

/// A text. Its largest length is in the words: `at most 255 bytes`, `1 to 64 bytes`. A text never
/// has more characters than bytes.
fn text(words: &str) -> Value {
    let number = |after: &str| {
        let (_, rest) = words.split_once(after)?;
        let (number, _) = rest.split_once(" bytes")?;
        number.replace(',', "").parse::<u64>().ok()
    };
    match number("at most ").or_else(|| number(" 1 to ")) {
        Some(most) => json!({ "type": "string", "maxLength": most }),
        None => json!({ "type": "string" }),
    }
}
