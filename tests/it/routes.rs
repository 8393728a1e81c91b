//! Routes of a frontend: by client address, by bind port and address, with `refuse`, after a
//! reload, and with full pools.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect_from};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, on_every_engine, secs};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

on_every_engine!(
    client_address_selects_the_pool,
    bind_port_or_address_selects_the_pool,
    route_with_refuse_resets_the_client_without_a_backend,
    reload_changes_routes_and_keeps_sessions,
    client_waits_in_the_queue_of_the_pool_of_its_route,
    retries_stay_in_the_pool_of_the_route,
);

/// Two backends that send `web` and `special`, and a frontend with routes to them.
struct Routed {
    proxy: TestProxy,
    _backends: [ScriptedBackend; 2],
}

impl Routed {
    fn start(engine: Engine, routes: &str) -> Routed {
        Routed::with(engine, |conf| {
            conf.frontend_mut("web").keys = routes.to_owned();
        })
    }

    fn with(engine: Engine, change: impl FnOnce(&mut Conf)) -> Routed {
        let backends = ["web", "special"].map(|name| ScriptedBackend::start(backend::name(name)));
        let [web, special] = &backends;
        let mut conf = Conf::new(engine)
            .frontend("web", "web", "")
            .pool(Pool::new("web").backend("a", web.address()))
            .pool(Pool::new("special").backend("s", special.address()));
        change(&mut conf);
        Routed { proxy: TestProxy::start(conf), _backends: backends }
    }
}

/// Returns the answer to a client with the address `source`, or `None` after a reset.
fn answer(source: &str, address: SocketAddr) -> Option<String> {
    let mut stream = connect_from(source.parse().unwrap(), address).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

fn client_address_selects_the_pool(engine: Engine) {
    let routes = "[[frontend.web.route]]\nsources = [\"127.0.0.3\", \"127.0.0.8/30\"]\n\
                  pool = \"special\"\n\
                  [[frontend.web.route]]\nsources = \"127.0.0.0/28\"\npool = \"web\"\n";
    let routed = Routed::start(engine, routes);
    let address = routed.proxy.addr("web");
    for (source, pool) in [
        ("127.0.0.3", "special"),
        ("127.0.0.9", "special"),
        ("127.0.0.2", "web"),
        ("127.0.0.20", "web"),
    ] {
        assert_eq!(answer(source, address).as_deref(), Some(pool), "{source}");
    }
    let mut taken: Vec<(String, u64)> = routed
        .proxy
        .wait_access_log(4)
        .iter()
        .map(|line| {
            (line["pool"].as_str().unwrap().to_owned(), line["route"].as_u64().unwrap_or(0))
        })
        .collect();
    taken.sort();
    let expected = [("special", 1), ("special", 1), ("web", 0), ("web", 2)];
    assert_eq!(taken, expected.map(|(pool, route)| (pool.to_owned(), route)));
}

fn bind_port_or_address_selects_the_pool(engine: Engine) {
    let wild = free_port();
    let mut second = None;
    let routed = Routed::with(engine, |conf| {
        let web = conf.frontend_mut("web");
        let port = loop {
            let port = free_port();
            if port != web.binds[0].port() && port != wild {
                break port;
            }
        };
        second = Some(SocketAddr::from(([127, 0, 0, 1], port)));
        web.binds.push(second.unwrap());
        web.keys =
            format!("[[frontend.web.route]]\nports = [\"{port}-{port}\"]\npool = \"special\"\n");
        let mut any = web.clone();
        any.name = "any".to_owned();
        any.binds = vec![SocketAddr::from(([0, 0, 0, 0], wild))];
        any.keys =
            "[[frontend.any.route]]\naddresses = \"127.0.0.7\"\npool = \"special\"\n".to_owned();
        conf.frontends.push(any);
    });
    let by_name = |address| client::ask(address).unwrap();
    assert_eq!(by_name(routed.proxy.addr("web")), "web");
    assert_eq!(by_name(second.unwrap()), "special");
    assert_eq!(by_name(([127, 0, 0, 1], wild).into()), "web");
    assert_eq!(by_name(([127, 0, 0, 7], wild).into()), "special");
}

fn route_with_refuse_resets_the_client_without_a_backend(engine: Engine) {
    let routes = "[[frontend.web.route]]\nsources = \"127.0.0.3\"\nrefuse = true\n\
                  [[frontend.web.route]]\nsources = \"127.0.0.0/8\"\npool = \"special\"\n";
    let routed = Routed::start(engine, routes);
    let address = routed.proxy.addr("web");
    assert_eq!(answer("127.0.0.2", address).as_deref(), Some("special"));
    if let Ok(stream) = connect_from("127.0.0.3".parse().unwrap(), address) {
        assert_eq!(client::read_to_end(&stream), End::Reset(0));
    }
    let labels = [("frontend", "web"), ("reason", "route")];
    eventually(secs(5), "the rejection is counted", || {
        routed.proxy.metric("tidegate_refused_total", &labels) == 1.0
    });
    let log = routed.proxy.wait_access_log(2);
    let line = log.iter().find(|line| line["cause"] == "route").expect("a line for the route");
    assert_eq!((line["phase"].as_str(), line["code"].as_str()), (Some("admit"), Some("PR")));
    assert!(line["route"] == 1 && line["pool"].is_null() && line["backend"].is_null(), "{line}");
}

fn reload_changes_routes_and_keeps_sessions(engine: Engine) {
    let echo = ScriptedBackend::start(backend::echo());
    let special = ScriptedBackend::start(backend::name("special"));
    let conf = Conf::new(engine)
        .frontend("web", "web", "")
        .pool(Pool::new("web").backend("a", echo.address()))
        .pool(Pool::new("special").backend("s", special.address()));
    let mut proxy = TestProxy::start(conf);
    let address = proxy.addr("web");
    let holds = |mut stream: &TcpStream| {
        stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0])).is_ok()
    };
    let kept = connect_from("127.0.0.3".parse().unwrap(), address).unwrap();
    assert!(holds(&kept));
    let change_route = |target: &str, proxy: &mut TestProxy| {
        let mut conf = proxy.conf();
        conf.frontend_mut("web").keys =
            format!("[[frontend.web.route]]\nsources = \"127.0.0.3\"\n{target}\n");
        proxy.reload(conf);
    };
    change_route("pool = \"special\"", &mut proxy);
    assert_eq!(answer("127.0.0.3", address).as_deref(), Some("special"));
    change_route("refuse = true", &mut proxy);
    assert_eq!(answer("127.0.0.3", address), None);
    assert!(holds(&kept), "an open session continues");
    let other = connect_from("127.0.0.2".parse().unwrap(), address).unwrap();
    assert!(holds(&other));
}

fn client_waits_in_the_queue_of_the_pool_of_its_route(engine: Engine) {
    let echo = ScriptedBackend::start(backend::echo());
    let name = ScriptedBackend::start(backend::name("special"));
    let full = Pool::new("full").key("queue_timeout = \"20s\"").backend_with(
        "a",
        echo.address(),
        "connections_max = 1",
    );
    let routes = "[[frontend.web.route]]\nsources = \"127.0.0.3\"\npool = \"full\"\n";
    let conf = Conf::new(engine)
        .frontend("web", "special", routes)
        .pool(full)
        .pool(Pool::new("special").backend("s", name.address()));
    let proxy = TestProxy::start(conf);
    let address = proxy.addr("web");
    let echoed = |mut stream: &TcpStream| {
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    };
    let first = connect_from("127.0.0.3".parse().unwrap(), address).unwrap();
    echoed(&first);
    let waits = connect_from("127.0.0.3".parse().unwrap(), address).unwrap();
    eventually(secs(5), "the second client is queued", || {
        proxy.metric("tidegate_pool_queued", &[("pool", "full")]) == 1.0
    });
    // Clients of the other pool are not delayed.
    assert_eq!(answer("127.0.0.2", address).as_deref(), Some("special"));
    drop(first);
    echoed(&waits);
}

fn retries_stay_in_the_pool_of_the_route(engine: Engine) {
    let refusing = backend::Refusing::new();
    let routed = Routed::with(engine, |conf| {
        conf.pool_mut("special").backends.clear();
        let pool = conf.pool_mut("special").clone();
        *conf.pool_mut("special") = pool.backend("dead", refusing.address);
        conf.frontend_mut("web").keys =
            "[[frontend.web.route]]\nsources = \"127.0.0.3\"\npool = \"special\"\n".to_owned();
    });
    let address = routed.proxy.addr("web");
    assert_eq!(answer("127.0.0.3", address), None);
    assert_eq!(answer("127.0.0.2", address).as_deref(), Some("web"));
}
