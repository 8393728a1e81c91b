//! A small site: a client, the balancer and its backends, each a host.
//!
//! The client is joined to the balancer by an ideal cable, every backend by a
//! [`Link`] of its own, so that one can be cut while the others serve. Tests
//! start programs on these hosts by pid and reach the balancer's admin socket
//! by its path, which no namespace hides. Nothing here judges.

use crate::common::backend::{Script, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::servers::Running;
use crate::common::{Engine, eventually, proc, secs};
use crate::link::Link;
use crate::netns::Namespace;
use rustix::process::Signal;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};

/// Where frontends bind.
pub const FRONTEND: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// Where every backend listens, each on its own host.
const BACKEND_PORT: u16 = 9000;

/// What backends are called, in order.
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

pub struct Hosts {
    pub backends: Vec<Host>,
    pub client: Namespace,
    pub balancer: Namespace,
}

/// A backend's host and its link: *a* is the balancer's end.
pub struct Host {
    pub name: &'static str,
    pub link: Link,
    pub namespace: Namespace,
}

/// A backend in a process of its own that echoes what it gets.
pub struct Service {
    running: Running,
}

// === impl Hosts ===

impl Hosts {
    /// A site with that many backends (5 at most) behind perfect links.
    #[track_caller]
    pub fn new(backends: usize, seed: u64) -> Hosts {
        let (client, balancer) = (Namespace::new("client"), Namespace::new("lb"));
        client.join_by_veth("10.77.0.2/24", &balancer, &format!("{FRONTEND}/24"), "client0");
        // Short sessions by the thousand: without this the client's ports are
        // in TIME_WAIT before a long run is over.
        client.sysctl("ipv4/tcp_tw_reuse", "1");
        let backends = (1..).zip(&NAMES[..backends]).map(|(number, name)| {
            let namespace = Namespace::new(name);
            let link = Link::join(&balancer, &namespace, number, seed + u64::from(number));
            Host { name, link, namespace }
        });
        Hosts { backends: backends.collect(), client, balancer }
    }

    /// The pool `web` with every backend of the site.
    pub fn pool(&self) -> Pool {
        let pool = Pool::new("web");
        self.backends.iter().fold(pool, |pool, host| pool.backend(host.name, host.address()))
    }

    /// A frontend `web` that the client reaches, in front of that pool.
    pub fn conf(&self, engine: Engine, pool: Pool) -> Conf {
        Conf::new(engine).frontend_on(&FRONTEND.to_string(), "web", "web", "").pool(pool)
    }

    /// Starts the balancer on its host.
    #[track_caller]
    pub fn start(&self, conf: Conf) -> TestProxy {
        self.balancer.run(|| TestProxy::start(conf))
    }

    /// Starts it and waits until every backend is known to be up.
    #[track_caller]
    pub fn start_and_see_all_up(&self, conf: Conf) -> TestProxy {
        let proxy = self.start(conf);
        for host in &self.backends {
            proxy.wait_backend("web", host.name, "observation", "up");
        }
        proxy
    }
}

// === impl Host ===

impl Host {
    /// Where its backend listens.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((self.link.b(), BACKEND_PORT))
    }

    /// A scripted backend on this host, in this process.
    pub fn serve(&self, script: Script) -> ScriptedBackend {
        self.namespace.run(|| ScriptedBackend::start_on(self.address(), script))
    }

    /// An echo server on this host, to be killed and stopped.
    #[track_caller]
    pub fn start_echo(&self) -> Service {
        let mut command = Command::new(PROGRAM);
        command.args(["backend", "--threads", "1", "--listen", &self.address().to_string()]);
        command.arg("echo").stdout(Stdio::null());
        let running = self.namespace.run(|| Running::start(&mut command));
        self.namespace.run(|| {
            eventually(secs(10), "the echo server listens", || {
                TcpStream::connect(self.address()).is_ok()
            });
        });
        Service { running }
    }
}

// === impl Service ===

impl Service {
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    pub fn kill(&mut self) {
        self.running.kill();
    }

    /// SIGSTOP: the kernel goes on taking connections, nobody answers.
    pub fn freeze(&self) {
        proc::signal(self.pid(), Signal::STOP);
    }

    /// SIGCONT
    pub fn thaw(&self) {
        proc::signal(self.pid(), Signal::CONT);
    }
}
