//! Sessions that reach `session_max`.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, ms, on_every_engine, patience, secs};
use std::time::Instant;

on_every_engine!(sessions_end_in_order_at_session_max);

fn sessions_end_in_order_at_session_max(engine: Engine) {
    const SESSIONS: usize = 16;
    let backend = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").backend("a", backend.address());
    let mut conf = Conf::simple(engine, pool);
    conf.frontend_mut("web").keys += "session_max = \"2s\"\n";
    let proxy = TestProxy::start(conf);
    let began = Instant::now();
    let clients: Vec<_> = (0..SESSIONS).map(|_| connect(proxy.addr("web"))).collect();
    for client in &clients {
        assert_eq!(client::exchange(client, b"hello").unwrap(), b"hello");
    }
    for client in &clients {
        assert_eq!(client::read_to_end(client), End::Fin(0), "closed with FIN");
    }
    let took = began.elapsed();
    assert!(took > ms(1600) && took < patience(secs(3)), "closed after {took:?}");
    let log = proxy.wait_access_log(SESSIONS);
    let mut ages = Vec::new();
    for line in &log {
        let found = (&line["cause"], &line["phase"], &line["code"], &line["timer"]);
        let expected = (&"session-max".into(), &"data".into(), &"cD".into(), &"session_max".into());
        assert_eq!(found, expected, "{line:#}");
        ages.push(line["duration_seconds"].as_f64().unwrap());
    }
    ages.sort_by(f64::total_cmp);
    assert!(ages[0] > 1.6, "{ages:?}");
    assert!(ages[SESSIONS - 1] - ages[0] > 0.02, "they do not end together: {ages:?}");
}
