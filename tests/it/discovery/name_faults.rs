//! A name server that answers wrongly, under load: sets that change with each answer, a TTL
//! of 0, forged answers, slow answers, 512 addresses, error codes.
//!
//! A script in this process is the name server. Real name servers do none of this on
//! request.

use super::load::Load;
use super::names::{NamedSite, eligible, wait_for};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, ms, on_every_engine, secs};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use tidegate_discovery::testing::dns_liar::{DnsLiar, LiarQuestion, LiarReply, LiarStep, TYPE_A};
use tokio::sync::oneshot;

on_every_engine!(answers_that_lie_cost_no_session_and_no_backend);

/// What the name server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Zone {
    /// 127.0.0.11 and 127.0.0.12.
    Steady,
    /// In turn 11 and 12, then 12 and 13.
    Flapping,
    /// Forged answers before each right one: another id, another question.
    Forged,
    /// The right answer after 0.7 s.
    Slow,
    /// 512 addresses, over TCP.
    Large,
    /// An error code.
    Code(u16),
}

const SERVFAIL: u16 = 2;
const NXDOMAIN: u16 = 3;

fn numbered(numbers: &[u16]) -> Vec<String> {
    numbers.iter().map(|number| format!("127.0.{}.{}", number / 250, number % 250)).collect()
}

fn addresses(question: &LiarQuestion, numbers: &[u16]) -> LiarReply {
    let texts = numbered(numbers);
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    question.addresses(0, &texts)
}

/// The script. `turn` counts the questions about IPv4 addresses.
fn answer(zone: Zone, question: &LiarQuestion, turn: u16) -> Vec<LiarStep> {
    let right = || addresses(question, &[11, 12]);
    match zone {
        Zone::Steady => right().send(),
        Zone::Flapping => addresses(question, &[11 + turn % 2, 12 + turn % 2]).send(),
        Zone::Forged => {
            let forged = || addresses(question, &[99]);
            let id = question.id.wrapping_add(1);
            let other = Some(("other.example", question.kind));
            [forged().id(id).send(), forged().question(other).send(), right().send()].concat()
        }
        Zone::Slow => [vec![LiarStep::Wait(ms(700))], right().send()].concat(),
        Zone::Large if !question.tcp => question.reply().truncated().send(),
        // The first ones have no backend behind them, and sort before the right ones.
        Zone::Large => {
            addresses(question, &(250..760).chain([11, 12]).collect::<Vec<u16>>()).send()
        }
        Zone::Code(code) => question.reply().code(code).send(),
    }
}

/// A name server whose zone the test changes. It runs on a thread of its own until the
/// value is dropped.
struct NameServer {
    zone: Arc<Mutex<Zone>>,
    liar: Arc<DnsLiar>,
    _end: oneshot::Sender<()>,
}

// === impl NameServer ===

impl NameServer {
    fn start() -> NameServer {
        let zone = Arc::new(Mutex::new(Zone::Steady));
        let (shared, mut turn) = (Arc::clone(&zone), 0);
        let script = move |question: &LiarQuestion| {
            turn += u16::from(question.kind == TYPE_A);
            answer(*shared.lock().unwrap(), question, turn)
        };
        let (started, start) = mpsc::channel();
        let (end, ended) = oneshot::channel::<()>();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let liar = Arc::new(DnsLiar::start(script).await);
                started.send(Arc::clone(&liar)).expect("the test waits");
                let _ = ended.await;
            });
        });
        NameServer { zone, liar: start.recv().expect("the server starts"), _end: end }
    }

    /// Changes the zone and waits until it has been asked `times` more.
    fn set(&self, zone: Zone, times: usize) {
        *self.zone.lock().unwrap() = zone;
        let before = self.liar.count(TYPE_A);
        eventually(secs(20), &format!("{zone:?} is asked {times} times"), || {
            self.liar.count(TYPE_A) >= before + times
        });
    }
}

fn answers_that_lie_cost_no_session_and_no_backend(engine: Engine) {
    let site = NamedSite::start(3);
    let server = NameServer::start();
    let dns = format!("[dns]\nservers = [\"{}\"]\n", server.liar.address);
    let pool = Pool::new("web").backend("pg", format!("db.example:{}", site.port));
    let proxy = TestProxy::start(Conf::simple(engine, pool).registry(&dns));
    let [a, b, c] = [11, 12, 13].map(|number| site.member(number));
    let two = [a.clone(), b.clone()];
    wait_for(&proxy, &two);
    let load = Load::start(proxy.addr("web"));

    server.set(Zone::Flapping, 3);
    wait_for(&proxy, &[a.clone(), b.clone(), c]);
    let seen = watch(&proxy, ms(1500));
    assert_eq!(seen.len(), 1, "an answer without a member removes nothing: {seen:?}");

    server.set(Zone::Steady, 2);
    wait_for(&proxy, &two);
    for zone in [Zone::Forged, Zone::Slow, Zone::Code(SERVFAIL), Zone::Code(NXDOMAIN)] {
        server.set(zone, 1);
        assert_eq!(eligible(&proxy), two, "{zone:?}");
    }

    server.set(Zone::Large, 1);
    eventually(secs(10), "all addresses are members", || members(&proxy) == 512);
    assert_eq!(eligible(&proxy), two, "no session verifies the others");

    server.set(Zone::Steady, 1);
    wait_for(&proxy, &two);
    let report = load.end();
    assert!(report.answers.keys().all(|name| ["11", "12", "13"].contains(&&**name)), "{report:?}");
}

fn members(proxy: &TestProxy) -> usize {
    proxy.status()["pools"][0]["backends"].as_array().map_or(0, Vec::len)
}

/// Returns the sets of eligible backends that were seen in this time.
fn watch(proxy: &TestProxy, time: Duration) -> BTreeSet<Vec<String>> {
    let end = Instant::now() + time;
    let mut seen = BTreeSet::new();
    while Instant::now() < end {
        seen.insert(eligible(proxy));
        std::thread::sleep(ms(20));
    }
    seen
}
