//! Tests of the registration, with real etcd nodes.

use super::etcd::EtcdRegistrar;
use super::*;
use crate::resolver::Resolver;
use crate::testing::etcd::{EtcdCluster, eventually, is_installed};
use std::sync::mpsc;
use tidegate_core::model::{DnsConfig, RegistryConfig, RegistryKind, ServerAddr};
use tokio::sync::oneshot;

const PREFIX: &str = "/tidegate/services/web/";
const KEY: &str = "/tidegate/services/web/a";

/// A registration that a thread keeps.
struct KeptService {
    health: watch::Sender<ServiceHealth>,
    notes: mpsc::Receiver<RegisterNote>,
    stop: oneshot::Sender<()>,
    thread: std::thread::JoinHandle<bool>,
}

// === impl KeptService ===

impl KeptService {
    fn start(cluster: &EtcdCluster, on_down: WhenDown) -> KeptService {
        KeptService::start_for(cluster, on_down, TTL_MIN)
    }

    fn start_for(cluster: &EtcdCluster, on_down: WhenDown, ttl: Duration) -> KeptService {
        let registrar = EtcdRegistrar::new(
            &registry(cluster),
            Resolver::new(DnsConfig::default()),
            PREFIX,
            "a",
        );
        let registration = Registration {
            service: "web".to_owned(),
            id: "a".to_owned(),
            address: "10.0.0.1:80".parse().unwrap(),
            weight: Some(3),
            labels: [("zone".to_owned(), "b".to_owned())].into(),
            ttl,
            on_down,
        };
        let (health, checked) = watch::channel(ServiceHealth::Unknown);
        let (stop, stopped) = oneshot::channel::<()>();
        let (sent, notes) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let stop = async {
                    let _ = stopped.await;
                };
                let mut note = |note| drop(sent.send(note));
                keep(registrar, &registration, checked, stop, &mut note).await
            })
        });
        KeptService { health, notes, stop, thread }
    }

    /// Waits for a note, and returns those before it.
    fn wait_for(&self, wanted: RegisterNote) -> Vec<RegisterNote> {
        let mut before = Vec::new();
        loop {
            let note = self.next();
            if note == wanted {
                return before;
            }
            before.push(note);
        }
    }

    fn next(&self) -> RegisterNote {
        self.notes.recv_timeout(Duration::from_secs(60)).unwrap()
    }

    fn stop(self) -> bool {
        self.stop.send(()).unwrap();
        self.thread.join().unwrap()
    }
}

fn registry(cluster: &EtcdCluster) -> RegistryConfig {
    RegistryConfig {
        name: "main".into(),
        kind: RegistryKind::Etcd,
        servers: cluster.servers().into_iter().map(ServerAddr::Ip).collect(),
        timeout: Duration::from_secs(1),
        tls: None,
        token_file: None,
        user: None,
        password_file: None,
        kubeconfig: None,
    }
}

const UP: RegisterNote = RegisterNote::Announced(RegisteredState::Ready);

#[test]
fn service_is_registered_while_it_is_up_and_removed_at_the_end() {
    if !is_installed() {
        return;
    }
    let cluster = EtcdCluster::start(1);
    let kept = KeptService::start(&cluster, WhenDown::Mark);
    clock::pause(Duration::from_millis(300));
    assert_eq!(cluster.get(KEY), None);
    kept.health.send(ServiceHealth::Up).unwrap();
    kept.wait_for(UP);
    let value = r#"{"address":"10.0.0.1:80","weight":3,"state":"ready","labels":{"zone":"b"}}"#;
    assert_eq!(cluster.get(KEY).as_deref(), Some(value));
    // Longer than the TTL.
    clock::pause(TTL_MIN + TTL_MIN / 2);
    assert_eq!(cluster.get(KEY).as_deref(), Some(value));
    kept.health.send(ServiceHealth::Down).unwrap();
    kept.wait_for(RegisterNote::Announced(RegisteredState::Critical));
    assert_eq!(cluster.get(KEY).unwrap(), value.replace("ready", "critical"));
    kept.health.send(ServiceHealth::Up).unwrap();
    kept.wait_for(UP);
    assert!(kept.stop());
    assert_eq!(cluster.get(KEY), None);
}

#[test]
fn service_that_is_down_is_removed_if_asked() {
    if !is_installed() {
        return;
    }
    let cluster = EtcdCluster::start(1);
    let kept = KeptService::start(&cluster, WhenDown::Remove);
    kept.health.send(ServiceHealth::Up).unwrap();
    kept.wait_for(UP);
    kept.health.send(ServiceHealth::Down).unwrap();
    kept.wait_for(RegisterNote::Removed);
    assert_eq!(cluster.get(KEY), None);
    kept.health.send(ServiceHealth::Up).unwrap();
    kept.wait_for(UP);
    assert!(kept.stop());
    assert_eq!(cluster.get(KEY), None);
}

#[test]
fn lost_key_and_lost_lease_are_created_again() {
    if !is_installed() {
        return;
    }
    let cluster = EtcdCluster::start(1);
    let kept = KeptService::start(&cluster, WhenDown::Mark);
    kept.health.send(ServiceHealth::Up).unwrap();
    kept.wait_for(UP);
    cluster.delete(KEY);
    kept.wait_for(RegisterNote::Lost);
    kept.wait_for(UP);
    assert!(cluster.get(KEY).is_some());
    let lease = cluster.lease_of(KEY).unwrap();
    cluster.ask("/v3/lease/revoke", &format!("{{\"ID\":\"{lease}\"}}"));
    assert_eq!(cluster.get(KEY), None);
    kept.wait_for(RegisterNote::Lost);
    kept.wait_for(UP);
    assert!(cluster.get(KEY).is_some());
    assert!(kept.stop());
}

#[test]
fn registration_survives_an_outage_of_the_registry() {
    if !is_installed() {
        return;
    }
    let mut cluster = EtcdCluster::start(3);
    // A renewal every 2 s, and 4 s until a late one is too late.
    let ttl = 2 * TTL_MIN;
    let kept = KeptService::start_for(&cluster, WhenDown::Mark, ttl);
    kept.health.send(ServiceHealth::Up).unwrap();
    kept.wait_for(UP);
    (0..3).for_each(|node| cluster.kill(node));
    assert!(matches!(kept.next(), RegisterNote::Failed(_)));
    (0..3).for_each(|node| cluster.start_node(node));
    // A slow restart can outlast the lease, which is then created again.
    kept.wait_for(RegisterNote::Recovered);
    let limit = Duration::from_secs(60);
    let registered = || cluster.get(KEY).map(drop);
    eventually("the key after the outage", limit, registered);
    kept.notes.try_iter().for_each(drop);
    // Without one node nothing is lost. Each pause is longer than the time between renewals.
    for node in 0..3 {
        cluster.pause(node);
        clock::pause(ttl / 3 + Duration::from_millis(500));
        eventually("the key without a node", limit, registered);
        cluster.resume(node);
        cluster.wait_until_healthy();
    }
    let notes: Vec<RegisterNote> = kept.notes.try_iter().collect();
    assert!(!notes.contains(&RegisterNote::Lost), "{notes:?}");
    // The removal fails while the registry is away, and the lease ends later.
    (0..3).for_each(|node| cluster.pause(node));
    assert!(!kept.stop());
    (0..3).for_each(|node| cluster.resume(node));
    eventually("the end of the lease", limit, || cluster.get(KEY).is_none().then_some(()));
}
