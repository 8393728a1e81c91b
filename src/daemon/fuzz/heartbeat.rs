//! Any bytes as heartbeats, as they are and signed again, at times that jump.
//!
//! Nothing may panic; what is read is what would be written; only what is
//! signed is believed, and nothing is believed twice unless our clock jumped.
//! Called by the fuzzer and by the mutation test.

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

fn gate() -> Verifier {
    let key = HeartbeatKey {
        id: KEY_ID,
        secret: Secret::new(&SECRET).expect("32 bytes"),
        pools: vec!["web".into(), "a".into()],
        addresses: vec!["0.0.0.0/0".parse().expect("a range"), "::/0".parse().expect("a range")],
    };
    Verifier::new(KeyRing::new([key]).expect("one key"), VerifierLimits::default(), 1)
}

/// What is read, written again, is the same bytes but for the tag.
fn check_round_trip(bytes: &[u8]) -> Option<ParsedHeartbeat<'_>> {
    let parsed = ParsedHeartbeat::read(bytes).ok()?;
    let identity =
        SenderIdentity::new(parsed.pool, parsed.name, parsed.address).expect("it was read");
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
    let mac = Hmac::<Sha256>::new_from_slice(&SECRET).expect("any length will do");
    let tag = mac.chain_update(&bytes[..signed]).finalize().into_bytes();
    bytes[signed..].copy_from_slice(&tag[..TAG_BYTES]);
}

/// Messages of one input: length, how much time passes, whether to sign.
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
    let (mut gate, began) = (gate(), clock::now());
    let mut elapsed = Duration::ZERO;
    let mut wall = 1_800_000_000_000_u64;
    let (mut believed, mut jumped) = (HashSet::new(), false);
    for (mut bytes, time, signs) in messages(data) {
        elapsed += Duration::from_millis(u64::from(time) * 100);
        wall += u64::from(time) * 100;
        if time == 255 {
            // Our clock jumps, and back some other time.
            wall ^= 1 << 27;
            jumped = true;
        }
        if signs {
            sign(&mut bytes);
        }
        let from = "10.0.0.1:1".parse().expect("an address");
        let at = UNIX_EPOCH + Duration::from_millis(wall);
        let verdict = gate.admit(&bytes, from, began + elapsed, at);
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
            assert!(believed.insert(once) || jumped, "believed twice");
        }
    }
}
