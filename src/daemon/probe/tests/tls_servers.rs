//! Probes over TLS, with certificates made by the test.

use super::*;
use rcgen::{CertificateParams, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::path::Path;
use tidegate_core::model::{ProbeTls, TlsVerify};
use tokio_rustls::TlsAcceptor;

/// An authority and a certificate of `names` that it has signed.
struct Certified {
    authority: String,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn certified(names: &[&str]) -> Certified {
    let authority_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = params.self_signed(&authority_key).unwrap();
    let issuer = Issuer::from_params(&params, &authority_key);
    let key = KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    Certified {
        authority: authority.pem(),
        chain: vec![certificate.der().clone()],
        key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
    }
}

/// Accepts TLS with a certificate that no client trusts.
pub(super) fn acceptor() -> TlsAcceptor {
    accepting(certified(&["localhost"]), &[])
}

fn accepting(certified: Certified, alpn: &[&str]) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certified.chain, certified.key)
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    TlsAcceptor::from(Arc::new(config))
}

/// Starts a server that answers each request with `200` and the name and protocol of the
/// handshake.
async fn tls_server(certified: Certified, alpn: &[&str]) -> BackendAddr {
    let acceptor = accepting(certified, alpn);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let (_, session) = stream.get_ref();
            let name = session.server_name().unwrap_or("none").to_owned();
            let protocol = session.alpn_protocol().unwrap_or(b"none").to_vec();
            let protocol = String::from_utf8(protocol).unwrap();
            let mut request = [0; 1024];
            if stream.read(&mut request).await.is_ok_and(|count| count > 0) {
                let answer = format!("HTTP/1.1 200 OK\r\n\r\n{name} {protocol}");
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
            }
        }
    });
    BackendAddr::Tcp(address)
}

fn over_tls(mut spec: ProbeSpec, tls: ProbeTls) -> ProbeSpec {
    spec.target.tls = Some(tls);
    spec.timeout = Duration::from_secs(5);
    spec
}

fn verified_by(path: &Path, name: Option<&str>) -> ProbeTls {
    let name = name.map(str::to_owned);
    ProbeTls { verify: TlsVerify::File(path.to_owned()), name, alpn: Vec::new() }
}

fn ca_file(directory: &Path, name: &str, pem: &str) -> std::path::PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, pem).unwrap();
    path
}

#[test]
fn certificate_is_verified_for_the_name_or_the_address() {
    on_runtime(async {
        let directory = tempfile::tempdir().unwrap();
        let server = certified(&["db.internal", "127.0.0.1"]);
        let ca = ca_file(directory.path(), "ca.pem", &server.authority);
        let other = ca_file(directory.path(), "other.pem", &certified(&["x"]).authority);
        let address = tls_server(server, &[]).await;
        for tls in [verified_by(&ca, Some("db.internal")), verified_by(&ca, None)] {
            let outcome = run(&address, &over_tls(spec(ProbeKind::Tcp), tls)).await;
            assert!(outcome.to_string().starts_with("success"), "{outcome}");
        }
        for tls in [verified_by(&ca, Some("other.internal")), verified_by(&other, None)] {
            let reason = failure(run(&address, &over_tls(spec(ProbeKind::Tcp), tls)).await);
            assert!(
                reason.starts_with("TLS handshake failed: invalid peer certificate"),
                "{reason}"
            );
        }
        let unverified = ProbeTls { verify: TlsVerify::Off, name: None, alpn: Vec::new() };
        let outcome = run(&address, &over_tls(spec(ProbeKind::Tcp), unverified)).await;
        assert!(outcome.to_string().starts_with("success"), "{outcome}");
        let system = ProbeTls { verify: TlsVerify::System, name: None, alpn: Vec::new() };
        let outcome = run(&address, &over_tls(spec(ProbeKind::Tcp), system)).await;
        assert!(!outcome.to_string().starts_with("success"), "{outcome}");
    });
}

#[test]
fn http_probe_over_tls_sends_the_name_and_the_protocols() {
    on_runtime(async {
        let address = tls_server(certified(&["db.internal"]), &["h2", "http/1.1"]).await;
        let tls = ProbeTls {
            verify: TlsVerify::Off,
            name: Some("db.internal".to_owned()),
            alpn: vec!["http/1.1".to_owned()],
        };
        let expect = Some(Expect::Starts("db.internal http/1.1".into()));
        let probe = spec(ProbeKind::Http(HttpProbe { expect, ..http_probe() }));
        let outcome = run(&address, &over_tls(probe, tls)).await;
        assert!(outcome.to_string().starts_with("success"), "{outcome}");
    });
}

#[test]
fn changed_file_of_certificates_is_read_again() {
    on_runtime(async {
        let directory = tempfile::tempdir().unwrap();
        let server = certified(&["127.0.0.1"]);
        let right = server.authority.clone();
        let ca = ca_file(directory.path(), "ca.pem", &certified(&["x"]).authority);
        let address = tls_server(server, &[]).await;
        let configs = TlsConfigs::default();
        let probe = over_tls(spec(ProbeKind::Tcp), verified_by(&ca, None));
        let (outcome, _) = run_from(&address, &probe, 0, &configs).await;
        assert!(outcome.to_string().starts_with("failure"), "{outcome}");
        tokio::time::sleep(Duration::from_millis(20)).await;
        std::fs::write(&ca, right).unwrap();
        let (outcome, _) = run_from(&address, &probe, 0, &configs).await;
        assert!(outcome.to_string().starts_with("success"), "{outcome}");
        std::fs::remove_file(&ca).unwrap();
        let (outcome, _) = run_from(&address, &probe, 0, &configs).await;
        assert!(outcome.to_string().starts_with("not run: cannot use certificates"), "{outcome}");
    });
}

#[test]
fn server_without_tls_fails_the_probe_with_a_reason() {
    on_runtime(async {
        let address = server(&[b"220 ready\r\n"]).await;
        let tls = ProbeTls { verify: TlsVerify::Off, name: None, alpn: Vec::new() };
        let reason = failure(run(&address, &over_tls(spec(ProbeKind::Tcp), tls)).await);
        assert!(reason.starts_with("TLS handshake failed: "), "{reason}");
    });
}
