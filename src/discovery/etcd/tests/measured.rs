//! Measurements: latency, size, processor time. They run only with the environment variable
//! `TIDEGATE_LONG`. Run them alone, with a release build:
//! `TIDEGATE_LONG=1 cargo test --release -p tidegate-discovery measured -- --nocapture`.

use super::*;
use crate::testing::etcd::is_installed;
use crate::testing::is_long;
use std::sync::atomic::Ordering;

/// Processor time of this process.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(10 * ticks)
}

/// Resident memory in KiB.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn time_from_put_to_set() {
    if !is_long() || !is_installed() {
        return;
    }
    let cluster = EtcdCluster::start(3);
    cluster.put(&key("a"), &value(1));
    let mut asked = AskedEtcd::start(&cluster);
    asked.wait_for(&["a"], secs(5));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut times = Vec::new();
    for port in 1000..1200 {
        tidegate_net::clock::pause(Duration::from_millis(60));
        let start = now();
        cluster.put(&key("a"), &value(port));
        loop {
            asked.take();
            if asked.set.as_ref().unwrap().members[0].address.port() == port {
                break;
            }
            runtime.block_on(asked.answers.arrived());
        }
        times.push(now().duration_since(start));
    }
    times.sort();
    eprintln!("put to set: p50 {:.1?} p99 {:.1?} max {:.1?}", times[100], times[197], times[199]);
    assert_eq!(asked.failures, []);
}

#[test]
fn ten_thousand_entries() {
    if !is_long() || !is_installed() {
        return;
    }
    let cluster = EtcdCluster::start(3);
    let entry = |at: u16| (key(&format!("backend-{at:05}")), value(at + 1));
    cluster.put_all((0..10_000).map(entry));
    let before = memory();
    let start = now();
    let mut asked = AskedEtcd::start(&cluster);
    asked.wait_until("the list", secs(20), |asked| asked.set.is_some());
    eprintln!("list of 10,000: {:.0?}", now().duration_since(start));
    assert_eq!(asked.set.as_ref().unwrap().members.len(), 10_000);
    tidegate_net::clock::pause(secs(2));
    eprintln!("memory: {} B per entry", (memory() - before) * 1024 / 10_000);
    let start = cpu();
    for at in 0..100 {
        cluster.put(&key("backend-00000"), &value(20_000 + at));
        asked.wait_until("the change", secs(5), |asked| {
            asked.set.as_ref().unwrap().members[0].address.port() == 20_000 + at
        });
        tidegate_net::clock::pause(Duration::from_millis(60));
    }
    eprintln!("processor time of one change, with the test's own: {:?}", (cpu() - start) / 100);
}

#[test]
fn hundred_idle_questions() {
    if !is_long() || !is_installed() {
        return;
    }
    let cluster = EtcdCluster::start(1);
    let prefixes: Vec<String> = (0..100).map(|at| format!("/services/{at}/")).collect();
    for prefix in &prefixes {
        cluster.put(&format!("{prefix}a"), &value(80));
    }
    let prefixes: Vec<&str> = prefixes.iter().map(String::as_str).collect();
    let mut asked = AskedEtcd::start_many(&registry(&cluster), &prefixes);
    for asked in &mut asked {
        asked.wait_for(&["a"], secs(10));
    }
    let start = cpu();
    tidegate_net::clock::pause(secs(60));
    eprintln!("100 idle questions: {:?} of processor time in 60 s", cpu() - start);
    asked.iter_mut().for_each(AskedEtcd::take);
    // A slot keeps the newest sign of life only.
    assert!(asked.iter().all(|asked| asked.failures.is_empty() && asked.alive >= 1));
    let restarts = asked.iter().map(|asked| asked.counters.watch_restarts.load(Ordering::Relaxed));
    eprintln!("restarts of watches: {}", restarts.sum::<u64>());
}
