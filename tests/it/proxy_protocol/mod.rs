//! The PROXY protocol: headers of clients, headers to backends, and real servers on both sides.

mod receive;
mod send;
mod servers;
mod waiting;

use crate::common::Engine;
use crate::common::backend::{self, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

/// Peers on 127.0.0.1 send headers.
const FROM: &str = "from = [\"127.0.0.1\"]";

/// A configuration whose frontend `web` expects headers on its bind.
fn expecting(engine: Engine, source: &str, keys: &str, pool: Pool) -> Conf {
    let keys = format!("proxy_protocol = {{ {source} }}\n{keys}");
    let mut conf = Conf::new(engine).frontend("web", "web", &keys).pool(pool);
    conf.frontend_mut("web").bind_keys = "proxy_protocol = true".to_owned();
    conf
}

/// Starts Tidegate with this frontend in front of an echo.
fn start(engine: Engine, source: &str, keys: &str) -> (TestProxy, ScriptedBackend) {
    let echo = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").backend("a", echo.address());
    (TestProxy::start(expecting(engine, source, keys, pool)), echo)
}

/// A header of version 1 that announces this client.
fn line(client: &str) -> Vec<u8> {
    format!("PROXY TCP4 {client} 198.51.100.20 4000 443\r\n").into_bytes()
}

/// Returns whether the connection echoes a byte.
fn holds(mut stream: &TcpStream) -> bool {
    stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0])).is_ok()
}

/// The record of the session with this socket.
fn record_of(log: &[Value], socket: SocketAddr) -> &Value {
    let socket = socket.to_string();
    let is = |line: &&Value| line["peer"] == *socket || line["client"] == *socket;
    log.iter().find(is).unwrap_or_else(|| panic!("no record of {socket}"))
}

fn refused(proxy: &TestProxy, reason: &str) -> f64 {
    proxy.metric("tidegate_refused_total", &[("frontend", "web"), ("reason", reason)])
}
