//! Scrapes of `status` and metrics, and open streams, with thousands of backends. They must not
//! delay the detection of failures.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::{Engine, exclusive, long, measured, ms, secs};
use crate::heartbeats::Keys;
use crate::stream::StreamViewer;
use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tidegate_heartbeat::SenderState;
use tidegate_heartbeat::keys::Secret;
use tidegate_heartbeat::wire::{HeartbeatFields, SenderIdentity, encode};

/// The heartbeat interval.
const INTERVAL: Duration = ms(100);

/// How long a failing sender sends, and the pause before the next sender replaces it.
const LIFETIME: Duration = ms(2000);
const PAUSE: Duration = ms(700);

/// The periods of the test, in turn.
const LOADS: [Load; 3] = [Load::Quiet, Load::Scraped, Load::Viewed];

/// Senders that send all the time.
const STEADY: u32 = 200;

/// Senders that fail, at the same time.
const FAILING: u32 = 10;

/// Fewer backends by default, for debug builds on busy machines.
fn backends() -> u32 {
    if long() { 20_000 } else { 4_000 }
}

/// Adds `count` backends of the file. No heartbeat or probe concerns them.
fn many(pool: Pool, count: u32) -> Pool {
    let addresses =
        (0..count).map(|n| format!("127.{}.{}.{}:9", 1 + n / 62_500, n / 250 % 250, n % 250 + 1));
    addresses.fold(pool, |pool, address| pool.backend(&address.replace(":", "-"), &address))
}

/// The state of one sender.
struct Sender {
    name: String,
    address: SocketAddr,
    /// For a failing sender. A connect shows whether the backend is alive.
    listener: Option<TcpListener>,
    sequence: u64,
    began: Instant,
    last: Instant,
    next: Instant,
}

/// All senders on one thread.
struct Senders {
    socket: UdpSocket,
    to: SocketAddr,
    secret: Secret,
    senders: Vec<Sender>,
    /// Number of failing senders created.
    created: u32,
}

/// Commands for the thread of the senders, and its results.
#[derive(Default)]
struct Control {
    stop: AtomicBool,
    /// If set, some senders fail and others replace them.
    failing: AtomicBool,
    /// Time of the last heartbeat of each failed sender, by name.
    failed: Mutex<HashMap<String, SystemTime>>,
}

impl Sender {
    /// The sender `number` of `all`. The phases of all senders are spread over an interval.
    fn new(name: String, address: SocketAddr, (number, all): (u32, u32)) -> Sender {
        let now = Instant::now();
        let next = now + INTERVAL * number / all;
        Sender { name, address, listener: None, sequence: 0, began: now, last: now, next }
    }

    fn failing(number: u32) -> Sender {
        let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 9, 9), 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let sender = Sender::new(format!("failing{number}"), address, (number % FAILING, FAILING));
        Sender { listener: Some(listener), ..sender }
    }
}

impl Senders {
    fn new(keys: &Keys, everywhere: SocketAddr) -> Senders {
        let steady = (0..STEADY).map(|n| {
            let address =
                SocketAddr::from((Ipv4Addr::new(127, 0, 8, n as u8 + 1), everywhere.port()));
            Sender::new(format!("steady{n}"), address, (n, STEADY))
        });
        Senders {
            socket: UdpSocket::bind("127.0.0.1:0").unwrap(),
            to: keys.to(),
            secret: Secret::new(&[1; 32]).unwrap(),
            senders: steady.collect(),
            created: 0,
        }
    }

    /// Sends heartbeats until `stop` is set.
    fn send_until_stopped(&mut self, control: &Control) {
        let mut empty: Vec<Instant> =
            (0..FAILING).map(|n| Instant::now() + (LIFETIME + PAUSE) * n / FAILING).collect();
        while !control.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            if control.failing.load(Ordering::Relaxed)
                && let Some(place) = empty.iter().position(|at| *at <= now)
            {
                empty.swap_remove(place);
                self.senders.push(Sender::failing(self.created));
                self.created += 1;
            }
            let over = |sender: &Sender| {
                sender.listener.is_some() && now >= sender.began + LIFETIME && now < sender.next
            };
            while let Some(at) = self.senders.iter().position(over) {
                // The failure follows directly after a heartbeat.
                let gone = self.senders.swap_remove(at);
                let mut failed = control.failed.lock().unwrap();
                failed.insert(gone.name, SystemTime::now() - (now - gone.last));
                empty.push(now + PAUSE);
            }
            for sender in self.senders.iter_mut().filter(|sender| sender.next <= now) {
                sender.sequence += 1;
                // A late sender does not catch up.
                sender.next = (sender.next + INTERVAL).max(now);
                sender.last = now;
                say(&self.socket, self.to, &self.secret, sender);
            }
            let next = self.senders.iter().map(|sender| sender.next).min().unwrap_or(now);
            // Until the next heartbeat, or at most 2 ms because of a failure.
            std::thread::sleep(next.saturating_duration_since(Instant::now()).min(ms(2)));
        }
    }
}

fn say(socket: &UdpSocket, to: SocketAddr, secret: &Secret, sender: &Sender) {
    let identity = SenderIdentity::new("web", &sender.name, sender.address).unwrap();
    let sent = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let draft = HeartbeatFields {
        identity: &identity,
        key_id: 1,
        incarnation: 1,
        sequence: sender.sequence,
        sent,
        interval: INTERVAL,
        state: SenderState::Ready,
        weight: 1,
        in_flight: 0,
        load: 0,
    };
    socket.send_to(&encode(&draft, secret), to).unwrap();
}

/// Returns the time from the last heartbeat to the log line `down` for each failed sender,
/// sorted.
fn detections(log: &str, failed: &HashMap<String, SystemTime>) -> Vec<Duration> {
    let mut took: Vec<Duration> = log
        .lines()
        .filter(|line| line.contains("to=\"down\"") || line.contains("to=down"))
        .filter_map(|line| {
            let name = line.split("backend=").nth(1)?.split_whitespace().next()?;
            let failed = failed.get(name)?.duration_since(UNIX_EPOCH).ok()?;
            let said = seconds_of_day(line)?;
            let failed = failed.as_secs_f64().rem_euclid(86_400.0);
            Some(Duration::from_secs_f64((said - failed).rem_euclid(86_400.0)))
        })
        .collect();
    took.sort();
    took
}

/// Parses the time of day of a line that begins with `2026-01-02T03:04:05.678901Z`.
fn seconds_of_day(line: &str) -> Option<f64> {
    let clock = line.split_once('T')?.1.split_once('Z')?.0;
    clock.split(':').try_fold(0.0, |sum, part| Some(sum * 60.0 + part.parse::<f64>().ok()?))
}

/// Scrapes status and metrics every second until `stop` is set. Returns the number of scrapes.
fn scrape(proxy: &TestProxy, stop: &AtomicBool) -> u32 {
    let (began, mut scrapes, mut rounds) = (Instant::now(), 0, 0);
    while !stop.load(Ordering::Relaxed) {
        let answer = proxy.admin_request("GET", "/metrics");
        let status = proxy.admin_request("GET", "/v1/status");
        // A debug build on a busy machine can exceed the timeout of 5 s.
        if answer.status == 200 && status.status == 200 {
            assert!(
                answer.body.lines().count() > backends() as usize * 10,
                "the scrape is incomplete"
            );
            scrapes += 1;
        }
        rounds += 1;
        let due = began + secs(1) * rounds;
        // Every second, as Prometheus can do.
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    scrapes
}

/// Returns the response times of the control thread until `stop` is set, sorted.
fn ask(proxy: &TestProxy, stop: &AtomicBool) -> Vec<Duration> {
    let mut took = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        assert_eq!(proxy.admin_request("GET", "/v1/pools/small/backends/a/explain").status, 200);
        took.push(began.elapsed());
        // A steady rate.
        std::thread::sleep(ms(20));
    }
    took.sort();
    took
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

/// Reads the streams of eight viewers until `stop` is set: four with all backends and four
/// with the worst 50. Returns the number of snapshots and deltas.
fn view(proxy: &TestProxy, stop: &AtomicBool) -> u32 {
    let read = |query: &str| {
        let (mut viewer, mut count) = (StreamViewer::open(proxy, query), 0);
        while !stop.load(Ordering::Relaxed)
            && let Some(told) = viewer.next()
        {
            count += u32::from(told.name == "snapshot" || told.name == "delta");
        }
        count
    };
    std::thread::scope(|scope| {
        let queries = ["", "backends=top:50"].repeat(4).into_iter();
        let viewers: Vec<_> = queries.map(|query| scope.spawn(|| read(query))).collect();
        viewers.into_iter().map(|viewer| viewer.join().expect("a stream")).sum()
    })
}

/// What the balancer does in addition to the detection.
#[derive(Clone, Copy, PartialEq)]
enum Load {
    Quiet,
    Scraped,
    Viewed,
}

/// The measurements of one period.
struct Period {
    excuses: f64,
    detected: Vec<Duration>,
    asked: Vec<Duration>,
    scrapes: u32,
    failed: usize,
}

impl Period {
    /// Measures for `span` with failing senders.
    fn measure(proxy: &TestProxy, control: &Control, span: Duration, load: Load) -> Period {
        let excuses = || proxy.metric("tidegate_heartbeat_excuses_total", &[]);
        let stop = AtomicBool::new(false);
        let before = excuses();
        control.failed.lock().unwrap().clear();
        control.failing.store(true, Ordering::Relaxed);
        let (scrapes, asked) = std::thread::scope(|scope| {
            let asked = scope.spawn(|| ask(proxy, &stop));
            let scrapes = match load {
                Load::Quiet => None,
                Load::Scraped => Some(scope.spawn(|| scrape(proxy, &stop))),
                Load::Viewed => Some(scope.spawn(|| view(proxy, &stop))),
            };
            std::thread::sleep(span);
            control.failing.store(false, Ordering::Relaxed);
            // The last senders still have to fail and to be detected.
            std::thread::sleep(LIFETIME + secs(2));
            stop.store(true, Ordering::Relaxed);
            let scrapes = scrapes.map_or(0, |scrapes| scrapes.join().expect("scrapes"));
            (scrapes, asked.join().expect("questions"))
        });
        let failed = control.failed.lock().unwrap();
        let detected = detections(&proxy.log(), &failed);
        Period { excuses: excuses() - before, detected, asked, scrapes, failed: failed.len() }
    }

    fn say(&self, what: &str) {
        let [detected, asked] = [&self.detected, &self.asked].map(|sorted| {
            let [p50, p99] = [50, 99].map(|percent| percentile(sorted, percent));
            format!("{p50:.1?} (p50), {p99:.1?} (p99), {:.1?} (longest)", percentile(sorted, 100))
        });
        measured(&format!(
            "{what}: {} documents, {} excuses; {} of {} failures detected after {detected}; the control \
             thread answers in {asked}",
            self.scrapes,
            self.excuses,
            self.detected.len(),
            self.failed,
        ));
    }
}

mod alone {
    use super::*;

    #[test]
    fn scrapes_and_streams_of_many_backends_do_not_delay_detection() {
        let _share = exclusive::alone();
        let keys = Keys::new();
        let heartbeat =
            "register = true\ninterval = \"100ms\"\nttl = \"1s\"\nforget_after = \"1s\"";
        let web = many(Pool::new("web").heartbeat(heartbeat), backends() - STEADY);
        let lone = ScriptedBackend::start(backend::http("a", 200));
        let conf = Conf::simple(Engine::Epoll, web);
        let conf = conf.pool(Pool::new("small").backend("a", lone.address()));
        let proxy = TestProxy::start(Conf { heartbeat: keys.section(&[1]), ..conf });

        let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, free_port()));
        let _steady = ScriptedBackend::start_on(everywhere, backend::http("s", 200));
        let mut senders = Senders::new(&keys, everywhere);
        let span = if long() { secs(60) } else { secs(3) };
        let control = Control::default();
        let all = std::thread::scope(|scope| {
            scope.spawn(|| senders.send_until_stopped(&control));
            // The detector needs the intervals of the senders first.
            std::thread::sleep(secs(5));
            let mut all = Vec::new();
            for load in LOADS.repeat(if long() { 2 } else { 1 }) {
                let period = Period::measure(&proxy, &control, span, load);
                period.say(match load {
                    Load::Quiet => "quiet",
                    Load::Scraped => "scraped",
                    Load::Viewed => "8 viewers",
                });
                all.push(period);
            }
            control.stop.store(true, Ordering::Relaxed);
            all
        });
        let of = |load: Load, field: fn(&Period) -> &Vec<Duration>| {
            let periods = all.iter().enumerate().filter(|(at, _)| LOADS[at % LOADS.len()] == load);
            let mut both: Vec<Duration> =
                periods.flat_map(|(_, period)| field(period).iter().copied()).collect();
            both.sort();
            both
        };
        for period in &all {
            assert_eq!(period.excuses, 0.0, "a missing heartbeat was excused");
            assert!(period.failed > 3 && period.detected.len() * 10 >= period.failed * 9);
        }
        assert!(all.iter().map(|period| period.scrapes).sum::<u32>() >= 2);
        let [quiet, scraped, viewed] = LOADS.map(|load| percentile(&of(load, |s| &s.detected), 99));
        let more = if long() { ms(10) } else { ms(200) };
        for loaded in [scraped, viewed] {
            assert!(loaded < quiet.mul_f64(1.2) + more, "p99 {loaded:?} instead of {quiet:?}");
        }
    }
}
