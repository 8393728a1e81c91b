//! The source against a real server. Each test is an accident.

use super::session::{ZkProblem, ZkSession};
use super::wire::ZkRequest;
use super::*;
use crate::resolver::Resolver;
use crate::testing::heard::HeardSource;
use crate::testing::zookeeper::ZookeeperServer;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use tempfile::TempDir;
use tidegate_core::discovery::Wish;
use tidegate_core::model::{DnsConfig, RegistryConfig, RegistryKind, ServerAddr};
use tidegate_net::clock;

pub(super) fn registry(servers: &[SocketAddr]) -> RegistryConfig {
    RegistryConfig {
        name: "main".into(),
        kind: RegistryKind::Zookeeper,
        servers: servers.iter().map(|address| ServerAddr::Ip(*address)).collect(),
        timeout: Duration::from_secs(2),
        tls: None,
        token_file: None,
        user: None,
        password_file: None,
        kubeconfig: None,
    }
}

fn open(registry: RegistryConfig) -> ZkSession {
    ZkSession::open(registry.into(), Resolver::new(DnsConfig::default()))
}

pub(super) fn ask(registry: RegistryConfig, path: &str, format: ZookeeperFormat) -> HeardSource {
    let session = open(registry);
    HeardSource::start(|teller| run(session, path.into(), format, teller))
}

async fn put(client: &ZkSession, path: &str, data: &str, ephemeral: bool) {
    let (path, data) = (path.to_owned(), data.as_bytes().to_vec());
    client.call(ZkRequest::Create { path, data, ephemeral, owned: false }).await.unwrap();
}

async fn change(client: &ZkSession, path: &str, data: &str) {
    let (path, data) = (path.to_owned(), data.as_bytes().to_vec());
    client.call(ZkRequest::SetData { path, data }).await.unwrap();
}

async fn delete(client: &ZkSession, path: &str) {
    client.call(ZkRequest::Delete { path: path.to_owned() }).await.unwrap();
}

fn at(number: u16) -> String {
    format!(r#"{{"address":"10.0.{}.{}:80"}}"#, number / 200, number % 200 + 1)
}

fn server() -> Option<(TempDir, ZookeeperServer)> {
    if !ZookeeperServer::is_available() {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let server = ZookeeperServer::start(dir.path());
    Some((dir, server))
}

#[tokio::test]
async fn members_come_change_and_leave_and_a_missing_node_is_a_failure() {
    let Some((_dir, server)) = server() else { return };
    let client = open(registry(&[server.address()]));
    let mut asked = ask(registry(&[server.address()]), "/web", ZookeeperFormat::Json);
    asked.until("a failure", |asked| !asked.failures.is_empty()).await;
    assert_eq!(asked.failures[0], (SourceFailure::NotFound, "node /web does not exist".into()));
    put(&client, "/web", "", false).await;
    asked.until("an empty set", |asked| asked.sets == 1).await;

    put(&client, "/web/a", &at(1), false).await;
    eprintln!("a new child was told after {:?}", asked.names(&["a"]).await);
    let service = ZkSession::with_timeout(
        registry(&[server.address()]).into(),
        Resolver::new(DnsConfig::default()),
        Duration::from_secs(1),
    );
    put(&service, "/web/e", &at(2), true).await;
    eprintln!("an ephemeral child was told after {:?}", asked.names(&["a", "e"]).await);
    change(&client, "/web/a", r#"{"address":"10.0.0.9:80","weight":7}"#).await;
    asked.until("the weight", |asked| asked.members[0].weight == Some(7)).await;
    // The end of the session deletes the node.
    drop(service);
    eprintln!("its end was told after {:?}", asked.names(&["a"]).await);
    change(&client, "/web/a", "not JSON").await;
    asked.until("unreadable", |asked| asked.unreadable == 1 && asked.members.is_empty()).await;
    assert_eq!(asked.unread_keys, ["a"]);

    // A vanished node is no empty set.
    change(&client, "/web/a", &at(1)).await;
    asked.names(&["a"]).await;
    delete(&client, "/web/a").await;
    put(&client, "/web/b", &at(3), false).await;
    asked.names(&["b"]).await;
    let failures = asked.failures.len();
    delete(&client, "/web/b").await;
    delete(&client, "/web").await;
    asked.until("a failure", |asked| asked.failures.len() > failures).await;
    put(&client, "/web", "", false).await;
    put(&client, "/web/c", &at(3), false).await;
    asked.names(&["c"]).await;
    // A silent client loses its ephemeral nodes after its session timeout, not before.
    assert!(server.ask("stat").unwrap().contains("Mode: standalone"));
}

#[tokio::test]
async fn a_deleted_child_does_not_delay_the_next_change() {
    let Some((_dir, server)) = server() else { return };
    let client = open(registry(&[server.address()]));
    put(&client, "/web", "", false).await;
    put(&client, "/web/a", &at(1), false).await;
    let mut asked = ask(registry(&[server.address()]), "/web", ZookeeperFormat::Json);
    asked.names(&["a"]).await;
    for _ in 0..10 {
        put(&client, "/web/b", &at(2), false).await;
        let told = asked.names(&["a", "b"]).await;
        assert!(told < Duration::from_millis(700), "a new child was told after {told:?}");
        sleep(Duration::from_millis(150)).await;
        delete(&client, "/web/b").await;
        asked.names(&["a"]).await;
        sleep(Duration::from_millis(150)).await;
    }
}

#[tokio::test]
async fn ten_thousand_children_are_listed_in_time_and_one_change_costs_one_read() {
    let Some((_dir, server)) = server() else { return };
    let client = open(registry(&[server.address()]));
    put(&client, "/big", "", false).await;
    for first in (0..10_000).step_by(500) {
        let create = |number: u16| ZkRequest::Create {
            path: format!("/big/member-{number:05}"),
            data: at(number).into_bytes(),
            ephemeral: false,
            owned: false,
        };
        let created = client.call_all((first..first + 500).map(create)).await;
        assert!(created.iter().all(Result::is_ok));
    }
    let mut asked = ask(registry(&[server.address()]), "/big", ZookeeperFormat::Json);
    let listed = asked.until("10,000", |asked| asked.members.len() == 10_000).await;
    eprintln!("10,000 children were told after {listed:?}");
    assert!(listed < Duration::from_secs(10));
    let received = packets_received(&server);
    change(&client, "/big/member-05000", r#"{"address":"10.9.9.9:80"}"#).await;
    let told = asked
        .until("one change", |asked| asked.members[5000].address.to_string() == "10.9.9.9:80")
        .await;
    eprintln!("one change of 10,000 was told after {told:?}");
    let requests = packets_received(&server) - received;
    assert!(requests < 20, "{requests} requests for one change");
    put(&client, "/big/zz-beyond", &at(1), false).await;
    asked.until("the bound", |asked| asked.unreadable == 1).await;
    assert_eq!(asked.members.len(), 10_000);
}

fn packets_received(server: &ZookeeperServer) -> u64 {
    let stat = server.ask("srvr").unwrap();
    let line = stat.lines().find_map(|line| line.strip_prefix("Received: "));
    line.unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_killed_and_a_stopped_server_remove_nothing_and_need_no_restart() {
    let Some((_dir, mut server)) = server() else { return };
    let client = open(registry(&[server.address()]));
    put(&client, "/web", "", false).await;
    put(&client, "/web/a", &at(1), false).await;
    let mut asked = ask(registry(&[server.address()]), "/web", ZookeeperFormat::Json);
    asked.names(&["a"]).await;

    server.kill();
    asked.until("the failure", |asked| asked.failures.len() > 2).await;
    assert_eq!(asked.failures[0].0, SourceFailure::Connect, "{:?}", asked.failures);
    server.restart();
    let client = open(registry(&[server.address()]));
    put(&client, "/web/b", &at(2), false).await;
    let recovered = asked.names(&["a", "b"]).await;
    eprintln!("a change after a restart was told after {recovered:?}");
    assert!(recovered < Duration::from_secs(6));
    assert_eq!(asked.sets, 2, "the restart changed no member");

    // Longer than the session timeout of 10 s that this server grants.
    let failures = asked.failures.len();
    server.stop();
    asked.until("silence", |asked| asked.failures.len() > failures).await;
    assert_eq!(asked.failures[failures].0, SourceFailure::Timeout, "{:?}", asked.failures);
    sleep(Duration::from_secs(6)).await;
    server.resume();
    let client = open(registry(&[server.address()]));
    put(&client, "/web/c", &at(3), false).await;
    let recovered = asked.names(&["a", "b", "c"]).await;
    eprintln!("a change after a stop was told after {recovered:?}");
    assert!(recovered < Duration::from_secs(6));
    assert!(asked.counters.watch_restarts.load(Ordering::Relaxed) >= 2);
}

#[tokio::test]
async fn the_next_server_is_asked_and_a_restored_backup_is_no_order() {
    let Some((dir, mut server)) = server() else { return };
    let client = open(registry(&[server.address()]));
    put(&client, "/web", "", false).await;
    put(&client, "/web/a", &at(1), false).await;
    // Nothing listens at the first address.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let servers = registry(&[closed, server.address()]);
    let mut asked = ask(servers, "/web", ZookeeperFormat::Json);
    asked.names(&["a"]).await;
    server.kill();
    copy(&server.data(), &dir.path().join("backup"));
    server.restart();
    let client = open(registry(&[server.address()]));
    for number in 0..20 {
        put(&client, &format!("/web/b{number:02}"), &at(number + 2), false).await;
    }
    asked.until("all", |asked| asked.members.len() == 21).await;
    let failures = asked.failures.len();
    server.kill();
    std::fs::remove_dir_all(server.data()).unwrap();
    copy(&dir.path().join("backup"), &server.data());
    server.restart();
    asked.until("the old set", |asked| asked.members.len() == 1).await;
    let stale = |failure: &(SourceFailure, String)| failure.0 == SourceFailure::Stale;
    assert!(asked.failures[failures..].iter().any(stale), "{:?}", asked.failures);
}

fn copy(from: &Path, to: &Path) {
    let copied = std::process::Command::new("cp").arg("-r").args([from, to]).status();
    assert!(copied.unwrap().success());
}

#[tokio::test]
async fn a_node_of_another_user_is_a_failure_until_the_password_file_is_right() {
    let Some((dir, server)) = server() else { return };
    // The superuser of digest: created by the access list of the first owner.
    let file = dir.path().join("password");
    let secret = |text: &str| {
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    };
    secret("wrong\n");
    protect(&server, "/web", "edge:right");
    let mut with_user = registry(&[server.address()]);
    with_user.user = Some("edge".into());
    with_user.password_file = Some(file.clone());
    let mut asked = ask(with_user, "/web", ZookeeperFormat::Curator);
    asked.until("a failure", |asked| !asked.failures.is_empty()).await;
    let (why, detail) = &asked.failures[0];
    assert_eq!(*why, SourceFailure::Auth);
    assert!(detail.contains("/web: the server denies access"), "{detail}");
    assert_eq!(asked.sets, 0);
    secret("right\n");
    asked.names(&["7f1e"]).await;
    assert_eq!(asked.members[0].wish, Wish::Draining);
}

/// Creates a node with a child that only `user` may read, with the client of ZooKeeper.
fn protect(server: &ZookeeperServer, path: &str, user: &str) {
    let child = r#"{"name":"web","id":"7f1e","address":"10.0.0.4","port":8080,"sslPort":null,"payload":{"@class":"x"},"registrationTimeUTC":1,"serviceType":"DYNAMIC","uriSpec":null,"enabled":false}"#;
    let commands = format!(
        "addauth digest {user}\ncreate {path} ''\ncreate {path}/x '{child}'\n\
         setAcl {path}/x auth::cdrwa\nsetAcl {path} auth::cdrwa\nquit\n"
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), commands).unwrap();
    let status = std::process::Command::new("java")
        .args(["-cp", "/usr/share/java/*", "org.apache.zookeeper.ZooKeeperMain", "-server"])
        .arg(server.address().to_string())
        .stdin(std::fs::File::open(file.path()).unwrap())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status();
    assert!(status.unwrap().success());
}

#[tokio::test]
async fn an_expired_session_is_replaced() {
    let Some((_dir, server)) = server() else { return };
    let registry = Arc::new(registry(&[server.address()]));
    let client = ZkSession::with_timeout(
        registry,
        Resolver::new(DnsConfig::default()),
        Duration::from_secs(1),
    );
    put(&client, "/e", "", true).await;
    let exists = ZkRequest::Exists { path: "/e".into(), watch: false };
    assert!(client.call(exists.clone()).await.is_ok());
    // The server sees neither pings nor requests while this thread sleeps.
    clock::pause(Duration::from_secs(4));
    let mut answer = client.call(exists.clone()).await;
    if matches!(answer, Err(ZkProblem::Failed(_))) {
        answer = client.call(exists).await;
    }
    assert_eq!(answer.unwrap_err(), ZkProblem::NoNode);
    put(&client, "/e", "", true).await;
}

/// Waits until a note arrives, and returns its text.
async fn note(notes: &mut tokio::sync::mpsc::UnboundedReceiver<String>) -> String {
    tokio::time::timeout(Duration::from_secs(20), notes.recv()).await.unwrap().unwrap()
}

#[tokio::test]
async fn a_registered_service_is_a_member_and_survives_the_loss_of_its_session() {
    use crate::register::zookeeper::ZookeeperRegistrar;
    use crate::register::{Registration, ServiceHealth, WhenDown, keep};
    let Some((_dir, mut server)) = server() else { return };
    let servers = registry(&[server.address()]);
    let mut heard = ask(servers.clone(), "/services/web", ZookeeperFormat::Json);
    let registration = Registration {
        service: "web".into(),
        id: "web-1".into(),
        address: "10.0.0.7:80".parse().unwrap(),
        weight: Some(3),
        labels: Default::default(),
        ttl: Duration::from_secs(3),
        on_down: WhenDown::Mark,
    };
    let resolver = Resolver::new(DnsConfig::default());
    let ttl = registration.ttl;
    // The node of a former process that was killed.
    let former = ZkSession::with_timeout(servers.clone().into(), resolver.clone(), ttl);
    for above in ["/services", "/services/web"] {
        put(&former, above, "", false).await;
    }
    put(&former, "/services/web/web-1", &at(9), true).await;
    heard.names(&["web-1"]).await;
    let registrar =
        ZookeeperRegistrar::new(servers.clone().into(), resolver, "/services/web", "web-1", ttl);
    let (health, checked) = tokio::sync::watch::channel(ServiceHealth::Up);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let (noted, mut notes) = tokio::sync::mpsc::unbounded_channel();
    let kept = tokio::spawn(async move {
        let stopped = async { drop(stopped.await) };
        let mut note = |note: crate::register::RegisterNote| drop(noted.send(note.to_string()));
        keep(registrar, &registration, checked, stopped, &mut note).await
    });
    assert_eq!(note(&mut notes).await, "registered as ready");
    heard.until("the successor", |heard| heard.members[0].weight == Some(3)).await;
    health.send(ServiceHealth::Down).unwrap();
    heard.until("critical", |heard| heard.members[0].wish == Wish::Critical).await;
    health.send(ServiceHealth::Up).unwrap();
    heard.until("ready", |heard| heard.members[0].wish == Wish::Sessions).await;
    // The server is away for longer than the TTL: the session and the node end.
    server.kill();
    tokio::time::sleep(Duration::from_secs(4)).await;
    server.restart();
    let admin = open(servers);
    let _ = admin.call(ZkRequest::Delete { path: "/services/web/web-1".into() }).await;
    while note(&mut notes).await != "registered as ready" {}
    heard.until("again", |heard| heard.members.len() == 1).await;
    stop.send(()).unwrap();
    assert!(kept.await.unwrap());
    heard.until("left", |heard| heard.members.is_empty()).await;
}
