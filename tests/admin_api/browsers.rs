//! Requests of web browsers: the files of the operator page, and which pages may use the API.

use crate::harness::{Api, Control, TOKEN, bearer};
use std::sync::atomic::Ordering;
use tidegate_daemon::admin::{Token, Tokens};

const READ_TOKEN: &str = "a-token-that-only-reads";

fn with_read_token(listen: &str) -> Api {
    let api = Api::tcp(listen, None);
    let token = |text: &str| Token::new(text.as_bytes());
    api.tokens.set(Tokens { full: token(TOKEN), read: token(READ_TOKEN) });
    api
}

/// Sends a request with a `Host` of `host` and further headers, and returns the status.
fn status(api: &Api, method: &str, path: &str, headers: &[&str]) -> u16 {
    let all = [headers, &["Content-Length: 0"]].concat();
    api.raw(method, path, &all, b"").status
}

#[test]
fn page_is_served_with_a_policy_that_allows_this_host_alone() {
    for api in [Api::unix(Control::Answers), Api::tcp("127.0.0.1:0", None)] {
        let page = api.ask("GET", "/");
        assert_eq!(page.status, 200);
        assert!(page.body.starts_with("<!doctype html>"), "{}", page.body);
        for header in [
            "content-type: text/html; charset=utf-8",
            "content-security-policy: default-src 'none'; script-src 'self'",
            "x-content-type-options: nosniff",
            "cache-control: no-cache",
        ] {
            assert!(page.head.contains(header), "{header}: {}", page.head);
        }
        let script = api.ask("GET", "/page/main.js");
        assert!(script.head.contains("content-type: text/javascript"), "{}", script.head);
        assert!(api.ask("GET", "/page/base.css").head.contains("content-type: text/css"));
        assert_eq!(api.ask("GET", "/page/nothing.js").error(), (404, "unknown path".to_owned()));
        assert_eq!(api.ask("GET", "/page/..%2Fmod.rs").status, 404);
        assert_eq!(api.ask("POST", "/page/main.js").status, if is_tcp(&api) { 403 } else { 405 });
    }
}

fn is_tcp(api: &Api) -> bool {
    matches!(api.address, tidegate_core::model::AdminListen::Tcp(_))
}

#[test]
fn file_that_has_not_changed_is_not_sent_again() {
    let api = Api::unix(Control::Answers);
    let first = api.ask("GET", "/page/main.js");
    let (_, tag) = first.head.split_once("etag: ").unwrap();
    let tag = format!("If-None-Match: {}", tag.lines().next().unwrap());
    let again = api.raw("GET", "/page/main.js", &["Host: localhost", &tag], b"");
    assert_eq!((again.status, again.body.as_str()), (304, ""));
    let other = api.raw("GET", "/page/dom.js", &["Host: localhost", &tag], b"");
    assert_eq!(other.status, 200);
}

#[test]
fn only_the_page_of_this_api_may_send_requests() {
    let (tcp, unix) = (Api::tcp("127.0.0.1:0", Some(TOKEN)), Api::unix(Control::Answers));
    let token = bearer(TOKEN);
    for api in [&tcp, &unix] {
        let post = |headers: &[&str]| {
            status(api, "POST", "/v1/reload", &[headers, &[token.as_str()]].concat())
        };
        let own = ["Host: 127.0.0.1:9900", "Origin: http://127.0.0.1:9900"];
        assert_eq!(post(&own), 200);
        assert_eq!(post(&[&own[..], &["Sec-Fetch-Site: same-origin"]].concat()), 200);
        assert_eq!(post(&["Host: localhost", "Origin: http://LOCALHOST"]), 200);
        assert_eq!(post(&["Host: localhost", "Sec-Fetch-Site: none"]), 200);
        for foreign in [
            &["Host: localhost", "Origin: null"][..],
            &["Host: localhost", "Origin: http://evil.example"],
            &["Host: localhost:9900", "Origin: http://localhost:9901"],
            &["Host: localhost", "Origin: localhost"],
            &["Host: localhost", "Origin: http://localhost", "Origin: http://evil.example"],
            &["Host: evil.example", "Origin: http://evil.example"],
            &["Host: rebound", "Origin: http://rebound"],
            &["Host: localhost", "Sec-Fetch-Site: cross-site"],
            &["Host: localhost", "Sec-Fetch-Site: same-site"],
        ] {
            assert_eq!(post(foreign), 403, "{foreign:?}");
            assert_eq!(status(api, "GET", "/v1/status", foreign), 403, "{foreign:?}");
        }
        // A link of another site can open the page.
        let link = ["Host: localhost", "Sec-Fetch-Site: cross-site"];
        assert_eq!(status(api, "GET", "/", &link), 200);
    }
    let foreign = ["Host: localhost", "Origin: http://evil.example", &token, "Content-Length: 0"];
    let refused = tcp.raw("POST", "/v1/shutdown", &foreign, b"");
    assert_eq!(refused.error(), (403, "origin not allowed".to_owned()));
    assert!(!tcp.shut_down.load(Ordering::Relaxed));
}

#[test]
fn unix_socket_accepts_host_names_without_a_dot() {
    let api = Api::unix(Control::Answers);
    assert_eq!(status(&api, "GET", "/v1/status", &["Host: whatever"]), 200);
    assert_eq!(status(&api, "POST", "/v1/reload", &["Host: x"]), 200);
    assert_eq!(status(&api, "GET", "/v1/status", &[]), 200);
    // A forwarded socket and a name that an attacker controls.
    assert_eq!(status(&api, "GET", "/v1/status", &["Host: rebound.example:9900"]), 403);
}

#[test]
fn read_token_reads_and_changes_nothing() {
    let api = with_read_token("0.0.0.0:0");
    let reads = bearer(READ_TOKEN);
    let host = "Host: localhost";
    assert_eq!(status(&api, "GET", "/v1/status", &[host]), 401);
    assert_eq!(status(&api, "GET", "/v1/status", &[host, &reads]), 200);
    assert_eq!(status(&api, "GET", "/v1/status", &[host, &bearer(TOKEN)]), 200);
    for path in ["/v1/shutdown", "/v1/reload", "/v1/pools/p/backends/b/drain"] {
        let refused = api.raw("POST", path, &[host, &reads, "Content-Length: 0"], b"");
        assert_eq!(refused.error(), (403, "read-only token".to_owned()), "{path}");
    }
    assert!(!api.shut_down.load(Ordering::Relaxed));
    assert_eq!(status(&api, "POST", "/v1/reload", &[host, &bearer(TOKEN)]), 200);

    api.tokens.set(Tokens { full: None, read: Token::new(READ_TOKEN.as_bytes()) });
    assert_eq!(status(&api, "GET", "/v1/status", &[host, &reads]), 200);
    let refused = api.raw("POST", "/v1/reload", &[host, &reads, "Content-Length: 0"], b"");
    assert_eq!(refused.error(), (403, "no token configured".to_owned()));
}
