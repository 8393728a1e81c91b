//! Sessions that wait for their header: caps, reloads, upgrades.

use super::{FROM, expecting, holds, line, start};
use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::connect;
use crate::common::conf::Pool;
use crate::common::{Engine, eventually, ms, on_every_engine, secs};
use std::io::Write;
use std::net::TcpStream;

on_every_engine!(
    waiting_sessions_count_in_connections_max,
    header_that_is_half_read_at_a_reload_is_served_with_the_new_pool,
    header_that_is_half_read_at_an_upgrade_is_served,
);

fn waiting_sessions_count_in_connections_max(engine: Engine) {
    let (proxy, backend) = start(engine, FROM, "connections_max = 2");
    let address = proxy.addr("web");
    let mut waiting: Vec<TcpStream> = (0..2).map(|_| connect(address)).collect();
    let active = || proxy.frontend("web")["sessions_active"] == 2;
    eventually(secs(5), "both sessions are open", active);
    let mut third = connect(address);
    third.write_all(&line("192.0.2.3")).unwrap();
    std::thread::sleep(ms(100));
    assert_eq!(backend.accepted(), 0, "a session above the cap");
    waiting[0].write_all(&line("192.0.2.1")).unwrap();
    assert!(holds(&waiting[0]));
    drop(waiting.pop());
    assert!(holds(&third), "the slot of a client that left");
}

fn header_that_is_half_read_at_a_reload_is_served_with_the_new_pool(engine: Engine) {
    let (mut proxy, old) = start(engine, &format!("{FROM}, timeout = \"20s\""), "");
    let header = line("192.0.2.1");
    let mut stream = connect(proxy.addr("web"));
    stream.write_all(&header[..10]).unwrap();
    eventually(secs(5), "the session waits", || proxy.frontend("web")["sessions_active"] == 1);
    let new = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").backend("b", new.address());
    let mut conf = expecting(engine, FROM, "", pool);
    conf.frontends[0].binds = proxy.conf().frontends[0].binds.clone();
    proxy.reload(conf);
    stream.write_all(&header[10..]).unwrap();
    assert!(holds(&stream));
    assert_eq!((old.accepted(), new.accepted()), (0, 1));
}

fn header_that_is_half_read_at_an_upgrade_is_served(engine: Engine) {
    let (mut proxy, _backend) = start(engine, &format!("{FROM}, timeout = \"20s\""), "");
    let header = line("192.0.2.1");
    let mut stream = connect(proxy.addr("web"));
    stream.write_all(&header[..10]).unwrap();
    eventually(secs(5), "the session waits", || proxy.frontend("web")["sessions_active"] == 1);
    proxy.upgrade();
    stream.write_all(&header[10..]).unwrap();
    assert!(holds(&stream), "the old process reads the rest");
    let mut next = connect(proxy.addr("web"));
    next.write_all(&header).unwrap();
    assert!(holds(&next), "the new process expects headers too");
}
