//! The source against the double, with every fault that the double can play.

use super::*;
use crate::resolver::Resolver;
use crate::tell::{Answers, SourceCounters};
use crate::testing::consul::{ConsulDouble, ConsulFault, DoubleRights};
use crate::testing::is_long;
use std::os::unix::fs::PermissionsExt;
use tidegate_core::discovery::Wish;
use tidegate_core::model::{RegistryConfig, RegistryKind, ServerAddr, SourceKey};

/// A pace at which the tests wait for little.
const QUICK: ConsulPace = ConsulPace {
    wait: Duration::from_secs(2),
    watchful_wait: Duration::from_secs(1),
    first_wait: Duration::from_millis(500),
    unchanged: Duration::from_millis(200),
    changed: Duration::from_millis(20),
};

/// A source that runs against a double, and what it told.
struct Watched {
    answers: Answers,
    counters: Arc<SourceCounters>,
    task: tokio::task::JoinHandle<Infallible>,
    /// The set that a view without guards against removal by untrusted answers has.
    names: Vec<String>,
    last: Option<WholeSet>,
    failure: Option<(SourceFailure, String)>,
    alive: u32,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn registry(double: &ConsulDouble, timeout: Duration) -> RegistryConfig {
    RegistryConfig {
        name: "main".into(),
        kind: RegistryKind::Consul,
        servers: vec![ServerAddr::Ip(double.address())],
        timeout,
        tls: None,
        token_file: None,
        user: None,
        password_file: None,
        kubeconfig: None,
    }
}

fn query(tags: &[&str]) -> RegistryQuery {
    RegistryQuery::Consul {
        service: "web".into(),
        tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        datacenter: None,
        namespace: None,
        filter: None,
        max_stale: Duration::from_secs(10),
    }
}

fn watch(registry: &RegistryConfig, query: RegistryQuery, pace: ConsulPace) -> Watched {
    let (answers, counters) = (Answers::default(), Arc::<SourceCounters>::default());
    let key = SourceKey { pool: "web".into(), backend: None };
    let teller = answers.teller(key, Arc::clone(&counters));
    let client = ConsulClient::new(registry, Resolver::new(Default::default()));
    let task = tokio::spawn(run_at(query, client, pace, teller));
    let (names, last, failure) = (Vec::new(), None, None);
    Watched { answers, counters, task, names, last, failure, alive: 0 }
}

fn watch_quick(double: &ConsulDouble) -> Watched {
    watch(&registry(double, Duration::from_secs(1)), query(&[]), QUICK)
}

impl Watched {
    /// Takes what was told.
    fn take(&mut self) {
        for answer in self.answers.take() {
            match answer.told {
                Told::Whole(set) => {
                    let names = set.members.iter().map(|member| member.name.to_string());
                    let mut names: Vec<String> = names.collect();
                    if !set.trusted {
                        names.append(&mut self.names);
                        names.sort();
                        names.dedup();
                    }
                    (self.names, self.last, self.failure) = (names, Some(set), None);
                }
                Told::Failed { why, detail } => self.failure = Some((why, detail)),
                Told::Alive => self.alive += 1,
            }
        }
    }

    async fn until(&mut self, what: &str, mut holds: impl FnMut(&Watched) -> bool) {
        let deadline = clock::now() + Duration::from_secs(20);
        loop {
            self.take();
            if holds(self) {
                return;
            }
            let left = deadline.saturating_duration_since(clock::now());
            assert!(!left.is_zero(), "not {what}: {:?} {:?}", self.names, self.failure);
            let step = left.min(Duration::from_millis(100));
            let _ = tokio::time::timeout(step, self.answers.arrived()).await;
        }
    }

    async fn until_names(&mut self, names: &[&str]) {
        self.until(&format!("{names:?}"), |watched| watched.names == names).await;
    }

    async fn until_failed(&mut self, why: SourceFailure) {
        self.until(why.name(), |watched| watched.failure.as_ref().is_some_and(|f| f.0 == why))
            .await;
    }
}

/// Sends a request to the double and expects success.
async fn put(double: &ConsulDouble, path: &str, body: &str) {
    let client = ConsulClient::new(
        &registry(double, Duration::from_secs(5)),
        Resolver::new(Default::default()),
    );
    client.put(path.to_owned(), body.to_owned().into()).await.unwrap();
}

async fn register(double: &ConsulDouble, id: &str) {
    let port: u16 = 1000 + id.bytes().map(u16::from).sum::<u16>();
    let body = format!(r#"{{"ID":"{id}","Name":"web","Address":"10.0.0.1","Port":{port}}}"#);
    put(double, "/v1/agent/service/register", &body).await;
}

async fn deregister(double: &ConsulDouble, id: &str) {
    put(double, &format!("/v1/agent/service/deregister/{id}"), "").await;
}

#[tokio::test]
async fn instances_come_change_and_go() {
    let double = ConsulDouble::start().unwrap();
    register(&double, "a").await;
    let mut watched = watch_quick(&double);
    watched.until_names(&["a"]).await;
    register(&double, "b").await;
    watched.until_names(&["a", "b"]).await;
    let ttl = r#"{"ID":"b","Name":"web","Address":"10.0.0.2","Port":7,
        "Weights":{"Passing":5,"Warning":3},"Check":{"TTL":"60s","Status":"passing"}}"#;
    put(&double, "/v1/agent/service/register", ttl).await;
    let told = |watched: &Watched, wish, weight, raw: &str| {
        watched.last.as_ref().is_some_and(|set| {
            set.members.iter().any(|member| {
                (member.wish, member.weight, &*member.raw) == (wish, Some(weight), raw)
            })
        })
    };
    watched.until("changed", |w| told(w, Wish::Sessions, 5, "passing")).await;
    put(&double, "/v1/agent/check/warn/service:b", "").await;
    watched.until("warning", |w| told(w, Wish::Sessions, 3, "warning")).await;
    put(&double, "/v1/agent/check/fail/service:b", "").await;
    watched.until("critical", |w| told(w, Wish::Critical, 5, "critical")).await;
    put(&double, "/v1/agent/service/maintenance/b?enable=true", "").await;
    watched.until("maintenance", |w| told(w, Wish::Draining, 5, "maintenance")).await;
    put(&double, "/v1/agent/service/maintenance/b?enable=false", "").await;
    put(&double, "/v1/agent/check/pass/service:b", "").await;
    watched.until("back", |w| told(w, Wish::Sessions, 5, "passing")).await;
    deregister(&double, "a").await;
    watched.until_names(&["b"]).await;
    deregister(&double, "b").await;
    watched.until_names(&[]).await;
    assert!(watched.last.as_ref().unwrap().trusted);
    assert_eq!(watched.failure, None);
}

#[tokio::test]
async fn every_tag_must_be_present() {
    let double = ConsulDouble::start().unwrap();
    for (id, tags) in [("one", r#""v1""#), ("both", r#""v1","blue""#)] {
        let body = format!(r#"{{"ID":"{id}","Name":"web","Port":1,"Tags":[{tags}]}}"#);
        put(&double, "/v1/agent/service/register", &body).await;
    }
    let registry = registry(&double, Duration::from_secs(1));
    let mut both = watch(&registry, query(&["v1", "blue"]), QUICK);
    both.until_names(&["both"]).await;
    let mut all = watch(&registry, query(&[]), QUICK);
    all.until_names(&["both", "one"]).await;
}

#[tokio::test]
async fn an_agent_without_a_leader_removes_no_instance() {
    let double = ConsulDouble::start().unwrap();
    register(&double, "a").await;
    let mut watched = watch_quick(&double);
    watched.until_names(&["a"]).await;
    for fault in [ConsulFault::EmptyWithoutLeader, ConsulFault::NoLeader] {
        double.set_fault(fault);
        let why = match fault {
            ConsulFault::NoLeader => SourceFailure::Protocol,
            _ => SourceFailure::Stale,
        };
        watched.until_failed(why).await;
        assert_eq!(watched.names, ["a"]);
        double.set_fault(ConsulFault::None);
        watched.until("back", |watched| watched.failure.is_none()).await;
        assert_eq!(watched.names, ["a"]);
    }
}

#[tokio::test]
async fn old_data_can_add_an_instance_but_removes_none() {
    let double = ConsulDouble::start().unwrap();
    register(&double, "a").await;
    let mut watched = watch_quick(&double);
    watched.until_names(&["a"]).await;
    double.set_last_contact(Duration::from_secs(11));
    deregister(&double, "a").await;
    register(&double, "b").await;
    watched.until_names(&["a", "b"]).await;
    assert!(!watched.last.as_ref().unwrap().trusted);
    double.set_last_contact(Duration::ZERO);
    watched.until_names(&["b"]).await;
}

#[tokio::test]
async fn an_index_that_goes_back_loses_no_change() {
    let double = ConsulDouble::start().unwrap();
    for id in ["a", "b", "c"] {
        register(&double, id).await;
    }
    let mut watched = watch_quick(&double);
    watched.until_names(&["a", "b", "c"]).await;
    double.restart_indexes(2);
    register(&double, "d").await;
    watched.until_names(&["a", "b", "c", "d"]).await;
    assert!(watched.counters.watch_restarts.load(Ordering::Relaxed) >= 1);
    double.restart_empty(3);
    register(&double, "e").await;
    watched.until_names(&["e"]).await;
}

#[tokio::test]
async fn servers_restored_between_two_queries_delay_no_change_by_a_whole_wait() {
    let double = ConsulDouble::start().unwrap();
    for id in ["a", "b", "c"] {
        register(&double, id).await;
    }
    // The next query follows 1 s after the answer, and has an index above the server's.
    let gap = Duration::from_secs(1);
    let pace = ConsulPace { wait: Duration::from_secs(30), changed: gap, ..QUICK };
    let mut watched = watch(&registry(&double, Duration::from_secs(1)), query(&[]), pace);
    watched.until_names(&["a", "b", "c"]).await;
    double.restart_indexes(2);
    tokio::time::sleep(gap + Duration::from_millis(100)).await;
    let began = clock::now();
    register(&double, "d").await;
    watched.until_names(&["a", "b", "c", "d"]).await;
    let took = clock::now() - began;
    assert!(took < Duration::from_secs(10), "{took:?}");
}

#[tokio::test]
async fn an_index_of_zero_causes_no_busy_loop() {
    let double = ConsulDouble::start().unwrap();
    register(&double, "a").await;
    double.set_fault(ConsulFault::IndexZero);
    let mut watched = watch_quick(&double);
    watched.until_names(&["a"]).await;
    let before = double.requests().len();
    tokio::time::sleep(Duration::from_secs(1)).await;
    // One query per 200 ms, and one that finds the index lower than 1.
    let asked = double.requests().len() - before;
    assert!(asked <= 14, "{asked} queries in 1 s");
    register(&double, "b").await;
    watched.until_names(&["a", "b"]).await;
}

#[tokio::test]
async fn a_revoked_token_is_a_failure_until_its_file_is_replaced() {
    let double = ConsulDouble::start().unwrap();
    register(&double, "a").await;
    let (dir, rights) = (tempfile::tempdir().unwrap(), DoubleRights { read: true, write: true });
    let file = dir.path().join("token");
    let write = |token: &str| {
        std::fs::write(&file, token).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    };
    double.create_token("first", rights);
    write("first");
    let mut registry = registry(&double, Duration::from_secs(1));
    registry.token_file = Some(file.clone());
    let mut watched = watch(&registry, query(&[]), QUICK);
    watched.until_names(&["a"]).await;
    double.revoke_token("first");
    watched.until_failed(SourceFailure::Auth).await;
    let detail = watched.failure.clone().unwrap().1;
    assert!(detail.contains("ACL not found") && !detail.contains("first"), "{detail}");
    assert_eq!(watched.names, ["a"]);
    double.create_token("second", rights);
    write("second");
    let replaced = clock::now();
    watched.until("back", |watched| watched.failure.is_none()).await;
    assert!(clock::now().duration_since(replaced) < Duration::from_secs(5));
    std::fs::remove_file(&file).unwrap();
    double.close_connections();
    watched.until_failed(SourceFailure::Local).await;
    assert_eq!(watched.names, ["a"]);
}

#[tokio::test]
async fn a_token_without_rights_is_a_failure_and_no_empty_service() {
    let double = ConsulDouble::start().unwrap();
    register(&double, "a").await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "blind").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    double.create_token("blind", DoubleRights::default());
    let mut registry = registry(&double, Duration::from_secs(1));
    let mut anonymous = watch(&registry, query(&[]), QUICK);
    anonymous.until("answered", |watched| watched.last.is_some()).await;
    assert!(!anonymous.last.as_ref().unwrap().trusted);
    registry.token_file = Some(file);
    let mut watched = watch(&registry, query(&[]), QUICK);
    watched.until_failed(SourceFailure::Auth).await;
    assert_eq!(watched.last, None);
}

#[tokio::test]
async fn broken_answers_are_failures_and_the_next_whole_one_counts() {
    let double = ConsulDouble::start().unwrap();
    register(&double, "a").await;
    let mut watched = watch_quick(&double);
    watched.until_names(&["a"]).await;
    let faults = [
        (ConsulFault::HalfAnswer, SourceFailure::Connect),
        (ConsulFault::Reset, SourceFailure::Connect),
        (ConsulFault::Status(500), SourceFailure::Protocol),
        (ConsulFault::Status(403), SourceFailure::Auth),
        (ConsulFault::Status(404), SourceFailure::NotFound),
        (ConsulFault::SlowDrip(Duration::from_millis(50)), SourceFailure::Timeout),
    ];
    for (fault, why) in faults {
        double.set_fault(fault);
        double.close_connections();
        watched.until_failed(why).await;
        assert_eq!(watched.names, ["a"], "{fault:?}");
        let over = clock::now();
        double.set_fault(ConsulFault::None);
        watched.until("back", |watched| watched.failure.is_none()).await;
        let back = clock::now().duration_since(over);
        assert!(back < Duration::from_secs(5), "{fault:?}: {back:?}");
    }
}

#[tokio::test]
async fn a_hung_agent_fails_after_the_deadline_and_is_asked_again_within_5_s() {
    let double = ConsulDouble::start().unwrap();
    register(&double, "a").await;
    let mut watched = watch_quick(&double);
    watched.until_names(&["a"]).await;
    double.set_fault(ConsulFault::Hang);
    let hung = clock::now();
    watched.until_failed(SourceFailure::Timeout).await;
    let noticed = clock::now().duration_since(hung);
    // Wait, its sixteenth, the timeout, and 1 s for a slow machine.
    assert!(noticed < Duration::from_millis(2000 + 125 + 1000 + 1000), "{noticed:?}");
    assert_eq!(watched.names, ["a"]);
    let over = clock::now();
    double.set_fault(ConsulFault::None);
    watched.until("back", |watched| watched.failure.is_none()).await;
    assert!(clock::now().duration_since(over) < Duration::from_secs(5));
}

#[tokio::test]
async fn a_quiet_service_is_reported_alive_after_each_wait() {
    let double = ConsulDouble::start().unwrap();
    register(&double, "a").await;
    let mut watched = watch_quick(&double);
    watched.until("alive twice", |watched| watched.alive >= 2).await;
    // Writes to another service do not end the wait.
    let before = double.requests().len();
    let body = r#"{"Name":"other","Port":1}"#;
    put(&double, "/v1/agent/service/register", body).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(double.requests().len() - before <= 2);
    assert_eq!(watched.names, ["a"]);
}

#[tokio::test]
async fn a_host_name_is_resolved_and_an_unknown_one_removes_no_instance() {
    let double = ConsulDouble::start().unwrap();
    let named = |id: &str, host: &str| {
        format!(r#"{{"ID":"{id}","Name":"web","Address":"{host}","Port":80}}"#)
    };
    put(&double, "/v1/agent/service/register", &named("local", "localhost")).await;
    let mut watched = watch_quick(&double);
    watched.until_names(&["local"]).await;
    let set = watched.last.clone().unwrap();
    assert!(set.members[0].address.ip().is_loopback() && set.trusted);
    put(&double, "/v1/agent/service/register", &named("odd", "does-not-exist.invalid")).await;
    watched.until("untrusted", |w| w.last.as_ref().is_some_and(|set| !set.trusted)).await;
    assert_eq!(
        (watched.last.as_ref().unwrap().unreadable.count(), &*watched.names),
        (1, &["local".to_owned()][..])
    );
}

/// Measures; figures are printed with `--nocapture`.
mod quiet {
    use super::*;

    #[tokio::test]
    async fn a_change_arrives_within_400_ms() {
        let double = ConsulDouble::start().unwrap();
        let mut watched =
            watch(&registry(&double, Duration::from_secs(5)), query(&[]), ConsulPace::default());
        watched.until("answered", |watched| watched.last.is_some()).await;
        let mut times = Vec::new();
        let trials = if is_long() { 100 } else { 20 };
        for trial in 0..trials {
            let id = format!("i{trial}");
            for present in [true, false] {
                let start = clock::now();
                if present {
                    register(&double, &id).await;
                } else {
                    deregister(&double, &id).await;
                }
                watched.until("changed", |watched| watched.names.contains(&id) == present).await;
                times.push(clock::now().duration_since(start));
            }
        }
        times.sort();
        let (median, p99, max) = (times[trials], times[trials * 197 / 100], times[trials * 2 - 1]);
        println!("{} changes: median {median:.1?}, p99 {p99:.1?}, max {max:.1?}", times.len());
        assert!(p99 < Duration::from_millis(400), "{p99:?}");
    }

    #[tokio::test]
    async fn ten_thousand_instances_arrive_as_one_set() {
        let double = ConsulDouble::start().unwrap();
        double.fill("web", 10_000);
        let start = clock::now();
        let mut watched =
            watch(&registry(&double, Duration::from_secs(20)), query(&[]), ConsulPace::default());
        watched.until("10,000", |watched| watched.names.len() == 10_000).await;
        println!("10,000 instances after {:.0?}", clock::now().duration_since(start));
        let start = clock::now();
        register(&double, "one").await;
        watched
            .until("one", |w| w.last.as_ref().is_some_and(|set| set.unreadable.count() == 1))
            .await;
        println!("one more after {:.0?}", clock::now().duration_since(start));
        let fill = clock::now();
        let body = whole_answer(&double).await;
        let parse = clock::now();
        let answer = read_health(&body).unwrap();
        println!(
            "{} bytes, fetched in {:.0?}, parsed in {:.0?}",
            body.len(),
            parse.duration_since(fill),
            clock::now().duration_since(parse)
        );
        assert_eq!(answer.instances.len(), 10_000);
    }

    async fn whole_answer(double: &ConsulDouble) -> bytes::Bytes {
        let client = ConsulClient::new(
            &registry(double, Duration::from_secs(20)),
            Resolver::new(Default::default()),
        );
        let path = "/v1/health/service/web".to_owned();
        client.get(path, Duration::ZERO).await.unwrap().body
    }
}
