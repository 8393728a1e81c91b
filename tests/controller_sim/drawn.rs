//! Random configurations from a seed.
//!
//! Called by the simulations at their start and at each reload.

use fastrand::Rng;
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::model::*;
use tidegate_core::testing;

pub(crate) fn millis(rng: &mut Rng, low: u64, high: u64) -> Duration {
    Duration::from_millis(rng.u64(low..=high))
}

fn random_probe(rng: &mut Rng) -> Option<Arc<ProbeSpec>> {
    let timeout = millis(rng, 100, 900);
    let fast_interval = timeout + millis(rng, 0, 500);
    let interval = fast_interval + millis(rng, 0, 2000);
    let spec = ProbeSpec {
        kind: ProbeKind::Tcp,
        target: ProbeTarget::default(),
        interval,
        down_interval: interval,
        fast_interval,
        timeout,
        rise: rng.u32(1..4),
        fall: rng.u32(1..6),
    };
    (rng.u8(..4) > 0).then(|| Arc::new(spec))
}

fn random_backend(rng: &mut Rng, pool: usize, name: usize) -> BackendConfig {
    let port = 1000 + 100 * pool as u16 + 10 * name as u16 + u16::from(rng.u8(..8) == 0);
    BackendConfig {
        name: format!("b{name}").into(),
        address: BackendAddr::Tcp(([127, 0, 0, 1], port).into()),
        weight: rng.u16(1..=20),
        tier: [0, 0, 0, 1, 1, 3][rng.usize(..6)],
        connections_max: 0,
    }
}

fn random_pool(rng: &mut Rng, index: usize) -> PoolConfig {
    let mut backends: Vec<BackendConfig> = Vec::new();
    for name in 0..6 {
        if rng.bool() {
            backends.push(random_backend(rng, index, name));
        }
    }
    if backends.is_empty() {
        backends.push(random_backend(rng, index, 0));
    }
    rng.shuffle(&mut backends);
    let ejection = EjectionSpec {
        failures: rng.u32(1..6),
        time: millis(rng, 500, 100_000),
        max_ejected_percent: rng.u8(0..=100),
        early_resets: true,
        slow_first_byte: (rng.u8(..4) == 0).then(|| millis(rng, 100, 3000)),
    };
    PoolConfig {
        // The controller does not depend on the policy, and Maglev tables are slow to build
        // without optimisation.
        balance: match rng.u8(..50) {
            0 => Policy::SourceHash,
            n if n % 2 == 0 => Policy::WeightedRoundRobin,
            _ => Policy::LeastConnections,
        },
        when_none_eligible: *rng
            .choice(&[WhenNoneEligible::Refuse, WhenNoneEligible::TryAll, WhenNoneEligible::Wait])
            .unwrap(),
        tiers: if rng.u8(..3) == 0 { Tiers::Spill } else { Tiers::Strict },
        on_recover: match rng.u8(..3) {
            0 => OnRecover::CloseAfter(millis(rng, 1, 10_000)),
            _ => OnRecover::Keep,
        },
        startup_grace: millis(rng, 1, 4000),
        on_removal: if rng.bool() {
            OnRemoval::Keep
        } else {
            OnRemoval::CloseAfter(millis(rng, 1, 10_000))
        },
        probe: random_probe(rng),
        ejection: (rng.u8(..5) > 0).then_some(ejection),
        backends,
        ..testing::pool(&format!("p{index}"))
    }
}

/// Returns the pool with this name.
pub(crate) fn pool_of<'c>(config: &'c Config, name: &str) -> Option<&'c Arc<PoolConfig>> {
    config.pools.iter().find(|pool| &*pool.name == name)
}

/// Returns a random configuration that keeps much of `old`.
pub(crate) fn random_config(rng: &mut Rng, old: Option<&Config>) -> Config {
    let mut pools = Vec::new();
    for index in 0..3 {
        let kept = old.and_then(|old| pool_of(old, &format!("p{index}")));
        let pool = match (kept, rng.u8(..8)) {
            (Some(kept), 0..=2) => PoolConfig::clone(kept),
            (Some(kept), 3..=5) => {
                let other = random_pool(rng, index);
                PoolConfig { probe: kept.probe.clone(), ejection: kept.ejection, ..other }
            }
            (_, 6) if index > 0 => continue,
            _ => random_pool(rng, index),
        };
        pools.push(Arc::new(pool));
    }
    let frontends = (0..)
        .zip(&pools)
        .map(|(index, pool)| testing::frontend(&format!("f{index}"), 80 + index, pool));
    testing::config(frontends.collect(), pools)
}
