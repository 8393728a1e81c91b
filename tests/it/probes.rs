//! Probes of many backends at once.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, exclusive, long, measured, ms, secs};
use std::net::TcpListener;
use std::time::{Duration, Instant};

const PROBE: &str =
    "interval = \"500ms\"\ntimeout = \"400ms\"\nfast_interval = \"400ms\"\nfall = 2";

/// Stops the backend `name` of pool `web`. Returns the time until it is down.
fn death(proxy: &TestProxy, name: &str, backend: ScriptedBackend) -> Duration {
    proxy.wait_backend("web", name, "observation", "up");
    let path = format!("/v1/pools/web/backends/{name}/explain");
    let began = Instant::now();
    drop(backend);
    eventually(secs(30), "the backend is down", || {
        proxy.admin_request("GET", &path).json()["observation"] == "down"
    });
    began.elapsed()
}

mod alone {
    use super::*;

    #[test]
    fn thousands_of_hanging_backends_do_not_delay_detection() {
        let _share = exclusive::alone();
        let count = if long() { 5_000 } else { 3_000 };
        let start = || {
            let named = |n: u32| (format!("d{n}"), ScriptedBackend::start(backend::http("d", 200)));
            let backends: Vec<_> = (0..3).map(named).collect();
            let web = Pool::new("web").probe(PROBE);
            let web = backends
                .iter()
                .fold(web, |pool, (name, backend)| pool.backend(name, backend.address()));
            (backends, Conf::simple(Engine::Epoll, web))
        };
        let deaths = |proxy: &TestProxy, backends: Vec<(String, ScriptedBackend)>| {
            let all = backends.into_iter().map(|(name, backend)| death(proxy, &name, backend));
            let mut took: Vec<Duration> = all.collect();
            took.sort();
            took
        };
        let (backends, conf) = start();
        let alone = deaths(&TestProxy::start(conf), backends);

        // No process accepts here: some connects succeed and no probe gets an answer.
        let hanging = TcpListener::bind("0.0.0.0:0").unwrap();
        let mute = "kind = \"send-expect\"\nsend = \"?\"\nexpect = \"!\"\ninterval = \"2s\"\n\
                    timeout = \"1s\"\nfast_interval = \"1s\"";
        let many = Pool::new("many").probe(mute).key("startup_grace = \"1s\"");
        let port = hanging.local_addr().unwrap().port();
        let addresses = (0..count).map(|n| format!("127.9.{}.{}:{port}", n / 250, n % 250 + 1));
        let many = (0..count)
            .zip(addresses)
            .fold(many, |pool, (n, address)| pool.backend(&format!("h{n}"), address));
        let (backends, conf) = start();
        let proxy = TestProxy::start(conf.pool(many));
        let next_to_many = deaths(&proxy, backends);
        let waited = proxy.metric("tidegate_probes_waited_total", &[]);
        measured(&format!(
            "down after {alone:.0?} alone, {next_to_many:.0?} next to {count} that hang; {waited} probes waited"
        ));
        assert!(
            next_to_many[1] < alone[1].mul_f64(1.5) + ms(300),
            "{next_to_many:?} instead of {alone:?}"
        );
    }
}
