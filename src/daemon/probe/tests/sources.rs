//! Where probes start: the pool's sources in turn.

use super::*;
use std::net::Ipv4Addr;
use tidegate_core::model::SourceAddr;

/// An address of no host (RFC 5737), so this host cannot start anything there.
const ABSENT: [u8; 4] = [192, 0, 2, 77];

fn from(sources: &[[u8; 4]]) -> Arc<ProbeSpec> {
    let sources: Vec<SourceAddr> =
        sources.iter().map(|ip| SourceAddr::new(Ipv4Addr::from(*ip).into())).collect();
    Arc::new(ProbeSpec { source: sources.into(), ..ping() })
}

/// Answers a ping, and tells where it came from.
async fn witness() -> (BackendAddr, mpsc::UnboundedReceiver<IpAddr>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (seen, sources) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (mut stream, from) = listener.accept().await.unwrap();
            let _ = stream.write_all(b"+PONG\r\n").await;
            // The test may be over.
            let _ = seen.send(from.ip());
        }
    });
    (BackendAddr::Tcp(address), sources)
}

/// Where so many probes of two backends, one after another, came from.
async fn origins(spec: &Arc<ProbeSpec>, count: usize) -> [Vec<String>; 2] {
    let (sender, mut results) = mpsc::channel(1);
    let runner = start_runner(sender, PROBES_RUNNING_MAX);
    let mut backends = [witness().await, witness().await];
    let mut seen = [Vec::new(), Vec::new()];
    for _ in 0..count {
        for (n, (address, origins)) in backends.iter_mut().enumerate() {
            runner.probe(
                LANE,
                BackendId(n as u32),
                ProbeToken(1),
                address.clone(),
                Arc::clone(spec),
            );
            assert_success(&next(&mut results).await.2);
            seen[n].push(origins.recv().await.unwrap().to_string());
        }
    }
    seen
}

#[test]
fn each_backend_is_probed_from_every_source_in_turn() {
    on_runtime(async {
        let spec = from(&[[127, 0, 0, 2], [127, 0, 0, 3]]);
        for seen in origins(&spec, 4).await {
            assert_eq!(seen, ["127.0.0.2", "127.0.0.3", "127.0.0.2", "127.0.0.3"]);
        }
    });
}

#[test]
fn absent_source_is_passed_over() {
    on_runtime(async {
        let spec = from(&[ABSENT, [127, 0, 0, 3]]);
        for seen in origins(&spec, 3).await {
            assert_eq!(seen, ["127.0.0.3"; 3]);
        }
    });
}

#[test]
fn backend_is_not_blamed_where_every_source_is_absent() {
    on_runtime(async {
        let (address, _origins) = witness().await;
        match run(&address, &from(&[ABSENT])).await {
            ProbeOutcome::Local { reason } => {
                assert!(reason.ends_with("(source 192.0.2.77)"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    });
}
