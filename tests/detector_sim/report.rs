//! Reports of the points: a table, JSON, and a chart.
//!
//! It runs no simulation.

use super::link::Pattern;
use super::point::{DetectorKind, Outcome, Point};
use serde_json::{Value, json};
use std::fmt::Write;

pub(crate) const LOSSES: [f64; 6] = [0.001, 0.01, 0.05, 0.10, 0.20, 0.30];

pub(crate) fn pattern_name(pattern: Pattern) -> &'static str {
    match pattern {
        Pattern::Independent => "independent",
        Pattern::Bursts => "bursts of 150 ms",
    }
}

pub(crate) fn table(rows: &[(Point, Outcome)]) -> String {
    let mut out = String::new();
    for pattern in [Pattern::Independent, Pattern::Bursts] {
        let _ = writeln!(
            out,
            "\nLosses: {}\n{:>6} {:<26} {:>13} {:>13} {:>9} {:>8} {:>8} {:>8}",
            pattern_name(pattern),
            "loss",
            "detector",
            "suspicions/h",
            "ejections/h",
            "ejections",
            "p50 ms",
            "p99 ms",
            "max ms"
        );
        for (point, outcome) in rows.iter().filter(|(point, _)| point.pattern == pattern) {
            let _ = writeln!(
                out,
                "{:>5}% {:<26} {:>13.5} {:>13.5} {:>9} {:>8.0} {:>8.0} {:>8.0}",
                point.loss * 100.0,
                point.kind.name(),
                outcome.suspicions_per_hour(),
                outcome.ejections_per_hour(),
                outcome.ejections,
                outcome.detection(0.5),
                outcome.detection(0.99),
                outcome.detection(1.0),
            );
        }
    }
    out
}

pub(crate) fn json(rows: &[(Point, Outcome)], seed: u64) -> Value {
    let rows: Vec<Value> = rows
        .iter()
        .map(|(point, outcome)| {
            json!({
                "detector": point.kind.key(),
                "losses": pattern_name(point.pattern),
                "loss": point.loss,
                "heartbeats": point.beats,
                "backend_hours": outcome.hours,
                "suspicions": outcome.suspicions,
                "ejections": outcome.ejections,
                "deaths": outcome.detections.len(),
                "detection_ms": {
                    "p50": outcome.detection(0.5),
                    "p99": outcome.detection(0.99),
                    "max": outcome.detection(1.0),
                },
            })
        })
        .collect();
    json!({ "seed": seed, "interval_ms": 100, "jitter_ms": 5, "rows": rows })
}

const COLOURS: [&str; 7] =
    ["#0b6e99", "#7fb7cc", "#d1495b", "#edae49", "#6a4c93", "#2e8b57", "#8a8a8a"];
const PANEL: (f64, f64) = (360.0, 240.0);
const LEFT: f64 = 70.0;
const TOP: f64 = 60.0;
const GAP: (f64, f64) = (90.0, 80.0);

/// Detection time and false removals by loss, for both patterns.
pub(crate) fn svg(rows: &[(Point, Outcome)]) -> String {
    let (width, height) =
        (2.0 * PANEL.0 + GAP.0 + LEFT + 30.0, 2.0 * PANEL.1 + GAP.1 + TOP + 120.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"16\">Silent failure detected, healthy backends removed \
         out: heartbeats every 100 ms</text>\n"
    );
    for (column, pattern) in [Pattern::Independent, Pattern::Bursts].into_iter().enumerate() {
        let x = LEFT + column as f64 * (PANEL.0 + GAP.0);
        let name = pattern_name(pattern);
        let rows: Vec<_> = rows.iter().filter(|(point, _)| point.pattern == pattern).collect();
        let title = format!("detection p99, seconds (losses: {name})");
        panel(&mut out, (x, TOP), &title, (0.1, 100.0), &rows, |o| o.detection(0.99) / 1000.0);
        let title = format!("false ejections per backend-hour (losses: {name})");
        let y = TOP + PANEL.1 + GAP.1;
        panel(&mut out, (x, y), &title, (1e-4, 1e4), &rows, Outcome::ejections_per_hour);
    }
    for (index, kind) in DetectorKind::ALL.into_iter().enumerate() {
        let x = LEFT + (index % 4) as f64 * 200.0;
        let y = height - 45.0 + (index / 4) as f64 * 20.0;
        let colour = COLOURS[index];
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{}\" width=\"14\" height=\"4\" fill=\"{colour}\"/>\
             <text x=\"{}\" y=\"{y}\">{}</text>",
            y - 6.0,
            x + 20.0,
            kind.name()
        );
    }
    out + "</svg>\n"
}

/// Draws one chart with a logarithmic scale. Smaller values are drawn at the bottom.
fn panel(
    out: &mut String,
    (x, y): (f64, f64),
    title: &str,
    (low, high): (f64, f64),
    rows: &[&(Point, Outcome)],
    value: impl Fn(&Outcome) -> f64,
) {
    let (width, height) = PANEL;
    let place = |v: f64| {
        let share = (v.max(low).min(high) / low).log10() / (high / low).log10();
        y + height * (1.0 - share)
    };
    let across = |index: usize| x + width * (index as f64 + 0.5) / LOSSES.len() as f64;
    let _ = writeln!(out, "<text x=\"{x}\" y=\"{}\">{title}</text>", y - 8.0);
    let decades = (high / low).log10().round() as i32;
    for decade in 0..=decades {
        let v = low * 10f64.powi(decade);
        let at = place(v);
        let label = if decade == 0 && low < 0.01 { "none".to_owned() } else { format!("{v}") };
        let _ = writeln!(
            out,
            "<line x1=\"{x}\" x2=\"{}\" y1=\"{at}\" y2=\"{at}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{label}</text>",
            x + width,
            x - 6.0,
            at + 4.0
        );
    }
    for (index, loss) in LOSSES.into_iter().enumerate() {
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}%</text>",
            across(index),
            y + height + 16.0,
            loss * 100.0
        );
    }
    for (kind, colour) in DetectorKind::ALL.into_iter().zip(COLOURS) {
        let mut points = String::new();
        for (index, loss) in LOSSES.into_iter().enumerate() {
            let found = rows.iter().find(|(p, _)| p.kind == kind && p.loss == loss);
            if let Some((_, outcome)) = found {
                let _ = write!(points, "{:.1},{:.1} ", across(index), place(value(outcome)));
            }
        }
        let _ = writeln!(
            out,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2.5\"/>"
        );
    }
}
