//! Configuration in several files, defaults and disabled sections: each change is put in force
//! and cuts no session. The engine does not matter here.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, exclusive, secs};
use std::io::{Read, Write};
use std::net::SocketAddr;

fn frontend(port: u16, more: &str) -> String {
    format!("# More.\n[frontend.more]\nbind = \"127.0.0.1:{port}\"\npool = \"web\"\n{more}")
}

#[test]
fn included_files_are_watched_and_no_session_is_cut() {
    let _share = exclusive::shared();
    let echo = ScriptedBackend::start(backend::echo());
    let conf = Conf::simple(Engine::Epoll, Pool::new("web").backend("a", echo.address()));
    let mut proxy = TestProxy::start(conf);
    let mut open = connect(proxy.addr("web"));
    let directory = proxy.dir().join("conf.d");
    std::fs::create_dir(&directory).unwrap();
    let text = proxy.render(&proxy.conf());
    proxy.rewrite_by_rename(&format!("include = \"conf.d/*.toml\"\n{text}"));
    assert_eq!(proxy.admin_request("POST", "/v1/reload").status, 200);

    let (first, second) = (free_port(), free_port());
    let address = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    let answers = |port: u16| client::try_connect(address(port)).is_ok();
    let file = directory.join("more.toml");
    std::fs::write(&file, frontend(first, "")).unwrap();
    eventually(secs(10), "the new file is read", || answers(first));
    std::fs::write(&file, frontend(second, "")).unwrap();
    eventually(secs(10), "the changed file is read", || answers(second) && !answers(first));

    std::fs::write(&file, frontend(second, "pol = 1\n")).unwrap();
    let place = "more.toml:5:1";
    eventually(secs(10), "the problem is logged with its place", || proxy.log().contains(place));
    assert!(answers(second), "the previous configuration stays in effect");
    std::fs::write(&file, frontend(second, "enabled = false\n")).unwrap();
    eventually(secs(10), "a disabled frontend does not listen", || !answers(second));

    open.write_all(b"ping").unwrap();
    let mut got = [0; 4];
    open.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"ping", "the open connection continues");
    proxy.rebaseline();
}

#[test]
fn defaults_and_disabled_backends_take_effect_on_reload() {
    let _share = exclusive::shared();
    let (a, b) =
        (ScriptedBackend::start(backend::name("a")), ScriptedBackend::start(backend::name("b")));
    let pool = Pool::new("web").backend("a", a.address()).backend("b", b.address());
    let mut proxy = TestProxy::start(Conf::simple(Engine::Epoll, pool));
    let text = proxy.render(&proxy.conf());
    let mark = "name = \"b\"";
    assert!(text.contains(mark), "{text}");
    let disabled = text.replace(mark, "enabled = false\nname = \"b\"");
    proxy.rewrite_by_rename(&format!("{disabled}\n[defaults.pool]\nstartup_grace = \"7s\"\n"));
    let answer = proxy.admin_request("POST", "/v1/reload");
    assert_eq!(answer.status, 200, "{}", answer.body);
    for _ in 0..4 {
        assert_eq!(client::ask(proxy.addr("web")).unwrap(), "a");
    }
    proxy.rebaseline();
}
