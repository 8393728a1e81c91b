//! The whole data path in a machine that is not there: listener, admission,
//! sessions, connects and both engines above a fake kernel, driven by a seed.
//!
//! Every system call may fail with every errno it knows, come back short or
//! late, and time jumps. Each run is a seed, named when it fails:
//! `SIM_SEED=n` replays it, `SIM_SEEDS=n` sets how many are tried.

mod judge;
mod world;

use crate::worker::Runtime;
use tidegate_net::fake::{Call, Fault, Plan};
use world::{Script, World};

/// Failed once.
const REGRESSION_SEEDS: [(Runtime, u64); 4] =
    [(Runtime::Epoll, 88), (Runtime::Epoll, 143), (Runtime::IoUring, 1), (Runtime::IoUring, 23)];

/// Of each engine, by default.
const SEEDS: u64 = 300;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Runs `script` to its end on a machine of its own; gives what came of it, or
/// how to replay it.
fn try_run(runtime: Runtime, script: Script) -> Result<Outcome, String> {
    std::panic::catch_unwind(|| World::run(runtime, script)).map_err(|_| {
        format!("replay with SIM_SEED={} on {}: {script:?}", script.seed, runtime.name())
    })
}

fn run(runtime: Runtime, script: Script) -> Outcome {
    try_run(runtime, script).unwrap_or_else(|replay| panic!("{replay}"))
}

/// Runs all of them; fails with every one that failed, up to a few.
fn run_all(runtime: Runtime, scripts: impl Iterator<Item = Script>) -> Seen {
    const FAILURES_MAX: usize = 20;
    let (mut seen, mut failed) = (Seen::new(), Vec::new());
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

/// How often sessions ended how.
type Seen = std::collections::BTreeMap<&'static str, u64>;

/// What a run leaves behind.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Outcome {
    trace: u64,
    calls: Vec<Call>,
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

fn try_seeds(runtime: Runtime) {
    let known = REGRESSION_SEEDS.iter().filter(|(engine, _)| *engine == runtime);
    let seeds = known.map(|(_, seed)| *seed).chain(seeds());
    let seen = run_all(runtime, seeds.map(Script::random));
    if number("SIM_SEED").is_none() {
        let usual = ["finished", "client-reset", "backend-reset", "local-resource"];
        let missing: Vec<_> = usual.iter().filter(|cause| !seen.contains_key(*cause)).collect();
        assert!(missing.is_empty(), "no session ended as {missing:?}: {seen:?}");
    }
}

#[test]
fn sessions_keep_every_promise_on_readiness_whatever_fails() {
    try_seeds(Runtime::Epoll);
}

#[test]
fn sessions_keep_every_promise_on_the_ring_whatever_fails() {
    try_seeds(Runtime::IoUring);
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for runtime in [Runtime::Epoll, Runtime::IoUring] {
        for seed in 1..8 {
            let script = Script::random(seed);
            assert_eq!(run(runtime, script), run(runtime, script), "seed {seed}");
        }
    }
}

/// Every errno, and a short count, at every call of a few whole sessions.
fn try_every_fault(runtime: Runtime) {
    for seed in 1..=number("SIM_MATRIX").unwrap_or(2) {
        let script = Script::calm(seed);
        let calm = run(runtime, script);
        assert!(calm.causes.iter().all(|cause| *cause == "finished"), "{:?}", calm.causes);
        let every = (0..).zip(calm.calls).flat_map(|(index, call)| {
            call.faults().map(move |fault| Script { fault: Some((index, fault)), ..script })
        });
        run_all(runtime, every);
    }
}

#[test]
fn every_errno_at_every_call_of_a_session_is_survived_on_readiness() {
    try_every_fault(Runtime::Epoll);
}

#[test]
fn every_errno_at_every_call_of_a_session_is_survived_on_the_ring() {
    try_every_fault(Runtime::IoUring);
}

#[test]
fn a_connect_that_the_ring_cannot_wait_for_is_a_lack_of_ours() {
    let mut causes = Vec::new();
    for seed in 1..9 {
        let script = Script::calm(seed);
        let calls = run(Runtime::IoUring, script).calls;
        let poll = calls.iter().position(|call| *call == Call::RingPoll);
        let Some(index) = poll else { continue };
        let fault = Some((index as u64, Fault::Errno(libc::ENOMEM)));
        causes.extend(run(Runtime::IoUring, Script { fault, ..script }).causes);
    }
    assert!(causes.contains(&"local-resource"), "{causes:?}");
}

#[test]
fn an_operation_of_the_ring_without_memory_is_tried_again_and_its_session_goes_on() {
    const TRIES: u32 = 8;
    let shortages = [
        (Call::RingSend, libc::ENOMEM),
        (Call::RingSend, libc::ENOBUFS),
        (Call::RingReceive, libc::ENOMEM),
        (Call::Drain, libc::ENOMEM),
    ];
    for (call, errno) in shortages {
        let mut tried = 0;
        for script in (1..200).map(Script::calm) {
            let calls = run(Runtime::IoUring, script).calls;
            let places = calls.iter().enumerate().filter(|(_, one)| **one == call);
            for (index, _) in places.take(4) {
                let fault = Some((index as u64, Fault::Errno(errno)));
                let causes = run(Runtime::IoUring, Script { fault, ..script }).causes;
                assert!(causes.iter().all(|cause| *cause == "finished"), "{call:?}: {causes:?}");
                tried += 1;
            }
            if tried >= TRIES {
                break;
            }
        }
        assert!(tried >= TRIES, "{call:?} was made {tried} times");
    }
}

impl Script {
    fn plan(&self, rng: &mut fastrand::Rng) -> Plan {
        match (self.fault, self.calm) {
            (Some((index, fault)), _) => Plan::At(index, fault),
            (None, true) => Plan::Never,
            (None, false) => {
                let one_in = rng.choice([3, 20, 100, 1000]).unwrap_or(100);
                Plan::Random { one_in, left: rng.u32(..12) }
            }
        }
    }
}

/// For scripts, which are copied.
type At = Option<(u64, Fault)>;
