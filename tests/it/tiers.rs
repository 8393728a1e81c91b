//! Tiers of backends: which serve, how sessions spill, and what happens to the sessions of
//! backups when a lower tier returns (`on_recover`).

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect, connect_from, echoes};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, ms, on_every_engine, patience, secs};
use crate::why::assert_explained;
use std::net::{Shutdown, TcpStream};
use std::time::Instant;

on_every_engine!(
    lowest_tier_with_an_eligible_backend_serves_alone,
    sessions_spill_to_the_next_tier_by_its_share,
    client_stays_on_its_backend_while_sessions_spill_by_hash,
    sessions_of_a_backup_are_closed_in_order_after_the_primary_returned,
    return_that_is_taken_back_in_time_keeps_the_sessions,
    sessions_of_the_process_before_an_upgrade_are_closed_too,
    backups_keep_their_sessions_by_default,
);

/// Backends `a`, `b`, ... that answer with their names.
fn named(count: usize) -> Vec<(String, ScriptedBackend)> {
    let names = ('a'..).take(count).map(String::from);
    names.map(|name| (name.clone(), ScriptedBackend::start(backend::name(&name)))).collect()
}

/// A pool of these backends with their tiers.
fn pool(keys: &str, backends: &[(String, ScriptedBackend)], tiers: &[u8]) -> Pool {
    let with = |pool: Pool, ((name, one), tier): (&(String, ScriptedBackend), &u8)| {
        pool.backend_with(name, one.address(), &format!("tier = {tier}"))
    };
    backends.iter().zip(tiers).fold(Pool::new("web").key(keys), with)
}

/// The words of a text that was wrapped.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn ask(proxy: &TestProxy) -> String {
    client::ask(proxy.addr("web")).unwrap()
}

fn lowest_tier_with_an_eligible_backend_serves_alone(engine: Engine) {
    let backends = named(4);
    let proxy = TestProxy::start(Conf::simple(engine, pool("", &backends, &[0, 1, 3, 1])));
    let serving = |expected: &[&str]| {
        let mut seen: Vec<String> = (0..6).map(|_| ask(&proxy)).collect();
        seen.sort();
        seen.dedup();
        assert_eq!(seen, expected);
    };
    serving(&["a"]);
    proxy.cli_ok(&["drain", "web/a"]);
    serving(&["b", "d"]);
    proxy.cli_ok(&["drain", "web/b"]);
    proxy.cli_ok(&["drain", "web/d"]);
    serving(&["c"]);
    let status = proxy.status();
    let shares = &status["pools"][0]["tier_shares"];
    assert_eq!(*shares, serde_json::json!([{"tier": 3, "percent": 100}]), "{status:#}");
    let c = proxy.backend("web", "c");
    assert_eq!((&c["tier"], &c["backup"]), (&3.into(), &true.into()), "{c:#}");
    assert_eq!(proxy.metric("tidegate_backend_tier", &[("backend", "c")]), 3.0);
    let text = proxy.cli_ok(&["status"]);
    assert!(words(&text).contains("1 of 4 eligible, tier 3 serves"), "{text}");
    assert!(text.contains("backup tier 3"), "{text}");
    let text = proxy.cli_ok(&["explain", "web/c"]);
    assert!(text.contains("IN ROTATION as a backup"), "{text}");
    assert!(words(&text).contains("backup of tier 3"), "{text}");
    let log = proxy.wait_access_log(18);
    let line = log.iter().rfind(|line| line["backend"] == "c").unwrap();
    assert_eq!(line["why"], "backup", "{line:#}");
    assert_explained(&proxy, line);
    let number = line["session"].to_string();
    let text = words(&proxy.cli_ok(&["explain", "--session", &number]));
    assert!(text.contains("no backend of a lower tier was eligible (tier 3)"), "{text}");
    proxy.cli_ok(&["undrain", "web/d"]);
    serving(&["d"]);
}

fn sessions_spill_to_the_next_tier_by_its_share(engine: Engine) {
    const SESSIONS: usize = 400;
    let backends = named(4);
    let keys = "balance = \"random\"\ntiers = \"spill\"";
    let proxy = TestProxy::start(Conf::simple(engine, pool(keys, &backends, &[0, 0, 1, 1])));
    assert!((0..20).map(|_| ask(&proxy)).all(|name| name == "a" || name == "b"));
    proxy.cli_ok(&["drain", "web/a"]);
    let spilled = (0..SESSIONS).filter(|_| ["c", "d"].contains(&&*ask(&proxy))).count();
    // 30 % of 400 are 120; the standard deviation is 9.2.
    assert!((70..=170).contains(&spilled), "{spilled}");
    let status = proxy.status();
    let shares = serde_json::json!([{"tier": 0, "percent": 70}, {"tier": 1, "percent": 30}]);
    assert_eq!(status["pools"][0]["tier_shares"], shares, "{status:#}");
    assert!(words(&proxy.cli_ok(&["status"])).contains("tier 0 70%, tier 1 30%"));
    let log = proxy.wait_access_log(20 + SESSIONS);
    let mut backups = log.iter().filter(|line| line["why"] == "backup");
    assert_eq!(backups.clone().count(), spilled);
    let line = backups.next_back().unwrap();
    assert_explained(&proxy, line);
    let text = words(&proxy.cli_ok(&["explain", "--session", &line["session"].to_string()]));
    assert!(text.contains("(tier 1, tiers = \"spill\")"), "{text}");
    let ask = ["explain", "--client", "127.0.0.1", "--frontend", "web"];
    let forecast = |more: &[&str]| {
        let text = proxy.cli_ok(&[&ask[..], more, &["--json"]].concat());
        serde_json::from_str::<serde_json::Value>(&text).unwrap()
    };
    let now = forecast(&[]);
    assert_eq!(now["pool"]["tier_shares"], shares, "{now:#}");
    let share = |name: &str| {
        let shares = now["pick"]["shares"].as_array().unwrap().iter();
        let mut of = shares.filter(|share| share["backend"]["backend"] == name);
        of.next().unwrap()["percent"].as_f64().unwrap()
    };
    assert!((share("b") - 70.0).abs() < 2.0 && (share("c") - 15.0).abs() < 2.0, "{now:#}");
    let without = forecast(&["--without", "web/b"]);
    let all = serde_json::json!([{"tier": 1, "percent": 100}]);
    assert_eq!(without["pool"]["tier_shares"], all, "{without:#}");
    assert_eq!(without["pick"]["why"], "backup", "{without:#}");
    let text = words(&proxy.cli_ok(&ask));
    assert!(text.contains("Shares of the tiers: tier 0 70%, tier 1 30%."), "{text}");
}

fn client_stays_on_its_backend_while_sessions_spill_by_hash(engine: Engine) {
    let backends = named(6);
    let keys = "balance = \"source-hash\"\ntiers = \"spill\"";
    let conf = Conf::simple(engine, pool(keys, &backends, &[0, 0, 0, 0, 1, 1]));
    let proxy = TestProxy::start(conf);
    let of = |host: u8| {
        let client = connect_from([127, 0, 1, host].into(), proxy.addr("web")).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        client::read_text(&client).unwrap()
    };
    let seen = |names: &mut Vec<Vec<String>>| names.push((1..=60).map(of).collect());
    let mut rounds = Vec::new();
    seen(&mut rounds);
    proxy.cli_ok(&["drain", "web/a"]);
    proxy.cli_ok(&["drain", "web/b"]);
    seen(&mut rounds);
    seen(&mut rounds);
    assert_eq!(rounds[1], rounds[2], "each client keeps its backend");
    // Of the clients of `c` and `d`, at most 2% change the backend of their tier, see
    // docs/balancing.md.
    let stay = |name: &&String| ["c", "d"].contains(&&***name);
    let moved = rounds[0].iter().zip(&rounds[1]);
    let moved = moved.filter(|(before, now)| stay(before) && stay(now) && before != now);
    assert!(moved.count() <= 6, "{rounds:?}");
    let upper = rounds[1].iter().filter(|name| ["e", "f"].contains(&&***name)).count();
    assert!((5..=35).contains(&upper), "{upper} of 60, 30 % expected");
    proxy.cli_ok(&["undrain", "web/a"]);
    proxy.cli_ok(&["undrain", "web/b"]);
    seen(&mut rounds);
    assert_eq!(rounds[3], rounds[0]);
}

// === on_recover ===

/// A primary and a backup that echo, behind a pool with these keys. The primary is drained.
struct Site {
    backends: [ScriptedBackend; 2],
    proxy: TestProxy,
}

impl Site {
    fn start(engine: Engine, keys: &str) -> Site {
        let backends = [(); 2].map(|()| ScriptedBackend::start(backend::echo()));
        let pool = Pool::new("web").key(keys).backend("a", backends[0].address()).backend_with(
            "b",
            backends[1].address(),
            "backup = true",
        );
        let conf = Conf::simple(engine, pool).process("drain_timeout = \"60s\"");
        let site = Site { backends, proxy: TestProxy::start(conf) };
        site.leave();
        site
    }

    /// Takes the primary out of rotation.
    fn leave(&self) {
        self.proxy.cli_ok(&["drain", "web/a"]);
    }

    fn come_back(&self) {
        self.proxy.cli_ok(&["undrain", "web/a"]);
    }

    /// A session of the backup.
    fn session(&self) -> TcpStream {
        let before = self.backends[1].accepted();
        let client = connect(self.proxy.addr("web"));
        echoes(&client);
        assert_eq!(self.backends[1].accepted(), before + 1, "a session of the backup");
        client
    }
}

fn sessions_of_a_backup_are_closed_in_order_after_the_primary_returned(engine: Engine) {
    const SESSIONS: usize = 20;
    let site = Site::start(engine, "on_recover = \"close-after 3s\"");
    let clients: Vec<TcpStream> = (0..SESSIONS).map(|_| site.session()).collect();
    std::thread::sleep(ms(3500));
    clients.iter().for_each(echoes);
    let began = Instant::now();
    site.come_back();
    let text = words(&site.proxy.cli_ok(&["explain", "web/b"]));
    assert!(text.contains("its open sessions are closed in"), "{text}");
    for client in &clients {
        let end = client::read_to_end(client);
        assert!(matches!(end, End::Fin(0)), "{end:?}");
    }
    let took = began.elapsed();
    assert!(took > ms(2900) && took < patience(secs(6)), "closed after {took:?}");
    for line in site.proxy.wait_access_log(SESSIONS) {
        let found = (&line["cause"], &line["phase"], &line["code"], &line["timer"]);
        assert_eq!(
            found,
            (&"backup-released".into(), &"data".into(), &"UD".into(), &"on_recover".into()),
            "{line:#}"
        );
        assert_eq!(line["bytes_undelivered"], 0, "{line:#}");
    }
    assert!(site.proxy.log().contains("sessions closed because of on_recover"));
    let later = connect(site.proxy.addr("web"));
    echoes(&later);
    eventually(secs(5), "no session of the backup", || site.backends[1].active() == 0);
    assert_eq!(site.backends[0].active(), 1);
}

fn return_that_is_taken_back_in_time_keeps_the_sessions(engine: Engine) {
    let site = Site::start(engine, "on_recover = \"close-after 4s\"");
    let client = site.session();
    for _ in 0..3 {
        site.come_back();
        site.leave();
    }
    std::thread::sleep(ms(5000));
    echoes(&client);
    let began = Instant::now();
    site.come_back();
    assert!(matches!(client::read_to_end(&client), End::Fin(_)));
    assert!(began.elapsed() > ms(3900), "the time begins again: {:?}", began.elapsed());
}

fn sessions_of_the_process_before_an_upgrade_are_closed_too(engine: Engine) {
    let mut site = Site::start(engine, "on_recover = \"close-after 500ms\"");
    let client = site.session();
    site.proxy.cli_ok(&["upgrade"]);
    site.proxy.find_serving();
    echoes(&client);
    site.come_back();
    assert!(matches!(client::read_to_end(&client), End::Fin(_)));
    assert_eq!(site.proxy.wait_access_log(1)[0]["cause"], "backup-released");
    echoes(&connect(site.proxy.addr("web")));
}

fn backups_keep_their_sessions_by_default(engine: Engine) {
    let mut site = Site::start(engine, "");
    let client = site.session();
    site.come_back();
    std::thread::sleep(ms(500));
    echoes(&client);
    // The time begins with the reload.
    let mut conf = site.proxy.conf();
    conf.pool_mut("web").keys = "on_recover = \"close-after 300ms\"\n".into();
    site.proxy.reload(conf);
    assert!(matches!(client::read_to_end(&client), End::Fin(_)));
    assert_eq!(site.proxy.wait_access_log(1)[0]["cause"], "backup-released");
}
