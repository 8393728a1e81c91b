//! The double refuses what an agent refuses, and its checks work as documented.

use super::*;
use crate::client::{HttpClient, HttpEndpoint, HttpRequest};
use crate::resolver::Resolver;
use hyper::Method;
use tidegate_core::model::ServerAddr;
use tidegate_net::clock;

struct DoubleAgent {
    double: ConsulDouble,
    client: HttpClient,
}

impl DoubleAgent {
    fn start(deregister_min: Duration) -> DoubleAgent {
        let settings = DoubleSettings { deregister_min, ..Default::default() };
        let double = ConsulDouble::start_with(settings).unwrap();
        let client = HttpClient::new(HttpEndpoint {
            servers: vec![ServerAddr::Ip(double.address())],
            timeout: Duration::from_secs(5),
            tls: None,
            inline_pem: Default::default(),
            auth: None,
            resolver: Resolver::new(Default::default()),
        });
        DoubleAgent { double, client }
    }

    async fn send(&self, method: Method, target: &str, body: &str) -> (u16, String) {
        let body = body.to_owned().into();
        let request = HttpRequest { method, body, ..HttpRequest::get(target) };
        let response = self.client.send(&request).await.unwrap();
        (response.status, String::from_utf8_lossy(&response.body).into_owned())
    }

    async fn put(&self, target: &str, body: &str) -> (u16, String) {
        self.send(Method::PUT, target, body).await
    }

    async fn get(&self, target: &str) -> (u16, String) {
        self.send(Method::GET, target, "").await
    }

    async fn register(&self, check: &str) {
        let body = format!(r#"{{"ID":"a","Name":"web","Port":1,"Check":{{{check}}}}}"#);
        assert_eq!(self.put("/v1/agent/service/register", &body).await, (200, String::new()));
    }

    /// Waits until the answer about `web` contains a text, or does not.
    async fn eventually(&self, text: &str, contained: bool) {
        let deadline = clock::now() + Duration::from_secs(10);
        loop {
            let (_, body) = self.get("/v1/health/service/web").await;
            if body.contains(text) == contained {
                return;
            }
            assert!(clock::now() < deadline, "{text} {contained}: {body}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test]
async fn requests_that_an_agent_refuses_are_refused() {
    let agent = DoubleAgent::start(Duration::from_secs(60));
    agent.register(r#""HTTP":"http://127.0.0.1:1/","Interval":"1h""#).await;
    let health = "/v1/health/service/web";
    let cases = [
        (Method::POST, "/v1/agent/service/register", "{}", 405, "method POST not allowed"),
        (Method::PUT, health, "", 405, "method PUT not allowed"),
        (Method::GET, "/v1/agent/nothing", "", 404, "Invalid URL path"),
        (Method::GET, "/v1/health/service/web?tags=a", "", 400, "parameter \"tags\""),
        (Method::GET, "/v1/health/service/web?index=x", "", 400, "Invalid index"),
        (Method::GET, "/v1/health/service/web?wait=5", "", 400, "Invalid wait time"),
        (Method::GET, "/v1/health/service/web?ns=team", "", 400, "Enterprise"),
        (Method::GET, "/v1/health/service/web?dc=far", "", 500, "No path to datacenter"),
        (Method::GET, "/v1/health/service/web?stale&consistent", "", 400, "conflicting"),
        (Method::GET, "/v1/health/service/web?filter=x", "", 400, "boolean expression"),
        (Method::PUT, "/v1/agent/service/register", "{}", 400, "Missing service name"),
        (Method::PUT, "/v1/agent/service/register", r#"{"Nome":"x"}"#, 400, "decode failed"),
        (Method::PUT, "/v1/agent/service/deregister/x", "", 404, "Unknown service ID \"x\""),
        (Method::PUT, "/v1/agent/check/pass/x", "", 404, "Unknown check ID \"x\""),
        (Method::PUT, "/v1/agent/check/pass/service:a", "", 500, "does not have associated TTL"),
        (Method::PUT, "/v1/agent/service/maintenance/a", "", 400, "Missing value for enable"),
    ];
    for (method, target, body, status, text) in cases {
        let (found, said) = agent.send(method, target, body).await;
        assert_eq!(found, status, "{target}: {said}");
        assert!(said.contains(text), "{target}: {said}");
    }
    for check in [r#""TTL":"1s","Interval":"1s""#, r#""TCP":"127.0.0.1:1""#, ""] {
        let body = format!(r#"{{"Name":"web","Check":{{{check}}}}}"#);
        let (status, said) = agent.put("/v1/agent/service/register", &body).await;
        assert_eq!(status, 400, "{said}");
        assert!(said.starts_with("Invalid check: "), "{said}");
    }
}

#[tokio::test]
async fn a_silent_ttl_check_turns_critical_and_removes_its_service() {
    let agent = DoubleAgent::start(Duration::from_millis(800));
    let check = r#""TTL":"300ms","Status":"passing","DeregisterCriticalServiceAfter":"1ms""#;
    agent.register(check).await;
    agent.eventually("TTL expired", true).await;
    assert_eq!(agent.put("/v1/agent/check/pass/service:a?note=fine", "").await.0, 200);
    agent.eventually("fine", true).await;
    agent.eventually("\"ID\":\"a\"", false).await;
    assert_eq!(agent.get("/v1/agent/services").await.1, "{}");
}

#[tokio::test]
async fn a_check_of_the_agent_follows_the_service() {
    let agent = DoubleAgent::start(Duration::from_secs(60));
    let service = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = service.local_addr().unwrap();
    agent.register(&format!(r#""TCP":"{address}","Interval":"50ms""#)).await;
    agent.eventually("TCP connect", true).await;
    drop(service);
    agent.eventually(r#""Status":"critical""#, true).await;
    // Another double has an HTTP server.
    let other = ConsulDouble::start().unwrap();
    let url =
        |path: &str| format!(r#""HTTP":"http://{}{path}","Interval":"50ms""#, other.address());
    agent.register(&url("/v1/status/leader")).await;
    agent.eventually(r#""Status":"critical""#, false).await;
    agent.register(&url("/nothing")).await;
    agent.eventually("HTTP GET: 404", true).await;
}

#[tokio::test]
async fn a_repeated_registration_changes_no_index_and_no_status() {
    let agent = DoubleAgent::start(Duration::from_secs(60));
    let check = r#""TTL":"60s""#;
    agent.register(check).await;
    agent.put("/v1/agent/check/pass/service:a", "").await;
    let index = |agent: &DoubleAgent| agent.double.shared.lock().catalog.index_of("web");
    let before = index(&agent);
    agent.register(check).await;
    assert_eq!(index(&agent), before);
    let (_, body) = agent.get("/v1/health/service/web?passing").await;
    assert!(body.contains("\"ID\":\"a\""), "{body}");
    let body = r#"{"id":"a","name":"web","port":1,"weights":{"passing":3,"warning":1}}"#;
    agent.put("/v1/agent/service/register?replace-existing-checks=true", body).await;
    assert!(index(&agent) > before);
    assert_eq!(agent.get("/v1/agent/checks").await.1.matches("service:a").count(), 0);
}

#[tokio::test]
async fn a_node_of_the_catalog_has_its_own_services() {
    let agent = DoubleAgent::start(Duration::from_secs(60));
    let body = r#"{"Node":"far","Address":"10.1.1.1","Service":{"Service":"web","Port":80},
        "Check":{"CheckID":"up","Name":"up","Status":"passing","ServiceID":"web"}}"#;
    assert_eq!(agent.put("/v1/catalog/register", body).await.0, 200);
    let (_, answer) = agent.get("/v1/health/service/web").await;
    assert!(answer.contains("10.1.1.1") && answer.contains("\"up\""), "{answer}");
    assert_eq!(agent.get("/v1/agent/services").await.1, "{}");
    let body = r#"{"Node":"far","ServiceID":"web"}"#;
    assert_eq!(agent.put("/v1/catalog/deregister", body).await.0, 200);
    assert_eq!(agent.get("/v1/health/service/web").await.1, "[]");
}
