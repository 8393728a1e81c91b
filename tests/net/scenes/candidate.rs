//! Who is put to the test: the balancer on each engine, HAProxy and nginx.
//!
//! All run on the balancer's host with the same timers, each in front of a
//! backend of its own. Peers run in TCP mode, keep half-closed sessions, and
//! are started from files in a directory of theirs. Nothing here judges.

use super::duet::{self, Duet};
use super::site::Site;
use super::{Limits, Scene};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::servers::{self, Running};
use crate::common::{Engine, eventually, io_uring_runs, proc, report, secs};
use rustix::process::Signal;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Where Debian has it (libnginx-mod-stream).
const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// One balancer, and the session that is held through it.
pub struct Candidate {
    pub name: &'static str,
    pub frontend: SocketAddr,
    pub backend: SocketAddr,
    pub duet: Duet,
    program: Program,
}

pub enum Program {
    Ours(Box<TestProxy>),
    Peer { running: Running, _dir: tempfile::TempDir },
}

/// Everybody the scene is played with.
pub fn all(site: &Site, scene: &Scene) -> Vec<Candidate> {
    let mut all = vec![ours(Engine::Epoll, site, scene)];
    if io_uring_runs() {
        all.push(ours(Engine::IoUring, site, scene));
    }
    if std::env::var("TIDEGATE_PEERS").is_ok_and(|value| value == "1") {
        let peers: [(&str, Config); 2] = [("haproxy", haproxy), ("nginx", nginx)];
        for (name, config) in peers {
            if is_here(name) {
                all.push(peer(name, config, site, scene));
            } else {
                // The comparison is what is missing, not the test.
                report("SKIPPED", &format!("no comparison: {name} not found"));
            }
        }
    }
    all
}

/// nginx without its stream module is of no use.
fn is_here(name: &str) -> bool {
    servers::find(name).is_some() && (name != "nginx" || Path::new(NGINX_STREAM).exists())
}

fn places(site: &Site) -> (SocketAddr, SocketAddr) {
    (SocketAddr::from((site.frontend(), free_port())), (site.backend(), free_port()).into())
}

fn ours(engine: Engine, site: &Site, scene: &Scene) -> Candidate {
    let (_, backend) = places(site);
    let Limits { connect, idle, half_closed, user_timeout, keepalive } = scene.limits;
    let mut keys = format!(
        "idle_timeout = \"{}ms\"\nhalf_closed_timeout = \"{}ms\"\nstalled_timeout = \"off\"",
        idle.as_millis(),
        half_closed.as_millis()
    );
    for (key, value) in [("user_timeout", user_timeout), ("keepalive", keepalive)] {
        if let Some(value) = value {
            keys += &format!("\n{key} = \"{}ms\"", value.as_millis());
        }
    }
    let pool = Pool::new("web")
        .key(&format!("connect_timeout = \"{}ms\"", connect.as_millis()))
        .backend("a", backend);
    let conf =
        Conf::new(engine).frontend_on(&site.frontend().to_string(), "web", "web", &keys).pool(pool);
    let duet =
        |frontend| Duet::new(frontend, duet::listen(&site.backend, backend, scene.receive_buffer));
    let proxy = site.balancer.run(|| TestProxy::start(conf));
    let frontend = proxy.addr("web");
    let program = Program::Ours(Box::new(proxy));
    Candidate { name: engine.name(), frontend, backend, duet: duet(frontend), program }
}

type Config = fn(&Path, SocketAddr, SocketAddr, &Limits) -> String;

fn peer(name: &'static str, config: Config, site: &Site, scene: &Scene) -> Candidate {
    let (frontend, backend) = places(site);
    let listener = duet::listen(&site.backend, backend, scene.receive_buffer);
    let dir = tempfile::Builder::new().prefix("tg-peer-").tempdir_in("/tmp").expect("a directory");
    let file = dir.path().join("conf");
    std::fs::write(&file, config(dir.path(), frontend, backend, &scene.limits)).expect("write");
    let log = std::fs::File::create(dir.path().join("log")).expect("a log");
    let mut command = Command::new(servers::find(name).expect("it was looked for before"));
    match name {
        "haproxy" => command.args(["-db", "-f"]).arg(&file),
        _ => command.args(["-e", "stderr", "-p"]).arg(dir.path()).arg("-c").arg(&file),
    };
    command.stdout(Stdio::null()).stderr(log);
    let running = site.balancer.run(|| Running::start(&mut command));
    eventually(secs(10), &format!("{name} listens"), || {
        site.balancer.run(|| super::leaks::listens(frontend.port()))
    });
    let program = Program::Peer { running, _dir: dir };
    Candidate { name, frontend, backend, duet: Duet::new(frontend, listener), program }
}

fn haproxy(_: &Path, frontend: SocketAddr, backend: SocketAddr, limits: &Limits) -> String {
    let (ms, Limits { connect, idle, half_closed, user_timeout, keepalive }) = (millis, *limits);
    let ut = user_timeout.map_or(String::new(), |time| format!(" tcp-ut {}", ms(time)));
    let alive = keepalive.map_or(String::new(), |time| {
        let idle = time.as_secs();
        ["cli", "srv"]
            .map(|side| {
                format!("  option {side}tcpka\n  {side}tcpka-idle {idle}s\n  {side}tcpka-intvl {idle}s\n  {side}tcpka-cnt 4\n")
            })
            .concat()
    });
    format!(
        "global\n  nbthread 1\n  maxconn 1000\ndefaults\n  mode tcp\n  timeout connect {}\n  \
         timeout client {idle}\n  timeout server {idle}\n  timeout client-fin {half}\n  \
         timeout server-fin {half}\n  retries 2\n{alive}listen web\n  bind {frontend}{ut}\n  \
         server a {backend}{ut}\n",
        ms(connect),
        idle = ms(idle),
        half = ms(half_closed),
    )
}

fn nginx(dir: &Path, frontend: SocketAddr, backend: SocketAddr, limits: &Limits) -> String {
    let user = if rustix::process::geteuid().is_root() { "user root;\n" } else { "" };
    let (client, server) = limits.keepalive.map_or((String::new(), ""), |time| {
        let idle = time.as_secs();
        (format!(" so_keepalive={idle}:{idle}:4"), "proxy_socket_keepalive on;")
    });
    format!(
        "load_module {NGINX_STREAM};\n{user}daemon off;\nworker_processes 1;\npid {}/pid;\nerror_log stderr crit;\n\
         events {{ worker_connections 1000; }}\nstream {{\n  tcp_nodelay on;\n  \
         proxy_half_close on;\n  proxy_timeout {};\n  proxy_connect_timeout {};\n  {server}\n  \
         server {{ listen {frontend}{client}; proxy_pass {backend}; }}\n}}\n",
        dir.display(),
        millis(limits.idle),
        millis(limits.connect),
    )
}

fn millis(time: Duration) -> String {
    format!("{}ms", time.as_millis())
}

// === impl Candidate ===

impl Candidate {
    /// The balancer under test, if it is ours.
    pub fn ours(&self) -> Option<&TestProxy> {
        match &self.program {
            Program::Ours(proxy) => Some(proxy),
            Program::Peer { .. } => None,
        }
    }

    /// Waits until ours knows that the backend has taken the connection, which
    /// the backend knows first.
    pub fn wait_established(&self) {
        if let Some(proxy) = self.ours()
            && self.duet.stuck.is_none()
        {
            eventually(secs(10), "the session is established", || {
                proxy.metric("tidegate_backend_sessions_total", &[]) >= 1.0
            });
        }
    }

    /// Stops or continues all of it.
    pub fn signal(&self, signal: Signal) {
        let pid = match &self.program {
            Program::Ours(proxy) => proxy.pid(),
            Program::Peer { running, .. } => running.pid(),
        };
        for pid in proc::children(pid).into_iter().chain([pid]) {
            proc::signal(pid, signal);
        }
    }
}
