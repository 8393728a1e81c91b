//! Cost of the smaller parts: the timer wheel, a histogram record, a counter, reading a
//! configuration.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use std::fmt::Write;
use std::hint::black_box;
use std::time::Duration;
use tidegate_core::metrics::counters::Counter;
use tidegate_core::metrics::histograms::{Recorder, Series};
use tidegate_dataplane::timer_wheel::TimerWheel;

/// Timers armed while one is re-armed or fires.
const SESSIONS: u32 = 10_000;

fn wheel(c: &mut Criterion) {
    let mut group = c.benchmark_group("wheel");
    let mut wheel = TimerWheel::new(0);
    for key in 0..SESSIONS {
        wheel.arm(key, 75_000 + u64::from(key));
    }
    let mut key = 0;
    group.bench_function("re-arm one of 10,000", |b| {
        b.iter(|| {
            key = (key + 7919) % SESSIONS;
            wheel.arm(key, black_box(75_000 + u64::from(key)));
        });
    });
    group.bench_function("next due of 10,000", |b| b.iter(|| black_box(wheel.next_due())));
    group.throughput(Throughput::Elements(SESSIONS.into()));
    group.bench_function("fire 10,000", |b| {
        let full = || {
            let mut wheel = TimerWheel::new(0);
            (0..SESSIONS).for_each(|key| wheel.arm(key, 1 + u64::from(key % 512)));
            (wheel, Vec::with_capacity(SESSIONS as usize))
        };
        b.iter_batched_ref(full, |(wheel, fired)| wheel.advance(512, fired), BatchSize::LargeInput);
    });
    group.finish();
}

fn telemetry(c: &mut Criterion) {
    let mut recorder = Recorder::new();
    let mut micros = 1;
    c.bench_function("histogram record", |b| {
        b.iter(|| {
            micros = micros * 31 % 100_003;
            recorder.record(black_box(3), Series::Connect, Duration::from_micros(micros));
        });
    });
    let counter = Counter::default();
    c.bench_function("counter add", |b| b.iter(|| counter.add(black_box(1))));
}

/// Returns a configuration file with one pool of `backends` backends.
fn file(backends: usize) -> String {
    let mut text =
        String::from("[frontend.web]\nbind = [\"0.0.0.0:80\"]\npool = \"web\"\n[pool.web]\n");
    for n in 0..backends {
        let (third, fourth) = (n / 250, n % 250 + 1);
        let _ = write!(
            text,
            "[[pool.web.backend]]\naddress = \"10.1.{third}.{fourth}:80\"\nweight = {}\n",
            n % 10 + 1
        );
    }
    text
}

fn config(c: &mut Criterion) {
    let mut group = c.benchmark_group("config parse and validate");
    for backends in [10, 1_000, 10_000] {
        let text = file(backends);
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(format!("{backends} backends"), |b| {
            b.iter(|| tidegate_config::parse(black_box(&text), "bench.toml").expect("valid"));
        });
    }
    group.finish();
}

criterion_group!(benches, wheel, telemetry, config);
criterion_main!(benches);
