//! Simulation of the whole data path on a fake kernel: listener, admission, sessions, connects
//! and both engines.
//!
//! A seed determines each run. Every system call can fail with each of its errnos, or be short
//! or late, and time can jump. A failed run prints its seed. `SIM_SEED=n` replays a seed,
//! `SIM_SEEDS=n` sets the number of seeds.

#![allow(clippy::unwrap_used, reason = "a simulation is a test")]

mod checks;
mod world;

use crate::worker::EngineKind;
use tidegate_net::fake::{FaultSchedule, InjectedFault, SimCall};
use world::{SimScript, SimWorld};

/// Seeds that have failed before.
const REGRESSION_SEEDS: [(EngineKind, u64); 4] = [
    (EngineKind::Epoll, 88),
    (EngineKind::Epoll, 143),
    (EngineKind::IoUring, 1),
    (EngineKind::IoUring, 23),
];

/// Default number of seeds per engine.
const SEEDS: u64 = 300;

/// Failed scripts after which a test ends.
const FAILURES_MAX: usize = 20;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Runs `script` on a new simulated machine. The error says how to replay it.
fn try_run(runtime: EngineKind, script: SimScript) -> Result<SimOutcome, String> {
    std::panic::catch_unwind(|| SimWorld::run(runtime, script)).map_err(|_| {
        format!("replay with SIM_SEED={} on {}: {script:?}", script.seed, runtime.name())
    })
}

fn run(runtime: EngineKind, script: SimScript) -> SimOutcome {
    try_run(runtime, script).unwrap_or_else(|replay| panic!("{replay}"))
}

/// Runs all scripts. Panics with all failed scripts, or after [`FAILURES_MAX`].
fn run_all(runtime: EngineKind, scripts: impl Iterator<Item = SimScript>) -> EndCounts {
    let (mut seen, mut failed) = (EndCounts::new(), Vec::new());
    for script in scripts {
        match try_run(runtime, script) {
            Ok(outcome) => {
                outcome.causes.into_iter().for_each(|cause| *seen.entry(cause).or_default() += 1);
            }
            Err(replay) => failed.push(replay),
        }
        assert!(failed.len() < FAILURES_MAX, "{}", failed.join("\n"));
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    eprintln!("{}: {seen:?}", runtime.name());
    seen
}

/// Number of sessions by cause.
type EndCounts = std::collections::BTreeMap<&'static str, u64>;

/// Result of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SimOutcome {
    trace: u64,
    calls: Vec<SimCall>,
    causes: Vec<&'static str>,
}

fn seeds() -> std::ops::Range<u64> {
    match number("SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = number("SIM_FIRST").unwrap_or(1);
            first..first + number("SIM_SEEDS").unwrap_or(SEEDS)
        }
    }
}

fn try_seeds(runtime: EngineKind) {
    let known = REGRESSION_SEEDS.iter().filter(|(engine, _)| *engine == runtime);
    let seeds = known.map(|(_, seed)| *seed).chain(seeds());
    let seen = run_all(runtime, seeds.map(SimScript::random));
    if number("SIM_SEED").is_none() {
        let usual = ["finished", "client-reset", "backend-reset", "local-resource"];
        let missing: Vec<_> = usual.iter().filter(|cause| !seen.contains_key(*cause)).collect();
        assert!(missing.is_empty(), "no session ended as {missing:?}: {seen:?}");
    }
}

#[test]
fn epoll_sessions_pass_all_checks_under_random_faults() {
    try_seeds(EngineKind::Epoll);
}

#[test]
fn ring_sessions_pass_all_checks_under_random_faults() {
    try_seeds(EngineKind::IoUring);
}

#[test]
fn same_seed_gives_the_same_trace() {
    for runtime in [EngineKind::Epoll, EngineKind::IoUring] {
        for seed in 1..8 {
            let script = SimScript::random(seed);
            assert_eq!(run(runtime, script), run(runtime, script), "seed {seed}");
        }
    }
}

/// Injects every errno and a short count at every call of a few sessions.
fn try_every_fault(runtime: EngineKind) {
    for seed in 1..=number("SIM_MATRIX").unwrap_or(2) {
        let script = SimScript::calm(seed);
        let calm = run(runtime, script);
        assert!(calm.causes.iter().all(|cause| *cause == "finished"), "{:?}", calm.causes);
        let every = (0..).zip(calm.calls).flat_map(|(index, call)| {
            call.faults().map(move |fault| SimScript { fault: Some((index, fault)), ..script })
        });
        run_all(runtime, every);
    }
}

#[test]
fn epoll_sessions_pass_all_checks_with_each_errno_at_each_call() {
    try_every_fault(EngineKind::Epoll);
}

#[test]
fn ring_sessions_pass_all_checks_with_each_errno_at_each_call() {
    try_every_fault(EngineKind::IoUring);
}

#[test]
fn ring_poll_failure_counts_as_local_error() {
    let mut causes = Vec::new();
    for seed in 1..9 {
        let script = SimScript::calm(seed);
        let calls = run(EngineKind::IoUring, script).calls;
        let poll = calls.iter().position(|call| *call == SimCall::RingPoll);
        let Some(index) = poll else { continue };
        let fault = Some((index as u64, InjectedFault::Errno(libc::ENOMEM)));
        causes.extend(run(EngineKind::IoUring, SimScript { fault, ..script }).causes);
    }
    assert!(causes.contains(&"local-resource"), "{causes:?}");
}

#[test]
fn ring_operation_without_memory_is_retried_and_its_session_finishes() {
    const TRIES: u32 = 8;
    let shortages = [
        (SimCall::RingSend, libc::ENOMEM),
        (SimCall::RingSend, libc::ENOBUFS),
        (SimCall::RingReceive, libc::ENOMEM),
        (SimCall::Drain, libc::ENOMEM),
    ];
    for (call, errno) in shortages {
        let mut tried = 0;
        for script in (1..200).map(SimScript::calm) {
            let calls = run(EngineKind::IoUring, script).calls;
            let places = calls.iter().enumerate().filter(|(_, one)| **one == call);
            for (index, _) in places.take(4) {
                let fault = Some((index as u64, InjectedFault::Errno(errno)));
                let causes = run(EngineKind::IoUring, SimScript { fault, ..script }).causes;
                assert!(causes.iter().all(|cause| *cause == "finished"), "{call:?}: {causes:?}");
                tried += 1;
            }
            if tried >= TRIES {
                break;
            }
        }
        assert!(tried >= TRIES, "{call:?}: only {tried} calls");
    }
}

impl SimScript {
    fn plan(&self, rng: &mut fastrand::Rng) -> FaultSchedule {
        match (self.fault, self.calm) {
            (Some((index, fault)), _) => FaultSchedule::At(index, fault),
            (None, true) => FaultSchedule::Never,
            (None, false) => {
                let one_in = rng.choice([3, 20, 100, 1000]).unwrap_or(100);
                FaultSchedule::Random { one_in, left: rng.u32(..12) }
            }
        }
    }
}

/// Index of a call, and the fault to inject there.
type At = Option<(u64, InjectedFault)>;
