//! Answers of services that no real server gives on demand.

use super::*;
use tidegate_core::model::{PostgresProbe, ProbeLogin};

fn login(user: &str) -> ProbeLogin {
    ProbeLogin { user: Some(user.into()), password_file: None }
}

/// Returns the result of a probe of a server that answers the first bytes with these.
async fn answered(kind: ProbeKind, answer: &'static [u8]) -> ProbeOutcome {
    let segments: &'static [&'static [u8]] = Box::leak(Box::new([answer]));
    run(&server(segments).await, &spec(kind)).await
}

fn postgres() -> ProbeKind {
    ProbeKind::Postgres(PostgresProbe { login: login("a"), database: None })
}

/// Returns an `ErrorResponse` with these fields.
fn message(fields: &[u8]) -> &'static [u8] {
    let length = u32::try_from(fields.len() + 4).unwrap().to_be_bytes();
    Vec::leak([b"E", length.as_slice(), fields].concat())
}

#[test]
fn postgresql_that_starts_up_fails_with_its_message() {
    on_runtime(async {
        let fields = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0";
        let reason = failure(answered(postgres(), message(fields)).await);
        assert_eq!(reason, "the server answers \"the database system is starting up\" (57P03)");
    });
}

#[test]
fn long_error_of_a_server_is_cut_and_escaped() {
    on_runtime(async {
        let mut error = b"C57P03\0M\x1b[2J\n".to_vec();
        error.extend([b'x'; 5_000]);
        error.extend(b"\0\0");
        let reason = failure(answered(postgres(), message(&error)).await);
        assert!(reason.starts_with("the server answers \"\\x1b[2J\\nxxx"), "{reason}");
        assert!(reason.len() <= REASON_BYTES_MAX, "{reason}");
    });
}

#[test]
fn server_of_another_protocol_is_named_as_such() {
    on_runtime(async {
        let reason = failure(answered(postgres(), b"HTTP/1.1 400 Bad Request\r\n\r\n").await);
        assert_eq!(reason, "not the protocol of PostgreSQL: got \"HTTP/\"");
        let alive = ProbeKind::Postgres(PostgresProbe::default());
        let reason = failure(answered(alive, b"HTTP/1.1 400 Bad Request\r\n\r\n").await);
        assert_eq!(reason, "not the protocol of PostgreSQL: got \"H\"");
    });
}

#[test]
fn postgresql_without_tls_is_alive_and_has_no_role() {
    on_runtime(async {
        let alive = ProbeKind::Postgres(PostgresProbe::default());
        match answered(alive, b"N").await {
            ProbeOutcome::Success { answer, .. } => assert_eq!(answer, ProbeAnswer::Expected),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn scram_with_too_many_rounds_is_not_computed() {
    on_runtime(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = BackendAddr::Tcp(listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut received = vec![0; 1024];
            let _ = stream.read(&mut received).await.unwrap();
            stream.write_all(b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0").await.unwrap();
            let count = stream.read(&mut received).await.unwrap();
            let sent = String::from_utf8_lossy(&received[..count]).into_owned();
            let nonce = sent.split("r=").nth(1).unwrap();
            let data = format!("r={nonce}xyz,s=c2FsdA==,i=4000000000");
            let length = u32::try_from(data.len() + 8).unwrap().to_be_bytes();
            let first = [b"R", length.as_slice(), &[0, 0, 0, 11], data.as_bytes()].concat();
            stream.write_all(&first).await.unwrap();
            let _ = stream.read(&mut received).await;
        });
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("password");
        std::fs::write(&file, "secret").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&file, mode).unwrap();
        let login = ProbeLogin { user: Some("a".into()), password_file: Some(file) };
        let kind = ProbeKind::Postgres(PostgresProbe { login, database: None });
        let started = clock::now();
        let reason = failure(run(&address, &spec(kind)).await);
        assert!(reason.starts_with("the server asks for more than 100000 rounds"), "{reason}");
        assert!(started.elapsed() < TIMEOUT, "{:?}", started.elapsed());
    });
}
