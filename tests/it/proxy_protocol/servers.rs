//! HAProxy and nginx as senders and receivers of headers.

use super::{FROM, expecting};
use crate::common::client::connect_from;
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::servers::{Running, find};
use crate::common::{Engine, eventually, have, http, on_every_engine, secs};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::process::{Command, Stdio};

on_every_engine!(client_address_travels_from_haproxy_to_haproxy_and_nginx);

/// A server with a configuration file of its own.
struct Server {
    _running: Running,
    dir: tempfile::TempDir,
}

fn start(program: &str, config: &str, arguments: &[&str]) -> Server {
    let dir = tempfile::Builder::new().prefix("tg-pp-").tempdir_in("/tmp").unwrap();
    let path = dir.path().join("server.conf");
    std::fs::write(&path, config.replace("DIR", dir.path().to_str().unwrap())).unwrap();
    let log = std::fs::File::create(dir.path().join("error.log")).unwrap();
    let mut command = Command::new(find(program).unwrap());
    command.args(arguments).arg(&path).stdout(Stdio::null()).stderr(log);
    Server { _running: Running::start(&mut command), dir }
}

impl Server {
    fn errors(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("error.log")).unwrap_or_default()
    }
}

fn local() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

/// HAProxy that passes each connection to `to[n].1` from `to[n].0`, with a header.
fn sender(to: &[(SocketAddr, SocketAddr, &str)]) -> Server {
    let mut config = "global\n  maxconn 200\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 9s\n  timeout server 9s\n".to_owned();
    for (number, (bind, server, option)) in to.iter().enumerate() {
        config += &format!("listen l{number}\n  bind {bind}\n  server s {server} {option}\n");
    }
    start("haproxy", &config, &["-db", "-f"])
}

/// HAProxy that answers with the client's address from the header.
fn haproxy_receiver(bind: SocketAddr) -> Server {
    let config = format!(
        "global\n  maxconn 200\ndefaults\n  mode http\n  timeout client 9s\n  timeout http-request 9s\n\
         frontend f\n  bind {bind} accept-proxy\n  http-request return status 200 \
         content-type text/plain lf-string \"%[src]:%[src_port]\"\n"
    );
    start("haproxy", &config, &["-db", "-f"])
}

/// nginx that answers with the client's address from the header.
fn nginx_receiver(bind: SocketAddr) -> Server {
    let config = format!(
        "daemon off; worker_processes 1; pid DIR/nginx.pid; error_log stderr;\n\
         events {{ worker_connections 100; }}\n\
         http {{ access_log off; client_body_temp_path DIR/b; proxy_temp_path DIR/p; \
         fastcgi_temp_path DIR/f; uwsgi_temp_path DIR/u; scgi_temp_path DIR/s;\n\
         server {{ listen {bind} proxy_protocol; default_type text/plain; \
         location / {{ return 200 \"$proxy_protocol_addr:$proxy_protocol_port\"; }} }} }}\n"
    );
    start("nginx", &config, &["-e", "stderr", "-c"])
}

/// The answer to a request from 127.0.0.5, and the address that it must name.
fn ask(address: SocketAddr) -> std::io::Result<(String, String)> {
    let mut stream = connect_from("127.0.0.5".parse().unwrap(), address)?;
    let own = stream.local_addr()?.to_string();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok((body.trim().to_owned(), own))
}

fn client_address_travels_from_haproxy_to_haproxy_and_nginx(engine: Engine) {
    if !have(&["haproxy", "nginx"]) {
        return;
    }
    let (by_haproxy, by_nginx) = (local(), local());
    let receivers = [haproxy_receiver(by_haproxy), nginx_receiver(by_nginx)];
    let headers = [
        ("v1", "\"v1\""),
        ("v2", "\"v2\""),
        ("crc", "{ version = \"v2\", crc32c = true, send = [\"authority\", \"unique-id\"] }"),
    ];
    let mut conf = Conf::new(engine);
    let mut chains = Vec::new();
    for (receiver, address) in [("h", by_haproxy), ("n", by_nginx)] {
        for (header, value) in headers {
            let name = format!("{receiver}-{header}");
            let pool = Pool::new(&name)
                .key(&format!("proxy_protocol = {value}"))
                .probe("kind = \"http\"\ninterval = \"200ms\"")
                .backend("a", address);
            let one = expecting(engine, FROM, "", pool);
            let mut frontend = one.frontends[0].clone();
            (frontend.name, frontend.pool) = (name.clone(), name.clone());
            conf.frontends.push(frontend);
            conf = conf.pool(one.pools[0].clone());
            chains.push(name);
        }
    }
    let proxy = TestProxy::start(conf);
    let options =
        ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"];
    let routes: Vec<_> = chains
        .iter()
        .flat_map(|name| options.map(|option| (local(), proxy.addr(name), option)))
        .collect();
    let sender = sender(&routes);
    for (receiver, address) in ["h-v1", "n-v1"].into_iter().zip([by_haproxy, by_nginx]) {
        eventually(secs(10), "the receiver answers probes that have a header", || {
            proxy.backend(receiver, "a")["observation"] == "up"
        });
        assert!(http::over_tcp(address, "/").is_err(), "{receiver} accepts no plain request");
    }
    for (bind, _, option) in &routes {
        let mut answer = None;
        eventually(secs(10), "the chain answers", || {
            answer = ask(*bind).ok().filter(|(body, _)| !body.is_empty());
            answer.is_some()
        });
        let (body, own) = answer.unwrap();
        assert_eq!(body, own, "{option}: {}", sender.errors());
    }
    drop(receivers);
}
