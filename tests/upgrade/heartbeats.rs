//! Backends that are known by their heartbeats alone are known to the new process
//! before it serves.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::steady::Steady;
use crate::common::{Engine, eventually, ms, secs, turn};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use tidegate::heartbeat::SenderState;
use tidegate::heartbeat::keys::Secret;
use tidegate::heartbeat::sender::{Sender, Settings};
use tidegate::heartbeat::wire::Identity;

/// Heartbeats concern the control thread alone: one engine will do.
#[test]
fn registered_backends_serve_without_a_gap() {
    serve_without_a_gap(ms(50), "5s");
}

/// The new process cannot wait for the next heartbeat of each.
#[test]
fn registered_backends_that_are_rarely_heard_serve_without_a_gap() {
    serve_without_a_gap(secs(5), "30s");
}

fn serve_without_a_gap(interval: std::time::Duration, ttl: &str) {
    let _turn = turn::shared();
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key");
    std::fs::write(&key, [7; 32]).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let to: SocketAddr = (Ipv4Addr::LOCALHOST, free_port()).into();
    let section = format!(
        "[heartbeat]\nlisten = \"{to}\"\n[[heartbeat.key]]\nid = 1\nfile = \"{}\"\n\
         pools = [\"web\"]\naddresses = [\"127.0.0.0/8\"]\n",
        key.display()
    );
    let heartbeat = format!(
        "register = true\ninterval = \"{}\"\nttl = \"{ttl}\"\nforget_after = \"30s\"",
        humantime::format_duration(interval)
    );
    let pool = Pool { heartbeat, ..Pool::new("web") };
    let mut proxy =
        TestProxy::start(Conf { heartbeat: section, ..Conf::simple(Engine::Epoll, pool) });
    let servers = ["a", "b"].map(|name| (name, ScriptedBackend::start(backend::http(name, 200))));
    let senders = servers.each_ref().map(|(name, server)| {
        let identity = Identity::new("web", name, server.socket_address()).unwrap();
        let secret = Secret::new(&[7; 32]).unwrap();
        let settings = Settings { to: vec![to], identity, key_id: 1, secret, interval };
        let sender = Sender::start(settings).unwrap();
        sender.set_state(SenderState::Ready);
        sender
    });
    let known = |proxy: &TestProxy| {
        let backends = proxy.status()["pools"][0]["backends"].as_array().unwrap().clone();
        backends.iter().filter(|backend| backend["eligible"] == true).count()
    };
    eventually(secs(10), "both have joined", || known(&proxy) == 2);
    let steady = Steady::start(proxy.addr("web"), 2);
    for _ in 0..4 {
        let began = std::time::Instant::now();
        let old = proxy.upgrade();
        let took = began.elapsed();
        assert_eq!(known(&proxy), 2, "known before it serves, after {took:?}");
        proxy.wait_gone(old, secs(5));
    }
    let attempts = steady.stop();
    let failed: Vec<_> = attempts.iter().filter(|one| one.result.is_err()).collect();
    assert!(failed.is_empty(), "{} of {}: {:?}", failed.len(), attempts.len(), failed[0]);
    assert!(attempts.len() > 50);
    drop(senders);
    proxy.rebaseline();
}
