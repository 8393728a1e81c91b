//! Scrapes of many backends: they cost the control thread nothing that a verdict
//! would have to wait for.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::{Engine, exclusive, long, measured, ms, secs};
use crate::heartbeats::Keys;
use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tidegate_heartbeat::SenderState;
use tidegate_heartbeat::keys::Secret;
use tidegate_heartbeat::wire::{HeartbeatFields, SenderIdentity, encode};

/// Between heartbeats.
const INTERVAL: Duration = ms(100);

/// How long one that is to die is heard before, and its place stays empty after.
const LIFE: Duration = ms(2000);
const REST: Duration = ms(700);

/// Senders that are not to die.
const STEADY: u32 = 200;

/// Those that are, at a time.
const MORTAL: u32 = 10;

/// Fewer for a debug build on a busy machine.
fn backends() -> u32 {
    if long() { 20_000 } else { 4_000 }
}

/// The pool, with so many backends in the file that nobody asks about.
fn many(pool: Pool, count: u32) -> Pool {
    let addresses =
        (0..count).map(|n| format!("127.{}.{}.{}:9", 1 + n / 62_500, n / 250 % 250, n % 250 + 1));
    addresses.fold(pool, |pool, address| pool.backend(&address.replace(":", "-"), &address))
}

/// A sender, and what it needs to be believed.
struct Sender {
    name: String,
    address: SocketAddr,
    /// Of one that is to die: a connect shows whether it lives.
    listener: Option<TcpListener>,
    sequence: u64,
    began: Instant,
    last: Instant,
    next: Instant,
}

/// All senders on one thread.
struct Choir {
    socket: UdpSocket,
    to: SocketAddr,
    secret: Secret,
    senders: Vec<Sender>,
    /// How many have been born.
    born: u32,
}

/// What the thread of the senders is told, and what it tells.
#[derive(Default)]
struct Score {
    stop: AtomicBool,
    /// Some die, and others take their places.
    dying: AtomicBool,
    /// When the last heartbeat of each that died was sent, by name.
    died: Mutex<HashMap<String, SystemTime>>,
}

impl Sender {
    /// The `number`-th of `all`, whose phases are spread over an interval.
    fn new(name: String, address: SocketAddr, (number, all): (u32, u32)) -> Sender {
        let now = Instant::now();
        let next = now + INTERVAL * number / all;
        Sender { name, address, listener: None, sequence: 0, began: now, last: now, next }
    }

    fn mortal(number: u32) -> Sender {
        let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 9, 9), 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let sender = Sender::new(format!("mortal{number}"), address, (number % MORTAL, MORTAL));
        Sender { listener: Some(listener), ..sender }
    }
}

impl Choir {
    fn new(keys: &Keys, everywhere: SocketAddr) -> Choir {
        let steady = (0..STEADY).map(|n| {
            let address =
                SocketAddr::from((Ipv4Addr::new(127, 0, 8, n as u8 + 1), everywhere.port()));
            Sender::new(format!("steady{n}"), address, (n, STEADY))
        });
        Choir {
            socket: UdpSocket::bind("127.0.0.1:0").unwrap(),
            to: keys.to(),
            secret: Secret::new(&[1; 32]).unwrap(),
            senders: steady.collect(),
            born: 0,
        }
    }

    /// Sends until it is told to stop.
    fn sing(&mut self, score: &Score) {
        let mut empty: Vec<Instant> =
            (0..MORTAL).map(|n| Instant::now() + (LIFE + REST) * n / MORTAL).collect();
        while !score.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            if score.dying.load(Ordering::Relaxed)
                && let Some(place) = empty.iter().position(|at| *at <= now)
            {
                empty.swap_remove(place);
                self.senders.push(Sender::mortal(self.born));
                self.born += 1;
            }
            let over = |sender: &Sender| {
                sender.listener.is_some() && now >= sender.began + LIFE && now < sender.next
            };
            while let Some(at) = self.senders.iter().position(over) {
                // Right after its last heartbeat, which the next would follow.
                let gone = self.senders.swap_remove(at);
                let mut died = score.died.lock().unwrap();
                died.insert(gone.name, SystemTime::now() - (now - gone.last));
                empty.push(now + REST);
            }
            for sender in self.senders.iter_mut().filter(|sender| sender.next <= now) {
                sender.sequence += 1;
                // Whoever is late does not make up for it.
                sender.next = (sender.next + INTERVAL).max(now);
                sender.last = now;
                say(&self.socket, self.to, &self.secret, sender);
            }
            let next = self.senders.iter().map(|sender| sender.next).min().unwrap_or(now);
            // The nearest heartbeat, or a death between two.
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

/// How long after the last heartbeat the log says of each that it is down.
fn detections(log: &str, died: &HashMap<String, SystemTime>) -> Vec<Duration> {
    let mut took: Vec<Duration> = log
        .lines()
        .filter(|line| line.contains("to=\"down\"") || line.contains("to=down"))
        .filter_map(|line| {
            let name = line.split("backend=").nth(1)?.split_whitespace().next()?;
            let died = died.get(name)?.duration_since(UNIX_EPOCH).ok()?;
            let said = seconds_of_day(line)?;
            let died = died.as_secs_f64().rem_euclid(86_400.0);
            Some(Duration::from_secs_f64((said - died).rem_euclid(86_400.0)))
        })
        .collect();
    took.sort();
    took
}

/// Of a line that begins with `2026-01-02T03:04:05.678901Z`.
fn seconds_of_day(line: &str) -> Option<f64> {
    let clock = line.split_once('T')?.1.split_once('Z')?.0;
    clock.split(':').try_fold(0.0, |sum, part| Some(sum * 60.0 + part.parse::<f64>().ok()?))
}

/// Scrapes status and metrics each second until it is told to stop; how often it did.
fn scrape(proxy: &TestProxy, stop: &AtomicBool) -> u32 {
    let (began, mut scrapes, mut rounds) = (Instant::now(), 0, 0);
    while !stop.load(Ordering::Relaxed) {
        let answer = proxy.admin_request("GET", "/metrics");
        let status = proxy.admin_request("GET", "/v1/status");
        // A debug build on a busy machine may need more than the 5 s it has.
        if answer.status == 200 && status.status == 200 {
            assert!(answer.body.lines().count() > backends() as usize * 10, "it is whole");
            scrapes += 1;
        }
        rounds += 1;
        let due = began + secs(1) * rounds;
        // Each second, as Prometheus might.
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    scrapes
}

/// How long questions to the control thread take, until it is told to stop.
fn ask(proxy: &TestProxy, stop: &AtomicBool) -> Vec<Duration> {
    let mut took = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        assert_eq!(proxy.admin_request("GET", "/v1/pools/small/backends/a/explain").status, 200);
        took.push(began.elapsed());
        // A steady pace.
        std::thread::sleep(ms(20));
    }
    took.sort();
    took
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

/// What one stretch of time has shown.
struct Stretch {
    excuses: f64,
    detected: Vec<Duration>,
    asked: Vec<Duration>,
    scrapes: u32,
    died: usize,
}

impl Stretch {
    /// `span` with deaths, and with scrapes if so.
    fn measure(proxy: &TestProxy, score: &Score, span: Duration, scraped: bool) -> Stretch {
        let excuses = || proxy.metric("tidegate_heartbeat_excuses_total", &[]);
        let stop = AtomicBool::new(false);
        let before = excuses();
        score.died.lock().unwrap().clear();
        score.dying.store(true, Ordering::Relaxed);
        let (scrapes, asked) = std::thread::scope(|scope| {
            let asked = scope.spawn(|| ask(proxy, &stop));
            let scrapes = scraped.then(|| scope.spawn(|| scrape(proxy, &stop)));
            std::thread::sleep(span);
            score.dying.store(false, Ordering::Relaxed);
            // The last of them are still to die, and to be seen to.
            std::thread::sleep(LIFE + secs(2));
            stop.store(true, Ordering::Relaxed);
            let scrapes = scrapes.map_or(0, |scrapes| scrapes.join().expect("scrapes"));
            (scrapes, asked.join().expect("questions"))
        });
        let died = score.died.lock().unwrap();
        let detected = detections(&proxy.log(), &died);
        Stretch { excuses: excuses() - before, detected, asked, scrapes, died: died.len() }
    }

    fn say(&self, what: &str) {
        let [detected, asked] = [&self.detected, &self.asked].map(|sorted| {
            let [p50, p99] = [50, 99].map(|percent| percentile(sorted, percent));
            format!("{p50:.1?} (p50), {p99:.1?} (p99), {:.1?} (longest)", percentile(sorted, 100))
        });
        measured(&format!(
            "{what}: {} scrapes, {} excuses; {} of {} deaths seen after {detected}; the control \
             thread answers in {asked}",
            self.scrapes,
            self.excuses,
            self.detected.len(),
            self.died,
        ));
    }
}

mod alone {
    use super::*;

    #[test]
    fn scrapes_of_many_backends_excuse_no_silence_and_delay_no_verdict() {
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
        let mut choir = Choir::new(&keys, everywhere);
        let span = if long() { secs(60) } else { secs(3) };
        let score = Score::default();
        let all = std::thread::scope(|scope| {
            scope.spawn(|| choir.sing(&score));
            // Their rhythm has to be known.
            std::thread::sleep(secs(5));
            let all = [false, true, false, true].map(|scraped| {
                let stretch = Stretch::measure(&proxy, &score, span, scraped);
                stretch.say(if scraped { "scraped" } else { "quiet" });
                stretch
            });
            score.stop.store(true, Ordering::Relaxed);
            all
        });
        let of = |scraped: bool, field: fn(&Stretch) -> &Vec<Duration>| {
            let stretches = all.iter().enumerate().filter(|(at, _)| (at % 2 == 1) == scraped);
            let mut both: Vec<Duration> =
                stretches.flat_map(|(_, stretch)| field(stretch).iter().copied()).collect();
            both.sort();
            both
        };
        for stretch in &all {
            assert_eq!(stretch.excuses, 0.0, "somebody's silence did not count");
            assert!(stretch.died > 3 && stretch.detected.len() * 10 >= stretch.died * 9);
        }
        assert!(all[1].scrapes + all[3].scrapes >= 2);
        let [quiet, scraped] = [false, true].map(|it| percentile(&of(it, |s| &s.detected), 99));
        let more = if long() { ms(10) } else { ms(200) };
        assert!(scraped < quiet.mul_f64(1.2) + more, "p99 {scraped:?} instead of {quiet:?}");
    }
}
