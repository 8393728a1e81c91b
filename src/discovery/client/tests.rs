//! Tests of the client against raw TCP servers with scripted answers.

use super::*;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What a scripted server does with one request.
#[derive(Debug, Clone)]
enum Step {
    /// Sends bytes and waits for the next request.
    Say(Vec<u8>),
    /// Sends bytes and closes.
    Last(Vec<u8>),
    /// Sends bytes and resets.
    Reset(Vec<u8>),
    /// Sends one byte per interval.
    Drip(Vec<u8>, Duration),
    /// Sends the same bytes again and again.
    Endless(&'static str),
    /// Reads and says nothing.
    Hang,
}

fn say(text: &str) -> Step {
    Step::Say(text.as_bytes().to_vec())
}

fn last(text: &str) -> Step {
    Step::Last(text.as_bytes().to_vec())
}

/// A server that plays the same steps for each connection. It counts connections.
async fn server(steps: Vec<Step>) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let count: Arc<AtomicUsize> = Arc::default();
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(play(stream, steps.clone()));
        }
    });
    (address, count)
}

async fn play(mut stream: TcpStream, steps: Vec<Step>) {
    for step in steps {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            if stream.read(&mut byte).await.unwrap_or(0) == 0 {
                return;
            }
            request.push(byte[0]);
        }
        match step {
            Step::Say(bytes) => drop(stream.write_all(&bytes).await),
            Step::Last(bytes) => {
                let _ = stream.write_all(&bytes).await;
                return;
            }
            Step::Reset(bytes) => {
                let _ = stream.write_all(&bytes).await;
                tokio::time::sleep(Duration::from_millis(50)).await;
                rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
                return;
            }
            Step::Drip(bytes, interval) => {
                for byte in bytes {
                    if stream.write_all(&[byte]).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(interval).await;
                }
            }
            Step::Endless(text) => while stream.write_all(text.as_bytes()).await.is_ok() {},
            Step::Hang => std::future::pending().await,
        }
    }
}

fn client(servers: &[SocketAddr]) -> HttpClient {
    HttpClient::new(HttpEndpoint {
        servers: servers.iter().map(|address| ServerAddr::Ip(*address)).collect(),
        timeout: Duration::from_millis(900),
        tls: None,
        inline_pem: InlinePem::default(),
        auth: None,
        resolver: Resolver::new(Default::default()),
    })
}

async fn failure_of(step: Step) -> HttpFailure {
    let (address, _) = server(vec![step]).await;
    client(&[address]).send(&HttpRequest::get("/v1/list")).await.unwrap_err()
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: \"a\"\r\n\r\nhello";

#[tokio::test]
async fn answers_arrive_whole_and_reuse_the_connection() {
    let chunked =
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n";
    let (address, connections) = server(vec![say(OK), say(chunked), say(OK)]).await;
    let client = client(&[address]);
    for _ in 0..3 {
        let answer = client.send(&HttpRequest::get("/")).await.unwrap();
        assert_eq!((answer.status, &answer.body[..]), (200, &b"hello"[..]));
        assert!(answer.failure().is_none());
    }
    assert_eq!(connections.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn unusual_forms_of_an_answer_are_read() {
    for answer in [
        "HTTP/1.0 200 OK\r\n\r\nhello",
        "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    ] {
        let (address, _) = server(vec![last(answer)]).await;
        let read = client(&[address]).send(&HttpRequest::get("/")).await;
        assert_eq!(read.map(|read| read.body).unwrap(), "hello", "{answer}");
    }
}

#[tokio::test]
async fn redirects_are_failures_and_the_other_host_gets_no_request() {
    let (other, connections) = server(vec![say(OK)]).await;
    for status in [301, 302, 303, 307, 308] {
        let moved = format!("HTTP/1.1 {status} Moved\r\nLocation: http://{other}/\r\n");
        let failure = failure_of(say(&(moved + "Content-Length: 0\r\n\r\n"))).await;
        assert_eq!(failure.why, SourceFailure::Protocol, "{failure}");
        assert!(failure.detail.contains("not followed"), "{failure}");
    }
    assert_eq!(connections.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn incomplete_answer_is_a_failure() {
    for begin in [
        "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\nhello",
        "HTTP/1.1 200 OK\r\nContent-",
        "",
    ] {
        let failure = failure_of(last(begin)).await;
        assert_eq!(failure.why, SourceFailure::Connect, "{begin:?}: {failure}");
        let failure = failure_of(Step::Reset(begin.into())).await;
        assert_eq!(failure.why, SourceFailure::Connect, "{begin:?}: {failure}");
    }
}

#[tokio::test]
async fn silent_and_slow_servers_end_with_the_deadline() {
    let drip = Step::Drip(OK.repeat(9).into_bytes(), Duration::from_millis(100));
    let endless = Step::Endless("HTTP/1.1 102 Processing\r\n\r\n");
    for step in [Step::Hang, drip, endless] {
        let start = clock::now();
        let failure = failure_of(step).await;
        assert_eq!(failure.why, SourceFailure::Timeout, "{failure}");
        assert!(clock::now().duration_since(start) < Duration::from_secs(3));
    }
}

#[tokio::test]
async fn wait_of_a_request_extends_the_deadline() {
    let slow = Step::Drip(OK.into(), Duration::from_millis(30));
    let (address, _) = server(vec![slow]).await;
    let mut request = HttpRequest::get("/");
    request.wait = Duration::from_secs(20);
    assert_eq!(client(&[address]).send(&request).await.unwrap().body, "hello");
}

#[tokio::test]
async fn answers_that_cannot_be_read_are_protocol_failures() {
    let long_head = format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(2 * HEAD_BYTES_MAX));
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: 1\r\n".repeat(999));
    let huge = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\nx", ANSWER_BYTES_MAX + 1);
    for (answer, part) in [
        ("SSH-2.0-OpenSSH_9.2p1\r\n", "cannot read the answer"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello", "chunk"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nx", "chunk"),
        ("HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "content-length"),
        ("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx", "gzip"),
        ("HTTP/1.1 302 Found\r\nLocation: http://x/y\r\nContent-Length: 0\r\n\r\n", "http://x/y"),
        (&long_head, "large"),
        (&many, "head is too large"),
        (&huge, "larger than"),
    ] {
        let failure = failure_of(Step::Reset(answer.into())).await;
        let begin = &answer[..answer.len().min(80)];
        assert_eq!(failure.why, SourceFailure::Protocol, "{begin:?}: {failure}");
        assert!(failure.detail.contains(part), "{begin:?}: {failure}");
    }
}

#[tokio::test]
async fn body_beyond_the_bound_is_refused_without_an_announced_length() {
    let chunk = format!("100000\r\n{}\r\n", "x".repeat(1 << 20));
    let mut answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    (0..65).for_each(|_| answer.extend_from_slice(chunk.as_bytes()));
    let (address, _) = server(vec![Step::Say(answer)]).await;
    let mut request = HttpRequest::get("/");
    request.wait = Duration::from_secs(60);
    let failure = client(&[address]).send(&request).await.unwrap_err();
    assert_eq!(failure.why, SourceFailure::Protocol, "{failure}");
}

#[tokio::test]
async fn request_that_a_closed_idle_connection_lost_is_sent_again_unless_it_is_a_post() {
    for (method, good) in [(Method::GET, true), (Method::PUT, true), (Method::POST, false)] {
        // The second request of each connection gets no answer.
        let (address, connections) = server(vec![say(OK), last("")]).await;
        let client = client(&[address]);
        let mut request = HttpRequest::get("/");
        request.method = method.clone();
        client.send(&request).await.unwrap();
        assert_eq!(client.send(&request).await.is_ok(), good, "{method}");
        let made = connections.load(Ordering::Relaxed);
        assert_eq!(made, if good { 2 } else { 1 }, "{method}");
    }
}

#[tokio::test]
async fn failed_server_is_left_for_the_next() {
    let refused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (hanging, _) = server(vec![Step::Hang]).await;
    let (good, connections) = server(vec![say(OK), say(OK), say(OK), say(OK)]).await;
    for _ in 0..3 {
        let client = client(&[refused, hanging, good]);
        // The hanging server costs one request, the refusing server none.
        let mut failures = 0;
        while client.send(&HttpRequest::get("/")).await.is_err() {
            failures += 1;
        }
        assert!(failures <= 1);
        client.send(&HttpRequest::get("/")).await.unwrap();
        client.fail_over();
        connections.store(0, Ordering::Relaxed);
        let _ = client.send(&HttpRequest::get("/")).await;
        assert_eq!(connections.load(Ordering::Relaxed), 0);
    }
}

#[tokio::test]
async fn statuses_have_classes_and_quote_the_server() {
    for (status, why) in [
        (401, SourceFailure::Auth),
        (403, SourceFailure::Auth),
        (404, SourceFailure::NotFound),
        (429, SourceFailure::Protocol),
        (500, SourceFailure::Protocol),
    ] {
        let text = format!("HTTP/1.1 {status} No\r\nContent-Length: 9\r\n\r\nno\nleader");
        let (address, _) = server(vec![say(&text), say(&text)]).await;
        let client = client(&[address]);
        let failure = client.send(&HttpRequest::get("/")).await.unwrap().failure().unwrap();
        assert_eq!((failure.why, &*failure.detail), (why, &*format!("status {status}: no leader")));
        let mut stream = client.open(&HttpRequest::get("/")).await.unwrap();
        assert_eq!(stream.failure(Duration::from_secs(9)).await.unwrap().why, why);
    }
    assert!(status_failure(204, b"").is_none() && status_failure(304, b"").is_none());
}

#[tokio::test]
async fn stream_gives_each_part_when_it_arrives() {
    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n";
    let (address, _) = server(vec![say(head), Step::Hang]).await;
    let client = client(&[address]);
    let mut stream = client.open(&HttpRequest::get("/watch")).await.unwrap();
    assert_eq!(stream.status(), 200);
    let long = Duration::from_secs(9);
    assert_eq!(stream.chunk(long).await.unwrap().unwrap(), "he");
    let failure = stream.chunk(Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(failure.why, SourceFailure::Timeout);

    let (address, _) = server(vec![last("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nh")]).await;
    let mut stream = self::client(&[address]).open(&HttpRequest::get("/")).await.unwrap();
    assert_eq!(stream.chunk(long).await.unwrap().unwrap(), "h");
    assert_eq!(stream.chunk(long).await.unwrap_err().why, SourceFailure::Connect);
}

#[tokio::test]
async fn unix_sockets_and_names_are_servers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = vec![0; 4096];
        let length = stream.read(&mut request).await.unwrap();
        let text = String::from_utf8_lossy(&request[..length]).into_owned();
        assert!(text.contains("host: localhost\r\n"), "{text}");
        stream.write_all(OK.as_bytes()).await.unwrap();
    });
    let (address, _) = server(vec![say(OK)]).await;
    let name = ServerAddr::Name { host: "localhost".into(), port: address.port() };
    for server in [ServerAddr::Unix(path), name] {
        let mut endpoint = client(&[]).endpoint().clone();
        endpoint.servers = vec![server];
        let answer = HttpClient::new(endpoint).send(&HttpRequest::get("/")).await;
        assert_eq!(answer.unwrap().body, "hello");
    }
    let failure = client(&[]).send(&HttpRequest::get("/")).await.unwrap_err();
    assert_eq!(failure.why, SourceFailure::Local);
}

#[tokio::test]
async fn token_is_read_for_each_request_and_never_shown() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut endpoint = client(&[listener.local_addr().unwrap()]).endpoint().clone();
    endpoint.auth = Some(SecretFile::new(&path));
    let client = HttpClient::new(endpoint);
    let missing = client.send(&HttpRequest::get("/")).await.unwrap_err();
    assert_eq!(missing.why, SourceFailure::Local, "{missing}");
    drop(listener.accept().await);
    for token in ["first", "second"] {
        std::fs::write(&path, token).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&path, mode).unwrap();
        let request = HttpRequest::get("/");
        let (answer, text) = tokio::join!(client.send(&request), async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.unwrap();
            stream.write_all(OK.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        assert_eq!(answer.unwrap().body, "hello");
        assert!(text.contains(&format!("authorization: Bearer {token}\r\n")), "{text}");
        assert!(!format!("{client:?}").contains(token));
    }
}
