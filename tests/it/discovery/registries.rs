//! A start without the registry, and what all tests of registries share. The accidents of
//! running registries are in `accidents`.

use super::load::{Load, NamedBackends};
use crate::common::conf::{Conf, Pool};
use crate::common::http;
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, on_every_engine, secs};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use tidegate_discovery::testing::consul::ConsulDouble;

on_every_engine!(start_without_a_registry_serves_from_the_state_directory,);

/// A proxy whose pool `web` has the members of a registry.
struct RegistrySite {
    backends: NamedBackends,
    proxy: TestProxy,
}

// === impl RegistrySite ===

impl RegistrySite {
    fn start(engine: Engine, registry: &str, question: &str, process: &str) -> RegistrySite {
        let pool = Pool::new("web").discover(&format!(
            "from = \"main\"\n{question}\naddresses = [\"127.0.0.0/8\"]\nconfirm_after = \"2s\""
        ));
        let conf = Conf::simple(engine, pool)
            .registry(&format!("[registry.main]\ntimeout = \"2s\"\n{registry}"))
            .process(process);
        RegistrySite { backends: NamedBackends::start(4), proxy: TestProxy::start(conf) }
    }

    fn eligible(&self) -> usize {
        let status = self.proxy.status();
        let backends = status["pools"][0]["backends"].as_array().cloned().unwrap_or_default();
        backends.iter().filter(|backend| backend["eligible"] == true).count()
    }

    #[track_caller]
    fn wait_for(&self, count: usize) {
        eventually(secs(15), &format!("{count} backends serve"), || self.eligible() == count);
    }

    fn source(&self) -> serde_json::Value {
        self.proxy.status()["pools"][0]["sources"][0].clone()
    }

    /// Waits until `status` says why the source does not answer.
    #[track_caller]
    fn wait_for_failure(&self, what: &str) {
        eventually(secs(15), &format!("{what} is shown"), || {
            !self.source()["last_word"]["failure"].is_null()
        });
    }
}

/// An entry of a list, which is also the value of a backend in etcd and ZooKeeper.
pub fn entry(address: SocketAddr) -> String {
    format!("{{\"address\":\"{address}\"}}")
}

/// Registers an instance of `web` at a Consul agent.
pub fn register(agent: SocketAddr, number: u16, address: SocketAddr) {
    let body = format!(
        "{{\"ID\":\"web-{number}\",\"Name\":\"web\",\"Address\":\"{}\",\"Port\":{}}}",
        address.ip(),
        address.port()
    );
    request(agent, "/v1/agent/service/register", &body);
}

/// Takes an instance out of a Consul agent.
pub fn deregister(agent: SocketAddr, number: u16) {
    request(agent, &format!("/v1/agent/service/deregister/web-{number}"), "");
}

/// Sends a PUT with the token `operator` and checks the answer.
#[track_caller]
fn request(agent: SocketAddr, path: &str, body: &str) {
    let mut stream = TcpStream::connect(agent).expect("the double listens");
    write!(
        stream,
        "PUT {path} HTTP/1.1\r\nHost: consul\r\nX-Consul-Token: operator\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
}

/// Replaces a file that only its owner can read.
pub fn write_secret(path: &std::path::Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, text).expect("a writable directory");
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&fresh, mode).expect("a mode");
    std::fs::rename(fresh, path).expect("a rename");
}

fn start_without_a_registry_serves_from_the_state_directory(engine: Engine) {
    let double = ConsulDouble::start().expect("the double starts");
    let dir = tempfile::tempdir().expect("temp dir");
    let state = format!("state = \"{}\"", dir.path().join("state").display());
    let registry = format!("kind = \"consul\"\nservers = [\"{}\"]", double.address());
    let mut site = RegistrySite::start(engine, &registry, "service = \"web\"", &state);
    (0..2).for_each(|number| {
        register(double.address(), number, site.backends.address(number.into()))
    });
    site.wait_for(2);
    let saved = dir.path().join("state/views.json");
    eventually(secs(5), "both are saved", || {
        let text = std::fs::read_to_string(&saved).unwrap_or_default();
        text.contains("web-0") && text.contains("web-1")
    });
    drop(double);
    site.proxy.restart();
    let ready = http::over_unix(&socket(&site.proxy), "GET", "/ready").expect("an answer");
    assert_eq!(ready.status, 200);
    let load = Load::start(site.proxy.addr("web"));
    site.wait_for(2);
    site.wait_for_failure("the missing registry");
    load.end();
}

fn socket(proxy: &TestProxy) -> std::path::PathBuf {
    proxy.admin().trim_start_matches("unix:").into()
}
