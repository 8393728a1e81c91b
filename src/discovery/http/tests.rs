//! Tests of the HTTP source against a real nginx and against scripted answers.

use super::*;
use crate::tell::Answers;
use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::{DnsConfig, SourceKey};
use tidegate_net::clock;
use tokio::task::JoinSet;

/// Longest wait for an answer or a server.
const PATIENCE: Duration = Duration::from_secs(20);

/// A real nginx with `list.json` below its root.
struct Nginx {
    dir: tempfile::TempDir,
    plain: u16,
    tls: u16,
    process: Child,
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A port that was free just now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Nginx {
    /// `None`: nginx is not installed.
    fn start() -> Option<Nginx> {
        if Command::new("nginx").arg("-v").stderr(Stdio::null()).status().is_err() {
            assert!(std::env::var_os("CI").is_none(), "nginx is not installed");
            println!("skipped: nginx is not installed");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().display();
        write_certificates(dir.path());
        fs::write(dir.path().join("list.json"), r#"["10.0.0.1:80"]"#).unwrap();
        let (plain, tls) = (free_port(), free_port());
        let config = format!(
            "daemon off; master_process off; pid {root}/pid; error_log {root}/error.log;\n\
             events {{}}\n\
             http {{ access_log off; client_body_temp_path {root}/b; proxy_temp_path {root}/p;\n\
             fastcgi_temp_path {root}/f; uwsgi_temp_path {root}/u; scgi_temp_path {root}/s;\n\
             server {{ listen 127.0.0.1:{plain}; listen 127.0.0.1:{tls} ssl;\n\
             ssl_certificate {root}/server.pem; ssl_certificate_key {root}/server.key;\n\
             ssl_client_certificate {root}/ca.pem; ssl_verify_client optional;\n\
             root {root}; location /moved {{ return 302 http://127.0.0.1/x; }}\n\
             location /busy {{ return 503 'no leader'; }}\n\
             location /mutual {{ if ($ssl_client_verify != SUCCESS) {{ return 403; }} return 200 '[]'; }}\n\
             location /token {{ if ($http_authorization != 'Bearer good') {{ return 401; }}\n\
             return 200 '[\"10.0.0.7:80\"]'; }} }} }}\n"
        );
        let file = dir.path().join("nginx.conf");
        fs::write(&file, config).unwrap();
        let process = Command::new("nginx")
            .args(["-c", file.to_str().unwrap(), "-e", "stderr", "-p"])
            .arg(dir.path())
            .spawn()
            .unwrap();
        let nginx = Nginx { dir, plain, tls, process };
        let start = clock::now();
        while std::net::TcpStream::connect(("127.0.0.1", tls)).is_err() {
            assert!(clock::now().duration_since(start) < PATIENCE, "nginx does not listen");
            clock::pause(Duration::from_millis(10));
        }
        Some(nginx)
    }

    fn put(&self, list: &str) {
        let new = self.dir.path().join("new");
        fs::write(&new, list).unwrap();
        fs::rename(&new, self.dir.path().join("list.json")).unwrap();
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn question(&self, path: &str) -> ListUrl {
        ListUrl {
            url: format!("http://127.0.0.1:{}{path}", self.plain),
            interval: Duration::from_millis(200),
            ca_file: None,
            token_file: None,
        }
    }

    fn tls_question(&self, host: &str, ca: &str) -> ListUrl {
        let mut question = self.question("/list.json");
        question.url = format!("https://{host}:{}/list.json", self.tls);
        question.ca_file = Some(self.file(ca));
        question
    }
}

/// Writes a CA, a server's certificate for 127.0.0.1, a client's certificate, and another CA.
fn write_certificates(dir: &Path) {
    let ca = |name: &str| {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        fs::write(dir.join(format!("{name}.pem")), certificate.pem()).unwrap();
        rcgen::Issuer::new(params, key)
    };
    let issuer = ca("ca");
    ca("other");
    for (name, host) in [("server", "127.0.0.1"), ("client", "client.test")] {
        let params = rcgen::CertificateParams::new(vec![host.to_owned()]).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        fs::write(dir.join(format!("{name}.pem")), certificate.pem()).unwrap();
        write_secret(&dir.join(format!("{name}.key")), &key.serialize_pem());
    }
}

fn write_secret(path: &Path, content: &str) {
    fs::write(path, content).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(path, mode).unwrap();
}

fn resolver() -> Resolver {
    Resolver::new(DnsConfig::default())
}

struct AskedUrl {
    answers: Answers,
    _task: JoinSet<Infallible>,
}

impl AskedUrl {
    fn new(question: ListUrl) -> AskedUrl {
        let answers = Answers::default();
        let key = SourceKey { pool: "web".into(), backend: None };
        let teller = answers.teller(key, Arc::default());
        let mut task = JoinSet::new();
        task.spawn(run(question, resolver(), teller));
        AskedUrl { answers, _task: task }
    }

    /// Waits for this answer; others can precede it.
    async fn sees(&self, part: &str) -> String {
        let mut seen = Vec::new();
        let waiting = async {
            loop {
                self.answers.arrived().await;
                for answer in self.answers.take() {
                    let text = shown(answer.told);
                    if text.contains(part) {
                        return text;
                    }
                    seen.push(text);
                }
            }
        };
        let found = tokio::time::timeout(PATIENCE, waiting).await;
        found.unwrap_or_else(|_| panic!("{part:?} did not arrive; {seen:?}"))
    }
}

fn shown(told: Told) -> String {
    match told {
        Told::Whole(set) => {
            let names: Vec<&str> = set.members.iter().map(|member| &*member.name).collect();
            format!("[{}] {}", names.join(" "), set.version)
        }
        Told::Failed { why, detail } => format!("{why}: {detail}"),
        Told::Alive => "alive".to_owned(),
    }
}

#[tokio::test]
async fn list_of_nginx_is_polled_with_its_etag() {
    let Some(nginx) = Nginx::start() else { return };
    let client = |question: &ListUrl| {
        let (endpoint, target) = endpoint(question, resolver()).unwrap();
        (HttpClient::new(endpoint), target)
    };
    let (http, target) = client(&nginx.question("/list.json"));
    let mut last = LastList::default();
    let told = shown(ask(&http, &target, &mut last).await.unwrap());
    assert!(told.starts_with("[10.0.0.1:80] etag \""), "{told}");
    let mut conditional = HttpRequest::get(&*target);
    conditional.headers.push((IF_NONE_MATCH, last.etag.clone().unwrap()));
    assert_eq!(http.send(&conditional).await.unwrap().status, 304);
    assert_eq!(ask(&http, &target, &mut last).await.unwrap(), Told::Alive);
    nginx.put(r#"["10.0.0.1:80", "10.0.0.2:80"]"#);
    let told = shown(ask(&http, &target, &mut last).await.unwrap());
    assert!(told.starts_with("[10.0.0.1:80 10.0.0.2:80]"), "{told}");
}

#[tokio::test]
async fn answers_without_a_whole_list_are_failures() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    for (answer, said) in [
        ("204 No Content\r\n\r\n", "status 204 has no list"),
        ("206 Partial Content\r\nContent-Length: 2\r\n\r\n[]", "status 206 has no list"),
        ("304 Not Modified\r\n\r\n", "status 304 has no list"),
        ("200 OK\r\nContent-Length: 0\r\n\r\n", "EOF"),
        ("200 OK\r\nConnection: close\r\n\r\n[\"10.0.0.1:80\"", "EOF"),
    ] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answering = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await;
            stream.write_all(format!("HTTP/1.1 {answer}").as_bytes()).await.unwrap();
        };
        let question = ListUrl {
            url: format!("http://{address}/"),
            interval: Duration::from_secs(1),
            ca_file: None,
            token_file: None,
        };
        let (endpoint, target) = endpoint(&question, resolver()).unwrap();
        let (http, mut last) = (HttpClient::new(endpoint), LastList::default());
        let (told, ()) = tokio::join!(ask(&http, &target, &mut last), answering);
        let failure = told.unwrap_err();
        assert!(failure.detail.contains(said), "{answer}: {failure}");
    }
}

#[tokio::test]
async fn failures_of_nginx_are_told_and_end_with_their_cause() {
    let Some(nginx) = Nginx::start() else { return };
    for (path, said) in [
        ("/gone", "not-found: status 404"),
        ("/busy", "protocol: status 503: no leader"),
        ("/moved", "redirects to \"http://127.0.0.1/x\"; redirects are not followed"),
        ("/token", "auth: status 401"),
        ("/nginx.conf", "protocol: list: entry 1, line 1, column"),
    ] {
        let asked = AskedUrl::new(nginx.question(path));
        let text = asked.sees("").await;
        if path != "/nginx.conf" {
            assert!(text.contains(said), "{path}: {text}");
        } else {
            assert!(text.starts_with("protocol: list: "), "{text}");
        }
    }
    let asked = AskedUrl::new(nginx.question("/list.json"));
    asked.sees("[10.0.0.1:80]").await;
    nginx.put("[");
    asked.sees("protocol: list: entry 1, line 1, column 1: EOF").await;
    nginx.put("[]");
    asked.sees("[] etag").await;
}

#[tokio::test]
async fn token_is_rotated_without_a_restart() {
    let Some(nginx) = Nginx::start() else { return };
    let token = nginx.file("token");
    write_secret(&token, "old\n");
    let mut question = nginx.question("/token");
    question.token_file = Some(token.clone());
    let asked = AskedUrl::new(question);
    asked.sees("auth: status 401").await;
    write_secret(&token, "good\n");
    asked.sees("[10.0.0.7:80]").await;
    fs::remove_file(&token).unwrap();
    asked.sees("local: cannot use secret file").await;
}

#[tokio::test]
async fn certificate_of_the_server_is_verified() {
    let Some(nginx) = Nginx::start() else { return };
    let asked = AskedUrl::new(nginx.tls_question("127.0.0.1", "ca.pem"));
    asked.sees("[10.0.0.1:80]").await;
    for (host, ca, said) in [
        ("localhost", "ca.pem", "not valid for name"),
        ("127.0.0.1", "other.pem", "UnknownIssuer"),
        ("127.0.0.1", "server.key", "has no PEM block CERTIFICATE"),
        ("127.0.0.1", "missing.pem", "local: "),
    ] {
        let text = AskedUrl::new(nginx.tls_question(host, ca)).sees("").await;
        assert!(text.contains(said), "{host} {ca}: {text}");
    }
    // A rotated CA file counts with the next connection.
    let question = nginx.tls_question("127.0.0.1", "rotated.pem");
    fs::copy(nginx.file("other.pem"), nginx.file("rotated.pem")).unwrap();
    let asked = AskedUrl::new(question);
    asked.sees("UnknownIssuer").await;
    fs::copy(nginx.file("ca.pem"), nginx.file("rotated.pem")).unwrap();
    asked.sees("[10.0.0.1:80]").await;
}

#[tokio::test]
async fn client_certificate_is_sent_and_read_again_for_each_connection() {
    let Some(nginx) = Nginx::start() else { return };
    let tls = |cert: Option<&str>, key: Option<&str>| TlsClientConfig {
        ca_file: Some(nginx.file("ca.pem")),
        cert_file: cert.map(|name| nginx.file(name)),
        key_file: key.map(|name| nginx.file(name)),
        server_name: Some("127.0.0.1".to_owned()),
    };
    let of = |tls| {
        let (mut endpoint, _) = endpoint(&nginx.question("/"), resolver()).unwrap();
        let name = ServerAddr::Name { host: "localhost".into(), port: nginx.tls };
        (endpoint.servers, endpoint.tls) = (vec![name], Some(tls));
        HttpClient::new(endpoint)
    };
    let request = HttpRequest::get("/mutual");
    let without = of(tls(None, None)).send(&request).await.unwrap();
    assert_eq!(without.failure().unwrap().why, SourceFailure::Auth);
    let with = of(tls(Some("client.pem"), Some("client.key")));
    assert_eq!(with.send(&request).await.unwrap().status, 200);
    let wrong = of(tls(Some("client.pem"), Some("server.key"))).send(&request).await.unwrap_err();
    assert_eq!(wrong.why, SourceFailure::Local, "{wrong}");
    fs::remove_file(nginx.file("client.key")).unwrap();
    // The open connection serves on; a new one needs the file.
    assert_eq!(with.send(&request).await.unwrap().status, 200);
    with.fail_over();
    assert_eq!(with.send(&request).await.unwrap_err().why, SourceFailure::Local);
}

#[tokio::test]
async fn source_recovers_within_5_s_after_its_server() {
    let Some(nginx) = Nginx::start() else { return };
    let mut question = nginx.question("/");
    let port = free_port();
    question.url = format!("http://127.0.0.1:{port}/");
    let asked = AskedUrl::new(question);
    // The delay reaches its maximum.
    for _ in 0..7 {
        asked.sees("connect: 127.0.0.1").await;
    }
    let start = clock::now();
    let server = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let serve = move || {
        let (mut stream, _) = server.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]);
        std::io::Write::write_all(&mut stream, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")
    };
    let serving = tokio::task::spawn_blocking(serve);
    asked.sees("[] digest").await;
    serving.await.unwrap().unwrap();
    let took = clock::now().duration_since(start);
    println!("recovered after {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn urls_give_the_server_and_the_target() {
    let read = |url: &str| {
        let question = ListUrl {
            url: url.to_owned(),
            interval: Duration::from_secs(1),
            ca_file: None,
            token_file: None,
        };
        endpoint(&question, resolver())
            .map(|(endpoint, target)| {
                format!("{} {target} {}", endpoint.servers[0], endpoint.tls.is_some())
            })
            .map_err(|failure| failure.detail)
    };
    for (url, expected) in [
        ("http://x", "x:80 / false"),
        ("https://x.test/a?b=c", "x.test:443 /a?b=c true"),
        ("http://[2001:db8::1]:8080/a", "[2001:db8::1]:8080 /a false"),
        ("http://10.0.0.1", "10.0.0.1:80 / false"),
    ] {
        assert_eq!(read(url).as_deref(), Ok(expected));
    }
    for (url, part) in [
        ("ftp://x/", "http:// or https://"),
        ("/list", "http:// or https://"),
        ("http://a:b@x/", "contains a user"),
        ("http://x y/", "is not a URL"),
    ] {
        assert!(read(url).unwrap_err().contains(part), "{url}");
    }
}
