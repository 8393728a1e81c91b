//! Registries that fail under load: a real etcd of three nodes, a real ZooKeeper, and a
//! Consul double.
//!
//! Each test runs short sessions during every accident, and at the end checks that none
//! failed, that no backend was lost, and that a change is seen again without a restart.

use super::load::{Load, NamedBackends};
use crate::common::conf::{Conf, Pool};
use crate::common::http;
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, on_every_engine, secs};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};
use tidegate_discovery::testing::consul::{ConsulDouble, ConsulFault, DoubleRights};
use tidegate_discovery::testing::etcd::{self, EtcdCluster};

on_every_engine!(
    etcd_accidents_cost_no_session_and_no_backend,
    etcd_restored_from_a_backup_costs_no_session,
    consul_accidents_cost_no_session_and_no_backend,
    start_without_a_registry_serves_from_the_state_directory,
);

/// Time in which a registry that is back must be followed again.
const RECOVERY: Duration = Duration::from_secs(5);

/// A proxy whose pool `web` has the members of a registry.
struct RegistrySite {
    backends: NamedBackends,
    proxy: TestProxy,
}

// === impl RegistrySite ===

impl RegistrySite {
    fn start(engine: Engine, registry: &str, question: &str, process: &str) -> RegistrySite {
        let pool = Pool::new("web").discover(&format!(
            "from = \"main\"\n{question}\naddresses = [\"127.0.0.0/8\"]\nconfirm_after = \"2s\""
        ));
        let conf = Conf::simple(engine, pool)
            .registry(&format!("[registry.main]\ntimeout = \"2s\"\n{registry}"))
            .process(process);
        RegistrySite { backends: NamedBackends::start(4), proxy: TestProxy::start(conf) }
    }

    fn eligible(&self) -> usize {
        let status = self.proxy.status();
        let backends = status["pools"][0]["backends"].as_array().cloned().unwrap_or_default();
        backends.iter().filter(|backend| backend["eligible"] == true).count()
    }

    #[track_caller]
    fn wait_for(&self, count: usize) {
        eventually(secs(15), &format!("{count} backends serve"), || self.eligible() == count);
    }

    fn source(&self) -> serde_json::Value {
        self.proxy.status()["pools"][0]["sources"][0].clone()
    }

    /// Waits until `status` says why the source does not answer.
    #[track_caller]
    fn wait_for_failure(&self, what: &str) {
        eventually(secs(15), &format!("{what} is shown"), || {
            !self.source()["last_word"]["failure"].is_null()
        });
    }

    /// Waits until the source answers again, and checks the time and the backends.
    #[track_caller]
    fn wait_for_recovery(&self, what: &str, backends: usize) {
        let began = Instant::now();
        eventually(secs(15), &format!("recovery after: {what}"), || {
            self.source()["last_word"]["failure"].is_null()
        });
        let took = began.elapsed();
        assert!(took <= crate::common::patience(RECOVERY), "{what}: recovery after {took:?}");
        assert_eq!(self.eligible(), backends, "{what}");
    }
}

/// The value of a backend in etcd.
fn entry(address: SocketAddr) -> String {
    format!("{{\"address\":\"{address}\"}}")
}

fn key(number: usize) -> String {
    format!("/services/web/{number}")
}

fn etcd_site(engine: Engine, cluster: &EtcdCluster) -> RegistrySite {
    let servers: Vec<String> =
        cluster.servers().iter().map(|server| format!("\"{server}\"")).collect();
    let registry = format!("kind = \"etcd\"\nservers = [{}]", servers.join(", "));
    RegistrySite::start(engine, &registry, "prefix = \"/services/web/\"", "")
}

fn put(cluster: &EtcdCluster, site: &RegistrySite, numbers: &[usize]) -> i64 {
    let mut revision = 0;
    for number in numbers {
        revision = cluster.put(&key(*number), &entry(site.backends.address(*number)));
    }
    revision
}

fn etcd_accidents_cost_no_session_and_no_backend(engine: Engine) {
    if !etcd::is_installed() {
        return;
    }
    let mut cluster = EtcdCluster::start(3);
    let site = etcd_site(engine, &cluster);
    let revision = put(&cluster, &site, &[0, 1, 2]);
    site.wait_for(3);
    let load = Load::start(site.proxy.addr("web"));

    let leader = cluster.leader();
    cluster.kill(leader);
    eventually(secs(15), "the others elect a leader", || {
        put(&cluster, &site, &[3]);
        site.eligible() == 4
    });
    cluster.start_node(leader);
    cluster.wait_until_healthy();

    cluster.pause(0);
    cluster.pause(1);
    site.wait_for_failure("the lost quorum");
    assert_eq!(site.eligible(), 4);
    cluster.resume(0);
    cluster.resume(1);
    cluster.wait_until_healthy();
    site.wait_for_recovery("lost quorum", 4);

    cluster.compact(revision);
    // One after another, they are half of the backends and one more.
    [3, 2, 1].iter().for_each(|number| cluster.delete(&key(*number)));
    eventually(secs(15), "the third deletion is held", || {
        site.source()["held_answer"]["reason"] == "max-removed" && site.eligible() == 2
    });
    load.end();
}

fn etcd_restored_from_a_backup_costs_no_session(engine: Engine) {
    if !etcd::is_installed() {
        return;
    }
    let mut cluster = EtcdCluster::start(1);
    let site = etcd_site(engine, &cluster);
    put(&cluster, &site, &[0]);
    cluster.back_up("old");
    put(&cluster, &site, &[1, 2]);
    site.wait_for(3);
    let load = Load::start(site.proxy.addr("web"));
    // The backup knows one of three backends and has an older revision.
    cluster.restore("old");
    std::thread::sleep(secs(6));
    assert_eq!(site.eligible(), 3, "{}", site.source());
    put(&cluster, &site, &[1, 2, 3]);
    site.wait_for(4);
    load.end();
}

fn register(double: &ConsulDouble, number: usize, address: SocketAddr) {
    register_with_tag(double, number, address, "none");
}

fn register_with_tag(double: &ConsulDouble, number: usize, address: SocketAddr, tag: &str) {
    let body = format!(
        "{{\"ID\":\"web-{number}\",\"Name\":\"web\",\"Address\":\"{}\",\"Port\":{},\
         \"Tags\":[\"{tag}\"]}}",
        address.ip(),
        address.port()
    );
    request(double, "/v1/agent/service/register", &body);
}

fn deregister(double: &ConsulDouble, number: usize) {
    request(double, &format!("/v1/agent/service/deregister/web-{number}"), "");
}

/// Sends a PUT with the token `operator` and checks the answer.
#[track_caller]
fn request(double: &ConsulDouble, path: &str, body: &str) {
    let mut stream = TcpStream::connect(double.address()).expect("the double listens");
    write!(
        stream,
        "PUT {path} HTTP/1.1\r\nHost: consul\r\nX-Consul-Token: operator\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
}

fn consul_accidents_cost_no_session_and_no_backend(engine: Engine) {
    let double = ConsulDouble::start().expect("the double starts");
    double.create_token("operator", DoubleRights { read: true, write: true });
    double.create_token("reader", DoubleRights { read: true, write: false });
    let dir = tempfile::tempdir().expect("temp dir");
    let token = dir.path().join("token");
    write_secret(&token, "reader");
    let registry = format!(
        "kind = \"consul\"\nservers = [\"{}\"]\ntoken_file = \"{}\"",
        double.address(),
        token.display()
    );
    let site = RegistrySite::start(engine, &registry, "service = \"web\"", "");
    (0..3).for_each(|number| register(&double, number, site.backends.address(number)));
    site.wait_for(3);
    let load = Load::start(site.proxy.addr("web"));
    let faults = [
        ConsulFault::NoLeader,
        ConsulFault::EmptyWithoutLeader,
        ConsulFault::Status(500),
        ConsulFault::HalfAnswer,
        ConsulFault::Reset,
    ];
    for fault in faults {
        double.set_fault(fault);
        double.close_connections();
        if fault == ConsulFault::Reset {
            eventually(secs(15), "a reset is shown", || {
                double.close_connections();
                !site.source()["last_word"]["failure"].is_null()
            });
        } else {
            // A change ends the waiting query, so that it gets the faulty answer.
            register_with_tag(&double, 0, site.backends.address(0), &format!("{fault:?}"));
            site.wait_for_failure(&format!("{fault:?}"));
        }
        assert_eq!(site.eligible(), 3, "{fault:?}");
        double.set_fault(ConsulFault::None);
        site.wait_for_recovery(&format!("{fault:?}"), 3);
    }

    double.revoke_token("reader");
    double.close_connections();
    site.wait_for_failure("the revoked token");
    double.create_token("rotated", DoubleRights { read: true, write: false });
    write_secret(&token, "rotated");
    site.wait_for_recovery("revoked token", 3);

    register(&double, 3, site.backends.address(3));
    site.wait_for(4);
    deregister(&double, 0);
    site.wait_for(3);
    load.end();
}

fn write_secret(path: &std::path::Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, text).expect("a writable directory");
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&fresh, mode).expect("a mode");
    std::fs::rename(fresh, path).expect("a rename");
}

fn start_without_a_registry_serves_from_the_state_directory(engine: Engine) {
    let double = ConsulDouble::start().expect("the double starts");
    let dir = tempfile::tempdir().expect("temp dir");
    let state = format!("state = \"{}\"", dir.path().join("state").display());
    let registry = format!("kind = \"consul\"\nservers = [\"{}\"]", double.address());
    let mut site = RegistrySite::start(engine, &registry, "service = \"web\"", &state);
    (0..2).for_each(|number| register(&double, number, site.backends.address(number)));
    site.wait_for(2);
    let saved = dir.path().join("state/views.json");
    eventually(secs(5), "both are saved", || {
        let text = std::fs::read_to_string(&saved).unwrap_or_default();
        text.contains("web-0") && text.contains("web-1")
    });
    drop(double);
    site.proxy.restart();
    let ready = http::over_unix(&socket(&site.proxy), "GET", "/ready").expect("an answer");
    assert_eq!(ready.status, 200);
    let load = Load::start(site.proxy.addr("web"));
    site.wait_for(2);
    site.wait_for_failure("the missing registry");
    load.end();
}

fn socket(proxy: &TestProxy) -> std::path::PathBuf {
    proxy.admin().trim_start_matches("unix:").into()
}
