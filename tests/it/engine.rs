//! The choice of engine with io_uring available and forbidden.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client;
use crate::common::conf::{Conf, Pool};
use crate::common::ledger::{Ledger, StreamSizes};
use crate::common::proxy::TestProxy;
use crate::common::servers::without_io_uring;
use crate::common::{Engine, exclusive, have};

/// Starts Tidegate with this value of the `engine` key.
fn start(engine: &str, wrapper: &[&str], backend: &ScriptedBackend) -> TestProxy {
    let mut conf = Conf::simple(Engine::Epoll, Pool::new("web").backend("a", backend.address()));
    conf.engine_key = Some(engine.into());
    TestProxy::start_under(conf, wrapper)
}

#[test]
fn forbidden_io_uring_falls_back_to_epoll_with_the_reason() {
    let _share = exclusive::shared();
    if !have(&["python3"]) {
        return;
    }
    for engine in ["io_uring", "auto"] {
        let ledger = Ledger::new(StreamSizes { most: 64 * 1024, large_one_in: 20 });
        let backend = ScriptedBackend::start(ledger.script());
        let proxy = start(engine, &without_io_uring(), &backend);
        let status = proxy.status();
        assert_eq!(status["engine"], "epoll", "{status:#}");
        let reason = status["engine_reason"].as_str().unwrap();
        assert!(reason.contains("EPERM") || reason.contains("not permitted"), "{reason}");
        let log = proxy.log();
        let lines = log.lines().filter(|line| line.contains("engine") && line.contains("epoll"));
        assert_eq!(lines.count(), 1, "reported once, in one line: {log}");
        ledger.run(&[proxy.addr("web")], 0..100, 8);
        ledger.settle();
        ledger.assert_clean();
    }
}

#[test]
fn auto_selects_epoll_and_reports_that_io_uring_is_available() {
    let _share = exclusive::shared();
    let backend = ScriptedBackend::start(backend::name("a"));
    let proxy = start("auto", &[], &backend);
    let status = proxy.status();
    assert_eq!(status["engine"], "epoll", "{status:#}");
    assert!(
        status["engine_reason"].as_str().unwrap().contains("io_uring is available"),
        "{status:#}"
    );
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "a");
}

#[test]
fn configured_io_uring_is_shown_in_status_and_metrics() {
    let _share = exclusive::shared();
    let backend = ScriptedBackend::start(backend::name("a"));
    let proxy = start("io_uring", &[], &backend);
    assert_eq!(proxy.status()["engine"], "io_uring", "{:#}", proxy.status());
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "a");
    let build = proxy.admin_request("GET", "/metrics").body;
    assert!(build.contains("engine=\"io_uring\""), "a metric names the engine");
}

#[test]
fn configured_epoll_creates_no_ring() {
    let _share = exclusive::shared();
    let backend = ScriptedBackend::start(backend::name("a"));
    let proxy = start("epoll", &[], &backend);
    assert_eq!(proxy.status()["engine"], "epoll");
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "a");
    let rings = crate::common::proc::fds(proxy.pid());
    assert!(!rings.iter().any(|fd| fd.contains("[io_uring]")), "{rings:?}");
}
