//! Registration in Consul against the double.

use super::*;
use crate::register::{RegisterNote, ServiceHealth, TTL_MIN, WhenDown, keep};
use crate::testing::consul::{ConsulDouble, ConsulFault, DoubleRights};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use tidegate_core::model::{RegistryKind, ServerAddr};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

/// A registration that a task keeps.
struct KeptAtDouble {
    health: watch::Sender<ServiceHealth>,
    notes: mpsc::UnboundedReceiver<RegisterNote>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<bool>,
    reader: ConsulClient,
}

fn registry(double: &ConsulDouble) -> RegistryConfig {
    RegistryConfig {
        name: "main".into(),
        kind: RegistryKind::Consul,
        servers: vec![ServerAddr::Ip(double.address())],
        timeout: Duration::from_secs(1),
        tls: None,
        token_file: None,
        user: None,
        password_file: None,
        kubeconfig: None,
    }
}

fn resolver() -> Resolver {
    Resolver::new(Default::default())
}

impl KeptAtDouble {
    fn start(double: &ConsulDouble, registry: &RegistryConfig) -> KeptAtDouble {
        let registration = Registration {
            service: "web".to_owned(),
            id: "a/1".to_owned(),
            address: "10.0.0.1:80".parse().unwrap(),
            weight: Some(3),
            labels: [("zone".to_owned(), "b".to_owned())].into(),
            ttl: TTL_MIN,
            on_down: WhenDown::Mark,
        };
        let registrar = ConsulRegistrar::new(registry, resolver());
        let (health, checked) = watch::channel(ServiceHealth::Unknown);
        let (stop, stopped) = oneshot::channel::<()>();
        let (sent, notes) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            let stop = async { drop(stopped.await) };
            let mut note = |note| drop(sent.send(note));
            keep(registrar, &registration, checked, stop, &mut note).await
        });
        let reader = ConsulClient::new(&self::registry(double), resolver());
        KeptAtDouble { health, notes, stop, task, reader }
    }

    async fn wait_for(&mut self, wanted: &str) {
        let waiting = async {
            loop {
                let note = self.notes.recv().await.unwrap().to_string();
                if note.contains(wanted) {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), waiting).await.expect(wanted);
    }

    async fn answer(&self) -> String {
        let path = "/v1/health/service/web".to_owned();
        let body = self.reader.get(path, Duration::ZERO).await.unwrap().body;
        String::from_utf8_lossy(&body).into_owned()
    }

    async fn stop(self) -> bool {
        self.stop.send(()).unwrap();
        self.task.await.unwrap()
    }
}

#[tokio::test]
async fn a_service_is_registered_while_it_is_up_and_deregistered_at_the_end() {
    let double = ConsulDouble::start().unwrap();
    let mut kept = KeptAtDouble::start(&double, &registry(&double));
    kept.health.send(ServiceHealth::Up).unwrap();
    kept.wait_for("registered as ready").await;
    let answer = kept.answer().await;
    for part in [
        r#""ID":"a/1""#,
        r#""Address":"10.0.0.1""#,
        r#""Port":80"#,
        r#""Meta":{"zone":"b"}"#,
        r#""Weights":{"Passing":3,"Warning":1}"#,
        r#""CheckID":"tidegate:a/1""#,
    ] {
        assert!(answer.contains(part), "{part}: {answer}");
    }
    // Longer than the TTL.
    tokio::time::sleep(TTL_MIN + TTL_MIN / 2).await;
    assert!(!kept.answer().await.contains("critical"));
    kept.health.send(ServiceHealth::Down).unwrap();
    kept.wait_for("registered as critical").await;
    assert!(kept.answer().await.contains(r#""Status":"critical""#));
    kept.health.send(ServiceHealth::Up).unwrap();
    kept.wait_for("registered as ready").await;
    assert!(!kept.answer().await.contains("critical"));
    let reader = kept.reader.clone();
    assert!(kept.stop().await);
    let path = "/v1/health/service/web".to_owned();
    assert_eq!(&reader.get(path, Duration::ZERO).await.unwrap().body[..], b"[]");
}

#[tokio::test]
async fn an_agent_that_forgot_the_service_gets_it_again() {
    let double = ConsulDouble::start().unwrap();
    let mut kept = KeptAtDouble::start(&double, &registry(&double));
    kept.health.send(ServiceHealth::Up).unwrap();
    kept.wait_for("registered as ready").await;
    double.restart_empty(1);
    kept.wait_for("lost the registration").await;
    kept.wait_for("registered as ready").await;
    assert!(kept.answer().await.contains(r#""Status":"passing""#));
    assert!(kept.stop().await);
}

#[tokio::test]
async fn the_next_agent_gets_the_service_and_the_first_loses_it_when_it_is_back() {
    let (first, second) = (ConsulDouble::start().unwrap(), ConsulDouble::start().unwrap());
    let servers = vec![ServerAddr::Ip(first.address()), ServerAddr::Ip(second.address())];
    let both = RegistryConfig { servers, ..registry(&first) };
    let mut kept = KeptAtDouble::start(&first, &both);
    kept.health.send(ServiceHealth::Up).unwrap();
    kept.wait_for("registered as ready").await;
    assert!(kept.answer().await.contains("10.0.0.1"));
    first.set_fault(ConsulFault::Reset);
    kept.wait_for("cannot update the registry").await;
    kept.wait_for("registered as ready").await;
    let reader = ConsulClient::new(&registry(&second), resolver());
    let path = || "/v1/health/service/web".to_owned();
    let found = async |reader: &ConsulClient| {
        let body = reader.get(path(), Duration::ZERO).await.unwrap().body;
        String::from_utf8_lossy(&body).contains("10.0.0.1")
    };
    assert!(found(&reader).await);
    first.set_fault(ConsulFault::None);
    let start = tidegate_net::clock::now();
    while found(&kept.reader).await {
        assert!(tidegate_net::clock::now() - start < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(found(&reader).await);
    assert!(kept.stop().await);
    assert!(!found(&reader).await);
}

#[tokio::test]
async fn a_registrar_that_was_killed_leaves_a_critical_service() {
    let double = ConsulDouble::start().unwrap();
    let mut kept = KeptAtDouble::start(&double, &registry(&double));
    kept.health.send(ServiceHealth::Up).unwrap();
    kept.wait_for("registered as ready").await;
    kept.task.abort();
    tokio::time::sleep(TTL_MIN + Duration::from_millis(500)).await;
    assert!(kept.answer().await.contains("TTL expired"));
}

#[tokio::test]
async fn failures_are_reported_once_and_end_nothing() {
    let double = ConsulDouble::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "reader").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    double.create_token("reader", DoubleRights { read: true, write: false });
    double.create_token("writer", DoubleRights { read: true, write: true });
    let registry = RegistryConfig { token_file: Some(file.clone()), ..registry(&double) };
    let mut kept = KeptAtDouble::start(&double, &registry);
    kept.health.send(ServiceHealth::Up).unwrap();
    kept.wait_for("lacks permission 'service:write'").await;
    std::fs::write(&file, "writer").unwrap();
    kept.wait_for("registered as ready").await;
    double.set_fault(ConsulFault::Reset);
    kept.wait_for("cannot update the registry").await;
    double.set_fault(ConsulFault::None);
    kept.wait_for("answers again").await;
    assert!(kept.stop().await);
}
