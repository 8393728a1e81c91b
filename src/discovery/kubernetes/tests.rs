//! The source against the double. Each test is an accident.

use super::*;
use crate::resolver::Resolver;
use crate::testing::heard::HeardSource;
use crate::testing::kubernetes::{EndpointDocument, KubernetesDouble, SliceDocument};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use tidegate_core::discovery::Wish;
use tidegate_core::model::{DnsConfig, RegistryConfig, RegistryKind, ServerAddr};

/// Short times; a list of its own only where a test wants one.
const TIMES: WatchTimes =
    WatchTimes { silence: Duration::from_secs(60), relist: Duration::from_secs(600) };

fn registry(double: &KubernetesDouble) -> RegistryConfig {
    RegistryConfig {
        name: "main".into(),
        kind: RegistryKind::Kubernetes,
        servers: vec![ServerAddr::Ip(double.address())],
        timeout: Duration::from_secs(2),
        tls: None,
        token_file: None,
        user: None,
        password_file: None,
        kubeconfig: None,
    }
}

fn ask_with(registry: RegistryConfig, times: WatchTimes) -> HeardSource {
    let access = KubernetesAccess::new(registry.into(), Resolver::new(DnsConfig::default()));
    let (service, namespace) = ("web".into(), Some("shop".into()));
    let question = ServiceQuestion { service, namespace, port: Some("http".into()) };
    HeardSource::start(|teller| run(question, access, times, teller))
}

fn ask(double: &KubernetesDouble) -> HeardSource {
    ask_with(registry(double), TIMES)
}

async fn double() -> KubernetesDouble {
    KubernetesDouble::start(None).await.unwrap()
}

fn slice(name: &str, pods: &[u16]) -> SliceDocument {
    let endpoints = pods.iter().map(|pod| EndpointDocument::ready(*pod)).collect();
    SliceDocument::new("shop", "web", name, endpoints)
}

fn secret(file: &Path, text: &str) {
    std::fs::write(file, text).unwrap();
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// The requests for lists since the last call. A check of the version is none.
fn lists(double: &KubernetesDouble) -> usize {
    let requests = double.take_requests();
    requests.iter().filter(|request| request.contains("limit=100")).count()
}

/// Waits until a watch is open.
async fn watched(double: &KubernetesDouble) {
    while !double.take_requests().iter().any(|request| request.contains("watch=true")) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn pods_come_drain_and_leave() {
    let double = double().await;
    double.put(slice("a", &[1]));
    let mut heard = ask(&double);
    heard.names(&["web-1"]).await;
    assert_eq!(heard.members[0].address.to_string(), "10.1.1.1:8080");
    double.put(slice("a", &[1, 2]));
    eprintln!("a new pod was told after {:?}", heard.names(&["web-1", "web-2"]).await);
    let ready = EndpointDocument::ready(1);
    let (leaving, starting) = (
        EndpointDocument::terminating(2),
        EndpointDocument::with_conditions(3, Some(false), Some(false), Some(false)),
    );
    let unknown = EndpointDocument::with_conditions(4, None, None, None);
    let all = vec![ready, leaving, starting, unknown];
    double.put(SliceDocument::new("shop", "web", "a", all));
    heard.names(&["web-1", "web-2", "web-4"]).await;
    let wishes: Vec<Wish> = heard.members.iter().map(|member| member.wish).collect();
    assert_eq!(wishes, [Wish::Sessions, Wish::Draining, Wish::Sessions]);
    double.put(slice("a", &[1]));
    eprintln!("a removal was told after {:?}", heard.names(&["web-1"]).await);
    // Slices of other services and namespaces are not asked for.
    double.put(SliceDocument::new("shop", "db", "d", vec![EndpointDocument::ready(9)]));
    double.put(SliceDocument::new("other", "web", "o", vec![EndpointDocument::ready(8)]));
    double.put(slice("b", &[5]));
    heard.names(&["web-1", "web-5"]).await;
    assert!(heard.failures.is_empty(), "{:?}", heard.failures);
}

#[tokio::test]
async fn an_endpoint_that_moves_between_slices_is_in_every_set() {
    let double = double().await;
    double.put(slice("a", &[1, 2]));
    double.put(slice("b", &[3]));
    let mut heard = ask(&double);
    heard.names(&["web-1", "web-2", "web-3"]).await;
    let sets = heard.sets;
    for _ in 0..10 {
        double.put(slice("a", &[1]));
        tokio::time::sleep(Duration::from_millis(20)).await;
        double.put(slice("b", &[2, 3]));
        double.put(slice("a", &[1, 2]));
        tokio::time::sleep(Duration::from_millis(20)).await;
        double.put(slice("b", &[3]));
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    heard.take();
    assert_eq!((heard.sets, heard.members.len()), (sets, 3));
}

#[tokio::test]
async fn a_lost_history_is_listed_again_and_removes_nothing() {
    let double = double().await;
    for by_status in [false, true] {
        double.script(|faults| faults.gone_by_status = by_status);
        double.put(slice("a", &[1]));
        let mut heard = ask(&double);
        heard.names(&["web-1"]).await;
        watched(&double).await;
        double.compact();
        double.close_watches();
        let (why, detail) = heard.next_failure().await;
        assert_eq!(why, SourceFailure::Compacted);
        assert!(detail.contains("too old resource version"), "{detail}");
        double.put(slice("a", &[1, 2]));
        heard.names(&["web-1", "web-2"]).await;
        assert_eq!(heard.sets, 2, "the list after 410 changed nothing");
    }
}

#[tokio::test]
async fn a_bookmark_saves_the_list_after_a_lost_history() {
    let double = double().await;
    double.script(|faults| faults.bookmark = Duration::from_millis(50));
    double.put(slice("a", &[1]));
    let mut heard = ask(&double);
    heard.names(&["web-1"]).await;
    watched(&double).await;
    // Writes of other services move the version on.
    double.put(SliceDocument::new("shop", "db", "d", Vec::new()));
    double.compact();
    tokio::time::sleep(Duration::from_millis(300)).await;
    lists(&double);
    double.close_watches();
    double.put(slice("a", &[1, 2]));
    heard.names(&["web-1", "web-2"]).await;
    assert_eq!(lists(&double), 0);
    assert!(heard.failures.is_empty(), "{:?}", heard.failures);
}

#[tokio::test]
async fn a_closed_watch_continues_after_the_last_version() {
    let double = double().await;
    double.put(slice("a", &[1]));
    let mut heard = ask(&double);
    heard.names(&["web-1"]).await;
    watched(&double).await;
    lists(&double);
    double.close_watches();
    // Written while no watch is open.
    double.put(slice("a", &[1, 2]));
    double.put(slice("b", &[3]));
    heard.names(&["web-1", "web-2", "web-3"]).await;
    assert_eq!(lists(&double), 0);
    // A line that ends in the middle is no event.
    double.script(|faults| faults.half_events = 1);
    double.put(slice("b", &[3, 4]));
    heard.names(&["web-1", "web-2", "web-3", "web-4"]).await;
    assert!(heard.counters.watch_restarts.load(Ordering::Relaxed) >= 2);
}

#[tokio::test]
async fn a_silent_watch_is_replaced() {
    let double = double().await;
    double.put(slice("a", &[1]));
    double.script(|faults| faults.silent = true);
    let times = WatchTimes { silence: Duration::from_millis(500), ..TIMES };
    let mut heard = ask_with(registry(&double), times);
    heard.names(&["web-1"]).await;
    double.put(slice("a", &[1, 2]));
    let told = heard.names(&["web-1", "web-2"]).await;
    assert_eq!(heard.failures[0].0, SourceFailure::Timeout, "{:?}", heard.failures);
    eprintln!("a change was told {told:?} after it, with 500 ms of silence");
}

#[tokio::test]
async fn everything_is_listed_again_at_an_age() {
    let double = double().await;
    double.put(slice("a", &[1]));
    double.script(|faults| {
        faults.silent = true;
        faults.bookmark = Duration::from_millis(50);
    });
    let times = WatchTimes { relist: Duration::from_millis(700), ..TIMES };
    let mut heard = ask_with(registry(&double), times);
    heard.names(&["web-1"]).await;
    double.put(slice("a", &[1, 2]));
    heard.names(&["web-1", "web-2"]).await;
    assert!(heard.failures.is_empty(), "{:?}", heard.failures);
    assert!(heard.counters.relists.load(Ordering::Relaxed) >= 1);
}

#[tokio::test]
async fn a_rotated_token_needs_no_restart_and_a_rejected_one_removes_nothing() {
    let double = double().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    secret(&file, "first\n");
    double.script(|faults| faults.token = "first".into());
    double.put(slice("a", &[1]));
    let mut settings = registry(&double);
    settings.token_file = Some(file.clone());
    let mut heard = ask_with(settings, TIMES);
    heard.names(&["web-1"]).await;
    watched(&double).await;
    double.script(|faults| faults.token = "second".into());
    double.close_watches();
    let (why, detail) = heard.next_failure().await;
    assert_eq!(why, SourceFailure::Auth);
    assert!(detail.contains("401") && !detail.contains("first"), "{detail}");
    double.put(slice("a", &[1, 2]));
    secret(&file, "second");
    let recovered = heard.names(&["web-1", "web-2"]).await;
    eprintln!("a rotated token was used after {recovered:?}");
    assert!(recovered < Duration::from_secs(6));

    double.script(|faults| faults.forbidden = "shop".into());
    double.close_watches();
    let (why, detail) = heard.next_failure().await;
    assert_eq!(why, SourceFailure::Auth);
    assert!(detail.contains("403") && detail.contains("forbidden"), "{detail}");
    assert_eq!((heard.sets, heard.members.len()), (2, 2));
}

#[tokio::test]
async fn a_service_without_slices_is_a_failure_and_one_without_pods_is_empty() {
    let double = double().await;
    let mut heard = ask(&double);
    let (why, detail) = heard.next_failure().await;
    assert_eq!(why, SourceFailure::NotFound);
    assert!(detail.contains("does not exist"), "{detail}");
    double.put(slice("a", &[1]));
    heard.names(&["web-1"]).await;
    watched(&double).await;
    double.delete("shop", "a");
    assert_eq!(heard.next_failure().await.0, SourceFailure::NotFound);
    assert_eq!(heard.members.len(), 1);
    double.put(slice("a", &[]));
    heard.until("empty", |heard| heard.members.is_empty()).await;
}

#[tokio::test]
async fn failures_of_the_server_and_a_restored_backup_keep_the_members() {
    let double = double().await;
    double.put(slice("a", &[1]));
    double.put(slice("b", &[2]));
    let mut heard = ask(&double);
    heard.names(&["web-1", "web-2"]).await;
    watched(&double).await;
    double.script(|faults| faults.refuse = [500, 429, 503].into());
    double.close_watches();
    assert_eq!(heard.next_failure().await.0, SourceFailure::Protocol);
    double.put(slice("b", &[2, 3]));
    let recovered = heard.names(&["web-1", "web-2", "web-3"]).await;
    assert!(recovered < Duration::from_secs(6), "{recovered:?}");
    watched(&double).await;
    double.restore(50);
    double.put(slice("a", &[1]));
    heard
        .until("stale", |heard| {
            heard.failures.iter().any(|failure| failure.0 == SourceFailure::Stale)
        })
        .await;
    heard.names(&["web-1"]).await;
}

#[tokio::test]
async fn lists_come_in_pages_and_one_change_of_10_000_endpoints_is_cheap() {
    let double = double().await;
    let pods = |slice: u16| Vec::from_iter(slice * 80..slice * 80 + 80);
    for number in 0..125 {
        double.put(slice(&format!("web-{number:03}"), &pods(number)));
    }
    let mut heard = ask(&double);
    let told = heard.until("all", |heard| heard.members.len() == 10_000).await;
    assert_eq!(lists(&double), 2);
    eprintln!("10,000 endpoints in 125 slices were told after {told:?}");
    assert!(told < Duration::from_secs(5));
    double.put(slice("web-007", &pods(7)[1..]));
    let kept = heard.sets;
    let told = heard.until("one fewer", |heard| heard.members.len() == 9_999).await;
    eprintln!("one removal of 10,000 was told after {told:?}");
    assert_eq!(heard.sets, kept + 1);
    double.put(slice("web-007", &pods(7)));
    let told = heard.until("one more", |heard| heard.members.len() == 10_000).await;
    eprintln!("one of 10,000 was told after {told:?}");
    assert!(told < Duration::from_secs(1));
}

#[tokio::test]
async fn a_kubeconfig_with_its_certificates_inside_is_enough() {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let double = KubernetesDouble::start(Some(Arc::new(config).into())).await.unwrap();
    double.script(|faults| faults.token = "inline".into());
    double.put(slice("a", &[1]));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kubeconfig");
    let ca = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, made.cert.pem());
    let text = |token: &str| {
        format!(
            "current-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u, \
             namespace: shop}}}}]\nclusters: [{{name: k, cluster: {{server: 'https://{}', \
             certificate-authority-data: {ca}}}}}]\nusers: [{{name: u, user: {{token: {token}}}}}]\n",
            double.address()
        )
    };
    secret(&file, &text("wrong"));
    let mut settings = registry(&double);
    settings.servers.clear();
    settings.kubeconfig = Some(file.clone());
    let access = KubernetesAccess::new(settings.into(), Resolver::new(DnsConfig::default()));
    let question = ServiceQuestion { service: "web".into(), namespace: None, port: None };
    let mut heard = HeardSource::start(|teller| run(question, access, TIMES, teller));
    assert_eq!(heard.next_failure().await.0, SourceFailure::Auth);
    secret(&file, &text("inline"));
    heard.names(&["web-1"]).await;
}
