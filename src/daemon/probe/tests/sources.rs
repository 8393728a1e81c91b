//! Source addresses of probes.

use super::*;
use std::net::Ipv4Addr;
use tidegate_core::model::SourceAddr;

/// A documentation address (RFC 5737), so it is not on this host.
const ABSENT: [u8; 4] = [192, 0, 2, 77];

fn from(sources: &[[u8; 4]]) -> Arc<ProbeSpec> {
    let sources: Vec<SourceAddr> =
        sources.iter().map(|ip| SourceAddr::new(Ipv4Addr::from(*ip).into())).collect();
    Arc::new(ProbeSpec {
        target: ProbeTarget { source: sources.into(), ..ProbeTarget::default() },
        ..ping()
    })
}

/// Starts a backend that answers a ping and reports the source address.
async fn reporting_backend() -> (BackendAddr, mpsc::UnboundedReceiver<IpAddr>) {
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

/// Probes two backends `count` times each, one probe after the other. Returns the
/// source addresses that each backend saw.
async fn seen_sources(spec: &Arc<ProbeSpec>, count: usize) -> [Vec<String>; 2] {
    let (sender, mut results) = mpsc::channel(1);
    let runner = start_runner(sender, PROBES_RUNNING_MAX);
    let mut backends = [reporting_backend().await, reporting_backend().await];
    let mut seen = [Vec::new(), Vec::new()];
    for _ in 0..count {
        for (n, (address, sources)) in backends.iter_mut().enumerate() {
            runner.probe(
                LANE,
                BackendId(n as u32),
                ProbeToken(1),
                names(),
                address.clone(),
                Arc::clone(spec),
            );
            assert_success(&next(&mut results).await.2);
            seen[n].push(sources.recv().await.unwrap().to_string());
        }
    }
    seen
}

#[test]
fn each_backend_is_probed_from_every_source_address_in_turn() {
    on_runtime(async {
        let spec = from(&[[127, 0, 0, 2], [127, 0, 0, 3]]);
        for seen in seen_sources(&spec, 4).await {
            assert_eq!(seen, ["127.0.0.2", "127.0.0.3", "127.0.0.2", "127.0.0.3"]);
        }
    });
}

#[test]
fn absent_source_address_is_skipped() {
    on_runtime(async {
        let spec = from(&[ABSENT, [127, 0, 0, 3]]);
        for seen in seen_sources(&spec, 3).await {
            assert_eq!(seen, ["127.0.0.3"; 3]);
        }
    });
}

#[test]
fn absent_source_addresses_are_a_local_error() {
    on_runtime(async {
        let (address, _sources) = reporting_backend().await;
        match run(&address, &from(&[ABSENT])).await {
            ProbeOutcome::Local { reason } => {
                assert!(reason.ends_with("(source 192.0.2.77)"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    });
}
