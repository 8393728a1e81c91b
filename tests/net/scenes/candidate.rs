//! The programs under test: Tidegate on each engine, HAProxy and nginx.
//!
//! All run on the same host with the same timers, each with a separate backend. HAProxy and
//! nginx run in TCP mode, keep half-closed sessions, and start from files in a temporary
//! directory. This module checks nothing.

use super::both_ends::{self, BothEnds};
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

/// The path of the module on Debian (libnginx-mod-stream).
const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// One program under test, and the session through it.
pub struct Candidate {
    pub name: &'static str,
    pub frontend: SocketAddr,
    pub backend: SocketAddr,
    pub ends: BothEnds,
    program: Program,
}

pub enum Program {
    Tidegate(Box<TestProxy>),
    Peer { running: Running, _dir: tempfile::TempDir },
}

/// Starts all programs with which the scene runs.
pub fn all(site: &Site, scene: &Scene) -> Vec<Candidate> {
    let mut all = vec![tidegate(Engine::Epoll, site, scene)];
    if io_uring_runs() {
        all.push(tidegate(Engine::IoUring, site, scene));
    }
    if std::env::var("TIDEGATE_PEERS").is_ok_and(|value| value == "1") {
        let peers: [(&str, Config); 2] = [("haproxy", haproxy), ("nginx", nginx)];
        for (name, config) in peers {
            if is_here(name) {
                all.push(peer(name, config, site, scene));
            } else {
                // The comparison is skipped, not the test.
                report("SKIPPED", &format!("no comparison: {name} not found"));
            }
        }
    }
    all
}

/// Returns true if the program is installed. nginx also needs its stream module.
fn is_here(name: &str) -> bool {
    servers::find(name).is_some() && (name != "nginx" || Path::new(NGINX_STREAM).exists())
}

fn places(site: &Site) -> (SocketAddr, SocketAddr) {
    (SocketAddr::from((site.frontend(), free_port())), (site.backend(), free_port()).into())
}

fn tidegate(engine: Engine, site: &Site, scene: &Scene) -> Candidate {
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
    let ends = |frontend| {
        BothEnds::new(frontend, both_ends::listen(&site.backend, backend, scene.receive_buffer))
    };
    let proxy = site.balancer.run(|| TestProxy::start(conf));
    let frontend = proxy.addr("web");
    let program = Program::Tidegate(Box::new(proxy));
    Candidate { name: engine.name(), frontend, backend, ends: ends(frontend), program }
}

type Config = fn(&Path, SocketAddr, SocketAddr, &Limits) -> String;

fn peer(name: &'static str, config: Config, site: &Site, scene: &Scene) -> Candidate {
    let (frontend, backend) = places(site);
    let listener = both_ends::listen(&site.backend, backend, scene.receive_buffer);
    let dir = tempfile::Builder::new().prefix("tg-peer-").tempdir_in("/tmp").expect("a directory");
    let file = dir.path().join("conf");
    std::fs::write(&file, config(dir.path(), frontend, backend, &scene.limits)).expect("write");
    let log = std::fs::File::create(dir.path().join("log")).expect("a log");
    let mut command = Command::new(servers::find(name).expect("the program is installed"));
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
    Candidate { name, frontend, backend, ends: BothEnds::new(frontend, listener), program }
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
    /// The Tidegate process, or `None` for another program.
    pub fn tidegate(&self) -> Option<&TestProxy> {
        match &self.program {
            Program::Tidegate(proxy) => Some(proxy),
            Program::Peer { .. } => None,
        }
    }

    /// Waits until Tidegate knows that the backend has accepted the connection, which the backend
    /// knows first.
    pub fn wait_established(&self) {
        if let Some(proxy) = self.tidegate()
            && self.ends.stuck.is_none()
        {
            eventually(secs(10), "the session is established", || {
                proxy.metric("tidegate_backend_sessions_total", &[]) >= 1.0
            });
        }
    }

    /// Sends a signal to the process and its children.
    pub fn signal(&self, signal: Signal) {
        let pid = match &self.program {
            Program::Tidegate(proxy) => proxy.pid(),
            Program::Peer { running, .. } => running.pid(),
        };
        for pid in proc::children(pid).into_iter().chain([pid]) {
            proc::signal(pid, signal);
        }
    }
}
