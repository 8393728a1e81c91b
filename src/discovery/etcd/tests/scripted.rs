//! Servers that answer wrongly: a watch that becomes silent, and answers of another program.

use super::*;
use crate::testing::etcd::is_installed;
use crate::testing::is_long;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};

/// Passes connections on to a node. It can silence the watches that are open.
struct SilencingProxy {
    address: SocketAddr,
    /// Watches of an earlier generation are silent.
    generation: Arc<AtomicU32>,
}

// === impl SilencingProxy ===

impl SilencingProxy {
    fn start(node: SocketAddr) -> SilencingProxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let generation = Arc::<AtomicU32>::default();
        let shared = Arc::clone(&generation);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (client, shared) = (client.unwrap(), Arc::clone(&shared));
                std::thread::spawn(move || pass_on(client, node, &shared));
            }
        });
        SilencingProxy { address, generation }
    }

    fn silence_watches(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }
}

fn pass_on(mut client: TcpStream, node: SocketAddr, generation: &AtomicU32) {
    let Ok(mut server) = TcpStream::connect(node) else { return };
    let born = generation.load(Ordering::Relaxed);
    let is_watch = Arc::<AtomicU32>::default();
    let (mut back, mut answers) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    let watches = Arc::clone(&is_watch);
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(read @ 1..) = client.read(&mut bytes) {
            let watch = String::from_utf8_lossy(&bytes[..read]).contains("/v3/watch");
            watches.fetch_add(u32::from(watch), Ordering::Relaxed);
            if server.write_all(&bytes[..read]).is_err() {
                break;
            }
        }
        let _ = server.shutdown(std::net::Shutdown::Both);
    });
    let mut bytes = [0; 4096];
    while let Ok(read @ 1..) = answers.read(&mut bytes) {
        let silent = generation.load(Ordering::Relaxed) > born;
        if silent && is_watch.load(Ordering::Relaxed) > 0 {
            continue;
        }
        if back.write_all(&bytes[..read]).is_err() {
            break;
        }
    }
    let _ = back.shutdown(std::net::Shutdown::Both);
}

/// A busy host delays the pings of the source.
mod quiet {
    use super::*;

    #[test]
    fn silent_watch_is_found_by_the_check() {
        if !is_installed() {
            return;
        }
        let cluster = EtcdCluster::start(1);
        cluster.put(&key("a"), &value(80));
        cluster.put(&key("b"), &value(80));
        let proxy = SilencingProxy::start(cluster.servers()[0]);
        let through =
            RegistryConfig { servers: vec![ServerAddr::Ip(proxy.address)], ..registry(&cluster) };
        let mut asked = AskedEtcd::start_as(&through, WEB);
        asked.wait_for(&["a", "b"], secs(5));
        // A deletion, then a change that leaves the number of entries as it is.
        proxy.silence_watches();
        cluster.delete(&key("a"));
        let start = now();
        asked.wait_for(&["b"], secs(26));
        eprintln!("silent watch found after {:.0?}", now().duration_since(start));
        assert!(asked.failures.iter().any(|(why, _)| *why == SourceFailure::Stale));
        if !is_long() {
            return;
        }
        proxy.silence_watches();
        cluster.delete(&key("b"));
        cluster.put(&key("c"), &value(80));
        asked.wait_for(&["c"], secs(26));
    }
}

/// Answers every request with this body.
fn answering(body: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let _ = client.read(&mut [0; 4096]);
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            let _ = client.write_all((head + body).as_bytes());
        }
    });
    address
}

#[test]
fn answers_of_another_program_are_never_an_empty_set() {
    for body in ["{}", "[]", "null", "", "<html></html>", r#"{"header":{},"kvs":[]}"#] {
        let registry = registry_of(&[answering(body)]);
        let mut asked = AskedEtcd::start_as(&registry, WEB);
        asked.wait_until("three failures", secs(10), |asked| asked.failures.len() >= 3);
        assert!(asked.failures.iter().all(|(why, _)| *why == SourceFailure::Protocol), "{body}");
        assert_eq!(asked.set, None, "{body}");
    }
}

#[tokio::test]
async fn follower_that_panicked_is_a_failure_and_another_one_begins() {
    use crate::tasks::{TaskKind, points::panic_next};
    let registry = registry_of(&[answering("{}")]);
    let answers = Answers::default();
    let teller = answers.teller(SourceKey { pool: "web".into(), backend: None }, Arc::default());
    let share = EtcdShare::start(&registry, Resolver::new(DnsConfig::default()));
    let task = tokio::spawn(run(WEB.into(), share, teller));
    let failed = async |wanted: SourceFailure| {
        loop {
            answers.arrived().await;
            for answer in answers.take() {
                let Told::Failed { why, .. } = answer.told else { panic!("{answer:?}") };
                if why == wanted {
                    return;
                }
            }
        }
    };
    failed(SourceFailure::Protocol).await;
    let panics = TaskKind::Follower.panics();
    panic_next(TaskKind::Follower);
    failed(SourceFailure::Local).await;
    assert_eq!(TaskKind::Follower.panics(), panics + 1);
    failed(SourceFailure::Protocol).await;
    task.abort();
}
