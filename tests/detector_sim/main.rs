//! The failure detector on lossy links, compared with its documented bounds and with other
//! detectors.
//!
//! The short run is a normal test. `scripts/detector-sim` starts the long run
//! (`long_run`) with a release build and keeps its table, JSON and chart.
//! All runs use virtual time; a seed replays a run exactly.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, too.

mod judge;
mod link;
mod point;
mod report;
mod rivals;
mod scenarios;
mod world;

use link::Pattern;
use point::{DetectorKind, Outcome, Point};
use report::LOSSES;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Returns a setting from the environment, or a default.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.replace('_', "").parse().unwrap())
}

fn points(kinds: &[DetectorKind], beats: u64, deaths: u64, seed: u64) -> Vec<Point> {
    let mut points = Vec::new();
    for pattern in [Pattern::Independent, Pattern::Bursts] {
        for (index, loss) in LOSSES.into_iter().enumerate() {
            // The same link for all detectors.
            let seed = seed.wrapping_mul(1_000).wrapping_add(index as u64);
            points.extend(kinds.iter().map(|kind| Point {
                kind: *kind,
                pattern,
                loss,
                beats,
                deaths,
                seed,
            }));
        }
    }
    points
}

/// Runs the points on two threads and returns them in order.
fn run(points: &[Point]) -> Vec<(Point, Outcome)> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(point) = points.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = point.run();
                    results.lock().unwrap().push((*point, outcome));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap();
    results.sort_by_key(|(point, _)| {
        points
            .iter()
            .position(|p| (p.kind, p.pattern, p.loss) == (point.kind, point.pattern, point.loss))
    });
    results
}

/// Returns the documented bound at an interval of 100 ms: the 99th percentile of the
/// detection time in milliseconds, for independent losses.
fn promised_p99(loss: f64) -> f64 {
    match loss {
        loss if loss <= 0.01 => 600.0,
        loss if loss <= 0.05 => 750.0,
        loss if loss <= 0.10 => 900.0,
        _ => 1_500.0,
    }
}

fn assert_promises(rows: &[(Point, Outcome)]) {
    for (point, outcome) in rows.iter().filter(|(point, _)| point.kind == DetectorKind::Tidegate) {
        let Point { pattern, loss, .. } = *point;
        let at = format!("at {}% loss, {pattern:?}", loss * 100.0);
        let (p99, max) = (outcome.detection(0.99), outcome.detection(1.0));
        assert!(max <= 1_500.0, "{at}: detected after {max} ms");
        if pattern == Pattern::Bursts {
            continue;
        }
        assert!(p99 <= promised_p99(loss), "{at}: p99 {p99} ms");
        let ejections = outcome.ejections;
        if loss <= 0.10 {
            assert_eq!(ejections, 0, "{at}: false ejections in {:.0} h", outcome.hours);
        } else if loss <= 0.20 {
            let daily = outcome.ejections_per_hour() * 24.0;
            // A short run is less than a day, so one removal proves nothing and two do.
            assert!(daily <= 1.0 || ejections <= 1, "{at}: {daily} false ejections per day");
        }
    }
}

#[test]
fn detector_meets_its_bounds_on_lossy_links() {
    let (seed, beats) = (setting("SIM_SEED", 1), setting("SIM_BEATS", 1_000_000));
    let rows = run(&points(&[DetectorKind::Tidegate], beats, 1_000, seed));
    println!("seed {seed}, {beats} heartbeats a point{}", report::table(&rows));
    assert_promises(&rows);
}

#[test]
#[ignore = "minutes in a release build; scripts/detector-sim runs it"]
fn long_run() {
    let (seed, beats) = (setting("SIM_SEED", 1), setting("SIM_BEATS", 100_000_000));
    let deaths = setting("SIM_DEATHS", 50_000);
    let rows = run(&points(&DetectorKind::ALL, beats, deaths, seed));
    println!("seed {seed}, {beats} heartbeats a point{}", report::table(&rows));
    if let Ok(out) = std::env::var("SIM_OUT") {
        let json = serde_json::to_string_pretty(&report::json(&rows, seed)).unwrap();
        std::fs::write(format!("{out}.json"), json).unwrap();
        std::fs::write(format!("{out}.svg"), report::svg(&rows)).unwrap();
    }
    assert_promises(&rows);
    assert_memory_of_bursts_pays(&rows);
}

/// With bursts of losses, the memory of bursts at least halves the false removals. With
/// independent losses it costs nothing.
fn assert_memory_of_bursts_pays(rows: &[(Point, Outcome)]) {
    let ejections = |kind: DetectorKind| {
        rows.iter()
            .filter(move |(point, _)| point.kind == kind && point.pattern == Pattern::Bursts)
            .map(|(point, outcome)| (point.loss, outcome.ejections))
    };
    for ((loss, with_memory), (_, without_memory)) in
        ejections(DetectorKind::Tidegate).zip(ejections(DetectorKind::Independent))
    {
        assert!(
            with_memory * 2 <= without_memory,
            "{with_memory} against {without_memory} at {}% loss",
            loss * 100.0
        );
    }
}

#[test]
fn rivals_match_their_names() {
    assert!(rivals::constants_hold());
}
