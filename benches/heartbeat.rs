//! Cost of encoding, verifying and rejecting a heartbeat. Run with `cargo bench --bench
//! heartbeat`.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use std::net::SocketAddr;
use std::time::{Duration, Instant, UNIX_EPOCH};
use tidegate_daemon::heartbeat::verify::{RejectReason, Verifier, VerifierLimits};
use tidegate_heartbeat::SenderState;
use tidegate_heartbeat::keys::{HeartbeatKey, KeyRing, Secret};
use tidegate_heartbeat::wire::{HeartbeatFields, ParsedHeartbeat, SenderIdentity, encode};

const NOW: u64 = 1_800_000_000_000;

fn draft(identity: &SenderIdentity, sequence: u64) -> HeartbeatFields<'_> {
    HeartbeatFields {
        identity,
        key_id: 7,
        incarnation: NOW,
        sequence,
        sent: NOW,
        interval: Duration::from_millis(100),
        state: SenderState::Ready,
        weight: 1,
        in_flight: 5,
        load: 0,
    }
}

fn heartbeat(c: &mut Criterion) {
    let secret = Secret::new(&[1; 32]).unwrap();
    let key = HeartbeatKey {
        id: 7,
        secret: secret.clone(),
        pools: vec!["web".into()],
        addresses: vec!["10.0.0.0/8".parse().unwrap()],
    };
    let mut gate = Verifier::new(KeyRing::new([key]).unwrap(), VerifierLimits::default(), 1);
    let identity =
        SenderIdentity::new("web", "backend-11", "10.0.0.11:8080".parse().unwrap()).unwrap();
    let (from, stranger): (SocketAddr, SocketAddr) =
        ("10.0.0.11:4000".parse().unwrap(), "10.9.9.9:4000".parse().unwrap());
    // 1,000 per second in the verifier's time: far below its rate limits.
    let (began, wall) = (Instant::now(), UNIX_EPOCH + Duration::from_millis(NOW));
    let mut ticks = 0;
    let mut later = || {
        ticks += 1;
        began + Duration::from_millis(ticks)
    };

    let mut sequence = 0;
    c.bench_function("heartbeat encode", |b| {
        b.iter(|| {
            sequence += 1;
            encode(black_box(&draft(&identity, sequence)), &secret)
        });
    });
    let good = encode(&draft(&identity, sequence), &secret);
    c.bench_function("heartbeat read", |b| {
        b.iter(|| ParsedHeartbeat::read(black_box(&good)).is_ok())
    });
    c.bench_function("heartbeat encode and admit", |b| {
        b.iter(|| {
            sequence += 1;
            let datagram = encode(&draft(&identity, sequence), &secret);
            gate.admit(&datagram, from, later(), wall).is_ok()
        });
    });
    let mut forged = good.to_vec();
    *forged.last_mut().unwrap() ^= 1;
    c.bench_function("reject a forged tag", |b| {
        b.iter(|| {
            gate.admit(black_box(&forged), from, later(), wall) == Err(RejectReason::Signature)
        });
    });
    c.bench_function("reject an unknown sender beyond the rate limit", |b| {
        let now = later();
        b.iter(|| {
            gate.admit(black_box(&forged), stranger, now, wall) == Err(RejectReason::Limited)
        });
    });
    c.bench_function("reject a datagram that is not a heartbeat", |b| {
        b.iter(|| gate.admit(black_box(&[0; 120]), stranger, later(), wall).is_err());
    });
}

criterion_group!(benches, heartbeat);
criterion_main!(benches);
