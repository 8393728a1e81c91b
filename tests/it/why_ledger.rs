//! Thousands of sessions over pools of all policies while their backends fail: an independent
//! ledger must explain every line of the access log.
//!
//! The backends note each session that they serve. The test notes when each backend is killed,
//! resets its connections or is drained. The ledger reads nothing of this from Tidegate.

use crate::common::backend::{Conn, Script, ScriptedBackend, script};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::{Engine, long, measured, ms, on_every_engine_quiet, patience, secs};
use crate::why::assert_explained;
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use std::collections::{BTreeMap, HashMap};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

on_every_engine_quiet!(ledger_explains_every_line_of_the_access_log);

/// Backends of each pool, without backups.
const MEMBERS: usize = 3;

/// Threads that open sessions.
const CLIENTS: usize = 16;

/// Cap of each backend of the pool `least`.
const CAP: usize = 1;

/// How long after its end a fault can still show: scripts that began before, and the tables
/// that follow.
const AFTER: Duration = ms(400);

/// A pool: its name, policy and what decides by that policy.
const POOLS: [(&str, &str, &str); 6] = [
    ("turn", "weighted-round-robin", "turn"),
    ("least", "least-connections", "least"),
    ("two", "two-choices", "least"),
    ("ewma", "peak-ewma", "least"),
    ("draw", "random", "draw"),
    ("hash", "source-hash", "hash"),
];

/// Times at which a condition began and ended; no end if it still holds.
type Intervals = Vec<(SystemTime, Option<SystemTime>)>;

/// A backend and its faults.
struct Member {
    name: String,
    address: SocketAddr,
    running: Option<ScriptedBackend>,
    resets: Arc<AtomicBool>,
    /// Killed, or resetting its connections.
    broken: Intervals,
    drained: Intervals,
}

/// Backends by session, in the order in which they got its first bytes.
type Served = Arc<Mutex<HashMap<u64, Vec<String>>>>;

/// One session, as its client saw it.
struct Seen {
    number: u64,
    pool: &'static str,
    client: SocketAddr,
    began: SystemTime,
    /// Backend and session that the answer named.
    answer: Option<(String, u64)>,
}

fn serve(name: &str, resets: &Arc<AtomicBool>, served: &Served) -> Script {
    let (name, resets, served) = (name.to_owned(), Arc::clone(resets), Arc::clone(served));
    script(move |conn: &Conn| {
        if resets.load(Ordering::SeqCst) {
            return conn.reset();
        }
        let mut number = [0; 8];
        let mut got = 0;
        while got < number.len() {
            match conn.read(&mut number[got..]) {
                Ok(n @ 1..) => got += n,
                _ => return,
            }
        }
        let number = u64::from_be_bytes(number);
        served.lock().unwrap().entry(number).or_default().push(name.clone());
        // Long enough for the caps to be reached.
        std::thread::sleep(ms(2));
        let _ = conn.write_all(format!("{name} {number}").as_bytes());
        conn.fin();
        conn.drain();
    })
}

// === impl Member ===

impl Member {
    fn new(name: String, served: &Served) -> Member {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let (broken, drained) = Default::default();
        let mut one =
            Member { name, address, running: None, resets: Arc::default(), broken, drained };
        one.start(served);
        one
    }

    fn pool(&self) -> &str {
        self.name.split('-').next().unwrap_or_default()
    }

    fn start(&mut self, served: &Served) {
        let script = serve(&self.name, &self.resets, served);
        self.running = Some(ScriptedBackend::start_on(self.address, script));
    }

    /// Kills it, or lets it reset its connections.
    fn break_it(&mut self, kill: bool) {
        self.broken.push((SystemTime::now(), None));
        if kill {
            self.running = None;
        } else {
            self.resets.store(true, Ordering::SeqCst);
        }
    }

    fn mend(&mut self, served: &Served) {
        self.resets.store(false, Ordering::SeqCst);
        if self.running.is_none() {
            self.start(served);
        }
        end(&mut self.broken);
    }

    fn is_broken(&self) -> bool {
        self.broken.last().is_some_and(|(_, until)| until.is_none())
    }

    /// Whether it was killed or resetting at some time of the interval.
    fn broke(&self, from: SystemTime, to: SystemTime) -> bool {
        let after = |until: &Option<SystemTime>| until.is_none_or(|until| until + AFTER >= from);
        self.broken.iter().any(|(begin, until)| *begin <= to && after(until))
    }

    /// Whether it was drained during the whole interval.
    fn was_drained(&self, from: SystemTime, to: SystemTime) -> bool {
        let until = |until: &Option<SystemTime>| until.is_none_or(|until| until >= to);
        self.drained.iter().any(|(begin, end)| *begin <= from && until(end))
    }

    /// Whether something had kept clients away from it at any time before.
    fn was_disturbed_before(&self, time: SystemTime) -> bool {
        let before = |(begin, _): &(SystemTime, _)| *begin <= time;
        self.broken.iter().any(before) || self.drained.iter().any(before)
    }
}

fn end(intervals: &mut Intervals) {
    if let Some((_, until @ None)) = intervals.last_mut() {
        *until = Some(SystemTime::now());
    }
}

// === the run ===

fn conf(engine: Engine, members: &[Member]) -> Conf {
    let mut conf = Conf::new(engine);
    for (name, policy, _) in POOLS {
        let mut pool = Pool::new(name)
            .key(&format!("balance = \"{policy}\""))
            .ejection("failures = 2\ntime = \"300ms\"");
        pool = match name {
            "least" => pool.key("queue_max = 64\nqueue_timeout = \"10s\""),
            "two" => pool
                .key("when_none_eligible = \"try-all\"")
                .probe("interval = \"100ms\"\ntimeout = \"100ms\"\nfall = 1"),
            _ => pool,
        };
        for one in members.iter().filter(|one| one.pool() == name) {
            let keys = match (name, one.name.ends_with("backup")) {
                (_, true) => "backup = true".to_owned(),
                ("least", _) => format!("connections_max = {CAP}"),
                _ => String::new(),
            };
            pool = pool.backend_with(&one.name, one.address, &keys);
        }
        conf = conf.frontend(name, name, "").pool(pool);
    }
    conf
}

/// Kills, breaks, mends, drains and undrains backends until `done`; then mends all.
fn disturb(proxy: &TestProxy, members: &mut [Member], served: &Served, done: &AtomicBool) {
    let mut random = fastrand::Rng::with_seed(7);
    let post = |one: &Member, action: &str| {
        let path = format!("/v1/pools/{}/backends/{}/{action}", one.pool(), one.name);
        assert_eq!(proxy.admin_request("POST", &path).status, 200);
    };
    let drain = |one: &mut Member| {
        post(one, "drain");
        // From the answer to the next request it gets no session.
        one.drained.push((SystemTime::now(), None));
    };
    let undrain = |one: &mut Member| {
        if one.drained.last().is_some_and(|(_, until)| until.is_none()) {
            end(&mut one.drained);
            post(one, "undrain");
        }
    };
    while !done.load(Ordering::SeqCst) {
        match random.u8(..20) {
            // A whole pool at once: for backups and for `try-all`.
            0 => {
                members.iter_mut().filter(|one| one.name.starts_with("turn-m")).for_each(drain);
                std::thread::sleep(ms(100));
                members.iter_mut().for_each(undrain);
            }
            1 => {
                let two = |one: &&mut Member| one.pool() == "two" && !one.is_broken();
                members.iter_mut().filter(two).for_each(|one| one.break_it(true));
                std::thread::sleep(ms(400));
            }
            2..6 => {
                let one = random.usize(..members.len());
                match random.bool() {
                    true => drain(&mut members[one]),
                    false => members.iter_mut().for_each(undrain),
                }
            }
            kind => {
                let one = random.usize(..members.len());
                let one = &mut members[one];
                if one.is_broken() {
                    one.mend(served)
                } else {
                    one.break_it(kind % 2 == 0)
                }
                // Rather one broken backend than many.
                let broken = members.iter_mut().filter(|one| one.is_broken());
                broken.skip(4).for_each(|one| one.mend(served));
            }
        }
        std::thread::sleep(ms(random.u64(5..60)));
    }
    members.iter_mut().for_each(|one| one.mend(served));
    members.iter_mut().for_each(undrain);
}

/// Runs one session. A reset at once can already fail the connect, and the session counts.
fn session(proxy: &TestProxy, number: u64) -> Seen {
    let pool = POOLS[number as usize % POOLS.len()].0;
    let source = SocketAddr::from(([127, 0, 3, 1 + (number / 6 % 40) as u8], 0));
    let began = SystemTime::now();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&source.into()).expect("bind");
    let client = socket.local_addr().ok().and_then(|address| address.as_socket());
    socket.set_read_timeout(Some(patience(secs(20)))).expect("a timeout");
    if let Err(error) = socket.connect(&proxy.addr(pool).into()) {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
    let mut stream = TcpStream::from(socket);
    if number.is_multiple_of(5) {
        // The backend can reset before any byte, and the session is retried.
        std::thread::sleep(ms(4));
    }
    let mut text = String::new();
    let _ = stream.write_all(&number.to_be_bytes());
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_string(&mut text);
    let answer = text.split_once(' ');
    let answer = answer.and_then(|(name, number)| Some((name.to_owned(), number.parse().ok()?)));
    Seen { number, pool, client: client.expect("an address"), began, answer }
}

fn ledger_explains_every_line_of_the_access_log(engine: Engine) {
    let count = match () {
        () if long() => 10_000,
        () if cfg!(debug_assertions) => 3_000,
        () => 6_000,
    };
    let served = Served::default();
    let mut names: Vec<String> = Vec::new();
    for (pool, ..) in POOLS {
        names.extend((0..MEMBERS).map(|number| format!("{pool}-m{number}")));
    }
    names.push("turn-backup".to_owned());
    let mut members: Vec<Member> =
        names.into_iter().map(|name| Member::new(name, &served)).collect();
    let proxy = TestProxy::start(conf(engine, &members));
    let (next, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut seen: Vec<Seen> = std::thread::scope(|scope| {
        let disturber = scope.spawn(|| disturb(&proxy, &mut members, &served, &done));
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                scope.spawn(|| {
                    let numbers = std::iter::repeat_with(|| next.fetch_add(1, Ordering::SeqCst));
                    let numbers = numbers.take_while(|number| *number < count);
                    numbers.map(|number| session(&proxy, number)).collect::<Vec<_>>()
                })
            })
            .collect();
        let seen = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
        done.store(true, Ordering::SeqCst);
        disturber.join().unwrap();
        seen
    });
    seen.sort_by_key(|one| one.began);
    let log = proxy.wait_access_log(seen.len());
    assert_eq!(log.len(), seen.len(), "one line for each session");
    // The rings keep fewer sessions than the log.
    log.iter().rev().take(1_000).for_each(|line| assert_explained(&proxy, line));
    let queued = proxy.metric("tidegate_queued_total", &[]);
    Ledger { members, served: served.lock().unwrap().clone() }.check(&seen, &log, queued as usize);
}

// === the ledger ===

struct Ledger {
    members: Vec<Member>,
    served: HashMap<u64, Vec<String>>,
}

/// A line of the access log, read.
struct Line<'a> {
    line: &'a Value,
    began: SystemTime,
    ended: SystemTime,
    backend: Option<&'a str>,
    why: Option<&'a str>,
    attempts: u64,
    skipped: usize,
    tries: Vec<(&'a str, &'a str)>,
}

impl<'a> Line<'a> {
    fn of(line: &'a Value) -> Line<'a> {
        let time = line["time"].as_str().expect("a time");
        let ended = humantime::parse_rfc3339(time).expect("RFC 3339");
        let lasted = Duration::from_secs_f64(line["duration_seconds"].as_f64().expect("a number"));
        let one = |entry: &'a Value| Some((entry["backend"].as_str()?, entry["failure"].as_str()?));
        Line {
            line,
            began: ended - lasted - ms(2),
            ended: ended + ms(2),
            backend: line["backend"].as_str(),
            why: line["why"].as_str(),
            attempts: line["attempts"].as_u64().expect("a number"),
            skipped: line["skipped"].as_u64().expect("a number") as usize,
            tries: line["tries"].as_array().expect("a list").iter().filter_map(one).collect(),
        }
    }
}

impl Ledger {
    fn check(&self, seen: &[Seen], log: &[Value], queued: usize) {
        let lines: Vec<Line<'_>> = log.iter().map(Line::of).collect();
        // A client address can come back in a later session of the same frontend.
        let mut by_client: HashMap<(String, String), Vec<&Line<'_>>> = HashMap::new();
        for line in &lines {
            let key = |field: &str| line.line[field].as_str().expect("a text").to_owned();
            by_client.entry((key("frontend"), key("client"))).or_default().push(line);
        }
        by_client.values_mut().for_each(|lines| {
            lines.sort_by_key(|line| std::cmp::Reverse(line.began));
        });
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        let mut problems = Vec::new();
        let mut hashed: HashMap<IpAddr, &str> = HashMap::new();
        for one in seen {
            let key = (one.pool.to_owned(), one.client.to_string());
            let line = by_client.get_mut(&key).and_then(Vec::pop).expect("a line");
            *counts.entry(line.why.unwrap_or("null")).or_default() += 1;
            let explained = self.explain(one, line, &lines).and_then(|()| {
                let (Some("hash"), 0, Some(backend)) = (line.why, line.skipped, line.backend)
                else {
                    return Ok(());
                };
                let first = *hashed.entry(one.client.ip()).or_insert(backend);
                ensure(first == backend, "the hash of a client has two backends")
            });
            if let Err(problem) = explained {
                problems.push(format!("{problem}: session {} {:#}", one.number, line.line));
            }
        }
        measured(&format!("{} sessions: {counts:?}", seen.len()));
        let few: Vec<String> = problems.iter().take(4).cloned().collect();
        assert!(problems.is_empty(), "{} unexplained:\n{}", problems.len(), few.join("\n"));
        self.check_counts(&lines, &counts, queued);
    }

    /// Every reason occurs, and the queue has as many sessions as Tidegate counted.
    fn check_counts(&self, lines: &[Line<'_>], counts: &BTreeMap<&str, usize>, queued: usize) {
        for why in ["turn", "least", "draw", "hash", "retry", "queue"] {
            assert!(counts.contains_key(why), "no {why}: {counts:?}");
        }
        let count = |why: &str| counts.get(why).copied().unwrap_or(0);
        let left = lines.iter().filter(|line| line.line["phase"] == "queue").count();
        // A queued session can be retried or decide a trial, which then is its reason.
        let sure = count("queue") + left;
        assert!(
            (sure..=sure + count("retry") + count("trial")).contains(&queued),
            "{queued} sessions were queued, and {sure} lines say so"
        );
    }

    fn member(&self, name: &str) -> &Member {
        self.members.iter().find(|one| one.name == name).expect("a backend of the test")
    }

    fn explain(&self, seen: &Seen, line: &Line<'_>, all: &[Line<'_>]) -> Result<(), &'static str> {
        self.explain_service(seen, line)?;
        self.explain_tries(line)?;
        self.explain_why(seen, line, all)
    }

    /// The named backend served the session, unless it was broken.
    fn explain_service(&self, seen: &Seen, line: &Line<'_>) -> Result<(), &'static str> {
        if let Some((name, number)) = &seen.answer {
            ensure(line.backend == Some(name), "another backend answered")?;
            ensure(*number == seen.number, "the answer is another session's")?;
        }
        let none = Vec::new();
        let served = self.served.get(&seen.number).unwrap_or(&none);
        ensure(served.len() < 2, "two backends got the bytes")?;
        match (line.backend, served.first()) {
            (None, None) => Ok(()),
            (None, Some(_)) => Err("a backend served, and the line names none"),
            (Some(named), Some(served)) => {
                ensure(named == served, "another backend got the bytes")?;
                let member = self.member(named);
                ensure(!member.was_drained(line.began, line.ended), "the backend was drained")
            }
            (Some(named), None) => {
                let broke = self.member(named).broke(line.began, line.ended);
                ensure(broke, "the named backend was well and did not serve")
            }
        }
    }

    /// Each failed attempt had a reason.
    fn explain_tries(&self, line: &Line<'_>) -> Result<(), &'static str> {
        for (backend, failure) in &line.tries {
            let known = ["refused", "early-reset"].contains(failure);
            ensure(known, "no backend of this test fails that way")?;
            let broke = self.member(backend).broke(line.began, line.ended);
            ensure(broke, "an attempt failed on a backend that was well")?;
        }
        let mut names: Vec<&str> = line.tries.iter().map(|(backend, _)| *backend).collect();
        names.sort_unstable();
        names.dedup();
        ensure(names.len() == line.tries.len(), "a backend was tried twice")?;
        let (tries, attempts) = (line.tries.len() as u64, line.attempts);
        ensure(tries == attempts || tries + 1 == attempts, "attempts and tries disagree")
    }

    fn explain_why(
        &self,
        seen: &Seen,
        line: &Line<'_>,
        all: &[Line<'_>],
    ) -> Result<(), &'static str> {
        let pool = seen.pool;
        let members = self.members.iter().filter(|one| one.pool() == pool);
        let total = members.clone().count();
        let disturbed = members.clone().filter(|one| one.was_disturbed_before(line.ended)).count();
        ensure(line.why.is_some() == line.backend.is_some(), "why without a backend")?;
        let Some(why) = line.why else {
            ensure(line.attempts == 0, "attempts without a backend")?;
            return ensure(disturbed >= MEMBERS, "no backend, and not all were disturbed");
        };
        let named = self.member(line.backend.unwrap_or_default());
        ensure(line.skipped < total, "more backends passed over than there are others")?;
        ensure((line.attempts > 1) == (why == "retry") || why == "trial", "retry")?;
        let policy = POOLS.iter().find(|(name, ..)| *name == pool).map(|(_, _, why)| *why);
        match why {
            "retry" => ensure(!line.tries.is_empty(), "a retry without a failure"),
            "trial" => ensure(named.broken.iter().any(|(at, _)| *at < line.ended), "trial"),
            "queue" => {
                let others = all.iter().filter(|other| other.line["pool"] == pool);
                let open = |other: &&Line<'_>| {
                    !std::ptr::eq(other.line, line.line)
                        && other.began <= line.began + ms(4)
                        && other.ended >= line.began
                };
                ensure(pool == "least", "a queue in a pool without one")?;
                ensure(others.filter(open).count() >= CAP, "queued in a pool with free slots")
            }
            "fail-open" => {
                ensure(pool == "two" && disturbed == MEMBERS, "not all backends were disturbed")
            }
            "backup" => ensure(named.name == "turn-backup", "not a backup"),
            "only" => {
                ensure(
                    line.skipped + 1 >= total - usize::from(pool == "turn"),
                    "others were usable",
                )?;
                ensure(disturbed > 0 || pool == "least", "only one without a cause")
            }
            other => ensure(Some(other) == policy, "another policy's reason"),
        }
    }
}

fn ensure(condition: bool, otherwise: &'static str) -> Result<(), &'static str> {
    condition.then_some(()).ok_or(otherwise)
}
