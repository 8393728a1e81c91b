//! Steps, regular expressions, binary bytes, HTTP bodies, and other ports.

use super::*;
use regex::bytes::Regex;

fn pattern(text: &str) -> Expect {
    Expect::Regex(ProbePattern(Regex::new(text).unwrap()))
}

fn steps(steps: Vec<ProbeStep>) -> ProbeSpec {
    spec(ProbeKind::Steps { steps })
}

fn contains(text: &str) -> Expect {
    Expect::Contains(text.into())
}

fn body(expect: Expect) -> ProbeSpec {
    spec(ProbeKind::Http(HttpProbe { expect: Some(expect), ..http_probe() }))
}

/// Starts a server that greets, and answers each line with the line in brackets. Its answer
/// to `two` is two lines in one segment.
async fn dialogue() -> BackendAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                stream.write_all(b"220 ready\r\n").await.unwrap();
                let mut line = Vec::new();
                while let Ok(byte) = stream.read_u8().await {
                    if byte != b'\n' {
                        line.push(byte);
                        continue;
                    }
                    let line = std::mem::take(&mut line);
                    let answer = [b"[".as_slice(), &line, b"]\n"].concat();
                    let times = if line == b"two" { 2 } else { 1 };
                    stream.write_all(&answer.repeat(times)).await.unwrap();
                }
            });
        }
    });
    BackendAddr::Tcp(address)
}

#[test]
fn steps_run_in_order_and_each_continues_after_the_match() {
    on_runtime(async {
        let address = dialogue().await;
        let right = steps(vec![
            ProbeStep::Expect(Expect::Starts("220 ready\r\n".into())),
            ProbeStep::Send("two\n".into()),
            ProbeStep::Expect(contains("[two]")),
            // The rest of the same segment.
            ProbeStep::Expect(Expect::Starts("\n[two]".into())),
            ProbeStep::Send("\n".into()),
            ProbeStep::Expect(pattern(r"^\n\[\]\n")),
        ]);
        assert_success(&run(&address, &right).await);

        let wrong = steps(vec![
            ProbeStep::Expect(Expect::Starts("220".into())),
            ProbeStep::Send("role\n".into()),
            ProbeStep::Expect(Expect::Starts(" ready\r\n[master]".into())),
        ]);
        let reason = failure(run(&address, &wrong).await);
        assert!(reason.starts_with("step 3: wrong answer: got \" ready"), "{reason}");

        let silent = steps(vec![
            ProbeStep::Expect(Expect::Starts("220".into())),
            ProbeStep::Expect(contains("more")),
        ]);
        let reason = failure(run(&address, &silent).await);
        assert_eq!(reason, "timed out after 300ms while waiting for the answer of step 2");
    });
}

#[test]
fn bytes_that_are_no_text_are_sent_and_expected() {
    on_runtime(async {
        let address = dialogue().await;
        let send = ProbeBytes(vec![0, 0xff, b'\n']);
        let expect = Expect::Contains(ProbeBytes(vec![b'[', 0, 0xff, b']']));
        let binary = spec(ProbeKind::SendExpect { send, expect });
        assert_success(&run(&address, &binary).await);
        let send = ProbeBytes(vec![0xfe, b'\n']);
        let binary = spec(ProbeKind::SendExpect { send, expect: pattern(r"(?-u)\[\xfe\]") });
        assert_success(&run(&address, &binary).await);
    });
}

#[test]
fn body_of_a_response_is_searched_without_the_frames_of_chunks() {
    on_runtime(async {
        let plain: &'static [&'static [u8]] = &[b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nall w", b"ell"];
        let chunked: &'static [&'static [u8]] = &[
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nall",
            b" w\r\n",
            b"3\r\nell\r\n0\r\n\r\n",
        ];
        for answer in [plain, chunked] {
            assert_success(&run(&server(answer).await, &body(contains("all well"))).await);
        }
        let reason = failure(run(&server(chunked).await, &body(contains("ill"))).await);
        assert!(reason.ends_with("expected \"ill\" in the answer"), "{reason}");
        let headers = run(&server(plain).await, &body(contains("A: b"))).await;
        assert!(failure(headers).starts_with("connection closed"));
        let bad: &'static [&'static [u8]] =
            &[b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nwell\r\n"];
        let reason = failure(run(&server(bad).await, &body(contains("well"))).await);
        assert!(reason.starts_with("the body has no valid chunks"), "{reason}");
    });
}

#[test]
fn request_has_the_version_and_headers_of_the_configuration() {
    on_runtime(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let probe = spec(ProbeKind::Http(HttpProbe {
            version: HttpVersion::Http10,
            headers: vec![
                ("Authorization".into(), "Basic dTpw".into()),
                ("user-agent".into(), "mine".into()),
            ],
            ..http_probe()
        }));
        let seen = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 1024];
            let count = stream.read(&mut request).await.unwrap();
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n").await.unwrap();
            String::from_utf8(request[..count].to_vec()).unwrap()
        });
        assert_success(&run(&BackendAddr::Tcp(address), &probe).await);
        let expected = format!(
            "GET /health HTTP/1.0\r\nHost: {address}\r\nAccept: */*\r\n\
             Authorization: Basic dTpw\r\nuser-agent: mine\r\nConnection: close\r\n\r\n"
        );
        assert_eq!(seen.await.unwrap(), expected);
    });
}

#[test]
fn another_port_and_address_are_probed() {
    on_runtime(async {
        let closed = {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            listener.local_addr().unwrap()
        };
        let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
        let other = listener.local_addr().unwrap();
        tokio::spawn(async move { while listener.accept().await.is_ok() {} });
        let backend = BackendAddr::Tcp(closed);
        failure(run(&backend, &spec(ProbeKind::Tcp)).await);
        let mut moved = spec(ProbeKind::Tcp);
        moved.target.port = Some(other.port());
        failure(run(&backend, &moved).await);
        moved.target.address = Some(other.ip());
        assert_success(&run(&backend, &moved).await);
        // A Unix backend is probed at an address with its port.
        assert_success(&run(&BackendAddr::Unix("/no/such/socket".into()), &moved).await);
    });
}
