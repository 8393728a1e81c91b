//! The cost of many names. It runs only with the environment variable `TIDEGATE_LONG`.

use super::dnsmasq::{NONE, resolver};
use super::*;
use crate::testing::dnsmasq::Dnsmasq;
use std::fmt::Write;
use std::sync::atomic::Ordering;

const NAMES: usize = 1000;
const MEASURED: Duration = Duration::from_secs(20);

/// Processor time of this thread, which runs the sources and the resolver.
fn used() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// Returns the share of a core that 1,000 names with this TTL use.
async fn share(ttl: u32) -> Option<f64> {
    let mut hosts = String::new();
    for name in 0..NAMES {
        let _ = writeln!(hosts, "192.0.2.1 n{name}.example\n192.0.2.2 n{name}.example");
    }
    let server = Dnsmasq::start(&hosts, ttl, NONE)?;
    let test = resolver(&server);
    let start = |name| {
        let name = format!("n{name}.example");
        RunningSource::start(question(&name, NameRecord::Address, NameFamily::Both), &test.resolver)
    };
    let mut sources: Vec<RunningSource> = (0..NAMES).map(start).collect();
    for source in &mut sources {
        assert_eq!(source.whole().await.members.len(), 2);
    }
    let asked = || test.resolver.counters().questions.load(Ordering::Relaxed);
    let (before, questions, start) = (used(), asked(), clock::now());
    sleep(MEASURED).await;
    let cpu = (used() - before).as_secs_f64() / (clock::now() - start).as_secs_f64();
    let questions = asked() - questions;
    eprintln!("{NAMES} names, TTL {ttl} s: {questions} questions, {:.2} % of a core", cpu * 100.0);
    Some(cpu)
}

#[tokio::test]
async fn a_thousand_names_use_one_percent_of_a_core() {
    if !crate::testing::is_long() {
        return;
    }
    for (ttl, most) in [(1, 0.2), (5, 0.04), (30, 0.01)] {
        if let Some(share) = share(ttl).await {
            assert!(share < most, "TTL {ttl} s: {share}");
        }
    }
}
