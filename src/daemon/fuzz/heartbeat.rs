//! Fuzz target: arbitrary bytes as heartbeats, with valid and invalid signatures and with
//! jumps of the wall clock.
//!
//! Called by the fuzzer and by the mutation test. It checks:
//!
//! - Nothing panics.
//! - A parsed heartbeat encodes to the same bytes.
//! - Only signed heartbeats are accepted, and none is accepted twice unless the wall clock
//!   jumped.

use crate::heartbeat::verify::{RejectReason, Verifier, VerifierLimits};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use std::collections::HashSet;
use std::time::{Duration, UNIX_EPOCH};
use tidegate_heartbeat::keys::{HeartbeatKey, KeyRing, Secret};
use tidegate_heartbeat::wire::{
    HeartbeatFields, ParsedHeartbeat, SenderIdentity, TAG_BYTES, encode,
};
use tidegate_net::clock;

const SECRET: [u8; 32] = [1; 32];
const KEY_ID: u32 = 7;

fn verifier() -> Verifier {
    let key = HeartbeatKey {
        id: KEY_ID,
        secret: Secret::new(&SECRET).expect("32 bytes"),
        pools: vec!["web".into(), "a".into()],
        addresses: vec!["0.0.0.0/0".parse().expect("a range"), "::/0".parse().expect("a range")],
    };
    Verifier::new(KeyRing::new([key]).expect("one key"), VerifierLimits::default(), 1)
}

/// Parses and encodes again: the result must be the same bytes except for the signature.
fn check_round_trip(bytes: &[u8]) -> Option<ParsedHeartbeat<'_>> {
    let parsed = ParsedHeartbeat::read(bytes).ok()?;
    let identity =
        SenderIdentity::new(parsed.pool, parsed.name, parsed.address).expect("it was parsed");
    let draft = HeartbeatFields {
        identity: &identity,
        key_id: parsed.key_id,
        incarnation: parsed.incarnation,
        sequence: parsed.sequence,
        sent: parsed.sent,
        interval: parsed.interval,
        state: parsed.state,
        weight: parsed.weight,
        in_flight: parsed.in_flight,
        load: parsed.load,
    };
    let again = encode(&draft, &Secret::new(&SECRET).expect("32 bytes"));
    let signed = bytes.len() - TAG_BYTES;
    assert_eq!(again[..signed], bytes[..signed]);
    Some(parsed)
}

fn sign(bytes: &mut [u8]) {
    let Some(signed) = bytes.len().checked_sub(TAG_BYTES) else { return };
    let mac = Hmac::<Sha256>::new_from_slice(&SECRET).expect("any key length is valid");
    let tag = mac.chain_update(&bytes[..signed]).finalize().into_bytes();
    bytes[signed..].copy_from_slice(&tag[..TAG_BYTES]);
}

/// Splits an input into messages. Each starts with its length, the elapsed time and
/// whether to sign it.
fn messages(mut data: &[u8]) -> Vec<(Vec<u8>, u8, bool)> {
    let mut messages = Vec::new();
    while let [length, time, signs, rest @ ..] = data {
        let taken = rest.len().min(usize::from(*length));
        messages.push((rest[..taken].to_vec(), *time, signs & 3 != 0));
        data = &rest[taken..];
    }
    messages
}

/// See the module's documentation.
pub fn check(data: &[u8]) {
    check_round_trip(data);
    let (mut verifier, began) = (verifier(), clock::now());
    let mut elapsed = Duration::ZERO;
    let mut wall = 1_800_000_000_000_u64;
    let (mut accepted, mut jumped) = (HashSet::new(), false);
    for (mut bytes, time, signs) in messages(data) {
        elapsed += Duration::from_millis(u64::from(time) * 100);
        wall += u64::from(time) * 100;
        if time == 255 {
            // The wall clock jumps; the next such message jumps back.
            wall ^= 1 << 27;
            jumped = true;
        }
        if signs {
            sign(&mut bytes);
        }
        let from = "10.0.0.1:1".parse().expect("an address");
        let at = UNIX_EPOCH + Duration::from_millis(wall);
        let verdict = verifier.admit(&bytes, from, began + elapsed, at);
        let Some(parsed) = check_round_trip(&bytes) else {
            let form =
                matches!(verdict, Err(RejectReason::Malformed | RejectReason::UnknownVersion));
            assert!(form, "{verdict:?}");
            continue;
        };
        let proven = parsed.verify(&Secret::new(&SECRET).expect("32 bytes"));
        if let Ok(heartbeat) = verdict {
            assert!(proven && parsed.key_id == KEY_ID);
            let once = (heartbeat.pool, heartbeat.name, heartbeat.incarnation, heartbeat.sequence);
            assert!(accepted.insert(once) || jumped, "accepted twice");
        }
    }
}
