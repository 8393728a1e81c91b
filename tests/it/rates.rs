//! `download_rate` and `upload_rate`: each direction has its own limit, and a reload changes it
//! for new sessions.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::connect;
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, on_every_engine};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::time::{Duration, Instant};

on_every_engine!(rates_limit_each_direction_and_a_reload_changes_them);

/// Bytes of a transfer: 1 s at the rate of the tests.
const BYTES: usize = 4 << 20;

const RATE: &str = "\"4MiB/s\"";

/// Least time of a limited transfer. The kernel starts faster than the rate.
const LIMITED: Duration = Duration::from_millis(400);

/// Sends [`BYTES`] through an echo. Returns the time until all are back.
fn transfer(address: SocketAddr) -> Duration {
    let (stream, began) = (connect(address), Instant::now());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (&stream).write_all(&vec![7; BYTES]).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        (&stream).read_to_end(&mut back).unwrap();
        assert_eq!(back.len(), BYTES);
    });
    began.elapsed()
}

fn rates_limit_each_direction_and_a_reload_changes_them(engine: Engine) {
    let echo = ScriptedBackend::start(backend::echo());
    let with = |keys: &str| {
        let pool = Pool::new("web").backend("a", echo.address());
        Conf::new(engine).frontend("web", "web", keys).pool(pool)
    };
    let mut proxy = TestProxy::start(with(&format!("download_rate = {RATE}")));
    let address = proxy.addr("web");
    assert!(transfer(address) > LIMITED, "to the client");
    let binds = proxy.conf().frontends[0].binds.clone();
    let mut reload = |keys: &str| {
        let mut conf = with(keys);
        conf.frontends[0].binds = binds.clone();
        proxy.reload(conf);
    };
    reload(&format!("upload_rate = {RATE}"));
    assert!(transfer(address) > LIMITED, "to the backend");
    reload("");
    // Other tests can delay one of them.
    let fastest = (0..5).map(|_| transfer(address)).min().unwrap();
    assert!(fastest < LIMITED, "no limit: {fastest:?}");
}
