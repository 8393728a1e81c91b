//! Answers of services that no real server gives on demand.

use super::*;
use tidegate_core::model::{
    DnsProbe, DnsProbeCode, DnsProbeRecord, NodeRole, PostgresProbe, ProbeLogin, ProbeTls,
    TlsVerify,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UdpSocket;

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
        let (_dir, file) = private_file("secret");
        let login = ProbeLogin { user: Some("a".into()), password_file: Some(file) };
        let kind = ProbeKind::Postgres(PostgresProbe { login, database: None });
        let started = clock::now();
        let reason = failure(run(&address, &spec(kind)).await);
        assert!(reason.starts_with("the server asks for more than 100000 rounds"), "{reason}");
        assert!(started.elapsed() < TIMEOUT, "{:?}", started.elapsed());
    });
}

/// The greeting of a server of MySQL 8 with these capabilities.
fn greeting(tls: bool) -> Vec<u8> {
    let low = if tls { [0xff, 0xff] } else { [0xff, 0xf7] };
    let start = b"\x0a8.0.36\0\x01\0\0\0abcdefgh\0";
    let rest = b"ijklmnopqrst\0caching_sha2_password\0";
    let flags = [&low[..], &[45, 2, 0], &[0xff, 0xff, 21], &[0; 10]].concat();
    mysql_packet(0, &[start.as_slice(), &flags, rest].concat())
}

fn mysql_packet(number: u8, payload: &[u8]) -> Vec<u8> {
    [&[u8::try_from(payload.len()).unwrap(), 0, 0, number], payload].concat()
}

/// Receives one packet of at most 255 bytes.
async fn received(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut header = [0; 4];
    stream.read_exact(&mut header).await.unwrap();
    let mut payload = vec![0; usize::from(header[0])];
    stream.read_exact(&mut payload).await.unwrap();
    payload
}

/// Answers the question for `read_only` with this text, and waits for `COM_QUIT`.
async fn answer_role(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), text: &[u8]) {
    assert_eq!(received(stream).await, b"\x03SELECT @@global.read_only");
    let row = [&[u8::try_from(text.len()).unwrap()], text].concat();
    let end = [0xfe, 0, 0, 2, 0];
    for (number, payload) in [[1].as_slice(), b"column", &end, &row, &end].iter().enumerate() {
        let packet = mysql_packet(u8::try_from(number).unwrap() + 1, payload);
        stream.write_all(&packet).await.unwrap();
    }
    assert_eq!(received(stream).await, [1], "COM_QUIT");
}

fn private_file(text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("password");
    std::fs::write(&file, text).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&file, mode).unwrap();
    (dir, file)
}

/// Runs a `mysql` probe of a server that runs `serve` after the login of the probe.
async fn asked_mysql(serve: impl AsyncFnOnce(&mut tokio::net::TcpStream)) -> ProbeOutcome {
    let (_dir, file) = private_file("secret");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = BackendAddr::Tcp(listener.local_addr().unwrap());
    let login = ProbeLogin { user: Some("a".into()), password_file: Some(file) };
    let probe = spec(ProbeKind::Mysql(login));
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&greeting(false)).await.unwrap();
        let login = received(&mut stream).await;
        assert!(login.ends_with(b"caching_sha2_password\0"), "{login:?}");
        serve(&mut stream).await;
    };
    tokio::join!(run(&address, &probe), server).0
}

fn role(outcome: ProbeOutcome) -> ProbeAnswer {
    match outcome {
        ProbeOutcome::Success { answer, .. } => answer,
        other => panic!("{other:?}"),
    }
}

#[test]
fn caching_sha2_password_logs_in_if_the_server_knows_the_hash() {
    on_runtime(async {
        for (text, expected) in [
            (b"0".as_slice(), NodeRole::Primary),
            (b"OFF", NodeRole::Primary),
            (b"1", NodeRole::Replica),
            (b"NO_LOCK", NodeRole::Replica),
        ] {
            let outcome = asked_mysql(async |stream| {
                stream.write_all(&mysql_packet(2, &[1, 3])).await.unwrap();
                stream.write_all(&mysql_packet(3, &[0, 0, 0, 2, 0, 0, 0])).await.unwrap();
                answer_role(stream, text).await;
            });
            assert_eq!(role(outcome.await), ProbeAnswer::Role(expected));
        }
    });
}

#[test]
fn password_is_not_sent_to_mysql_without_tls() {
    on_runtime(async {
        let outcome = asked_mysql(async |stream| {
            stream.write_all(&mysql_packet(2, &[1, 4])).await.unwrap();
            assert_eq!(stream.read(&mut [0; 64]).await.unwrap(), 0);
        });
        let reason = failure(outcome.await);
        assert!(reason.ends_with("asks for the password; set tls"), "{reason}");
    });
}

#[test]
fn password_is_sent_to_mysql_over_tls() {
    on_runtime(async {
        let (_dir, file) = private_file("secret");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = BackendAddr::Tcp(listener.local_addr().unwrap());
        let login = ProbeLogin { user: Some("a".into()), password_file: Some(file) };
        let mut probe = spec(ProbeKind::Mysql(login));
        probe.timeout = Duration::from_secs(5);
        let tls = ProbeTls { verify: TlsVerify::Off, name: None, alpn: Vec::new() };
        probe.target.tls = Some(tls);
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(&greeting(true)).await.unwrap();
            assert_eq!(received(&mut stream).await.len(), 32, "a request for TLS");
            let mut stream = tls_servers::acceptor().accept(stream).await.unwrap();
            let _login = received(&mut stream).await;
            stream.write_all(&mysql_packet(3, &[1, 4])).await.unwrap();
            assert_eq!(received(&mut stream).await, b"secret\0");
            stream.write_all(&mysql_packet(5, &[0, 0, 0, 2, 0, 0, 0])).await.unwrap();
            answer_role(&mut stream, b"0").await;
        };
        let outcome = tokio::join!(run(&address, &probe), server).0;
        assert_eq!(role(outcome), ProbeAnswer::Role(NodeRole::Primary));
    });
}

#[test]
fn replies_of_mail_servers_have_several_lines() {
    on_runtime(async {
        let greeting: &[u8] = b"220-mail.example.com\r\n220 ready\r\n250-mail\r\n250 HELP\r\n";
        assert_eq!(role(answered_first(ProbeKind::Smtp, greeting).await), ProbeAnswer::Expected);
        let busy: &[u8] = b"421-too many\r\n421 connections\r\n";
        let reason = failure(answered_first(ProbeKind::Smtp, busy).await);
        assert_eq!(reason, "the greeting is \"421-too many\"");
        let reason = failure(answered_first(ProbeKind::Smtp, b"SSH-2.0-OpenSSH\r\n").await);
        assert_eq!(reason, "not the protocol of SMTP: got \"SSH-2.0-OpenSSH\"");
    });
}

/// Like [`answered`], for a server that speaks first.
async fn answered_first(kind: ProbeKind, answer: &'static [u8]) -> ProbeOutcome {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = BackendAddr::Tcp(listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(answer).await.unwrap();
        let _ = stream.read(&mut [0; 1024]).await;
    });
    run(&address, &spec(kind)).await
}

#[test]
fn directory_server_that_ends_the_connection_fails_with_its_text() {
    on_runtime(async {
        // A notice of disconnection with result 52, unavailable.
        const NOTICE: &[u8] = b"\x30\x0f\x02\x01\0\x78\x0a\x0a\x01\x34\x04\0\x04\x03bye";
        let reason = failure(answered(ProbeKind::Ldap, NOTICE).await);
        assert_eq!(reason, "the result of the bind is 52: \"bye\"");
        let reason = failure(answered(ProbeKind::Ldap, b"220 mail").await);
        assert_eq!(reason, "not the protocol of LDAP: got \"22\"");
    });
}

#[test]
fn datagrams_that_answer_another_question_are_ignored() {
    on_runtime(async {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = BackendAddr::Tcp(server.local_addr().unwrap());
        let probe = spec(ProbeKind::Dns(DnsProbe {
            name: "www.example.com".into(),
            record: DnsProbeRecord::A,
            transport: DnsProbeTransport::Udp,
            rcode: DnsProbeCode::Noerror,
        }));
        let serve = async {
            let mut question = [0; 512];
            // The first datagram is lost.
            let _lost = server.recv_from(&mut question).await.unwrap();
            let (count, client) = server.recv_from(&mut question).await.unwrap();
            let mut answer = question[..count].to_vec();
            answer[2] |= 0x80;
            let mut other_id = answer.clone();
            other_id[0] ^= 1;
            let mut other_name = answer.clone();
            other_name[13] ^= 1;
            // SERVFAIL, which would fail if it counted.
            other_id[3] = 2;
            other_name[3] = 2;
            for datagram in [other_id, other_name, question[..count].to_vec(), answer] {
                server.send_to(&datagram, client).await.unwrap();
            }
        };
        let outcome = tokio::join!(run(&address, &probe), serve).0;
        assert_eq!(role(outcome), ProbeAnswer::Expected);
    });
}
