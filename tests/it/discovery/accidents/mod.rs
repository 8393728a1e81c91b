//! The same accidents for every member source: servers killed, stopped, emptied, restored,
//! without a leader, with other passwords, with wrong answers.
//!
//! Two Tidegate processes, one per engine, ask one registry. Short sessions run through both
//! during every accident. None may fail, and no backend may leave unless the rules of the
//! view say so. After each accident the source announces one more backend, and the time until
//! it serves is the recovery. `scripts/soak --registries` runs all sources at once in one
//! process, with long accidents.

mod consul;
mod dns;
mod driver;
mod etcd;
mod kubernetes;
mod lists;
mod zookeeper;

use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, exclusive, io_uring_runs, patience, secs};
use driver::{Lateness, Members, Outcome};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// What happens to a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Accident {
    /// Every server gets SIGKILL and starts again at the end.
    Killed,
    /// Every server is stopped, as by SIGSTOP: its kernel still accepts and acknowledges.
    Hung,
    /// The members are gone at once, the registry answers.
    Emptied,
    /// All members have other names, and their addresses stay.
    Renamed,
    /// The members are removed one after another.
    RemovedOneByOne,
    /// The registry continues with an old backup, which has one member.
    Restored,
    /// The history since the last answer is gone, and every connection is lost.
    Compacted,
    /// The leader is killed; the others elect another one.
    LeaderKilled,
    /// Most servers are stopped.
    QuorumLost,
    /// The rights of the token or user are revoked, and at the end granted again.
    Revoked,
    /// The token or password is replaced, and at the end also in the file of Tidegate.
    Rotated,
    /// Access is denied with 403.
    Forbidden,
    /// Every answer is an error of the server.
    Failing,
    /// What the source asks for does not exist.
    Missing,
    /// Every answer ends too early.
    HalfAnswer,
    /// Every answer has no content.
    NoContent,
    /// Every answer is an error: the registry has no leader.
    NoLeader,
    /// Empty answers of a server without a leader.
    EmptyWithoutLeader,
    /// Every connection is reset.
    Reset,
    /// The stream of changes stays open, and nothing arrives in it.
    SilentWatch,
}

/// A registry with the members of one pool.
trait MemberRegistry: Send {
    /// Name of the source, its pool and its frontend.
    fn name(&self) -> &'static str;

    /// `[registry]` and `[dns]` tables.
    fn tables(&self) -> String {
        String::new()
    }

    /// Keys of the `discover` table. All members have this port.
    fn discover(&self, port: u16) -> String;

    fn accidents(&self) -> &'static [Accident];

    /// Announces these members and no others, in one step if the registry can.
    fn announce(&mut self, members: &[SocketAddr]);

    /// Makes the backup that [`Accident::Restored`] restores.
    fn back_up(&mut self) {}

    fn begin(&mut self, accident: Accident);

    /// Returns when the registry serves again. The members can be missing until they are
    /// announced.
    fn end(&mut self, accident: Accident);
}

/// The number in the name of a member: the last one of its address.
fn number_of(member: SocketAddr) -> u16 {
    match member.ip() {
        IpAddr::V4(ip) => ip.octets()[3].into(),
        IpAddr::V6(_) => unreachable!("members have IPv4 addresses"),
    }
}

/// Longest time from the return of the registry until a new member serves, on a quiet host.
const RECOVERY_MAX: Duration = secs(5);

/// Time of an accident in the tests.
const HOLD: Duration = secs(2);

/// A registry and the members that it announces.
struct Announcing {
    registry: Box<dyn MemberRegistry>,
    members: Members,
}

impl Announcing {
    /// Starts the members and announces the first ones.
    fn new(mut registry: impl MemberRegistry + 'static) -> Announcing {
        let members = Members::start(driver::STEADY + registry.accidents().len());
        registry.announce(members.first(1));
        registry.back_up();
        registry.announce(members.first(driver::STEADY));
        Announcing { registry: Box::new(registry), members }
    }
}

/// Starts one proxy with a pool for each registry.
fn start_proxy(engine: Engine, registries: &[Announcing], keys: &str) -> TestProxy {
    let mut conf = Conf::new(engine);
    for Announcing { registry, members } in registries {
        let name = registry.name();
        let discover = registry.discover(members.port());
        let discover = format!("{discover}\naddresses = [\"127.0.0.0/8\"]\n{keys}");
        conf = conf.registry(&registry.tables()).frontend(name, name, "");
        conf = conf.pool(Pool::new(name).discover(&discover));
    }
    TestProxy::start(conf)
}

/// Runs every accident of one registry against both engines at once.
#[track_caller]
fn survive(registry: impl MemberRegistry + 'static) {
    let _share = exclusive::shared();
    let mut all = [Announcing::new(registry)];
    let mut engines = vec![Engine::Epoll];
    engines.extend(io_uring_runs().then_some(Engine::IoUring));
    let start = |engine: &Engine| start_proxy(*engine, &all, "");
    let proxies: Vec<TestProxy> = engines.iter().map(start).collect();
    let lateness = Lateness::start();
    let outcomes = driver::run(&mut all[0], &proxies, HOLD);
    let late = lateness.end();
    for outcome in &outcomes {
        outcome.assert_kept(patience(RECOVERY_MAX) + late);
    }
}

#[test]
fn accidents_of_etcd_cost_no_session_and_no_backend() {
    if let Some(registry) = etcd::EtcdRegistry::start() {
        survive(registry);
    }
}

#[test]
fn accidents_of_zookeeper_cost_no_session_and_no_backend() {
    if let Some(registry) = zookeeper::ZookeeperRegistry::start() {
        survive(registry);
    }
}

#[test]
fn accidents_of_consul_cost_no_session_and_no_backend() {
    survive(consul::ConsulRegistry::start());
}

#[test]
fn accidents_of_kubernetes_cost_no_session_and_no_backend() {
    survive(kubernetes::KubernetesRegistry::start());
}

#[test]
fn accidents_of_a_list_at_a_url_cost_no_session_and_no_backend() {
    if let Some(registry) = lists::UrlRegistry::start() {
        survive(registry);
    }
}

#[test]
fn accidents_of_a_list_in_a_file_cost_no_session_and_no_backend() {
    survive(lists::FileRegistry::start());
}

#[test]
fn accidents_of_a_name_server_cost_no_session_and_no_backend() {
    if let Some(registry) = dns::DnsRegistry::start() {
        survive(registry);
    }
}

#[test]
#[ignore = "all accidents at once, minutes to hours; scripts/soak --registries runs it"]
fn every_source_survives_long_accidents_in_one_process() {
    let _share = exclusive::shared();
    let text = std::env::var("TIDEGATE_HOLD").unwrap_or_else(|_| "5s".to_owned());
    let hold = humantime::parse_duration(&text).expect("TIDEGATE_HOLD is a duration");
    let mut all = vec![
        Announcing::new(lists::FileRegistry::start()),
        Announcing::new(kubernetes::KubernetesRegistry::start()),
        Announcing::new(consul::ConsulRegistry::start()),
    ];
    all.extend(etcd::EtcdRegistry::start().map(Announcing::new));
    all.extend(zookeeper::ZookeeperRegistry::start().map(Announcing::new));
    all.extend(lists::UrlRegistry::start().map(Announcing::new));
    all.extend(dns::DnsRegistry::start().map(Announcing::new));
    let engine = if io_uring_runs() { Engine::IoUring } else { Engine::Epoll };
    // An empty answer that lasts is believed, unless the operator decides otherwise.
    let proxies = [start_proxy(engine, &all, "empty = \"keep\"")];
    let lateness = Lateness::start();
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let proxies = &proxies;
        let run = |one| scope.spawn(move || driver::run(one, proxies, hold));
        let threads: Vec<_> = all.iter_mut().map(run).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
    });
    verdict(&outcomes, lateness.end());
}

/// Prints the sums, and fails if a bound was broken.
fn verdict(outcomes: &[Outcome], late: Duration) {
    let failed: u64 = outcomes.iter().map(|outcome| outcome.failed).sum();
    let sessions: u64 = outcomes.iter().map(|outcome| outcome.sessions).sum();
    let lost: usize = outcomes.iter().map(|outcome| outcome.lost.len()).sum();
    let slowest = outcomes.iter().map(|outcome| outcome.recovery).max().unwrap_or_default();
    println!(
        "{} accidents, {sessions} sessions: {failed} failed, {lost} backends lost against the \
         rules, slowest recovery {slowest:.1?} (a thread woke up to {late:.1?} late)",
        outcomes.len()
    );
    for outcome in outcomes {
        outcome.assert_kept(patience(RECOVERY_MAX) + late);
    }
}
