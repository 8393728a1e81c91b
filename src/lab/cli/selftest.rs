//! `tidegate selftest`: checks on this machine that no byte of a stream is lost.
//!
//! Called by the command line. It runs the real program in separate processes, on
//! loopback, with a temporary directory that it removes. It prints only what it
//! measured in the same run.
//!
//! Modules: `world` (backends, configuration, and the changes to them), `balancer` (the
//! processes under test).

mod balancer;
mod world;

use crate::ledger::{StreamFault, StreamFaultKind};
use clap::Args;
use std::time::Duration;
use tidegate_client::command::{Exit, duration};
use world::{SelftestStep, SelftestWorld};

/// Help after the options.
pub const HELP: &str = "\
Example:
  tidegate selftest
  tidegate selftest --reloads 200 --upgrades 20 --kills 10 --for 2m

Clients send seeded streams through a balancer while it is reloaded, upgraded in
place and its backends are killed. Every byte is checked. Exit code 0: nothing was
lost; 3: something was lost, or the test could not run.";

/// Maximum number of faults that are printed.
const SHOWN_MAX: usize = 10;

/// `tidegate selftest`
#[derive(Debug, Clone, Args)]
pub struct SelftestArgs {
    /// Number of configuration reloads.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub reloads: u32,
    /// Number of upgrades in place.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub upgrades: u32,
    /// Number of times a backend is killed and restarted.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub kills: u32,
    /// Minimum duration, for example 20s or 5m.
    #[arg(long = "for", value_name = "TIME", default_value = "20s", value_parser = duration)]
    pub duration: Duration,
    /// Seed of an earlier run, to repeat it in the same order.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

/// Why the test could not start.
type SelftestError = String;

/// Result of a run.
#[derive(Debug)]
struct SelftestOutcome {
    streams: u64,
    bytes: u64,
    /// Streams that were reset by killed backends.
    cut: usize,
    faults: Vec<StreamFault>,
    /// Other failures.
    broken: Vec<String>,
    log: String,
}

/// Runs the command.
pub fn main(args: &SelftestArgs) -> Exit {
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(1..1_000_000));
    let SelftestArgs { reloads, upgrades, kills, .. } = args;
    println!(
        "seed {seed}: {reloads} reloads, {upgrades} upgrades, {kills} kills in {}",
        humantime::format_duration(args.duration)
    );
    match run(args, seed) {
        Ok(outcome) => report(&outcome, seed),
        Err(error) => {
            eprintln!("tidegate: selftest: {error}");
            Exit::Failed
        }
    }
}

fn run(args: &SelftestArgs, seed: u64) -> Result<SelftestOutcome, SelftestError> {
    let world = SelftestWorld::start(seed)?;
    world.run(&plan(args, seed), args.duration)
}

/// Returns all steps, in an order that depends on the seed.
fn plan(args: &SelftestArgs, seed: u64) -> Vec<SelftestStep> {
    let times = |step, count: u32| std::iter::repeat_n(step, count as usize);
    let mut steps: Vec<SelftestStep> = times(SelftestStep::Reload, args.reloads)
        .chain(times(SelftestStep::Upgrade, args.upgrades))
        .chain(times(SelftestStep::Kill, args.kills))
        .collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut steps);
    steps
}

fn report(outcome: &SelftestOutcome, seed: u64) -> Exit {
    let SelftestOutcome { streams, bytes, cut, faults, broken, log } = outcome;
    println!("{streams} streams, {} MB, every byte checked", bytes / 1_000_000);
    if *cut > 0 {
        println!("{cut} streams ended with their killed backend, as expected");
    }
    println!("{}", verdict(faults));
    if faults.is_empty() && broken.is_empty() {
        return Exit::Fine;
    }
    for fault in faults.iter().take(SHOWN_MAX) {
        eprintln!("tidegate: selftest: {fault}");
    }
    for promise in broken {
        eprintln!("tidegate: selftest: {promise}");
    }
    eprintln!("tidegate: selftest: last log lines of the balancer:\n{log}");
    eprintln!("tidegate: selftest: repeat this run with --seed {seed}");
    Exit::Failed
}

fn verdict(faults: &[StreamFault]) -> String {
    let [refused, reset, wrong, silent] = streams_with(faults);
    let mut text = format!("{refused} refused, {reset} reset, {wrong} bytes wrong");
    if silent > 0 {
        text.push_str(&format!(", {silent} without data"));
    }
    text
}

/// Returns how many streams were refused, were reset, had wrong bytes, or had no more
/// data. Counts streams, not faults, because both ends can report the same fault.
pub(crate) fn streams_with(faults: &[StreamFault]) -> [usize; 4] {
    [
        StreamFaultKind::Refused,
        StreamFaultKind::Reset,
        StreamFaultKind::Wrong,
        StreamFaultKind::Silent,
    ]
    .map(|kind| {
        let of_kind = faults.iter().filter(|fault| fault.kind == kind);
        let mut seeds: Vec<_> = of_kind.map(|fault| fault.plan.map(|plan| plan.seed)).collect();
        seeds.sort_unstable();
        seeds.dedup();
        seeds.len()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(reloads: u32, upgrades: u32, kills: u32) -> SelftestArgs {
        SelftestArgs { reloads, upgrades, kills, duration: Duration::from_secs(1), seed: None }
    }

    #[test]
    fn plan_contains_the_requested_steps_in_an_order_from_the_seed() {
        let steps = plan(&args(50, 5, 3), 7);
        let count = |step| steps.iter().filter(|one| **one == step).count();
        assert_eq!(
            (count(SelftestStep::Reload), count(SelftestStep::Upgrade), count(SelftestStep::Kill)),
            (50, 5, 3)
        );
        assert_eq!(steps, plan(&args(50, 5, 3), 7));
        assert_ne!(steps, plan(&args(50, 5, 3), 8));
        assert!(plan(&args(0, 0, 0), 7).is_empty());
    }

    #[test]
    fn verdict_counts_streams_by_kind_of_fault() {
        assert_eq!(verdict(&[]), "0 refused, 0 reset, 0 bytes wrong");
        let sizes = crate::ledger::StreamSizes { most: 9, large_one_in: 0 };
        let fault = |kind, seed| StreamFault {
            kind,
            plan: Some(crate::ledger::StreamPlan::of(seed, sizes, false)),
            text: "x".to_owned(),
        };
        let faults = [
            fault(StreamFaultKind::Reset, 1),
            fault(StreamFaultKind::Reset, 1),
            fault(StreamFaultKind::Silent, 2),
        ];
        assert_eq!(verdict(&faults), "0 refused, 1 reset, 0 bytes wrong, 1 without data");
    }
}
