//! Backends whose address is a name: A and SRV records of a real dnsmasq, under load.
//!
//! The backends listen on one port of several loopback addresses, so that one name has
//! several of them.

use super::load::Load;
use crate::common::backend::{self, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, ms, on_every_engine, secs};
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};
use tidegate_discovery::testing::dnsmasq::Dnsmasq;

on_every_engine!(
    addresses_of_a_name_are_members_and_changes_are_followed,
    name_server_that_is_killed_or_hangs_costs_no_session,
    start_without_a_name_server_takes_at_most_two_seconds,
    name_that_vanishes_leaves_after_hold_nxdomain,
    drain_of_a_name_takes_all_its_members,
    srv_records_have_ports_weights_and_backups,
    check_resolve_prints_the_members_of_a_name,
);

/// Backends at 127.0.0.11, 127.0.0.12 and so on, at one port. Each answers with its last
/// number.
pub(super) struct NamedSite {
    pub(super) port: u16,
    _backends: Vec<ScriptedBackend>,
}

// === impl NamedSite ===

impl NamedSite {
    pub(super) fn start(count: u8) -> NamedSite {
        let start = |port: u16, number: u8| {
            let address = SocketAddr::from(([127, 0, 0, 11 + number], port));
            ScriptedBackend::start_on(address, backend::name(&(11 + number).to_string()))
        };
        let port = free_port();
        NamedSite { port, _backends: (0..count).map(|number| start(port, number)).collect() }
    }

    pub(super) fn member(&self, number: u8) -> String {
        format!("pg@127.0.0.{number}:{}", self.port)
    }

    fn proxy(&self, engine: Engine, dns: &Dnsmasq, keys: &str) -> TestProxy {
        TestProxy::start(self.conf(engine, dns, keys))
    }

    fn conf(&self, engine: Engine, dns: &Dnsmasq, keys: &str) -> Conf {
        let pool = Pool::new("web").backend("pg", format!("db.example:{}", self.port));
        Conf::simple(engine, pool).registry(&table(dns, keys))
    }
}

/// No further arguments of the name server.
const NONE: &[&str] = &[];

/// `[dns]` with this server.
fn table(dns: &Dnsmasq, keys: &str) -> String {
    format!("[dns]\nservers = [\"{}\"]\n{keys}", dns.address())
}

/// Lines of a hosts file: these addresses of `db.example`.
fn hosts(numbers: &[u8]) -> String {
    numbers.iter().map(|number| format!("127.0.0.{number} db.example\n")).collect()
}

/// Returns the names of the eligible backends of `web`, sorted.
pub(super) fn eligible(proxy: &TestProxy) -> Vec<String> {
    let status = proxy.status();
    let backends = status["pools"][0]["backends"].as_array().expect("backends");
    let backends = backends.iter().filter(|backend| backend["eligible"] == true);
    let mut names: Vec<String> =
        backends.map(|backend| backend["name"].as_str().expect("a name").to_owned()).collect();
    names.sort();
    names
}

#[track_caller]
pub(super) fn wait_for(proxy: &TestProxy, names: &[String]) {
    eventually(secs(15), &format!("{names:?} serve"), || eligible(proxy) == names);
}

fn addresses_of_a_name_are_members_and_changes_are_followed(engine: Engine) {
    let site = NamedSite::start(3);
    let Some(dns) = Dnsmasq::start(&hosts(&[11, 12]), 1, NONE) else { return };
    let proxy = site.proxy(engine, &dns, "");
    wait_for(&proxy, &[site.member(11), site.member(12)]);
    let load = Load::start(proxy.addr("web"));
    let changed = Instant::now();
    dns.change(&hosts(&[12, 13]));
    wait_for(&proxy, &[site.member(12), site.member(13)]);
    assert!(changed.elapsed() < Duration::from_secs(10), "{:?}", changed.elapsed());
    let explained = proxy.explained("web", &site.member(13));
    assert_eq!(explained["announced"][0]["from"]["backend"], "pg", "{explained}");
    eventually(secs(5), "the newcomer serves", || load.report().of("13") > 0);
    load.end();
}

fn name_server_that_is_killed_or_hangs_costs_no_session(engine: Engine) {
    let site = NamedSite::start(2);
    let Some(mut dns) = Dnsmasq::start(&hosts(&[11, 12]), 1, NONE) else { return };
    let proxy = site.proxy(engine, &dns, "");
    let both = [site.member(11), site.member(12)];
    wait_for(&proxy, &both);
    let load = Load::start(proxy.addr("web"));
    let source = || proxy.status()["pools"][0]["sources"][0].clone();
    dns.kill();
    eventually(secs(15), "the failure is shown", || !source()["last_word"]["failure"].is_null());
    dns.start_again();
    eventually(secs(6), "it answers again", || source()["last_word"]["failure"].is_null());
    dns.pause();
    eventually(secs(15), "the timeout is shown", || source()["last_word"]["failure"] == "timeout");
    assert_eq!(eligible(&proxy), both);
    dns.resume();
    eventually(secs(6), "it answers again", || source()["last_word"]["failure"].is_null());
    assert_eq!(eligible(&proxy), both);
    load.end();
}

fn start_without_a_name_server_takes_at_most_two_seconds(engine: Engine) {
    let site = NamedSite::start(1);
    let Some(mut dns) = Dnsmasq::start(&hosts(&[11]), 1, NONE) else { return };
    dns.kill();
    let fixed = ScriptedBackend::start(backend::name("fixed"));
    let mut conf = site.conf(engine, &dns, "");
    let pool = conf.pool_mut("web");
    *pool = pool.clone().backend("fixed", fixed.address());
    let began = Instant::now();
    let proxy = TestProxy::start(conf);
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    let load = Load::start(proxy.addr("web"));
    eventually(secs(5), "the other backend serves", || load.report().of("fixed") > 10);
    dns.start_again();
    eventually(secs(10), "the name serves as well", || load.report().of("11") > 10);
    load.end();
}

fn name_that_vanishes_leaves_after_hold_nxdomain(engine: Engine) {
    let site = NamedSite::start(1);
    let Some(dns) = Dnsmasq::start(&hosts(&[11]), 1, NONE) else { return };
    let fixed = ScriptedBackend::start(backend::name("fixed"));
    let mut conf = site.conf(engine, &dns, "hold_nxdomain = \"3s\"");
    let pool = conf.pool_mut("web");
    *pool = pool.clone().backend("fixed", fixed.address());
    let proxy = TestProxy::start(conf);
    let both = ["fixed".to_owned(), site.member(11)];
    wait_for(&proxy, &both);
    let load = Load::start(proxy.addr("web"));
    dns.change("");
    let gone = Instant::now();
    wait_for(&proxy, &both[..1]);
    assert!(gone.elapsed() >= ms(2500), "believed after {:?}", gone.elapsed());
    dns.change(&hosts(&[11]));
    wait_for(&proxy, &both);
    load.end();
}

fn drain_of_a_name_takes_all_its_members(engine: Engine) {
    let site = NamedSite::start(3);
    let Some(dns) = Dnsmasq::start(&hosts(&[11, 12]), 1, NONE) else { return };
    let fixed = ScriptedBackend::start(backend::name("fixed"));
    let mut conf = site.conf(engine, &dns, "");
    let pool = conf.pool_mut("web");
    *pool = pool.clone().backend("fixed", fixed.address());
    let proxy = TestProxy::start(conf);
    wait_for(&proxy, &["fixed".to_owned(), site.member(11), site.member(12)]);
    proxy.cli_ok(&["drain", "web/pg"]);
    wait_for(&proxy, &["fixed".to_owned()]);
    dns.change(&hosts(&[11, 12, 13]));
    eventually(secs(10), "the newcomer is drained, too", || {
        let status = proxy.status();
        let backends = status["pools"][0]["backends"].as_array().expect("backends");
        let found = backends.iter().find(|backend| backend["name"] == site.member(13).as_str());
        found.is_some_and(|backend| backend["intent"] == "draining")
    });
    proxy.cli_ok(&["undrain", &format!("web/{}", site.member(12))]);
    wait_for(&proxy, &["fixed".to_owned(), site.member(12)]);
    proxy.cli_ok(&["undrain", "web/pg"]);
    let all = [11, 12, 13].map(|number| site.member(number));
    wait_for(&proxy, &[&["fixed".to_owned()], &all[..]].concat());
}

fn srv_records_have_ports_weights_and_backups(engine: Engine) {
    let site = NamedSite::start(3);
    let port = site.port;
    let srv = |target: &str, priority: u16, weight: u16| {
        format!("--srv-host=_pg._tcp.example,{target}.example,{port},{priority},{weight}")
    };
    let targets = "127.0.0.11 a.example\n127.0.0.12 b.example\n127.0.0.13 c.example\n";
    let records = [srv("a", 10, 30), srv("b", 10, 10), srv("c", 20, 10)];
    let Some(dns) = Dnsmasq::start(targets, 1, &records) else { return };
    let pool = Pool::new("web").backend("pg", "srv:_pg._tcp.example");
    let conf = Conf::simple(engine, pool).registry(&table(&dns, ""));
    let proxy = TestProxy::start(conf);
    wait_for(&proxy, &[site.member(11), site.member(12), site.member(13)]);
    let (a, b) = (proxy.backend("web", &site.member(11)), proxy.backend("web", &site.member(12)));
    let weight = |backend: &serde_json::Value| backend["weight"].as_u64().expect("a weight");
    assert_eq!(weight(&a), 3 * weight(&b), "{a} {b}");
    assert_eq!(proxy.backend("web", &site.member(13))["backup"], true);
}

fn check_resolve_prints_the_members_of_a_name(engine: Engine) {
    let site = NamedSite::start(1);
    let Some(mut dns) = Dnsmasq::start(&hosts(&[11]), 1, NONE) else { return };
    let proxy = site.proxy(engine, &dns, "");
    let config = proxy.config_path().display().to_string();
    let check = || {
        let program = env!("CARGO_BIN_EXE_tidegate");
        Command::new(program).args(["check", "--resolve", &config]).output().expect("a program")
    };
    let output = check();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains(&format!("127.0.0.11:{}", site.port)), "{text}");
    dns.kill();
    let output = check();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(text.contains("NO ANSWER"), "{text}");
}
