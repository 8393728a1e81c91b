//! Format of the file in which operators' intents survive a restart.
//!
//! Used by `state_directory`. Pure: it opens no file, and the caller passes the time.
//! Times in the file are seconds since 1970, because a monotonic clock of the old process
//! is not valid after a restart.

use super::saved_file::{self, unix};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::SystemTime;
use tidegate_core::control::handover::{Saved, SavedBackend, SavedPool};
use tidegate_core::control::{REMOVED_INTENTS_MAX, SavedIntent};
use tidegate_core::health::Intent;

/// Version of the format. Must be incremented with each change of the format.
const VERSION: u32 = 1;

/// Intents in one file: one per possible backend, and those of removed backends.
const INTENTS_MAX: usize = 100_000 + REMOVED_INTENTS_MAX;

/// The whole file.
#[derive(Debug, Serialize, Deserialize)]
struct IntentFile {
    version: u32,
    #[serde(default)]
    intents: Vec<IntentLine>,
}

/// An operator's intent for one backend.
#[derive(Debug, Serialize, Deserialize)]
struct IntentLine {
    pool: String,
    backend: String,
    /// The address as spelled in the configuration.
    address: String,
    /// `draining` or `maintenance`.
    intent: String,
    since: u64,
    /// When the backend was removed from the configuration; `None` if it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    left: Option<u64>,
}

/// Encodes `saved`. Its ages are relative to `now`.
pub(super) fn encode(saved: &Saved, now: SystemTime) -> Vec<u8> {
    let since = |ms: u64| unix(now).saturating_sub(ms / 1000);
    let present = saved.pools.iter().flat_map(|pool| {
        pool.backends.iter().map(|backend| IntentLine {
            pool: pool.name.clone(),
            backend: backend.name.clone(),
            address: backend.address.clone(),
            intent: backend.intent.clone(),
            since: since(backend.intent_ms),
            left: None,
        })
    });
    let left = saved.removed_intents.iter().map(|left| IntentLine {
        pool: left.pool.clone(),
        backend: left.name.clone(),
        address: left.address.clone(),
        intent: left.intent.clone(),
        since: since(left.intent_ms),
        left: Some(since(left.left_ms)),
    });
    let file = IntentFile { version: VERSION, intents: present.chain(left).collect() };
    let mut text =
        serde_json::to_vec_pretty(&file).expect("plain data with string keys always serialises");
    text.push(b'\n');
    text
}

/// Decodes a file. The ages of the result are relative to `now`.
///
/// # Errors
/// The file is damaged, has another version, or contains too many intents. The error is
/// the text for the log.
pub(super) fn decode(text: &[u8], now: SystemTime) -> Result<Saved, String> {
    let file: IntentFile = saved_file::read(text, VERSION)?;
    if file.intents.len() > INTENTS_MAX {
        return Err(format!("too many intents: {}, at most {INTENTS_MAX}", file.intents.len()));
    }
    let mut pools: BTreeMap<String, Vec<SavedBackend>> = BTreeMap::new();
    let mut removed_intents = Vec::new();
    let age_ms = |then: u64| unix(now).saturating_sub(then).saturating_mul(1000);
    for line in file.intents {
        if Intent::named(&line.intent).is_none() {
            return Err(format!("damaged: {:?} is not an intent", line.intent));
        }
        let IntentLine { pool, backend: name, address, intent, since, left } = line;
        let intent_ms = age_ms(since);
        match left.map(age_ms) {
            Some(left_ms) => {
                let gone = SavedIntent { pool, name, address, intent, intent_ms, left_ms };
                removed_intents.push(gone);
            }
            None => {
                let backend =
                    SavedBackend { name, address, intent, intent_ms, ..SavedBackend::default() };
                pools.entry(pool).or_default().push(backend);
            }
        }
    }
    let named = |(name, backends)| SavedPool { name, backends, ..SavedPool::default() };
    Ok(Saved { pools: pools.into_iter().map(named).collect(), removed_intents, ..Saved::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn saved() -> Saved {
        let backend = SavedBackend {
            name: "a".into(),
            address: "10.0.0.1:80".into(),
            intent: "draining".into(),
            intent_ms: 5_000,
            ..SavedBackend::default()
        };
        let left = SavedIntent {
            pool: "api".into(),
            name: "gone".into(),
            address: "10.0.0.2:80".into(),
            intent: "maintenance".into(),
            intent_ms: 9_000,
            left_ms: 2_000,
        };
        let pool =
            SavedPool { name: "web".into(), backends: vec![backend], ..SavedPool::default() };
        Saved { pools: vec![pool], removed_intents: vec![left], ..Saved::default() }
    }

    #[test]
    fn ages_increase_while_no_process_runs() {
        let text = encode(&saved(), at(1_000));
        let mut expected = saved();
        expected.pools[0].backends[0].intent_ms += 60_000;
        expected.removed_intents[0].intent_ms += 60_000;
        expected.removed_intents[0].left_ms += 60_000;
        assert_eq!(decode(&text, at(1_060)).unwrap(), expected);
        // No age is negative after the clock was set back.
        assert_eq!(decode(&text, at(0)).unwrap().removed_intents[0].left_ms, 0);
    }

    #[test]
    fn format_matches_its_version() {
        let text = "{\n  \"version\": 1,\n  \"intents\": [\n    {\n      \"pool\": \"web\",\n      \"backend\": \"a\",\n      \"address\": \"10.0.0.1:80\",\n      \"intent\": \"draining\",\n      \"since\": 995\n    }\n  ]\n}\n";
        let one = Saved { removed_intents: Vec::new(), ..saved() };
        assert_eq!(String::from_utf8(encode(&one, at(1_000))).unwrap(), text);
        assert_eq!(decode(text.as_bytes(), at(1_000)).unwrap(), one);
    }

    #[test]
    fn other_versions_and_unknown_intents_are_rejected() {
        let error = |text: &str| decode(text.as_bytes(), at(0)).unwrap_err();
        assert_eq!(error("{\"version\":2}"), "unsupported version 2; this binary reads version 1");
        assert!(error("").starts_with("damaged: "));
        let text = String::from_utf8(encode(&saved(), at(9))).unwrap();
        assert!(
            error(&text.replace("draining", "sleeping")).contains("\"sleeping\" is not an intent")
        );
    }

    proptest! {
        #[test]
        fn changed_bytes_decode_to_intents_or_an_error(at_byte in 0..400_usize, byte: u8) {
            let mut text = encode(&saved(), at(1_000));
            let at_byte = at_byte % text.len();
            text[at_byte] = byte;
            let _ = decode(&text, at(1_000));
        }
    }
}
